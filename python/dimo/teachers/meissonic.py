"""Meissonic as a teacher, and Di[M]O's one-step generator distilled from it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..diffusers_layout import read_component
from ..networks.meissonic import MeissonicConfig, MeissonicTransformer
from ..state_dicts import build_on_meta, load_exactly, locate
from ..text_encoder import LongPrompts
from .base import Condition
from .text_to_image import TextToImageSettings, TextToImageTeacher

Timestep = Literal["mask_ratio", "scaled_mask_ratio", "zero"]
TIMESTEPS: dict[str, float] = {"mask_ratio": 1.0, "scaled_mask_ratio": 1000.0, "zero": 0.0}  # times the mask ratio


@dataclass(frozen=True)
class MeissonicSettings(TextToImageSettings):
    """``timestep`` names what the network gets as its time, which it multiplies by 1000.

    "mask_ratio" is the ratio; "scaled_mask_ratio" 1000 times that, as Meissonic's training script passes; "zero" what
    Di[M]O's release passes, where a cast to integers makes every ratio below 1 a 0: its one-step weights need it.
    """

    timestep: Timestep = "mask_ratio"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.timestep not in TIMESTEPS:
            raise ValueError(f"timestep: expected one of {', '.join(TIMESTEPS)}, got {self.timestep!r}")


class MeissonicTeacher(TextToImageTeacher):
    """1024 or 512 pixels: L = 64² or 32², V = 8,192."""

    kind: ClassVar[str] = "meissonic"

    @classmethod
    def build(cls, network_config: dict[str, Any]) -> MeissonicTeacher:
        """Return a freshly initialised model; unknown or missing sizes raise TypeError."""
        settings = dict(network_config)
        sizes = MeissonicConfig(**settings.pop("network"))
        return cls(MeissonicTransformer(sizes), MeissonicSettings(**settings))

    @classmethod
    def from_original(
        cls,
        path: str | os.PathLike,
        *,
        tokenizer: str | os.PathLike | None = None,
        text_encoder: str | os.PathLike | None = None,
        grid_size: int | None = None,
        micro_conditions: Sequence[float] | None = None,
        negative_prompt: str | None = None,
        long_prompts: LongPrompts | None = None,
        timestep: Timestep | None = None,
    ) -> MeissonicTeacher:
        """Load a folder as MeissonFlow/Meissonic is released, or Di[M]O's with its transformer alone.

        Args:
            path: a folder with transformer, and vqvae, text_encoder, tokenizer unless they are given.
            tokenizer: a folder with vqvae.
            text_encoder: a folder with text_encoder and tokenizer.
            grid_size: tokens along a side; None = 64 where the network halves the grid, else 32.
            micro_conditions: None = those of an uncropped image of that size and aesthetic score 6.
            negative_prompt: what guidance leads away from; None = the empty prompt.
            long_prompts: "truncate" (None) or "error".
            timestep: None = "mask_ratio", see :class:`MeissonicSettings`.
        """
        folder = locate(path, cls.hub_patterns)
        config, state = read_component(folder, "transformer", "Transformer2DModel")
        grid_size = (64 if config.get("downsample") else 32) if grid_size is None else grid_size
        model = build_on_meta(
            lambda: cls(
                MeissonicTransformer(MeissonicConfig(**config)),
                MeissonicSettings.complete(
                    grid_size, micro_conditions, negative_prompt=negative_prompt, long_prompts=long_prompts,
                    timestep=timestep,
                ),
            ),
            folder,
        )  # fmt: skip
        load_exactly(model.network, state, folder / "transformer", assign=True)
        model.load_released(folder, tokenizer, text_encoder)
        return model

    def evaluate(
        self, tokens_BHW: Tensor, condition: Condition, mask_ratio: Tensor | None, perturb: Callable | None
    ) -> Tensor:
        """Return logits ``[B, V, H, W]``."""
        factor = TIMESTEPS[self.settings.timestep]
        if mask_ratio is None and factor:
            raise ValueError(f"mask_ratio: expected [B] for timestep {self.settings.timestep!r}, got None")
        timestep = factor * mask_ratio if factor else torch.zeros(1, device=tokens_BHW.device)
        return self.network(
            tokens_BHW,
            condition["states"],
            condition["pooled"],
            condition["micro_conditions"],
            timestep,
            perturb=perturb,
        )

    def text_widths(self) -> tuple[int, int]:
        """Return the channels of the text states and of the pooled vector."""
        return self.network.config.joint_attention_dim, self.network.config.pooled_projection_dim

    def sizes(self) -> dict[str, Any]:
        """Return the sizes of the network under their published names."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self.network.config).items()}

    def layers(self) -> list[nn.Module]:
        """Return the blocks of both kinds."""
        return [*self.network.transformer_blocks, *self.network.single_transformer_blocks]

    def checkpoint_activations(self) -> None:
        """Recompute block by block in the backward pass."""
        self.network.recompute = True
