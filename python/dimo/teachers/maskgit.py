"""MaskGIT as a teacher: class ids as condition, logits of the real tokens only."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from dimo_ext.random import random_integers

from ..networks.maskgit import MaskGITConfig, MaskTransformer
from ..state_dicts import CheckpointError, build_on_meta, count_layers, load_exactly, read_state_dict, shape_of
from ..tokenizers import VQGANTokenizer
from .base import Teacher, perturbation

_HEADS = {768: 16}  # of the published width


class MaskGITTeacher(Teacher):
    """A class-conditional :class:`~dimo.networks.maskgit.MaskTransformer`; ``condition`` is int64 class ids ``[B]``."""

    kind: ClassVar[str] = "maskgit"
    published: ClassVar[bool] = True

    def __init__(self, network: MaskTransformer) -> None:
        super().__init__()
        self.network = network
        self.vocab_size, self.mask_id = network.config.vocab_size, network.mask_id
        self.seq_len, self.num_classes = network.seq_len, network.config.num_classes

    @classmethod
    def build(cls, network_config: dict[str, Any]) -> MaskGITTeacher:
        """Return a freshly initialised model; unknown or missing sizes raise TypeError."""
        return cls(MaskTransformer(MaskGITConfig(**network_config)))

    def network_config(self) -> dict[str, Any]:
        """Return the sizes of the network."""
        return dataclasses.asdict(self.network.config)

    @classmethod
    def from_original(
        cls, path: str | os.PathLike, *, tokenizer: str | os.PathLike | None = None, heads: int | None = None
    ) -> MaskGITTeacher:
        """Load a checkpoint of MaskGIT-pytorch v1.0, or the bare weights of Di[M]O's released generator.

        Args:
            path: ``MaskGIT_ImageNet_256.pth`` (weights under "model_state_dict") or ``pytorch_model.bin``.
            tokenizer: taming-transformers' VQGAN, see :class:`~dimo.tokenizers.VQGANTokenizer`; None = tokens only,
                for the published 1,024 tokens.
            heads: None = those of the published width, 768.
        """
        decoder = None if tokenizer is None else VQGANTokenizer.from_original(tokenizer)
        state = read_state_dict(Path(path), "model_state_dict")
        vocab_size = decoder.vocab_size if decoder else MaskGITConfig.vocab_size
        model = build_on_meta(lambda: cls(MaskTransformer(_sizes(state, vocab_size, heads, path))), path)
        load_exactly(model.network, state, path, assign=True)
        model.attach(decoder)
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
        """Return logits ``[B, L, V]``; MaskGIT takes no time input, ``mask_ratio`` is not used."""
        perturb = perturbation(self.network.tok_emb.weight, embedding_noise, embedding_noise_scale, key)
        return self.network(tokens_BL, condition, perturb=perturb)

    def null_condition(self, batch_size: int) -> Tensor:
        """Return the null class ``[B]``."""
        return torch.full((batch_size,), self.num_classes, dtype=torch.int64, device=self.device)

    def sample_condition(self, batch_size: int, key: Tensor) -> Tensor:
        """Draw uniform class ids ``[B]``."""
        return random_integers(key, batch_size, self.num_classes)

    def frozen_parameters(self) -> list[str]:
        """Token and position embeddings and the output bias, as in the official Di[M]O recipe."""
        return ["network.tok_emb.weight", "network.pos_emb", "network.bias"]


def _sizes(state: dict[str, Tensor], vocab_size: int, heads: int | None, path: str | os.PathLike) -> MaskGITConfig:
    """Read the sizes off the shapes; ids are tokens, [MASK], classes, the null class."""
    ids, width = shape_of(state, "tok_emb.weight", 2, path)
    seq_len = shape_of(state, "pos_emb", 3, path)[1] - 1
    num_classes = ids - vocab_size - 2
    if num_classes < 1 or math.isqrt(seq_len) ** 2 != seq_len:
        raise CheckpointError(
            f"{path}: expected {vocab_size} tokens (the tokeniser's, or the published count without one) and classes "
            f"among its ids, a square of positions, got {ids} ids, {seq_len} positions"
        )
    if heads is None and width not in _HEADS:
        raise CheckpointError(f"teacher heads: {path} does not tell them, and its width {width} is not a published one")
    return MaskGITConfig(
        grid_size=math.isqrt(seq_len), vocab_size=vocab_size, num_classes=num_classes, width=width,
        depth=count_layers(state, "transformer.layers."), heads=heads or _HEADS[width],
        mlp_width=shape_of(state, "transformer.layers.0.1.fn.net.0.weight", 2, path)[0],
    )  # fmt: skip
