"""Masked-token training of a teacher: the loss alone."""

from __future__ import annotations

import torch
from torch import Tensor

import dimo_ext
from dimo_ext.random import random_uniform

from .config import PretrainConfig
from .phases import phase
from .schedules import mask_ratio
from .teachers.base import Condition, Teacher


def masked_token_loss(
    model: Teacher, tokens_BL: Tensor, condition: Condition, schedule: str, key: Tensor, label_smoothing: float = 0.0,
    *, name: str = "model",
) -> Tensor:  # fmt: skip
    """Mask tokens at a ratio drawn from ``schedule`` and return the cross-entropy at the masked positions (scalar).

    ``name`` is the model's in the phases of a step.
    """
    with phase("masking"):
        ratio = mask_ratio(schedule, random_uniform(dimo_ext.fold_in(key, 0), tokens_BL.shape[0]))
        masked = dimo_ext.mask_tokens(tokens_BL, ratio, model.mask_id, key=dimo_ext.fold_in(key, 1))
    with phase(f"{name} forward"):
        logits = model.logits(masked.tokens, condition, mask_ratio=ratio)
    with phase("loss"):
        return dimo_ext.masked_cross_entropy(logits, tokens_BL, masked.mask, label_smoothing=label_smoothing)


def pretrain_loss(model: Teacher, tokens_BL: Tensor, labels: Tensor, config: PretrainConfig, key: Tensor) -> Tensor:
    """Masked-token loss with a share of the conditions replaced by the null condition."""
    dropped = random_uniform(dimo_ext.fold_in(key, 2), labels.shape[0]) < config.condition_dropout
    condition = torch.where(dropped, model.null_condition(labels.shape[0]), labels)
    return masked_token_loss(model, tokens_BL, condition, config.mask_schedule, key, config.label_smoothing)


@torch.no_grad()
def held_out_loss(model: Teacher, tokens_BL: Tensor, condition: Condition, schedule: str, repeats: int = 4) -> float:
    """Masked cross-entropy (nats a masked token) on held-out samples, each masked ``repeats`` times at fixed keys."""
    training = model.training
    model.eval()
    losses = [
        masked_token_loss(model, tokens_BL, condition, schedule, dimo_ext.random_key(n, device=tokens_BL.device))
        for n in range(repeats)
    ]
    model.train(training)
    return torch.stack(losses).mean().item()
