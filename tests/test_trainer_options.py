"""How the trainer evaluates its networks: precision, accumulation, recomputed activations, compiled, never waiting."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import dimo_ext
from dimo.config import ConfigError
from dimo.distill import auxiliary_loss, student_loss
from dimo.optimizers import Updater
from dimo.teachers import MaskGITTeacher, Teacher
from dimo.trainer import CHECKPOINT, DistillationTrainer, PretrainingTrainer, run_training
from tests.conftest import assert_close
from tests.test_trainer import SIZES, Crash, assert_same_files, before_step, crash, distill_config, make, tiny

OPTIONS = [
    {"precision": "bfloat16"},
    {"accumulation_steps": 2},
    {"activation_checkpointing": True},
    {"precision": "bfloat16", "accumulation_steps": 2, "activation_checkpointing": True},
]
BOTH = pytest.mark.parametrize("fresh", [True, False])


def trainer_of(fresh: bool = False, teacher: MaskGITTeacher | None = None, **run) -> DistillationTrainer:
    """A distillation with one auxiliary step."""
    method = {"fresh_auxiliary_batch": fresh, "num_auxiliary_steps": 1}
    return DistillationTrainer(teacher or tiny(), distill_config(Path("unused"), method, **run))


def gradients_of(trainer: DistillationTrainer, index: int = 0) -> dict[str, list[Tensor]]:
    """What each optimiser was given in one step."""
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str, updater: Updater) -> None:
        gradients = [parameter.grad.clone() for parameter in updater.parameters]
        seen[name] = gradients

    for name, updater in trainer.updaters.items():
        updater.optimizer.register_step_pre_hook(lambda *_, name=name, updater=updater: keep(name, updater))
    trainer.step(index)
    return seen


@pytest.fixture
def counted_compilations(monkeypatch):
    """torch.compile without code generation; a list that grows with each graph."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend=backend))
    torch._dynamo.reset()
    yield graphs
    torch._dynamo.reset()


# --- any of them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["distill", "pretrain"])
def test_a_resumed_run_equals_the_straight_one(kind, options, tmp_path):
    run_training(*make(kind, tmp_path / "straight", **options))
    dying, config = make(kind, tmp_path / "resumed", **options)
    before_step(dying, 4, crash)
    with pytest.raises(Crash):
        run_training(dying, config)
    run_training(*make(kind, tmp_path / "resumed", **options))
    assert_same_files(tmp_path / "straight", tmp_path / "resumed")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@BOTH
def test_a_step_reads_no_value(fresh, options):
    """On fake tensors there is none: whatever would wait for a GPU to know a number, a shape or a branch, raises."""
    trainer = trainer_of(fresh, **options)
    with FakeTensorMode(allow_non_fake_inputs=True):
        scalars = trainer.step(0)
    assert all(value.shape == () for value in scalars.values())


def test_a_step_that_reads_a_value_is_noticed(monkeypatch):
    """Else the test above would say nothing."""
    plain = Updater.update
    monkeypatch.setattr(Updater, "update", lambda *args: plain(*args).item())
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(DataDependentOutputException):
        trainer_of().step(0)


def test_a_graph_needs_a_gpu():
    with pytest.raises(ConfigError, match=r"run\.cuda_graph: expected a cuda device, got cpu"):
        trainer_of(cuda_graph=True)


# --- accumulation ---------------------------------------------------------------------------------------------------


@BOTH
def test_accumulated_gradients_are_the_mean_over_the_batches(fresh):
    """Step 1 of two batches each has those numbered 2 and 3."""
    trainer = trainer_of(fresh, accumulation_steps=2, batch_size=3)
    start, expected = copy.deepcopy(trainer.student), []
    for number in (2, 3):
        key = dimo_ext.fold_in(trainer.key, number)
        condition = trainer.teacher.sample_condition(3, dimo_ext.fold_in(key, 0))
        losses = student_loss(
            start, trainer.teacher, trainer.auxiliary, condition, trainer.method, dimo_ext.fold_in(key, 1)
        )
        expected.append(torch.autograd.grad(losses.loss, list(start.parameters())))
    actual = gradients_of(trainer, 1)["student_optimizer"]
    for a, first, second in zip(actual, *expected, strict=True):
        assert_close(a, (first + second) / 2)


def test_accumulated_auxiliary_gradients(monkeypatch):
    """The second auxiliary update masks both batches anew."""
    trainer = DistillationTrainer(tiny(), distill_config(Path("unused"), accumulation_steps=2, batch_size=3))
    calls = []
    monkeypatch.setattr(
        "dimo.trainer.auxiliary_loss",
        lambda *args: calls.append((copy.deepcopy(args[0]), *args[1:])) or auxiliary_loss(*args),
    )
    actual = gradients_of(trainer)["auxiliary_optimizer"]
    assert len(calls) == 2
    assert not torch.equal(calls[0][1], calls[1][1])
    parts = [torch.autograd.grad(auxiliary_loss(*call), list(call[0].parameters())) for call in calls]
    for a, first, second in zip(actual, *parts, strict=True):
        assert_close(a, (first + second) / 2)


def test_accumulation_averages_what_is_logged():
    trainer, parts = trainer_of(accumulation_steps=3), []
    plain = trainer._student_batch
    trainer._student_batch = lambda key: parts.append(plain(key)) or parts[-1]
    scalars = trainer.step(0)
    for name, value in parts[0].scalars.items():
        mean = sum(part.scalars[name] for part in parts) / 3
        assert_close(scalars[name], mean)
        assert not torch.equal(mean, value)


# --- precision ------------------------------------------------------------------------------------------------------


