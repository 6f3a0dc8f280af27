"""Tables, pictures and files: contents are read back, and a failed write leaves the old file."""

import json
import os
import sys

import numpy as np
import pytest
import torch

from dimo import files, report
from dimo.evaluation import METRICS

ROWS = {
    "real": {"class_accuracy": 0.9889, "frechet_pixel": 0.0684},
    "student": {"network_evaluations": 1, "images_per_second": 12345.6, "frechet_pixel": 0.1},
}


def digits(columns, n=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randint(0, 17, (10, n, 64), generator=generator) for name in columns}


def read_png(path):
    image = pytest.importorskip("matplotlib.image").imread(path)
    assert image.ndim == 3
    assert image.std() > 0.01
    return image


def write_log(path, steps=100, **extra):
    lines = [json.dumps({"step": s, "student_divergence": 1 / (s + 1), "lr": 1e-3, **extra}) for s in range(steps)]
    path.write_text("\n".join(lines) + "\n")
    return path


# --- tables ----------------------------------------------------------------------------------------------------------


def test_markdown_table():
    assert report.metrics_table(ROWS) == (
        "| sampler | network evaluations | images/s | accuracy ↑ | Fréchet (pixels) ↓ |\n"
        "| ------- | ------------------: | -------: | ---------: | -----------------: |\n"
        "| real    |                   - |        - |      0.989 |              0.068 |\n"
        "| student |                   1 |   12,346 |          - |              0.100 |"
    )


def test_plain_table():
    assert report.metrics_table(ROWS, "plain", row_title="") == (
        "         network evaluations  images/s  accuracy ↑  Fréchet (pixels) ↓\n"
        "-------  -------------------  --------  ----------  ------------------\n"
        "real                       -         -       0.989               0.068\n"
        "student                    1    12,346           -               0.100"
    )


def test_table_has_a_column_for_every_metric():
    table = report.metrics_table({"a": dict.fromkeys(METRICS, 0.5)})
    headers = [cell.strip() for cell in table.splitlines()[0].strip("|").split("|")]
    assert headers == ["sampler", *(metric.header for metric in METRICS.values())]
    assert len({len(line) for line in table.splitlines()}) == 1


def test_table_errors():
    with pytest.raises(ValueError, match=r"unknown metrics \['acc'\]"):
        report.metrics_table({"a": {"acc": 1.0}})
    with pytest.raises(ValueError, match="unknown style 'html'"):
        report.metrics_table(ROWS, "html")


# --- files -----------------------------------------------------------------------------------------------------------


def test_write_json(tmp_path):
    path = tmp_path / "new" / "metrics.json"
    files.write_json(path, {"Fréchet": 0.5})
    assert json.loads(path.read_text(encoding="utf-8")) == {"Fréchet": 0.5}
    assert [p.name for p in path.parent.iterdir()] == ["metrics.json"]


def test_json_keeps_a_list_of_numbers_on_one_line(tmp_path):
    """Lists of other things, empty ones and strings with brackets and line breaks are as ever."""
    value = {"a": [[1, 2], [-0.5, 1e-9, None]], "b": ["[\n1,\n 2]", "x"], "c": [], "d": [{"e": [True]}]}
    files.write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == value
    assert "[1, 2]," in text
    assert "[-0.5, 1e-09, null]" in text
    assert text.count("\n") == 16


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "metrics.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, {"a": float("nan")})
    with pytest.raises(UnicodeEncodeError), files.atomic_path(path) as temporary:
        temporary.write_text("half a file, then é", encoding="ascii")
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]


@pytest.mark.parametrize("kind", ["file", "folder", "folder there already"])
def test_data_are_on_disk_before_their_name(kind, tmp_path, monkeypatch):
    """Else a crash of the machine leaves the new name with nothing behind it."""
    path, synced = tmp_path / "target", {}
    if kind == "folder there already":
        path.mkdir()
    monkeypatch.setattr(os, "fsync", lambda d: synced.update({os.fstat(d).st_ino: snapshot(path)}))
    before = snapshot(path)
    with files.atomic_path(path) as temporary:
        if kind != "file":
            (temporary / "deep").mkdir(parents=True)
        (temporary if kind == "file" else temporary / "deep" / "file").write_text("content")
    written = [path, *path.rglob("*")]
    assert len(written) == (1 if kind == "file" else 3)
    assert synced == {part.stat().st_ino: before for part in written}


