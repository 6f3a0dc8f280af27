"""Model folders and run checkpoints: exact round trips, atomic writes, errors that name file and problem."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dimo
from dimo import checkpoint
from dimo.checkpoint import (
    CheckpointError,
    fingerprint,
    load_checkpoint,
    load_model,
    load_teacher,
    read_checkpoint_header,
    read_model_config,
    save_checkpoint,
    save_model,
)
from dimo.files import remove_leftovers
from dimo.teachers import DigitsTeacher, MaskGITTeacher

TINY = {"width": 16, "depth": 1, "heads": 2, "mlp_width": 32, "dropout": 0.25}
FORM = "dimo.teacher"


def tiny(seed: int = 0) -> DigitsTeacher:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return DigitsTeacher.build(TINY)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A saved teacher."""
    return save_model(tmp_path / "model", tiny(), FORM, metrics={"loss": 1.25})


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


# --- models ---------------------------------------------------------------------------------------------------------


def test_model_round_trip_is_exact(folder):
    model, config = load_model(folder)
    original = tiny().state_dict()
    assert model.state_dict().keys() == original.keys()
    assert all(torch.equal(value, original[name]) for name, value in model.state_dict().items())
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert isinstance(model, DigitsTeacher)
    assert model.network_config() == tiny().network_config()
    assert config["metrics"] == {"loss": 1.25}
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model"]
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_config_holds_provenance(folder):
    config = read_model_config(folder)
    assert (config["format"], config["format_version"], config["kind"]) == (FORM, 1, "digits")
    assert config["versions"]["torch"] == torch.__version__
    assert set(config["versions"]) == {"dimo-ext", "torch", "python"}


@pytest.mark.parametrize("stray", ["notes.txt", "model.pth"])
def test_what_dimo_did_not_write_is_never_replaced(stray, folder, tmp_path):
    """Neither beside a model nor in a folder without one."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = tmp_path / "other"
    other.mkdir()
    for place in (folder, other):
        (place / stray).write_text("precious")
        with pytest.raises(CheckpointError, match=f"output: expected a folder that is absent, .* with {stray}"):
            save_model(place, tiny(seed=1), FORM)
        assert (place / stray).read_text() == "precious"
    (folder / stray).unlink()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_saving_again_replaces_the_folder(folder):
    save_model(folder, tiny(seed=1), FORM)
    model, config = load_model(folder)
    assert torch.equal(model.network.tok_emb.weight, tiny(seed=1).network.tok_emb.weight)
    assert "metrics" not in config
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_failed_save_leaves_the_old_folder(folder, monkeypatch):
    """A disk that fills up while the weights are written: the older model is still there, and nothing else."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full_disk(state, path, **_):
        Path(path).write_bytes(b"half of the weights")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_model(folder, tiny(seed=1), FORM)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("missing", ["folder", "config.json", "model.safetensors"])
def test_missing_files(missing, folder):
    if missing == "folder":
        folder = folder.parent / "nowhere"
    else:
        (folder / missing).unlink()
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    assert str(folder if missing == "folder" else folder / missing) in str(caught.value)


@pytest.mark.parametrize("size", [0, 4, 1000, -1])
def test_truncated_weights(size, folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file") as caught:
        load_model(folder)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b""])
def test_config_that_is_no_json(content, folder):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_model(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other.model"}, "expected a config written by dimo, got format 'other.model'"),
        ({"format": None}, "expected a config written by dimo"),
        ({"format_version": 2}, "expected format_version 1, got 2"),
        ({"kind": "pixelcnn"}, "expected a kind among digits, maskgit.*got 'pixelcnn'"),
        ({"kind": ["digits"]}, "expected a kind among"),
        ({"network": {"width": 16, "colour": 3}}, "unusable network sizes.*colour"),
        ({"network": {"width": 16, "heads": 3}}, r"unusable network sizes.*multiple of heads \(3\)"),
        ({"network": {"width": "wide"}}, "unusable network sizes"),
        ({"network": None}, "unusable network sizes"),
    ],
)
def test_config_of_another_kind(changes, message, folder):
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(folder)
    assert str(folder / "config.json") in str(caught.value)


def test_config_that_is_a_list(folder):
    (folder / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="expected a config written by dimo"):
        load_model(folder)


def test_config_without_network(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["network"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="unusable network sizes"):
        load_model(folder)


def test_every_problem_of_the_weights_is_listed(folder):
    def spoil(state):
        del state["network.pos_emb"], state["network.first_layer.0.weight"]
        state["head.weight"] = torch.zeros(2)
        state["network.bias"] = state["network.bias"][:3].clone()

    edit_weights(folder, spoil)
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder / 'model.safetensors'}: does not fit the network: ")
    for problem in (
        "missing network.pos_emb", "missing network.first_layer.0.weight", "unexpected head.weight",
        "network.bias has shape [3, 29], expected [65, 29]",
    ):  # fmt: skip
        assert problem in message


def test_loading_draws_nothing_from_the_global_generator(folder):
    state = torch.get_rng_state()
    load_model(folder)
    assert torch.equal(torch.get_rng_state(), state)


def test_fingerprint_tells_weights_apart():
    """Equal weights, equal fingerprint; one changed bit or name, another."""
    model = tiny()
    same = fingerprint(model)
    assert fingerprint(tiny()) == same
    with torch.no_grad():
        model.network.bias[0, 0] += 1e-6
    assert fingerprint(model) != same
    renamed = torch.nn.ModuleDict({"other": tiny().network})
    assert fingerprint(renamed) != same


