"""A run's metrics.json read back, and what it says: which teacher the one-step student equals, in words."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ..checkpoint import CheckpointError
from ..evaluation import METRICS
from ..metrics import Interval

FORMAT, VERSION = "dimo.metrics", 1
RESULTS = "metrics.json"
HEADLINE_METRIC = "frechet_pixel"
_MARGIN = 0.1  # of the other's value
KINDS = ("real", "teacher", "student_before", "student")

Verdict = Literal["better", "equal", "worse"]


@dataclass(frozen=True)
class Row:
    """One sampler of the table; `samples` uint8 [10, n, 64] holds tokens by class."""

    name: str
    kind: str
    steps: int | None
    network_evaluations: int | None
    images_per_second: float | None
    metrics: dict[str, Interval]
    samples: np.ndarray | None


@dataclass(frozen=True)
class Results:
    """A whole metrics.json; `reveal` uint8 [10, steps + 1, 64] holds the states of a sampling of the teacher."""

    rows: list[Row]
    sample_count: int
    reference: str
    recipes: dict[str, str]
    reveal: np.ndarray | None
    provenance: dict[str, Any]

    def of_kind(self, kind: str) -> list[Row]:
        """Return the rows of ``kind``, fewest steps first."""
        return sorted((row for row in self.rows if row.kind == kind), key=lambda row: row.steps or 0)

    @property
    def kinds(self) -> list[str]:
        """The rows' kinds."""
        return [row.kind for row in self.rows]

    @property
    def one_step_student(self) -> Row | None:
        """The trained student at one network evaluation."""
        return next((row for row in self.of_kind("student") if row.network_evaluations == 1), None)


class Contrast(NamedTuple):
    """The one-step student, the teacher at the most steps that it equals or beats, the teacher one row further."""

    student: Row
    matched: Row | None
    missed: Row | None


def read_results(path: str | os.PathLike[str]) -> Results:
    """Read a metrics.json.

    Raises:
        CheckpointError: the file cannot be read, is of another format or version, or an entry is missing or malformed.
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{os.fspath(path)}: cannot be read as JSON: {error}") from None
    found = (entries.get("format"), entries.get("version")) if isinstance(entries, dict) else (None, None)
    if found != (FORMAT, VERSION):
        expected = f"expected format {FORMAT!r}, version {VERSION}"
        raise CheckpointError(f"{os.fspath(path)}: {expected}, got {found[0]!r}, version {found[1]!r}")
    try:
        return _results(entries)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{os.fspath(path)}: unusable entries: {type(error).__name__}: {error}") from None


def contrast(results: Results) -> Contrast | None:
    """Compare the one-step student with the teacher's rows on `HEADLINE_METRIC`.

    The student matches a number of teacher steps if it is better or equal, see :func:`verdict`, there *and at every
    smaller one*. Returns None without a student or a teacher that was measured.
    """
    student = results.one_step_student
    teachers = [row for row in results.of_kind("teacher") if HEADLINE_METRIC in row.metrics]
    if student is None or HEADLINE_METRIC not in student.metrics or not teachers:
        return None
    worse = [verdict(HEADLINE_METRIC, student, teacher) == "worse" for teacher in teachers]
    first = worse.index(True) if True in worse else len(teachers)
    missed = teachers[first] if first < len(teachers) else None
    return Contrast(student, teachers[first - 1] if first else None, missed)


def verdict(metric: str, a: Row, b: Row) -> Verdict:
    """Return how `a` compares with `b`, in doubt against `a`; the interval of one seed is its value.

    "better": the intervals are apart and `a` has the better mean. "equal": they overlap and the mean of `a` is at most
    a tenth worse, for wide intervals alone prove nothing. Else "worse". `metric` is a key of `METRICS` whose ideal, if
    it has one, is a number.
    """
    x, y = a.metrics[metric], b.metrics[metric]
    (x_low, x_high), (y_low, y_high) = _ends(x), _ends(y)
    no_worse = _cost(metric, x.mean) <= _cost(metric, y.mean)
    if x_low <= y_high and y_low <= x_high:
        return "equal" if no_worse or abs(x.mean - y.mean) <= _MARGIN * abs(y.mean) else "worse"
    return "better" if no_worse else "worse"


def _ends(value: Interval) -> tuple[float, float]:
    return (value.mean, value.mean) if value.low is None else (value.low, value.high)


def _cost(metric: str, value: float) -> float:
    """Smaller is better."""
    better, ideal = METRICS[metric].better, METRICS[metric].ideal
    return abs(value - float(ideal)) if better == "ideal" else value if better == "lower" else -value


def _results(entries: dict[str, Any]) -> Results:
    recipes = {str(name): str(text) for name, text in entries.get("recipes", {}).items()}
    provenance = {name: entries[name] for name in ("config", "build", "evaluator") if name in entries}
    rows = [_row(row) for row in entries["rows"]]
    count, reference = int(entries["sample_count"]), str(entries["reference"])
    return Results(rows, count, reference, recipes, _tokens(entries.get("reveal"), "reveal"), provenance)


def _row(entries: dict[str, Any]) -> Row:
    if entries["kind"] not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {entries['kind']!r}")
    metrics = {str(name): _interval(value, name) for name, value in entries["metrics"].items()}
    counts = [_count(entries.get(name), name, entries["kind"]) for name in ("steps", "network_evaluations")]
    rate = _number(entries.get("images_per_second"), "images_per_second")
    samples = _tokens(entries.get("samples"), "samples")
    return Row(str(entries["name"]), entries["kind"], *counts, rate, metrics, samples)


def _count(value: Any, name: str, kind: str) -> int | None:
    if kind == "real":
        return None
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
    return value


def _interval(value: dict[str, Any], name: str) -> Interval:
    interval = Interval(*(_number(value.get(key), name) for key in Interval._fields))
    if interval.mean is None or (interval.low is None) != (interval.high is None):
        raise ValueError(f"{name}: expected a mean, and both ends of an interval or neither, got {value!r}")
    return interval


def _number(value: Any, name: str) -> Any:
    """`value` itself if it is a finite number or None."""
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)):
        return value
    raise ValueError(f"{name}: expected a finite number, got {value!r}")


def _tokens(value: Sequence | None, name: str) -> np.ndarray | None:
    if value is None:
        return None
    array = np.asarray(value)
    if array.ndim != 3 or array.shape[-1] != 64 or array.dtype.kind != "i" or array.min() < 0 or array.max() > 17:
        raise ValueError(f"{name}: expected tokens 0..17 of shape [10, n, 64], got shape {list(array.shape)}")
    return array.astype(np.uint8)
