"""What teachers of images by class share: class ids as condition, a transformer over tokens, published heads."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dimo_ext.random import random_integers

from ..state_dicts import CheckpointError
from .base import Teacher, noisy_lookup


class ClassConditionalTeacher(Teacher):
    """A transformer of class ids int64 ``[B]``; the null class is the one after the last.

    Args:
        network: with ``config`` (``vocab_size``, ``num_classes``), ``mask_id``, ``seq_len``, ``tok_emb``,
            ``transformer.layers`` and ``transformer.recompute``; called with tokens, class ids and ``embed``.
    """

    heads_by_width: ClassVar[dict[int, int]] = {}
    """Attention heads of the published widths, which checkpoints do not tell."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.vocab_size, self.mask_id = network.config.vocab_size, network.mask_id
        self.seq_len, self.num_classes = network.seq_len, network.config.num_classes

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
        """Return logits ``[B, L, V]``; the networks take no time input, ``mask_ratio`` is not used."""
        embed = noisy_lookup(embedding_noise, embedding_noise_scale, key)
        return self.network(tokens_BL, condition, embed=embed)

    def condition(self, inputs: Any) -> Tensor:
        """Return class ids int64 ``[B]`` on the model's device, of a tensor or a sequence of integers.

        Raises:
            ValueError: another shape or type, or an id outside [0, C), C = the null class included.
        """
        try:
            ids = torch.as_tensor(inputs, device=self.device)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"condition: expected class ids, got {inputs!r}") from None
        if ids.ndim != 1 or ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
            raise ValueError(f"condition: expected integers [B], got {ids.dtype} {list(ids.shape)}")
        outside = ids[(ids < 0) | (ids > self.num_classes)]
        if len(outside):
            raise ValueError(f"condition: expected class ids in [0, {self.num_classes}], got {int(outside[0])}")
        return ids.long()

    def examples(self, count: int) -> list[int]:
        """Return every class, or some spread evenly over more."""
        shown = min(self.num_classes, count)
        return [n * self.num_classes // shown for n in range(shown)]

    def null_condition(self, batch_size: int) -> Tensor:
        """Return the null class ``[B]``."""
        return torch.full((batch_size,), self.num_classes, dtype=torch.int64, device=self.device)

    def sample_condition(self, batch_size: int, key: Tensor) -> Tensor:
        """Draw uniform class ids ``[B]``."""
        return random_integers(key, batch_size, self.num_classes)

    def layers(self) -> list[nn.Module]:
        """Return the transformer's layers."""
        return list(self.network.transformer.layers)

    def checkpoint_activations(self) -> None:
        """Recompute layer by layer in the backward pass."""
        self.network.transformer.recompute = True

    @classmethod
    def heads_of(cls, width: int, heads: int | None, path: str | os.PathLike) -> int:
        """Return ``heads``, or those of a published width; raises CheckpointError for another one."""
        if heads is None and width not in cls.heads_by_width:
            raise CheckpointError(
                f"teacher heads: {path} does not tell them, and its width {width} is none of the published "
                f"{', '.join(map(str, cls.heads_by_width))}"
            )
        return heads or cls.heads_by_width[width]
