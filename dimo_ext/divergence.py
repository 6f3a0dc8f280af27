"""Token-level f-divergence between teacher and auxiliary, and the loss that hands its gradient to the student."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from ._autograd import (
    needs_gradient,
    refuse_forward_mode,
    register_saved_gradient,
    token_factor,
    value_dtype,
)
from ._backend import MAX_DIMS, address, logit_rows, native_kernel, native_module, placement, rows_per_sample
from ._checks import (
    FLOATS,
    check_guidance,
    check_logit_values,
    check_logits,
    check_number,
    check_reduction,
    check_tensor,
    check_values,
    require,
)
from ._memory import output_like
from .divergences import Divergence, parse_divergence

_LIB = torch.library.Library("dimo_ext", "FRAGMENT")
_OPTIONS = (
    "str divergence, Tensor? uncond_logits, float guidance_scale, Tensor? guidance_per_sample, "
    "float teacher_temperature, float auxiliary_temperature, float? teacher_log_floor, Tensor? mask, Tensor? factor, "
    "bool reduce"
)
_LIB.define(
    f"token_divergence(Tensor receiver, Tensor teacher_logits, Tensor auxiliary_logits, {_OPTIONS}, "
    "bool need_gradient) -> (Tensor, Tensor, Tensor)"
)
_LIB.define(f"divergence_gradient_(Tensor(a!) auxiliary_logits, Tensor teacher_logits, {_OPTIONS}) -> (Tensor, Tensor)")


def _token_divergence(
    receiver: Tensor, teacher: Tensor, auxiliary: Tensor, divergence: str, uncond: Tensor | None,
    guidance_scale: float, guidance_per_sample: Tensor | None, teacher_temperature: float,
    auxiliary_temperature: float, teacher_log_floor: float | None, mask: Tensor | None, factor: Tensor | None,
    reduce: bool, need_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kernel = _kernel(receiver, teacher, auxiliary, uncond)
    if kernel is None:
        return reference.token_divergence(
            receiver, teacher, auxiliary, divergence, uncond, guidance_scale, guidance_per_sample, teacher_temperature,
            auxiliary_temperature, teacher_log_floor, mask, factor, reduce, need_gradient,
        )  # fmt: skip
    gradient = output_like(receiver) if need_gradient else None
    value, zeroed = _run(
        kernel, teacher, auxiliary, gradient, divergence, uncond, guidance_scale, guidance_per_sample,
        teacher_temperature, auxiliary_temperature, teacher_log_floor, mask, factor, receiver.dtype != torch.float16,
    )  # fmt: skip
    return value.sum() if reduce else value, zeroed, receiver.new_empty(0) if gradient is None else gradient


def _divergence_gradient_(
    auxiliary: Tensor, teacher: Tensor, divergence: str, uncond: Tensor | None, guidance_scale: float,
    guidance_per_sample: Tensor | None, teacher_temperature: float, auxiliary_temperature: float,
    teacher_log_floor: float | None, mask: Tensor | None, factor: Tensor | None, reduce: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    kernel = _kernel(teacher, auxiliary, uncond)
    if kernel is None:
        return reference.divergence_gradient_(
            auxiliary, teacher, divergence, uncond, guidance_scale, guidance_per_sample, teacher_temperature,
            auxiliary_temperature, teacher_log_floor, mask, factor, reduce,
        )  # fmt: skip
    value, zeroed = _run(
        kernel, teacher, auxiliary, auxiliary, divergence, uncond, guidance_scale, guidance_per_sample,
        teacher_temperature, auxiliary_temperature, teacher_log_floor, mask, factor, True,
    )  # fmt: skip
    if not auxiliary.is_inference():  # which have no version
        torch.autograd.graph.increment_version(auxiliary)
    return value.sum() if reduce else value, zeroed


def _kernel(*logits: Tensor | None) -> Callable[..., None] | None:
    """Return the compiled kernel, where it serves these logits."""
    given = [z for z in logits if z is not None]
    kernel = native_kernel("token_divergence", given[0].device)
    return None if given[0].dim() > MAX_DIMS or any(z.dtype == torch.float64 for z in given) else kernel


def _run(
    kernel: Callable[..., None], teacher: Tensor, auxiliary: Tensor, gradient: Tensor | None, divergence: str,
    uncond: Tensor | None, guidance_scale: float, guidance_per_sample: Tensor | None, teacher_temperature: float,
    auxiliary_temperature: float, teacher_log_floor: float | None, mask: Tensor | None, factor: Tensor | None,
    factor_in_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Call the kernel, which fills ``gradient``; return the values and the number of zeroed rows."""
    value = teacher.new_empty(teacher.shape[:-1], dtype=torch.float32)
    counters = torch.zeros(2, dtype=torch.int64, device=teacher.device)  # of zeroed rows, of rows that were handed out
    zeroed, ticket = counters[0], None if mask is None or not teacher.is_cuda else counters[1]
    mask, factor = (None if t is None else t.contiguous() for t in (mask, factor))
    guidance = None if guidance_per_sample is None else guidance_per_sample.to(torch.float32).contiguous()
    floor = -math.inf if teacher_log_floor is None else teacher_log_floor
    kernel(
        *_kernel_divergence(divergence), teacher.shape,
        [logit_rows(z) for z in (teacher, uncond, auxiliary, gradient)],
        (guidance_scale, address(guidance), rows_per_sample(teacher)),
        (teacher_temperature, auxiliary_temperature, floor), address(mask),
        (address(factor), 1 if factor is not None and factor.dim() else 0, factor_in_gradient),
        value.data_ptr(), zeroed.data_ptr(), address(ticket), *placement(teacher.device),
    )  # fmt: skip
    return value, zeroed