def test_leftovers_of_killed_writes_are_cleaned_up(folder):
    """Temporary files go; a folder whose replacement had moved it aside comes back, unless a new one stands there."""
    home, unique = folder.parent, "0123456789ab"
    (home / f".checkpoint.{unique}.safetensors").write_bytes(b"half")
    (home / f".student.{unique}").mkdir()
    (home / f".model.{unique}.old").mkdir()
    (home / ".hidden.txt").write_text("not ours")
    folder.rename(home / f".lost.{unique}.old")
    save_model(folder, tiny(seed=1), FORM)
    remove_leftovers(home)
    assert sorted(path.name for path in home.iterdir()) == [".hidden.txt", "lost", "model"]
    assert torch.equal(load_model(home / "lost")[0].network.pos_emb, tiny().network.pos_emb)
    assert torch.equal(load_model(folder)[0].network.pos_emb, tiny(seed=1).network.pos_emb)


# --- teachers -------------------------------------------------------------------------------------------------------


def test_load_teacher_from_a_folder(folder):
    teacher = dimo.load_teacher("digits", folder)
    assert torch.equal(teacher.network.pos_emb, tiny().network.pos_emb)


def test_load_teacher_refuses_another_kind(folder, tmp_path):
    with pytest.raises(CheckpointError, match="expected a teacher of kind 'maskgit', got 'digits'"):
        load_teacher("maskgit", folder)
    with pytest.raises(CheckpointError, match=r"expected one of digits, maskgit.*got 'vq'"):
        load_teacher("vq")
    with pytest.raises(CheckpointError, match="kind 'maskgit' ships no weights"):
        load_teacher("maskgit")


def test_load_teacher_refuses_a_student(folder):
    """It was not trained to continue from every mask ratio."""
    edit_config(folder, format="dimo.one_step_generator")
    for arguments in (("digits", folder), (folder,)):
        with pytest.raises(CheckpointError, match=r"model: expected a teacher .*, got a student \(dimo\.one_step_gen"):
            load_teacher(*arguments)


def test_load_teacher_keeps_the_sizes_of_a_maskgit(tmp_path):
    sizes = {**TINY, "grid_size": 3, "vocab_size": 5, "num_classes": 3}
    save_model(tmp_path / "m", MaskGITTeacher.build(sizes), FORM)
    teacher = load_teacher("maskgit", tmp_path / "m")
    assert (teacher.seq_len, teacher.vocab_size, teacher.num_classes) == (9, 5, 3)


# --- runs -----------------------------------------------------------------------------------------------------------


def state(seed: int) -> tuple[dict, dict]:
    """Two modules and an AdamW that has made two steps."""
    torch.manual_seed(seed)
    modules = {"student": torch.nn.Linear(3, 2), "ema": torch.nn.Linear(3, 2)}
    optimizer = torch.optim.AdamW(modules["student"].parameters(), lr=0.1, fused=True)
    for _ in range(2):
        optimizer.zero_grad()
        modules["student"](torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
    return modules, {"optimizer": optimizer}


def test_run_checkpoint_round_trip_is_exact(tmp_path):
    """Modules and moments are restored bit for bit: the next update is the same."""
    path, config = tmp_path / "run.safetensors", {"run": {"steps": 3}, "note": "größer"}
    modules, optimizers = state(0)
    save_checkpoint(path, 2, config, modules, optimizers)
    others, other_optimizers = state(1)
    assert read_checkpoint_header(path) == (2, config)
    load_checkpoint(path, others, other_optimizers)
    for source, target, optimizer in ((modules, others, None), (modules, others, (optimizers, other_optimizers))):
        if optimizer is not None:  # one more step on both sides
            for side, stepper in zip((source, target), optimizer, strict=True):
                stepper["optimizer"].zero_grad()
                side["student"](torch.ones(1, 3)).sum().backward()
                stepper["optimizer"].step()
        for name in modules:
            for a, b in zip(source[name].parameters(), target[name].parameters(), strict=True):
                assert torch.equal(a, b)
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]


def test_checkpoint_before_the_first_step(tmp_path):
    """An optimiser without moments yet is stored as such."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    save_checkpoint(tmp_path / "c", 0, {}, {"m": model}, {"o": optimizer})
    load_checkpoint(tmp_path / "c", {"m": model}, {"o": optimizer})
    assert not optimizer.state


def test_failed_checkpoint_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    save_checkpoint(path, 2, {}, *state(0))
    before = path.read_bytes()

    def full_disk(tensors, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, 3, {}, *state(1))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]


def test_checkpoint_of_another_network_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    save_checkpoint(path, 2, {}, *state(0))
    modules = {"student": torch.nn.Linear(4, 2), "teacher": torch.nn.Linear(1, 1)}
    with pytest.raises(CheckpointError, match=r"weight has shape \[2, 3\], expected \[2, 4\]"):
        load_checkpoint(path, modules, {})
    with pytest.raises(CheckpointError, match="missing weight; missing bias"):
        load_checkpoint(path, {"teacher": modules["teacher"]}, {})


@pytest.mark.parametrize("content", [b"", b"abc", b"\x10\x00\x00\x00\x00\x00\x00\x00{}"])
def test_file_that_is_no_checkpoint(content, tmp_path):
    path = tmp_path / "run.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated or not a checkpoint of a run") as caught:
        read_checkpoint_header(path)
    assert str(path) in str(caught.value)


def test_model_is_no_checkpoint_of_a_run(folder):
    with pytest.raises(CheckpointError, match="not a checkpoint of a run"):
        read_checkpoint_header(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a checkpoint of a run"):
        read_checkpoint_header(folder)
