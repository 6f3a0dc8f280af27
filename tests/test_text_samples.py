"""`dimo sample`, `distill` and the generator's call with prompts and texts; bad input; a missing extra."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import dimo
import dimo_ext
from dimo import cli
from dimo.checkpoint import save_model
from dimo.config import ConfigError, SampleConfig, SamplingConfig, SweepConfig
from dimo.sample import write_samples
from dimo.state_dicts import CheckpointError, build_on_meta
from dimo.teachers import AmusedTeacher, MDLMTeacher, MeissonicTeacher
from dimo.texts import sequence_entropy
from tests.released import gpt2_like, released, text_encoder

SAMPLING = SamplingConfig(r_init=0.5, embedding_noise=0.3, embedding_noise_scale="unit")


@pytest.fixture(scope="module")
def hub():
    pytest.importorskip("diffusers", reason="image tokenisers and aMUSEd need dimo-ext[hub]")


@pytest.fixture(scope="module")
def models(hub, tmp_path_factory):
    """Folders of ours: a Meissonic teacher and student, an MDLM teacher and student."""
    folder = tmp_path_factory.mktemp("models")
    files = text_encoder(released("meissonic", folder / "files"), states=24, pooled=32, positions=64)
    meissonic = dimo.load_teacher("meissonic", files, grid_size=8)
    tokenizer = gpt2_like(folder / "tokenizer", 28)
    mdlm = dimo.load_teacher("mdlm", released("mdlm", folder / "mdlm"), tokenizer=tokenizer)
    for name, model in {"meissonic": meissonic, "text": mdlm}.items():
        save_model(folder / f"{name}_teacher", model, "dimo.teacher")
        dimo.OneStepGenerator(model, SAMPLING).save_pretrained(folder / f"{name}_student")
    return folder


def sample(path, **settings):
    return write_samples(SampleConfig(output=str(path), device="cpu", **settings))


def pixels(folder):
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.iterdir())}


# --- the generator --------------------------------------------------------------------------------------------------


def test_prompts_become_pictures_in_one_evaluation(models, monkeypatch):
    student = dimo.OneStepGenerator.from_pretrained(models / "meissonic_student")
    calls, plain = [], student.model.evaluate
    monkeypatch.setattr(student.model, "evaluate", lambda *args: calls.append(len(args[0])) or plain(*args))
    key = dimo_ext.random_key([3, 4])
    pictures = student(["a red fox", "a harbour"], key=key, output="pil")
    assert calls == [2]
    assert [(p.mode, p.size) for p in pictures] == [("RGB", (16, 16))] * 2
    again = student(["a harbour"], key=key[1:], output="pil")
    assert np.array_equal(np.asarray(again[0]), np.asarray(pictures[1]))
    other = student(["a castle"], key=key[1:], output="pil")
    assert not np.array_equal(np.asarray(other[0]), np.asarray(pictures[1]))
    calls.clear()
    student(["a red fox"], key=dimo_ext.random_key(0), few_steps=4, output="pil")
    assert calls == [1] * 4


def test_texts_are_strings_in_one_evaluation(models, monkeypatch):
    student = dimo.OneStepGenerator.from_pretrained(models / "text_student")
    calls, plain = [], student.model.logits
    monkeypatch.setattr(student.model, "logits", lambda *args, **kw: calls.append(1) or plain(*args, **kw))
    texts = student(3, key=dimo_ext.random_key(0))
    assert [type(text) for text in texts] == [str] * 3
    assert len(calls) == 1
    assert len(set(texts)) == 3
    assert student(3, key=dimo_ext.random_key(0)) == texts
    student(3, key=dimo_ext.random_key(0), few_steps=5)
    assert len(calls) == 1 + 1 + 5


# --- dimo sample ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_pictures_do_not_depend_on_batches_or_processes(which, models, tmp_path):
    """Sample n is drawn with seed + n for prompt n // per_class, alone or with others."""
    common = {"model": str(models / f"meissonic_{which}"), "prompts": ("a red fox", "a harbour"), "per_class": 2}
    steps = {"teacher": {"steps": 3, "guidance_scale": 2.0, "sampler": "amused"}, "student": {}}[which]
    whole = pixels(sample(tmp_path / "a", seed=5, batch_size=4, **common, **steps))
    assert list(whole) == [f"seed0000000{5 + n}_prompt000{n // 2}.png" for n in range(4)]
    parts = pixels(sample(tmp_path / "b", seed=5, batch_size=3, **common, **steps))
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)
    alone = sample(tmp_path / "c", seed=7, **common | {"prompts": ("a harbour",), "per_class": 1}, **steps)
    assert np.array_equal(pixels(alone)["seed00000007_prompt0000.png"], whole["seed00000007_prompt0001.png"])


