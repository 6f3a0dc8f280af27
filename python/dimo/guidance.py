"""Classifier-free guidance: one network call of 2B rows, mixed by the operators as uncond + s·(cond - uncond)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .teachers.base import Condition, Teacher, concat_conditions


class GuidedLogits(NamedTuple):
    """Conditional logits ``[B, L, V]`` and, when guidance is on, the unconditional ones (else None).

    Both go unmixed into :func:`dimo_ext.sample_categorical` or :func:`dimo_ext.distribution_matching_loss`, which hold
    the guidance formula.
    """

    cond: Tensor
    uncond: Tensor | None


def guided_logits(
    model: Teacher, tokens_BL: Tensor, condition: Condition, guidance_scale: float, **kwargs: Any
) -> GuidedLogits:
    """Evaluate ``model`` once, with the null condition beside the given one unless ``guidance_scale`` is 1.

    ``kwargs`` go to :meth:`Teacher.logits`; ``mask_ratio`` is repeated for the second half.
    """
    if guidance_scale == 1.0:
        return GuidedLogits(model.logits(tokens_BL, condition, **kwargs), None)
    batch = tokens_BL.shape[0]
    if kwargs.get("mask_ratio") is not None:
        kwargs["mask_ratio"] = kwargs["mask_ratio"].repeat(2)
    both = concat_conditions(condition, model.null_condition(batch))
    cond, uncond = model.logits(torch.cat([tokens_BL, tokens_BL]), both, **kwargs).split(batch)
    return GuidedLogits(cond, uncond)
