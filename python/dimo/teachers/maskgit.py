"""MaskGIT-pytorch v1.0 as a teacher, from the checkpoints that its authors and Di[M]O's published."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from ..networks.maskgit import MaskGITConfig, MaskTransformer
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


class MaskGITTeacher(ClassConditionalTeacher):
    """A :class:`~dimo.networks.maskgit.MaskTransformer`."""

    kind: ClassVar[str] = "maskgit"
    published: ClassVar[bool] = True
    heads_by_width: ClassVar[dict[int, int]] = {768: 16}

    @classmethod
    def build(cls, network_config: dict[str, Any]) -> MaskGITTeacher:
        """Return a freshly initialised model; unknown sizes raise TypeError."""
        return cls(MaskTransformer(MaskGITConfig(**network_config)))

    @classmethod
    def from_original(
        cls, path: str | os.PathLike, *, tokenizer: str | os.PathLike | None = None, heads: int | None = None
    ) -> MaskGITTeacher:
        """Load a checkpoint of MaskGIT-pytorch v1.0, or the bare weights of Di[M]O's released generator.

        Args:
            path: ``MaskGIT_ImageNet_256.pth`` (weights under "model_state_dict"), ``pytorch_model.bin`` or its folder.
            tokenizer: taming-transformers' VQGAN, see :class:`~dimo.tokenizers.VQGANTokenizer`; None = tokens only,
                for the published 1,024 tokens.
            heads: None = those of the published width, 768.
        """
        decoder = None if tokenizer is None else VQGANTokenizer.from_original(tokenizer)
        path = weights_file(Path(path))
        state = read_state_dict(path, "model_state_dict")
        vocab_size = decoder.vocab_size if decoder else MaskGITConfig.vocab_size
        model = build_on_meta(lambda: cls(MaskTransformer(cls._sizes(state, vocab_size, heads, path))), path)
        load_exactly(model.network, state, path, assign=True)
        model.attach(decoder)
        return model

    def frozen_parameters(self) -> list[str]:
        """Token and position embeddings and the output bias, as in the official Di[M]O recipe."""
        return ["network.tok_emb.weight", "network.pos_emb", "network.bias"]

    @classmethod
    def _sizes(
        cls, state: dict[str, Tensor], vocab_size: int, heads: int | None, path: str | os.PathLike
    ) -> MaskGITConfig:
        """Read the sizes off the shapes; ids are tokens, [MASK], classes, the null class."""
        ids, width = shape_of(state, "tok_emb.weight", 2, path)
        seq_len = shape_of(state, "pos_emb", 3, path)[1] - 1
        num_classes = ids - vocab_size - 2
        if num_classes < 1 or math.isqrt(seq_len) ** 2 != seq_len:
            raise CheckpointError(
                f"{path}: expected {vocab_size} tokens (the tokeniser's, or the published count without one) and "
                f"classes among its ids, a square of positions, got {ids} ids, {seq_len} positions"
            )
        return MaskGITConfig(
            grid_size=math.isqrt(seq_len), vocab_size=vocab_size, num_classes=num_classes, width=width,
            depth=count_layers(state, "transformer.layers."), heads=cls.heads_of(width, heads, path),
            mlp_width=shape_of(state, "transformer.layers.0.1.fn.net.0.weight", 2, path)[0],
        )  # fmt: skip