@BOTH
def test_bfloat16_keeps_float32_weights(fresh):
    """Logits are half, everything that lasts is not; a teacher of half weights trains float32 copies."""
    for teacher in (tiny(), tiny().bfloat16()):
        trainer = trainer_of(fresh, teacher, precision="bfloat16")
        seen = [dtypes_of(network) for network in (trainer.student, trainer.teacher, trainer.auxiliary)]
        trainer.step(0)
        assert seen == [{torch.bfloat16}] * 3
        for module in trainer.modules.values():
            assert {p.dtype for p in module.parameters()} == {torch.float32}
        for updater in trainer.updaters.values():
            moments = [v for state in updater.optimizer.state.values() for v in state.values()]
            assert {v.dtype for v in moments} == {torch.float32}


@BOTH
def test_bfloat16_gradients_are_near_those_of_float32(fresh):
    """Of every weight of both networks: a cast kept from another gradient mode would cut it off."""
    near = {p: gradients_of(trainer_of(fresh, trained(), batch_size=64, precision=p)) for p in ("float32", "bfloat16")}
    for name, exact in near["float32"].items():
        for a, b in zip(near["bfloat16"][name], exact, strict=True):
            assert (a - b).norm() <= 0.6 * b.norm() + 1e-4, name


def dtypes_of(network: MaskGITTeacher) -> set[torch.dtype]:
    """A set that gets the dtype of its later logits."""
    plain, seen = network.logits, set()
    network.logits = lambda *args, **kwargs: seen.add((out := plain(*args, **kwargs)).dtype) or out
    return seen


def trained() -> MaskGITTeacher:
    """A teacher whose predictions are neither uniform nor certain."""
    model = tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
    return model


def test_a_fresh_batch_comes_from_the_updated_student():
    """No cast of the student's weights outlives its optimiser step."""
    trainer, seen = trainer_of(True, precision="bfloat16"), []
    trainer.updaters["student_optimizer"].learning_rate = lambda _: 0.5
    plain = trainer.student.logits
    trainer.student.logits = lambda *a, **k: seen.append((a, k, out := plain(*a, **k))) or out
    trainer.step(0)
    args, options, out = seen[1]
    with torch.no_grad(), trainer.precision():
        assert torch.equal(out, plain(*args, **options))


# --- recomputed activations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_activations_change_no_bit(dropout, tmp_path):
    """Of two steps; with dropout, the second evaluation drops what the first did."""
    trained = []
    for recompute in (False, True):
        trainer = make("pretrain", tmp_path, activation_checkpointing=recompute)[0]
        for module in trainer.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
        trainer.step(0), trainer.step(1)
        trained.append(trainer.model)
    for a, b in zip(trained[0].parameters(), trained[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_activations_are_recomputed_where_there_is_a_backward_pass():
    """Student and auxiliary twice, the teacher once; what is kept between is the layers' inputs."""
    calls = dict.fromkeys(["student", "auxiliary", "teacher"], 0)
    trainer = trainer_of(activation_checkpointing=True)
    for name in calls:
        layer = getattr(trainer, name).network.transformer.layers[0]
        layer.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    trainer.step(0)
    assert calls == {"student": 2, "auxiliary": 2, "teacher": 1}
    assert not trainer.result.network.transformer.recompute  # samplers have nothing to gain


@pytest.mark.parametrize("option", ["activation_checkpointing", "compile"])
def test_a_teacher_without_layers_says_so(option):
    class Bare(MaskGITTeacher):
        kind = "bare"
        layers, checkpoint_activations = Teacher.layers, Teacher.checkpoint_activations

    with pytest.raises(ValueError, match=f"{option}: teacher kind 'bare'"):
        trainer_of(teacher=Bare(tiny().network), **{option: True})


# --- compiled -------------------------------------------------------------------------------------------------------


# torch.compile looks at the gradient of a layer's input, which is no leaf, and warns of that itself.
COMPILED = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@COMPILED
@BOTH
def test_compiled_networks_compute_the_same(fresh, counted_compilations):
    """One graph serves the layers of all networks, with gradients or without; no later step compiles anything."""
    deep = MaskGITTeacher.build({**SIZES, "depth": 3, "dropout": 0.0})
    plain, compiled = trainer_of(fresh, copy.deepcopy(deep)), trainer_of(fresh, deep, compile=True)
    assert_close(compiled.step(0)["student_divergence"], plain.step(0)["student_divergence"])
    count = len(counted_compilations)
    assert 2 <= count <= 5  # of 2 to 4 kinds of calls, however many layers
    for index in (1, 2):
        compiled.step(index), plain.step(index)
    assert len(counted_compilations) == count
    for a, b in zip(plain.result.parameters(), compiled.result.parameters(), strict=True):
        assert_close(a, b)


@COMPILED
@pytest.mark.usefixtures("counted_compilations")
def test_a_compiled_run_can_go_on_without(tmp_path):
    """Names in the checkpoint are the plain ones; the averaged model that is sampled from is not compiled."""
    trainer, config = make("distill", tmp_path, compile=True, steps=6)
    before_step(trainer, 3, crash)
    with pytest.raises(Crash):
        run_training(trainer, config)
    assert trainer.result.layers()[0]._compiled_call_impl is None
    other, config = make("distill", tmp_path, steps=6)
    run_training(other, config)
    assert (tmp_path / CHECKPOINT).exists()


@COMPILED
@pytest.mark.usefixtures("counted_compilations")
def test_pretraining_compiles_its_model(tmp_path):
    trainer, _ = make("pretrain", tmp_path, compile=True)
    assert isinstance(trainer, PretrainingTrainer)
    assert trainer.model.layers()[0]._compiled_call_impl is not None
    assert trainer.step(0)["loss"].isfinite()
