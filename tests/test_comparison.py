"""Rows of the digits' table: seeds, timing, intervals, and the files that a comparison leaves."""

import json

import pytest
import torch

from dimo import comparison
from dimo.comparison import Sampler, compare, measure, metrics_document, real_row, table
from dimo.config import DistillConfig, EvaluateConfig, MethodConfig, ReportConfig, RunConfig
from dimo.data.digits import load_digits_split
from dimo.evaluation import METRICS, recipes
from dimo.generator import OneStepGenerator, labels_per_class
from dimo.page.results import read_results
from dimo.samplers import sample_one_step
from dimo.teachers import DigitsTeacher

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

CPU = torch.device("cpu")
MASK = 17


class StubEvaluator:
    """Asks for 20 samples a class, several batches in all; its "metrics" tell samples, labels and reference apart."""

    def sample_labels(self):
        return labels_per_class(10, 20)

    def __call__(self, tokens, labels, reference):
        assert labels.tolist() == self.sample_labels().tolist()
        value = tokens.double() @ torch.arange(64.0).double() @ torch.arange(200.0).double() / 1e9 + len(reference)
        return {key: value.item() + i for i, key in enumerate(METRICS)}

    def floor(self, reference):
        return {key: i + 0.25 for i, key in enumerate(METRICS)}

    def describe(self, reference):
        return {"reference": {"count": 359}, "versions": {"torch": torch.__version__}}


@pytest.fixture(scope="module")
def evaluator():
    return StubEvaluator()


@pytest.fixture(scope="module")
def model():
    """A digits teacher of width 16 with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DigitsTeacher.build({"width": 16, "depth": 1, "heads": 2, "mlp_width": 32, "dropout": 0.0})
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


def sampler(draw, name="student, 1 step"):
    return Sampler(name, "student", 1, 1, draw)


def one_step(model):
    return sampler(lambda labels, keys: sample_one_step(model, labels, MethodConfig(), key=keys))


# --- measure --------------------------------------------------------------------------------------------------------


def test_row_holds_every_seeds_values_their_mean_and_interval(evaluator, model):
    row = measure(one_step(model), evaluator, "validation", CPU, seeds=(0, 1, 2))
    assert (row["name"], row["kind"], row["steps"], row["network_evaluations"]) == ("student, 1 step", "student", 1, 1)
    assert list(row["metrics"]) == list(METRICS)
    assert row["images_per_second"] > 0
    for value in row["metrics"].values():
        assert len(value["values"]) == 3
        assert value["low"] <= value["mean"] <= value["high"]
        assert value["mean"] == pytest.approx(sum(value["values"]) / 3)
    assert row["metrics"]["frechet_pixel"]["low"] < row["metrics"]["frechet_pixel"]["high"]


def test_seeds_are_those_of_single_measurements(evaluator, model):
    both = measure(one_step(model), evaluator, "validation", CPU, seeds=(3, 4))
    for i, seed in enumerate((3, 4)):
        single = measure(one_step(model), evaluator, "validation", CPU, seeds=(seed,))
        assert {k: v["values"] for k, v in single["metrics"].items()} == {
            k: v["values"][i : i + 1] for k, v in both["metrics"].items()
        }
        assert all((v["low"], v["high"]) == (None, None) for v in single["metrics"].values())
    assert both["samples"] == measure(one_step(model), evaluator, "validation", CPU, seeds=(3,))["samples"]


def test_samples_are_the_first_of_each_class(evaluator):
    """The metrics are those of what was drawn, in the order of the labels."""
    drawn = []

    def draw(labels, keys):
        assert len(labels) == len(keys)
        drawn.append(torch.randint(0, 17, (len(labels), 64)))
        return drawn[-1]

    row = measure(sampler(draw), evaluator, "test", CPU, seeds=(0,))
    tokens = torch.cat(drawn)
    assert [len(part) for part in drawn] == [64, 64, 64, 8]
    assert {k: v["mean"] for k, v in row["metrics"].items()} == evaluator(tokens, labels_per_class(10, 20), "test")
    assert torch.equal(torch.tensor(row["samples"]), tokens.unflatten(0, (10, 20))[:, :6])


def test_every_sample_has_a_key_of_its_own(evaluator):
    keys = []

    def draw(labels, batch):
        keys.extend(map(tuple, batch.tolist()))
        return torch.randint(0, 17, (len(labels), 64))

    measure(sampler(draw), evaluator, "test", CPU, seeds=(0, 1))
    assert len(set(keys)) == 400


def test_rate_leaves_out_the_first_batch(evaluator, monkeypatch):
    """A first batch of 100 s does not count, the other 136 samples in 6 s do."""
    ticks = iter([0.0, 100.0, 200.0, 202.0, 300.0, 302.0, 400.0, 402.0])
    monkeypatch.setattr(comparison.time, "perf_counter", lambda: next(ticks))
    row = measure(sampler(lambda labels, _: torch.zeros(len(labels), 64, dtype=int)), evaluator, "test", CPU, (0,))
    assert row["images_per_second"] == pytest.approx(136 / 6)


def test_real_row_is_the_floor(evaluator):
    row = real_row(evaluator, "test")
    assert {key: value["mean"] for key, value in row["metrics"].items()} == evaluator.floor("test")
    assert (row["kind"], row["steps"], row["network_evaluations"], row["images_per_second"]) == ("real", *[None] * 3)
    test = load_digits_split("test")
    assert row["samples"][3][0] == test.tokens[test.labels == 3][0].tolist()


# --- the table ------------------------------------------------------------------------------------------------------


def test_table_shows_half_widths_recipes_and_versions(evaluator, model):
    rows = [real_row(evaluator, "test"), measure(one_step(model), evaluator, "test", CPU, seeds=(0, 1))]
    document = metrics_document(rows, EvaluateConfig(), evaluator, "test")
    value = rows[1]["metrics"]["recall"]
    assert value["high"] > value["low"]
    assert value["mean"] != pytest.approx(rows[0]["metrics"]["recall"]["mean"], abs=1e-3)
    for style in ("plain", "markdown"):
        text = table(document, style)
        head, caption = text.split("\n\n")
        assert f"{value['mean']:.3f} ± {(value['high'] - value['low']) / 2:.3f}" in head
        assert f"{rows[0]['metrics']['recall']['mean']:.3f} " in head
        assert all(f"{METRICS[key].title}: {recipe}" in caption for key, recipe in recipes().items())
        assert "200 samples a seed against the 359 test images" in caption
        assert f"torch {torch.__version__}" in caption
        assert len(caption.splitlines()) == len(METRICS) + 2


# --- compare --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(evaluator, model, tmp_path_factory):
    """The folder of a comparison, its metrics.json and the text it returned."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "log.jsonl").write_text('{"step": 1, "student_divergence": 1.0}\n')
    settings = ReportConfig(teacher_steps=(1, 2), few_steps=(2,), sampling_seeds=2)
    config = DistillConfig(run=RunConfig(output=str(folder)), report=settings)
    text = compare(model, OneStepGenerator(model, config.method), config, evaluator)
    return folder, json.loads((folder / "metrics.json").read_text(encoding="utf-8")), text


