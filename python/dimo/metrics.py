"""Metrics of generated samples against real ones: distances, coverage, a two-sample test, a likelihood bound.

Most take plain feature matrices [N, D] (arrays or tensors, computed in float64 on the CPU) and hold for any data;
`dimo.evaluation` applies them to the embedded digits. Every number depends on its sample counts: compare values only
where these are equal, and report them with the numbers.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils import _pytree as pytree

import dimo_ext
from dimo_ext.random import random_uniform

from .files import import_extra
from .teachers.base import Condition, Teacher


class Interval(NamedTuple):
    """A mean and its 95 % confidence interval; `low` and `high` are None where there is one value alone.

    Formats as mean ± half the interval's width: `f"{interval:.3f}"`.
    """

    mean: float
    low: float | None
    high: float | None

    def __format__(self, spec: str) -> str:
        half_width = "" if self.low is None else f" ± {(self.high - self.low) / 2:{spec}}"
        return f"{self.mean:{spec}}{half_width}"


def mean_and_interval(values: ArrayLike) -> Interval:
    """Mean of a metric over seeds with its 95 % Student-t interval, mean ± t(0.975, n − 1)·s/√n.

    `values` [S] holds one value a seed. [T, S] holds T training runs, each measured with S sampling seeds: the interval
    is then that of the T runs' means, for sampling the same run again says nothing about another training.

    Raises ValueError for another shape, no values or values that are not finite.
    Source: Student, 1908.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim not in (1, 2) or not array.size or not np.isfinite(array).all():
        raise ValueError(f"values must be finite numbers of shape [S] or [T, S], none 0, not {values!r}")
    means = array.mean(axis=1) if array.ndim == 2 else array
    mean, n = float(means.mean()), len(means)
    if n == 1:
        return Interval(mean, None, None)
    half_width = import_extra("scipy.stats", "an interval").t.ppf(0.975, n - 1) * means.std(ddof=1) / np.sqrt(n)
    return Interval(mean, float(mean - half_width), float(mean + half_width))


def frechet_distance(features_a: ArrayLike, features_b: ArrayLike) -> float:
    """Squared Fréchet (2-Wasserstein) distance between Gaussians fitted to two feature sets [N, D] and [M, D].

    |μa − μb|² + tr Ca + tr Cb − 2 tr (Ca Cb)^½, covariances divided by N − 1. With C = RᵀR from the QR decomposition
    of the centred features, tr (Ca Cb)^½ is the sum of the singular values of Ra Rbᵀ: no covariance is formed and no
    matrix root taken, so rank-deficient sets (N ≤ D, constant features) stay exact. Grows as either count shrinks
    (bias ~ 1/N).

    Raises ValueError for fewer than two rows, widths that differ or values that are not finite.
    Source: Dowson and Landau, 1982; Heusel et al., 2017 (arXiv:1706.08500).
    """
    a, b = _matrices(features_a, features_b, "features_a", "features_b", min_rows=2)
    root_a, root_b = _covariance_root(a), _covariance_root(b)
    overlap = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    mean_term = np.square(a.mean(0) - b.mean(0)).sum()
    return float(max(mean_term + np.square(root_a).sum() + np.square(root_b).sum() - 2 * overlap, 0.0))


