"""report.html: the contrast that its headline states, the charts, the page as HTML, and unfinished or broken runs."""

import base64
import io
import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dimo.checkpoint import CheckpointError, save_checkpoint
from dimo.config import ConfigError, DistillConfig, PretrainConfig, RunConfig, TeacherConfig, to_dict
from dimo.evaluation import METRICS
from dimo.metrics import Interval
from dimo.page import PAGE, write_page
from dimo.page.charts import Chart, Point, Series, svg, thinned, ticks
from dimo.page.measured import headline
from dimo.page.results import FORMAT, VERSION, Results, Row, contrast, read_results, verdict

METRIC_NAMES = ("frechet_pixel", "frechet_feature", "recall", "precision", "coverage", "two_sample_accuracy")
TEACHER = {1: 0.24, 2: 0.13, 4: 0.10, 8: 0.08}


def one_seed(value: float) -> Interval:
    return Interval(value, None, None)


def sampler(kind: str, steps: int, value: Interval, evaluations: int | None = None, **metrics: Interval) -> Row:
    values = {"frechet_pixel": value} | metrics
    return Row(f"{kind}, {steps}", kind, steps, evaluations or steps, 100.0 / steps, values, None)


def results(student: Interval, teacher: dict[int, Interval | float] = TEACHER) -> Results:
    """A table of a guided teacher and a one-step student."""
    estimates = {s: v if isinstance(v, Interval) else one_seed(v) for s, v in teacher.items()}
    rows = [sampler("teacher", s, value, 2 * s) for s, value in estimates.items()]
    return Results([*rows, sampler("student", 1, student)], 1258, "test", {}, None, {})


# --- the contrast ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "teacher", "matched", "missed"),
    [
        (one_seed(0.107), TEACHER, 2, 4),
        (one_seed(0.10), TEACHER, 4, 8),  # equal values
        (one_seed(0.07), TEACHER, 8, None),
        (one_seed(0.3), TEACHER, None, 1),
        (Interval(0.107, 0.099, 0.115), TEACHER, 4, 8),  # the interval holds the teacher's one value
        (Interval(0.107, 0.104, 0.110), TEACHER | {4: Interval(0.10, 0.095, 0.105)}, 4, 8),
        (Interval(0.107, 0.106, 0.108), TEACHER | {4: Interval(0.10, 0.095, 0.105)}, 2, 4),
        (Interval(0.3, -0.5, 1.1), TEACHER, None, 1),  # an interval that holds everything proves nothing
        (one_seed(0.12), {1: 0.24, 2: 0.10, 4: 0.2}, 1, 2),  # 4 steps do not count where 2 are better
    ],
)
def test_contrast_names_the_most_teacher_steps_that_the_student_holds_against(student, teacher, matched, missed):
    compared = contrast(results(student, teacher))
    assert (compared.matched and compared.matched.steps) == matched
    assert (compared.missed and compared.missed.steps) == missed
    assert compared.student.kind == "student"


def test_contrast_needs_both():
    table = results(one_seed(0.1))
    assert contrast(Results(table.rows[:-1], 1258, "test", {}, None, {})) is None
    assert contrast(Results(table.rows[-1:], 1258, "test", {}, None, {})) is None
    two_steps = sampler("student", 2, one_seed(0.1))
    assert contrast(Results([*table.rows[:-1], two_steps], 1258, "test", {}, None, {})) is None


@pytest.mark.parametrize(
    ("student", "teacher", "sentence"),
    [
        (one_seed(0.107), TEACHER, "One network evaluation beats the teacher's 2 guided steps (4 evaluations)"),
        (one_seed(0.10), TEACHER, "One network evaluation matches the teacher's 4 guided steps (8 evaluations)"),
        (one_seed(0.5), TEACHER, "One network evaluation does not reach the teacher's 1 guided step (2 evaluations)"),
    ],
)
def test_headline(student, teacher, sentence):
    assert headline(contrast(results(student, teacher))) == f"{sentence} by Fréchet distance"


def test_headline_of_an_unguided_teacher():
    rows = [sampler("teacher", 4, one_seed(0.2)), sampler("student", 1, one_seed(0.1))]
    text = headline(contrast(Results(rows, 1258, "test", {}, None, {})))
    assert text.startswith("One network evaluation beats the teacher's 4 steps (4 evaluations)")


