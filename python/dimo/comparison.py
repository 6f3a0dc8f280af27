"""Teacher against student on the digits: sample both, measure, draw. Runs at the end of a distillation."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import dimo_ext

from . import report
from .config import DistillConfig, to_dict
from .data.digits import NUM_CLASSES, decode, load_digits_split
from .evaluation import DigitsEvaluator
from .files import write_json, write_text
from .generator import OneStepGenerator, labels_per_class
from .samplers import sample_ancestral, sample_one_step
from .teachers import Teacher

_SAMPLING_SEED = 1_000_000  # apart from the training seeds, the same for every row
_BATCH = 512
_SHOWN = 6  # samples a class in the pictures


Draw = Callable[[Tensor, Tensor], Tensor]  # class ids [N] and a key → tokens [N, 64]


class Row(NamedTuple):
    """One sampler's row: what the table and the metrics file hold, and its tokens ``[N, 64]``."""

    values: dict[str, float]
    tokens: Tensor


def compare(teacher: Teacher, student: OneStepGenerator, config: DistillConfig, evaluator: DigitsEvaluator) -> str:
    """Measure teacher and student, write pictures and tables into the run's folder, return the plain-text table.

    Every row draws as many samples of each class as the training split has. A guided teacher step evaluates the
    network twice a sample, and counts so.
    """
    labels = evaluator.sample_labels().to(teacher.device)
    sample_ancestral(teacher, labels[:_BATCH], steps=1, key=dimo_ext.random_key(0, device=labels.device))  # warm up
    rows = {"real images (floor)": evaluator.floor(config.report.reference)}
    shown = {"real digits": _first_of_each_class(load_digits_split(config.report.reference))}
    for name, draw, evaluations in _samplers(teacher, student, config):
        row = _measure(draw, labels, evaluations, evaluator, config.report.reference)
        rows[name], shown[name] = row.values, _by_class(row.tokens, labels)
        print(f"  {name}: {row.values['images_per_second']:.0f} images/s", flush=True)
    return _write(rows, shown, config)


def _samplers(teacher: Teacher, student: OneStepGenerator, config: DistillConfig) -> list[tuple[str, Draw, int]]:
    method = config.method
    network_calls = 1 if method.guidance_scale == 1.0 else 2

    def ancestral(steps: int) -> Draw:
        return lambda labels, key: sample_ancestral(
            teacher, labels, steps=steps, mask_schedule=_sampling_schedule(method.mask_schedule),
            guidance_scale=method.guidance_scale, key=key,
        )  # fmt: skip

    rows = [(_teacher_row(s), ancestral(s), s * network_calls) for s in config.report.teacher_steps]
    before = lambda labels, key: sample_one_step(teacher, labels, method, key=key)  # noqa: E731
    rows.append(("student before training", before, 1))
    rows.append(("student, 1 step", lambda labels, key: student.tokens(labels, key=key), 1))
    return rows


def _teacher_row(steps: int) -> str:
    return f"teacher, {steps} step{'s' if steps > 1 else ''}"


def _sampling_schedule(training_schedule: str) -> str:
    return "arccos" if training_schedule == "mage" else training_schedule


def _measure(draw: Draw, labels: Tensor, evaluations: int, evaluator: DigitsEvaluator, reference: str) -> Row:
    key = dimo_ext.random_key(_SAMPLING_SEED, device=labels.device)
    start = time.perf_counter()
    parts = [draw(part, dimo_ext.fold_in(key, i)) for i, part in enumerate(labels.split(_BATCH))]
    tokens = torch.cat(parts).cpu()  # waits for the device
    rate = len(labels) / (time.perf_counter() - start)
    timing = {"network_evaluations": evaluations, "images_per_second": rate}
    return Row(timing | evaluator(tokens, labels.cpu(), reference), tokens)


def _by_class(tokens: Tensor, labels: Tensor) -> Tensor:
    """The first samples of each class, ``[10, 6, 64]``."""
    return torch.stack([tokens[labels.cpu() == c][:_SHOWN] for c in range(NUM_CLASSES)])


def _first_of_each_class(split) -> Tensor:
    return _by_class(split.tokens, split.labels)


def _write(rows: dict[str, dict[str, float]], shown: dict[str, Tensor], config: DistillConfig) -> str:
    output = Path(config.run.output)
    steps = sorted({1, *config.report.teacher_steps} & {1, 4, max(config.report.teacher_steps)}, reverse=True)
    names = [n for n in ["real digits", *map(_teacher_row, steps), "student, 1 step"] if n in shown]
    report.comparison_figure({_panel(n, rows): shown[n] for n in names}, output / "comparison.png")
    before_after = ("student before training", "student, 1 step")
    report.comparison_figure({_panel(n, rows): shown[n] for n in before_after}, output / "student.png")
    report.loss_curves(output / "log.jsonl", output / "curves.png")
    write_json(output / "metrics.json", {"rows": rows, "config": to_dict(config), "build": dimo_ext.build_info()})
    write_text(output / "table.md", report.metrics_table(rows) + "\n")
    return report.metrics_table(rows, "plain")


def _panel(name: str, rows: dict[str, dict[str, float]]) -> str:
    if name not in rows:
        return name
    count = rows[name]["network_evaluations"]
    return f"{name}\n{count} network evaluation{'s' if count > 1 else ''}"


def preview_digits(
    config: DistillConfig, evaluator: DigitsEvaluator
) -> Callable[[int, Teacher], tuple[dict[str, float], Tensor]]:
    """Return the preview of a distillation: cheap metrics on the validation split and a grid of samples."""
    labels = labels_per_class(NUM_CLASSES, 50)

    def preview(step: int, model: Teacher) -> tuple[dict[str, float], Tensor]:
        key = dimo_ext.random_key(_SAMPLING_SEED, device=model.device)
        tokens = sample_one_step(model, labels.to(model.device), config.method, key=key).cpu()
        return evaluator(tokens, labels, "validation", full=False), _grid(tokens, labels)

    return preview


def teacher_grid(model: Teacher, steps: int = 16) -> Tensor:
    """Samples of a teacher as one image ``[1, H, W]`` in [0, 1], one row a class."""
    labels = labels_per_class(NUM_CLASSES, _SHOWN)
    key = dimo_ext.random_key(_SAMPLING_SEED, device=model.device)
    return _grid(sample_ancestral(model, labels.to(model.device), steps=steps, key=key).cpu(), labels)


def _grid(tokens: Tensor, labels: Tensor) -> Tensor:
    images = torch.nn.functional.pad(decode(_by_class(tokens, labels).flatten(0, 1))[:, 0], (1, 1, 1, 1))
    rows = images.unflatten(0, (NUM_CLASSES, _SHOWN))
    return rows.transpose(1, 2).flatten(2).flatten(0, 1)[None]
