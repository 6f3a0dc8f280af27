"""What operators make of logits first: their precision, guidance, temperature."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def guided(cond: Tensor, uncond: Tensor | None, scale: float, scale_per_sample: Tensor | None) -> Tensor:
    """Mix uncond + s·(cond - uncond); -inf on either side gives -inf, s = 1 ignores the unconditional side."""
    z = cond.to(compute_dtype(cond))
    if uncond is None or (scale_per_sample is None and scale == 1.0):
        return z
    u = uncond.to(z.dtype)
    s = scale if scale_per_sample is None else scale_per_sample.to(z.dtype).view(-1, *[1] * (z.dim() - 1))
    filtered = (z == -math.inf) | (u == -math.inf)
    mixed = torch.where(filtered, -math.inf, u + s * (z - u))
    return mixed if scale_per_sample is None else torch.where(s == 1.0, z, mixed)


def tempered(z: Tensor, temperature: float) -> Tensor:
    """(z - max z) / temperature; a row without a finite logit stays -inf."""
    top = z.amax(-1, keepdim=True)
    return (z - torch.where(top == -math.inf, 0.0, top)) / temperature
