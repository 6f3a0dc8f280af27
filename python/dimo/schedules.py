"""Mask schedules of samplers; :mod:`dimo_ext.schedules` defines r(u)."""

from __future__ import annotations

import itertools

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
