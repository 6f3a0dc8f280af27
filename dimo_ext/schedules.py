"""Mask schedules r(u): the share of masked tokens at time u, rising from r(0) = 0 to r(1) = 1.

Papers that write the falling form use u → 1 - u; for uniform u, "cosine" and "arccos" are then the same distribution.
"square" is u² here (Halton-MaskGIT's square is 1 - u²).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ._checks import check_choice

_MAGE_MEAN, _MAGE_STD, _MAGE_LOW, _MAGE_HIGH = 0.55, 0.25, 0.5, 1.0


def _mage(u: Tensor) -> Tensor:
    """Inverse distribution function of normal(0.55, 0.25) truncated to [0.5, 1] (MAGE, arXiv 2211.09117)."""
    low, high = (0.5 * math.erfc((_MAGE_MEAN - x) / (_MAGE_STD * math.sqrt(2))) for x in (_MAGE_LOW, _MAGE_HIGH))
    return _MAGE_MEAN + _MAGE_STD * torch.special.ndtri(low + u * (high - low))


# In the order of MaskSchedule in csrc/common/masking.h.
_SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda u: u,
    "square": torch.square,
    "cosine": lambda u: torch.cos(0.5 * math.pi * (1.0 - u)),
    "arccos": lambda u: 2.0 * torch.acos(1.0 - u) / math.pi,
    "mage": _mage,
}

MASK_SCHEDULES = tuple(_SCHEDULES)


def mask_ratio(schedule: str, u: Tensor) -> Tensor:
    """Return r(u) in [0, 1], same shape as ``u``.

    Args:
        schedule: "linear" u, "square" u², "cosine" cos(π(1-u)/2), "arccos" 2·arccos(1-u)/π, or "mage" (training only).
        u: floating-point times in [0, 1]; uniform draws in training, falling from 1 to 0 in a sampler.

    Raises:
        ValueError: unknown schedule; the valid names are listed.
    """
    return _SCHEDULES[check_choice(schedule, "mask_schedule", MASK_SCHEDULES)](u).clamp(0.0, 1.0)
