"""Checkpoints as their authors publish them: what is read of them, what is refused, and with which words."""

import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dimo
import dimo_ext
from dimo.checkpoint import PATTERNS, load_model, save_model
from dimo.state_dicts import CheckpointError, locate, objects_ignored, read_pickle, read_state_dict, strip_prefixes
from dimo.tokenizers import VQGANTokenizer

FIXTURES = Path(__file__).parent / "fixtures"
MASKGIT, VQGAN = FIXTURES / "maskgit" / "MaskGIT_tiny.pth", FIXTURES / "vqgan"
HEADS = 4


@pytest.fixture(scope="module")
def maskgit():
    return dimo.load_teacher("maskgit", MASKGIT, tokenizer=VQGAN, heads=HEADS)


# --- loading --------------------------------------------------------------------------------------------------------


def test_sizes_come_from_the_shapes(maskgit):
    assert maskgit.network_config() == {
        "grid_size": 4, "vocab_size": 24, "num_classes": 7, "width": 32, "depth": 2, "heads": 4, "mlp_width": 64,
        "dropout": 0.1,
    }  # fmt: skip
    assert (maskgit.mask_id, maskgit.seq_len, maskgit.training) == (24, 16, False)
    assert not any(p.requires_grad for p in [*maskgit.parameters(), *maskgit.tokenizer.parameters()])


def test_a_folder_of_ours_loads_without_its_kind(maskgit, tmp_path):
    save_model(tmp_path / "teacher", maskgit, "dimo.teacher")
    tokens = torch.arange(16)[None]
    for arguments in ((tmp_path / "teacher",), ("maskgit", tmp_path / "teacher")):
        again = dimo.load_teacher(*arguments)
        assert torch.equal(again.decode(tokens), maskgit.decode(tokens))
        assert torch.equal(again.logits(tokens, torch.tensor([3])), maskgit.logits(tokens, torch.tensor([3])))


def test_bare_weights_of_a_distilled_generator_load(maskgit):
    """The layout of pytorch_model.bin; here the weights are those of the teacher's file."""
    folder = FIXTURES / "maskgit" / "dimo_generator"
    for path in (folder, folder / "pytorch_model.bin"):
        student = dimo.load_teacher("maskgit", path, tokenizer=VQGAN, heads=HEADS)
        for name, tensor in maskgit.state_dict().items():
            assert torch.equal(student.state_dict()[name], tensor)


def test_prefixes_of_wrappers_are_stripped(maskgit, tmp_path):
    state = torch.load(MASKGIT, weights_only=True)["model_state_dict"]
    for prefix in ("module._orig_mod.", "module.", "_orig_mod."):
        torch.save({"model_state_dict": {prefix + k: v for k, v in state.items()}}, tmp_path / "m.pth")
        model = dimo.load_teacher("maskgit", tmp_path / "m.pth", tokenizer=VQGAN, heads=HEADS)
        assert torch.equal(model.network.bias, maskgit.network.bias)
    mixed = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    assert strip_prefixes(mixed, "module.") == mixed  # not every name has it


def test_safetensors_in_the_place_of_a_pickle(maskgit, tmp_path):
    state = torch.load(MASKGIT, weights_only=True)["model_state_dict"]
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "m.safetensors")
    model = dimo.load_teacher("maskgit", tmp_path / "m.safetensors", tokenizer=VQGAN / "last.ckpt", heads=HEADS)
    assert torch.equal(model.network.bias, maskgit.network.bias)


def size(width: int, depth: int, heads: int, mlp_width: int) -> dict[str, int]:
    return {"grid_size": 24, "width": width, "depth": depth, "heads": heads, "mlp_width": mlp_width}


LEVELS = {"channels": (128, 128, 256, 256, 512), "attention": (False, False, False, False, True), "z_channels": 256}


