"""`dimo sample`: pictures that their seeds decide, whatever the batches and processes; grids, folders, sweeps."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dimo
import dimo_ext
from dimo import cli
from dimo.checkpoint import save_model
from dimo.config import ConfigError, SampleConfig, SamplingConfig, SweepConfig
from dimo.generator import OneStepGenerator
from dimo.pictures import grid, to_pil
from dimo.sample import write_samples
from dimo.samplers import sample_halton
from tests.golden import FIXTURES


@pytest.fixture(scope="module")
def model():
    """A teacher of 7 classes, pictures of 8 by 8 pixels."""
    path = FIXTURES / "maskgit" / "MaskGIT_tiny.pth"
    return dimo.load_teacher("maskgit", path, tokenizer=FIXTURES / "vqgan", heads=4)


@pytest.fixture(scope="module")
def teacher(model, tmp_path_factory) -> str:
    return str(save_model(tmp_path_factory.mktemp("models") / "teacher", model, cli.TEACHER_FORMAT))


@pytest.fixture(scope="module")
def student(model, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "student"
    OneStepGenerator(model, SamplingConfig(r_init=0.6)).save_pretrained(folder)
    return str(folder)


def drawn(folder: Path) -> dict[str, np.ndarray]:
    pictures = {}
    for path in sorted(folder.iterdir()):
        with Image.open(path) as picture:
            pictures[path.name] = np.asarray(picture)
    return pictures


def assert_same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """The same tokens; other batches may round the decoder's pixels another way, by one of 255."""
    assert actual.keys() == expected.keys()
    for name, picture in actual.items():
        assert np.abs(picture.astype(int) - expected[name].astype(int)).max() <= 1


def sample(tmp_path: Path, name: str = "out", **settings) -> Path:
    return write_samples(SampleConfig(**{"output": str(tmp_path / name), "device": "cpu", "steps": 3, **settings}))


# --- folders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_a_folder_holds_a_picture_a_sample(kind, request, tmp_path):
    folder = sample(tmp_path, model=request.getfixturevalue(kind), classes=(5, 2), per_class=2, seed=9)
    pictures = drawn(folder)
    names = ["seed00000009_class0005", "seed00000010_class0005", "seed00000011_class0002", "seed00000012_class0002"]
    assert list(pictures) == [f"{name}.png" for name in names]
    assert {picture.shape for picture in pictures.values()} == {(8, 8, 3)}
    assert len({picture.tobytes() for picture in pictures.values()}) == 4


@pytest.mark.parametrize(
    "settings", [{"sampler": "ancestral"}, {"sampler": "confident"}, {"sampler": "halton"}, {"guidance_scale": 3.0}]
)
def test_batches_change_nothing(settings, teacher, tmp_path):
    common = {"model": teacher, "classes": (0, 3, 6), "per_class": 3, **settings}
    whole = drawn(sample(tmp_path, "whole", batch_size=9, **common))
    for size in (1, 2, 4):
        assert_same(drawn(sample(tmp_path, f"by{size}", batch_size=size, **common)), whole)


def test_a_seed_and_a_class_draw_a_picture_again(student, tmp_path):
    whole = drawn(sample(tmp_path, "whole", model=student, classes=(1, 4), per_class=3, seed=20))
    again = drawn(sample(tmp_path, "again", model=student, classes=(4,), per_class=1, seed=24))
    assert_same(again, {"seed00000024_class0004.png": whole["seed00000024_class0004.png"]})


def test_another_process_draws_the_same(teacher, tmp_path):
    here = drawn(sample(tmp_path, "here", model=teacher, classes=(1,), per_class=4))
    flags = f"--model {teacher} --classes 1 --per-class 2 --steps 3 --device cpu --output {tmp_path / 'there'}".split()
    for seed in ("0", "2"):
        command = [sys.executable, "-W", "ignore", "-m", "dimo.cli", "sample", *flags, "--seed", seed]
        subprocess.run(command, check=True, capture_output=True, timeout=120, cwd=tmp_path)
    assert_same(drawn(tmp_path / "there"), here)


def test_a_picture_tells_its_settings(teacher, tmp_path):
    folder = sample(tmp_path, model=teacher, classes=(1,), per_class=1, guidance_scale=2.5)
    with Image.open(next(folder.iterdir())) as picture:
        settings = json.loads(picture.text["dimo"])
    assert (settings["model"], settings["guidance_scale"], settings["steps"]) == (teacher, 2.5, 3)


