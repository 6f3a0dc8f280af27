"""Masked-out rows: what stands there changes no bit elsewhere, and their own value and gradient are exactly zero."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch
from torch import Tensor

import dimo_ext as dx
from tests.calls import with_gradient
from tests.conftest import DTYPES, LAYOUTS, LogitsCase, cross
from tests.oracles import DIVERGENCES

POISONS = [nan, inf, -inf, -3e4]
REDUCTIONS = ["none", "sum", "mean", "batchmean"]


def mask_of(device) -> Tensor:
    """Some of ``[3, 4]`` rows are counted."""
    return (torch.rand(3, 4, generator=torch.Generator().manual_seed(1)) < 0.5).to(device)


def poisoned(x: Tensor, mask: Tensor, poison: float) -> Tensor:
    """The same memory layout, with every number of a masked-out row replaced."""
    return x.masked_fill_(~mask.view(*mask.shape, *[1] * (x.dim() - 2)), poison)


def assert_same_bits(clean: tuple[Tensor, ...], dirty: tuple[Tensor, ...]) -> None:
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b), f"{a} became {b}"


def assert_zero_where_masked_out(mask: Tensor, *outputs: Tensor) -> None:
    for x in outputs:
        if x.shape[:2] == mask.shape:  # not a reduced value
            assert (x[~mask] == 0).all(), f"{x[~mask]} in masked-out rows"


SIDES = ["teacher_logits", "auxiliary_logits", "teacher_uncond_logits", "all"]


@pytest.mark.parametrize(
    ("divergence", "dtype", "vocab", "poison"), cross(DIVERGENCES, DTYPES, [1, 33, 600], POISONS), ids=str
)
def test_divergence_of_rows_side_by_side(device, divergence, dtype, vocab, poison):
    """As a convolution's output has them: those that do not count share registers and cache lines with others."""
    mask = (torch.rand(2, 67, generator=torch.Generator().manual_seed(2)) < 0.5).to(device)
    mask[0, 16:48] = False

    def run(mask, poison=None):
        logits = LogitsCase((2, 67), vocab, dtype, "vocab_first").build(device, 3)
        if poison is not None:
            logits = [poisoned(z, mask, poison) for z in logits]
        teacher, auxiliary, uncond = logits
        scale = torch.tensor([1.5, 2.0], device=device)
        return with_gradient(
            lambda z: dx.token_divergence(
                teacher, z, divergence, mask=mask, teacher_uncond_logits=uncond, guidance_scale=scale
            ),
            auxiliary,
        )

    clean, dirty = run(mask), run(mask, poison)
    assert_same_bits(clean, dirty)
    assert_zero_where_masked_out(mask, *dirty)
    assert_same_bits([x[mask] for x in dirty], [x[mask] for x in run(None)])


@pytest.mark.parametrize(("divergence", "dtype", "side", "poison"), cross(DIVERGENCES, DTYPES, SIDES, POISONS), ids=str)
def test_token_divergence(device, divergence, dtype, side, poison):
    """The counted rows get what they get without a mask."""
    mask = mask_of(device)

    def run(*poisoned_sides, mask=mask):
        logits = dict(zip(SIDES, LogitsCase((3, 4), 33, dtype, "sliced").build(device, 3), strict=False))
        for name in poisoned_sides:
            poisoned(logits[name], mask, poison)
        auxiliary, zeroed = logits.pop("auxiliary_logits"), []

        def value(z):
            scale = torch.tensor([1.0, 2.0, 0.5], device=device)
            result = dx.token_divergence(
                auxiliary_logits=z, divergence=divergence, mask=mask, guidance_scale=scale, count_zeroed=True, **logits
            )
            zeroed.append(result.zeroed_rows)
            return result.value

        return *with_gradient(value, auxiliary), *zeroed

    clean, dirty = run(), run(*(SIDES[:3] if side == "all" else [side]))
    assert_same_bits(clean, dirty)
    assert_zero_where_masked_out(mask, *dirty)
    assert_same_bits([x[mask] for x in dirty[:2]], [x[mask] for x in run(mask=None)[:2]])


LOSS_SIDES = ["student_logits", "teacher_logits", "auxiliary_logits", "weight", "all"]