def _kernel_divergence(divergence: str) -> tuple[Any, float]:
    """Kind and parameter as the compiled module takes them."""
    name, parameter = _name_and_parameter(divergence)
    return getattr(native_module().DivergenceKind, name), parameter


@functools.cache
def _name_and_parameter(divergence: str) -> tuple[str, float]:
    """Jeffreys' limits are the KLs."""
    parsed = parse_divergence(divergence)
    parameter, name = next(iter(dataclasses.astuple(parsed)), 0.0), type(parsed).__name__
    if name == "Jeffreys" and parameter in (0.0, 1.0):
        name = "ReverseKL" if parameter else "ForwardKL"
    return name, parameter


def _fake(receiver, teacher_logits, auxiliary_logits, *args):
    reduce, need_gradient = args[-2:]
    shape = () if reduce else teacher_logits.shape[:-1]
    value = teacher_logits.new_empty(shape, dtype=value_dtype(teacher_logits, auxiliary_logits))
    gradient = torch.empty_like(receiver) if need_gradient else receiver.new_empty(0)
    return value, value.new_empty((), dtype=torch.int64), gradient


def _fake_gradient_(auxiliary_logits, teacher_logits, *args):
    shape = () if args[-1] else teacher_logits.shape[:-1]
    value = teacher_logits.new_empty(shape, dtype=value_dtype(teacher_logits, auxiliary_logits))
    return value, value.new_empty((), dtype=torch.int64)


for _device in ("CPU", "CUDA"):
    _LIB.impl("token_divergence", _token_divergence, _device)
    _LIB.impl("divergence_gradient_", _divergence_gradient_, _device)
torch.library.register_fake("dimo_ext::token_divergence", _fake, lib=_LIB)
torch.library.register_fake("dimo_ext::divergence_gradient_", _fake_gradient_, lib=_LIB)
register_saved_gradient("token_divergence", _LIB, lambda inputs, _: inputs[-3])


class CountedDivergence(NamedTuple):
    """A divergence or loss, and how many rows got gradient 0 because theirs has no limit or is not representable."""

    value: Tensor
    zeroed_rows: Tensor


