"""The compiled cross-entropy: every instruction set, layout and width against the float64 reference."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch
from torch import Tensor

import dimo_ext as dx
from tests.calls import with_gradient
from tests.conftest import LogitsCase, assert_close, assert_gradient, cross

pytest.importorskip("dimo_ext._core")

CPU = torch.device("cpu")
HALF_TYPES = [torch.float16, torch.bfloat16]
SMOOTHINGS = [0.0, 0.1]


def problem(case: LogitsCase) -> tuple[Tensor, Tensor, Tensor]:
    (logits,) = case.build(CPU, 1)
    generator = torch.Generator().manual_seed(case.seed)
    targets = torch.randint(-1, case.vocab + 1, case.shape, generator=generator)
    return logits, targets, torch.rand(case.shape, generator=generator) < 0.8


def assert_matches_float64(logits, targets, mask, **options) -> None:
    """Compare with the reference in float64 on the same, already rounded logits."""
    value, gradient = with_gradient(lambda z: dx.masked_cross_entropy(z, targets, mask, **options), logits)
    expected = with_gradient(lambda z: dx.masked_cross_entropy(z, targets, mask, **options), logits.double())
    assert_close(value, expected[0])
    assert_gradient(gradient, expected[1])


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, 18, 31, 33, 65, 127, 128, 129, 257, 1025, 4096, 4097])
def test_every_width(isa, vocab, smoothing):
    """Rows across and along the lanes, full and padded registers, one chunk and several."""
    logits, targets, mask = problem(LogitsCase((53,), vocab, seed=vocab))
    for reduction in ("none", "sum", "mean"):
        assert_matches_float64(logits, targets, mask, label_smoothing=smoothing, reduction=reduction)


@pytest.mark.parametrize(
    ("dtype", "layout", "pattern", "vocab", "smoothing"),
    cross(
        [torch.float32, *HALF_TYPES], ["contiguous", "sliced", "vocab_first", "batch_second"],
        ["normal", "minus_inf", "padded", "one_finite", "extreme"], [18, 300, 4100], SMOOTHINGS,
    ),
    ids=str,
)  # fmt: skip
def test_every_kind_of_logits(isa, dtype, layout, pattern, vocab, smoothing):
    """Conversion where an element stands, strides, filtered ids; padded heads."""
    logits, targets, mask = problem(LogitsCase((3, 7), vocab, dtype, layout, pattern))
    options = {"label_smoothing": smoothing, "reduction": "batchmean" if logits.dim() > 2 else "mean"}
    assert_matches_float64(logits, targets, mask, **options)
    for valid_vocab in (1, vocab - 3):
        assert_matches_float64(logits, targets, mask, valid_vocab=valid_vocab, **options)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("vocab", [8193, 126464, 262144])
def test_long_rows(isa, vocab, smoothing):
    """Sums over many chunks keep their digits, and find a maximum that comes late."""
    logits, targets, _ = problem(LogitsCase((3,), vocab, seed=1))
    targets[:] = torch.tensor([0, vocab - 1, vocab // 2])
    assert_matches_float64(logits, targets, None, label_smoothing=smoothing)
    logits[:, :5000] -= 300.0
    assert_matches_float64(logits, targets, None, label_smoothing=smoothing)
    logits[0, :5000] = -inf
    logits[1:, 5000:] = -inf
    assert_matches_float64(logits, targets, None, reduction="none")


@pytest.mark.parametrize("vocab", [18, 300, 5000])
def test_a_diverged_row(isa, vocab):
    """NaN or +inf: its value is NaN, its gradient 0; its neighbours are as they were."""
    logits, targets, _ = problem(LogitsCase((20,), vocab))
    targets = targets.clamp(0, vocab - 1)
    clean = with_gradient(lambda z: dx.masked_cross_entropy(z, targets, reduction="none"), logits)
    logits[3, 0], logits[7, -1] = nan, inf
    value, gradient = with_gradient(lambda z: dx.masked_cross_entropy(z, targets, reduction="none"), logits)
    diverged = torch.zeros(20, dtype=torch.bool)
    diverged[[3, 7]] = True
    assert torch.equal(value.isnan(), diverged)
    assert gradient[diverged].eq(0).all()
    assert torch.equal(gradient[~diverged], clean[1][~diverged])
    assert torch.equal(value[~diverged], clean[0][~diverged])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_bits(isa, threads):
    logits, targets, mask = problem(LogitsCase((1500,), 130))

    def run():
        return with_gradient(lambda z: dx.masked_cross_entropy(z, targets, mask), logits)

    expected = run()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual = run()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("vocab", [18, 40])
def test_a_row_gives_the_same_bits_wherever_it_stands(isa, vocab):
    """Neighbours, masks and the split of the batch change nothing, though short rows share a register."""
    logits, targets, _ = problem(LogitsCase((70,), vocab))

    def run(rows):
        return with_gradient(lambda z: dx.masked_cross_entropy(z, targets[rows], reduction="none"), logits[rows])

    value, gradient = run(slice(None))
    for rows in (slice(7, 40), torch.arange(70) % 3 > 0):
        part = run(rows)
        assert torch.equal(part[0], value[rows])
        assert torch.equal(part[1], gradient[rows])


def test_many_dimensions():
    """More leading dimensions than a launcher takes are served by the reference."""
    logits, targets, mask = problem(LogitsCase((1, 2, 1, 2, 1, 2, 1, 1, 2, 1), 5))
    assert_matches_float64(logits, targets, mask)


# --- a strided vocabulary, as a convolution's output has it ---------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "vocab", "dtype", "smoothing", "pattern"),
    cross(
        [(2, 7), (2, 16), (3, 67), (1, 300), (2, 512)], [1, 7, 8, 33, 257, 600], [torch.float32, *HALF_TYPES],
        SMOOTHINGS, ["normal", "minus_inf", "extreme"],
    ),
)  # fmt: skip
def test_columns(isa, shape, vocab, dtype, smoothing, pattern):
    """Rows that fill no register, one, several, more than are taken together; a few ids, partial sums and more."""
    if pattern == "minus_inf" and smoothing > 0:
        pattern = "normal"  # the value would be infinite
    logits, targets, mask = problem(LogitsCase(shape, vocab, dtype, "vocab_first", pattern, seed=vocab))
    assert logits.stride(-1) != 1 or vocab == 1
    for counted in (mask, None):
        assert_matches_float64(logits, targets, counted, label_smoothing=smoothing, reduction="none")
    if vocab > 2:
        assert_matches_float64(logits, targets, mask, label_smoothing=smoothing, valid_vocab=vocab - 2)


def test_columns_keep_to_themselves(isa):
    """NaN in rows that do not count, and in padding, reaches nothing; a diverged row's gradient is 0."""
    logits, targets, mask = problem(LogitsCase((2, 40), 50, layout="vocab_first"))
    logits[~mask], targets[mask] = nan, targets[mask].clamp(0, 40)
    logits[..., 45:] = nan
    row = tuple(mask.nonzero()[3].tolist())
    logits[(*row, 7)] = nan
    value, gradient = with_gradient(
        lambda z: dx.masked_cross_entropy(z, targets, mask, reduction="none", valid_vocab=45), logits
    )
    assert value[row].isnan()
    value[row] = 0.0
    assert (value != 0).sum() == mask.sum() - 1
    assert gradient.isfinite().all()
    assert not gradient[~mask].any()
    assert not gradient[row].any()
    assert not gradient[..., 45:].any()