@pytest.mark.parametrize(
    ("divergence", "dtype", "reduction", "side", "poison"),
    cross(DIVERGENCES, DTYPES, REDUCTIONS, LOSS_SIDES, POISONS),
    ids=str,
)
def test_distribution_matching_loss(device, divergence, dtype, reduction, side, poison):
    """The student's numbers and the weights are no exception."""
    mask = mask_of(device)

    def run(*poisoned_sides):
        arguments = dict(zip(LOSS_SIDES, LogitsCase((3, 4), 33, dtype).build(device, 3), strict=False))
        arguments["weight"] = torch.linspace(0.1, 2.0, 12, device=device).view(3, 4)
        for name in poisoned_sides:
            poisoned(arguments[name], mask, poison)
        student = arguments.pop("student_logits")

        def loss(z):
            return dx.distribution_matching_loss(z, divergence=divergence, mask=mask, reduction=reduction, **arguments)

        return with_gradient(loss, student)

    clean, dirty = run(), run(*(LOSS_SIDES[:4] if side == "all" else [side]))
    assert_same_bits(clean, dirty)
    assert_zero_where_masked_out(mask, *dirty)


@pytest.mark.parametrize(
    ("dtype", "layout", "reduction", "side", "poison", "smoothing"),
    cross(DTYPES, LAYOUTS, REDUCTIONS, ["logits", "targets", "both"], POISONS, [0.0, 0.1]),
    ids=str,
)
def test_masked_cross_entropy(device, dtype, layout, reduction, side, poison, smoothing):
    """A target of a masked-out row may be any integer."""
    mask = mask_of(device)

    def run(dirty_logits, dirty_targets):
        (logits,) = LogitsCase((3, 4), 33, dtype, layout).build(device, 1)
        targets = torch.arange(12, device=device).view(3, 4)
        if dirty_logits:
            poisoned(logits, mask, poison)
        if dirty_targets:
            targets = torch.where(mask, targets, torch.tensor([-1, 2**62, -(2**63), 33], device=device))

        def loss(z):
            return dx.masked_cross_entropy(z, targets, mask, label_smoothing=smoothing, reduction=reduction)

        return with_gradient(loss, logits)

    clean, dirty = run(False, False), run(side != "targets", side != "logits")
    assert_same_bits(clean, dirty)
    assert_zero_where_masked_out(mask, *dirty)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_counted(device, dtype, poison, reduction):
    """Every row masked out and poisoned: losses and gradients are 0, never 0/0."""
    mask = torch.zeros(3, 4, dtype=torch.bool, device=device)
    bad = torch.full((3, 4, 5), poison, dtype=dtype, device=device)
    weight = torch.full((3, 4), poison, device=device)
    losses = {
        "divergence": lambda z: dx.distribution_matching_loss(
            z, bad, bad, "reverse_kl", mask=mask, weight=weight, reduction=reduction, teacher_uncond_logits=bad,
            guidance_scale=2.0,
        ),
        "cross-entropy": lambda z: dx.masked_cross_entropy(z, mask.long() - 1, mask, reduction=reduction),
    }  # fmt: skip
    for loss in losses.values():
        value, gradient = with_gradient(loss, bad)
        assert torch.equal(value, torch.zeros_like(value))
        assert torch.equal(gradient, torch.zeros_like(gradient))


UPSTREAM = {
    "token_divergence": lambda z, other, mask: dx.token_divergence(other, z, "forward_kl", mask=mask),
    "distribution_matching_loss": lambda z, other, mask: dx.distribution_matching_loss(
        z, other, z.detach(), "forward_kl", mask=mask, reduction="none"
    ),
    "masked_cross_entropy": lambda z, other, mask: dx.masked_cross_entropy(z, other.argmax(-1), mask, reduction="none"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [nan, inf])
@pytest.mark.parametrize("name", UPSTREAM)
def test_the_upstream_gradient_of_a_masked_out_row(device, name, bad, dtype):
    """A user's own infinite weight on a masked-out row leaves its gradient 0 and the others' as they are."""
    logits, other = LogitsCase((3, 4), 7, dtype).build(device)
    mask = mask_of(device)
    value = UPSTREAM[name](logits.requires_grad_(), other, mask)
    clean, dirty = (
        torch.autograd.grad(value, logits, torch.where(mask, 2.0, fill).to(value.dtype), retain_graph=True)[0]
        for fill in (2.0, bad)
    )
    assert torch.equal(clean, dirty)
    assert_zero_where_masked_out(mask, dirty)
    assert (clean[mask] != 0).any()
