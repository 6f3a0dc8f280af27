"""What only a GPU can show: nothing waits for it, graphs replay with fresh draws, it gives what the CPU gives."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from torch import Tensor

import dimo_ext as dx
from dimo.config import DistillConfig, RunConfig, SamplingConfig
from dimo.samplers import sample_ancestral, sample_confident, sample_few_steps
from dimo.teachers import DigitsTeacher, MaskGITTeacher
from dimo.trainer import DistillationTrainer
from tests.calls import CALLS, Inputs, every_call
from tests.conftest import DTYPES, assert_equivalent

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda:0")


def assert_same_bits(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@every_call
def test_nothing_waits_for_the_gpu(name):
    """No call reads a value back, guided, filtered, masked, forward or backward: that would stall the training step."""
    x = Inputs.build(GPU)
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls the mode a prototype, once
            torch.cuda.set_sync_debug_mode("error")
        CALLS[name](x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_call
def test_a_graph_reads_keys_and_inputs_at_every_replay(name):
    """Captured once, replayed with a key that the graph itself advances: the bits of as many eager calls."""
    warm, captured, eager = (Inputs.build(GPU) for _ in range(3))

    def step(x: Inputs) -> tuple[Tensor, ...]:
        x.advance()
        return CALLS[name](x)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(warm)  # what torch sets up on a first call is no part of a graph
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(captured)
    replayed = []
    for _ in range(3):
        graph.replay()
        assert_same_bits(outputs, step(eager))
        replayed.append([x.clone() for x in outputs])
    for other in replayed[1:]:  # a mean may not notice that samples were shuffled
        assert not all(map(torch.equal, replayed[0], other))


@every_call
def test_work_is_queued_on_the_current_stream(name):
    """On another stream, behind a kernel that keeps it busy, a call still sees what was computed before it."""
    late, expected = Inputs.build(GPU), Inputs.build(GPU)
    expected.advance()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late.advance()
        outputs = CALLS[name](late)
    side.synchronize()
    assert_same_bits(outputs, CALLS[name](expected))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_call
def test_another_gpu_than_the_current_one(name):
    outputs = CALLS[name](Inputs.build("cuda:1"))
    assert all(x.device == torch.device("cuda:1") for x in outputs)
    assert_same_bits([x.cpu() for x in outputs], [x.cpu() for x in CALLS[name](Inputs.build(GPU))])


@every_call
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_gives_what_the_cpu_gives(name, dtype):
    """Keys, masks and initial tokens exactly; of 10,000 drawn tokens one may differ, where two are equally good."""
    here, there = (CALLS[name](Inputs.build(device, dtype)) for device in ("cpu", GPU))
    if name.startswith("sample_categorical"):
        same = here[0] == there[0].cpu()
        assert (~same).sum() <= 1
        here, there = [here[1][same]], [there[1].cpu()[same]]
    for a, b in zip(there, here, strict=True):
        assert_equivalent(a, b)


def tiny_trainer(**run) -> DistillationTrainer:
    """Deep enough to compute something, of a size that all kernels serve; the rate changes from step to step."""
    sizes = {"grid_size": 4, "vocab_size": 37, "num_classes": 3, "width": 64, "depth": 2, "heads": 2, "mlp_width": 64}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = MaskGITTeacher.build({**sizes, "dropout": 0.0}).to(GPU)
    return DistillationTrainer(teacher, DistillConfig(RunConfig("unused", steps=20, batch_size=8, **run)))


STEP_OPTIONS = [
    {},
    {"precision": "bfloat16"},
    {"accumulation_steps": 2, "activation_checkpointing": True, "precision": "bfloat16"},
]


@pytest.mark.parametrize("options", STEP_OPTIONS, ids=str)
def test_a_training_step_does_not_wait(options):
    """Neither student nor auxiliary phase, optimisers and average included."""
    trainer = tiny_trainer(**options)
    trainer.step(0)
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        trainer.step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", STEP_OPTIONS, ids=str)
def test_a_recorded_step_trains_like_the_plain_one(options):
    """Draws, rates and average of each step its own, while other work takes and frees memory beside it."""
    plain, recorded = tiny_trainer(**options), tiny_trainer(cuda_graph=True, **options)
    for index in range(8):
        expected, actual = plain.step(index), recorded.step(index)
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=2e-2, atol=2e-3)
    assert recorded.updates.calls == 8
    start = tiny_trainer(**options).student
    for a, b, c in zip(*(t.student.parameters() for t in (plain, recorded)), start.parameters(), strict=True):
        assert (a - b).norm() <= 0.05 * (a - c).norm() + 1e-6
    assert plain.step(8)["student_divergence"] != plain.step(9)["student_divergence"]


SAMPLERS = {
    "ancestral": partial(sample_ancestral, steps=6, guidance_scale=1.5),
    "confident": partial(sample_confident, steps=6, guidance_scale=1.5),
    "few steps": partial(sample_few_steps, sampling=SamplingConfig(), steps=3),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_whole_sampling_loop_is_one_graph(name):
    """Nothing waits for the GPU; replayed with other keys and labels, the loop gives what it gives without a graph."""
    torch.manual_seed(0)
    model = DigitsTeacher.build({"width": 32, "depth": 2, "heads": 2, "mlp_width": 64}).to(GPU).eval()
    labels, key = torch.arange(20, device=GPU) % 10, dx.random_key(range(20), device=GPU)
    expected = [SAMPLERS[name](model, labels.roll(n), key=dx.fold_in(key, n)) for n in range(3)]  # a warm-up too
    given_labels, given_key = labels.clone(), key.clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = SAMPLERS[name](model, given_labels, key=given_key)
    for n in range(3):
        given_labels.copy_(labels.roll(n))
        given_key.copy_(dx.fold_in(key, n))
        graph.replay()
        assert torch.equal(tokens, expected[n])
    assert not torch.equal(expected[0], expected[1])


@pytest.mark.parametrize("strided", [False, True], ids=["vocabulary last", "vocabulary first"])
def test_the_losses_allocate_a_gradient_a_network(strided):
    """Of the vocabulary's size; the logits, which exist before, are not copied, and backward hands the gradients on."""
    shape, weight = (2, 4096, 512) if strided else (2, 512, 4096), torch.zeros((), device=GPU, requires_grad=True)
    logits = [torch.randn(shape, device=GPU).bfloat16() for _ in range(4)]
    teacher, uncond, student, auxiliary = (z.transpose(1, 2) if strided else z for z in logits)
    student, auxiliary = student + weight.bfloat16(), auxiliary + weight.bfloat16()
    tokens, mask = (
        torch.zeros(2, 512, dtype=torch.int64, device=GPU),
        torch.arange(1024, device=GPU).view(2, 512) % 5 > 1,
    )
    torch.cuda.reset_peak_memory_stats(GPU)
    before = torch.cuda.memory_allocated(GPU)
    matching = dx.distribution_matching_loss(
        student, teacher, auxiliary, "jeffreys:-0.2", mask=mask, teacher_uncond_logits=uncond, guidance_scale=2.0
    )
    fit = dx.masked_cross_entropy(auxiliary, tokens, mask, label_smoothing=0.1)
    matching.backward()
    fit.backward()
    assert weight.grad.isfinite()
    assert torch.cuda.max_memory_allocated(GPU) - before <= 2.05 * student.nbytes


