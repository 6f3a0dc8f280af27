"""Forward masking, and tokens that a student starts from."""

from __future__ import annotations

import torch
from torch import Tensor

from ..philox import Tag, random_words
from ..schedules import mask_ratio


def mask_tokens(
    tokens: Tensor, key: Tensor, ratio: float, ratio_per_sample: Tensor | None, mask_id: int, bernoulli: bool,
    min_masked: int, schedule: str = "linear",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mask the k positions with the smallest words; "exact" fixes k, "bernoulli" counts words below the ratio.

    The schedule is evaluated in float64, so that rounding it to float32 gives the same number everywhere.
    """
    batch, length = tokens.shape
    words = random_words(key, batch, 1, length, Tag.MASK_TOKENS)
    if ratio_per_sample is None:
        ratio_per_sample = torch.full((batch,), ratio, dtype=torch.float32, device=tokens.device)
    if schedule != "linear":
        ratio_per_sample = mask_ratio(schedule, _clamped(ratio_per_sample.double())).to(torch.float32)
    if bernoulli:
        count = happens(words, ratio_per_sample).sum(1)
    else:
        count = torch.round(_clamped(ratio_per_sample) * length).long()
    mask = _smallest(words, count.clamp(min(min_masked, length), length))
    return tokens.contiguous().masked_fill(mask, mask_id), mask


def init_tokens(key: Tensor, batch_size: int, seq_len: int, vocab_size: int, mask_id: int, r_init: float) -> Tensor:
    """Uniform random ids with exactly round(r_init·L) positions replaced by the mask id."""
    ids = (random_words(key, batch_size, 1, seq_len, Tag.INIT_IDS) * vocab_size) >> 32
    words = random_words(key, batch_size, 1, seq_len, Tag.INIT_MASK)
    count = torch.full((batch_size,), _round_count(r_init, seq_len), device=key.device)
    return ids.masked_fill(_smallest(words, count), mask_id)


def _clamped(ratio: Tensor) -> Tensor:
    return ratio.nan_to_num(0.0).clamp(0.0, 1.0)


def happens(words: Tensor, probability: Tensor) -> Tensor:
    """Which words ``[B, L]`` say yes to an event of each sample's probability."""
    return words < torch.ceil(_clamped(probability.double()) * 2.0**32 - 0.5).long()[:, None]


def _round_count(ratio: float, length: int) -> int:
    return int(torch.round(torch.tensor(ratio, dtype=torch.float32) * length))


def _smallest(words: Tensor, count: Tensor) -> Tensor:
    """Boolean mask of the ``count`` smallest words of each row; ties go to the lower index."""
    order = words.argsort(dim=1, stable=True)
    chosen = torch.arange(words.shape[1], device=words.device) < count[:, None]
    return torch.zeros_like(words, dtype=torch.bool).scatter_(1, order, chosen)
