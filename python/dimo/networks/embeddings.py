"""Embeddings of numbers that several networks share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SINUSOID = 256  # channels


def sinusoid(values: Tensor) -> Tensor:
    """Return cos and sin of ``values`` ``[N]`` at 128 frequencies falling from 1 to almost 1e-4, float32 ``[N, 256]``.

    Source: the timestep embedding of diffusion transformers, cosines first (arXiv 2212.09748).
    """
    half = SINUSOID // 2
    frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half, dtype=torch.float32, device=values.device))
    angles = values.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)
