"""The loss that hands a divergence's gradient on to the student: weights, reductions, autograd."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch
from torch import Tensor

import dimo_ext as dx
from tests.calls import pair
from tests.conftest import DTYPES, LAYOUTS, LogitsCase, assert_close, assert_gradient, cross
from tests.oracles import DIVERGENCES, guided, oracle, oracle_gradient, representable

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
REDUCTIONS = ["none", "sum", "mean", "batchmean"]


def factor_of(weight: Tensor | None, mask: Tensor | None, reduction: str, shape: tuple[int, int]) -> Tensor:
    """What a token's divergence is multiplied with, as the documentation words weight and reduction, in float64."""
    counted = torch.ones(shape, dtype=torch.float64) if mask is None else mask.double().cpu()
    weight = torch.ones(shape) if weight is None else weight.cpu().view(shape[0], -1)
    divisor = {"none": 1, "sum": 1, "mean": max(int(counted.sum()), 1), "batchmean": shape[0]}[reduction]
    return counted * weight.double() / divisor


@pytest.mark.parametrize(
    ("divergence", "dtype", "layout", "reduction", "weighting", "masked", "scale"),
    cross(DIVERGENCES, DTYPES, LAYOUTS, REDUCTIONS, [None, "sample", "token"], [False, True], [1.0, 2.0]),
    ids=str,
)
def test_every_combination(device, divergence, dtype, layout, reduction, weighting, masked, scale):
    """The definition's value and gradient × weight ÷ count; the student alone receives it, and is not read."""
    teacher, auxiliary, uncond = (z.requires_grad_() for z in LogitsCase((3, 4), 13, dtype, layout).build(device, 3))
    student = torch.full_like(teacher, nan).requires_grad_()
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(3, 4, generator=generator).to(device) < 0.6 if masked else None
    sizes = {None: None, "sample": (3,), "token": (3, 4)}[weighting]
    weight = None if sizes is None else torch.rand(sizes, generator=generator).to(device)
    loss = dx.distribution_matching_loss(
        student, teacher, auxiliary, divergence, mask=mask, weight=weight, reduction=reduction,
        teacher_uncond_logits=uncond, guidance_scale=scale, teacher_temperature=0.7, auxiliary_temperature=1.2,
    )  # fmt: skip
    loss.sum().backward()
    assert all(z.grad is None for z in (teacher, auxiliary, uncond))
    assert student.grad.dtype == dtype

    z_p, z_q = guided(teacher.detach(), uncond.detach(), scale) / 0.7, auxiliary.detach().double() / 1.2
    factor = factor_of(weight, mask, reduction, (3, 4)).to(device)
    expected, pull = factor * oracle(divergence, z_p, z_q), oracle_gradient(divergence, z_p, z_q) / 1.2
    assert_close(loss, expected if reduction == "none" else expected.sum(), dtype)
    assert_gradient(student.grad, factor[..., None] * representable(pull, dtype))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("batch", [0, 2])
