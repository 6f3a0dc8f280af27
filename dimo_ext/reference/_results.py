"""What operators on logits return: values times their factor, gradients as the logits are stored."""

from __future__ import annotations

import torch
from torch import Tensor

from .._autograd import factor_in_forward


def weighted(value: Tensor, factor: Tensor | None, reduce: bool) -> Tensor:
    """Value × factor, summed if asked for; a factor of 0 wins over an infinite value."""
    if factor is not None:
        value = value.masked_fill(factor == 0, 0.0) * factor
    return value.sum() if reduce else value.contiguous()


def stored_gradient(
    receiver: Tensor, gradient: Tensor, factor: Tensor | None, counted: Tensor
) -> tuple[Tensor, Tensor]:
    """Return factor · gradient in the dtype and strides of ``receiver``, and which counted rows it cannot hold.

    Rows that are not counted, or cannot be held, are 0.
    """
    if factor is not None:
        counted = counted & (factor != 0)
    factor = factor_in_forward(receiver, factor)
    if factor is not None:
        gradient = gradient * factor[..., None]
    stored = torch.empty_like(receiver).copy_(gradient)
    usable = torch.isfinite(stored).all(-1)
    return stored.masked_fill_(~(counted & usable)[..., None], 0.0), counted & ~usable
