"""Prompts to text states: CLIP's text tower and its tokeniser, as released beside Meissonic and aMUSEd."""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from .config import ConfigError
from .files import import_extra
from .state_dicts import CheckpointError

_FOLDERS = ("text_encoder", "tokenizer")
_BATCH = 64
LongPrompts = Literal["truncate", "error"]


class EncodedText(NamedTuple):
    """``states`` float32 ``[N, S, D]``, the last hidden states but one, and ``pooled`` float32 ``[N, P]``."""

    states: Tensor
    pooled: Tensor


class PromptEncoder:
    """The encoder of a released folder; the weights are read when the first prompt comes.

    Copies of a model share it. It stays on the device where it worked last.
    """

    def __init__(self, folder: str | os.PathLike, *, long_prompts: LongPrompts = "truncate") -> None:
        """Take the subfolders text_encoder and tokenizer of ``folder``.

        Args:
            folder: a local folder.
            long_prompts: what happens to prompts of more tokens than the encoder has positions: "truncate" cuts them
                and says so, "error" raises.

        Raises:
            CheckpointError: a subfolder is missing.
        """
        self.folder, self.long_prompts = Path(folder), long_prompts
        missing = [name for name in _FOLDERS if not (self.folder / name / _CONFIGS[name]).is_file()]
        if missing:
            wanted = " and ".join(f"{name}/{_CONFIGS[name]}" for name in missing)
            raise CheckpointError(f"text_encoder: expected a folder with {wanted}, got {self.folder}")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the encoder's and tokeniser's files."""
        digest = hashlib.sha256()
        for path in sorted(p for name in _FOLDERS for p in (self.folder / name).rglob("*") if p.is_file()):
            digest.update(f"{path.relative_to(self.folder)} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                while block := file.read(1 << 24):
                    digest.update(block)
        return digest.hexdigest()

    @property
    def max_length(self) -> int:
        """Positions of the encoder, start and end tokens included."""
        return self._model.config.max_position_embeddings

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, device: torch.device | str = "cpu") -> EncodedText:
        """Return the encoded prompts on ``device``.

        Raises:
            ConfigError: a prompt is too long and ``long_prompts`` is "error".
            CheckpointError: the folder's files do not fit.
            ImportError: transformers is not installed.
        """
        ids = self._token_ids(prompts)
        model = self._model.to(device)
        parts = [self._forward(model, part.to(device)) for part in ids.split(_BATCH)]
        return EncodedText(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def to(self, device: torch.device | str) -> None:
        """Move the weights, if they have been read, to make room where they are."""
        if "_model" in vars(self):
            self._model.to(device)

    def save(self, folder: Path) -> None:
        """Copy the encoder's files into ``folder``."""
        for name in _FOLDERS:
            shutil.copytree(self.folder / name, folder / name)

    def __deepcopy__(self, memo: dict[int, Any]) -> PromptEncoder:
        return self

    @staticmethod
    def _forward(model: torch.nn.Module, ids: Tensor) -> EncodedText:
        output = model(input_ids=ids, output_hidden_states=True)
        return EncodedText(output.hidden_states[-2].float(), output.text_embeds.float())

    def _token_ids(self, prompts: Sequence[str]) -> Tensor:
        lengths = [len(ids) for ids in self._tokenizer(list(prompts), verbose=False).input_ids]
        long = [i for i, length in enumerate(lengths) if length > self.max_length]
        if long:
            first = f"{prompts[long[0]][:60]!r} has {lengths[long[0]]} tokens, the encoder takes {self.max_length}"
            if self.long_prompts == "error":
                raise ConfigError(f"prompt: expected at most {self.max_length} tokens, got {lengths[long[0]]}: {first}")
            warnings.warn(f"{len(long)} of {len(prompts)} prompts were cut: {first}", stacklevel=3)
        return self._tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
        ).input_ids

    @cached_property
    def _tokenizer(self) -> Any:
        transformers = import_extra("transformers", "a text encoder", extra="hub")
        try:
            return transformers.CLIPTokenizer.from_pretrained(self.folder / "tokenizer", local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{self.folder / 'tokenizer'}: no CLIP tokeniser: {_reason(error)}") from None

    @cached_property
    def _model(self) -> Any:
        transformers, path = import_extra("transformers", "a text encoder", extra="hub"), self.folder / "text_encoder"
        try:
            model, found = transformers.CLIPTextModelWithProjection.from_pretrained(
                path, local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{path}: no CLIP text encoder: {_reason(error)}") from None
        problems = [f"{kind} {name}" for kind, names in found.items() if kind.endswith("_keys") for name in names]
        if problems:
            raise CheckpointError(f"{path}: does not fit the network: {'; '.join(problems)}")
        return model.eval().requires_grad_(False)


_CONFIGS = {"text_encoder": "config.json", "tokenizer": "tokenizer_config.json"}


def _reason(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
