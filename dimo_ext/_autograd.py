"""The one way in which an operator's gradient, computed together with its value, reaches the logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _SavedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, receiver: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = receiver.dtype
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        (gradient,) = ctx.saved_tensors
        compute = torch.promote_types(upstream.dtype, gradient.dtype)
        scaled = gradient.to(compute) * upstream[..., None].to(compute)
        # A masked-out row may meet an infinite upstream: its gradient stays exactly zero.
        return torch.where(gradient == 0, 0.0, scaled).to(ctx.dtype), None, None


def needs_gradient(receiver: Tensor) -> bool:
    """Whether a backward pass can reach ``receiver``: only then is its gradient computed."""
    return torch.is_grad_enabled() and receiver.requires_grad


def attach_gradient(receiver: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """Return ``value`` ``[...]`` whose backward gives ``gradient`` ``[..., V]`` × upstream to ``receiver``."""
    return _SavedGradient.apply(receiver, value, gradient)


def reduce_tokens(value: Tensor, counted: Tensor | None, reduction: str) -> Tensor:
    """Reduce per-token values: "none", "sum", "mean" (÷ counted tokens) or "batchmean" (÷ batch); nothing gives 0."""
    if reduction == "none":
        return value
    total = value.sum()
    if reduction == "mean":
        count = value.numel() if counted is None else counted.sum()
        return total / (max(count, 1) if isinstance(count, int) else count.clamp(min=1))
    return total / max(value.shape[0], 1) if reduction == "batchmean" else total
