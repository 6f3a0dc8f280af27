"""Variance-preserving noise on token embeddings."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..philox import Tag, random_words, uniform
from ._logits import compute_dtype


def perturb_embeddings(embeddings: Tensor, key: Tensor, sigma: float, scale: Tensor) -> Tensor:
    """σ·scale·ε + sqrt(1-σ²)·e with ε standard normal (Box-Muller on pairs of words)."""
    batch, width = (embeddings.shape[0] if embeddings.dim() > 1 else 1), embeddings.shape[-1]
    rows = embeddings.numel() // max(width * batch, 1)
    pairs = (width + 1) // 2
    u = uniform(random_words(key, batch, rows, 2 * pairs, Tag.PERTURB_EMBEDDINGS)).view(batch * rows, pairs, 2)
    radius, angle = torch.sqrt(-2.0 * torch.log(u[..., 0])), 2.0 * math.pi * u[..., 1]
    noise = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), -1).flatten(1)[:, :width]
    compute = compute_dtype(embeddings)
    noise = noise.reshape(embeddings.shape).to(compute) * (sigma * scale.to(compute))
    return (noise + math.sqrt(1.0 - sigma**2) * embeddings.to(compute)).to(embeddings.dtype)


def embed_and_perturb(table: Tensor, tokens: Tensor, key: Tensor, sigma: float, scale: Tensor) -> Tensor:
    """perturb_embeddings of the table's rows."""
    return perturb_embeddings(table[tokens.clamp(0, table.shape[0] - 1)], key, sigma, scale)
