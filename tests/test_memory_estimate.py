"""The memory estimate: parameters counted by hand, activations against what autograd really keeps."""

import dataclasses

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import dimo
from dimo.config import DistillConfig, MethodConfig, RunConfig
from dimo.memory import memory_text, training_memory
from dimo.teachers import DigitsTeacher, HaltonTeacher, MaskGITTeacher
from dimo.trainer import DistillationTrainer
from tests.golden import FIXTURES

RUN = RunConfig(output="unused", batch_size=6)
TEACHERS = {
    "maskgit": (FIXTURES / "maskgit" / "MaskGIT_tiny.pth", FIXTURES / "vqgan"),
    "halton": (FIXTURES / "halton" / "ImageNet_tiny.pth", FIXTURES / "halton" / "vq_ds16_c2i.pt"),
}


@pytest.fixture(scope="module", params=list(TEACHERS))
def teacher(request):
    path, tokenizer = TEACHERS[request.param]
    return dimo.load_teacher(request.param, path, tokenizer=tokenizer, heads=4)


def kept_by_autograd(teacher, batch: int, *, half: bool = False) -> int:
    """Bytes of the storages, weights excepted, that one real forward pass saves."""
    weights = {p.untyped_storage().data_ptr() for p in teacher.parameters()}
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.full((batch, teacher.seq_len), teacher.mask_id)
    teacher.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16, enabled=half), saved_tensors_hooks(keep, lambda tensor: tensor):
        teacher.logits(tokens, torch.zeros(batch, dtype=torch.int64))
    teacher.requires_grad_(False)
    return sum(t.untyped_storage().nbytes() for pointer, t in storages.items() if pointer not in weights)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_activations_are_what_autograd_keeps(precision, teacher):
    config = DistillConfig(run=dataclasses.replace(RUN, precision=precision))
    kept = kept_by_autograd(teacher, 6, half=precision == "bfloat16")
    assert training_memory(teacher, config)["activations"] == pytest.approx(2 * kept, rel=0.02)
    fresh = dataclasses.replace(config, method=MethodConfig(fresh_auxiliary_batch=True))
    assert training_memory(teacher, fresh)["activations"] == pytest.approx(kept, rel=0.02)


def test_recomputed_activations_take_less(teacher):
    plain = training_memory(teacher, DistillConfig(run=RUN))
    less = training_memory(teacher, DistillConfig(run=dataclasses.replace(RUN, activation_checkpointing=True)))
    assert less["activations"] < 0.9 * plain["activations"]
    assert {k: v for k, v in less.items() if k != "activations"} == {
        k: v for k, v in plain.items() if k != "activations"
    }


def test_parameters_are_counted(teacher):
    count = sum(p.numel() for p in teacher.parameters())
    frozen = sum(teacher.get_parameter(name).numel() for name in teacher.frozen_parameters())
    parts = training_memory(teacher, DistillConfig(run=RUN, method=MethodConfig(freeze="recipe")))
    for name in ("teacher", "student", "student's average (EMA)", "auxiliary", "auxiliary's gradients"):
        assert parts[name] == 4 * count
    assert parts["auxiliary's optimiser states"] == 8 * count
    assert parts["student's gradients"] == 4 * (count - frozen)
    assert parts["student's optimiser states"] == 8 * (count - frozen)
    assert parts["tokeniser"] == 4 * sum(p.numel() for p in teacher.tokenizer.parameters())
    assert "bfloat16 copies of weights" not in parts


def test_logits_by_batch_precision_and_guidance():
    model = DigitsTeacher.build({"width": 16, "depth": 1, "heads": 2, "mlp_width": 32})
    one = RUN.batch_size * 64 * 17 * 4
    for guidance, copies in ((1.0, 5), (2.0, 6)):
        parts = training_memory(model, DistillConfig(run=RUN, method=MethodConfig(guidance_scale=guidance)))
        assert parts["logits and their gradients"] == copies * one
    half = training_memory(model, DistillConfig(run=dataclasses.replace(RUN, precision="bfloat16")))
    assert half["logits and their gradients"] == 6 * one / 2


def test_the_real_model_is_left_alone(teacher):
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    state = torch.get_rng_state()
    training_memory(teacher, DistillConfig(run=RUN))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize(("available", "verdict"), [(100, "enough"), (31, "tight"), (29, "too little")])
def test_text_says_whether_it_fits(available, verdict):
    text = memory_text({"student": 10 * 2**30, "activations": 20 * 2**30}, torch.device("cuda:0"), available * 2**30)
    assert text.splitlines()[2].split() == f"in all 30.00 GiB, cuda:0 has {available}.0 GiB: {verdict}".split()
    assert ("run.activation_checkpointing" in text) == (verdict != "enough")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, {"precision": "bfloat16"}, {"activation_checkpointing": True}])
@pytest.mark.parametrize("kind", [MaskGITTeacher, HaltonTeacher])
def test_the_estimate_is_what_a_gpu_allocates(kind, options):
    """Two steps of networks large enough that weights, logits and activations all count."""
    device = torch.device("cuda:0")
    sizes = {"grid_size": 16, "vocab_size": 1024, "width": 512, "depth": 8, "heads": 8, "mlp_width": 2048}
    before = torch.cuda.memory_allocated(device)  # of other tests in this process
    teacher = kind.build(sizes | {"num_classes": 10}).to(device)
    config = DistillConfig(run=RunConfig(output="unused", batch_size=32, **options))
    expected = sum(training_memory(teacher, config).values())
    torch.cuda.reset_peak_memory_stats(device)
    trainer = DistillationTrainer(teacher, config)
    for index in range(2):
        trainer.step(index)
    measured = torch.cuda.max_memory_allocated(device) - before
    print(f"{kind.kind} {options}: estimated {expected / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB")
    assert 0.8 * measured < expected < 1.25 * measured
