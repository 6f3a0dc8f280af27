"""The benchmark of the training step: its baseline is the method, and its table says what it should."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dimo_ext as dx
from tests.calls import with_gradient
from tests.conftest import LogitsCase, assert_close, assert_gradient

pytest.importorskip("matplotlib")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def plain_step(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import plain_step

    return plain_step


@pytest.fixture
def step_table(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS.parent / "scripts"))
    import step_table

    return step_table


def test_the_plain_loss_is_the_methods(plain_step):
    """Its value is the divergence, its gradient the pseudo-gradient of the student."""
    teacher, uncond, auxiliary, student = LogitsCase((3, 5), 11, torch.float64).build(torch.device("cpu"), 4)
    mask = torch.arange(15).view(3, 5) % 3 > 0
    options = {"teacher_uncond_logits": uncond, "guidance_scale": 2.0, "mask": mask, "reduction": "batchmean"}

    def ours(z):
        return dx.distribution_matching_loss(z, teacher, auxiliary, "jeffreys:-0.2", **options)

    def plain(z):
        return plain_step.matching_loss(z, teacher, uncond, auxiliary, mask, 2.0, -0.2)[0]

    assert_gradient(with_gradient(plain, student.float())[1], with_gradient(ours, student)[1])
    value = plain_step.matching_loss(student, teacher, uncond, auxiliary, mask, 2.0, -0.2)[1]
    assert_close(value, ours(student))


def test_the_plain_cross_entropy(plain_step):
    """That of the masked tokens, their mean."""
    (logits,) = LogitsCase((3, 5), 11).build(torch.device("cpu"), 1)
    tokens, mask = torch.arange(15).view(3, 5) % 11, torch.arange(15).view(3, 5) % 2 > 0
    expected = dx.masked_cross_entropy(logits, tokens, mask, label_smoothing=0.1)
    assert_close(plain_step.fit_loss(logits, tokens, mask, 0.1), expected)


def test_a_table_and_a_chart(step_table, tmp_path):
    """Every candidate and phase, both kinds of ratio."""
    out = tmp_path / "step.csv"
    options = ["--batch-size", "1", "--layers", "1", "--width", "16", "--seconds", "0", "--no-compile"]
    command = [
        sys.executable,
        str(BENCHMARKS / "step_time.py"),
        "digits",
        "--device",
        "cpu",
        *options,
        "--out",
        str(out),
    ]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}  # it imports its neighbours
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(out.read_text().splitlines()))
    whole = {row["candidate"]: row for row in rows if row["phase"] == "whole step"}
    assert {name: row["ratio_of"] for name, row in whole.items()} == {
        "plain eager": "same algorithm", "ours eager": "same algorithm", "ours eager, batch re-used": "recipe",
    }  # fmt: skip
    assert all(float(row["ms"]) > 0 and float(row["floor_ms"]) > 0 for row in whole.values())
    assert len({row["phase"] for row in rows}) == 13
    assert out.with_suffix(".png").stat().st_size > 0
    assert_readme_row(step_table.row(out), whole)


def assert_readme_row(line: str, whole: dict[str, dict[str, str]]) -> None:
    """Times against the plain eager step; candidates that did not run leave their cell empty."""
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    base, ours = (float(whole[name]["ms"]) for name in ("plain eager", "ours eager"))
    assert cells[0].startswith("digits, 1 \u00d7 16, batch 1, ")
    assert cells[1:6] == [f"{base:,.3g}", "", f"{ours:,.3g} ({base / ours:.2f}\u00d7)", "", ""]
    assert cells[6].startswith(f"{float(whole['ours eager, batch re-used']['ms']):,.3g} (")
    assert cells[7] == f"{float(whole['ours eager']['floor_ms']):,.3g}"
