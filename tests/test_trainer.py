"""The training loop: optimiser, average, and that a stopped run goes on as if nothing had happened."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dimo.checkpoint import CheckpointError, read_checkpoint_header
from dimo.config import (
    ConfigError,
    DistillConfig,
    MethodConfig,
    NetworkConfig,
    OptimizerConfig,
    PretrainConfig,
    ReportConfig,
    RunConfig,
    to_dict,
)
from dimo.data.digits import DigitsSplit
from dimo.optimizers import Ema, Updater
from dimo.runlog import LOG, TrainingError
from dimo.teachers import MaskGITTeacher
from dimo.trainer import (
    CHECKPOINT,
    DistillationTrainer,
    Interrupted,
    PretrainingTrainer,
    _StopFlag,
    resolve_device,
    run_training,
)

SIZES = {"grid_size": 3, "vocab_size": 5, "num_classes": 3, "width": 16, "depth": 1, "heads": 2, "mlp_width": 32}
TRAINERS = ["distill", "pretrain"]


def tiny(seed: int = 0, dropout: float = 0.0) -> MaskGITTeacher:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MaskGITTeacher.build({**SIZES, "dropout": dropout})


def run_config(folder: Path, **changes) -> RunConfig:
    settings = {"steps": 6, "batch_size": 4, "log_every": 1, "save_every": 3, "preview_every": 0, "tensorboard": False}
    return RunConfig(output=str(folder), **{**settings, **changes})


def distill_config(folder: Path, method: dict | None = None, **run) -> DistillConfig:
    return DistillConfig(run=run_config(folder, **run), method=MethodConfig(**(method or {})))


def make(kind: str, folder: Path, **run):
    """A fresh trainer and its configuration; pretraining starts from dropout 0.3 and random data."""
    if kind == "distill":
        config = distill_config(folder, **run)
        return DistillationTrainer(tiny(), config), config
    config = PretrainConfig(run=run_config(folder, **run), network=NetworkConfig(dropout=0.3))
    draw = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(0, 5, (50, 9), generator=draw), torch.randint(0, 3, (50,), generator=draw)
    return PretrainingTrainer(tiny(dropout=0.3), DigitsSplit(tokens, labels), config), config


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / LOG).read_text(encoding="utf-8").splitlines()]


def checkpoint_step(folder: Path) -> int:
    return read_checkpoint_header(folder / CHECKPOINT)[0]


def before_step(trainer, index: int, action) -> None:
    """Call ``action`` before 0-based step ``index``."""
    plain = trainer.step

    def step(i: int):
        if i == index:
            action()
        return plain(i)

    trainer.step = step


class Crash(Exception):  # noqa: N818 - an event, not an error
    """Stands for a run that dies."""


def crash() -> None:
    raise Crash


def assert_same_files(first: Path, second: Path) -> None:
    """All weights and optimiser states equal, bit for bit."""
    a, b = load_file(first / CHECKPOINT), load_file(second / CHECKPOINT)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


# --- optimiser and average ------------------------------------------------------------------------------------------


def updater(**changes) -> Updater:
    return Updater([torch.nn.Parameter(torch.ones(3))], OptimizerConfig(**changes), steps=20)


def test_learning_rate_warms_up_then_stays():
    rates = [updater(learning_rate=2.0, warmup_steps=4, decay="constant").learning_rate(n) for n in range(20)]
    assert rates == [0.5, 1.0, 1.5] + [2.0] * 17


def test_learning_rate_falls_as_a_cosine_to_its_fraction():
    schedule = updater(learning_rate=2.0, warmup_steps=4, decay="cosine", final_fraction=0.1)
    for n in range(20):
        cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * n / 20)) / 2
        assert schedule.learning_rate(n) == pytest.approx(2.0 * min(1.0, (n + 1) / 4) * cosine)
    assert schedule.learning_rate(20) == pytest.approx(0.2)


def test_learning_rate_without_warm_up():
    assert updater(learning_rate=2.0, warmup_steps=0).learning_rate(0) == 2.0


@pytest.mark.parametrize("clip_norm", [None, 0.5, 100.0])
def test_updates_are_adamw_on_the_clipped_gradient(clip_norm):
    settings = OptimizerConfig(learning_rate=0.1, weight_decay=0.2, warmup_steps=3, clip_norm=clip_norm)
    start, target = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([3.0, 1.0, 0.0])
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    update = Updater([ours], settings, steps=10)
    reference = torch.optim.AdamW([theirs], betas=(0.9, 0.999), eps=1e-8, weight_decay=0.2, foreach=False)
    clipped = []
    update.optimizer.register_step_pre_hook(lambda *_: clipped.append(ours.grad.clone()))
    for n in range(10):
        (ours - target).square().sum().backward()
        update.schedule(n)
        norm = update.update()
        assert ours.grad is None  # its memory is free until the next backward pass
        gradient = 2 * (theirs.detach() - target)
        torch.testing.assert_close(norm, gradient.norm())  # before clipping
        scale = 1.0 if clip_norm is None else min(1.0, clip_norm / (gradient.norm().item() + 1e-6))
        theirs.grad = gradient * scale
        torch.testing.assert_close(clipped[-1], theirs.grad)
        reference.param_groups[0]["lr"] = update.learning_rate(n)
        reference.step()
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-5, atol=1e-6)
    assert (ours - start).abs().max() > 0.1


def test_ema_follows_its_formula():
    """Decay min(d, (1+n)/(10+n)): 0.1, 2/11, 3/12, then d = 0.3."""
    model = torch.nn.Linear(2, 2)
    ema = Ema(model, 0.3)
    expected = model.weight.detach().clone()
    for n, decay in enumerate([1 / 10, 2 / 11, 3 / 12, 0.3, 0.3]):
        with torch.no_grad():
            model.weight.copy_(torch.full((2, 2), float(n)))
        ema.update(model, n)
        expected = decay * expected + (1 - decay) * model.weight.detach()
        torch.testing.assert_close(ema.model.weight, expected)
    assert not ema.model.weight.requires_grad


# --- one step -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TRAINERS)
def test_step_is_a_function_of_state_seed_and_index(kind, tmp_path):
    """The global generator is neither read nor changed, dropout included; another seed or index gives another step."""
    results = []
    for global_seed, seed, index in [(1, 0, 0), (2, 0, 0), (1, 5, 0), (1, 0, 3)]:
        trainer, _ = make(kind, tmp_path, seed=seed)
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        first = next(iter(trainer.step(index).values()))  # the loss, from before the update: draws alone decide it
        assert torch.equal(torch.get_rng_state(), state)
        results.append((first.item(), torch.cat([p.detach().flatten() for p in trainer.result.parameters()])))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])
    assert len({loss for loss, _ in results}) == 3


def test_dropout_is_on_in_pretraining(tmp_path):
    """Else the test above would say nothing about it."""
    trainer, _ = make("pretrain", tmp_path)
    assert trainer.model.training
    assert trainer.model.network.config.dropout == 0.3
    assert not trainer.result.training


def test_distillation_moves_student_and_auxiliary_but_not_the_teacher(tmp_path):
    teacher = tiny()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    trainer = DistillationTrainer(teacher, distill_config(tmp_path))
    scalars = trainer.step(0)
    assert set(scalars) == {
        "student_divergence", "gradient_norm", "token_entropy", "auxiliary_loss", "auxiliary_gradient_norm"
    }  # fmt: skip
    for name, value in before.items():
        assert torch.equal(teacher.state_dict()[name], value)
    for network in (trainer.student, trainer.auxiliary, trainer.result):
        assert any(not torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_freeze_recipe_keeps_the_embeddings(tmp_path):
    """Of the student and its average; the auxiliary trains whole."""
    trainer = DistillationTrainer(tiny(), distill_config(tmp_path, {"freeze": "recipe"}))
    before = {name: value.clone() for name, value in trainer.student.state_dict().items()}
    for index in range(3):
        trainer.step(index)
    frozen = set(trainer.teacher.frozen_parameters())
    for network in (trainer.student, trainer.result):
        unchanged = {name for name, value in network.state_dict().items() if torch.equal(value, before[name])}
        assert unchanged == frozen
    assert not any(torch.equal(trainer.auxiliary.state_dict()[name], before[name]) for name in frozen)


@pytest.mark.parametrize(
    ("fresh", "calls"), [(True, {"student": 4, "auxiliary": 4}), (False, {"student": 1, "auxiliary": 3})]
)
def test_a_reused_batch_saves_evaluations(fresh, calls, tmp_path):
    """One student update and three auxiliary ones: re-used, one draw serves all, and one evaluation of the auxiliary
    both the divergence and the first update.
    """
    method = {"fresh_auxiliary_batch": fresh, "num_auxiliary_steps": 3}
    trainer = DistillationTrainer(tiny(), distill_config(tmp_path, method))
    counted = Counter()

    def count(name):
        network = trainer.modules[name]
        plain = network.logits
        network.logits = lambda *args, **kwargs: counted.update([name]) or plain(*args, **kwargs)

    count("student")
    count("auxiliary")
    trainer.step(0)
    assert counted == calls


# --- stop and go on -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TRAINERS)
def test_resumed_run_equals_the_straight_one(kind, tmp_path):
    """3 steps, a crash, 3 more from the checkpoint: every bit as in 6 steps, the log too."""
    trainer, config = make(kind, tmp_path / "straight")
    run_training(trainer, config)
    dying, config = make(kind, tmp_path / "resumed")
    before_step(dying, 4, crash)  # after the checkpoint of step 3
    with pytest.raises(Crash):
        run_training(dying, config)
    assert checkpoint_step(tmp_path / "resumed") == 3
    resumed, config = make(kind, tmp_path / "resumed")
    for module in resumed.modules.values():  # all state must come from the checkpoint
        for parameter in module.parameters():
            parameter.data.normal_()
    torch.manual_seed(99)
    run_training(resumed, config)
    assert_same_files(tmp_path / "straight", tmp_path / "resumed")
    logs = [log_of(tmp_path / name) for name in ("straight", "resumed")]
    for line in (*logs[0], *logs[1]):
        del line["seconds_per_step"]
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[0]] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("kind", TRAINERS)
def test_finished_run_does_nothing(kind, tmp_path, capsys):
    trainer, config = make(kind, tmp_path)
    run_training(trainer, config)
    content = (tmp_path / CHECKPOINT).read_bytes()
    again, config = make(kind, tmp_path)
    before_step(again, 0, crash)
    run_training(again, config)
    assert "holds all 6 steps already" in capsys.readouterr().out
    assert (tmp_path / CHECKPOINT).read_bytes() == content
    for a, b in zip(trainer.result.parameters(), again.result.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_after_the_step_and_saves(number, tmp_path):
    handler = signal.getsignal(number)
    trainer, config = make("distill", tmp_path, log_every=10, save_every=10)
    before_step(trainer, 1, lambda: os.kill(os.getpid(), number))
    with pytest.raises(Interrupted) as caught:
        run_training(trainer, config)
    assert caught.value.step == 2
    assert checkpoint_step(tmp_path) == 2
    assert [line["step"] for line in log_of(tmp_path)] == [2]
    assert signal.getsignal(number) is handler


def test_second_signal_acts_at_once():
    with _StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_signal_in_the_last_step_finishes_the_run(tmp_path):
    trainer, config = make("distill", tmp_path)
    before_step(trainer, 5, lambda: os.kill(os.getpid(), signal.SIGINT))
    run_training(trainer, config)
    assert checkpoint_step(tmp_path) == 6


def test_training_runs_in_another_thread(tmp_path):
    """Signal handlers can be set in the main thread alone."""
    trainer, config = make("distill", tmp_path)
    thread = threading.Thread(target=run_training, args=(trainer, config))
    thread.start()
    thread.join()
    assert checkpoint_step(tmp_path) == 6


COMMAND_STEPS = 250


def command(folder: Path) -> list[str]:
    """A pretraining that takes a second or two, with dropout, logging each step, saving every 7th."""
    return [
        "pretrain", "--run.output", str(folder), "--run.steps", str(COMMAND_STEPS), "--run.batch-size", "4",
        "--run.log-every", "1", "--run.save-every", "7", "--run.preview-every", "0", "--run.no-tensorboard",
        "--run.device", "cpu", "--network.width", "8", "--network.depth", "1", "--network.mlp-width", "8",
        "--network.dropout", "0.1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of the command run without a stop."""
    folder = tmp_path_factory.mktemp("straight")
    assert run_command(folder) == 0
    return folder


