"""Tokenisers: what turns tokens into images or text; shared, frozen parts of teachers and students."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .diffusers_layout import WEIGHT_FILES, read_component
from .files import import_extra
from .networks.vqgan import VQGAN, VQGANConfig
from .state_dicts import (
    CheckpointError,
    build_on_meta,
    count_layers,
    load_exactly,
    locate,
    read_state_dict,
    shape_of,
    weights_file,
)


class Tokenizer(nn.Module, ABC):
    """Tokens to what they stand for.

    Attributes:
        kind: its name in the registry of tokenisers, written into checkpoints.
        vocab_size: V, how many tokens it knows.
    """

    kind: str
    vocab_size: int

    @abstractmethod
    def decode(self, tokens_BL: Tensor) -> Any:
        """Return images float ``[B, C, H, W]`` in [0, 1], or a list of texts."""

    @abstractmethod
    def network_config(self) -> dict[str, Any]:
        """Return the JSON-able values from which ``build`` makes the same tokeniser again."""

    @classmethod
    @abstractmethod
    def build(cls, network_config: dict[str, Any]) -> Tokenizer:
        """Return a tokeniser of the given sizes, its weights not yet loaded."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Tokenizer:
        """Return itself: student, auxiliary and moving average share the frozen tokeniser of their teacher."""
        return self


class VQGANTokenizer(Tokenizer):
    """Square images through a :class:`~dimo.networks.vqgan.VQGAN`: those of taming-transformers and of LlamaGen."""

    kind: ClassVar[str] = "vqgan"

    def __init__(self, network: VQGAN) -> None:
        super().__init__()
        self.network, self.vocab_size = network, network.config.codebook_size

    @classmethod
    def build(cls, network_config: dict[str, Any]) -> VQGANTokenizer:
        """Return a tokeniser of the given sizes; unknown or missing ones raise TypeError."""
        return cls(VQGAN(VQGANConfig(**network_config)))

    def network_config(self) -> dict[str, Any]:
        """Return the sizes of the network."""
        return dataclasses.asdict(self.network.config)

    @classmethod
    def from_original(cls, path: str | os.PathLike, *, encoder: bool = False) -> VQGANTokenizer:
        """Load taming's ``last.ckpt`` or LlamaGen's ``vq_ds16_c2i.pt``; the weights tell which and all sizes.

        Args:
            path: the file, or a folder with no other weights; a Hugging Face id of the file.
            encoder: also load what turns images into tokens; sampling does without.

        Raises:
            CheckpointError: missing, truncated, or of another layout.
        """
        source = weights_file(locate(path))
        state = read_state_dict(source, "state_dict", "model")
        llamagen = any(name.startswith("decoder.conv_blocks.") for name in state)
        state = _taming_names(state) if llamagen else state
        state = {name: tensor for name, tensor in state.items() if not name.startswith(_unused(encoder))}
        network = build_on_meta(lambda: VQGAN(_sizes(state, llamagen, source)), source)
        if encoder and not network.config.encoder_blocks:
            raise CheckpointError(f"{source}: expected an encoder, found a decoder alone")
        load_exactly(network, state, source, assign=True)
        return cls(network)

    def decode(self, tokens_BL: Tensor) -> Tensor:
        """Return images float ``[B, C, H, W]`` in [0, 1]; L must be a square."""
        side = _side(tokens_BL)
        return (0.5 * self.network.decode(tokens_BL.unflatten(1, (side, side))) + 0.5).clamp(0, 1)

    def encode(self, images: Tensor) -> Tensor:
        """Return tokens int64 ``[B, L]`` of images ``[B, C, H, W]`` in [0, 1]; needs ``encoder=True`` at loading."""
        return self.network.encode(2.0 * images - 1.0).flatten(1)


class DiffusersTokenizer(Tokenizer):
    """Square images through diffusers' VQModel: those of Meissonic and aMUSEd."""

    kind: ClassVar[str] = "diffusers_vq"

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.vocab_size = network, network.config.num_vq_embeddings

    @property
    def scale(self) -> int:
        """Pixels a token, along each side."""
        return 2 ** (len(self.network.config.block_out_channels) - 1)

    @classmethod
    def build(cls, network_config: dict[str, Any]) -> DiffusersTokenizer:
        """Return a tokeniser of the given sizes, under diffusers' names."""
        diffusers = import_extra("diffusers", "the image tokeniser", extra="hub")
        return cls(diffusers.VQModel.from_config(network_config))

    def network_config(self) -> dict[str, Any]:
        """Return diffusers' sizes of the network."""
        return {name: value for name, value in self.network.config.items() if not name.startswith("_")}

    @classmethod
    def from_original(cls, path: str | os.PathLike) -> DiffusersTokenizer:
        """Load a diffusers folder with vqvae, or the folder vqvae itself; a Hugging Face id of the first."""
        source = locate(path, [f"vqvae/{name}" for name in WEIGHT_FILES])
        config, state = read_component(source, "vqvae", "VQModel")
        model = build_on_meta(lambda: cls.build(config), source)
        load_exactly(model.network, state, source, assign=True)
        return model

    def decode(self, tokens_BL: Tensor) -> Tensor:
        """Return images float ``[B, 3, H, W]`` in [0, 1]; L must be a square. One after the other: they are large."""
        side = _side(tokens_BL)
        return torch.cat([self._decode(row.unflatten(1, (side, side))) for row in tokens_BL.split(1)])

    def _decode(self, codes: Tensor) -> Tensor:
        shape = (*codes.shape, self.network.config.latent_channels)
        return self.network.decode(codes, force_not_quantize=True, shape=shape).sample.clamp(0, 1)


