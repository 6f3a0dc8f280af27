"""Philox4x32-10 in plain PyTorch: the words that every draw is made of.

Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, SC 2011. The seed is the Philox key, the counter words are
``[block | tag << 24, row, offset low, offset high]``. Reference, CPU and CUDA share this convention.
"""

from __future__ import annotations

import enum

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
_ROUND_KEYS = (0x9E3779B9, 0xBB67AE85)
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)


class Tag(enum.IntEnum):
    """Keeps operators that share a key independent: it fills the top byte of the first counter word."""

    MASK_TOKENS = 1
    INIT_MASK = 2
    INIT_IDS = 3
    SAMPLE_CATEGORICAL = 4
    PERTURB_EMBEDDINGS = 5
    REVEAL = 6
    UNIFORM = 7
    FOLD_IN = 255


def random_words(key: Tensor, batch_size: int, rows: int, count: int, tag: Tag) -> Tensor:
    """Draw 32-bit words, int64 ``[batch_size * rows, count]`` in [0, 2^32).

    Word i of a row is word i % 4 of Philox block i // 4. The row is the position in the flattened batch for a ``[2]``
    key, the position within the sample for a ``[B, 2]`` key.
    """
    blocks = -(-count // 4)
    row = torch.arange(batch_size * rows, device=key.device)
    if key.dim() == 2:
        key, row = key.repeat_interleave(rows, 0)[:, None, :], row % max(rows, 1)
    block = torch.arange(blocks, device=key.device) | (int(tag) << 24)
    block, row = torch.broadcast_tensors(block, row[:, None])
    words = torch.stack(philox(block, row, key[..., 1], key[..., 0]), -1)
    return words.reshape(batch_size * rows, blocks * 4)[:, :count]


def uniform(words: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Map 32-bit words to (x + 1/2) / 2^32 in the open interval (0, 1); the largest value stays below 1."""
    below_one = 1.0 - torch.finfo(dtype).eps / 2
    return ((words.to(torch.float64) + 0.5) * 2.0**-32).to(dtype).clamp_(max=below_one)


def philox(block: Tensor, row: Tensor, offset: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 on int64 tensors that hold 32-bit words; ``offset`` and ``seed`` hold 64 bits."""
    c0, c1, c2, c3 = block, row, offset & WORD, (offset >> 32) & WORD
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(10):
        # The product of two 32-bit words wraps in int64; its bits are right, so are its halves.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((product1 >> 32) & WORD) ^ c1 ^ k0, product1 & WORD
        c2, c3 = ((product0 >> 32) & WORD) ^ c3 ^ k1, product0 & WORD
        k0, k1 = (k0 + _ROUND_KEYS[0]) & WORD, (k1 + _ROUND_KEYS[1]) & WORD
    return c0, c1, c2, c3
