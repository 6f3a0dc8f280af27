"""Write docs/failures.md, distillations that go wrong beside a healthy one: `make failures`, or with [FOLDER].

FOLDER, runs/failures by default, keeps a run a case; what is finished there is not run again, what was stopped goes on.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from dimo.cli import distill
from dimo.config import DistillConfig, load_config, to_dict
from dimo.evaluation import METRICS
from dimo.files import write_text
from dimo.report import comparison_figure, metrics_table
from dimo.runlog import LOG, read_log

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "failures.md"
COLUMNS = (
    "frechet_pixel", "frechet_feature", "recall", "coverage", "two_sample_accuracy", "diversity", "marginal_entropy",
)  # fmt: skip
COMMON = {
    "run.steps": 200, "run.tensorboard": False, "report.reference": "validation",
    "report.teacher_steps": (1,), "report.few_steps": (), "report.sampling_seeds": 2,
}  # fmt: skip


class Case(NamedTuple):
    """A distillation: its short name, what it changes in configs/digits.yaml, why it fails and what to do."""

    name: str
    changes: Mapping[str, Any]
    advice: str = ""


PAPER = "[Di[M]O](https://arxiv.org/abs/2503.15457)"
CASES = {
    "healthy": Case("healthy recipe", {}),
    "r_init_1": Case("r_init 1, no noise", {"method.r_init": 1.0, "method.embedding_noise": 0.0}, f"""\
All samples of a class have one input, so their tokens are drawn independently, as in the teacher's one step: two-sample
accuracy is as bad as there, recall is worse, and token entropy stays high, where the healthy run's falls.
For this reason {PAPER} starts from partly random tokens: lower `method.r_init`, add `method.embedding_noise`."""),
    "r_init_0.3": Case("r_init 0.3", {"method.r_init": 0.3}, f"""\
Expected to fail, but did not: the first preview is worse, the end level with the healthy run. Mostly random tokens are
unlike what the teacher was trained on, which {PAPER} takes care to avoid: raise it if previews start badly."""),
    "reverse_kl": Case("reverse KL", {"method.divergence": "jeffreys:1"}, """\
Reverse KL seeks modes: what the teacher makes rarely is given up, so recall, diversity and entropy fall, while Fréchet
distances and two-sample accuracy show nothing. Use `forward_kl`, or a small or negative beta (`jeffreys:-0.2`)."""),
    "learning_rate_3e-3": Case("learning rate 3e-3", {"student.learning_rate": 3e-3}, """\
The gradient is right only while the auxiliary tracks the student, and steps this large outrun it: at the first warning,
lower `student.learning_rate`. Token entropy rises where a healthy run's falls: one noisy shape is left for all classes,
and the noise keeps diversity up."""),
    "learning_rate_1e-2": Case("learning rate 1e-2", {"student.learning_rate": 1e-2}, """\
The same with more noise. Gradients are large from the first steps on, so entropy alone tells: stop at the first
warning, lower the rate."""),
}  # fmt: skip


class Outcome(NamedTuple):
    """A finished run: its metrics.json, and its log by step."""

    document: dict[str, Any]
    log: dict[int, dict[str, Any]]

    def row(self, kind: str) -> dict[str, Any]:
        """Return the first row of a kind: "real", "teacher" or "student"."""
        return next(row for row in self.document["rows"] if row["kind"] == kind)

    def warnings(self) -> list[str]:
        """Return what the trainer warned of, "step 30: ...", in order."""
        return [text for record in self.log.values() for text in record.get("warning", [])]


def outcome(case: Case, folder: Path) -> Outcome:
    """Run a case in its folder, unless a finished run of the same configuration is there, and read its results."""
    config = load_config(DistillConfig, ROOT / "configs" / "digits.yaml")
    for key, value in (COMMON | {"run.output": str(folder)} | case.changes).items():
        section, name = key.split(".")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    results = folder / "metrics.json"
    if not results.exists() or json.loads(results.read_text(encoding="utf-8"))["config"] != to_dict(config):
        distill(config)
    return Outcome(json.loads(results.read_text(encoding="utf-8")), read_log(folder / LOG))


def page(outcomes: Mapping[str, Outcome]) -> str:
    """Return the page: a table of all cases, then what each looks like, what warned of it and what to do."""
    healthy = outcomes["healthy"]
    recipe = {key: healthy.document["config"][key] for key in ("method", "student", "auxiliary")}
    end = f"## The healthy recipe\n\n```yaml\n{yaml.safe_dump(recipe, default_flow_style=True, width=118)}```\n"
    sections = [_section(key, run) for key, run in outcomes.items() if run is not healthy]
    curves = f"\nThe healthy run's log: {_curves(healthy.log)}.\n"
    return "\n".join([_introduction(healthy), _table(outcomes), curves, *sections, end])


def _introduction(healthy: Outcome) -> str:
    document, metrics = healthy.document, healthy.row("student")["metrics"]
    spread = ", ".join(f"{METRICS[k].title} {max(v) - min(v):.3f}" for k in COLUMNS for v in [metrics[k]["values"]])
    return f"""# How one-step distillation fails on the digits, and what warns of it