@pytest.mark.parametrize(
    ("metric", "a", "b", "outcome"),
    [
        ("frechet_pixel", 0.1, 0.2, "better"),
        ("recall", 0.9, 0.8, "better"),
        ("recall", 0.8, 0.9, "worse"),
        ("two_sample_accuracy", 0.45, 0.6, "better"),  # nearer to 0.5
        ("diversity", 1.3, 0.9, "worse"),
        ("recall", 0.9, 0.9, "equal"),
    ],
)
def test_verdict_knows_which_direction_is_better(metric, a, b, outcome):
    rows = [sampler("student", 1, one_seed(1.0), **{metric: one_seed(value)}) for value in (a, b)]
    assert verdict(metric, *rows) == outcome


# --- charts ---------------------------------------------------------------------------------------------------------


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_and_enclose(low, span):
    high = low + span
    values = ticks(low, high)
    tolerance = 1e-6 * max(abs(low), abs(high), span)
    assert values[0] <= low + tolerance
    assert values[-1] >= high - tolerance
    assert 2 <= len(values) <= 7
    assert values == sorted(set(values))


@pytest.mark.parametrize("value", [0.0, 0.5, -3.0, 1e-9])
def test_ticks_around_one_value(value):
    values = ticks(value, value)
    assert values[0] <= value <= values[-1]
    assert len(values) >= 2


def test_long_lines_keep_their_mean_and_ends():
    points = [Point(i, float(i % 7)) for i in range(3000)]
    few = thinned(points)
    assert len(few) == 300
    assert np.mean([p.y for p in few]) == pytest.approx(np.mean([p.y for p in points]))
    assert few[0].x < 10
    assert few[-1].x > 2990
    assert thinned(points[:300]) == points[:300]


def test_steps_are_spaced_by_doubling_and_higher_is_higher():
    points = [Point(1, 0.2), Point(2, 0.1), Point(4, 0.4, 0.3, 0.5)]
    picture = svg(Chart("Fréchet", "steps", [Series("teacher", points, "teacher", markers=True)], log2_x=True))
    line = re.search(r'class="line" d="M(.*?)"', picture)[1]
    (x1, y1), (x2, y2), (x4, y4) = (map(float, pair.split()) for pair in line.split("L"))
    assert x2 - x1 == pytest.approx(x4 - x2, abs=0.2)
    assert y4 < y1 < y2  # SVG counts from the top
    assert picture.count('class="interval"') == 1
    assert "teacher, steps 4: 0.4 (0.3 to 0.5)" in picture
    assert "teacher 0.2 at 1, 0.1 at 2, 0.4 at 4" in picture


def test_chart_without_points():
    with pytest.raises(ValueError, match="at least one point"):
        svg(Chart("empty", "x", []))


# --- run folders ----------------------------------------------------------------------------------------------------


def metrics_document(**changes) -> dict:
    """A metrics.json as `dimo distill` writes it: guided teacher, student at one step, real images."""
    draw = np.random.default_rng(0)

    def row(name, kind, steps, evaluations, value, low=None, high=None):
        values = {key: {"mean": 0.9, "low": None, "high": None, "values": [0.9]} for key in METRIC_NAMES}
        values["frechet_pixel"] = {"mean": value, "low": low, "high": high, "values": [value]}
        samples = draw.integers(0, 17, (10, 6, 64)).tolist()
        rate = 1000 / evaluations if evaluations else None
        return {
            "name": name, "kind": kind, "steps": steps, "network_evaluations": evaluations, "images_per_second": rate,
            "metrics": values, "samples": samples,
        }  # fmt: skip

    reveal = draw.integers(0, 17, (10, 3, 64))
    reveal[:, 0], reveal[:, 1, :32] = 17, 17
    rows = [
        row("real images", "real", None, None, 0.068),
        *(row(f"teacher, {s} steps", "teacher", s, 2 * s, value) for s, value in TEACHER.items()),
        row("student before training", "student_before", 1, 1, 0.714),
        row("student, 1 step", "student", 1, 1, 0.1073, 0.0991, 0.1155),
    ]
    return {
        "format": FORMAT, "version": VERSION, "sample_count": 1258, "reference": "test", "rows": rows,
        "reveal": reveal.tolist(), "recipes": {"frechet_pixel": "on the principal components"},
        "config": to_dict(DistillConfig(run=RunConfig(output="runs/x"))), "build": {"torch": "2.13"}, "evaluator": {},
    } | changes  # fmt: skip


