"""Mask schedules of samplers; :mod:`dimo_ext.schedules` defines r(u)."""

from __future__ import annotations

import torch
from torch import Tensor

from dimo_ext.schedules import MASK_SCHEDULES, mask_ratio

__all__ = ["MASK_SCHEDULES", "TRAINING_ONLY", "mask_ratio", "sampling_ratios"]

TRAINING_ONLY = ("mage",)


def sampling_ratios(schedule: str, steps: int) -> Tensor:
    """Mask ratios of a sampler, float64 ``[steps + 1]``: from r(1) = 1 down to r(0) = 0.

    Raises:
        ValueError: unknown or training-only schedule, or fewer than one step.
    """
    if schedule in TRAINING_ONLY:
        raise ValueError(f"mask_schedule: {schedule!r} is for training only, samplers need one that ends at 0")
    if steps < 1:
        raise ValueError(f"steps: expected an integer >= 1, got {steps}")
    return mask_ratio(schedule, torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64))
