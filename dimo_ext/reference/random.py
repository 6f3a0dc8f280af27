"""Keys folded and words drawn."""

from __future__ import annotations

import torch
from torch import Tensor

from ..philox import WORD, Tag, philox, random_words


def fold_in(key: Tensor, n: int, n_tensor: Tensor | None) -> Tensor:
    """Words of the block whose row is n: seed and offset of a new key."""
    if n_tensor is None:
        n_tensor = torch.full((), n, dtype=torch.int64, device=key.device)
    row = (n_tensor.to(torch.int64) & WORD).expand(torch.broadcast_shapes(n_tensor.shape, key.shape[:-1]))
    words = torch.stack(philox(torch.full_like(row, int(Tag.FOLD_IN) << 24), row, key[..., 1], key[..., 0]), -1)
    return words[..., 0::2] | (words[..., 1::2] << 32)


def uniform_words(key: Tensor, count: int) -> Tensor:
    """Words of row 0."""
    return random_words(key, 1, 1, count, Tag.UNIFORM)[0].contiguous()
