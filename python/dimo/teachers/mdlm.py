"""MDLM as a teacher: text without a condition."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import ConfigError
from ..diffusers_layout import read_json
from ..networks.mdlm import MDLMConfig, MDLMTransformer
from ..state_dicts import (
    CheckpointError,
    build_on_meta,
    count_layers,
    load_exactly,
    locate,
    read_pickle,
    read_state_dict,
    shape_of,
)
from ..tokenizers import TextTokenizer
from .base import Condition, Teacher, noisy_lookup

_PREFIX = "backbone."
_NOISE_FLOOR = 1e-3  # of the log-linear schedule: total noise stays finite where all is masked


class MDLMTeacher(Teacher):
    """A masked diffusion language model; ``condition`` is a placeholder int64 ``[B]``, for there is none.

    SUBS is what the protocol asks of every model: [MASK] has no column, and samplers and losses look at masked
    positions alone; :func:`~dimo.networks.mdlm.subs_log_probs` spells it out.
    """

    kind: ClassVar[str] = "mdlm"
    published: ClassVar[bool] = True
    writes_text: ClassVar[bool] = True
    hub_patterns: ClassVar[tuple[str, ...]] = ("config.json", "model.safetensors")

    def __init__(self, network: MDLMTransformer) -> None:
        super().__init__()
        self.network = network
        self.vocab_size = self.mask_id = network.mask_id  # [MASK] is the last id
        self.seq_len = network.config.model_length

    @classmethod
    def build(cls, network_config: dict[str, Any]) -> MDLMTeacher:
        """Return a freshly initialised model; unknown or missing sizes raise TypeError."""
        return cls(MDLMTransformer(MDLMConfig(**network_config)))

    def network_config(self) -> dict[str, Any]:
        """Return the sizes of the network under their published names."""
        return dataclasses.asdict(self.network.config)

    @classmethod
    def from_original(
        cls, path: str | os.PathLike, *, tokenizer: str | os.PathLike | None = None, seq_len: int | None = None
    ) -> MDLMTeacher:
        """Load kuleshov-group/mdlm-owt, or a training checkpoint of the authors' code.

        Args:
            path: a folder with model.safetensors and config.json; or Lightning's ``.ckpt``, of which the moving average
                is taken where it has one.
            tokenizer: of transformers, a folder or id: openai-community/gpt2 for the released weights; None = tokens.
            seq_len: L; None = the configuration's model_length, 1,024 for a training checkpoint.
        """
        source = locate(path, cls.hub_patterns)
        sizes, state = _read_folder(source) if source.is_dir() else _read_checkpoint(source)
        sizes |= {"model_length": seq_len} if seq_len is not None else {}
        model = build_on_meta(lambda: cls.build(sizes), source)
        load_exactly(model.network, state, source, assign=True)
        if tokenizer is not None:
            model.attach(TextTokenizer.from_original(tokenizer))
        return model

    def logits(
        self,
        tokens_BL: Tensor,
        condition: Condition,
        *,
        mask_ratio: Tensor | None = None,
        embedding_noise: float = 0.0,
        embedding_noise_scale: str = "unit",
        key: Tensor | None = None,
    ) -> Tensor:
        """Return logits ``[B, L, V]``; ``mask_ratio`` counts for models with time conditioning alone."""
        embed = noisy_lookup(embedding_noise, embedding_noise_scale, key)
        return self.network(tokens_BL, self._noise_level(tokens_BL, mask_ratio), embed=embed)

    def _noise_level(self, tokens_BL: Tensor, mask_ratio: Tensor | None) -> Tensor:
        if not self.network.config.time_conditioning:
            return torch.zeros(tokens_BL.shape[0], device=tokens_BL.device)
        if mask_ratio is None:
            raise ValueError("mask_ratio: expected [B] for a model with time conditioning, got None")
        return -torch.log1p(-(1.0 - _NOISE_FLOOR) * mask_ratio)

    def condition(self, inputs: int | list[Any] | Condition) -> Condition:
        """Return the placeholder for a number of texts, or for a list of as many; one passes through."""
        if isinstance(inputs, Tensor):
            return inputs
        count = inputs if isinstance(inputs, int) else len(inputs)
        return torch.zeros(count, dtype=torch.int64, device=self.device)

    def null_condition(self, batch_size: int) -> Condition:
        """Raise: without a condition there is nothing to lead away from."""
        raise ConfigError("guidance_scale: expected 1 for kind 'mdlm', which has no condition to guide by")

    def blank_condition(self, batch_size: int) -> Condition:
        """Return the placeholder."""
        return self.condition(batch_size)

    def sample_condition(self, batch_size: int, key: Tensor) -> Condition:
        """Return the placeholder."""
        return self.condition(batch_size)

    def frozen_parameters(self) -> list[str]:
        """The token embeddings."""
        return ["network.vocab_embed.embedding"]

    def layers(self) -> list[nn.Module]:
        """Return the transformer's blocks."""
        return list(self.network.blocks)

    def checkpoint_activations(self) -> None:
        """Recompute block by block in the backward pass."""
        self.network.recompute = True


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Hugging Face's layout."""
    config = read_json(folder / "config.json", "mdlm: expected a folder with config.json and model.safetensors")
    if config.get("model_type") != "mdlm":
        raise CheckpointError(f"{folder / 'config.json'}: expected model_type mdlm, got {config.get('model_type')!r}")
    sizes = {field.name: config[field.name] for field in dataclasses.fields(MDLMConfig) if field.name in config}
    return sizes, _without_prefix(read_state_dict(folder / "model.safetensors"), folder)


def _read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Lightning's layout; the sizes are read off the shapes."""
    content = read_pickle(path)
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: expected Lightning's state_dict, found none")
    state = _without_prefix(state, path)
    sizes = _sizes(state, path)
    return sizes, _averaged(state, content["ema"], sizes, path) if content.get("ema") else state


def _sizes(state: dict[str, Tensor], path: Path) -> dict[str, Any]:
    vocab_size, width = shape_of(state, "vocab_embed.embedding", 2, path)
    return {
        "vocab_size": vocab_size, "hidden_dim": width, "n_blocks": count_layers(state, "blocks."),
        "cond_dim": shape_of(state, "sigma_map.mlp.0.weight", 2, path)[0],
        "n_heads": width // (2 * shape_of(state, "rotary_emb.inv_freq", 1, path)[0]),
    }  # fmt: skip


def _averaged(state: dict[str, Tensor], ema: Any, sizes: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """Replace the weights by their moving average, a list in the order of the network's parameters."""
    network = build_on_meta(lambda: MDLMTransformer(MDLMConfig(**sizes)), path)
    own, shadows = dict(network.named_parameters()), ema.get("shadow_params") if isinstance(ema, dict) else None
    if not isinstance(shadows, list) or [s.shape for s in shadows] != [p.shape for p in own.values()]:
        raise CheckpointError(f"{path}: expected ema.shadow_params of {len(own)} tensors shaped as the network's")
    return state | dict(zip(own, shadows, strict=True))


def _without_prefix(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the network's part; noise schedules without weights may stand beside it."""
    inner = {name.removeprefix(_PREFIX): tensor for name, tensor in state.items() if name.startswith(_PREFIX)}
    if not inner:
        raise CheckpointError(f"{path}: expected weights named {_PREFIX}*, found {', '.join(list(state)[:3])}")
    return inner
