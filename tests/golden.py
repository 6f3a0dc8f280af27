"""Golden files of original implementations (tests/fixtures/README.md)."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

FIXTURES = Path(__file__).parent / "fixtures"


class Golden(dict[str, Tensor]):
    """Tensors by name, cloned: memory-mapped ones are unaligned and round differently."""

    def __init__(self, name: str) -> None:
        with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
            super().__init__({key: file.get_tensor(key).clone() for key in file.keys()})  # noqa: SIM118 - no mapping
            self.constructor = json.loads(file.metadata()["golden"])["constructor"]

    @property
    def state(self) -> dict[str, Tensor]:
        """The original's state dict."""
        return {key.removeprefix("state."): value for key, value in self.items() if key.startswith("state.")}