def write_log(folder, extra: str = "") -> None:
    lines = [
        {"step": s, "student_divergence": 1 / s, "auxiliary_loss": 1.5, "token_entropy": 1.0, "gradient_norm": 70.0}
        for s in range(10, 101, 10)
    ]
    lines[0]["phase_ms"] = {"student forward": 30.0, "teacher": 10.0}
    lines[4]["frechet_pixel"] = 0.3
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + extra)


def write_checkpoint(folder, config, step: int = 100) -> None:
    save_checkpoint(folder / "checkpoint.safetensors", step, to_dict(config), {"m": torch.nn.Linear(1, 1)}, {})


@pytest.fixture
def run(tmp_path):
    """The folder of a finished run."""
    (tmp_path / "metrics.json").write_text(json.dumps(metrics_document()), encoding="utf-8")
    write_log(tmp_path)
    return tmp_path


class Page(HTMLParser):
    """A page taken apart: its visible text, the same without configurations, tags, what is wrong with it."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html, self.text, self.prose = html, "", ""
        self.open, self.tags, self.problems = [], [], []
        self.feed(html)
        self.close()
        self.problems += [f"{tag} not closed" for tag in self.open]
        self.text, self.prose = (" ".join(text.split()) for text in (self.text, self.prose))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data):
        self.text += "" if "style" in self.open else f" {data}"
        self.prose += "" if {"style", "pre"} & {*self.open} else f" {data}"

    def all(self, name: str) -> list[dict]:
        return [attributes for tag, attributes in self.tags if tag == name]


def page_of(folder) -> Page:
    path = write_page(folder)
    assert path == folder / PAGE
    return Page(path.read_text(encoding="utf-8"))


def assert_self_contained(page: Page) -> None:
    assert page.problems == []
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in ("src", "href", "srcset") or value.startswith("data:"), (name, value)
    assert re.search(r"https?:|url\(|@import", page.html) is None


def assert_readable(page: Page) -> None:
    assert len(page.all("h1")) == 1
    assert all(image["alt"] for image in page.all("img"))
    assert all(picture["aria-label"] for picture in page.all("svg"))
    assert page.all("meta")[1]["content"].startswith("width=device-width")
    assert re.search(r"\b(nan|inf|None|null)\b", page.prose, re.IGNORECASE) is None


# --- the page -------------------------------------------------------------------------------------------------------


def test_page_of_a_finished_run(run):
    page = page_of(run)
    assert_self_contained(page)
    assert_readable(page)
    assert "One network evaluation matches the teacher's 4 guided steps (8 evaluations) by Fréchet" in page.text
    for number in ("0.107 (0.099 to 0.116)", "0.100", "8 times the images a second", "1,258 samples", "0.068"):
        assert number in page.text
    assert "does not reach the teacher's 8 guided steps (16 evaluations): 0.080" in page.text
    for title in (
        "What they draw", "Quality against sampling steps", "Speed at equal quality", "How the teacher samples",
        "Training", "Time of a training step", "All metrics", "Configuration and versions",
    ):  # fmt: skip
        assert title in page.text
    assert "on the principal components" in page.text
    assert "r_init: 0.85" in page.text
    assert "torch: '2.13'" in page.text
    assert "30.0 ms 75%" in page.text
    assert len(page.all("img")) == 7 + 1
    assert len(page.all("svg")) == len(METRIC_NAMES) + 5


def test_every_row_and_metric_is_in_the_table(run):
    page = page_of(run)
    for row in metrics_document()["rows"]:
        assert page.text.count(row["name"]) >= 2  # beside its picture and in the table
    for name in METRIC_NAMES:
        assert METRICS[name].header in page.text


def test_page_is_the_same_for_the_same_run(run):
    first = write_page(run).read_bytes()
    assert write_page(run).read_bytes() == first


def test_pictures_show_the_tokens(run):
    """Each cell of a digit has its grey, [MASK] a colour, the gaps are transparent."""
    document = metrics_document()
    sources = [image["src"] for image in page_of(run).all("img")]
    imread = pytest.importorskip("matplotlib.image").imread

    def read(source, tokens):
        tokens = np.array(tokens)
        pixels = imread(io.BytesIO(base64.b64decode(source.partition("base64,")[2])))
        rows, cols = tokens.shape[:2]
        scale = (pixels.shape[0] + 5) // (9 * rows)
        assert pixels.shape[:2] == ((9 * rows - 1) * scale, (9 * cols - 1) * scale)
        cells = np.pad(pixels[scale // 2 :: scale, scale // 2 :: scale], ((0, 1), (0, 1), (0, 0)))
        cells = cells.reshape(rows, 9, cols, 9, 4).swapaxes(1, 2)
        assert (cells[:, :, 8, :, 3] == 0).all()
        assert (cells[:, :, :8, :8, 3] == 1).all()
        return tokens, cells[:, :, :8, :8].reshape(rows, cols, 64, 4)

    tokens, colors = read(sources[0], document["rows"][0]["samples"])
    greys = [colors[tokens == level][:, :3].mean() for level in range(17)]
    assert greys == sorted(greys)
    assert greys[16] == 1.0
    tokens, colors = read(sources[-1], document["reveal"])
    masked = np.unique(colors[tokens == 17], axis=0)
    assert len(masked) == 1
    assert masked[0, 2] - masked[0, 0] > 0.2  # blue
    assert not (colors[tokens != 17] == masked[0]).all(-1).any()


def test_odd_names_are_shown_as_they_are(tmp_path):
    odd = "<b>&amp;\"'</b><script>"
    folder = tmp_path / "a<i>&b"
    folder.mkdir()
    document = metrics_document(recipes={"frechet_pixel": odd}, reference=odd, build={odd: odd})
    for row in document["rows"]:
        row["name"] += odd
        row["metrics"][odd] = row["metrics"]["recall"]
    (folder / "metrics.json").write_text(json.dumps(document))
    write_log(folder, json.dumps({"step": 101, "warning": [odd], "phase_ms": {odd: 1.0}}) + "\n")
    page = page_of(folder)
    assert_self_contained(page)
    assert page.all("b") == page.all("script") == page.all("i") == []
    assert page.text.count(odd) >= 7 * 2 + 4
    assert "dimo: a<i>&b" in page.text


def test_rows_without_samples_rates_and_some_metrics(tmp_path):
    document = metrics_document(reveal=None, recipes={})
    for row in document["rows"]:
        row["samples"] = row["images_per_second"] = None
        if row["kind"] != "student":
            del row["metrics"]["recall"]
    (tmp_path / "metrics.json").write_text(json.dumps(document))
    page = page_of(tmp_path)
    assert_self_contained(page)
    assert_readable(page)
    assert page.all("img") == []
    for title in ("What they draw", "How the teacher samples", "Speed at equal quality", "Training"):
        assert title not in page.text
    assert "matches the teacher's 4 guided steps" in page.text


def test_a_table_without_a_contrast(tmp_path):
    """As `dimo evaluate` writes it for one model."""
    document = metrics_document(rows=[metrics_document()["rows"][i] for i in (0, 2)])
    (tmp_path / "metrics.json").write_text(json.dumps(document))
    page = page_of(tmp_path)
    assert_readable(page)
    assert "Measured: teacher, 2 steps" in page.text
    assert "One network evaluation" not in page.text


# --- unfinished runs ------------------------------------------------------------------------------------------------


def test_run_in_progress(tmp_path, monkeypatch):
    """Curves and the checkpoint's configuration, what is to come, and no need of the picture library."""
    monkeypatch.setitem(sys.modules, "matplotlib.image", None)
    write_log(tmp_path, '{"step": 110, "student_div')
    write_checkpoint(tmp_path, DistillConfig(run=RunConfig(output="x", steps=900)))
    page = page_of(tmp_path)
    assert_self_contained(page)
    assert_readable(page)
    assert "Distillation: step 100 of 900" in page.text
    assert "Still to come: the rest of the training" in page.text
    assert "the contrast of teacher and student follow when the run has ended" in page.text
    assert "r_init: 0.85" in page.text
    assert len(page.all("svg")) == 5


