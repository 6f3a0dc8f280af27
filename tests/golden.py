"""Golden files: tensors by name, and the state dict among them (tests/fixtures/README.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

FIXTURES = Path(__file__).parent / "fixtures"


def load_golden(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return inputs and outputs, and the original's state dict.

    The tensors are cloned, as memory-mapped ones are unaligned and round differently.
    """
    tensors = {key: tensor.clone() for key, tensor in load_file(FIXTURES / f"{name}.safetensors").items()}
    state = {key.removeprefix("state."): tensors.pop(key) for key in list(tensors) if key.startswith("state.")}
    return tensors, state


def golden_sizes(name: str) -> dict[str, Any]:
    """Return the arguments of the original's constructor."""
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["golden"])["constructor"]
