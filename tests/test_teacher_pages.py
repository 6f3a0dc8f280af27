"""docs/teachers: every command as written, on tiny checkpoints in the released layouts and under the released names."""

import base64
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import dimo
from dimo import cli
from dimo.checkpoint import load_model
from dimo.teachers import HaltonTeacher, MaskGITTeacher
from tests.golden import FIXTURES

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "teachers"
TINY = ["--run.steps", "5", "--run.batch-size", "4", "--run.preview-every", "5"]
FILES = {
    "maskgit": {
        "MaskGIT_ImageNet_256.pth": "maskgit/MaskGIT_tiny.pth",
        "last.ckpt": "vqgan/last.ckpt",
        "pytorch_model.bin": "maskgit/dimo_generator/pytorch_model.bin",
    },
    "halton": {"ImageNet_384_large.pth": "halton/ImageNet_tiny.pth", "vq_ds16_c2i.pt": "halton/vq_ds16_c2i.pt"},
}
GRIDS = {"teacher.png": (7, 8), "sweep.png": (9, 8), "student.png": (7, 8), "released.png": (7, 8)}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (PAGES / f"{page}.md").read_text(encoding="utf-8"), re.DOTALL)


def clip_classes(arguments: list[str]) -> list[str]:
    """The tiny models have 7 classes in the place of 1,000."""
    if "--classes" not in arguments:
        return arguments
    start = arguments.index("--classes") + 1
    end = next((i for i in range(start, len(arguments)) if arguments[i].startswith("--")), len(arguments))
    return arguments[:start] + [str(int(c) % 7) for c in arguments[start:end]] + arguments[end:]


@pytest.fixture(scope="module", params=list(FILES))
def workplace(request, tmp_path_factory):
    """A folder in which all commands of a page were run, and what they printed."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "weights").mkdir()
    for name, source in FILES[request.param].items():
        shutil.copy(FIXTURES / source, folder / "weights" / name)
    shutil.copytree(ROOT / "configs", folder / "configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for kind in (MaskGITTeacher, HaltonTeacher):  # the tiny width counts as a published one
            patch.setattr(kind, "heads_by_width", kind.heads_by_width | {32: 4})
        for line in "".join(blocks(request.param, "sh")).splitlines():
            command, *arguments = clip_classes(shlex.split(line))
            assert command == "dimo"
            tiny = TINY if arguments[0] in ("distill", "doctor") else []
            assert cli.main([*arguments, *tiny]) == 0, line
    return request.param, folder


def test_teachers_and_students_are_written(workplace):
    kind, folder = workplace
    teacher, entries = load_model(folder / "teachers" / kind)
    assert (teacher.kind, entries["format"]) == (kind, "dimo.teacher")
    assert entries["provenance"]["converted"]["path"].startswith("weights/")
    (run,) = (folder / "runs").iterdir()
    student, entries = load_model(run / "student")
    assert (student.kind, entries["format"]) == (kind, "dimo.one_step_generator")
    assert entries["sampling"]["r_init"] == 0.6
    assert entries["recipe"]["teacher"]["path"] == f"./teachers/{kind}"


def test_five_steps_train_what_the_recipe_trains(workplace):
    """Losses are finite, the student's average has left the teacher, and its frozen parts have not."""
    kind, folder = workplace
    (run,) = (folder / "runs").iterdir()
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 5
    assert all(abs(log[-1][name]) < 100 for name in ("student_divergence", "auxiliary_loss", "gradient_norm"))
    teacher, student = load_model(folder / "teachers" / kind)[0], load_model(run / "student")[0]
    moved = {n for n, p in student.named_parameters() if not torch.equal(p, teacher.get_parameter(n))}
    frozen = set(teacher.frozen_parameters())
    assert frozen
    assert not moved & frozen
    assert len(moved) > 0.9 * (len(list(student.parameters())) - len(frozen))


def test_pictures_have_the_promised_rows_and_columns(workplace):
    _, folder = workplace
    (run,) = (folder / "runs").iterdir()
    for path in [*folder.glob("*.png"), run / "comparison.png"]:
        rows, columns = GRIDS.get(path.name, (3, 7))
        with Image.open(path) as picture:
            assert picture.size[1] == rows * 50 - 2
            assert picture.size[0] > columns * 50 - 2  # the labels stand before them


def test_the_report_shows_the_pictures(workplace):
    _, folder = workplace
    (run,) = (folder / "runs").iterdir()
    page = (run / "report.html").read_text(encoding="utf-8")
    picture = base64.b64encode((run / "comparison.png").read_bytes()).decode()
    assert f'<img src="data:image/png;base64,{picture}" alt="Samples of the teacher and of the student' in page


def test_the_released_generator_is_called_as_the_page_says(workplace, monkeypatch):
    kind, folder = workplace
    if kind == "halton":
        assert not blocks("halton", "python")
        return
    monkeypatch.chdir(folder)
    (snippet,) = blocks(kind, "python")
    names = {}
    exec(compile(snippet, "maskgit.md", "exec"), names)
    assert [(p.mode, p.size) for p in names["pictures"]] == [("RGB", (8, 8))] * 3
    assert len(names["better"]) == 3
    assert len(list((folder / "released").glob("seed0000000?_class000[14].png"))) == 8


def test_the_example_of_ones_own_teacher_runs_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (snippet,) = blocks("own", "python")
    names = {}
    try:
        exec(compile(snippet, "own.md", "exec"), names)
    finally:
        dimo.TEACHERS.pop("mine", None)
    assert names["images"].shape == (5, 1, 4, 4)
    assert 0 <= names["images"].min() <= names["images"].max() <= 1
    assert {path.name for path in Path("runs/mine/student").iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("page", ["maskgit", "halton", "own"])
def test_links_and_files_of_the_pages_exist(page):
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
        assert (PAGES / target).is_file()
    for path in re.findall(r"\b(?:configs/[a-z_0-9]+\.yaml|python/dimo/[\w/]+\.py)", text):
        assert (ROOT / path).is_file()
