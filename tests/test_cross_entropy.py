"""Masked cross-entropy against torch's own on the selected rows, in float64."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import dimo_ext as dx
from tests.conftest import (
    DTYPES,
    META,
    TOLERANCES,
    LogitsCase,
    assert_close,
    assert_gradient,
    assert_rejected,
    computed_gradients,
    logits_cases,
)

REDUCTIONS = ["none", "sum", "mean", "batchmean"]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def problem(case: LogitsCase, device, *, outside: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets (some outside the vocabulary if asked for) and a mask."""
    (logits,) = case.build(device, 1)
    generator = torch.Generator().manual_seed(case.seed)
    extra = 2 if outside else 0
    targets = torch.randint(-extra, case.vocab + extra, case.shape, generator=generator)
    mask = torch.rand(case.shape, generator=generator) < 0.6
    return logits, targets.to(device), mask.to(device)


def oracle(logits: Tensor, targets: Tensor, mask: Tensor | None, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """Per-token values, which tokens count, and the gradient of the values' sum: torch on the counted rows alone."""
    counted = (targets >= 0) & (targets < logits.shape[-1])
    counted = counted if mask is None else counted & mask
    z = logits.detach().double().requires_grad_()
    selected = F.cross_entropy(z[counted], targets[counted], label_smoothing=smoothing, reduction="none")
    (gradient,) = torch.autograd.grad(selected.sum(), z)
    value = torch.zeros(targets.shape, dtype=torch.float64, device=logits.device)
    return value.masked_scatter(counted, selected.detach()), counted, gradient


@given(
    case=logits_cases(patterns=["normal", "near", "constant", "extreme"]),
    smoothing=st.sampled_from([0.0, 0.1, 0.9]),
    outside=st.booleans(),
)
@example(case=LogitsCase(shape=(0,), vocab=1), smoothing=0.1, outside=False)
@example(case=LogitsCase(shape=(2, 3), vocab=1025, layout="vocab_first"), smoothing=0.0, outside=True)
def test_matches_torch_on_the_counted_rows(device, case, smoothing, outside):
    """Value and gradient per token, for every shape, stride and dtype; targets outside count as masked out."""
    logits, targets, mask = problem(case, device, outside=outside)
    logits = logits.detach().requires_grad_()
    value = dx.masked_cross_entropy(logits, targets, mask, label_smoothing=smoothing, reduction="none")
    value.sum().backward()
    expected, _, gradient = oracle(logits, targets, mask, smoothing)
    assert value.dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
    assert logits.grad.dtype == case.dtype
    assert_close(value, expected, case.dtype)
    assert_gradient(logits.grad, gradient)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("masked", [False, True])
@every_dtype
def test_reductions(device, reduction, masked, dtype):
    """Division by the counted tokens for "mean", by B for "batchmean"; the gradient carries the factor."""
    logits, targets, mask = problem(LogitsCase((3, 4), 13, dtype), device, outside=True)
    logits, mask = logits.requires_grad_(), mask if masked else None
    loss = dx.masked_cross_entropy(logits, targets, mask, reduction=reduction)
    loss.sum().backward()
    value, counted, gradient = oracle(logits, targets, mask, 0.0)
    assert 1 < counted.sum() < 12
    divisor = {"none": 1, "sum": 1, "mean": int(counted.sum()), "batchmean": 3}[reduction]
    assert_close(loss, value if reduction == "none" else value.sum() / divisor, dtype)
    assert_gradient(logits.grad, gradient / divisor)


def test_gradcheck_in_double():
    """Finite differences agree with the gradient, smoothing and mask included."""
    logits, targets, mask = problem(LogitsCase((2, 3), 5, torch.float64), torch.device("cpu"), outside=True)

    def call(z):
        return dx.masked_cross_entropy(z, targets, mask, label_smoothing=0.2, reduction="none")

    assert torch.autograd.gradcheck(call, logits.requires_grad_())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("how", ["mask", "targets", "empty"])
def test_nothing_counted_gives_zero(device, reduction, how):
    """No counted token: loss 0 and gradient 0, never 0/0."""
    batch = 0 if how == "empty" else 2
    logits = torch.randn(batch, 3, 7, device=device, requires_grad=True)
    targets = torch.full((batch, 3), 7 if how == "targets" else 0, device=device)
    mask = torch.zeros(batch, 3, dtype=torch.bool, device=device) if how == "mask" else None
    loss = dx.masked_cross_entropy(logits, targets, mask, reduction=reduction)
    loss.sum().backward()
    assert torch.equal(loss, torch.zeros_like(loss))
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("target", [-(2**63), -100, -1, 4, 2**63 - 1])
def test_any_target_outside_the_vocabulary_is_ignored(device, target):
    """Ids of any size, torch's -100 included."""
    logits = torch.arange(8.0, device=device).view(2, 4)
    targets = torch.tensor([target, 3], device=device)
    expected = F.cross_entropy(logits[1:].double(), targets[1:])
    assert_close(dx.masked_cross_entropy(logits, targets), expected)


@pytest.mark.parametrize("fill", [nan, inf, -inf])
def test_masked_out_rows_are_not_read(device, fill):
    """Whatever stands in a masked-out row, its value and gradient are 0 and its neighbours' are unchanged."""
    logits, targets, mask = problem(LogitsCase((3, 4), 9), device)
    dirty = logits.masked_fill(~mask[..., None], fill).requires_grad_()
    value = dx.masked_cross_entropy(dirty, targets, mask, reduction="none")
    value.sum().backward()
    expected, _, gradient = oracle(logits, targets, mask, 0.0)
    assert_close(value, expected)
    assert_gradient(dirty.grad, gradient)


@given(case=logits_cases(patterns=["minus_inf", "padded"], max_vocab=65), smoothing=st.sampled_from([0.0, 0.1]))
@example(case=LogitsCase((3,), 1, pattern="minus_inf", seed=1), smoothing=0.0)
@example(case=LogitsCase((2, 2, 3), 1, pattern="minus_inf", seed=3), smoothing=0.0)
def test_filtered_ids(device, case, smoothing):
    """A target at -inf costs +inf, as in torch; a row of -inf alone costs 0 and counts; no gradient is NaN."""
    logits, targets, mask = problem(case, device)
    logits = logits.detach().requires_grad_()
    value = dx.masked_cross_entropy(logits, targets, mask, label_smoothing=smoothing, reduction="none")
    value.sum().backward()
    dead = logits.detach().amax(-1) == -inf
    expected, _, _ = oracle(logits, targets, mask & ~dead, smoothing)
    assert_close(value, expected, case.dtype)
    assert logits.grad.isfinite().all()
    counted = mask & ~dead
    mean = dx.masked_cross_entropy(logits, targets, mask, label_smoothing=smoothing, reduction="mean")
    assert_close(mean, expected.sum() / mask.sum().clamp(min=1), case.dtype)
    softmax = logits.detach().double().masked_fill(dead[..., None], 0.0).softmax(-1)
    formula = softmax - smoothing / case.vocab - F.one_hot(targets, case.vocab).double() * (1 - smoothing)
    assert_gradient(logits.grad, formula * counted[..., None])


@given(
    case=logits_cases(patterns=["normal", "extreme", "minus_inf", "padded"]),
    smoothing=st.sampled_from([0.0, 0.1]),
    share=st.floats(0.0, 1.0),
    reduction=st.sampled_from(["none", "sum", "mean"]),
)
def test_a_padded_head(device, case, smoothing, share, reduction):
    """Only the valid ids are read: the loss is theirs alone, and the padding's gradient 0, whatever stands there."""
    logits, targets, mask = problem(case, device, outside=True)
    valid = max(1, round(share * case.vocab))
    logits.detach()[..., valid:] = nan
    options = {"label_smoothing": smoothing, "reduction": reduction}
    logits, alone = logits.detach().requires_grad_(), logits.detach()[..., :valid].clone().requires_grad_()
    value = dx.masked_cross_entropy(logits, targets, mask, valid_vocab=valid, **options)
    expected = dx.masked_cross_entropy(alone, targets, mask, **options)
    assert_close(value, expected, case.dtype)
    for loss in (value, expected):
        loss.sum().backward()
    assert_gradient(logits.grad[..., :valid], alone.grad)
    assert logits.grad[..., valid:].eq(0).all()


def test_gradient_is_computed_only_when_needed(device):
    """One pass serves both when a gradient is needed; otherwise none is computed."""
    operator = torch.ops.dimo_ext.masked_cross_entropy.default
    logits, targets, _ = problem(LogitsCase((2, 3), 5), device)
    needing = logits.clone().requires_grad_()
    assert computed_gradients(operator, lambda: dx.masked_cross_entropy(needing, targets)) == [needing.numel()]
    assert computed_gradients(operator, lambda: dx.masked_cross_entropy(logits, targets)) == [0]
    with torch.no_grad():
        assert computed_gradients(operator, lambda: dx.masked_cross_entropy(needing, targets)) == [0]


def test_gradients_accumulate_and_a_retained_graph_gives_them_again(device):
    """Backward adds to .grad; a second backward through the same graph gives the same."""
    logits, targets, mask = problem(LogitsCase((3, 4), 13, torch.float64), device)
    logits.requires_grad_()
    loss = dx.masked_cross_entropy(logits, targets, mask)
    (again,) = torch.autograd.grad(loss, logits, retain_graph=True)
    once = again.clone()
    again.zero_()  # the caller's, to do with as they please
    loss.backward(retain_graph=True)
    loss.backward(torch.tensor(-3.0, device=device, dtype=torch.float64))
    _, counted, gradient = oracle(logits, targets, mask, 0.0)
    assert_gradient(once, gradient / counted.sum())
    assert_gradient(logits.grad, -2.0 * gradient / counted.sum())


def test_float16_gradient_survives_the_count_under_a_loss_scale(device):
    """÷ count makes gradients of 1e-7 and less, which float16 rounds to 0; a loss scale meets the count in float32."""
    logits, targets, _ = problem(LogitsCase((8, 2048), 33, torch.float16), device)
    logits.requires_grad_()
    (dx.masked_cross_entropy(logits, targets) * 2.0**14).backward()
    assert_gradient(logits.grad, oracle(logits, targets, None, 0.0)[2])


def test_gradient_is_rounded_once(device):
    """bfloat16: the count is applied first, so no element is off by more than half a unit in the last place."""
    logits, targets, _ = problem(LogitsCase((3, 7), 1025, torch.bfloat16), device)
    logits.requires_grad_()
    dx.masked_cross_entropy(logits, targets).backward()
    exact = oracle(logits, targets, None, 0.0)[2] / 21
    error = (logits.grad.double() - exact).abs()
    assert (error <= 1.01 * TOLERANCES[torch.bfloat16].rounding * exact.abs()).all()


LOGITS, TARGETS = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("name", "value", "expected", "given_"),
    [
        ("logits", LOGITS.long(), "dtype float32, float16, bfloat16 or float64", "torch.int64"),
        ("logits", None, "tensor", "NoneType"),
        ("logits", torch.zeros(2, 3, 0), "V >= 1", "[2, 3, 0]"),
        ("targets", TARGETS.int(), "dtype int64", "torch.int32"),
        ("targets", TARGETS[:1], "shape [2, 3]", "[1, 3]"),
        ("targets", TARGETS.to(META), "a tensor on", "meta"),
        ("targets", [0], "int64 tensor", "list"),
        ("mask", TARGETS, "dtype bool", "torch.int64"),
        ("mask", TARGETS[0].bool(), "shape [2, 3]", "[3]"),
        ("mask", TARGETS.bool().to(META), "a tensor on", "meta"),
        ("label_smoothing", 1.0, "[0, 1)", "1.0"),
        ("label_smoothing", -0.1, "[0, 1]", "-0.1"),
        ("label_smoothing", nan, "finite number", "nan"),
        ("label_smoothing", "0.1", "finite number", "str '0.1'"),
        ("valid_vocab", 0, "an integer in [1, 4]", "0"),
        ("valid_vocab", 5, "an integer in [1, 4]", "5"),
        ("valid_vocab", 2.0, "an integer", "float 2.0"),
        ("reduction", "avg", "one of none, sum, mean, batchmean", "'avg'"),
    ],
)
def test_bad_arguments_are_rejected(device, name, value, expected, given_):
    """The error names the argument, what was expected and what was given."""
    arguments = {"logits": LOGITS.to(device), "targets": TARGETS.to(device), name: value}
    assert_rejected(lambda: dx.masked_cross_entropy(**arguments), name, expected, given_)


def test_batchmean_needs_a_batch_and_a_sequence(device):
    """On [N, V] logits "batchmean" is refused."""
    logits, targets = torch.zeros(6, 4, device=device), torch.zeros(6, dtype=torch.int64, device=device)

    def call():
        return dx.masked_cross_entropy(logits, targets, reduction="batchmean")

    assert_rejected(call, "reduction", "another than 'batchmean'", "'batchmean'")
