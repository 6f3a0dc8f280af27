"""Cross-entropy of the masked tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._autograd import token_factor
from ._logits import compute_dtype
from ._results import stored_gradient, weighted


def masked_cross_entropy(
    logits: Tensor, targets: Tensor, mask: Tensor | None, label_smoothing: float, valid_vocab: int | None,
    reduction: str, need_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Cross-entropy of each token, or their reduced value; what multiplied it; its gradient (see _autograd.py)."""
    vocab = logits.shape[-1] if valid_vocab is None else valid_vocab
    z = logits[..., :vocab].to(compute_dtype(logits))
    counted = (targets >= 0) & (targets < vocab)
    counted = counted if mask is None else counted & mask
    factor = token_factor(logits, counted, None, reduction, z.dtype)
    factor = torch.ones((), dtype=z.dtype, device=z.device) if factor is None else factor
    counted = counted & (z.amax(-1) != -math.inf)
    log_probs = torch.log_softmax(z, -1)
    index = targets.clamp(0, vocab - 1)[..., None]
    value = -(1.0 - label_smoothing) * log_probs.gather(-1, index)[..., 0]
    if label_smoothing > 0.0:
        value = value - label_smoothing * log_probs.mean(-1)
    value = weighted(torch.where(counted, value, 0.0), factor, reduction != "none")
    if not need_gradient:
        return value, factor, logits.new_empty(0)
    gradient = log_probs.exp() - label_smoothing / vocab
    gradient.scatter_add_(-1, index, torch.full_like(gradient[..., :1], label_smoothing - 1.0))
    gradient = torch.nn.functional.pad(gradient, (0, logits.shape[-1] - vocab))
    stored, _ = stored_gradient(logits, gradient, factor, counted)
    return value, factor, stored
