"""Files: models as folders (model.safetensors + config.json), a run's checkpoint as one file; every write is atomic."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .files import atomic_path
from .state_dicts import CheckpointError, build_on_meta, is_hub_id, load_exactly, locate, read_safetensors
from .teachers import TEACHERS, Teacher
from .tokenizers import TOKENIZERS, Tokenizer

FORMAT_VERSION = 1
TEACHER_FORMAT = "dimo.teacher"
WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.safetensors"
PATTERNS = (WEIGHTS, CONFIG, TOKENIZER, "text_encoder/*", "tokenizer/*")  # of a folder that dimo wrote
_OWN_NAMES = {pattern.split("/")[0] for pattern in PATTERNS}
SHIPPED = Path(__file__).parent / "weights"
ModelT = TypeVar("ModelT", Teacher, Tokenizer)


def versions() -> dict[str, str]:
    """Versions that a result depends on, for provenance."""
    try:
        own = metadata.version("dimo-ext")
    except metadata.PackageNotFoundError:
        own = "unknown"
    return {"dimo-ext": own, "torch": str(torch.__version__), "python": platform.python_version()}


# --- models ---------------------------------------------------------------------------------------------------------


def save_model(folder: str | os.PathLike, model: Teacher, model_format: str, **entries: Any) -> Path:
    """Write weights and config.json, atomically as a whole folder; ``entries`` are added to the config.

    The tokeniser goes with them: its kind and sizes into the config, its weights into a file of their own.
    """
    tokenizer = model.tokenizer
    check_replaceable(folder)
    config = {
        "format": model_format, "format_version": FORMAT_VERSION, "kind": model.kind, "network": model.network_config(),
        "tokenizer": tokenizer and {"kind": tokenizer.kind, "network": tokenizer.network_config()},
        **entries, "versions": versions(),
    }  # fmt: skip
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        _write_weights(temporary / WEIGHTS, model)
        if tokenizer is not None:
            _write_weights(temporary / TOKENIZER, tokenizer)
        model.save_parts(temporary)
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return Path(folder)


def check_replaceable(folder: str | os.PathLike) -> None:
    """Raise CheckpointError where a model written to ``folder`` would replace what dimo did not write."""
    folder = Path(folder)
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    foreign = [name for name in names if name not in _OWN_NAMES]
    if foreign or (names and not _is_ours(folder)):
        expected = "a folder that is absent, empty or holds a model of dimo and nothing else"
        raise CheckpointError(f"output: expected {expected}, got {folder} with {', '.join((foreign or names)[:5])}")


def _write_weights(path: Path, module: nn.Module) -> None:
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    save_file(state, path)


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
    config, folder = read_model_config(folder), Path(folder)
    model = _build(TEACHERS[config["kind"]], config.get("network"), folder, WEIGHTS)
    if config.get("tokenizer") is not None:
        model.attach(_load_tokenizer(config["tokenizer"], folder))
    model.load_parts(folder)
    return model.eval().requires_grad_(False), config


def _load_tokenizer(entry: Any, folder: Path) -> Tokenizer:
    if not isinstance(entry, dict) or entry.get("kind") not in list(TOKENIZERS):
        kinds = ", ".join(TOKENIZERS)
        raise CheckpointError(f"{folder / CONFIG}: expected a tokenizer of kind {kinds}, got {_get(entry, 'kind')!r}")
    return _build(TOKENIZERS[entry["kind"]], entry.get("network"), folder, TOKENIZER)


def _build(cls: type[ModelT], network: Any, folder: Path, weights: str) -> ModelT:
    state = read_safetensors(folder / weights)
    model = build_on_meta(lambda: cls.build(network), folder / CONFIG)
    load_exactly(model, state, folder / weights, assign=True)
    return model


def fingerprint(model: nn.Module) -> str:
    """Return a SHA-256 of a model's names and weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_teacher(
    kind_or_path: str | os.PathLike,
    path: str | os.PathLike | None = None,
    *,
    tokenizer: str | os.PathLike | None = None,
    **options: Any,
) -> Teacher:
    """Return a teacher, in evaluation mode and frozen.

    Args:
        kind_or_path: a kind, or the path or Hugging Face id of a folder written by dimo.
        path: with a kind: such a folder, or a checkpoint as its authors published it; None = the weights that ship with
            the package.
        tokenizer: path or id of the published tokeniser, where it is a file of its own.
        options: of the kind's ``from_original``, where a published checkpoint does not tell all.

    Raises:
        CheckpointError: an unknown kind or option, a kind without shipped weights, a student, files that are missing,
            truncated or of another kind or layout; names and shapes that do not fit are listed in full.
    """
    if path is None and str(kind_or_path) not in TEACHERS:
        folder = locate(kind_or_path, PATTERNS)
        if not folder.exists():
            expected = f"one of {', '.join(TEACHERS)}, or a folder written by dimo"
            raise CheckpointError(f"teacher kind: expected {expected}, got {str(kind_or_path)!r}")
        return _from_folder(folder, None, tokenizer, options)
    cls = check_teacher(kind_or_path, path)
    if path is None:
        return _from_folder(_shipped(cls.kind), cls, tokenizer, options)
    source = locate(path, cls.hub_patterns + PATTERNS)
    if not cls.published or _is_ours(source):
        return _from_folder(source, cls, tokenizer, options)
    _check_options(cls, options)
    return cls.from_original(source, tokenizer=tokenizer, **options).eval().requires_grad_(False)