def token_divergence(
    teacher_logits: Tensor,
    auxiliary_logits: Tensor,
    divergence: str | Divergence,
    *,
    teacher_uncond_logits: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
    teacher_temperature: float = 1.0,
    auxiliary_temperature: float = 1.0,
    teacher_log_floor: float | None = None,
    mask: Tensor | None = None,
    count_zeroed: bool = False,
) -> Tensor | CountedDivergence:
    """D_f(p ‖ q) of every token, p = softmax(teacher / τ_p), q = softmax(auxiliary / τ_q).

    The gradient goes to ``auxiliary_logits``: ∂D/∂z_q = (q·g - q·Σ_v q_v g_v) / τ_q with g = f(u) - u f'(u), u = p/q.
    The teacher's side is a constant.

    Args:
        teacher_logits: ``[..., V]`` float32, float16, bfloat16 or float64; -inf marks ids that cannot occur.
        auxiliary_logits: ``[..., V]``; its dtype may differ.
        divergence: an object such as ``Jeffreys(-0.2)``, or its string ``"jeffreys:-0.2"``.
        teacher_uncond_logits: ``[..., V]`` for classifier-free guidance, uncond + s·(cond - uncond).
        guidance_scale: s, a float or a ``[B]`` tensor; 1 switches guidance off. Needs ``teacher_uncond_logits``.
        teacher_temperature: τ_p > 0.
        auxiliary_temperature: τ_q > 0.
        teacher_log_floor: a number < 0 that bounds log p from below, for divergences that a filtered teacher makes
            infinite (reverse KL, Neyman χ², α <= 0); p is not renormalised, and the value is Σ q f(p/q) with f in its
            non-negative form, f'(1) = 0 (for reverse KL u - 1 - log u). None = no floor.
        mask: bool ``[...]``; False gives value 0 and gradient 0.
        count_zeroed: return ``CountedDivergence(value, zeroed_rows)`` with an int64 scalar on the device; it counts
            when a gradient is computed.

    Returns:
        ``[...]`` float32 (float64 where an input is). A row of -inf alone gives 0 and counts as a token, one with NaN
        or +inf gives NaN and gradient 0; the value is its limit,
        ±inf included, where p or q vanishes; terms that diverge with opposite signs give +inf. A row whose gradient has
        no limit, or one that the dtype cannot hold, has gradient 0.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given.

    Example:
        >>> teacher = torch.tensor([[0.0, 0.0], [0.0, -torch.inf]])
        >>> auxiliary = torch.zeros(2, 2, requires_grad=True)
        >>> value = token_divergence(teacher, auxiliary, "forward_kl")
        >>> [f"{x:.4f}" for x in value.tolist()]
        ['0.0000', '0.6931']
        >>> value.sum().backward()
        >>> auxiliary.grad.tolist()
        [[0.0, 0.0], [-0.5, 0.5]]
    """
    result = _checked_divergence(
        auxiliary_logits, teacher_logits, auxiliary_logits, divergence, teacher_uncond_logits, guidance_scale,
        teacher_temperature, auxiliary_temperature, teacher_log_floor, mask,
    )  # fmt: skip
    return result if count_zeroed else result.value