def run_command(folder: Path) -> int:
    pytest.importorskip("tyro", reason="the command needs tyro")
    from dimo import cli

    return cli.main(command(folder))


def start_and_signal(folder: Path, number: signal.Signals) -> subprocess.CompletedProcess:
    """Run the command in a process of its own and send a signal once its log has some lines."""
    pytest.importorskip("tyro", reason="the command needs tyro")
    arguments = [sys.executable, "-W", "ignore", "-m", "dimo.cli", *command(folder)]
    # Not in the source folder, which would stand before the installed package on the path.
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder.parent)
    deadline = time.monotonic() + 60
    while not (folder / LOG).exists() or (folder / LOG).read_bytes().count(b"\n") < 10:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def assert_finishes_like(folder: Path, straight: Path) -> None:
    """The same command, once more, ends where the run without a stop ended, and its log has each step once."""
    assert run_command(folder) == 0
    assert_same_files(folder, straight)
    weights = [load_file(path / "teacher" / "model.safetensors") for path in (folder, straight)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    assert [line["step"] for line in log_of(folder)] == list(range(1, COMMAND_STEPS + 1))


def test_killed_run_goes_on_from_its_last_checkpoint(straight, tmp_path):
    done = start_and_signal(tmp_path, signal.SIGKILL)
    assert done.returncode == -signal.SIGKILL
    assert checkpoint_step(tmp_path) % 7 == 0
    assert 7 <= checkpoint_step(tmp_path) < COMMAND_STEPS
    assert_finishes_like(tmp_path, straight)
    assert list(tmp_path.glob(".*")) == []  # a write that the kill cut off is cleaned up


def test_interrupted_command_goes_on(straight, tmp_path):
    """Exit status 130, a checkpoint of the very step that the log ends with, and the same command finishes."""
    done = start_and_signal(tmp_path, signal.SIGINT)
    assert done.returncode == 130, done
    assert "the same command goes on" in done.stderr
    assert "Traceback" not in done.stderr
    assert checkpoint_step(tmp_path) == log_of(tmp_path)[-1]["step"] < COMMAND_STEPS
    assert_finishes_like(tmp_path, straight)


# --- refusals -------------------------------------------------------------------------------------------------------


def poison(trainer) -> None:
    """Put NaN into every network that trains."""
    for name, module in trainer.modules.items():
        if name != "ema":
            for parameter in module.parameters():
                parameter.data.fill_(math.nan)


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize(("log_every", "save_every", "kept"), [(1, 3, 3), (10, 3, 3), (10, 1, 4)])
def test_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(kind, log_every, save_every, kept, tmp_path):
    """However rarely the losses are logged, no checkpoint of broken weights replaces a good one."""
    trainer, config = make(kind, tmp_path, log_every=log_every, save_every=save_every)
    before_step(trainer, 4, lambda: poison(trainer))
    with pytest.raises(TrainingError, match=r"step [56]: .*is not finite.*checkpoint is kept"):
        run_training(trainer, config)
    assert checkpoint_step(tmp_path) == kept
    assert all(torch.isfinite(value).all() for value in load_file(tmp_path / CHECKPOINT).values())
    assert all(math.isfinite(value) for line in log_of(tmp_path) for value in line.values())


def test_a_learning_rate_that_diverges_is_reported(tmp_path):
    config = DistillConfig(
        run=run_config(tmp_path, steps=20, log_every=5),
        student=OptimizerConfig(learning_rate=1e30, warmup_steps=0),
        auxiliary=OptimizerConfig(learning_rate=1e30, warmup_steps=0),
    )
    with pytest.raises(TrainingError, match="is not finite"):
        run_training(DistillationTrainer(tiny(), config), config)


def test_another_configuration_in_the_folder_is_refused(tmp_path):
    """All differing keys are named with both values; keys that change no result may differ."""
    trainer, config = make("distill", tmp_path)
    run_training(trainer, config)
    other = distill_config(tmp_path, {"r_init": 0.5}, seed=3, log_every=2, save_every=2)
    with pytest.raises(ConfigError) as caught:
        run_training(DistillationTrainer(tiny(), other), other)
    assert "method.r_init: 0.85 there, 0.5 now; run.seed: 0 there, 3 now" in str(caught.value)
    assert "log_every" not in str(caught.value)
    free = DistillConfig(
        run=run_config(tmp_path, log_every=2, save_every=1, preview_every=3), report=ReportConfig(teacher_steps=(3,))
    )
    run_training(DistillationTrainer(tiny(), free), free)


def edit_stored(folder: Path, change) -> None:
    """Change the configuration that a checkpoint holds."""
    path = folder / CHECKPOINT
    with safe_open(path, "pt") as file:
        header = file.metadata()
    config = json.loads(header["config"])
    change(config)
    save_file(load_file(path), path, metadata=header | {"config": json.dumps(config)})


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_run_goes_on_that_was_stored_before_a_key_existed(kind, tmp_path):
    """Its keys, sections even, count as their defaults; what comes out is the straight run's."""
    run_training(*make(kind, tmp_path / "straight"))
    dying, config = make(kind, tmp_path / "resumed")
    before_step(dying, 4, crash)
    with pytest.raises(Crash):
        run_training(dying, config)

    def forget(config: dict) -> None:
        del config["run"]["cuda_graph"], config["run"]["precision"], config["run"]["accumulation_steps"]
        for name in {"distill": ("prompts", "report"), "pretrain": ("kind", "label_smoothing")}[kind]:
            del config[name]

    edit_stored(tmp_path / "resumed", forget)
    run_training(*make(kind, tmp_path / "resumed"))
    assert_same_files(tmp_path / "straight", tmp_path / "resumed")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["run"].pop("accumulation_steps"), "(run.accumulation_steps: 1 there, 2 now)"),
        (lambda c: c["run"].update(accumulation_steps=2, warp=9), "(run.warp: 9 there, unknown now)"),
        (lambda c: c["run"].update(accumulation_steps=2, warp=None), "(run.warp: None there, unknown now)"),
        (lambda c: [c["run"].update(accumulation_steps=2), c.update(era={"a": 1})], "(era: {'a': 1} there, unknown"),
        (
            lambda c: [c["run"].update(accumulation_steps=2), c.pop("teacher_weights")],
            "(teacher_weights: None there, '",
        ),
    ],
)
def test_a_run_of_another_version_is_refused(change, message, tmp_path):
    """Where a default is not what is asked for now, where a key is unknown, where the teacher is not known."""
    run_training(*make("distill", tmp_path))
    edit_stored(tmp_path, change)
    with pytest.raises(ConfigError, match=re.escape(message)):
        run_training(*make("distill", tmp_path, accumulation_steps=2))


