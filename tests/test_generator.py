"""The one-step generator as a folder: same samples after loading, its settings inside, other folders refused."""

import json
import shutil
import sys
import types

import pytest
import torch

import dimo
import dimo_ext
from dimo.checkpoint import CheckpointError, load_model, save_model
from dimo.config import MethodConfig, SamplingConfig
from dimo.generator import OneStepGenerator, labels_per_class, sample_keys
from dimo.pictures import to_pil
from dimo.samplers import sample_few_steps, sample_one_step
from dimo.teachers import DigitsTeacher
from tests.golden import FIXTURES

METHOD = MethodConfig(r_init=0.6, embedding_noise=0.2, embedding_noise_scale="unit", student_temperature=1.3)
SETTINGS = {"r_init": 0.6, "embedding_noise": 0.2, "embedding_noise_scale": "unit", "student_temperature": 1.3}
LABELS = labels_per_class(10, 2)
KEYS = sample_keys(5, 20)


def tiny(seed: int = 0) -> DigitsTeacher:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = DigitsTeacher.build({"width": 16, "depth": 1, "heads": 2, "mlp_width": 32, "dropout": 0.2})
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def generator():
    return OneStepGenerator(tiny(), METHOD, recipe={"run": {"seed": 4}})


@pytest.fixture
def folder(generator, tmp_path):
    generator.save_pretrained(tmp_path / "student")
    return tmp_path / "student"


def test_loaded_generator_draws_the_same_samples(generator, folder):
    loaded = dimo.OneStepGenerator.from_pretrained(folder)
    assert torch.equal(loaded.tokens(LABELS, key=KEYS), generator.tokens(LABELS, key=KEYS))
    assert torch.equal(loaded(LABELS, key=KEYS), generator(LABELS, key=KEYS))
    assert loaded.recipe == generator.recipe
    for name, value in generator.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value)


def test_tokens_are_those_of_the_sampler(generator):
    """With the generator's own settings, in evaluation mode."""
    expected = sample_one_step(generator.model, LABELS, METHOD, key=KEYS)
    assert torch.equal(generator.tokens(LABELS, key=KEYS), expected)
    assert not generator.model.training
    other = sample_one_step(generator.model, LABELS, MethodConfig(), key=KEYS)
    assert not torch.equal(expected, other)


def test_call_decodes_to_images(generator):
    images = generator(LABELS, key=KEYS)
    assert images.shape == (20, 1, 8, 8)
    assert torch.equal(images.flatten(1) * 16, generator.tokens(LABELS, key=KEYS).float())


def test_temperature_overrides_the_stored_one(generator):
    own = generator.tokens(LABELS, key=KEYS)
    assert torch.equal(own, generator.tokens(LABELS, key=KEYS, temperature=1.3))
    assert not torch.equal(own, generator.tokens(LABELS, key=KEYS, temperature=1.0))
    assert torch.equal(own, generator.tokens(LABELS, key=KEYS))  # the override does not stick


def test_temperature_0_takes_the_most_probable_tokens(generator):
    """The limit of small temperatures; a negative one is refused."""
    cold = generator.tokens(LABELS, key=KEYS, temperature=0.0)
    assert torch.equal(cold, generator.tokens(LABELS, key=KEYS, temperature=1e-4))
    with pytest.raises(ValueError, match="temperature: expected a finite number >= 0"):
        generator.tokens(LABELS, key=KEYS, temperature=-1.0)


def test_config_file(generator, folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["format"] == "dimo.one_step_generator"
    assert config["format_version"] == 1
    assert config["kind"] == "digits"
    assert config["network"] == generator.model.network_config()
    assert config["sampling"] == SETTINGS
    assert config["recipe"] == {"run": {"seed": 4}}
    assert config["versions"]["torch"] == torch.__version__


def test_saving_again_replaces(folder):
    OneStepGenerator(tiny(seed=1), MethodConfig()).save_pretrained(folder)
    loaded = OneStepGenerator.from_pretrained(folder)
    assert torch.equal(loaded.model.network.pos_emb, tiny(seed=1).network.pos_emb)
    assert loaded.sampling == SamplingConfig()
    assert loaded.recipe == {}


def test_teacher_is_no_generator(tmp_path):
    save_model(tmp_path / "teacher", tiny(), "dimo.teacher")
    with pytest.raises(CheckpointError, match=r"expected a dimo\.one_step_generator, got a dimo\.teacher") as caught:
        OneStepGenerator.from_pretrained(tmp_path / "teacher")
    assert str(tmp_path / "teacher") in str(caught.value)


def test_a_student_can_be_the_teacher_of_another_run(folder):
    """Its weights load as those of any model of its kind."""
    assert torch.equal(load_model(folder)[0].network.pos_emb, tiny().network.pos_emb)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (SETTINGS | {"r_init": 2}, "r_init: expected a number in [0, 1], got 2"),
        (SETTINGS | {"student_temperature": "hot"}, "student_temperature: expected a number, got 'hot'"),
        (SETTINGS | {"guidance_scale": 2}, "expected sampling settings r_init, embedding_noise"),
        ({"r_init": 0.5}, "expected sampling settings r_init, embedding_noise"),
        ([1], "expected sampling settings r_init, embedding_noise"),
        (None, "expected sampling settings r_init, embedding_noise"),
    ],
)
def test_unusable_sampling_settings(sampling, message, folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"sampling": sampling}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError) as caught:
        OneStepGenerator.from_pretrained(folder)
    assert str(folder) in str(caught.value)
    assert message in str(caught.value)