def precision_recall_density_coverage(real: ArrayLike, generated: ArrayLike, k: int = 5) -> dict[str, float]:
    """Precision, recall, density and coverage of `generated` [M, D] against `real` [N, D], by nearest neighbours.

    A point's ball is open and reaches to its k-th nearest neighbour within its own set, itself not counted.
    precision: share of generated points in some real ball. recall: share of real points in some generated ball.
    density: mean number of real balls around a generated point, ÷ k (may exceed 1). coverage: share of real balls that
    hold a generated point.

    The values depend on both counts, so both sets are used at equal size n = min(N, M): the larger one is shuffled
    (always the same way, as samples often come sorted by class) and cut into chunks of n, a shorter rest is dropped,
    and the values are averaged over the chunks.

    Raises ValueError for n ≤ k, widths that differ or values that are not finite.
    Source: Kynkäänniemi et al., 2019 (arXiv:1904.06991); Naeem et al., 2020 (arXiv:2002.09797).
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    real, generated = _matrices(real, generated, "real", "generated", min_rows=k + 1)
    size = min(len(real), len(generated))
    values = [_prdc(r, g, k) for r in _chunks(real, size) for g in _chunks(generated, size)]
    return {key: float(np.mean([value[key] for value in values])) for key in values[0]}


def two_sample_accuracy(
    real: ArrayLike,
    held_out_real: ArrayLike,
    generated: ArrayLike,
    *,
    folds: int = 5,
    gamma: float = 0.5,
    seed: int = 0,
) -> float:
    """Balanced accuracy of a classifier that tells real from generated points: 0.5 = cannot tell, 1 = always can.

    A support vector machine (RBF kernel exp(−gamma·|x − y|²), C = 10) per fold learns `real` [N, D] against all but
    one fold of `generated` [M, D], at equal counts, the larger cut. It is tested on the fold left out and on
    `held_out_real` [K, D], and the two hit rates are averaged. Copies of `real` score *below* 0.5: they look like the
    real side of the fit and the held-out images do not. `gamma` suits images in [0, 1] of some 64 pixels.

    Raises ValueError for fewer than `folds` generated rows, widths that differ or values that are not finite.
    Source: Lopez-Paz and Oquab, 2017 (arXiv:1610.06545).
    """
    svm, selection = import_extra("sklearn.svm", "a metric"), import_extra("sklearn.model_selection", "a metric")
    real, generated = _matrices(real, generated, "real", "generated", min_rows=folds)
    _, held_out_real = _matrices(real, held_out_real, "real", "held_out_real", min_rows=1)
    real, generated = shuffled(real, seed), shuffled(generated, seed + 1)

    def hit_rates(fold: tuple[np.ndarray, np.ndarray]) -> list[float]:
        fit, test = fold
        size = min(len(fit), len(real))
        inputs = np.concatenate([real[:size], generated[fit[:size]]])
        classifier = svm.SVC(C=10, gamma=gamma, random_state=seed).fit(inputs, np.repeat([1, 0], size))
        return [(classifier.predict(held_out_real) == 1).mean(), (classifier.predict(generated[test]) == 0).mean()]

    with ThreadPoolExecutor(min(folds, torch.get_num_threads())) as pool:  # scikit-learn fits without holding the GIL
        return float(np.mean(list(pool.map(hit_rates, selection.KFold(folds).split(generated)))))


def within_class_diversity(features: ArrayLike, labels: ArrayLike, num_classes: int) -> np.ndarray:
    """Mean Euclidean distance between two points of a class, [num_classes]; NaN for a class of fewer than two.

    `features` [N, D], `labels` int [N]. Divide by the values of real data: below 1 a class lost variety, above 1 it is
    noisier than real.
    """
    features, labels = _matrix(features, "features"), label_array(labels, "labels", len(features), num_classes)
    return np.array([_mean_pairwise(features[labels == c]) for c in range(num_classes)])


def within_class_entropy(tokens: ArrayLike, labels: ArrayLike, vocab_size: int, num_classes: int) -> np.ndarray:
    """Entropy in nats of a token given its position and class, averaged over positions, [num_classes]; NaN if absent.

    That of the empirical distribution of `tokens` int [N, L] in 0..vocab_size − 1 over the samples of a class, `labels`
    int [N]: log vocab_size at most, 0 where all samples agree. It falls by about (vocab_size − 1)/(2n) for n samples of
    a class, so compare equal counts, and it does not see how positions depend on each other.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not tokens.shape[1] or tokens.dtype.kind not in "iu":
        raise ValueError(f"tokens must be integers of shape [N, L], L ≥ 1, not {tokens.dtype} {list(tokens.shape)}")
    if tokens.size and (tokens.min() < 0 or tokens.max() >= vocab_size):
        raise ValueError(f"tokens must lie in 0..{vocab_size - 1}, not {tokens.min()}..{tokens.max()}")
    labels = label_array(labels, "labels", len(tokens), num_classes)
    return np.array([_mean_entropy(tokens[labels == c], vocab_size) for c in range(num_classes)])


def nearest_distances(generated: ArrayLike, reference: ArrayLike) -> np.ndarray:
    """Euclidean distance from each row of `generated` [M, D] to the nearest row of `reference` [N, D], [M].

    Against the training set it is 0 for copies; real images that were not trained on give the values to expect.
    """
    generated, reference = _matrices(generated, reference, "generated", "reference", min_rows=1)
    return _pairwise(generated, reference).min(axis=1)


