"""Released folders at tiny size, with the weights of golden files (tests/fixtures/README.md)."""

from __future__ import annotations

import json
import shutil
import string
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.golden import FIXTURES, Golden

_CODEBOOK = "quantize.embedding.weight"


def released(name: str, folder: Path, *, codes: int = 32) -> Path:
    """Write a released folder at tiny size: its files under fixtures, weights from the golden files.

    The golden image tokeniser has 24 codes; the first come again until there are as many as the transformers have.
    """
    shutil.copytree(FIXTURES / name, folder, dirs_exist_ok=True)
    if name == "mdlm":
        state = {f"backbone.{key}": value for key, value in Golden("mdlm_dit").state.items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    transformer = {"amused": "amused_uvit2d", "meissonic": "meissonic_transformer_1024layout"}[name]
    _write_component(folder / "transformer", Golden(transformer).state)
    state = Golden("diffusers_vqmodel").state
    state[_CODEBOOK] = torch.cat([state[_CODEBOOK], state[_CODEBOOK][: codes - len(state[_CODEBOOK])]])
    _write_component(folder / "vqvae", state, num_vq_embeddings=codes)
    return folder


def _write_component(folder: Path, state: dict[str, Tensor], **config: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    save_file(state, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def text_encoder(folder: Path, *, states: int, pooled: int, positions: int = 12) -> Path:
    """Write a tiny CLIP text encoder and its tokeniser, which knows lower-case letters one by one, as released."""
    transformers = pytest.importorskip("transformers", reason="text encoders need dimo-ext[hub]")
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    vocab |= {token: i for i, token in enumerate([*letters, *(f"{c}</w>" for c in letters)], len(vocab))}
    tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=positions)
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "tokenizer" / "tokenizer.json").unlink()  # the released folders have these two instead
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(vocab))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocab), hidden_size=states, intermediate_size=2 * states, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=positions, projection_dim=pooled, bos_token_id=0, eos_token_id=1,
        pad_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.CLIPTextModelWithProjection(config).save_pretrained(folder / "text_encoder")
    return folder


def gpt2_like(folder: Path, size: int) -> Path:
    """Write a tokeniser of transformers that decodes ids 0, 1, ... to a, b, ..., the last one to a space."""
    transformers = pytest.importorskip("transformers", reason="text tokenisers need dimo-ext[hub]")
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {symbol: i for i, symbol in enumerate([*string.printable[10:][: size - 1], "Ġ"])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    return folder
