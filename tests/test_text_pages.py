"""docs/teachers of the text-conditional and text teachers: every command as written, on tiny released folders."""

import json
import math
import re
import shlex

import pytest
import torch
from PIL import Image

from dimo import cli
from dimo.checkpoint import load_model
from tests.golden import FIXTURES
from tests.released import gpt2_like, released, text_encoder
from tests.test_teacher_pages import PAGES, ROOT, TINY, blocks

pytest.importorskip("diffusers", reason="image tokenisers and aMUSEd need dimo-ext[hub]")

WIDTHS = {"meissonic": (24, 32), "amused": (20, 24)}  # of text states and pooled vector
SHORT = {"meissonic": ["--teacher.grid-size", "8"], "amused": [], "mdlm": []}
PICTURES = {"teacher.png": (10, 2), "sweep.png": (4, None), "released.png": (1, 4)}


def write_files(kind, folder):
    """What the page says to put into weights/, and a file of prompts."""
    if kind == "mdlm":
        released("mdlm", folder / "weights" / "mdlm")
        gpt2_like(folder / "weights" / "gpt2", 28)
        return
    states, pooled = WIDTHS[kind]
    text_encoder(released(kind, folder / "weights" / kind), states=states, pooled=pooled, positions=256)
    bare = released(kind, folder / "weights" / f"dimo_{kind}")
    for part in ("vqvae", "scheduler"):
        for path in (bare / part).iterdir():
            path.unlink()
        (bare / part).rmdir()
    (folder / "prompts.txt").write_text("a red fox\na harbour at dawn\n")


def shortened(kind, line):
    """The command with what makes it tiny: few steps of training, a small grid."""
    command, *arguments = shlex.split(line)
    assert command == "dimo"
    if arguments[0] in ("distill", "doctor"):
        prompts = [] if kind == "mdlm" else ["--prompts.cache", "cache"]
        return [*arguments, *TINY, "--run.accumulation-steps", "2", *prompts]
    return [*arguments, *(SHORT[kind] if arguments[0] == "convert" else [])]


@pytest.fixture(scope="module", params=["meissonic", "amused", "mdlm"])
def workplace(request, tmp_path_factory):
    """A folder in which all commands of a page were run, and what they printed."""
    kind, folder, printed = request.param, tmp_path_factory.mktemp(request.param), {}
    write_files(kind, folder)
    (folder / "configs").mkdir()
    (folder / "configs" / f"{kind}.yaml").write_text((ROOT / "configs" / f"{kind}.yaml").read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "200")
        for line in "".join(blocks(kind, "sh")).splitlines():
            lines = []
            patch.setattr("builtins.print", lambda *values, lines=lines, **_: lines.append(" ".join(map(str, values))))
            assert cli.main(shortened(kind, line)) == 0, line
            printed[line] = "\n".join(lines)
    return kind, folder, printed


def test_teachers_and_students_are_written(workplace):
    kind, folder, _ = workplace
    teacher, entries = load_model(folder / "teachers" / kind)
    assert (teacher.kind, entries["format"]) == (kind, "dimo.teacher")
    assert entries["provenance"]["converted"]["path"] == f"weights/{kind}"
    student, entries = load_model(folder / "runs" / kind / "student")
    assert (student.kind, entries["format"]) == (kind, "dimo.one_step_generator")
    assert entries["sampling"]["r_init"] == {"meissonic": 0.5, "amused": 0.5, "mdlm": 0.6}[kind]
    assert student.decodes
    if kind == "mdlm":
        return
    assert {"text_encoder", "tokenizer"} < {path.name for path in (folder / "runs" / kind / "student").iterdir()}
    assert student.settings == teacher.settings
    assert set(entries["provenance"]) == {"teacher_weights", "prompts"}