def distribution_matching_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    auxiliary_logits: Tensor,
    divergence: str | Divergence,
    *,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    teacher_uncond_logits: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
    teacher_temperature: float = 1.0,
    auxiliary_temperature: float = 1.0,
    teacher_log_floor: float | None = None,
    reduction: str = "batchmean",
    count_zeroed: bool = False,
) -> Tensor | CountedDivergence:
    """D_f(teacher ‖ auxiliary), reduced, with ∂D/∂auxiliary_logits handed to ``student_logits``.

    This is the loss of Di[M]O (arXiv 2503.15457): its value is the true divergence, its backward the pseudo-gradient
    Σ_i w_i · ∂D(p_i ‖ q_i)/∂z_ψ,i · ∂z_θ,i/∂θ. Only ``student_logits`` receives a gradient.

    Args:
        student_logits: ``[..., V]``, the logits whose draws were masked to make the other networks' input; not read.
        teacher_logits, auxiliary_logits, divergence, teacher_uncond_logits, guidance_scale, teacher_temperature,
            auxiliary_temperature, teacher_log_floor, count_zeroed: as in :func:`token_divergence`.
        mask: bool ``[...]``, True = counted; None counts all.
        weight: ``[B]`` or the shape of the tokens ``[...]``, the w(t) of the objective; None = 1.
        reduction: "none", "sum", "mean" (÷ counted tokens, never ÷ weights) or "batchmean" (sum ÷ B, needs at least
            3 dimensions of logits). Nothing counted gives 0.

    Returns:
        Scalar, or ``[...]`` for "none"; float32 (float64 where an input is).

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given.

    Example:
        >>> student = torch.zeros(1, 2, 3, requires_grad=True)  # [B, L, V]
        >>> teacher, auxiliary = torch.tensor([[[0.0, 1.0, 2.0]] * 2]), torch.zeros(1, 2, 3)
        >>> mask = torch.tensor([[True, False]])
        >>> loss = distribution_matching_loss(student, teacher, auxiliary, "jeffreys:-0.2", mask=mask)
        >>> loss.backward()
        >>> f"{loss:.3f}", student.grad[0, 1].tolist()
        ('0.258', [0.0, 0.0, 0.0])
    """
    check_logits(student_logits, "student_logits")
    check_logits(teacher_logits, "teacher_logits", student_logits)
    check_reduction(reduction, student_logits)
    result = _checked_divergence(
        student_logits, teacher_logits, auxiliary_logits, divergence, teacher_uncond_logits, guidance_scale,
        teacher_temperature, auxiliary_temperature, teacher_log_floor, mask, weight, reduction,
    )  # fmt: skip
    return result if count_zeroed else result.value


def divergence_gradient_(
    auxiliary_logits: Tensor,
    teacher_logits: Tensor,
    divergence: str | Divergence,
    *,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    teacher_uncond_logits: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
    teacher_temperature: float = 1.0,
    auxiliary_temperature: float = 1.0,
    teacher_log_floor: float | None = None,
    reduction: str = "batchmean",
    count_zeroed: bool = False,
) -> Tensor | CountedDivergence:
    """Overwrite ``auxiliary_logits`` with the gradient of :func:`distribution_matching_loss`; return the loss's value.

    For whoever has no memory for a further tensor of the vocabulary's size and needs these logits no more. Nothing is
    recorded: hand the gradient on with ``student_logits.backward(auxiliary_logits)``.

    Args:
        auxiliary_logits: ``[..., V]``, overwritten with the gradient in its own dtype. It needs no gradient itself, no
            two of its elements share a place, and it shares no memory with the other logits. float16 holds the
            gradient of a mean over many tokens badly: prefer ``reduction="sum"`` and scale what follows.
        teacher_logits, divergence, mask, weight, teacher_uncond_logits, guidance_scale, teacher_temperature,
            auxiliary_temperature, teacher_log_floor, reduction, count_zeroed: as in
            :func:`distribution_matching_loss`.

    Returns:
        Scalar, or ``[...]`` for "none"; float32 (float64 where an input is).

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given.

    Example:
        >>> teacher, auxiliary = torch.tensor([[[0.0, 1.0, 2.0]]]), torch.zeros(1, 1, 3)
        >>> value = divergence_gradient_(auxiliary, teacher, "forward_kl")
        >>> f"{value:.3f}", [f"{x:.3f}" for x in auxiliary[0, 0].tolist()]
        ('0.266', ['0.243', '0.089', '-0.332'])
    """
    check_logits(auxiliary_logits, "auxiliary_logits")
    check_reduction(reduction, auxiliary_logits)
    arguments = _arguments(
        teacher_logits, auxiliary_logits, divergence, teacher_uncond_logits, guidance_scale, teacher_temperature,
        auxiliary_temperature, teacher_log_floor, mask, weight, reduction,
    )  # fmt: skip
    _check_overwritable(auxiliary_logits, teacher_logits, teacher_uncond_logits)
    value, zeroed_rows = torch.ops.dimo_ext.divergence_gradient_(auxiliary_logits, teacher_logits.detach(), *arguments)
    return CountedDivergence(value, zeroed_rows) if count_zeroed else value


