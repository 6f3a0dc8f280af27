"""Teacher and student on the digits: sample, measure, draw, at the end of a distillation and in `dimo evaluate`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import dimo_ext

from . import report
from .config import DistillConfig, MethodConfig, to_dict
from .data.digits import NUM_CLASSES, decode, load_digits_split
from .evaluation import DigitsEvaluator, recipe_text, recipes
from .files import write_json, write_text
from .generator import OneStepGenerator, labels_per_class, sample_keys
from .metrics import Interval, mean_and_interval
from .page.results import FORMAT, VERSION
from .samplers import ancestral_states, sample_ancestral, sample_few_steps, sample_one_step
from .teachers import Teacher

_SAMPLING_SEED = 1_000_000  # apart from the training seeds; the first of a row's sampling seeds
_SHOWN = 6  # samples a class in the pictures
_REVEAL_STEPS = 16

Draw = Callable[[Tensor, Tensor], Tensor]  # class ids [N] and keys [N, 2] → tokens [N, 64]


class Sampler(NamedTuple):
    """What :func:`measure` makes a row of: its name and kind, what a sample costs, the function that draws."""

    name: str
    kind: str  # of dimo.page.results.KINDS
    steps: int
    network_evaluations: int
    draw: Draw


def measure(
    sampler: Sampler, evaluator: DigitsEvaluator, reference: str, device: torch.device, seeds: Sequence[int]
) -> dict[str, Any]:
    """Sample with each of the sampling seeds and return the row of a metrics document.

    A seed draws as many samples of each class as the training split has. The images per second leave out the first
    batch, which warms up.
    """
    labels, values, tokens = evaluator.sample_labels(), [], []
    timings: list[tuple[int, float]] = []
    for seed in seeds:
        tokens.append(torch.cat(list(_timed_batches(sampler.draw, labels.to(device), seed, timings))))
        values.append(evaluator(tokens[-1], labels, reference))
    counts, seconds = zip(*timings[1:], strict=True)
    shown = _by_class(tokens[0], labels)
    return _row(*sampler[:4], images_per_second=sum(counts) / sum(seconds), values=values, samples=shown)


def real_row(evaluator: DigitsEvaluator, reference: str) -> dict[str, Any]:
    """Return the row of real images, see :meth:`DigitsEvaluator.floor`; its samples are images of the reference."""
    split = load_digits_split(reference)
    shown = _by_class(split.tokens, split.labels)
    return _row("real images (floor)", "real", None, None, None, [evaluator.floor(reference)], shown)


def metrics_document(
    rows: list[dict[str, Any]], config: Any, evaluator: DigitsEvaluator, reference: str, reveal: Tensor | None = None
) -> dict[str, Any]:
    """Return what metrics.json holds, all that is needed to read and to repeat the numbers; see `dimo.page.results`.

    Args:
        rows: of :func:`real_row` and :func:`measure`.
        config: the command's configuration.
        evaluator: that measured the rows.
        reference: split that the metrics compare with.
        reveal: int ``[10, steps + 1, 64]``, the states of a teacher's sampling, or None.
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        "sample_count": len(evaluator.sample_labels()),
        "reference": reference,
        "rows": rows,
        "reveal": None if reveal is None else reveal.tolist(),
        "recipes": recipes(),
        "config": to_dict(config),
        "build": dimo_ext.build_info(),
        "evaluator": evaluator.describe(reference),
    }


def row_name(model: str, steps: int) -> str:
    """Return a row's name: "teacher, 4 steps"."""
    return f"{model}, {steps} step{'s' if steps > 1 else ''}"


def table(document: dict[str, Any], style: str = "plain") -> str:
    """Return a metrics document as a table, mean ± half an interval's width, with its recipes below."""
    cells = {}
    for row in document["rows"]:
        leading = {name: row[name] for name in ("network_evaluations", "images_per_second") if row[name] is not None}
        cells[row["name"]] = leading | {
            key: Interval(value["mean"], value["low"], value["high"]) for key, value in row["metrics"].items()
        }
    return f"{report.metrics_table(cells, style)}\n\n{_caption(document, '- ' if style == 'markdown' else '')}"


def compare(teacher: Teacher, student: OneStepGenerator, config: DistillConfig, evaluator: DigitsEvaluator) -> str:
    """Measure teacher and student, write pictures and tables into the run's folder, return the plain-text table.

    A guided teacher step evaluates the network twice a sample, and counts so.
    """
    settings, reference = config.report, config.report.reference
    rows = [real_row(evaluator, reference)]
    for sampler in _samplers(teacher, student, config):
        seeds = range(settings.sampling_seeds if sampler.kind == "student" else settings.teacher_seeds)
        rows.append(measure(sampler, evaluator, reference, teacher.device, seeds))
        print(f"  {sampler.name}: {rows[-1]['images_per_second']:.0f} images/s", flush=True)
    document = metrics_document(rows, config, evaluator, reference, _reveal(teacher, config.method))
    output = Path(config.run.output)
    write_json(output / "metrics.json", document)
    write_text(output / "table.md", table(document, "markdown") + "\n")
    _draw_pictures(rows, config, output)
    return table(document)


