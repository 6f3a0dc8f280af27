"""The compiled divergence: every instruction set and geometry against the float64 reference, and what only it has."""

from __future__ import annotations

from math import inf

import pytest
import torch
from torch import Tensor

import dimo_ext as dx
from tests.conftest import LogitsCase, assert_close, assert_gradient

core = pytest.importorskip("dimo_ext._core")

DIVERGENCES = [
    dx.ForwardKL(), dx.ReverseKL(), dx.Jeffreys(-0.2), dx.Jeffreys(0.3), dx.Jeffreys(0.0), dx.Jeffreys(1.0),
    dx.JensenShannon(0.3), dx.SquaredHellinger(), dx.TotalVariation(), dx.PearsonChi2(), dx.NeymanChi2(),
    dx.Alpha(0.5), dx.Alpha(-0.5), dx.Alpha(1.5), dx.LeCam(),
]  # fmt: skip
HALF_TYPES = [torch.float16, torch.bfloat16]


def divergence_and_gradient(teacher: Tensor, auxiliary: Tensor, divergence, **options) -> tuple[Tensor, Tensor]:
    auxiliary = auxiliary.detach().requires_grad_()
    value = dx.token_divergence(teacher, auxiliary, divergence, **options)
    (gradient,) = torch.autograd.grad(torch.where(value.isfinite(), value, 0.0).sum(), auxiliary)
    return value.detach(), gradient


def assert_matches_float64(teacher, auxiliary, divergence, uncond=None, near=False, **options) -> None:
    """Compare with the reference in float64 on the same, already rounded logits."""
    if uncond is not None:
        options |= {"guidance_scale": 1.7}
    value, gradient = divergence_and_gradient(teacher, auxiliary, divergence, teacher_uncond_logits=uncond, **options)
    double = None if uncond is None else uncond.double()
    expected, exact = divergence_and_gradient(
        teacher.double(), auxiliary.double(), divergence, teacher_uncond_logits=double, **options
    )
    assert_close(value, expected)
    assert_gradient(gradient, exact, near=near)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, 31, 33, 65, 127, 128, 129, 257, 1025, 4097])
def test_every_width(isa, divergence, vocab):
    """Rows across and along the lanes, full and padded registers, one chunk and several."""
    teacher, auxiliary, uncond = LogitsCase((19,), vocab, seed=vocab).build(torch.device("cpu"), 3)
    assert_matches_float64(teacher / 2, auxiliary / 2, divergence, uncond / 2, teacher_temperature=0.9)


@pytest.mark.parametrize("vocab", range(1, 50))
def test_every_short_width(isa, vocab):
    """Rows are turned into the lanes in blocks, fours and ones; the last ids may come twice."""
    scale = torch.tensor([1.0, 1.7, 3.0])
    for dtype in (torch.float32, *HALF_TYPES):
        for layout in ("contiguous", "sliced", "batch_second"):
            teacher, auxiliary, uncond = LogitsCase((3, 13), vocab, dtype, layout).build(torch.device("cpu"), 3)
            mask = torch.arange(39).view(3, 13) % 7 != 3
            options = {"mask": mask, "guidance_scale": scale}
            value, gradient = divergence_and_gradient(
                teacher, auxiliary, "jeffreys:-0.2", teacher_uncond_logits=uncond, **options
            )
            expected, exact = divergence_and_gradient(
                teacher.double(), auxiliary.double(), "jeffreys:-0.2", teacher_uncond_logits=uncond.double(), **options
            )
            assert_close(value, expected)
            assert_gradient(gradient, exact)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("vocab", [1, 5, 17, 18, 31, 128])
def test_large_gradients_of_short_rows_equal_small_ones(isa, vocab, masked):
    """They go past the caches, also to memory that is not aligned; rows without a gradient become zero there."""
    generator = torch.Generator().manual_seed(vocab)
    rows = (8 << 18) // vocab + 37
    teacher, auxiliary = (torch.randn(rows * vocab + 1, generator=generator)[1:].view(rows, vocab) for _ in range(2))
    teacher[5::1001, :1] = -inf  # no reverse KL
    mask = torch.rand(rows, generator=generator) < 0.9 if masked else torch.ones(rows, dtype=torch.bool)
    value, gradient = divergence_and_gradient(teacher, auxiliary, "reverse_kl", mask=mask)
    parts = [
        divergence_and_gradient(*few, "reverse_kl", mask=some)
        for *few, some in zip(teacher.split(5000), auxiliary.split(5000), mask.split(5000), strict=True)
    ]
    assert_close(value, torch.cat([part[0] for part in parts]))  # a neighbour with -inf may move the last bit
    assert torch.equal(gradient, torch.cat([part[1] for part in parts]))
    assert vocab == 1 or not gradient[5::1001].any()
    dx.divergence_gradient_(auxiliary, teacher, "reverse_kl", mask=mask, reduction="sum")
    assert torch.equal(auxiliary, gradient)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("pattern", ["minus_inf", "padded", "near", "extreme"])