def _check_overwritable(logits: Tensor, *others: Tensor | None) -> None:
    name, expected = "auxiliary_logits", "a tensor that needs no gradient"
    require(not logits.requires_grad, name, expected, "one with requires_grad=True")
    if torch.compiler.is_compiling():
        return
    overlaps = torch._debug_has_internal_overlap(logits) == 1
    require(not overlaps, name, "elements in places of their own", "an expanded tensor")
    shared = any(isinstance(z, Tensor) and torch._C._is_alias_of(logits, z) for z in others)
    require(not shared, name, "memory of its own", "that of the teacher's logits")


def _checked_divergence(
    receiver, teacher, auxiliary, divergence, uncond, guidance_scale, teacher_temperature, auxiliary_temperature,
    teacher_log_floor, mask, weight=None, reduction="none",
) -> CountedDivergence:  # fmt: skip
    arguments = _arguments(
        teacher, auxiliary, divergence, uncond, guidance_scale, teacher_temperature, auxiliary_temperature,
        teacher_log_floor, mask, weight, reduction,
    )  # fmt: skip
    refuse_forward_mode(receiver)
    value, zeroed_rows, _ = torch.ops.dimo_ext.token_divergence(
        receiver, teacher.detach(), auxiliary.detach(), *arguments, needs_gradient(receiver)
    )
    return CountedDivergence(value, zeroed_rows)


def _arguments(
    teacher, auxiliary, divergence, uncond, guidance_scale, teacher_temperature, auxiliary_temperature,
    teacher_log_floor, mask, weight, reduction,
) -> tuple:  # fmt: skip
    """Return what both operators take behind their logits, checked."""
    check_logits(teacher, "teacher_logits")
    check_logits(auxiliary, "auxiliary_logits", teacher)
    scale, scale_per_sample = check_guidance(teacher, uncond, "teacher_uncond_logits", guidance_scale)
    temperatures = [
        check_number(teacher_temperature, "teacher_temperature", low=0.0, open_low=True),
        check_number(auxiliary_temperature, "auxiliary_temperature", low=0.0, open_low=True),
    ]
    if teacher_log_floor is not None:
        teacher_log_floor = check_number(teacher_log_floor, "teacher_log_floor", high=0.0)
        require(teacher_log_floor < 0.0, "teacher_log_floor", "a number < 0", teacher_log_floor)
    if mask is not None:
        check_tensor(mask, "mask", teacher.shape[:-1], (torch.bool,), teacher.device)
    for logits, name in ((teacher, "teacher_logits"), (auxiliary, "auxiliary_logits")):
        check_logit_values(logits, name, mask)
    dtype = value_dtype(teacher, auxiliary)
    weight = None if weight is None else _per_token(weight, teacher, dtype)
    factor = token_factor(teacher, mask, weight, reduction, dtype)
    return (
        str(parse_divergence(divergence)), None if uncond is None else uncond.detach(), scale, scale_per_sample,
        *temperatures, teacher_log_floor, mask, factor, reduction != "none",
    )  # fmt: skip


def _per_token(weight: Tensor, logits: Tensor, dtype: torch.dtype) -> Tensor:
    shape = logits.shape[:-1]
    shapes = [shape[:1], shape]
    given = list(weight.shape) if isinstance(weight, Tensor) else weight
    fits = isinstance(weight, Tensor) and weight.shape in shapes
    require(fits, "weight", f"a tensor of shape {list(shapes[0])} or {list(shapes[1])}", given)
    check_tensor(weight, "weight", weight.shape, FLOATS, logits.device)
    check_values(lambda: torch.isfinite(weight), "weight", "finite numbers")
    per_sample = weight.detach().to(dtype).view(*weight.shape, *[1] * (len(shape) - weight.dim()))
    return per_sample.expand(shape)