def test_run_before_its_first_checkpoint(tmp_path):
    write_log(tmp_path)
    page = page_of(tmp_path)
    assert_readable(page)
    assert "Training: step 100" in page.text
    assert "The configuration comes with the first checkpoint." in page.text


def test_run_of_another_teacher(tmp_path):
    write_log(tmp_path)
    config = DistillConfig(run=RunConfig(output="x", steps=100), teacher=TeacherConfig(kind="maskgit", path="m"))
    write_checkpoint(tmp_path, config)
    page = page_of(tmp_path)
    assert "Metrics exist for the digits alone" in page.text
    assert "Still to come" not in page.text


def test_pretraining(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 5, "loss": 2.5, "validation_loss": 2.6, "gradient_norm": 1}\n')
    write_checkpoint(tmp_path, PretrainConfig(run=RunConfig(output="x", steps=5)), step=5)
    page = page_of(tmp_path)
    assert_readable(page)
    assert "Pretraining: step 5 of 5" in page.text
    assert "follow" not in page.text
    assert len(page.all("svg")) == 3


def test_values_that_are_not_finite_are_left_out(tmp_path):
    write_log(tmp_path, '{"step": 101, "frechet_pixel": NaN, "token_entropy": Infinity, "gradient_norm": null}\n')
    page = page_of(tmp_path)
    assert_readable(page)
    assert all("nan" not in picture["aria-label"].lower() for picture in page.all("svg"))
    assert re.search(r"[ML ](nan|inf)", page.html) is None


