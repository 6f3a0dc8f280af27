"""Halton-MaskGIT as a teacher, from the checkpoints that its authors published."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..networks.halton import HaltonConfig, HaltonTransformer
from ..state_dicts import (
    CheckpointError,
    build_on_meta,
    count_layers,
    load_exactly,
    read_state_dict,
    shape_of,
    weights_file,
)
from ..tokenizers import VQGANTokenizer
from .class_conditional import ClassConditionalTeacher


class HaltonTeacher(ClassConditionalTeacher):
    """A :class:`~dimo.networks.halton.HaltonTransformer`."""

    kind: ClassVar[str] = "halton"
    published: ClassVar[bool] = True
    heads_by_width: ClassVar[dict[int, int]] = {384: 6, 512: 6, 768: 12, 1024: 16}  # tiny, small, base, large

    @classmethod
    def build(cls, network_config: dict[str, Any]) -> HaltonTeacher:
        """Return a freshly initialised model; unknown sizes raise TypeError."""
        return cls(HaltonTransformer(HaltonConfig(**network_config)))

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
        path = weights_file(Path(path))
        state = read_state_dict(path, "model_state_dict")
        model = build_on_meta(lambda: cls(HaltonTransformer(cls._sizes(state, heads, path))), path)
        tied = state.pop("head.weight", None)
        if tied is not None and not torch.equal(tied, state["tok_emb.weight"]):
            raise CheckpointError(f"{path}: expected head.weight to be tok_emb.weight, they differ")
        load_exactly(model.network, state, path, assign=True)
        model.attach(None if tokenizer is None else VQGANTokenizer.from_original(tokenizer))
        return model

    def frozen_parameters(self) -> list[str]:
        """Embeddings and the output bias: what the official Di[M]O recipe keeps fixed in MaskGIT."""
        return ["network.tok_emb.weight", "network.cls_emb.weight", "network.pos_emb.weight", "network.head.bias"]

    @classmethod
    def _sizes(cls, state: dict[str, Tensor], heads: int | None, path: str | os.PathLike) -> HaltonConfig:
        """Read the sizes off the shapes."""
        ids, width = shape_of(state, "tok_emb.weight", 2, path)
        seq_len = shape_of(state, "pos_emb.weight", 2, path)[0]
        return HaltonConfig(
            grid_size=math.isqrt(seq_len), vocab_size=ids - 1, width=width, heads=cls.heads_of(width, heads, path),
            num_classes=shape_of(state, "cls_emb.weight", 2, path)[0] - 1,
            depth=count_layers(state, "transformer.layers."),
            mlp_width=shape_of(state, "transformer.layers.0.ff.w1.weight", 2, path)[0],
            registers=state["reg_tokens.weight"].shape[0] if "reg_tokens.weight" in state else 0,
            patch_size=2 if "in_proj.weight" in state else 1,
        )  # fmt: skip