Written by `make failures`; do not edit. Each run is the recipe at the end (`configs/digits.yaml` when it was made) with
{COMMON["run.steps"]} steps and the change that its section names; one training seed, so small differences mean nothing.
Metrics: {document["sample_count"]:,} samples against the validation images, mean of {COMMON["report.sampling_seeds"]}
sampling seeds, which in the healthy run differ by: {spread}.
Measured with torch {document["evaluator"]["versions"]["torch"]}, on {document["build"]["cpu"]["name"]}.
"""


def _table(outcomes: Mapping[str, Outcome]) -> str:
    rows = {(row := outcomes["healthy"].row(kind))["name"]: row for kind in ("real", "teacher")}
    rows |= {CASES[key].name: run.row("student") for key, run in outcomes.items()}
    values = {name: {key: row["metrics"][key]["mean"] for key in COLUMNS} for name, row in rows.items()}
    lines = metrics_table(values, row_title="run").splitlines()
    first = ((run.warnings() or ["none"])[0].split(":")[0] for run in outcomes.values())
    last = ["first warning", "------------:", "-", "-", *first]
    return "\n".join(f"{line} {cell:>13} |" for line, cell in zip(lines, last, strict=True))


def _section(slug: str, run: Outcome) -> str:
    name, changes, advice = CASES[slug]
    flags = "`" + " ".join(f"--{key} {value}" for key, value in changes.items()) + "`"
    warned = "\n\n".join(f"> warning: {text}" for text in run.warnings()) or "No warning."
    picture = f"![Samples of the healthy recipe and of: {name}](failures/{slug}.png)"
    return "\n\n".join([f"## {name}", flags, picture, f"Its log: {_curves(run.log)}.", warned, advice]) + "\n"


def _curves(log: Mapping[int, Mapping[str, Any]]) -> str:
    names = ("token_entropy", "gradient_norm", "diversity", "frechet_pixel")
    entropy, norm, diversity, distance = ([r[name] for r in log.values() if name in r] for name in names)
    return (
        f"token entropy {entropy[0]:.2f} → {entropy[-1]:.2f} nats; gradient norm {statistics.median(norm):.0f} in the "
        f"median, {max(norm):.0f} at most; previews' diversity {diversity[0]:.2f} → {diversity[-1]:.2f} and Fréchet "
        f"distance (pixels) {distance[0]:.2f} → {distance[-1]:.2f}"
    )


def main(folder: Path) -> None:
    """Run what is missing, one case after the other, then draw the pictures and write the page."""
    outcomes = {key: outcome(case, folder / key) for key, case in CASES.items()}
    for key in list(CASES)[1:]:
        panels = {CASES[k].name: torch.tensor(outcomes[k].row("student")["samples"]) for k in ("healthy", key)}
        comparison_figure(panels, PAGE.with_suffix("") / f"{key}.png")
    write_text(PAGE, page(outcomes))
    print(PAGE)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "runs" / "failures")