def test_samples_are_those_of_the_sampler(model, teacher, tmp_path):
    folder = sample(tmp_path, model=teacher, sampler="halton", classes=(2,), per_class=3, temperature=0.8, seed=4)
    keys = dimo_ext.random_key([4, 5, 6])
    tokens = sample_halton(model, torch.tensor([2, 2, 2]), steps=3, temperature=0.8, key=keys)
    expected = {f"seed{4 + i:08d}_class0002.png": np.asarray(p) for i, p in enumerate(to_pil(model.decode(tokens)))}
    assert_same(drawn(folder), expected)


# --- grids and sweeps -----------------------------------------------------------------------------------------------


def test_a_grid_has_a_row_a_class(teacher, tmp_path):
    path = sample(tmp_path, "grid.png", model=teacher, classes=(5, 2), per_class=3)
    alone = list(drawn(sample(tmp_path, "alone", model=teacher, classes=(5, 2), per_class=3)).values())
    pictures = [Image.fromarray(picture) for picture in alone]
    expected = np.asarray(grid([pictures[:3], pictures[3:]], ["5", "2"]))
    with Image.open(path) as picture:
        np.testing.assert_array_equal(np.asarray(picture), expected)


def test_every_class_is_shown_or_ten_spread_over_many(teacher, tmp_path):
    names = drawn(sample(tmp_path, model=teacher, per_class=1))
    assert [name[-8:-4] for name in names] == [f"{c:04d}" for c in range(7)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"grid_size": 4, "vocab_size": 24, "num_classes": 1000, "width": 16, "depth": 1, "heads": 1}
        large = dimo.TEACHERS["maskgit"].build(sizes | {"mlp_width": 8})
    large.attach(dimo.load_teacher(teacher).tokenizer)
    save_model(tmp_path / "large", large, cli.TEACHER_FORMAT)
    names = drawn(sample(tmp_path, "spread", model=str(tmp_path / "large"), per_class=1))
    assert [name[-8:-4] for name in names] == [f"{c:04d}" for c in range(0, 1000, 100)]


def test_a_sweep_has_a_row_a_setting_with_the_same_seeds(teacher, tmp_path):
    common = {"model": teacher, "classes": (1, 2), "per_class": 2, "seed": 3}
    sweep = SweepConfig(guidance_scale=(1.0, 4.0), steps=(2, 5))
    path = sample(tmp_path, "sweep.png", **common, sweep=sweep)
    rows, labels = [], []
    for guidance in (1.0, 4.0):
        for steps in (2, 5):
            one = sample(tmp_path, f"{guidance}{steps}", **common | {"guidance_scale": guidance, "steps": steps})
            rows.append([Image.fromarray(picture) for picture in drawn(one).values()])
            labels.append(f"guidance scale {guidance:g}, steps {steps}")
    with Image.open(path) as picture:
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(grid(rows, labels)))
    assert len({b"".join(p.tobytes() for p in row) for row in rows}) == 4


def test_a_student_sweeps_over_temperatures_and_steps(student, tmp_path):
    path = sample(tmp_path, "s.png", model=student, sweep=SweepConfig(temperature=(0.0, 1.0), steps=(1, 3)))
    with Image.open(path) as picture:
        assert picture.size[1] == 4 * 50 - 2


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": (7,)}, r"classes: expected numbers in \[0, 7\), got 7"),
        ({"classes": (-1,)}, r"classes: expected numbers in \[0, 7\), got -1"),
        ({"sweep": SweepConfig(steps=(1, 2))}, r"output: expected a path that ends in \.png for a sweep"),
        ({"sweep": SweepConfig(temperature=(-1.0,)), "output": "a.png"}, "temperature: expected None or a finite"),
        ({"batch_size": 0}, "batch_size: expected an integer >= 1, got 0"),
        ({"sampler": "confident", "temperature": 0.0}, "temperature: expected a number > 0 for the confident"),
    ],
)
def test_settings_that_cannot_be(settings, message, teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        sample(tmp_path, model=teacher, **settings)
    assert not any(tmp_path.rglob("*.png"))


def test_a_student_takes_no_guidance(student, tmp_path):
    for settings in ({"guidance_scale": 2.0}, {"output": "a.png", "sweep": SweepConfig(guidance_scale=(1.0, 2.0))}):
        with pytest.raises(ConfigError, match="guidance_scale: expected 1 for a student, which has learnt it, got 2"):
            sample(tmp_path, model=student, **settings)


def test_a_model_without_tokeniser_has_no_pictures(tmp_path):
    bare = dimo.TEACHERS["halton"].build({"grid_size": 2, "vocab_size": 5, "width": 4, "depth": 1, "heads": 1})
    save_model(tmp_path / "bare", bare, cli.TEACHER_FORMAT)
    with pytest.raises(ConfigError, match=r"model: expected one with a tokeniser, .*bare of kind 'halton' has none"):
        sample(tmp_path, model=str(tmp_path / "bare"))
