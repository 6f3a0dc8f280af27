"""Metrics of digit samples against real digits, each with its recipe. Nothing is generated here.

`METRICS` names them, `DigitsEvaluator` computes them with the functions of `dimo.metrics`. Every number depends on its
sample counts: compare rows only where these are equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dimo_ext

from .checkpoint import fingerprint, load_teacher, versions
from .data.digits import NUM_CLASSES, VOCAB_SIZE, DigitsSplit, check_tokens, decode, load_digits_split
from .files import import_extra
from .metrics import (
    class_accuracy,
    frechet_distance,
    label_array,
    nearest_distances,
    negative_log_likelihood_bound,
    precision_recall_density_coverage,
    shuffled,
    two_sample_accuracy,
    within_class_diversity,
    within_class_entropy,
)


@dataclass(frozen=True)
class Metric:
    """How a table shows a metric: column title, which direction is better, and in a sentence how it is computed."""

    title: str
    better: Literal["higher", "lower", "ideal"]
    recipe: str
    ideal: str = ""
    """The value to reach; only with "ideal"."""

    @property
    def header(self) -> str:
        """The title with an arrow: ↑ higher is better, ↓ lower is better, or → and the ideal value."""
        return f"{self.title} " + {"higher": "↑", "lower": "↓", "ideal": f"→ {self.ideal}"}[self.better]


METRICS: dict[str, Metric] = {
    "class_accuracy": Metric(
        "accuracy", "higher",
        "share that a support vector machine on the pixels (RBF, fitted to the training images) assigns to the class "
        "asked for; independent pixels reach 0.96, so it detects failures and says little about quality",
    ),
    "frechet_feature": Metric(
        "Fréchet (features)", "lower",
        "squared Fréchet distance of the 32 tanh features of a small network trained to classify the training images; "
        "its weights depend on the evaluator's seed, so compare rows of one evaluator",
    ),
    "frechet_pixel": Metric(
        "Fréchet (pixels)", "lower",
        "squared Fréchet distance of the 24 leading principal components of the training images' pixels",
    ),
    "precision": Metric(
        "precision", "higher",
        "share of samples within the k-nearest-neighbour ball of a real image, k = 5, on those components, in chunks "
        "as large as the reference",
    ),
    "recall": Metric("recall", "higher", "share of real images within the ball of a sample, computed as precision is"),
    "density": Metric(
        "density", "ideal", "mean number of real balls around a sample, divided by k, computed as precision is", "1"
    ),
    "coverage": Metric("coverage", "higher", "share of real balls that hold a sample, computed as precision is"),
    "two_sample_accuracy": Metric(
        "two-sample", "ideal",
        "balanced accuracy of a support vector machine on the pixels (RBF, gamma 0.5, C = 10) that tells samples from "
        "real images: fitted on training images and samples, 5-fold over the samples, tested on the reference; the "
        "real row takes one half of the training images for samples",
        "0.5",
    ),
    "diversity": Metric(
        "diversity", "ideal",
        "mean pixel distance between two samples of a class, relative to the training images, averaged over classes",
        "1",
    ),
    "marginal_entropy": Metric(
        "entropy", "ideal",
        "entropy of a token given position and class, from the samples' frequencies, relative to the training images, "
        "averaged over positions and classes; blind to how pixels depend on each other",
        "1",
    ),
    "nearest_train": Metric(
        "nearest train", "ideal",
        "mean pixel distance to the nearest training image; the real row holds the reference images' distance, and "
        "less than that means memorised samples",
        "real",
    ),
    "near_copies": Metric(
        "near copies", "ideal",
        "share of samples nearer to a training image than all but 1 % of the reference images are",
        "real",
    ),
    "teacher_nll": Metric(
        "teacher NLL", "ideal",
        "any-order bound on the negative log-likelihood under the shipped teacher without guidance, nats a token, one "
        "mask a sample; the real row holds the reference images' value, and less than that means too typical samples",
        "real",
    ),
}  # fmt: skip
"""The keys that `DigitsEvaluator` returns, in the order of the table's columns."""


def recipes() -> dict[str, str]:
    """One sentence a metric: how it is computed."""
    return {key: metric.recipe for key, metric in METRICS.items()}


def recipe_text() -> str:
    """The recipes as lines of text, to stand below a table."""
    return "\n".join(f"{metric.title}: {metric.recipe}." for metric in METRICS.values())


