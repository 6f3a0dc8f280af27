"""MaskGIT as a teacher: class ids as condition, logits of the real tokens only."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dimo_ext.random import random_integers

from ..networks.maskgit import MaskGITConfig, MaskTransformer
from .base import Teacher, perturbation


class MaskGITTeacher(Teacher):
    """A class-conditional :class:`~dimo.networks.maskgit.MaskTransformer`; ``condition`` is int64 class ids ``[B]``."""

    kind: ClassVar[str] = "maskgit"

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

    def decode(self, tokens_BL: Tensor) -> Tensor:
        """Raise: a bare transformer has no image tokeniser."""
        raise ValueError(f"teacher kind {self.kind!r} has no tokeniser to decode tokens with")

    def layers(self) -> list[nn.Module]:
        """Return the transformer's layers."""
        return list(self.network.transformer.layers)

    def checkpoint_activations(self) -> None:
        """Recompute layer by layer in the backward pass."""
        self.network.transformer.recompute = True

    def frozen_parameters(self) -> list[str]:
        """Token and position embeddings and the output bias, as in the official Di[M]O recipe."""
        return ["network.tok_emb.weight", "network.pos_emb", "network.bias"]
