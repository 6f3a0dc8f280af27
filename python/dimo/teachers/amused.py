"""aMUSEd as a teacher, through diffusers' UVit2DModel."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..diffusers_layout import read_component
from ..files import import_extra
from ..state_dicts import build_on_meta, load_exactly, locate
from ..text_encoder import LongPrompts
from .base import Condition
from .text_to_image import TextToImageSettings, TextToImageTeacher


class AmusedTeacher(TextToImageTeacher):
    """256 or 512 pixels: L = 16² or 32², V = 8,192. It takes no time; every guided row is one of CLIP's prompts.

    Source: Patil et al., *aMUSEd* (arXiv 2401.01808).
    """

    kind: ClassVar[str] = "amused"

    @classmethod
    def build(cls, network_config: dict[str, Any]) -> AmusedTeacher:
        """Return a freshly initialised model of diffusers' sizes."""
        settings = dict(network_config)
        return cls(_network(settings.pop("network")), TextToImageSettings(**settings))

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
    ) -> AmusedTeacher:
        """Load a folder as amused/amused-256 and amused/amused-512 are released.

        Args:
            path: a folder with transformer, and vqvae, text_encoder, tokenizer unless they are given.
            tokenizer: a folder with vqvae.
            text_encoder: a folder with text_encoder and tokenizer.
            grid_size: tokens along a side; None = the configuration's sample_size.
            micro_conditions: None = those of an uncropped image of that size and aesthetic score 6.
            negative_prompt: what guidance leads away from; None = the empty prompt.
            long_prompts: "truncate" (None) or "error".
        """
        folder = locate(path, cls.hub_patterns)
        config, state = read_component(folder, "transformer", "UVit2DModel")

        def build() -> AmusedTeacher:
            network = _network(config)
            side = network.config.sample_size if grid_size is None else grid_size
            return cls(
                network,
                TextToImageSettings.complete(
                    side, micro_conditions, negative_prompt=negative_prompt, long_prompts=long_prompts
                ),
            )

        model = build_on_meta(build, folder)
        load_exactly(model.network, state, folder / "transformer", assign=True)
        model.load_released(folder, tokenizer, text_encoder)
        return model

    def evaluate(
        self, tokens_BHW: Tensor, condition: Condition, mask_ratio: Tensor | None, perturb: Callable | None
    ) -> Tensor:
        """Return logits ``[B, V, H, W]``; ``mask_ratio`` is not used."""
        with _perturbed(self.network.embed, perturb):
            return self.network(tokens_BHW, condition["states"], condition["pooled"], condition["micro_conditions"])

    def text_widths(self) -> tuple[int, int]:
        """Return the channels of the text states and of the pooled vector."""
        return self.network.config.encoder_hidden_size, self.network.config.cond_embed_dim

    def sizes(self) -> dict[str, Any]:
        """Return diffusers' sizes of the network."""
        return {name: value for name, value in self.network.config.items() if not name.startswith("_")}

    def layers(self) -> list[nn.Module]:
        """Return the transformer's layers."""
        return list(self.network.transformer_layers)

    def checkpoint_activations(self) -> None:
        """Recompute layer by layer in the backward pass; diffusers' own switch does not run on these layers."""
        for layer in self.layers():
            if not isinstance(layer.forward, functools.partial):
                layer.forward = functools.partial(_recomputed, layer.forward)


def _network(sizes: dict[str, Any]) -> nn.Module:
    return import_extra("diffusers", "teacher kind 'amused'", extra="hub").UVit2DModel.from_config(sizes)


def _recomputed(forward: Callable, *args: Any, **kwargs: Any) -> Tensor:
    if torch.is_grad_enabled():
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return forward(*args, **kwargs)


@contextmanager
def _perturbed(embed: nn.Module, perturb: Callable[[Tensor], Tensor] | None) -> Iterator[None]:
    """Send the embeddings ``[B, D, H, W]`` through ``perturb`` as ``[B, H·W, D]``."""
    if perturb is None:
        yield
        return

    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return perturb(output.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, output.shape[2:])

    handle = embed.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