def test_five_steps_train_what_the_recipe_trains(workplace):
    """Losses are finite, the student's average has left the teacher, and its frozen parts have not."""
    kind, folder, _ = workplace
    log = [json.loads(line) for line in (folder / "runs" / kind / "log.jsonl").read_text().splitlines()]
    last = [line for line in log if "student_divergence" in line][-1]
    assert last["step"] == 5
    assert all(math.isfinite(last[name]) for name in ("student_divergence", "auxiliary_loss", "gradient_norm"))
    teacher = load_model(folder / "teachers" / kind)[0]
    student = load_model(folder / "runs" / kind / "student")[0]
    moved = {n for n, p in student.named_parameters() if not torch.equal(p, teacher.get_parameter(n))}
    frozen = set(teacher.frozen_parameters())
    assert frozen
    assert not moved & frozen
    assert len(moved) > 0.8 * (len(list(student.parameters())) - len(frozen))


def test_pictures_have_the_promised_rows_and_columns(workplace):
    kind, folder, _ = workplace
    paths = list(folder.glob("*.png"))
    assert len(paths) == {"meissonic": 3, "amused": 2, "mdlm": 0}[kind]
    for path in paths:
        rows, columns = PICTURES[path.name]
        with Image.open(path) as picture:
            assert picture.size[1] == rows * 50 - 2
            assert picture.size[0] > (columns or 2) * 50 - 2  # the labels stand before them
    if kind != "mdlm":
        names = sorted(path.name for path in (folder / "student").iterdir())
        assert names == [f"seed0000000{n}_prompt000{n // 2}.png" for n in range(4)]
        with Image.open(folder / "student" / names[2]) as picture:
            assert picture.text["prompt"] == "a harbour at dawn"
        with Image.open(folder / "runs" / kind / "comparison.png") as picture:
            assert picture.size[1] == 3 * 50 - 2


def test_texts_come_with_their_entropy(workplace):
    kind, folder, printed = workplace
    if kind != "mdlm":
        return
    for name, lines in {"teacher": 8, "sweep": 48, "student": 8, "few": 24}.items():
        samples = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        assert len(samples) == lines
        assert all(0 <= s["entropy"] <= torch.tensor(12.0).log() + 1e-6 for s in samples)
        assert all(isinstance(s["text"], str) for s in samples)
        (output,) = (text for line, text in printed.items() if f"{name}.jsonl" in line)
        assert len(re.findall(r": 8 texts, entropy \d\.\d{3} nats \(least \d\.\d{3}\)", output)) == lines // 8
    log = (folder / "runs" / "mdlm" / "log.jsonl").read_text()
    assert "sequence_entropy" in log
    comparison = [json.loads(x) for x in (folder / "runs" / "mdlm" / "comparison.jsonl").read_text().splitlines()]
    assert {s["setting"] for s in comparison} == {"teacher, 16 steps", "teacher, 1 step", "student, 1 step"}


def test_the_memory_estimate_knows_the_model(workplace):
    *_, printed = workplace
    (output,) = (text for line, text in printed.items() if " doctor " in line)
    for part in ("teacher", "auxiliary's optimiser states", "activations", "logits and their gradients", "in all"):
        assert re.search(rf"^{part} +\d+\.\d\d GiB", output, re.MULTILINE), output


def test_the_python_of_the_page_runs(workplace, monkeypatch):
    kind, folder, _ = workplace
    if kind == "amused":
        assert not blocks(kind, "python")
        return
    monkeypatch.chdir(folder)
    (snippet,) = blocks(kind, "python")
    names = {}
    exec(compile(snippet, f"{kind}.md", "exec"), names)
    if kind == "meissonic":
        assert [(p.mode, p.size) for p in names["pictures"]] == [("RGB", (16, 16))] * 2
        assert len(names["better"]) == 2
    else:
        assert [type(text) for text in names["texts"]] == [str] * 4
        assert len(names["more"]) == 4
        assert names["entropy"].shape == (4,)


@pytest.mark.parametrize("page", ["meissonic", "amused", "mdlm"])
def test_links_and_files_of_the_pages_exist(page):
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
        assert (PAGES / target).is_file()
    for path in re.findall(r"\b(?:configs/[a-z_0-9]+\.yaml|tests/\w+\.py)", text):
        assert (ROOT / path).is_file()
    assert FIXTURES.joinpath(page).is_dir()