@pytest.mark.parametrize(
    ("cls", "sizes", "millions"),
    [
        (dimo.TEACHERS["maskgit"], {}, 174.161),  # these two as MaskGIT-pytorch's README counts them
        (VQGANTokenizer, LEVELS | {"codebook_size": 1024, "embed_dim": 256, "blocks": 3, "encoder_blocks": 2}, 72.142),
        (dimo.TEACHERS["halton"], size(1024, 24, 16, 2816), 480),  # "480M" in Halton-MaskGIT's
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(cls, sizes, millions):
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in cls.build(sizes).parameters()) / 1e6
    assert round(count, 3 if millions % 1 else 0) == millions


# --- the tokeniser as a part of a teacher ---------------------------------------------------------------------------


def test_copies_share_the_tokeniser_and_no_optimiser_sees_it(maskgit):
    import copy

    student = copy.deepcopy(maskgit)
    assert student.tokenizer is maskgit.tokenizer
    assert student.network is not maskgit.network
    assert all(name.startswith("network.") for name in [*maskgit.state_dict(), *dict(maskgit.named_parameters())])


def test_the_tokeniser_follows_its_model(maskgit, tmp_path):
    save_model(tmp_path / "teacher", maskgit, "dimo.teacher")
    model = load_model(tmp_path / "teacher")[0].double()
    assert {p.dtype for p in model.tokenizer.parameters()} == {torch.float64}


def test_images_are_tokens_through_the_decoder_in_0_to_1(maskgit):
    tokens = dimo_ext.init_tokens(2, 16, vocab_size=24, mask_id=24, r_init=0.0, key=dimo_ext.random_key(0))
    images = maskgit.decode(tokens)
    assert images.shape == (2, 3, 8, 8)
    raw = maskgit.tokenizer.network.decode(tokens.view(2, 4, 4))
    torch.testing.assert_close(images, (raw / 2 + 0.5).clamp(0, 1))
    with pytest.raises(ValueError, match="tokens_BL: expected a square number of positions, got 15"):
        maskgit.decode(tokens[:, :15])


def test_a_tokeniser_of_too_few_tokens_is_refused(maskgit):
    other = load_tiny_tokenizer(23)
    with pytest.raises(CheckpointError, match="tokenizer: expected one of 24 tokens, as the model has, got 23"):
        maskgit.attach(other)


def load_tiny_tokenizer(codes: int) -> VQGANTokenizer:
    sizes = {"embed_dim": 4, "z_channels": 4, "channels": [32], "attention": [False], "blocks": 1}
    return VQGANTokenizer.build({"codebook_size": codes, **sizes})


# --- what is refused ------------------------------------------------------------------------------------------------


class Evil:
    """A pickle that would run code when it is read by plain pickle."""

    def __reduce__(self):
        return (open, ("dimo-evil", "w"))


class Callback:
    """Stands for an object of a library that is not installed here."""

    def __init__(self, best: float) -> None:
        self.best = best


def with_objects(path: Path, *objects: object) -> Path:
    content = torch.load(MASKGIT, weights_only=True)
    torch.save(content | {"callbacks": list(objects)}, path)
    return path


def test_objects_are_refused_with_the_advice_to_convert(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = with_objects(tmp_path / "m.pth", Callback(0.5), Evil())
    with pytest.raises(CheckpointError, match="refused, it holds more than tensors") as caught:
        dimo.load_teacher("maskgit", path, tokenizer=VQGAN, heads=HEADS)
    assert "Callback" in str(caught.value)
    assert "dimo convert" in str(caught.value)
    assert not Path("dimo-evil").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_file_is_one_error(zipped, tmp_path):
    """Cut anywhere: the readers below raise all sorts of things."""
    whole = tmp_path / "whole.pt"
    torch.save({"w": torch.ones(64), "b": torch.ones(3)}, whole, _use_new_zipfile_serialization=zipped)
    content = whole.read_bytes()
    for size in range(0, len(content) - 64, 7):
        (tmp_path / "cut.pt").write_bytes(content[:size])
        with pytest.raises(CheckpointError, match="truncated or not"):
            read_pickle(tmp_path / "cut.pt")


def test_objects_can_be_ignored_without_running_them(maskgit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = with_objects(tmp_path / "m.pth", Callback(0.5), Evil())
    with objects_ignored():
        model = dimo.load_teacher("maskgit", path, tokenizer=VQGAN, heads=HEADS)
        callback = read_pickle(path)["callbacks"][0]
    assert torch.equal(model.network.bias, maskgit.network.bias)
    assert not isinstance(callback, Callback)
    assert not hasattr(callback, "best")
    assert not Path("dimo-evil").exists()
    with pytest.raises(CheckpointError, match="refused"):
        read_pickle(path)


def test_system_calls_are_refused_even_when_converting(tmp_path):
    class Shell:
        def __reduce__(self):
            import os

            return (os.system, ("exit 0",))

    path = with_objects(tmp_path / "m.pth", Shell())
    with objects_ignored(), pytest.raises(CheckpointError, match="refused, it holds more than tensors"):
        read_pickle(path)


@pytest.mark.parametrize("size", [0, 10, 1000, 300_000])
def test_truncated_pickles(size, tmp_path):
    path = tmp_path / "m.pth"
    path.write_bytes(MASKGIT.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"truncated or not a file of torch.save") as caught:
        dimo.load_teacher("maskgit", path, tokenizer=VQGAN, heads=HEADS)
    assert str(path) in str(caught.value)


def foreign_files(folder: Path) -> dict[str, Path]:
    with zipfile.ZipFile(folder / "zip.pth", "w") as archive:
        archive.writestr("a.txt", "hello")
    (folder / "text.pth").write_text("<html>404</html>")
    (folder / "plain.pth").write_bytes(pickle.dumps({"a": 1}))
    torch.save([torch.zeros(2)], folder / "list.pth")
    torch.save({"epoch": 3}, folder / "no_weights.pth")
    torch.save({}, folder / "empty.pth")
    return {path.stem: path for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["zip", "text", "plain", "list", "no_weights", "empty"])
def test_foreign_files(name, tmp_path):
    path = foreign_files(tmp_path)[name]
    with pytest.raises(CheckpointError) as caught:
        dimo.load_teacher("maskgit", path, tokenizer=VQGAN, heads=HEADS)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_problem_of_the_names_is_listed(tmp_path):
    state = torch.load(MASKGIT, weights_only=True)["model_state_dict"]
    del state["last_layer.0.weight"]
    state |= {"extra": torch.zeros(1), "first_layer.0.bias": torch.zeros(3)}
    torch.save({"model_state_dict": state}, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match="does not fit the network") as caught:
        dimo.load_teacher("maskgit", tmp_path / "m.pth", tokenizer=VQGAN, heads=HEADS)
    for problem in (
        "missing last_layer.0.weight", "unexpected extra", "first_layer.0.bias has shape [3], expected [32]"
    ):  # fmt: skip
        assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (
            ("maskgit", VQGAN / "last.ckpt"),
            {},
            r"expected a state dict \('model_state_dict' or bare tensors\), found epoch",
        ),
        (("maskgit", FIXTURES / "halton" / "ImageNet_tiny.pth"), {}, "of another layout: expected pos_emb of 3 dim"),
        (
            ("maskgit", MASKGIT),
            {"tokenizer": MASKGIT},
            r"expected a state dict \('state_dict' or 'model' or bare tensors\)",
        ),
        (
            ("maskgit", MASKGIT),
            {"tokenizer": FIXTURES},
            r"fixtures: expected a folder with one file of weights, found .*halton_order\.safetensors",
        ),
        (("maskgit", MASKGIT), {"tokenizer": "nowhere"}, "nowhere: no such file or folder"),
        (
            ("maskgit", MASKGIT),
            {"tokenizer": VQGAN},
            "teacher heads: .* does not tell them, and its width 32 is none of",
        ),
        (("maskgit", MASKGIT), {"heads": 4}, "expected 1024 tokens .* got 33 ids, 16 positions"),
        (("maskgit", MASKGIT), {"tokenizer": VQGAN, "heads": 5}, "unusable network sizes: width: expected a multiple"),
        (("maskgit", MASKGIT), {"haeds": 4}, "teacher haeds: no option of kind 'maskgit', expected one of heads"),
        (("maskgit", "nowhere.pth"), {}, "nowhere.pth: no such file or folder; `dimo convert` writes one"),
        (("digits", MASKGIT), {}, "MaskGIT_tiny.pth: expected a folder with model.safetensors"),
        ((MASKGIT,), {}, "a published checkpoint needs its kind: one of digits, maskgit, halton"),
        (("digits",), {"heads": 2}, "heads: belongs to a published checkpoint"),
        (("digits",), {"tokenizer": VQGAN}, "tokenizer: belongs to a published checkpoint"),
        (
            ("nowhere",),
            {},
            "teacher kind: expected one of digits, maskgit.*, or a folder written by dimo, got 'nowhere'",
        ),
    ],
)
def test_wrong_arguments(arguments, options, message):
    with pytest.raises(CheckpointError, match=message):
        dimo.load_teacher(*arguments, **options)


# --- Hugging Face ids -----------------------------------------------------------------------------------------------


class Hub:
    """Stands for huggingface_hub: what it was asked for, and a folder in the place of the network."""

    def __init__(self, folder: Path | None) -> None:
        self.folder, self.asked = folder, []

    def hf_hub_download(self, repository, file):
        self.asked.append((repository, file))
        if self.folder is None:
            raise OSError("We couldn't connect to 'https://huggingface.co'\nmore lines")
        return str(self.folder / file)

    def snapshot_download(self, repository, allow_patterns):
        self.asked.append((repository, allow_patterns))
        return str(self.folder)


@pytest.fixture
def hub(monkeypatch):
    def install(folder):
        fake = Hub(folder)
        monkeypatch.setattr(dimo.state_dicts, "import_extra", lambda *_, **__: fake)
        return fake

    return install


def test_ids_are_downloaded(hub, maskgit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake = hub(MASKGIT.parent)
    model = dimo.load_teacher("maskgit", "some-one/Mask.GIT/MaskGIT_tiny.pth", tokenizer=VQGAN, heads=HEADS)
    assert torch.equal(model.network.bias, maskgit.network.bias)
    assert fake.asked == [("some-one/Mask.GIT", "MaskGIT_tiny.pth")]
    save_model(tmp_path / "cache", maskgit, "dimo.teacher")
    fake = hub(tmp_path / "cache")
    assert dimo.load_teacher("some-one/teacher").kind == "maskgit"
    assert fake.asked == [("some-one/teacher", PATTERNS)]


def test_local_files_come_first(hub, tmp_path, monkeypatch):
    fake = hub(None)
    monkeypatch.chdir(FIXTURES.parent)
    assert locate("fixtures/vqgan") == Path("fixtures/vqgan")
    assert locate("fixtures/maskgit/MaskGIT_tiny.pth").is_file()
    for name in ("folder", "a/b/c", "./a/b", "/a/b", "../a/b", "a/b.pth", "~/a/b"):  # paths, whether there or not
        assert locate(name) == Path(name)
    assert fake.asked == []


def test_an_id_without_network_is_one_clear_error(hub):
    hub(None)
    with pytest.raises(
        CheckpointError, match=r"org/name/m.pth: no such file or folder here, and not to be had as a"
    ) as e:
        dimo.load_teacher("maskgit", "org/name/m.pth")
    assert "couldn't connect" in str(e.value)
    assert "\n" not in str(e.value)


def test_an_id_without_huggingface_hub_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"org/name.* needs huggingface_hub: pip install 'dimo-ext\[hub\]'"):
        dimo.load_teacher("org/name")


def test_read_state_dict_falls_back_to_the_whole_file(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "bare.bin")
    assert read_state_dict(tmp_path / "bare.bin", "model")["a"].tolist() == [1, 1]
    save_file(load_file(FIXTURES / "halton_order.safetensors"), tmp_path / "s.safetensors")
    assert "out.order_8" in read_state_dict(tmp_path / "s.safetensors")
