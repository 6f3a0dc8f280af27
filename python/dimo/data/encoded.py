"""Encoded prompts on disk: each encoded once, written atomically, read row by row."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..config import ConfigError
from ..files import atomic_path
from ..state_dicts import CheckpointError
from ..text_encoder import EncodedText, PromptEncoder

SHARD = 1024  # prompts a file
_CHECKSUMS = "checksums"  # int64 [N], one a prompt
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def default_cache() -> Path:
    """Return the folder of encoded prompts: $XDG_CACHE_HOME/dimo/prompts or ~/.cache/dimo/prompts."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dimo" / "prompts"


class EncodedPrompts:
    """Encoded prompts in files of 1,024, each named by the SHA-256 of its prompts, the encoder and the settings.

    What another run has encoded is found again; a file that was cut short is made anew. Only the rows that are asked
    for are read, and each is compared with its checksum then: files of gigabytes are not read to be checked. Copies of
    a model share it.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        encoder: PromptEncoder,
        folder: str | os.PathLike,
        *,
        dtype: Literal["float32", "float16", "bfloat16"] = "float16",
        device: torch.device | str = "cpu",
    ) -> None:
        """Encode the prompts that ``folder`` does not hold yet.

        Args:
            prompts: at least one.
            encoder: encodes them, see :class:`~dimo.text_encoder.PromptEncoder` for its errors.
            folder: of the cache; may hold files of other prompts.
            dtype: of the numbers on disk.
            device: where the encoder works.
        """
        self.texts, self._open = list(prompts), lru_cache(maxsize=64)(_open)
        shards = [prompts[start : start + SHARD] for start in range(0, len(prompts), SHARD)]
        names = [_name(shard, encoder, dtype) for shard in shards]
        self._paths = [Path(folder) / f"{name}.safetensors" for name in names]
        missing = [i for i, path in enumerate(self._paths) if not _is_whole(path, len(shards[i]))]
        for i in tqdm(missing, "encoding prompts", unit="file", disable=not missing):
            _write(self._paths[i], encoder.encode(shards[i], device=device), _DTYPES[dtype])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of prompts, encoder and settings."""
        return hashlib.sha256("".join(path.stem for path in self._paths).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.texts)

    def rows(self, indices: Tensor) -> EncodedText:
        """Return the prompts at ``indices`` (int64 ``[N]`` in [0, len)) as float32 on the indices' device.

        Raises:
            CheckpointError: a file was damaged after it was written.
        """
        parts = [self._row(index) for index in indices.tolist()]
        states, pooled = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
        return EncodedText(*(t.float().to(indices.device, non_blocking=True) for t in (states, pooled)))

    def _row(self, index: int) -> tuple[Tensor, Tensor]:
        path, row = self._paths[index // SHARD], index % SHARD
        file = self._open(path)
        tensors = tuple(file.get_slice(name)[row] for name in EncodedText._fields)
        if _checksum(*tensors) != file.get_slice(_CHECKSUMS)[row]:
            raise CheckpointError(f"{path}: damaged, found in prompt {row}: delete it and it is encoded anew")
        return tensors

    def __deepcopy__(self, memo: dict[int, Any]) -> EncodedPrompts:
        return self


def _name(prompts: Sequence[str], encoder: PromptEncoder, dtype: str) -> str:
    settings = {"encoder": encoder.fingerprint, "long_prompts": encoder.long_prompts, "dtype": dtype}
    return hashlib.sha256(json.dumps([settings, list(prompts)]).encode()).hexdigest()


def _open(path: Path) -> Any:
    return safe_open(path, "pt")


def _is_whole(path: Path, count: int) -> bool:
    """Whether a file is there in full; safetensors compares a file's size with its header."""
    try:
        with safe_open(path, "pt") as file:
            names = (*EncodedText._fields, _CHECKSUMS)
            return all(file.get_slice(name).get_shape()[0] == count for name in names)
    except (SafetensorError, OSError, ValueError):
        return False


def _write(path: Path, encoded: EncodedText, dtype: torch.dtype) -> None:
    stored = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in encoded._asdict().items()}
    if not all(tensor.isfinite().all() for tensor in stored.values()):
        raise ConfigError(f"prompts.dtype: expected one that holds the encoder's numbers, got {dtype}")
    checksums = [_checksum(*rows) for rows in zip(*stored.values(), strict=True)]
    with atomic_path(path) as temporary:
        save_file(stored | {_CHECKSUMS: torch.tensor(checksums)}, temporary)


def _checksum(*tensors: Tensor) -> int:
    """CRC-32 of the bytes of one prompt's tensors."""
    return zlib.crc32(torch.cat([tensor.flatten() for tensor in tensors]).view(torch.uint8).numpy())