def test_prompts_may_come_from_a_file(models, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"text": "a red fox"}\n{"text": "a harbour"}\n')
    common = {"model": str(models / "meissonic_student"), "per_class": 1}
    listed = sample(tmp_path / "a.png", prompts=("a red fox", "a harbour"), **common)
    read = sample(tmp_path / "b.png", prompts_file=str(tmp_path / "p.jsonl"), **common)
    assert np.array_equal(np.asarray(Image.open(listed)), np.asarray(Image.open(read)))


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_texts_come_as_lines_or_files(which, models, tmp_path, capsys):
    common = {"model": str(models / f"text_{which}"), "per_class": 5, "seed": 2, "steps": 3}
    lines = [json.loads(line) for line in sample(tmp_path / "a.jsonl", **common).read_text().splitlines()]
    assert [line["seed"] for line in lines] == [2, 3, 4, 5, 6]
    assert "samples: 5 texts, entropy " in capsys.readouterr().out
    folder = sample(tmp_path / "texts", batch_size=2, **common)
    assert "samples: 5 texts, entropy " in capsys.readouterr().out
    files = {path.name: path.read_text() for path in folder.iterdir()}
    assert files == {f"seed0000000{line['seed']}.txt": line["text"] for line in lines}


def test_a_sweep_of_texts(models, tmp_path, capsys):
    sweep = SweepConfig(temperature=(0.0, 1.0), steps=(1, 4))
    path = sample(tmp_path / "s.jsonl", model=str(models / "text_student"), per_class=3, sweep=sweep)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    settings = [f"temperature {t:g}, steps {s}" for t in (0, 1) for s in (1, 4)]
    assert [line["setting"] for line in lines] == [setting for setting in settings for _ in range(3)]
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in printed] == settings


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ("text_teacher", {"prompts": ("a cat",)}, "prompts: kind 'mdlm' takes none"),
        ("text_teacher", {"classes": (1,)}, "classes: expected none for kind 'mdlm', got 1"),
        (
            "text_teacher",
            {"output": "a.png"},
            r"output: expected a path that ends in \.jsonl, or a folder, for kind 'mdlm'",
        ),
        ("meissonic_teacher", {"output": "a.jsonl"}, r"output: expected a path that ends in \.png, or a folder"),
        ("meissonic_teacher", {"classes": (1,)}, "classes: expected none for kind 'meissonic', got 1"),
        (
            "meissonic_teacher",
            {"prompts": ("a",), "prompts_file": "p.txt"},
            "prompts_file: expected None beside prompts",
        ),
        ("meissonic_teacher", {"prompts_file": "p.txt"}, r"prompts\.path: p\.txt: no such file"),
        ("meissonic_student", {"guidance_scale": 2.0}, "guidance_scale: expected 1 for a student"),
        (
            "text_teacher",
            {"guidance_scale": 2.0, "sampler": "mdlm"},
            "guidance_scale: expected 1 for the sampler 'mdlm'",
        ),
        (
            "meissonic_teacher",
            {"temperature": 0.0, "sampler": "amused"},
            "temperature: expected a number > 0 for the amused",
        ),
    ],
)
def test_settings_that_cannot_be(model, settings, message, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        write_samples(SampleConfig(**{"model": str(models / model), "output": "out", "device": "cpu"} | settings))
    assert not list(tmp_path.glob("*.png"))


def test_guiding_texts_is_an_error(models, tmp_path):
    with pytest.raises(ConfigError, match="guidance_scale: expected 1 for kind 'mdlm'"):
        sample(tmp_path / "a.jsonl", model=str(models / "text_teacher"), guidance_scale=2.0, steps=2)


# --- dimo distill ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--teacher.kind", "meissonic"],
            "prompts.path: expected a text, CSV or JSONL file or a Hugging Face data set, got None",
        ),
        (
            ["--teacher.kind", "digits", "--prompts.path", "p.txt"],
            "prompts.path: teacher kind 'digits' takes no prompts",
        ),
        (["--teacher.kind", "mdlm", "--prompts.path", "p.txt"], "prompts.path: teacher kind 'mdlm' takes no prompts"),
    ],
)
def test_prompts_are_checked_before_anything_is_loaded(arguments, message, tmp_path, capsys):
    path = ["--teacher.path", "some-one/teacher"]  # whose download would fail
    assert cli.main(["distill", "--run.output", str(tmp_path / "run"), *path, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_of_other_prompts_is_not_gone_on_with(models, tmp_path, capsys):
    """The prompts' content counts, not the name of their file."""
    (tmp_path / "p.txt").write_text("a red fox\na harbour\n")
    arguments = ["distill", "--teacher.kind", "meissonic", "--teacher.path", str(models / "meissonic_teacher"),
                 "--prompts.path", str(tmp_path / "p.txt"), "--prompts.cache", str(tmp_path / "cache"),
                 "--run.output", str(tmp_path / "run"), "--run.steps", "1", "--run.batch-size", "2",
                 "--run.preview-every", "0", "--run.device", "cpu", "--run.no-tensorboard"]  # fmt: skip
    assert cli.main(arguments) == 0
    (tmp_path / "p.txt").write_text("a red fox\na castle\n")
    assert cli.main(arguments) == 2
    assert "holds a run of another configuration (prompts: " in capsys.readouterr().err


# --- sizes and extras -----------------------------------------------------------------------------------------------


def test_published_sizes_are_the_defaults(hub):
    """In float32 Meissonic's released file has 4.03 GB, aMUSEd's of 512 pixels 2.43 GB; MDLM has 169.6 M weights."""
    micro = [0.0] * 5
    meissonic = build_on_meta(
        lambda: MeissonicTeacher.build({"network": {}, "grid_size": 64, "micro_conditions": micro}), ""
    )
    larger = {"downsample": True, "upsample": True}
    amused = build_on_meta(
        lambda: AmusedTeacher.build({"network": larger, "grid_size": 32, "micro_conditions": micro}), ""
    )
    mdlm = build_on_meta(lambda: MDLMTeacher.build({}), "")
    count = {model.kind: sum(p.numel() for p in model.parameters()) for model in (meissonic, amused, mdlm)}
    assert count == {"meissonic": 1_006_946_304, "amused": 608_257_792, "mdlm": 169_627_218}
    assert (meissonic.seq_len, meissonic.vocab_size, meissonic.mask_id) == (4096, 8192, 8255)
    assert (amused.vocab_size, amused.mask_id) == (8192, 8255)
    assert (mdlm.seq_len, mdlm.vocab_size) == (1024, 50_257)


@pytest.mark.parametrize(
    ("module", "call"),
    [
        ("diffusers", lambda folder: dimo.load_teacher("amused", released("amused", folder))),
        ("diffusers", lambda folder: dimo.load_teacher("meissonic", released("meissonic", folder))),
        ("transformers", lambda folder: dimo.load_teacher("mdlm", released("mdlm", folder), tokenizer=folder)),
    ],
)
def test_a_missing_extra_is_named(module, call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"needs {module}: pip install 'dimo-ext\[hub\]'"):
        call(tmp_path)


@pytest.mark.parametrize("kind", ["meissonic", "mdlm"])
def test_networks_of_our_own_need_no_extra(kind, tmp_path, monkeypatch):
    """Tokens in, logits out, with neither diffusers nor transformers, and never flash-attn."""
    folder = released(kind, tmp_path)
    for name in ("diffusers", "transformers", "flash_attn", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, name, None)
    if kind == "meissonic":
        for path in (folder / "vqvae").iterdir():
            path.unlink()
        (folder / "vqvae").rmdir()
    model = dimo.load_teacher(kind, folder, **({"grid_size": 8} if kind == "meissonic" else {}))
    tokens = torch.full((2, model.seq_len), model.mask_id)
    logits = model.logits(tokens, model.blank_condition(2), mask_ratio=torch.ones(2))
    assert logits.shape == (2, model.seq_len, model.vocab_size)
    assert logits.isfinite().all()
    with pytest.raises(CheckpointError, match="has no tokeniser to decode with"):
        model.decode(tokens)


# --- entropy --------------------------------------------------------------------------------------------------------


def test_sequence_entropy():
    """0 for one token repeated, log L for all different, by hand for thirds."""
    tokens = torch.tensor([[5, 5, 5, 5, 5, 5], [0, 1, 2, 3, 4, 5], [1, 1, 1, 1, 2, 2]])
    thirds = -(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3))
    np.testing.assert_allclose(sequence_entropy(tokens), [0.0, np.log(6), thirds], atol=1e-12)
