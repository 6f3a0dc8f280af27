"""The protocol that every masked diffusion model follows here: teacher, student and auxiliary alike."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import dimo_ext

from ..state_dicts import CheckpointError
from ..tokenizers import Tokenizer

Condition = Any  # a pytree of tensors with a leading batch dimension

NOISE_SCALES = ("unit", "rms")


class Teacher(nn.Module, ABC):
    """A masked diffusion model as training and sampling see it: tokens and a condition in, logits out.

    Attributes:
        kind: its name in the registry of teachers, written into checkpoints.
        vocab_size: V, the number of real tokens; ``logits`` returns exactly these columns.
        mask_id: the id of [MASK], outside [0, vocab_size).
        seq_len: L.
        tokenizer: what ``decode`` uses, or None. It follows the model to its device, but is no part of its parameters
            or state dict, and copies of the model share it.
    """

    kind: str
    vocab_size: int
    mask_id: int
    seq_len: int
    published: ClassVar[bool] = False
    """Whether there is a published layout that ``from_original`` loads."""
    writes_text: ClassVar[bool] = False
    """Whether ``decode`` gives texts, not images."""
    prompted: ClassVar[bool] = False
    """Whether training needs prompts, see :class:`~dimo.config.PromptsConfig`."""
    hub_patterns: ClassVar[tuple[str, ...]] = ()
    """Files that ``from_original`` needs of a Hugging Face repository."""

    def __init__(self) -> None:
        super().__init__()
        self.attach(None)

    def attach(self, tokenizer: Tokenizer | None) -> None:
        """Make ``tokenizer`` the one that ``decode`` uses; raises CheckpointError if it knows too few tokens."""
        if tokenizer is not None and tokenizer.vocab_size < self.vocab_size:
            raise CheckpointError(
                f"tokenizer: expected one of {self.vocab_size} tokens, as the model has, got {tokenizer.vocab_size}"
            )
        object.__setattr__(self, "tokenizer", tokenizer and tokenizer.eval().requires_grad_(False))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Teacher:
        if self.tokenizer is not None:
            self.tokenizer._apply(fn, recurse)
        return super()._apply(fn, recurse)

    @abstractmethod
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
        """Return logits ``[B, L, V]`` of the clean tokens.

        Args:
            tokens_BL: int64 ``[B, L]``, masked positions hold ``mask_id``.
            condition: a pytree of tensors ``[B, ...]``.
            mask_ratio: ``[B]`` for models that take the time as an input; others ignore it.
            embedding_noise: σ of the variance-preserving noise on the token embeddings, in [0, 1].
            embedding_noise_scale: "unit" (as the official code) or "rms" (times the embedding table's RMS).
            key: of the noise; needed when ``embedding_noise`` > 0.
        """

    def condition(self, inputs: Any) -> Condition:
        """Return the condition of what a user asks for: class ids, prompts, or a condition itself."""
        return inputs

    def examples(self, count: int) -> list[Any]:
        """Return up to ``count`` different inputs of :meth:`condition` that show what the model does."""
        return [""] * count

    @abstractmethod
    def null_condition(self, batch_size: int) -> Condition:
        """Return the unconditional condition for classifier-free guidance."""

    def blank_condition(self, batch_size: int) -> Condition:
        """Return a condition of the right shapes, whatever it says: for estimates."""
        return self.null_condition(batch_size)

    def origin(self) -> dict[str, str]:
        """Return fingerprints of what training draws conditions from, besides the configuration."""
        return {}

    @abstractmethod
    def sample_condition(self, batch_size: int, key: Tensor) -> Condition:
        """Draw conditions to train on, a pure function of ``key``."""

    @property
    def decodes(self) -> bool:
        """Whether :meth:`decode` has what it needs."""
        return self.tokenizer is not None or type(self).decode is not Teacher.decode

    def decode(self, tokens_BL: Tensor) -> Any:
        """Return what the tokens stand for: images float ``[B, C, H, W]`` in [0, 1], or a list of texts.

        Raises:
            CheckpointError: the model has no tokeniser.
        """
        if self.tokenizer is None:
            raise CheckpointError(f"tokenizer: this model of kind {self.kind!r} has no tokeniser to decode with")
        return self.tokenizer.decode(tokens_BL)

    @abstractmethod
    def network_config(self) -> dict[str, Any]:
        """Return the JSON-able sizes from which ``build`` makes the same network again."""

    @classmethod
    @abstractmethod
    def build(cls, network_config: dict[str, Any]) -> Teacher:
        """Return a freshly initialised model of the given sizes."""

    @classmethod
    def from_original(cls, path: str | os.PathLike, *, tokenizer: str | os.PathLike | None = None) -> Teacher:
        """Load a checkpoint as its authors published it; a kind may take further options by name.

        Args:
            path: a local file or folder, see :func:`dimo.state_dicts.locate` for ids.
            tokenizer: the tokeniser's, where it is a file of its own.

        Raises:
            CheckpointError: another layout, or a kind that has none of its own.
        """
        raise CheckpointError(f"{path}: kind {cls.kind!r} has no published layout, expected a folder written by dimo")

    def save_parts(self, folder: Path) -> None:
        """Write what belongs to the model besides weights and tokeniser, as subfolders."""

    def load_parts(self, folder: Path) -> None:
        """Read what :meth:`save_parts` wrote, if it is there."""

    def frozen_parameters(self) -> list[str]:
        """Names of parameters that the published recipe keeps fixed in the student; used by ``freeze: recipe``."""
        return []

    def layers(self) -> list[nn.Module]:
        """Return the network's repeated blocks, which torch.compile may work on; ValueError where there are none."""
        raise ValueError(f"compile: teacher kind {self.kind!r} names no layers")

    def checkpoint_activations(self) -> None:
        """Recompute the layers' activations in every backward pass from now on; ValueError where none can be."""
        raise ValueError(f"activation_checkpointing: teacher kind {self.kind!r} cannot recompute its layers")

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return next(self.parameters()).device


def noisy_lookup(sigma: float, scale: str, key: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the look-up of tokens ``[B, L]`` in a table ``[ids, D]`` that adds embedding noise as it reads."""
    if sigma == 0.0:
        return F.embedding
    return lambda tokens, table: dimo_ext.embed_and_perturb(
        tokens, table, sigma, scale=_noise_size(table, scale), key=key
    )


def perturbation(table: Tensor, sigma: float, scale: str, key: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Return the function that adds embedding noise to embeddings ``[B, L, D]`` that are no rows of the table."""
    size = _noise_size(table, scale)
    return lambda embeddings: dimo_ext.perturb_embeddings(embeddings, sigma, scale=size, key=key)


def _noise_size(table: Tensor, scale: str) -> float | Tensor:
    if scale not in NOISE_SCALES:
        raise ValueError(f"embedding_noise_scale: expected one of {', '.join(NOISE_SCALES)}, got {scale!r}")
    return 1.0 if scale == "unit" else table.detach().float().square().mean().sqrt()


def concat_conditions(first: Condition, second: Condition) -> Condition:
    """Concatenate two conditions along the batch."""
    return pytree.tree_map(lambda a, b: torch.cat([a, b]), first, second)


def condition_size(condition: Condition) -> int:
    """Return the batch size of a condition."""
    return pytree.tree_leaves(condition)[0].shape[0]