LAUNCHERS = {
    "fold_in": (0, 0, 0, 0, 0, 0),
    "uniform_words": (0, 0, 1),
    "mask_tokens": (0, 0, 0, 0, 0, 0.5, 0, 0, 0, 0, False, 1, 0),
    "init_tokens": (0, 0, 0, 0.5, 0, 0, 0, 1),
    "sample_categorical": ([1, 5], [None, None], (1.0, 0, 1), (0, 0), 1.0, (0, 1.0, 0.0), 0, 0),
    "reveal_ancestral": ([1, 5], [None, None], (1.0, 0, 1), (0, 0), 1.0, (0, 1.0, 0.0), 0, 5, (0.5, 0), 0),
    "reveal_confident": (
        *([1, 5], [None, None], (1.0, 0, 1), (0, 0), 1.0, (0, 1.0, 0.0)),
        *(0, 5, (1, 0), 1.0, (0, 0), 0),
    ),
    "perturb_embeddings": ([1, 5], [None, None], 1, (0, 0), 0.5, 0, (0, 0)),
}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_an_error_of_cuda_names_the_operator(name):
    """A device that does not exist; the next call works."""
    core = pytest.importorskip("dimo_ext._core")
    if core.cuda_toolkit is None:
        pytest.skip("the compiled module was built without CUDA")
    with pytest.raises(RuntimeError, match=f"{name}: CUDA error .*invalid device"):
        getattr(core, f"cuda_{name}")(*LAUNCHERS[name], 4096, 0)
    assert CALLS[name](Inputs.build(GPU))[0].device == GPU
    torch.cuda.synchronize()
