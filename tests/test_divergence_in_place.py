"""The gradient in the auxiliary logits' own memory: the loss's, whatever the layout, and nothing beside it."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch
from torch import Tensor

import dimo_ext as dx
from tests.calls import Inputs
from tests.conftest import LAYOUTS, LogitsCase, cross
from tests.oracles import DIVERGENCES

HALF_AND_SINGLE = [torch.float32, torch.float16, torch.bfloat16]
VOCABULARIES = [1, 17, 65, 129, 300, 1025, 4097, 17001]


def out_of_place(teacher: Tensor, auxiliary: Tensor, divergence: str, **options) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gradient and count of the loss, the gradient not yet rounded to a half type."""
    student = auxiliary.to(torch.promote_types(auxiliary.dtype, torch.float32), copy=True).requires_grad_()
    value, zeroed = dx.distribution_matching_loss(
        student, teacher, auxiliary, divergence, count_zeroed=True, **options
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(value, student, torch.ones_like(value))
    return value.detach(), gradient, zeroed


@pytest.mark.parametrize(
    ("vocab", "divergence", "dtype", "layout", "pattern", "reduction"),
    cross(
        VOCABULARIES, DIVERGENCES, HALF_AND_SINGLE, LAYOUTS, ["normal", "minus_inf", "extreme", "near"],
        ["none", "sum", "mean", "batchmean"],
    ),
    ids=str,
)  # fmt: skip
def test_it_is_the_gradient_of_the_loss(device, vocab, divergence, dtype, layout, pattern, reduction):
    """Guided, masked, weighted, rows whose gradient the dtype cannot hold included."""
    teacher, auxiliary, uncond = LogitsCase((3, 4), vocab, dtype, layout, pattern, seed=vocab).build(device, 3)
    options = {
        "mask": (torch.arange(12).view(3, 4) % 4 > 0).to(device),
        "weight": torch.tensor([0.5, 2.0, 0.0], device=device),
        "teacher_uncond_logits": uncond,
        "guidance_scale": torch.tensor([1.0, 1.5, 2.0], device=device),
        "reduction": reduction,
    }
    value, gradient, zeroed = out_of_place(teacher, auxiliary, divergence, **options)
    memory = auxiliary.data_ptr(), auxiliary.stride()
    actual = dx.divergence_gradient_(auxiliary, teacher, divergence, count_zeroed=True, **options)
    torch.testing.assert_close(actual.value, value, rtol=0, atol=0, equal_nan=True)
    assert (auxiliary.data_ptr(), auxiliary.stride()) == memory
    rounded = gradient.to(dtype)
    held = rounded.isfinite().all(-1, keepdim=True)
    assert torch.equal(auxiliary, torch.where(held, rounded, 0.0))
    assert actual.zeroed_rows == zeroed + (~held).sum()


def test_nothing_around_the_logits_is_touched(device):
    """A slice of longer rows and a larger vocabulary."""
    wide = torch.full((3, 6, 1031), nan, device=device)
    wide[:, 1:5, 2:1027] = torch.randn(3, 4, 1025)
    teacher = torch.randn(3, 4, 1025, device=device)
    dx.divergence_gradient_(wide[:, 1:5, 2:1027], teacher, "jeffreys:-0.2")
    assert wide[:, 1:5, 2:1027].isfinite().all()
    wide[:, 1:5, 2:1027] = nan
    assert wide.isnan().all()


def test_float64_runs_on_the_reference(device):
    """As for the loss."""
    teacher, auxiliary = LogitsCase((2, 3), 9, torch.float64).build(device)
    value, gradient, _ = out_of_place(teacher, auxiliary, "le_cam")
    assert torch.equal(dx.divergence_gradient_(auxiliary, teacher, "le_cam"), value)
    assert torch.equal(auxiliary, gradient)


def test_float16_is_rounded_once(device):
    """The factor is applied before: a gradient that is representable with it alone is kept."""
    teacher = torch.tensor([[[0.0, -30.0, 0.0]]], dtype=torch.float16, device=device)
    auxiliary = torch.tensor([[[0.0, -30.0, -14.0]]], dtype=torch.float16, device=device)
    weight = torch.tensor([2.0**-8], device=device)
    exact = out_of_place(teacher.double(), auxiliary.double(), "pearson_chi2", weight=weight)[1]
    _, zeroed = dx.divergence_gradient_(auxiliary, teacher, "pearson_chi2", weight=weight, count_zeroed=True)
    assert zeroed == 0
    assert torch.equal(auxiliary, exact.half())


def test_the_gradient_is_handed_on(device):
    """To whatever made the student's logits, as the loss would."""
    x = Inputs.build(device)
    options = {"mask": x.mask, "weight": x.weight, "reduction": "mean"}
    losses = {}
    for name in ("loss", "in place"):
        weight = torch.zeros(300, device=device, requires_grad=True)
        student, auxiliary = x.student + weight, x.auxiliary.clone()
        if name == "loss":
            dx.distribution_matching_loss(student, x.teacher, auxiliary, "reverse_kl", **options).backward()
        else:
            dx.divergence_gradient_(auxiliary, x.teacher, "reverse_kl", **options)
            student.backward(auxiliary)
        losses[name] = weight.grad
    assert torch.equal(losses["loss"], losses["in place"])


def test_autograd_sees_the_overwriting(device):
    """A backward that needs the old logits is refused, not wrong."""
    weight = torch.ones(2, 3, 5, device=device, requires_grad=True)
    auxiliary = torch.randn(2, 3, 5, device=device)
    product = (weight * auxiliary).sum()
    dx.divergence_gradient_(auxiliary, torch.randn(2, 3, 5, device=device), "forward_kl")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_inference_mode(device):
    """Its tensors have no version."""
    with torch.inference_mode():
        teacher, auxiliary = LogitsCase((2, 3), 9).build(device)
        assert dx.divergence_gradient_(auxiliary, teacher, "forward_kl") > 0
        assert auxiliary.sum(-1).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("auxiliary", "message"),
    [
        (
            lambda teacher: teacher.clone().requires_grad_(),
            "auxiliary_logits: expected a tensor that needs no gradient",
        ),
        (lambda teacher: teacher[:1].clone().expand(2, 3, 5), "auxiliary_logits: expected elements in places of their"),
        (lambda teacher: teacher, "auxiliary_logits: expected memory of its own"),
        (lambda teacher: teacher.view(2, 3, 5), "auxiliary_logits: expected memory of its own"),
    ],
)
def test_what_cannot_be_overwritten_is_refused(device, auxiliary, message):
    """Before anything is written."""
    teacher = torch.randn(2, 3, 5, device=device)
    before = teacher.clone()
    with pytest.raises(ValueError, match=message):
        dx.divergence_gradient_(auxiliary(teacher), teacher, "forward_kl")
    with pytest.raises(ValueError, match="memory of its own"):
        dx.divergence_gradient_(teacher, before, "forward_kl", teacher_uncond_logits=teacher, guidance_scale=2.0)
    assert torch.equal(teacher, before)


@pytest.mark.parametrize("pattern", [inf, nan, -inf])
def test_rows_that_do_not_count_are_not_read(device, pattern):
    """They become zeros."""
    teacher, auxiliary = LogitsCase((2, 6), 1025).build(device)
    mask = torch.tensor([[True, False, True, True, False, True]] * 2, device=device)
    dirty = auxiliary.masked_fill(~mask[..., None], pattern)
    values = [dx.divergence_gradient_(z, teacher, "jensen_shannon", mask=mask) for z in (auxiliary, dirty)]
    assert torch.equal(*values)
    assert torch.equal(auxiliary, dirty)
    assert auxiliary[~mask].eq(0).all()
