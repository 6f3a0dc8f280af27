"""Mask schedules r(u): the share of masked tokens at time u, rising from r(0) = 0 to r(1) = 1.

Papers that write the falling form use u → 1 - u; for uniform u, "cosine" and "arccos" are then the same distribution.
"square" is u² here (Halton-MaskGIT's square is 1 - u²).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

_MAGE_MEAN, _MAGE_STD, _MAGE_LOW, _MAGE_HIGH = 0.55, 0.25, 0.5, 1.0


def _mage(u: Tensor) -> Tensor:
    """Inverse distribution function of normal(0.55, 0.25) truncated to [0.5, 1] (MAGE, arXiv 2211.09117)."""
    low, high = (0.5 * math.erfc((_MAGE_MEAN - x) / (_MAGE_STD * math.sqrt(2))) for x in (_MAGE_LOW, _MAGE_HIGH))
    return _MAGE_MEAN + _MAGE_STD * torch.special.ndtri(low + u * (high - low))


_SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda u: u,
    "square": torch.square,
    "cosine": lambda u: torch.cos(0.5 * math.pi * (1.0 - u)),
    "arccos": lambda u: 2.0 * torch.acos(1.0 - u) / math.pi,
    "mage": _mage,
}

MASK_SCHEDULES = tuple(_SCHEDULES)
TRAINING_ONLY = ("mage",)


def mask_ratio(schedule: str, u: Tensor) -> Tensor:
    """Return r(u) in [0, 1], same shape as ``u``.

    Args:
        schedule: "linear" u, "square" u², "cosine" cos(π(1-u)/2), "arccos" 2·arccos(1-u)/π, or "mage" (training only).
        u: floating-point times in [0, 1]; uniform draws in training, falling from 1 to 0 in a sampler.

    Raises:
        ValueError: unknown schedule; the valid names are listed.
    """
    if schedule not in _SCHEDULES:
        raise ValueError(f"mask_schedule: expected one of {', '.join(MASK_SCHEDULES)}, got {schedule!r}")
    return _SCHEDULES[schedule](u).clamp(0.0, 1.0)


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


def halton_order(grid_size: int) -> Tensor:
    """Order int64 ``[grid_size²]`` in which Halton-MaskGIT reveals the cells of a square grid, row by row numbered.

    Cell k is the first that the points of a Halton sequence (base 2: row, base 3: column) have not met before.
    Source: arXiv 2503.17076.
    """
    cells: dict[int, None] = {}
    points = itertools.count(1)
    while len(cells) < grid_size**2:
        index = next(points)
        (row, rows), (column, columns) = _radical_inverse(index, 2), _radical_inverse(index, 3)
        cells.setdefault(row * grid_size // rows * grid_size + column * grid_size // columns)
    return torch.tensor(list(cells))


def _radical_inverse(index: int, base: int) -> tuple[int, int]:
    """Mirror the digits of ``index`` at the point: a fraction in [0, 1) as numerator and denominator."""
    numerator, denominator = 0, 1
    while index:
        index, digit = divmod(index, base)
        numerator, denominator = numerator * base + digit, denominator * base
    return numerator, denominator