def test_missing_and_truncated_folders(folder, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: expected a folder"):
        OneStepGenerator.from_pretrained(tmp_path / "nowhere")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="truncated"):
        OneStepGenerator.from_pretrained(folder)


# --- images by class ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imagenet():
    """A student with a decoder: 7 classes, pictures of 8 by 8 pixels."""
    path = FIXTURES / "maskgit" / "dimo_generator" / "pytorch_model.bin"
    model = dimo.load_teacher("maskgit", path, tokenizer=FIXTURES / "vqgan", heads=4)
    return OneStepGenerator(model, METHOD, provenance={"source": "a test"})


def test_labels_become_pillow_images_in_one_evaluation(imagenet, monkeypatch):
    calls, logits = [], imagenet.model.logits
    monkeypatch.setattr(imagenet.model, "logits", lambda *args, **kw: calls.append(1) or logits(*args, **kw))
    key = dimo_ext.random_key(3)
    pictures = imagenet([0, 6, 2], key=key, output="pil")
    assert len(calls) == 1
    assert [(p.mode, p.size) for p in pictures] == [("RGB", (8, 8))] * 3
    images = imagenet(torch.tensor([0, 6, 2]), key=key)
    assert [p.tobytes() for p in pictures] == [p.tobytes() for p in to_pil(images)]
    with pytest.raises(ValueError, match="output: expected one of tensor, pil, got 'jpg'"):
        imagenet([0], key=key, output="jpg")


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_few_steps_are_those_of_the_sampler(steps, imagenet, monkeypatch):
    calls, logits = [], imagenet.model.logits
    labels, key = torch.tensor([1, 5]), dimo_ext.random_key(1)
    expected = sample_few_steps(imagenet.model, labels, METHOD, steps=steps, key=key)
    monkeypatch.setattr(imagenet.model, "logits", lambda *args, **kw: calls.append(1) or logits(*args, **kw))
    assert torch.equal(imagenet.tokens(labels, key=key, few_steps=steps), expected)
    assert len(calls) == steps


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ([8], r"condition: expected class ids in \[0, 7\], got 8"),
        ([-1], r"condition: expected class ids in \[0, 7\], got -1"),
        ([0.5], r"condition: expected integers \[B\], got torch.float32 \[1\]"),
        ([[1]], r"condition: expected integers \[B\], got torch.int64 \[1, 1\]"),
        ([True], r"condition: expected integers \[B\], got torch.bool"),
        (["cat"], r"condition: expected class ids, got \['cat'\]"),
    ],
)
def test_conditions_that_are_no_classes(condition, message, imagenet):
    with pytest.raises(ValueError, match=message):
        imagenet(condition, key=dimo_ext.random_key(0))


def test_the_folder_holds_the_decoder_and_the_provenance(imagenet, tmp_path):
    imagenet.save_pretrained(tmp_path / "student")
    loaded = OneStepGenerator.from_pretrained(tmp_path / "student")
    key = dimo_ext.random_key(2)
    assert torch.equal(loaded([3, 4], key=key), imagenet([3, 4], key=key))
    assert loaded.provenance == {"source": "a test"}
    (tmp_path / "student" / "tokenizer.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.safetensors: no such file"):
        OneStepGenerator.from_pretrained(tmp_path / "student")


@pytest.mark.parametrize("entry", [{"kind": "vq"}, {"network": {}}, "vqgan", {"kind": ["vqgan"]}])
def test_an_unknown_decoder_is_refused(entry, imagenet, tmp_path):
    imagenet.save_pretrained(tmp_path / "student")
    path = tmp_path / "student" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer": entry}))
    with pytest.raises(CheckpointError, match=r"config\.json: expected a tokenizer of kind vqgan"):
        OneStepGenerator.from_pretrained(tmp_path / "student")


def test_push_to_hub_uploads_what_from_pretrained_loads(imagenet, tmp_path, monkeypatch):
    """The library's three functions, with a folder in the place of the network."""
    asked = []
    hub = types.SimpleNamespace(
        create_repo=lambda name, private, exist_ok: asked.append((name, private, exist_ok)),
        upload_folder=lambda repo_id, folder_path: shutil.copytree(folder_path, tmp_path / repo_id),
        snapshot_download=lambda name, allow_patterns: str(tmp_path / name),
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    imagenet.push_to_hub("me/generator", private=True)
    assert asked == [("me/generator", True, True)]
    loaded = OneStepGenerator.from_pretrained("me/generator")
    key = dimo_ext.random_key(2)
    assert torch.equal(loaded([3], key=key), imagenet([3], key=key))


def test_push_to_hub_needs_the_extra(imagenet, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"push_to_hub needs huggingface_hub: pip install 'dimo-ext\[hub\]'"):
        imagenet.push_to_hub("me/generator")
