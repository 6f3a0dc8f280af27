"""Files: models as folders (model.safetensors + config.json), a run's checkpoint as one file; every write is atomic."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .files import atomic_path
from .teachers import TEACHERS, Teacher

FORMAT_VERSION = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
SHIPPED = Path(__file__).parent / "weights"


class CheckpointError(ValueError):
    """A file that is missing, truncated or of another kind; the message names it and what was expected."""


def versions() -> dict[str, str]:
    """Versions that a result depends on, for provenance."""
    try:
        own = metadata.version("dimo-ext")
    except metadata.PackageNotFoundError:
        own = "unknown"
    return {"dimo-ext": own, "torch": str(torch.__version__), "python": platform.python_version()}


# --- models ---------------------------------------------------------------------------------------------------------


def save_model(folder: str | os.PathLike, model: Teacher, model_format: str, **entries: Any) -> Path:
    """Write weights and config.json, atomically as a whole folder; ``entries`` are added to the config."""
    config = {
        "format": model_format, "format_version": FORMAT_VERSION, "kind": model.kind, "network": model.network_config(),
        **entries, "versions": versions(),
    }  # fmt: skip
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(state, temporary / WEIGHTS)
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return Path(folder)


def read_model_config(folder: str | os.PathLike) -> dict[str, Any]:
    """Return a model folder's config.json.

    Raises:
        CheckpointError: no such folder or file, no JSON, another format or version, an unknown kind.
    """
    path = Path(folder) / CONFIG
    if not Path(folder).is_dir():
        raise CheckpointError(f"{folder}: expected a folder with {WEIGHTS} and {CONFIG}, found none")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict) or not str(config.get("format", "")).startswith("dimo."):
        raise CheckpointError(f"{path}: expected a config written by dimo, got format {_get(config, 'format')!r}")
    if config.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(f"{path}: expected format_version {FORMAT_VERSION}, got {config.get('format_version')!r}")
    if config.get("kind") not in list(TEACHERS):  # a list: the entry may be unhashable
        raise CheckpointError(f"{path}: expected a kind among {', '.join(TEACHERS)}, got {config.get('kind')!r}")
    return config


def load_model(folder: str | os.PathLike) -> tuple[Teacher, dict[str, Any]]:
    """Return the model of a folder, in evaluation mode, and its config.

    Raises:
        CheckpointError: see :func:`read_model_config`; also truncated weights, missing, unexpected or misshapen ones
            (all of them are listed).
    """
    config = read_model_config(folder)
    path = Path(folder) / WEIGHTS
    state = _read_safetensors(path)
    try:
        with torch.device("meta"):  # no memory for wrong sizes, no draw from the global generator
            model = TEACHERS[config["kind"]].build(config["network"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{Path(folder) / CONFIG}: unusable network sizes: {error}") from None
    _load_state(model, state, path, assign=True)
    return model.eval().requires_grad_(False), config


def fingerprint(model: nn.Module) -> str:
    """Return a SHA-256 of a model's names and weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def model_folder(name: str | os.PathLike) -> Path:
    """Return the folder of shipped weights if ``name`` is a teacher's kind, else ``name`` as a path."""
    return SHIPPED / name if str(name) in TEACHERS else Path(name)


def load_teacher(kind: str, path: str | os.PathLike | None = None) -> Teacher:
    """Return the teacher of a folder, or the one that ships with the package for ``kind`` when ``path`` is None.

    Raises:
        CheckpointError: an unknown kind, a kind without shipped weights, or a folder of another kind.
    """
    if kind not in TEACHERS:
        raise CheckpointError(f"teacher kind: expected one of {', '.join(TEACHERS)}, got {kind!r}")
    folder = SHIPPED / kind if path is None else Path(path)
    if path is None and not folder.is_dir():
        raise CheckpointError(f"teacher path: kind {kind!r} ships no weights, give the folder of a teacher")
    model, config = load_model(folder)
    if config["kind"] != kind:
        raise CheckpointError(f"{folder}: expected a teacher of kind {kind!r}, got {config['kind']!r}")
    return model


def _get(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, dict) else config


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or not a safetensors file: {error}") from None


def _load_state(module: nn.Module, state: dict[str, Tensor], source: Path, *, assign: bool = False) -> None:
    """Copy ``state`` into ``module`` (``assign``: replace its parameters); every name that does not fit is listed."""
    own = module.state_dict()
    problems = [f"missing {n}" for n in own if n not in state] + [f"unexpected {n}" for n in state if n not in own]
    problems += [
        f"{n} has shape {list(state[n].shape)}, expected {list(own[n].shape)}"
        for n in own if n in state and state[n].shape != own[n].shape
    ]  # fmt: skip
    if problems:
        raise CheckpointError(f"{source}: does not fit the network: " + "; ".join(problems))
    # Tensors out of a file may be unaligned, which changes the last bits of results: own copies are aligned.
    module.load_state_dict({n: t.clone() for n, t in state.items()} if assign else state, assign=assign)


# --- runs -----------------------------------------------------------------------------------------------------------


def save_checkpoint(
    path: str | os.PathLike,
    step: int,
    config: dict[str, Any],
    modules: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
) -> None:
    """Write all that a run needs to go on after ``step`` steps into one file."""
    tensors = {f"{n}/{k}": v for n, module in modules.items() for k, v in module.state_dict().items()}
    for name, optimizer in optimizers.items():
        for index, parameter in enumerate(_parameters(optimizer)):
            tensors |= {f"{name}/{index}/{k}": v for k, v in optimizer.state.get(parameter, {}).items()}
    header = {"format": "dimo.checkpoint", "step": str(step), "config": json.dumps(config)}
    with atomic_path(path) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata=header)


def read_checkpoint_header(path: str | os.PathLike) -> tuple[int, dict[str, Any]]:
    """Return the step and the configuration that a checkpoint holds; raises CheckpointError if it is none."""
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
        return int(header["step"]), json.loads(header["config"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: truncated or not a checkpoint of a run: {error}") from None


def load_checkpoint(
    path: str | os.PathLike, modules: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer]
) -> None:
    """Restore modules and optimisers from a file of :func:`save_checkpoint`."""
    tensors = _read_safetensors(Path(path))
    for name, module in modules.items():
        _load_state(module, _below(tensors, name), Path(path))
    for name, optimizer in optimizers.items():
        states = _below(tensors, name)
        for index, parameter in enumerate(_parameters(optimizer)):
            if state := _below(states, str(index)):
                optimizer.state[parameter] = {k: v.to(parameter.device) for k, v in state.items()}


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _below(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{name}/"): v for k, v in tensors.items() if k.startswith(f"{name}/")}