def test_comparison_has_a_row_for_each_sampler(compared):
    _, document, _ = compared
    rows = [(r["name"], r["kind"], r["steps"], r["network_evaluations"]) for r in document["rows"]]
    assert rows == [
        ("real images (floor)", "real", None, None),
        ("teacher, 1 step", "teacher", 1, 2),
        ("teacher, 2 steps", "teacher", 2, 4),
        ("student before training", "student_before", 1, 1),
        ("student, 1 step", "student", 1, 1),
        ("student, 2 steps", "student", 2, 2),
    ]
    seeds = [len(row["metrics"]["recall"]["values"]) for row in document["rows"]]
    assert seeds == [1, 1, 1, 1, 2, 2]
    # here the student is the untrained teacher: the first of its seeds is the row before training
    before, after = document["rows"][3:5]
    assert before["metrics"]["recall"]["mean"] == after["metrics"]["recall"]["values"][0]
    assert before["samples"] == after["samples"]


def test_comparison_keeps_what_is_needed_to_read_it(compared, evaluator):
    _, document, _ = compared
    assert (document["format"], document["version"]) == ("dimo.metrics", 1)
    assert (document["sample_count"], document["reference"]) == (200, "test")
    assert document["recipes"] == recipes()
    assert document["config"]["report"]["few_steps"] == [2]
    assert document["evaluator"] == evaluator.describe("test")
    assert "operators" in document["build"]


def test_reveal_goes_from_masks_to_a_sample(compared):
    states = torch.tensor(compared[1]["reveal"])
    assert states.shape == (10, 17, 64)
    masked = states == MASK
    assert masked[:, 0].all()
    assert not masked[:, -1].any()
    for before, after in zip(states.unbind(1), states.unbind(1)[1:], strict=False):
        assert torch.equal(before[before != MASK], after[before != MASK])


def test_comparison_can_be_read_back(compared):
    folder, document, _ = compared
    results = read_results(folder / "metrics.json")
    assert [row.name for row in results.rows] == [row["name"] for row in document["rows"]]
    assert results.one_step_student.metrics["recall"].low == document["rows"][4]["metrics"]["recall"]["low"]


def test_comparison_leaves_tables_and_pictures(compared):
    folder, document, text = compared
    assert {path.name for path in folder.iterdir()} == {
        "comparison.png", "curves.png", "log.jsonl", "metrics.json", "student.png", "table.md",
    }  # fmt: skip
    written = (folder / "table.md").read_text(encoding="utf-8")
    assert written.startswith("| sampler ")
    assert all(row["name"] in text and row["name"] in written for row in document["rows"])
    assert text == table(document)