@pytest.mark.parametrize("vocab", [18, 300])
def test_every_pattern(isa, divergence, pattern, vocab):
    """Filtered ids, nearly equal and extreme logits, the floor under log p."""
    case = LogitsCase((19,), vocab, pattern=pattern, seed=3)
    teacher, auxiliary = case.build(torch.device("cpu"), 2)
    if pattern == "extreme" and isinstance(divergence, dx.PearsonChi2 | dx.NeymanChi2):
        teacher, auxiliary = (
            teacher / 1e3,
            auxiliary / 1e3,
        )  # else p²/q of two rounded logarithms
    assert_matches_float64(teacher, auxiliary, divergence, near=pattern == "near")
    if pattern != "extreme":
        assert_matches_float64(teacher, auxiliary, divergence, near=pattern == "near", teacher_log_floor=-9.0)


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "vocab_first"])
@pytest.mark.parametrize("vocab", [18, 300])
def test_half_types(isa, dtype, layout, vocab):
    """Conversion of every element where it stands: runs, strided ones, tails."""
    teacher, auxiliary, uncond = LogitsCase((3, 7), vocab, dtype, layout).build(torch.device("cpu"), 3)
    assert_matches_float64(teacher, auxiliary, dx.Jeffreys(-0.2), uncond)


@pytest.mark.parametrize("vocab", [8193, 126464, 262144])
def test_long_rows(isa, vocab):
    """Sums over many chunks keep their digits."""
    teacher, auxiliary, uncond = LogitsCase((2,), vocab, seed=1).build(torch.device("cpu"), 3)
    assert_matches_float64(teacher, auxiliary, dx.Jeffreys(0.3), uncond)


@pytest.mark.parametrize("layout", ["contiguous", "vocab_first"])
def test_a_maximum_that_comes_late(isa, layout):
    """Chunks of -inf alone come first, and what follows lies far below 0."""
    teacher, auxiliary = LogitsCase((2, 3), 9000, layout=layout).build(torch.device("cpu"), 2)
    for logits in (teacher, auxiliary):
        logits -= 300.0
    teacher[..., :5000] = -inf
    assert_matches_float64(teacher, auxiliary, dx.ForwardKL())
    auxiliary[..., :5000] = -inf
    assert_matches_float64(teacher, auxiliary, dx.JensenShannon(0.3))


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_every_half_number_is_stored_as_torch_rounds_it(isa, dtype):
    """Conversion is exact: the gradient q - p of a certain teacher walks through the type's numbers."""
    steps = torch.linspace(-20, 8, 4001)
    auxiliary = torch.stack([steps, torch.zeros_like(steps)], -1).requires_grad_()
    teacher = torch.tensor([0.0, -inf]).expand(4001, 2)
    student = torch.zeros(4001, 2, dtype=dtype, requires_grad=True)
    dx.token_divergence(teacher, auxiliary, "forward_kl").sum().backward()
    dx.distribution_matching_loss(student, teacher, auxiliary, "forward_kl", reduction="sum").backward()
    assert torch.equal(student.grad, auxiliary.grad.to(dtype))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_bits(isa, threads):
    teacher, auxiliary = LogitsCase((1500,), 130).build(torch.device("cpu"), 2)
    expected = divergence_and_gradient(teacher, auxiliary, "jensen_shannon")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual = divergence_and_gradient(teacher, auxiliary, "jensen_shannon")
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_a_row_gives_the_same_bits_wherever_it_stands(isa):
    """Neighbours, masks and the split of the batch change nothing, though short rows share a register."""
    teacher, auxiliary = LogitsCase((70,), 18).build(torch.device("cpu"), 2)
    value, gradient = divergence_and_gradient(teacher, auxiliary, "alpha:0.5")
    mask = torch.arange(70) % 3 > 0
    for rows in (slice(7, 40), mask):
        part = divergence_and_gradient(teacher[rows], auxiliary[rows], "alpha:0.5")
        assert torch.equal(part[0], value[rows])
        assert torch.equal(part[1], gradient[rows])


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="no CPU instruction set neon2"):
        core.choose_cpu_isa("neon2")


def test_many_dimensions():
    """More leading dimensions than a launcher takes are served by the reference."""
    teacher, auxiliary = LogitsCase((1, 2, 1, 2, 1, 2, 1, 1, 2, 1), 5).build(torch.device("cpu"), 2)
    flat = divergence_and_gradient(teacher.reshape(-1, 5), auxiliary.reshape(-1, 5), "le_cam")
    deep = divergence_and_gradient(teacher, auxiliary, "le_cam")
    assert_close(deep[0].flatten(), flat[0])
    assert_gradient(deep[1].reshape(-1, 5), flat[1])
