"""The sections that a run has from its first logged step on: its state, warnings, curves, times, configuration."""

from __future__ import annotations

import base64
import math
from html import escape
from typing import Any

import yaml

from ..evaluation import METRICS
from ..report import COMPARISON, CURVES
from .charts import Chart, Point, Series, figures
from .run import Run


def header(run: Run) -> str:
    """Return a title that says what the folder holds when there are no numbers to contrast, and what is to come."""
    kind = "Distillation" if "method" in run.config else "Pretraining" if "network" in run.config else "Training"
    steps = run.setting("run", "steps")
    total = f" of {escape(str(steps))}" if steps else ""
    coming = "\n".join(f"<p>{text}</p>" for text in _still_to_come(run))
    return f"<h1>{kind}: step {run.step}{total}</h1>\n{coming}"


def _still_to_come(run: Run) -> list[str]:
    steps, coming = run.setting("run", "steps"), []
    if not run.config:
        coming.append("The configuration comes with the first checkpoint.")
    if not isinstance(steps, int) or run.step < steps:
        coming.append("Still to come: the rest of the training; the curves end where the log ends.")
    if "network" in run.config:
        return coming  # a teacher's training has no metrics
    if run.setting("teacher", "kind") in (None, "digits"):
        return [*coming, "Samples, metrics and the contrast of teacher and student follow when the run has ended."]
    return [
        *coming,
        "Metrics exist for the digits alone; a run of another teacher has curves, and pictures at its end.",
    ]


def pictures(run: Run) -> str:
    """Return the picture that a run of another teacher than the digits leaves at its end."""
    path = run.folder / COMPARISON
    if run.results or not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    picture = f'<img src="data:image/png;base64,{data}" alt="Samples of the teacher and of the student">'
    caption = "<figcaption>A column a class or prompt, all rows with the same seeds.</figcaption>"
    return f"<figure>\n{picture}\n{caption}\n</figure>"


def warnings(run: Run) -> str:
    """Return what the run was warned of."""
    texts = [text for record in run.log.values() for text in record.get("warning", [])]
    items = "".join(f"<li>{escape(str(text))}</li>" for text in texts)
    box = '<div class="warning" role="note"><strong>Warnings of this run</strong><ul>'
    return f"{box}{items}</ul></div>\n" if texts else ""


def curves(run: Run) -> str:
    """Return the charts against the training step: the previews' metrics first, then what the optimisers see."""
    previews = [_curve(run, key, metric.header, "student") for key, metric in METRICS.items()]
    others = [_curve(run, key, title, "teacher") for key, title in CURVES.items() if key not in METRICS]
    drawn = [chart for chart in previews + others if chart]
    first = "The metrics of the previews compare with the validation images. " if any(previews) else ""
    return f"<p>{first}Each chart's horizontal axis is the training step.</p>\n{figures(drawn)}" if drawn else ""


def _curve(run: Run, key: str, title: str, style: str) -> Chart | None:
    points = [Point(step, record[key]) for step, record in run.log.items() if _is_number(record.get(key))]
    return Chart(title, "training step", [Series(title, points, style)]) if points else None


def phases(run: Run) -> str:
    """Return a bar for each phase of a training step."""
    measured = [record["phase_ms"] for record in run.log.values() if isinstance(record.get("phase_ms"), dict)]
    spent = {name: ms for name, ms in (measured[-1] if measured else {}).items() if _is_number(ms) and ms >= 0}
    total = sum(spent.values())
    if not total:
        return ""
    rows = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{ms:.1f} ms</td><td>{ms / total:.0%}</td>'
        f'<td class="bar"><span style="width:{100 * ms / max(spent.values()):.1f}%"></span></td></tr>'
        for name, ms in spent.items()
    )
    note = f"<p>{total:.0f} ms a step, the mean of a few early steps.</p>"
    table = f'<table class="phases"><tbody>\n{rows}\n</tbody></table>'
    return f'{note}\n<div class="scroll box" role="region" aria-label="table" tabindex="0">{table}</div>'


def provenance(run: Run) -> str:
    """Return the whole configuration and, of a measured run, what it was built and measured with."""
    entries = {"configuration": run.config} | (run.results.provenance if run.results else {})
    return "\n".join(
        f"<details><summary>{escape(name)}</summary><pre>{escape(_yaml(value))}</pre></details>"
        for name, value in entries.items()
        if value and name != "config"
    )


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