def _samplers(teacher: Teacher, student: OneStepGenerator, config: DistillConfig) -> list[Sampler]:
    method = config.method

    def ancestral(steps: int) -> Draw:
        return lambda labels, key: sample_ancestral(teacher, labels, steps=steps, **teacher_sampling(method), key=key)

    def refined(steps: int) -> Draw:
        schedule = _sampling_schedule(method.mask_schedule)
        return lambda labels, key: sample_few_steps(
            student.model, labels, student.sampling, steps=steps, mask_schedule=schedule, key=key
        )

    calls = 1 if method.guidance_scale == 1.0 else 2
    before = lambda labels, key: sample_one_step(teacher, labels, method, key=key)  # noqa: E731
    return [
        *(Sampler(row_name("teacher", s), "teacher", s, s * calls, ancestral(s)) for s in config.report.teacher_steps),
        Sampler("student before training", "student_before", 1, 1, before),
        *(Sampler(row_name("student", s), "student", s, s, refined(s)) for s in (1, *config.report.few_steps)),
    ]


def teacher_sampling(method: MethodConfig) -> dict[str, Any]:
    """Return how a distillation's teacher samples: with its guidance, along the schedule of its mask ratios."""
    return {
        "mask_schedule": _sampling_schedule(method.mask_schedule),
        "guidance_scale": method.guidance_scale,
    }


def _sampling_schedule(training_schedule: str) -> str:
    return "arccos" if training_schedule == "mage" else training_schedule


def _timed_batches(draw: Draw, labels: Tensor, seed: int, timings: list[tuple[int, float]]) -> Iterator[Tensor]:
    """Yield the samples batch by batch on the CPU; note each batch's size and seconds."""
    size = 64 if labels.device.type == "cpu" else 512  # small activations stay in the CPU's cache
    keys = sample_keys(_SAMPLING_SEED + seed, len(labels), device=labels.device)
    for part, key in zip(labels.split(size), keys.split(size), strict=True):
        start = time.perf_counter()
        tokens = draw(part, key).cpu()  # waits for the device
        timings.append((len(part), time.perf_counter() - start))
        yield tokens


def _row(
    name: str, kind: str, steps: int | None, network_evaluations: int | None, images_per_second: float | None,
    values: list[dict[str, float]], samples: Tensor,
) -> dict[str, Any]:  # fmt: skip
    by_metric = {key: [value[key] for value in values] for key in values[0]}
    metrics = {key: mean_and_interval(numbers)._asdict() | {"values": numbers} for key, numbers in by_metric.items()}
    return {
        "name": name, "kind": kind, "steps": steps, "network_evaluations": network_evaluations,
        "images_per_second": images_per_second, "metrics": metrics, "samples": samples.tolist(),
    }  # fmt: skip


def _by_class(tokens: Tensor, labels: Tensor) -> Tensor:
    """The first samples of each class, ``[10, 6, 64]``."""
    return torch.stack([tokens[labels == c][:_SHOWN] for c in range(NUM_CLASSES)])


def _reveal(teacher: Teacher, method: MethodConfig) -> Tensor:
    """The states of one ancestral sampling a class, ``[10, steps + 1, 64]``; [MASK] as the teacher writes it."""
    labels = torch.arange(NUM_CLASSES, device=teacher.device)
    keys = sample_keys(_SAMPLING_SEED, NUM_CLASSES, device=teacher.device)
    states = ancestral_states(teacher, labels, steps=_REVEAL_STEPS, **teacher_sampling(method), key=keys)
    return torch.stack(list(states), 1)


def _caption(document: dict[str, Any], bullet: str) -> str:
    evaluator, build = document["evaluator"], document["build"]
    versions = ", ".join(f"{name} {version}" for name, version in evaluator["versions"].items())
    lines = [
        f"{document['sample_count']:,} samples a seed against the {evaluator['reference']['count']} "
        f"{document['reference']} images. ±: half of the 95 % Student-t interval of the mean over the sampling seeds "
        "of one model (no ±: one seed); how training seeds differ is not in it.",
        *recipe_text().splitlines(),
        f"Measured with {versions}, on {build['gpus'][0]['name'] if build['gpus'] else build['cpu']['name']}.",
    ]
    return "\n".join(bullet + line for line in lines)


def _draw_pictures(rows: list[dict[str, Any]], config: DistillConfig, output: Path) -> None:
    by_name = {row["name"]: row for row in rows}
    steps = sorted({1, *config.report.teacher_steps} & {1, 4, max(config.report.teacher_steps)}, reverse=True)
    names = [n for n in [rows[0]["name"], *(row_name("teacher", s) for s in steps), "student, 1 step"] if n in by_name]
    for file, shown in {"comparison": names, "student": ["student before training", "student, 1 step"]}.items():
        panels = {_panel(by_name[n]): torch.tensor(by_name[n]["samples"]) for n in shown}
        report.comparison_figure(panels, output / f"{file}.png")
    report.loss_curves(output / "log.jsonl", output / "curves.png")


def _panel(row: dict[str, Any]) -> str:
    if row["kind"] == "real":
        return "real digits"
    count = row["network_evaluations"]
    return f"{row['name']}\n{count} network evaluation{'s' if count > 1 else ''}"


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
