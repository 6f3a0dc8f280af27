"""Golden files of original implementations (tests/fixtures/README.md), and their released folders at tiny size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
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


def released(name: str, folder: Path) -> Path:
    """Write a released folder at tiny size: the files of this folder, weights from the golden files."""
    shutil.copytree(FIXTURES / name, folder, dirs_exist_ok=True)
    if name == "mdlm":
        state = {f"backbone.{key}": value for key, value in Golden("mdlm_dit").state.items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    transformer = {"amused": "amused_uvit2d", "meissonic": "meissonic_transformer_1024layout"}[name]
    for part, golden in (("transformer", transformer), ("vqvae", "diffusers_vqmodel")):
        path = folder / part / "diffusion_pytorch_model.safetensors"
        save_file(Golden(golden).state, path, metadata={"format": "pt"})
    return folder