def check_teacher(kind: str | os.PathLike, path: str | os.PathLike | None) -> type[Teacher]:
    """Return the class of a kind, after a look at what stands at a local path; nothing is loaded or downloaded.

    Raises:
        CheckpointError: no kind; no such file or folder; a folder of dimo that holds another kind or a student.
    """
    if str(kind) not in TEACHERS:
        expected = f"one of {', '.join(TEACHERS)} (a folder or Hugging Face id belongs in the path)"
        raise CheckpointError(f"teacher kind: expected {expected}, got {str(kind)!r}")
    cls = TEACHERS[str(kind)]
    if path is not None and not is_hub_id(path):
        _check_path(Path(path), cls)
    return cls


def _check_path(path: Path, cls: type[Teacher]) -> None:
    if not path.exists() and str(path) in TEACHERS:
        raise CheckpointError(f"teacher path: expected a file or folder, got {str(path)!r}, which is a teacher kind")
    if cls.published and not path.exists():
        raise CheckpointError(
            f"{path}: no such file or folder; `dimo convert` writes one from a published checkpoint, see docs/teachers"
        )
    if not cls.published and not (path / CONFIG).is_file():
        raise CheckpointError(
            f"{path}: expected a folder with {WEIGHTS} and {CONFIG} for kind {cls.kind!r}, found none"
        )
    if not cls.published or _is_ours(path):
        _check_folder(path, cls)


def _check_folder(folder: Path, cls: type[Teacher] | None) -> None:
    config = read_model_config(folder)
    if config["format"] != TEACHER_FORMAT:
        raise CheckpointError(f"{folder}: expected a teacher ({TEACHER_FORMAT}), got a student ({config['format']})")
    if cls is not None and config["kind"] != cls.kind:
        raise CheckpointError(f"{folder}: expected a teacher of kind {cls.kind!r}, got {config['kind']!r}")


def model_folder(name: str | os.PathLike) -> Path:
    """Return the folder of shipped weights if ``name`` is a teacher's kind, else the path or Hugging Face id."""
    return SHIPPED / name if str(name) in TEACHERS else locate(name, PATTERNS)


def _shipped(kind: str) -> Path:
    if not (SHIPPED / kind).is_dir():
        raise CheckpointError(f"teacher path: kind {kind!r} ships no weights, give a folder or a published checkpoint")
    return SHIPPED / kind


def _from_folder(folder: Path, cls: type[Teacher] | None, tokenizer: Any, options: dict[str, Any]) -> Teacher:
    """Load a folder that dimo wrote; all that a published checkpoint may lack is inside."""
    if cls is None and folder.is_file():
        raise CheckpointError(f"{folder}: a published checkpoint needs its kind: one of {', '.join(TEACHERS)}")
    _check_folder(folder, cls)
    given = [*options, *(["tokenizer"] if tokenizer is not None else [])]
    if given:
        raise CheckpointError(f"{given[0]}: belongs to a published checkpoint, not to {folder}, which dimo wrote")
    return load_model(folder)[0]


def _is_ours(path: Path) -> bool:
    """Whether a folder was written by dimo."""
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and str(config.get("format", "")).startswith("dimo.")


def _check_options(cls: type[Teacher], options: dict[str, Any]) -> None:
    valid = [name for name in inspect.signature(cls.from_original).parameters if name not in ("path", "tokenizer")]
    for name in options:
        if name not in valid:
            expected = f"one of {', '.join(valid)}" if valid else "none"
            raise CheckpointError(f"teacher {name}: no option of kind {cls.kind!r}, expected {expected}")


def _get(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, dict) else config


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
    tensors = read_safetensors(Path(path))
    for name, module in modules.items():
        load_exactly(module, _below(tensors, name), Path(path))
    for name, optimizer in optimizers.items():
        states = _below(tensors, name)
        for index, parameter in enumerate(_parameters(optimizer)):
            if state := _below(states, str(index)):
                optimizer.state[parameter] = {k: v.to(parameter.device) for k, v in state.items()}


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _below(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{name}/"): v for k, v in tensors.items() if k.startswith(f"{name}/")}
