"""Halton-MaskGIT as a teacher: class ids as condition, logits of the real tokens only."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from dimo_ext.random import random_integers

from ..networks.halton import HaltonConfig, HaltonTransformer
from ..state_dicts import CheckpointError, build_on_meta, count_layers, load_exactly, read_state_dict, shape_of
from ..tokenizers import VQGANTokenizer
from .base import Teacher, perturbation

_HEADS = {384: 6, 512: 6, 768: 12, 1024: 16}  # of the published widths: tiny, small, base, large


class HaltonTeacher(Teacher):
    """A class-conditional :class:`~dimo.networks.halton.HaltonTransformer`; ``condition`` is int64 class ids ``[B]``."""

    kind: ClassVar[str] = "halton"
    published: ClassVar[bool] = True

    def __init__(self, network: HaltonTransformer) -> None:
        super().__init__()
        self.network = network
        self.vocab_size, self.mask_id = network.config.vocab_size, network.mask_id
        self.seq_len, self.num_classes = network.seq_len, network.config.num_classes

    @classmethod
    def build(cls, network_config: dict[str, Any]) -> HaltonTeacher:
        """Return a freshly initialised model; unknown sizes raise TypeError."""
        return cls(HaltonTransformer(HaltonConfig(**network_config)))

    def network_config(self) -> dict[str, Any]:
        """Return the sizes of the network."""
        return dataclasses.asdict(self.network.config)

    @classmethod
    def from_original(
        cls, path: str | os.PathLike, *, tokenizer: str | os.PathLike | None = None, heads: int | None = None
    ) -> HaltonTeacher:
        """Load a checkpoint of Halton-MaskGIT.

        Args:
            path: ``ImageNet_{256,384}_{tiny,small,base,large}.pth`` (weights under "model_state_dict").
            tokenizer: LlamaGen's VQ model, see :class:`~dimo.tokenizers.VQGANTokenizer`; None = tokens only.
            heads: None = those of the published width.
        """
        state = read_state_dict(Path(path), "model_state_dict")
        model = build_on_meta(lambda: cls(HaltonTransformer(_sizes(state, heads, path))), path)
        tied = state.pop("head.weight", None)
        if tied is not None and not torch.equal(tied, state["tok_emb.weight"]):
            raise CheckpointError(f"{path}: expected head.weight to be tok_emb.weight, they differ")
        load_exactly(model.network, state, path, assign=True)
        model.attach(None if tokenizer is None else VQGANTokenizer.from_original(tokenizer))
        return model

    def logits(
        self,
        tokens_BL: Tensor,
        condition: Tensor,
        *,
        mask_ratio: Tensor | None = None,
        embedding_noise: float = 0.0,
        embedding_noise_scale: str = "unit",
        key: Tensor | None = None,
    ) -> Tensor:
        """Return logits ``[B, L, V]``; Halton-MaskGIT takes no time input, ``mask_ratio`` is not used."""
        perturb = perturbation(self.network.tok_emb.weight, embedding_noise, embedding_noise_scale, key)
        return self.network(tokens_BL, condition, perturb=perturb)

    def null_condition(self, batch_size: int) -> Tensor:
        """Return the null class ``[B]``."""
        return torch.full((batch_size,), self.num_classes, dtype=torch.int64, device=self.device)

    def sample_condition(self, batch_size: int, key: Tensor) -> Tensor:
        """Draw uniform class ids ``[B]``."""
        return random_integers(key, batch_size, self.num_classes)

    def frozen_parameters(self) -> list[str]:
        """Embeddings and the output bias: what the official Di[M]O recipe keeps fixed in MaskGIT."""
        return ["network.tok_emb.weight", "network.cls_emb.weight", "network.pos_emb.weight", "network.head.bias"]


def _sizes(state: dict[str, Tensor], heads: int | None, path: str | os.PathLike) -> HaltonConfig:
    """Read the sizes off the shapes."""
    ids, width = shape_of(state, "tok_emb.weight", 2, path)
    seq_len = shape_of(state, "pos_emb.weight", 2, path)[0]
    if heads is None and width not in _HEADS:
        raise CheckpointError(f"teacher heads: {path} does not tell them, and its width {width} is not a published one")
    return HaltonConfig(
        grid_size=math.isqrt(seq_len), vocab_size=ids - 1, width=width, heads=heads or _HEADS[width],
        num_classes=shape_of(state, "cls_emb.weight", 2, path)[0] - 1,
        depth=count_layers(state, "transformer.layers."),
        mlp_width=shape_of(state, "transformer.layers.0.ff.w1.weight", 2, path)[0],
        registers=state["reg_tokens.weight"].shape[0] if "reg_tokens.weight" in state else 0,
        patch_size=2 if "in_proj.weight" in state else 1,
    )  # fmt: skip