def test_nothing_counted_gives_zero(device, reduction, batch):
    """An empty batch and an empty mask give loss 0 and gradient 0."""
    teacher, auxiliary = pair(device, (batch, 3, 7), torch.float32)
    student = torch.zeros_like(teacher, requires_grad=True)
    mask = torch.zeros(batch, 3, dtype=torch.bool, device=device)
    loss = dx.distribution_matching_loss(student, teacher, auxiliary, "le_cam", mask=mask, reduction=reduction)
    loss.sum().backward()
    assert torch.equal(loss, torch.zeros(batch, 3, device=device) if reduction == "none" else loss.new_zeros(()))
    assert torch.equal(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize("bad", [nan, inf])
def test_the_weight_of_a_masked_out_row_is_not_read(device, bad):
    """A schedule's w(t) may be infinite where nothing is masked; the loss stays finite."""
    teacher, auxiliary = pair(device, (2, 3, 7), torch.float32)
    student = torch.zeros_like(teacher, requires_grad=True)
    mask = torch.tensor([[False] * 3, [True] * 3], device=device)
    loss = dx.distribution_matching_loss(
        student, teacher, auxiliary, "forward_kl", mask=mask, weight=torch.tensor([bad, 2.0], device=device)
    )
    loss.backward()
    assert_close(loss, oracle(dx.ForwardKL(), teacher[1], auxiliary[1]).sum())
    assert_gradient(student.grad[1], oracle_gradient(dx.ForwardKL(), teacher[1], auxiliary[1]))
    assert torch.equal(student.grad[0], torch.zeros_like(student[0]))


def test_weight_zero_drops_an_infinite_divergence(device):
    """0 × inf is 0 here: a row without weight adds nothing."""
    teacher = torch.tensor([[[0.0, -inf]], [[0.0, 1.0]]], device=device)
    student = torch.zeros_like(teacher, requires_grad=True)
    loss = dx.distribution_matching_loss(
        student, teacher, torch.zeros_like(teacher), "reverse_kl", weight=torch.tensor([0.0, 2.0], device=device)
    )
    loss.backward()
    assert_close(loss, oracle(dx.ReverseKL(), teacher[1], torch.zeros_like(teacher[1])).sum())
    assert student.grad.isfinite().all()


def test_float16_gradient_survives_a_small_factor(device):
    """The O(1) gradient is saved: weight, count and loss scale meet in float32, so nothing underflows."""
    teacher, auxiliary = pair(device, (2, 3, 33), torch.float16)
    student = torch.zeros_like(teacher, requires_grad=True)
    weight = torch.full((2,), 2.0**-20, device=device)
    loss = dx.distribution_matching_loss(student, teacher, auxiliary, "forward_kl", weight=weight)
    (loss * 2.0**21).backward()
    assert_gradient(student.grad, oracle_gradient(dx.ForwardKL(), teacher, auxiliary))


def test_gradients_accumulate_and_a_retained_graph_gives_them_again(device):
    """Backward adds to .grad; a second backward through the same graph gives the same, scaled or not."""
    teacher, auxiliary = pair(device)
    student = torch.zeros_like(teacher, requires_grad=True)
    loss = dx.distribution_matching_loss(student, teacher, auxiliary, "jeffreys:0.3")
    loss.backward(retain_graph=True)
    once = student.grad.clone()
    assert_gradient(once, oracle_gradient(dx.Jeffreys(0.3), teacher, auxiliary) / 3)
    loss.backward(torch.tensor(-2.5, device=device, dtype=loss.dtype), retain_graph=True)
    assert_gradient(student.grad, -1.5 * once)
    student.grad = None
    loss.backward()
    assert torch.equal(student.grad, once)


def test_no_second_derivative(device):
    """The loss is once-differentiable, and says so."""
    teacher, auxiliary = pair(device)
    student = torch.zeros_like(teacher, requires_grad=True)
    loss = dx.distribution_matching_loss(student, teacher, auxiliary, "forward_kl")
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="once differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("student_dtype", "teacher_dtype", "auxiliary_dtype", "uncond_dtype"), cross(*[DTYPES] * 4), ids=str
)
def test_every_network_may_have_its_own_dtype(device, student_dtype, teacher_dtype, auxiliary_dtype, uncond_dtype):
    """Each is read at its own precision, and the student's gradient rounded once to its dtype."""
    dtypes = (teacher_dtype, auxiliary_dtype, uncond_dtype)
    teacher, auxiliary, uncond = (z.to(d) for z, d in zip(LogitsCase((3, 4), 65).build(device, 3), dtypes, strict=True))
    student = torch.zeros_like(teacher, dtype=student_dtype, requires_grad=True)
    loss = dx.distribution_matching_loss(
        student, teacher, auxiliary, "jeffreys:0.3", teacher_uncond_logits=uncond, guidance_scale=1.5
    )
    loss.backward()
    precise = torch.float64 in (teacher_dtype, auxiliary_dtype)
    assert loss.dtype == (torch.float64 if precise else torch.float32)
    assert student.grad.dtype == student_dtype
    logits = guided(teacher, uncond, 1.5), auxiliary
    pull = oracle_gradient(dx.Jeffreys(0.3), *logits) / 3
    assert_close(loss, oracle(dx.Jeffreys(0.3), *logits).sum() / 3)
    exact = student_dtype == torch.float64  # but computed in float32 where another network is float32
    assert_gradient(student.grad.float() if exact else student.grad, pull)


def test_rows_of_zeroed_gradient_are_counted(device):
    """Counted are the rows whose gradient has no limit; not masked-out ones, not those without a finite logit."""
    teacher = torch.tensor([[1.0, -inf], [0.0, 1.0], [2.0, -inf], [-inf, -inf]], device=device)
    auxiliary = torch.zeros(4, 2, device=device, requires_grad=True)
    mask = torch.tensor([True, True, False, True], device=device)
    value, zeroed = dx.token_divergence(teacher, auxiliary, "reverse_kl", mask=mask, count_zeroed=True)
    assert value.tolist()[0] == inf
    assert zeroed.dtype == torch.int64
    assert zeroed.item() == 1
    student = torch.zeros(1, 4, 2, device=device, requires_grad=True)
    counted = dx.distribution_matching_loss(
        student, teacher[None], auxiliary[None], "reverse_kl", mask=mask[None], count_zeroed=True
    )
    assert counted.zeroed_rows.item() == 1
    counted.value.backward()
    assert student.grad[0, 0].tolist() == [0, 0]
    assert student.grad[0, 1].abs().sum() > 0


def test_a_gradient_that_the_students_dtype_cannot_hold_is_zeroed_and_counted(device):
    """What is representable is judged in the dtype of the logits that receive the gradient."""
    teacher = torch.tensor([[[0.0, -30.0, 0.0]]], device=device)
    auxiliary = torch.tensor([[[0.0, -30.0, -14.0]]], device=device)
    gradients = {}
    for dtype in (torch.float16, torch.float32):
        student = torch.zeros(1, 1, 3, dtype=dtype, device=device, requires_grad=True)
        loss = dx.distribution_matching_loss(student, teacher, auxiliary, "pearson_chi2", count_zeroed=True)
        loss.value.backward()
        gradients[dtype] = (loss.zeroed_rows.item(), student.grad.abs().max().item())
    assert gradients[torch.float16] == (1, 0.0)
    zeroed, largest = gradients[torch.float32]
    assert zeroed == 0
    assert 1e5 < largest < inf
