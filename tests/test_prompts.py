"""Prompts from files and data sets, encoded once."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from dimo.config import ConfigError, PromptsConfig
from dimo.data import encoded as encoded_module
from dimo.data.encoded import EncodedPrompts
from dimo.data.prompts import read_prompts
from dimo.state_dicts import CheckpointError
from dimo.text_encoder import PromptEncoder
from tests.released import text_encoder

PROMPTS = ["a cat", "a dog on the sofa, in colour", "zebra"]


def write(path, content):
    path.write_text(content, encoding="utf-8")
    return str(path)


# --- reading ---


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_text_file_holds_a_prompt_a_line(mark, tmp_path):
    path = write(tmp_path / "prompts.txt", mark + "a cat\n\n   a dog on the sofa,  in colour \r\nzebra")
    assert read_prompts(PromptsConfig(path)) == PROMPTS
    assert read_prompts(PromptsConfig(path, limit=2)) == PROMPTS[:2]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_csv_column(mark, tmp_path):
    path = write(
        tmp_path / "prompts.csv", mark + 'id,caption\n1,a cat\n2,"a dog on the sofa,\nin colour"\n3,\n4,zebra\n'
    )
    assert read_prompts(PromptsConfig(path, column="caption")) == PROMPTS
    with pytest.raises(ConfigError, match=r"prompts\.column: expected one of id, caption .*, got 'text'"):
        read_prompts(PromptsConfig(path))


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_json_lines_column(mark, tmp_path):
    lines = [json.dumps({"text": prompt, "n": 1}) for prompt in PROMPTS]
    path = write(tmp_path / "prompts.jsonl", mark + "\n".join([lines[0], "", '{"text": null}', *lines[1:]]))
    assert read_prompts(PromptsConfig(path)) == PROMPTS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", '{"text": "a"}\n{"text": ', r"line 2: not valid JSON"),
        ("p.jsonl", '{"text": "a"}\n{"n": 1}', r"prompts\.column: expected one of n \(.*line 2\), got 'text'"),
        ("p.jsonl", '{"text": 3}', r"prompts\.column: expected text, got 3 \(.*line 1\)"),
        ("p.jsonl", "[1]", r"prompts\.column: expected one of none"),
        ("p.csv", "", r"prompts\.column: expected one of none"),
        ("p.txt", " \n\n", r"prompts\.path: expected at least one prompt, found none in"),
    ],
)
def test_broken_files_are_one_error(name, content, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        read_prompts(PromptsConfig(write(tmp_path / name, content)))


@pytest.mark.parametrize("name", ["p.txt", "P.CSV", "p.jsonl"])
def test_a_missing_file_is_no_data_set(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=rf"prompts\.path: .*{name}: no such file"):
        read_prompts(PromptsConfig(str(tmp_path / name)))
    with pytest.raises(ImportError, match=r"as a Hugging Face data set needs datasets: pip install 'dimo-ext\[hub\]'"):
        read_prompts(PromptsConfig(str(tmp_path)))


def test_no_text_is_an_error(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError, match=r"prompts\.path: .*p\.txt cannot be read: 'utf-8'"):
        read_prompts(PromptsConfig(str(tmp_path / "p.txt")))
    with pytest.raises(ConfigError, match=r"prompts\.path: expected a text, CSV or JSONL file .*, got None"):
        read_prompts(PromptsConfig())


@pytest.mark.filterwarnings("default")  # of pandas and pyarrow below
def test_a_data_set(tmp_path, monkeypatch):
    """`datasets` streams a local folder as it streams an id."""
    pytest.importorskip("datasets", reason="data sets need dimo-ext[hub]")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", "\n".join(json.dumps({"caption": prompt}) for prompt in PROMPTS))
    assert read_prompts(PromptsConfig(str(folder), column="caption")) == PROMPTS
    with pytest.raises(ConfigError, match=r"prompts\.column: expected one of caption .*, got 'text'"):
        read_prompts(PromptsConfig(str(folder)))
    with pytest.raises(ConfigError, match=r"prompts\.path: .* with split 'dev', got"):
        read_prompts(PromptsConfig(str(folder), split="dev"))


# --- encoding ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return text_encoder(tmp_path_factory.mktemp("clip"), states=24, pooled=32, positions=32)


@pytest.fixture
def encoder(folder):
    return PromptEncoder(folder)


def test_states_and_pooled_are_those_of_transformers(encoder, folder):
    """Padded to the full length without an attention mask, last hidden states but one, projected pooled vector."""
    transformers = pytest.importorskip("transformers")
    states, pooled = encoder.encode(PROMPTS)
    assert states.shape == (3, 32, 24)
    assert pooled.shape == (3, 32)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    model = transformers.CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder")
    for prompt, state, vector in zip(PROMPTS, states, pooled, strict=True):
        ids = tokenizer(prompt).input_ids
        ids += [tokenizer.pad_token_id] * (32 - len(ids))
        output = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        torch.testing.assert_close(state, output.hidden_states[-2][0], rtol=0, atol=1e-5)
        torch.testing.assert_close(vector, output.text_embeds[0], rtol=0, atol=1e-5)


def test_a_prompt_does_not_depend_on_its_batch(encoder):
    many = encoder.encode(PROMPTS * 30)
    assert many.states.shape[0] == 90
    torch.testing.assert_close(many.states[88], encoder.encode(PROMPTS).states[1], rtol=0, atol=1e-5)


def test_long_prompts_are_cut_with_a_notice(encoder):
    long = " ".join("abcdefghijklmnopqrstuvwxyz" * 2)
    with pytest.warns(UserWarning, match=r"1 of 2 prompts were cut: 'a b c d .*' has 54 tokens, the encoder takes 32"):
        states, pooled = encoder.encode(["a cat", long])
    cut = encoder.encode([long[:60]])
    torch.testing.assert_close(pooled[1], cut.pooled[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(states[1, :31], cut.states[0, :31], rtol=0, atol=1e-5)


def test_long_prompts_are_an_error_if_so_configured(folder):
    encoder = PromptEncoder(folder, long_prompts="error")
    encoder.encode(["a" * 30])
    with pytest.raises(ValueError, match="prompt: expected at most 32 tokens, got 33: 'aaa"):
        encoder.encode(["a cat", "a" * 31])


def test_a_folder_without_an_encoder_is_refused(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"text_encoder: expected a folder with text_encoder/config\.json and tok"
    ):
        PromptEncoder(tmp_path)


def test_weights_that_do_not_fit_are_listed(folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    path = broken / "text_encoder" / "config.json"
    path.write_text(path.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'))
    with pytest.raises(CheckpointError, match=r"does not fit the network: missing_keys text_model.*layers\.3"):
        PromptEncoder(broken).encode(["a cat"])
    (broken / "text_encoder" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="text_encoder: no CLIP text encoder"):
        PromptEncoder(broken).encode(["a cat"])


# --- the cache ---


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    """Two prompts a file, so that three make two."""
    monkeypatch.setattr(encoded_module, "SHARD", 2)


class Counting(PromptEncoder):
    """Counts the prompts that it encodes."""

    count = 0

    def encode(self, prompts, **kwargs):
        self.count += len(prompts)
        return super().encode(prompts, **kwargs)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_are_the_encoded_prompts(dtype, encoder, tmp_path):
    prompts = EncodedPrompts(PROMPTS, encoder, tmp_path, dtype=dtype)
    assert len(prompts) == 3
    rows, expected = prompts.rows(torch.tensor([2, 0, 2])), encoder.encode(PROMPTS)
    tolerance = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
    for actual, whole in zip(rows, expected, strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, whole[[2, 0, 2]], rtol=tolerance, atol=tolerance)


def test_each_prompt_is_encoded_once(folder, tmp_path):
    """By whatever run; a longer list re-uses the files that it shares with a shorter one."""
    encoder = Counting(folder)
    first = EncodedPrompts(PROMPTS, encoder, tmp_path)
    again = EncodedPrompts(PROMPTS, Counting(folder), tmp_path)
    assert encoder.count == 3
    assert again.fingerprint == first.fingerprint
    EncodedPrompts([*PROMPTS, "one more"], encoder, tmp_path)
    assert encoder.count == 3 + 2
    assert len(list(tmp_path.iterdir())) == 3


def test_the_key_holds_content_encoder_and_settings(folder, tmp_path):
    """Anything that changes the numbers gives other files."""
    other = shutil.copytree(folder, tmp_path / "other")
    path = other / "text_encoder" / "config.json"
    path.write_text(path.read_text().replace("quick_gelu", "gelu"))
    variants = [
        EncodedPrompts(PROMPTS, PromptEncoder(folder), tmp_path / "cache"),
        EncodedPrompts(PROMPTS, PromptEncoder(other), tmp_path / "cache"),
        EncodedPrompts(PROMPTS, PromptEncoder(folder, long_prompts="error"), tmp_path / "cache"),
        EncodedPrompts(PROMPTS, PromptEncoder(folder), tmp_path / "cache", dtype="float32"),
        EncodedPrompts(PROMPTS[::-1], PromptEncoder(folder), tmp_path / "cache"),
    ]
    assert len({variant.fingerprint for variant in variants}) == len(variants)
    rows = [variant.rows(torch.tensor([0])).states for variant in variants]
    assert (rows[0] - rows[1]).abs().max() > 1e-3


def test_a_file_that_was_cut_short_is_made_anew(folder, tmp_path):
    EncodedPrompts(PROMPTS, PromptEncoder(folder), tmp_path)
    victim = sorted(tmp_path.iterdir())[0]
    victim.write_bytes(victim.read_bytes()[:-10])
    encoder = Counting(folder)
    prompts = EncodedPrompts(PROMPTS, encoder, tmp_path)
    assert 0 < encoder.count < 3
    torch.testing.assert_close(
        prompts.rows(torch.arange(3)).pooled, encoder.encode(PROMPTS).pooled, rtol=2e-3, atol=2e-3
    )


@pytest.mark.parametrize("size", [1, 256], ids=["a byte", "zeros"])
@pytest.mark.parametrize("name", ["states", "pooled", "checksums"])
def test_a_damaged_file_of_the_right_size_is_an_error(name, size, folder, tmp_path):
    """A bad copy, or a disk's: the prompt that it hits is refused, by name of the file; others are read as ever."""
    whole = EncodedPrompts(PROMPTS, PromptEncoder(folder), tmp_path).rows(torch.arange(3))
    victim = EncodedPrompts(PROMPTS, PromptEncoder(folder), tmp_path)._paths[0]
    damage(victim, name, size)
    prompts = EncodedPrompts(PROMPTS, PromptEncoder(folder), tmp_path)
    with pytest.raises(CheckpointError, match=rf"{victim}: damaged, found in prompt 1: delete it"):
        prompts.rows(torch.tensor([2, 0, 1]))
    for part, expected in zip(prompts.rows(torch.tensor([2, 0])), whole, strict=True):
        assert torch.equal(part, expected[[2, 0]])
    victim.unlink()
    anew = EncodedPrompts(PROMPTS, PromptEncoder(folder), tmp_path).rows(torch.arange(3))
    for part, expected in zip(anew, whole, strict=True):
        assert torch.equal(part, expected)


