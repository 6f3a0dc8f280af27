"""Metrics of generated samples against real ones: distances, coverage, a two-sample test. Nothing is generated here.

The functions at the top take plain feature matrices [N, D] (arrays or tensors, computed in float64 on the CPU) and
hold for any data. `DigitsEvaluator` applies them to the embedded digits.

Every number depends on its sample counts. Compare rows only where these are equal, and report them with the numbers.
The project's tables use the recipe of `DigitsEvaluator`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor, nn

from .data.digits import NUM_CLASSES, VOCAB_SIZE, DigitsSplit, check_tokens, decode, load_digits_split
from .files import import_extra


@dataclass(frozen=True)
class Metric:
    """How a table shows a metric: its column title and which direction is better (`ideal` only with "ideal")."""

    title: str
    better: Literal["higher", "lower", "ideal"]
    ideal: str = ""

    @property
    def header(self) -> str:
        """The title with an arrow: ↑ higher is better, ↓ lower is better, or → and the ideal value."""
        return f"{self.title} " + {"higher": "↑", "lower": "↓", "ideal": f"→ {self.ideal}"}[self.better]


METRICS: dict[str, Metric] = {
    "class_accuracy": Metric("accuracy", "higher"),
    "frechet_feature": Metric("Fréchet (features)", "lower"),
    "frechet_pixel": Metric("Fréchet (pixels)", "lower"),
    "precision": Metric("precision", "higher"),
    "recall": Metric("recall", "higher"),
    "density": Metric("density", "ideal", "1"),
    "coverage": Metric("coverage", "higher"),
    "two_sample_accuracy": Metric("two-sample", "ideal", "0.5"),
    "diversity": Metric("diversity", "ideal", "1"),
    "nearest_train": Metric("nearest train", "ideal", "real"),
}
"""The keys that `DigitsEvaluator` returns, in the order of the table's columns."""


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
    real, generated = _shuffled(real, seed), _shuffled(generated, seed + 1)
    hits = []
    for fit, test in selection.KFold(folds).split(generated):
        size = min(len(fit), len(real))
        inputs = np.concatenate([real[:size], generated[fit[:size]]])
        classifier = svm.SVC(C=10, gamma=gamma, random_state=seed).fit(inputs, np.repeat([1, 0], size))
        hits += [(classifier.predict(held_out_real) == 1).mean(), (classifier.predict(generated[test]) == 0).mean()]
    return float(np.mean(hits))


def within_class_diversity(features: ArrayLike, labels: ArrayLike, num_classes: int) -> np.ndarray:
    """Mean Euclidean distance between two points of a class, [num_classes]; NaN for a class of fewer than two.

    `features` [N, D], `labels` int [N]. Divide by the values of real data: below 1 a class lost variety, above 1 it is
    noisier than real.
    """
    features, labels = _matrix(features, "features"), _label_array(labels, "labels", len(features), num_classes)
    return np.array([_mean_pairwise(features[labels == c]) for c in range(num_classes)])


def nearest_distance(generated: ArrayLike, reference: ArrayLike) -> float:
    """Mean Euclidean distance from each row of `generated` [M, D] to the nearest row of `reference` [N, D].

    Against the training set it is 0 for copies; real images that were not trained on give the value to expect.
    """
    generated, reference = _matrices(generated, reference, "generated", "reference", min_rows=1)
    return float(_pairwise(generated, reference).min(axis=1).mean())