def test_another_teacher_is_refused(tmp_path):
    """Equal settings, other weights: they decide the run as much as its settings do."""
    trainer, config = make("distill", tmp_path)
    run_training(trainer, config)
    with pytest.raises(ConfigError, match=r"teacher_weights: '[0-9a-f]{64}' there, '[0-9a-f]{64}' now"):
        run_training(DistillationTrainer(tiny(seed=1), config), config)


def test_other_data_are_refused(tmp_path):
    trainer, config = make("pretrain", tmp_path)
    run_training(trainer, config)
    other = DigitsSplit(torch.zeros(50, 9, dtype=torch.int64), torch.zeros(50, dtype=torch.int64))
    with pytest.raises(ConfigError, match=r"data: '[0-9a-f]{64}' there"):
        run_training(PretrainingTrainer(tiny(dropout=0.3), other, config), config)


def test_pretraining_does_not_go_on_from_a_distillation(tmp_path):
    trainer, config = make("distill", tmp_path)
    run_training(trainer, config)
    with pytest.raises(ConfigError, match="holds a run of another configuration"):
        run_training(*make("pretrain", tmp_path))


def test_truncated_checkpoint_is_refused_and_left_alone(tmp_path):
    trainer, config = make("distill", tmp_path)
    run_training(trainer, config)
    path = tmp_path / CHECKPOINT
    for size in (path.stat().st_size // 2, 5, 0):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(CheckpointError, match="truncated") as caught:
            run_training(*make("distill", tmp_path))
        assert str(path) in str(caught.value)
        assert path.stat().st_size == size


def test_foreign_file_in_the_place_of_the_checkpoint(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / CHECKPOINT)
    with pytest.raises(CheckpointError, match="not a checkpoint of a run"):
        run_training(*make("distill", tmp_path))


def test_unwritable_output_is_refused_before_any_work(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    trainer, config = make("distill", file / "run")
    before_step(trainer, 0, crash)
    with pytest.raises(ConfigError, match="output: expected a folder that can be written"):
        run_training(trainer, config)


@pytest.mark.parametrize(("name", "kind"), [(CHECKPOINT, "folder"), (LOG, "folder"), ("tensorboard", "file")])
def test_another_kind_of_file_in_the_way_is_refused_before_any_work(name, kind, tmp_path):
    (tmp_path / name).mkdir() if kind == "folder" else (tmp_path / name).touch()
    trainer, config = make("distill", tmp_path)
    before_step(trainer, 0, crash)
    with pytest.raises(ConfigError, match=f"output: expected .*{name}.* or absent, found a {kind}"):
        run_training(trainer, config)


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "mps", ""])
def test_unknown_device_is_refused(name):
    with pytest.raises(ConfigError, match=f"device: expected auto, cpu or an available cuda device, got '{name}'"):
        resolve_device(name)


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