def damage(path, name, size):
    """Change a byte at the end of a tensor's last row, or make up to ``size`` of that row's bytes zero."""
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])[name]
    row = (header["data_offsets"][1] - header["data_offsets"][0]) // header["shape"][0]
    end = start + header["data_offsets"][1]
    if size == 1:
        content[end - 1] ^= 1
    else:
        content[end - min(size, row) : end] = bytes(min(size, row))
    path.write_bytes(content)


def test_a_file_without_checksums_is_made_anew(folder, tmp_path):
    """As versions before them wrote it."""
    path = EncodedPrompts(PROMPTS[:2], PromptEncoder(folder), tmp_path)._paths[0]
    stored = load_file(path)
    del stored["checksums"]
    save_file(stored, path)
    encoder = Counting(folder)
    EncodedPrompts(PROMPTS[:2], encoder, tmp_path).rows(torch.arange(2))
    assert encoder.count == 2


def test_numbers_that_the_type_cannot_hold_are_refused(folder, tmp_path):
    encoder = PromptEncoder(folder)
    encoder._model.text_projection.weight.mul_(1e8)
    with pytest.raises(
        ConfigError, match=r"prompts\.dtype: expected one that holds the encoder's numbers, got torch.float16"
    ):
        EncodedPrompts(PROMPTS, encoder, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert (
        EncodedPrompts(PROMPTS, encoder, tmp_path, dtype="bfloat16").rows(torch.tensor([1])).pooled.abs().max() > 65504
    )


def test_an_interrupted_write_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(encoded_module, "save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        EncodedPrompts(PROMPTS, PromptEncoder(folder), tmp_path)
    assert list(tmp_path.iterdir()) == []
