"""Parallel decoding: a draw, and which positions take it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..philox import Tag, random_words, uniform
from .masking import happens
from .sampling import sample_categorical


def reveal_ancestral(
    logits: Tensor, tokens: Tensor, key: Tensor, probability: float, probability_per_sample: Tensor | None,
    mask_id: int, *draw,
) -> Tensor:  # fmt: skip
    """Draw an id for each masked position with this probability; ``draw`` are what else sample_categorical takes."""
    drawn, _ = sample_categorical(logits, key, *draw)
    batch, length = tokens.shape[0], tokens[:1].numel()
    if probability_per_sample is None:
        probability_per_sample = torch.full((batch,), probability, dtype=torch.float64, device=tokens.device)
    chosen = happens(random_words(key, batch, 1, length, Tag.REVEAL), probability_per_sample).view(tokens.shape)
    return torch.where(chosen & (tokens == mask_id), drawn, tokens)


def reveal_confident(
    logits: Tensor, tokens: Tensor, key: Tensor, count: int, count_per_sample: Tensor | None, noise_scale: float,
    mask_id: int, *draw,
) -> Tensor:  # fmt: skip
    """Draw an id for each masked position; the ``count`` most confident ones of a sample appear."""
    drawn, log_prob = sample_categorical(logits, key, *draw)
    batch, masked = tokens.shape[0], (tokens == mask_id).flatten(1)
    noise = -torch.log(-torch.log(uniform(random_words(key, batch, 1, masked.shape[1], Tag.REVEAL))))
    confidence = log_prob.flatten(1) + noise_scale * noise
    order = confidence.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, masked.gather(1, order).logical_not().to(torch.uint8).argsort(dim=1, stable=True))
    if count_per_sample is None:
        count_per_sample = torch.full((batch,), count, device=tokens.device)
    chosen = torch.arange(masked.shape[1], device=tokens.device) < count_per_sample[:, None]
    revealed = masked & torch.zeros_like(masked).scatter_(1, order, chosen)
    return torch.where(revealed.view(tokens.shape), drawn, tokens)