class DigitsEvaluator:
    """All metrics of digit samples, from models fitted to the real *training* images within a few seconds.

    The recipe of the published tables: 1258 samples (`sample_labels()`: as many of each class as the training split
    has), against 359 test images; settings are chosen against the 180 validation images. `floor(reference)` is what
    1258 real images score; small differences from it mean nothing. `METRICS` has each metric's own recipe.

    Pixels are in [0, 1]. Deterministic for one `seed` and library build; no global random state is read
    or changed, nothing is cached.
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._train = load_digits_split("train")
        self._references = {name: load_digits_split(name) for name in ("validation", "test")}
        pixels = _pixels(self._train.tokens)
        self._mean, self._axes = _principal_axes(pixels, 24)
        self._network = _train_feature_network(self._train, seed)
        self._teacher = load_teacher("digits")
        # random_state changes no result; None would draw from numpy's global generator
        classifier = import_extra("sklearn.svm", "a metric").SVC(C=10, gamma=0.256, random_state=0)
        self._classifier = classifier.fit(pixels, self._train.labels.numpy())
        self._real_diversity = within_class_diversity(pixels, self._train.labels, NUM_CLASSES)
        self._real_entropy = self._entropy(self._train.tokens, self._train.labels.numpy())

    def describe(self, reference: str = "validation") -> dict[str, Any]:
        """What its numbers depend on besides the samples, as JSON-able values."""
        modules = {"numpy": "numpy", "scipy": "scipy", "scikit-learn": "sklearn"}
        libraries = {name: import_extra(module, "a metric").__version__ for name, module in modules.items()}
        return {
            "seed": self._seed,
            "train": {"count": len(self._train), "sha256": self._train.checksum()},
            "reference": {"count": len(self._reference(reference)), "sha256": self._reference(reference).checksum()},
            "teacher_sha256": fingerprint(self._teacher),
            "versions": versions() | libraries,
        }

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
        labels = label_array(labels, "labels", len(tokens), NUM_CLASSES)
        if len(tokens) < (6 if full else 2):
            raise ValueError(f"tokens must hold at least {6 if full else 2} samples, not {len(tokens)}")
        tokens = tokens.cpu().long()
        values = self._cheap_metrics(tokens, labels, real)
        if full:
            values |= self._full_metrics(tokens, labels, real)
        return {key: values[key] for key in METRICS if key in values}

    def floor(self, reference: str = "validation", *, full: bool = True) -> dict[str, float]:
        """The same metrics for the real training images in the place of samples: what a perfect generator scores.

        Some would be meaningless on images that the evaluator has seen: class_accuracy, nearest_train, near_copies and
        teacher_nll are those of the reference images, and two_sample_accuracy takes one half of the training images as
        generated and the other as real.
        """
        real = self._reference(reference)
        values = self(self._train.tokens, self._train.labels, reference, full=False)
        values["class_accuracy"] = class_accuracy(self._predict(real.tokens), real.labels)
        if full:
            values |= self._neighbour_metrics(self._train.tokens, real) | self._memorisation(real.tokens, real)
            values["marginal_entropy"] = 1.0
            values["teacher_nll"] = self._teacher_nll(real.tokens, real.labels)
            half_a, half_b = np.array_split(shuffled(_pixels(self._train.tokens)), 2)
            values["two_sample_accuracy"] = two_sample_accuracy(half_a, _pixels(real.tokens), half_b)
        return {key: values[key] for key in METRICS if key in values}

    def _reference(self, name: str) -> DigitsSplit:
        if name not in self._references:
            raise ValueError(f"unknown reference {name!r}; the references are {', '.join(self._references)}")
        return self._references[name]

    def _cheap_metrics(self, tokens: Tensor, labels: np.ndarray, real: DigitsSplit) -> dict[str, float]:
        diversity = within_class_diversity(_pixels(tokens), labels, NUM_CLASSES) / self._real_diversity
        if np.isnan(diversity).all():
            raise ValueError("labels must hold some class at least twice")
        return {
            "class_accuracy": class_accuracy(self._predict(tokens), labels),
            "frechet_feature": frechet_distance(self._network.embed(tokens), self._network.embed(real.tokens)),
            "frechet_pixel": frechet_distance(self._components(tokens), self._components(real.tokens)),
            "diversity": float(np.nanmean(diversity)),
        }

    def _full_metrics(self, tokens: Tensor, labels: np.ndarray, real: DigitsSplit) -> dict[str, float]:
        entropy = self._entropy(tokens, labels) / self._real_entropy
        return {
            **self._neighbour_metrics(tokens, real),
            "two_sample_accuracy": two_sample_accuracy(
                _pixels(self._train.tokens), _pixels(real.tokens), _pixels(tokens)
            ),
            "marginal_entropy": float(np.nanmean(entropy)),
            **self._memorisation(tokens, real),
            "teacher_nll": self._teacher_nll(tokens, torch.from_numpy(labels).long()),
        }

    def _neighbour_metrics(self, tokens: Tensor, real: DigitsSplit) -> dict[str, float]:
        return precision_recall_density_coverage(self._components(real.tokens), self._components(tokens), k=5)

    def _memorisation(self, tokens: Tensor, real: DigitsSplit) -> dict[str, float]:
        train = _pixels(self._train.tokens)
        distances, held_out = (nearest_distances(_pixels(t), train) for t in (tokens, real.tokens))
        near = distances < np.quantile(held_out, 0.01)
        return {"nearest_train": float(distances.mean()), "near_copies": float(near.mean())}

    def _teacher_nll(self, tokens: Tensor, labels: Tensor) -> float:
        """One mask a sample; a small reference gets as many masks in all as the samples of a table."""
        repeats = -(-len(self._train) // len(tokens))
        bound = negative_log_likelihood_bound(
            self._teacher, tokens, labels, key=dimo_ext.random_key(0), repeats=repeats
        )
        return bound.mean().item()

    def _entropy(self, tokens: Tensor, labels: np.ndarray) -> np.ndarray:
        return within_class_entropy(tokens.numpy(), labels, VOCAB_SIZE, NUM_CLASSES)

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


def _pixels(tokens: Tensor) -> np.ndarray:
    return tokens.cpu().numpy().astype(np.float64) / (VOCAB_SIZE - 1)


def _principal_axes(rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and the `count` leading principal axes [D, count]; no whitening, so distances stay those of pixels."""
    mean = rows.mean(axis=0)
    return mean, np.linalg.svd(rows - mean, full_matrices=False)[2][:count].T