def class_accuracy(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Share of samples whose `predicted` class int [N] is the class that was asked for, `labels` int [N]."""
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    if predicted.shape != labels.shape or predicted.ndim != 1 or not len(labels):
        raise ValueError(f"predicted {predicted.shape} and labels {labels.shape} must have one equal shape [N], N ≥ 1")
    return float((predicted == labels).mean())


@torch.no_grad()
def negative_log_likelihood_bound(
    teacher: Teacher, tokens_BL: Tensor, condition: Condition, *, key: Tensor, repeats: int = 1, batch_size: int = 64
) -> Tensor:
    """Bound on −log p(x | condition) ÷ L under a masked diffusion model, nats a token, one estimate a sample.

    −log p(x) ≤ E_k (L/k) Σ_{i masked} −log p(x_i | tokens left), k uniform on 1..L, exactly k positions masked: the
    mean over all orders in which tokens can be revealed one by one. It is the likelihood itself where the model's
    conditionals are those of one distribution. Each estimate is unbiased. The k of all samples and repeats lie in equal
    steps from one random start, so that their mean is less noisy than with independent draws.

    Args:
        teacher: the model, used without guidance.
        tokens_BL: int64 `[B, L]` without [MASK].
        condition: a pytree with leading batch dimension B.
        key: int64 `[2]`.
        repeats: draws of k and of the mask a sample, each one network evaluation; their mean is returned.
        batch_size: samples in one call of the network; changes nothing but rounding.

    Returns:
        float64 `[B]`.

    Source: Uria et al., 2014 (arXiv:1310.1757); Hoogeboom et al., 2022 (arXiv:2110.02037); the equal steps: Kingma et
    al., 2021 (arXiv:2107.00630).
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, not {repeats}")
    batch, length = tokens_BL.shape
    start = random_uniform(dimo_ext.fold_in(key, 0), 1).double()
    total = torch.zeros(batch, dtype=torch.float64, device=tokens_BL.device)
    for repeat in range(repeats):
        part = (repeat + torch.arange(batch, device=tokens_BL.device).double() / batch) / repeats
        ratio = (((start + part) % 1.0 * length).long() + 1) / length  # k/L
        masked = dimo_ext.mask_tokens(tokens_BL, ratio, teacher.mask_id, key=dimo_ext.fold_in(key, 1 + repeat))
        for rows in torch.arange(batch, device=tokens_BL.device).split(batch_size):
            part_of_condition = pytree.tree_map(lambda leaf, rows=rows: leaf[rows], condition)
            logits = teacher.logits(masked.tokens[rows], part_of_condition, mask_ratio=ratio[rows])
            log_probs = logits.double().log_softmax(-1).gather(-1, tokens_BL[rows][..., None])[..., 0]
            total[rows] -= log_probs.where(masked.mask[rows], 0.0).sum(-1) / masked.mask[rows].sum(-1)
    return total / repeats


def _matrix(values: ArrayLike, name: str, min_rows: int = 0) -> np.ndarray:
    """`values` as float64 [N, D]; ValueError naming the argument for another shape, too few rows or NaN."""
    matrix = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[1] == 0:
        raise ValueError(f"{name} must have shape [N, D], D ≥ 1, not {list(matrix.shape)}")
    if len(matrix) < min_rows:
        raise ValueError(f"{name} must have at least {min_rows} rows, not {len(matrix)}")
    if not np.isfinite(matrix).all():
        raise ValueError(f"{name} holds values that are not finite")
    return matrix


def _matrices(a: ArrayLike, b: ArrayLike, name_a: str, name_b: str, min_rows: int) -> tuple[np.ndarray, np.ndarray]:
    a, b = _matrix(a, name_a, min_rows), _matrix(b, name_b, min_rows)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"{name_a} and {name_b} differ in width: {a.shape[1]} and {b.shape[1]}")
    return a, b


def label_array(labels: ArrayLike, name: str, size: int, num_classes: int) -> np.ndarray:
    """`labels` as an integer array [size]; ValueError naming the argument for another shape, type or class."""
    array = np.asarray(labels.detach().cpu() if isinstance(labels, Tensor) else labels)
    if array.shape != (size,) or array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers of shape [{size}], not {array.dtype} {list(array.shape)}")
    if size and (array.min() < 0 or array.max() >= num_classes):
        raise ValueError(f"{name} must lie in 0..{num_classes - 1}, not {array.min()}..{array.max()}")
    return array


def _covariance_root(rows: np.ndarray) -> np.ndarray:
    """R [min(N, D), D] with RᵀR the unbiased covariance of `rows` [N, D]."""
    return np.linalg.qr(rows - rows.mean(axis=0), mode="r") / np.sqrt(len(rows) - 1)


def _pairwise(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean distances [N, M] by differences: exactly 0 between equal points, as a matrix product would not be."""
    mode = "donot_use_mm_for_euclid_dist"
    return torch.cdist(torch.from_numpy(a), torch.from_numpy(b), compute_mode=mode).numpy()


def _mean_pairwise(rows: np.ndarray) -> float:
    n = len(rows)
    return float(_pairwise(rows, rows).sum() / (n * (n - 1))) if n > 1 else float("nan")


def _mean_entropy(tokens: np.ndarray, vocab_size: int) -> float:
    if not len(tokens):
        return float("nan")
    frequencies = np.stack([np.bincount(column, minlength=vocab_size) for column in tokens.T]) / len(tokens)
    logarithms = np.log(frequencies, out=np.zeros_like(frequencies), where=frequencies > 0)
    return float(-(frequencies * logarithms).sum(axis=1).mean())


def shuffled(rows: np.ndarray, seed: int = 0) -> np.ndarray:
    """The rows in a random order that `seed` fixes."""
    return rows[np.random.RandomState(seed).permutation(len(rows))]


def _chunks(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """All full chunks of `size` rows, in a fixed shuffled order."""
    rows = shuffled(rows)
    return [rows[start : start + size] for start in range(0, len(rows) - size + 1, size)]


def _prdc(real: np.ndarray, generated: np.ndarray, k: int) -> dict[str, float]:
    between = _pairwise(real, generated)
    real_radius = np.sort(_pairwise(real, real), axis=1)[:, k, None]  # column 0 is the point itself
    generated_radius = np.sort(_pairwise(generated, generated), axis=1)[None, :, k]
    in_real = between < real_radius
    return {
        "precision": in_real.any(axis=0).mean(),
        "recall": (between < generated_radius).any(axis=1).mean(),
        "density": in_real.sum(axis=0).mean() / k,
        "coverage": in_real.any(axis=1).mean(),
    }
