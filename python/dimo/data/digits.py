"""The embedded data set: 1797 handwritten digits of 8x8 pixels and 17 grey levels, one token a pixel.

The images are the "Optical Recognition of Handwritten Digits" test set of the UCI repository (E. Alpaydin and C.
Kaynak, 1998, CC BY 4.0) that scikit-learn ships inside its package, so nothing is downloaded. Real data, small enough
to train a teacher on a laptop, and hard enough that independent pixels are recognisably wrong.

The images come from a few writers, who appear in every split: the test split measures new images, not new writers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..files import import_extra

VOCAB_SIZE = 17
SEQ_LEN = 64
NUM_CLASSES = 10
GRID_SIZE = 8

SPLITS = ("train", "validation", "test")
TEST_SIZE = 359
VALIDATION_SIZE = 180


@dataclass(frozen=True)
class DigitsSplit:
    """`tokens` int64 [N, 64] in 0..16 (row by row from the top left, 0 = blank) and `labels` int64 [N] in 0..9."""

    tokens: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def checksum(self) -> str:
        """SHA-256 of tokens and labels as bytes: equal for equal splits, whatever the library versions."""
        data = torch.cat([self.tokens, self.labels[:, None]], dim=1).to(torch.uint8)
        return hashlib.sha256(data.cpu().numpy().tobytes()).hexdigest()


def load_digits_split(name: str) -> DigitsSplit:
    """The split "train" (1258 images), "validation" (180) or "test" (359): always the same images in the same order.

    Stratified by class, see `split_indices`. Raises ValueError for another name, ImportError without scikit-learn.
    """
    if name not in SPLITS:
        raise ValueError(f"unknown split {name!r}; the splits are {', '.join(SPLITS)}")
    pixels, labels = _load_arrays()
    index = split_indices(labels)[name]
    return DigitsSplit(torch.from_numpy(pixels[index]), torch.from_numpy(labels[index]))


def split_indices(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Row numbers of each split, ascending, for `labels` int [N].

    The rule is spelled out here so that no library release can change it. Test and validation sizes are divided over
    the classes in proportion to their frequency, by largest remainder. Then, class after class, the class's rows are
    shuffled by one `numpy.random.RandomState(0)`, whose stream numpy keeps frozen (NEP 19): the first go to test, the
    next to validation, the others to train.
    """
    counts = np.bincount(labels)
    test, validation = _apportion(TEST_SIZE, counts), _apportion(VALIDATION_SIZE, counts)
    rng = np.random.RandomState(0)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
    for c in range(len(counts)):
        rows = rng.permutation(np.flatnonzero(labels == c))
        cuts = np.split(rows, [test[c], test[c] + validation[c]])
        for name, part in zip(("test", "validation", "train"), cuts, strict=True):
            parts[name].append(part)
    return {name: np.sort(np.concatenate(rows)) for name, rows in parts.items()}


def decode(tokens: Tensor) -> Tensor:
    """Tokens int [B, 64] in 0..16 → images float32 [B, 1, 8, 8] in [0, 1], 1 = ink.

    Raises ValueError for another shape or for tokens outside the vocabulary (a [MASK] that was never filled in).
    """
    check_tokens(tokens, "tokens")
    return tokens.reshape(-1, 1, GRID_SIZE, GRID_SIZE).float() / (VOCAB_SIZE - 1)


def check_tokens(tokens: Tensor, name: str) -> None:
    """Raise ValueError naming the argument `name` unless `tokens` is an integer tensor [N, 64] in 0..16."""
    if tokens.ndim != 2 or tokens.shape[1] != SEQ_LEN or tokens.is_floating_point():
        raise ValueError(f"{name} must be integers of shape [N, {SEQ_LEN}], not {tokens.dtype} {list(tokens.shape)}")
    if len(tokens) and (int(tokens.min()) < 0 or int(tokens.max()) >= VOCAB_SIZE):
        raise ValueError(f"{name} must lie in 0..{VOCAB_SIZE - 1}, not {int(tokens.min())}..{int(tokens.max())}")


def _apportion(total: int, counts: np.ndarray) -> np.ndarray:
    """Integers that sum to `total`, in proportion to `counts`, by largest remainder (ties: the lower class first)."""
    quota, remainder = np.divmod(total * counts, counts.sum())  # integers: no rounding to depend on
    order = np.argsort(-remainder, kind="stable")
    quota[order[: total - quota.sum()]] += 1
    return quota


def _load_arrays() -> tuple[np.ndarray, np.ndarray]:
    """All 1797 images int64 [1797, 64] and labels int64 [1797], in the order of the published file."""
    pixels, labels = import_extra("sklearn.datasets", "the digits").load_digits(return_X_y=True)
    return pixels.astype(np.int64), labels.astype(np.int64)
