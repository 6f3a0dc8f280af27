"""Components of a diffusers folder: config.json and weights, read without diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from .state_dicts import CheckpointError, read_state_dict

_STEM = "diffusion_pytorch_model"
WEIGHT_FILES = ("config.json", f"{_STEM}.safetensors", f"{_STEM}-*.safetensors", f"{_STEM}.safetensors.index.json")


def read_component(folder: Path, name: str, class_name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the configuration without its private keys, and the weights, of one component.

    Args:
        folder: a diffusers folder with the subfolder ``name``, or that subfolder itself.
        name: "transformer", "vqvae".
        class_name: the ``_class_name`` that config.json must have.

    Raises:
        CheckpointError: no such folder, another class, no weights or truncated ones.
    """
    path = folder / name if (folder / name).is_dir() else folder
    config = read_json(path / "config.json", f"{name}: expected a diffusers folder with {name}/config.json")
    if config.get("_class_name") != class_name:
        raise CheckpointError(f"{path / 'config.json'}: expected class {class_name}, got {config.get('_class_name')!r}")
    return {k: v for k, v in config.items() if not k.startswith("_")}, _read_weights(path)


def read_json(path: Path, purpose: str) -> dict[str, Any]:
    """Return a JSON file's mapping; raises CheckpointError that begins with ``purpose``."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{purpose}, got {path}: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a mapping, got {type(content).__name__}")
    return content


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Read one file, or the parts that an index lists."""
    index = path / f"{_STEM}.safetensors.index.json"
    if index.is_file():
        parts = read_json(index, f"{path}: expected an index of weights").get("weight_map", {})
        states = [read_state_dict(path / name) for name in sorted(set(parts.values()))]
        return {name: tensor for state in states for name, tensor in state.items()}
    pickled = path / f"{_STEM}.bin"
    return read_state_dict(pickled if pickled.is_file() else path / f"{_STEM}.safetensors")