# --- log, previews, TensorBoard -------------------------------------------------------------------------------------


def test_log_lines_are_means_since_the_line_before(tmp_path):
    for name, every in (("each", 1), ("second", 4)):
        run_training(*make("distill", tmp_path / name, log_every=every, save_every=6))
    each, second = log_of(tmp_path / "each"), log_of(tmp_path / "second")
    assert [line["step"] for line in second] == [4, 6]
    for line, rows in zip(second, (each[:4], each[4:]), strict=True):
        for name in ("student_divergence", "auxiliary_loss", "token_entropy", "gradient_norm"):
            assert line[name] == pytest.approx(sum(row[name] for row in rows) / len(rows), abs=2e-6)


def test_half_written_last_log_line_is_dropped(tmp_path):
    dying, config = make("distill", tmp_path)
    before_step(dying, 4, crash)
    with pytest.raises(Crash):
        run_training(dying, config)
    with (tmp_path / LOG).open("a") as file:
        file.write('{"step": 5, "student_diver')
    run_training(*make("distill", tmp_path))
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_previews_come_when_due_and_at_the_end(tmp_path):
    trainer, config = make("distill", tmp_path, steps=5, preview_every=2, log_every=5)
    seen = []

    def preview(step, model):
        assert model is trainer.result
        seen.append(step)
        return {"score": step / 10}, None

    run_training(trainer, config, preview)
    assert seen == [2, 4, 5]
    assert [line["score"] for line in log_of(tmp_path) if "score" in line] == [0.2, 0.4, 0.5]


def test_tensorboard_holds_the_log(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer, config = make("distill", tmp_path, tensorboard=True, preview_every=3)
    run_training(trainer, config, lambda step, _: ({"score": step / 10}, torch.rand(1, 8, 8)))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    lines = log_of(tmp_path)
    for name in ("student_divergence", "token_entropy", "auxiliary_loss", "score"):
        logged = [(line["step"], line[name]) for line in lines if name in line]
        written = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in written] == [step for step, _ in logged]
        assert [value for _, value in written] == pytest.approx([value for _, value in logged], abs=1e-5)
    assert [image.step for image in events.Images("samples")] == [3, 6]


def test_checkpoint_stores_the_configuration(tmp_path):
    trainer, config = make("pretrain", tmp_path)
    run_training(trainer, config)
    assert read_checkpoint_header(tmp_path / CHECKPOINT) == (6, to_dict(config) | trainer.origin)
    with safe_open(tmp_path / CHECKPOINT, "pt") as file:
        groups = {name.split("/")[0] for name in file.keys()}  # noqa: SIM118 - no mapping
    assert groups == {"model", "ema", "optimizer"}