def snapshot(path):
    """What stands at a path: its number, or None."""
    return path.stat().st_ino if path.exists() else None


def test_failed_sync_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    files.write_json(path, {"a": 1})

    def fail(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        files.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]


def test_failed_picture_leaves_nothing(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure

    def fail_half_way(self, path, **_):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", fail_half_way)
    with pytest.raises(OSError, match="disk full"):
        report.comparison_figure(digits(["real"]), tmp_path / "figure.png")
    assert not list(tmp_path.iterdir())


# --- pictures --------------------------------------------------------------------------------------------------------


def test_comparison_figure(tmp_path):
    one, five = tmp_path / "one.png", tmp_path / "five.png"
    report.comparison_figure(digits(["real digits"]), one)
    report.comparison_figure(digits(["real digits", *(f"teacher\n{n} network evaluations" for n in range(4))]), five)
    small, large = read_png(one), read_png(five)
    assert small.shape[0] == large.shape[0] > 600
    assert large.shape[1] > 4 * small.shape[1] - 200


def test_comparison_shows_the_tokens(tmp_path):
    """A white image in the place of one digit changes 8x8 cells of six device pixels, and nothing else."""
    columns = {"real": torch.zeros(10, 2, 64, dtype=torch.int64)}
    report.comparison_figure(columns, tmp_path / "blank.png")
    columns["real"][4, 1] = 16
    report.comparison_figure(columns, tmp_path / "ink.png")
    changed = (read_png(tmp_path / "blank.png") != read_png(tmp_path / "ink.png")).any(axis=2)
    rows, cols = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    assert np.ptp(rows) + 1 == pytest.approx(48, abs=2)
    assert np.ptp(cols) + 1 == pytest.approx(48, abs=2)


def test_comparison_figure_errors(tmp_path):
    with pytest.raises(ValueError, match=r"columns\['a'\] must have shape \[10, n, 64\]"):
        report.comparison_figure({"a": torch.zeros(9, 2, 64, dtype=torch.int64)}, tmp_path / "x.png")
    with pytest.raises(ValueError, match="equal shape"):
        report.comparison_figure(digits(["a"]) | digits(["b"], n=2), tmp_path / "x.png")
    with pytest.raises(ValueError, match="equal shape"):
        report.comparison_figure({}, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_pictures_touch_no_global_figure(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    before = pyplot.get_fignums()
    report.comparison_figure(digits(["a"]), tmp_path / "x.png")
    assert pyplot.get_fignums() == before


# --- curves ----------------------------------------------------------------------------------------------------------


def test_loss_curves_draw_what_exists(tmp_path):
    one, four = tmp_path / "one.png", tmp_path / "four.png"
    report.loss_curves(write_log(tmp_path / "log.jsonl"), one)
    extra = {"auxiliary_loss": 1.0, "gradient_norm": 2.0, "token_entropy": None, "frechet_pixel": 0.1}
    report.loss_curves(write_log(tmp_path / "log.jsonl", **extra), four)
    small, large = read_png(one), read_png(four)
    assert large.shape[0] == 2 * small.shape[0]
    assert large.shape[1] == 3 * small.shape[1]


def test_log_errors(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl, line 1"):
        report.loss_curves(log, tmp_path / "x.png")
    log.write_text('{"step": 2}\n')
    with pytest.raises(ValueError, match="holds none of loss, validation_loss, student_divergence"):
        report.loss_curves(log, tmp_path / "x.png")


def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"dimo-ext\[train\]"):
        report.comparison_figure(digits(["a"]), tmp_path / "x.png")
