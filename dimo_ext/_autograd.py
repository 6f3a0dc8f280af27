"""How the gradient that an operator computes together with its value reaches the logits, and how values are reduced."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def needs_gradient(receiver: Tensor) -> bool:
    """Whether a backward pass can reach ``receiver``: only then is its gradient computed."""
    return torch.is_grad_enabled() and receiver.requires_grad


def refuse_forward_mode(*tensors: Tensor | None) -> None:
    """Raise for forward-mode differentiation (jvp): without a formula its tangents would silently be 0."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError("dimo_ext operators have no forward-mode derivative (jvp): use backward()")


def register_saved_gradient(name: str, lib: torch.library.Library) -> None:
    """Register the autograd formula of an operator whose backward was computed in its forward.

    The first input receives the gradient; the first output is the value ``[...]``, the last one ∂value/∂input
    ``[..., V]`` (empty when it was not asked for). Upstream factors (weight, 1/count, a loss scaler's) are applied in
    float32. The stored gradient has the receiver's dtype, so that half types are rounded there and after scaling.
    """
    torch.library.register_autograd(name, _backward, setup_context=_setup_context, lib=lib)


def _setup_context(ctx, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[-1])
    ctx.dtype, ctx.inputs = inputs[0].dtype, len(inputs)


def _backward(ctx, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    if upstream is None:
        return (None,) * ctx.inputs
    if gradient.dim() != upstream.dim() + 1:
        raise RuntimeError("dimo_ext: the operator was called with need_gradient=False, so it has no backward")
    return _Scale.apply(gradient, upstream, ctx.dtype), *[None] * (ctx.inputs - 1)


class _Scale(torch.autograd.Function):
    """gradient × upstream; its own derivative is refused, since the operator keeps only its first one."""

    @staticmethod
    def forward(ctx, gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
        compute = torch.promote_types(upstream.dtype, gradient.dtype)
        scaled = gradient.to(compute) * upstream[..., None].to(compute)
        # A masked-out row may meet an infinite upstream: its gradient stays exactly zero.
        return torch.where(gradient == 0, 0.0, scaled).to(dtype)

    @staticmethod
    def backward(ctx, *_: Tensor):
        raise RuntimeError("dimo_ext operators are once differentiable: no gradient of a gradient (create_graph=True)")


def reduce_tokens(value: Tensor, counted: Tensor | None, reduction: str) -> Tensor:
    """Reduce per-token values: "none", "sum", "mean" (÷ counted tokens) or "batchmean" (÷ batch); nothing gives 0."""
    if reduction == "none":
        return value
    total = value.sum()
    if reduction == "mean":
        return total / (torch.sym_max(value.numel(), 1) if counted is None else counted.sum().clamp(min=1))
    return total / max(value.shape[0], 1) if reduction == "batchmean" else total