class TextTokenizer(Tokenizer):
    """Texts through a tokeniser of transformers; it has no weights, all of it stands in the configuration."""

    kind: ClassVar[str] = "text"

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer, self.vocab_size = tokenizer, len(tokenizer)

    @classmethod
    def build(cls, network_config: dict[str, Any]) -> TextTokenizer:
        """Return the tokeniser of ``network_config["json"]``, the text of a tokenizer.json."""
        transformers = import_extra("transformers", "the text tokeniser", extra="hub")
        backend = import_extra("tokenizers", "the text tokeniser", extra="hub").Tokenizer.from_str(
            network_config["json"]
        )
        return cls(transformers.PreTrainedTokenizerFast(tokenizer_object=backend))

    def network_config(self) -> dict[str, Any]:
        """Return the tokeniser as the text of a tokenizer.json."""
        return {"json": self.tokenizer.backend_tokenizer.to_str()}

    @classmethod
    def from_original(cls, path: str | os.PathLike) -> TextTokenizer:
        """Load a tokeniser of transformers from a folder or a Hugging Face id (MDLM: openai-community/gpt2)."""
        source = locate(path, ("tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt", "config.json"))
        transformers = import_extra("transformers", "the text tokeniser", extra="hub")
        try:
            return cls(transformers.AutoTokenizer.from_pretrained(source, local_files_only=True))
        except (OSError, ValueError, TypeError, KeyError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise CheckpointError(
                f"tokenizer: expected a folder of a transformers tokeniser, got {path}: {reason}"
            ) from None

    def decode(self, tokens_BL: Tensor) -> list[str]:
        """Return a text a row."""
        return self.tokenizer.batch_decode(tokens_BL.tolist(), clean_up_tokenization_spaces=False)


TOKENIZERS: dict[str, type[Tokenizer]] = {cls.kind: cls for cls in (VQGANTokenizer, DiffusersTokenizer, TextTokenizer)}


def _side(tokens_BL: Tensor) -> int:
    """Return the square root of L; raises ValueError where there is none."""
    side = math.isqrt(tokens_BL.shape[1])
    if side * side != tokens_BL.shape[1]:
        raise ValueError(f"tokens_BL: expected a square number of positions, got {tokens_BL.shape[1]}")
    return side


# --- VQGAN: what the published names and shapes tell ----------------------------------------------------------------


def _unused(encoder: bool) -> tuple[str, ...]:
    """Prefixes of what is known and not needed: training losses, usage statistics, the encoder unless asked for."""
    return ("loss.", "quantize.codebook_used", *(() if encoder else ("encoder.", "quant_conv.")))


def _taming_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename LlamaGen's parameters: its decoder counts resolutions from the codes', taming's from the image's."""
    last = count_layers(state, "decoder.conv_blocks.") - 1
    renamed = {}
    for name, tensor in state.items():
        new = re.sub(r"decoder\.conv_blocks\.(\d+)\.", lambda m: f"decoder.up.{last - int(m[1])}.", name)
        new = re.sub(r"encoder\.conv_blocks\.", "encoder.down.", new)
        new = re.sub(r"(\.(?:up|down)\.\d+)\.res\.", r"\1.block.", new)
        for number, part in enumerate(("block_1", "attn_1", "block_2")):
            new = new.replace(f"coder.mid.{number}.", f"coder.mid.{part}.")
        renamed[new] = tensor
    return renamed


def _sizes(state: dict[str, Tensor], llamagen: bool, path: Path) -> VQGANConfig:
    codebook_size, embed_dim = shape_of(state, "quantize.embedding.weight", 2, path)
    image_channels = shape_of(state, "decoder.conv_out.weight", 4, path)[0]
    levels = range(count_layers(state, "decoder.up."))
    return VQGANConfig(
        codebook_size, embed_dim, shape_of(state, "decoder.conv_in.weight", 4, path)[1],
        channels=tuple(shape_of(state, f"decoder.up.{i}.block.0.conv1.weight", 4, path)[0] for i in levels),
        attention=tuple(f"decoder.up.{i}.attn.0.norm.weight" in state for i in levels),
        blocks=count_layers(state, "decoder.up.0.block."), image_channels=image_channels, normalize_codes=llamagen,
        encoder_blocks=count_layers(state, "encoder.down.0.block."),
    )  # fmt: skip