def class_accuracy(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Share of samples whose `predicted` class int [N] is the class that was asked for, `labels` int [N]."""
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    if predicted.shape != labels.shape or predicted.ndim != 1 or not len(labels):
        raise ValueError(f"predicted {predicted.shape} and labels {labels.shape} must have one equal shape [N], N ≥ 1")
    return float((predicted == labels).mean())


class DigitsEvaluator:
    """All metrics of digit samples, from models fitted to the real *training* images within a few seconds.

    Recipe of the published tables: 1258 samples (`sample_labels()`: as many of each class as the training split has),
    against 359 test images; settings are chosen against the 180 validation images. `floor(reference)` is what 1258 real
    images score; small differences from it mean nothing.

    - class_accuracy: an RBF support vector machine on the pixels (0.99 on real test images). Independent pixels reach
      0.96, so it detects failures and says little about quality.
    - frechet_feature: on the 32 tanh features of a small network trained to classify, whose weights depend on `seed`:
      compare rows of one evaluator only.
    - frechet_pixel: on 24 principal components of the pixels, which have no seed.
    - precision, recall, density, coverage: on the same components, k = 5, in equal-size chunks.
    - two_sample_accuracy: on the pixels, fitted on training images, tested on the reference.
    - diversity: within-class mean pixel distance, relative to the training images, averaged over classes.
    - nearest_train: mean pixel distance to the nearest training image.

    Pixels are in [0, 1]. Deterministic for one `seed` and library build; no global random state is read
    or changed, nothing is cached.
    """

    def __init__(self, seed: int = 0) -> None:
        self._train = load_digits_split("train")
        self._references = {name: load_digits_split(name) for name in ("validation", "test")}
        pixels = _pixels(self._train.tokens)
        self._mean, self._axes = _principal_axes(pixels, 24)
        self._network = _train_feature_network(self._train, seed)
        # random_state changes no result; None would draw from numpy's global generator
        classifier = import_extra("sklearn.svm", "a metric").SVC(C=10, gamma=0.256, random_state=0)
        self._classifier = classifier.fit(pixels, self._train.labels.numpy())
        self._real_diversity = within_class_diversity(pixels, self._train.labels, NUM_CLASSES)

    def sample_labels(self) -> Tensor:
        """The labels int64 [1258] to generate for a table: those of the training split."""
        return self._train.labels.clone()

    def __call__(
        self, tokens: Tensor, labels: Tensor, reference: str = "validation", *, full: bool = True
    ) -> dict[str, float]:
        """Metrics of generated `tokens` int [N, 64] in 0..16, asked for as `labels` int [N] in 0..9.

        `reference` is "validation" or "test". `full=False` returns the cheap ones (class_accuracy, frechet_feature,
        frechet_pixel, diversity) for use during training. Keys as in `METRICS`.

        Raises ValueError for shapes or values out of range, fewer than two samples (six if full), another reference.
        """
        real = self._reference(reference)
        check_tokens(tokens, "tokens")
        labels = _label_array(labels, "labels", len(tokens), NUM_CLASSES)
        if len(tokens) < (6 if full else 2):
            raise ValueError(f"tokens must hold at least {6 if full else 2} samples, not {len(tokens)}")
        values = self._cheap_metrics(tokens, labels, real)
        if full:
            values |= self._full_metrics(tokens, real)
        return {key: values[key] for key in METRICS if key in values}

    def floor(self, reference: str = "validation", *, full: bool = True) -> dict[str, float]:
        """The same metrics for the real training images in the place of samples: what a perfect generator scores.

        Three of them would be meaningless on images that the evaluator has seen: class_accuracy and nearest_train are
        those of the reference images, and two_sample_accuracy takes one half of the training images as generated and
        the other as real.
        """
        real = self._reference(reference)
        values = self(self._train.tokens, self._train.labels, reference, full=False)
        values["class_accuracy"] = class_accuracy(self._predict(real.tokens), real.labels)
        if full:
            values |= self._neighbour_metrics(self._train.tokens, real)
            values["nearest_train"] = nearest_distance(_pixels(real.tokens), _pixels(self._train.tokens))
            half_a, half_b = np.array_split(_shuffled(_pixels(self._train.tokens)), 2)
            values["two_sample_accuracy"] = two_sample_accuracy(half_a, _pixels(real.tokens), half_b)
        return {key: values[key] for key in METRICS if key in values}

    def _reference(self, name: str) -> DigitsSplit:
        if name not in self._references:
            raise ValueError(f"unknown reference {name!r}; the references are {', '.join(self._references)}")
        return self._references[name]

    def _cheap_metrics(self, tokens: Tensor, labels: np.ndarray, real: DigitsSplit) -> dict[str, float]:
        diversity = within_class_diversity(_pixels(tokens), labels, NUM_CLASSES) / self._real_diversity
        present = diversity[~np.isnan(diversity)]
        if not len(present):
            raise ValueError("labels must hold some class at least twice")
        return {
            "class_accuracy": class_accuracy(self._predict(tokens), labels),
            "frechet_feature": frechet_distance(self._network.embed(tokens), self._network.embed(real.tokens)),
            "frechet_pixel": frechet_distance(self._components(tokens), self._components(real.tokens)),
            "diversity": float(present.mean()),
        }

    def _full_metrics(self, tokens: Tensor, real: DigitsSplit) -> dict[str, float]:
        train, samples = _pixels(self._train.tokens), _pixels(tokens)
        return self._neighbour_metrics(tokens, real) | {
            "two_sample_accuracy": two_sample_accuracy(train, _pixels(real.tokens), samples),
            "nearest_train": nearest_distance(samples, train),
        }

    def _neighbour_metrics(self, tokens: Tensor, real: DigitsSplit) -> dict[str, float]:
        return precision_recall_density_coverage(self._components(real.tokens), self._components(tokens), k=5)

    def _components(self, tokens: Tensor) -> np.ndarray:
        return (_pixels(tokens) - self._mean) @ self._axes

    def _predict(self, tokens: Tensor) -> np.ndarray:
        return self._classifier.predict(_pixels(tokens))


class _FeatureNetwork(nn.Module):
    """Three small convolutions, 32 tanh features, a linear classifier (0.98 to 0.99 on real test images)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Dropout(0.2), nn.Linear(128, 32), nn.Tanh()),
        )
        self.classifier = nn.Linear(32, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> np.ndarray:
        """Tokens int [N, 64] → tanh features float64 [N, 32]."""
        return self.features(decode(tokens.cpu())).double().numpy()


def _train_feature_network(split: DigitsSplit, seed: int, epochs: int = 30, batch_size: int = 128) -> _FeatureNetwork:
    """A `_FeatureNetwork` that classifies `split`: Adam, one-cycle rate. Global generators stay as they were."""
    images, labels = decode(split.tokens), split.labels
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), _single_thread():
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerators too
        network = _FeatureNetwork()
        optimizer = torch.optim.Adam(network.parameters(), 3e-3)
        steps = epochs * -(-len(images) // batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        for _ in range(epochs):
            for rows in torch.randperm(len(images)).split(batch_size):
                optimizer.zero_grad()
                F.cross_entropy(network(images[rows]), labels[rows]).backward()
                optimizer.step()
                schedule.step()
    return network.eval().requires_grad_(False)


@contextmanager
def _single_thread() -> Iterator[None]:
    """Run torch on one thread: faster for a network this small on busy cores, and equal sums on every machine size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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


def _label_array(labels: ArrayLike, name: str, size: int, num_classes: int) -> np.ndarray:
    array = np.asarray(labels.detach().cpu() if isinstance(labels, Tensor) else labels)
    if array.shape != (size,) or array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers of shape [{size}], not {array.dtype} {list(array.shape)}")
    if size and (array.min() < 0 or array.max() >= num_classes):
        raise ValueError(f"{name} must lie in 0..{num_classes - 1}, not {array.min()}..{array.max()}")
    return array


def _pixels(tokens: Tensor) -> np.ndarray:
    return tokens.cpu().numpy().astype(np.float64) / (VOCAB_SIZE - 1)


def _principal_axes(rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and the `count` leading principal axes [D, count]; no whitening, so distances stay those of pixels."""
    mean = rows.mean(axis=0)
    return mean, np.linalg.svd(rows - mean, full_matrices=False)[2][:count].T


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


def _shuffled(rows: np.ndarray, seed: int = 0) -> np.ndarray:
    return rows[np.random.RandomState(seed).permutation(len(rows))]


def _chunks(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """All full chunks of `size` rows, in a fixed shuffled order."""
    rows = _shuffled(rows)
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