# --- broken and foreign files ---------------------------------------------------------------------------------------


def change(**entries):
    return json.dumps(metrics_document(**entries))


def change_row(**entries):
    document = metrics_document()
    document["rows"][-1] |= entries
    return json.dumps(document)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "expected format 'dimo.metrics', version 1, got None, version None"),
        (json.dumps({"rows": {}, "config": {}}), "expected format 'dimo.metrics'"),
        (change(version=2), "got 'dimo.metrics', version 2"),
        (change(rows={"a": 1}), "unusable entries"),
        (change(sample_count="many"), "unusable entries"),
        (change(config=3), "expected a configuration"),
        (change(recipes=[1]), "unusable entries"),
        (change_row(kind="teecher"), "kind: expected one of real, teacher, student_before, student, got 'teecher'"),
        (change_row(steps=None), "steps: expected an integer >= 1, got None"),
        (change_row(images_per_second="fast"), "images_per_second: expected a finite number, got 'fast'"),
        (change_row(metrics={"recall": {"mean": None}}), "recall: expected a mean, and both ends"),
        (change_row(metrics={"recall": {"mean": 1, "low": 0.5}}), "recall: expected a mean, and both ends"),
        (change_row(samples=[[[1, 2]]]), "samples: expected tokens 0..17 of shape"),
        (change_row(samples=[[[99] * 64]]), "samples: expected tokens 0..17 of shape"),
    ],
)
def test_broken_metrics_are_one_error(content, message, run):
    before = write_page(run).read_bytes()
    (run / "metrics.json").write_text(content)
    with pytest.raises(CheckpointError) as caught:
        write_page(run)
    assert message in str(caught.value)
    assert str(run) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (run / PAGE).read_bytes() == before


def test_broken_log_and_checkpoint_are_one_error(run):
    (run / "log.jsonl").write_text("x\ny\n")
    with pytest.raises(CheckpointError, match=r"log\.jsonl, line 1"):
        write_page(run)
    write_log(run)
    (run / "checkpoint.safetensors").write_bytes(b"abc")
    with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors: truncated or not a checkpoint"):
        write_page(run)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match="expected the folder of a run"):
            write_page(folder)
    assert list(tmp_path.iterdir()) == []


def test_results_are_read_back(run):
    read = read_results(run / "metrics.json")
    assert [row.kind for row in read.rows] == ["real", *["teacher"] * 4, "student_before", "student"]
    assert read.one_step_student.metrics["frechet_pixel"] == Interval(0.1073, 0.0991, 0.1155)
    assert read.rows[1].samples.tolist() == metrics_document()["rows"][1]["samples"]
    assert read.reveal.shape == (10, 3, 64)
