"""The page of failures: what it says of canned runs, which runs count as finished, and that its pictures are there."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

for module in ("tyro", "sklearn", "matplotlib"):
    pytest.importorskip(module)

from dimo.config import to_dict  # noqa: E402 - the script needs the extras

ROOT = Path(__file__).parents[1]
_SPEC = importlib.util.spec_from_file_location("failures", ROOT / "scripts" / "failures.py")
failures = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(failures)

BROKEN = [key for key in failures.CASES if key != "healthy"]
RECIPE = {"method": {"r_init": 0.85}, "student": {"learning_rate": 0.0625}, "auxiliary": {}}
ENTROPY, SPIKE = "step 30: token entropy 0.2 nats", "step 50: gradient norm 900"


def document(mean: float, config: dict = RECIPE) -> dict:
    """A metrics.json whose student scores ``mean`` everywhere, 0.25 apart between its seeds."""
    metrics = {key: {"mean": mean, "values": [mean - 0.125, mean + 0.125]} for key in failures.COLUMNS}
    rows = [{"kind": kind, "name": f"the {kind}", "metrics": metrics} for kind in ("real", "teacher", "student")]
    evaluator = {"versions": {"torch": "2.13.0"}}
    build = {"cpu": {"name": "a processor"}}
    return {"rows": rows, "sample_count": 1258, "evaluator": evaluator, "build": build, "config": config}


def log(*warnings: str) -> dict[int, dict]:
    norms = {10: 60.0, 20: 300.0, 30: 80.0}
    records = {step: {"step": step, "token_entropy": 1.4 - step / 25, "gradient_norm": n} for step, n in norms.items()}
    for step, value in {20: 1.25, 30: 0.5}.items():
        records[step] |= {"diversity": value, "frechet_pixel": value}
    return {step: record | ({"warning": list(warnings)} if step == 30 else {}) for step, record in records.items()}


@pytest.fixture
def outcomes():
    """All cases; the first broken one was warned twice, the others never."""
    runs = {key: failures.Outcome(document(i / 8), log()) for i, key in enumerate(failures.CASES)}
    return runs | {BROKEN[0]: failures.Outcome(document(7.5), log(ENTROPY, SPIKE))}


def test_each_case_has_a_row_and_a_section_with_what_was_measured(outcomes):
    page = failures.page(outcomes)
    sections = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    assert list(sections) == [*(failures.CASES[key].name for key in BROKEN), "The healthy recipe"]
    for key in BROKEN:
        case = failures.CASES[key]
        assert f"](failures/{key}.png)" in sections[case.name]
        assert all(f"--{name} {value}" in sections[case.name] for name, value in case.changes.items())
        assert "token entropy 1.00 → 0.20 nats; gradient norm 80 in the median, 300 at most" in sections[case.name]
        assert case.advice in sections[case.name]
    rows = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("| ")}
    assert rows.keys() > {case.name for case in failures.CASES.values()}
    assert rows[failures.CASES[BROKEN[0]].name].count("7.500") == len(failures.COLUMNS)
    assert f"{failures.METRICS['recall'].title} 0.250" in page
    assert "learning_rate: 0.0625" in sections["The healthy recipe"]


def test_warnings_are_quoted_and_their_absence_is_said(outcomes):
    page = failures.page(outcomes)
    assert f"> warning: {ENTROPY}\n" in page
    assert f"> warning: {SPIKE}\n" in page
    assert page.count("\nNo warning.\n") == len(BROKEN) - 1
    (row,) = [line for line in page.splitlines() if line.startswith(f"| {failures.CASES[BROKEN[0]].name} ")]
    assert row.split("|")[-2].strip() == "step 30"


def test_only_what_is_not_finished_is_run(tmp_path, monkeypatch):
    """A finished run of another configuration is not taken for one of this case."""
    case, ran = failures.CASES[BROKEN[0]], []

    def leave(config) -> None:
        ran.append(config)
        Path(config.run.output).mkdir(exist_ok=True)
        (tmp_path / "run" / "metrics.json").write_text(json.dumps(document(1.0, to_dict(config))))
        (tmp_path / "run" / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in log(ENTROPY).values()))

    monkeypatch.setattr(failures, "distill", leave)
    for _ in range(2):
        assert failures.outcome(case, tmp_path / "run").warnings() == [ENTROPY]
    assert len(ran) == 1
    assert ran[0].method.r_init == case.changes["method.r_init"]
    assert (ran[0].run.steps, ran[0].report.reference) == (failures.COMMON["run.steps"], "validation")
    failures.outcome(failures.CASES["healthy"], tmp_path / "run")
    assert len(ran) == 2


def test_the_committed_page_has_every_case_and_small_pictures():
    page, pictures = failures.PAGE.read_text(encoding="utf-8"), failures.PAGE.with_suffix("")
    shown = set(re.findall(r"\]\(failures/(.+?)\)", page))
    assert shown == {f"{key}.png" for key in BROKEN} == {path.name for path in pictures.iterdir()}
    assert all((pictures / name).stat().st_size < 60_000 for name in shown)
    for case in failures.CASES.values():
        assert f"| {case.name} " in page
        assert case.advice in page
