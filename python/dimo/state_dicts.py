"""State dicts from files: safetensors, and pickles without running their code; loaded into a module exactly."""

from __future__ import annotations

import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .files import import_extra

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(/.+)?")
_ignoring_objects: ContextVar[bool] = ContextVar("ignoring_objects", default=False)


class CheckpointError(ValueError):
    """A file that is missing, truncated or of another kind; the message names it and what was expected."""


def is_hub_id(source: str | os.PathLike) -> bool:
    """Whether this names a Hugging Face repository, or a file of weights in one, and nothing that is here."""
    name = str(source)
    has_form = _HUB_ID.fullmatch(name) is not None and (name.count("/") > 1) == name.endswith(_WEIGHT_SUFFIXES)
    return has_form and not Path(source).exists()


def locate(source: str | os.PathLike, patterns: Sequence[str] | None = None) -> Path:
    """Return a local path as it is; else download what a Hugging Face id names, or take it from that library's cache.

    Args:
        source: a file or folder; "organisation/name", of which the whole repository is meant; or
            "organisation/name/file" with the suffix of a weight file.
        patterns: of a whole repository only the files that match one of these globs.

    Raises:
        CheckpointError: neither; the message says why the id could not be had.
        ImportError: an id, and huggingface_hub is not installed.
    """
    if not is_hub_id(source):
        return Path(source)
    name = str(source)
    hub = import_extra("huggingface_hub", f"{name}, which is no local path, as a Hugging Face id", extra="hub")
    repository, file = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    try:
        if file:
            return Path(hub.hf_hub_download(repository, file))
        return Path(hub.snapshot_download(repository, allow_patterns=patterns))
    except Exception as error:  # whatever the HTTP library below it raises
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(
            f"{name}: no such file or folder here, and not to be had as a Hugging Face id (without network, give a "
            f"local path): {reason}"
        ) from None


def weights_file(path: Path) -> Path:
    """Return a file as it is, of a folder its only file of weights.

    Raises:
        CheckpointError: neither exists, or the folder holds none or several.
    """
    if not path.is_dir():
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file or folder")
        return path
    found = sorted(file for file in path.iterdir() if file.suffix in _WEIGHT_SUFFIXES)
    if len(found) != 1:
        names = ", ".join(file.name for file in found[:5]) or "none"
        raise CheckpointError(f"{path}: expected a folder with one file of weights, found {names}")
    return found[0]


# --- reading --------------------------------------------------------------------------------------------------------


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; raises CheckpointError for another or a truncated one."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or not a safetensors file: {error}") from None


def read_pickle(path: Path) -> Any:
    """Return what torch.save wrote, tensors and plain containers only; nothing that the file names is run.

    Raises:
        CheckpointError: no such file, truncated, not of torch.save, or it holds other objects, unless inside
            :func:`objects_ignored`.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with warnings.catch_warnings(), _placeholders(path) if _ignoring_objects.get() else nullcontext():
            warnings.simplefilter("ignore")  # of pickles that torch.save did not write; they are refused below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if objects := _foreign_objects(path):
            shown = ", ".join(objects[:5]) + (" ..." if len(objects) > 5 else "")
            advice = (
                "which `dimo convert` cannot ignore" if _ignoring_objects.get() else "run `dimo convert` on it once"
            )
            raise CheckpointError(f"{path}: refused, it holds more than tensors ({shown}): {advice}") from None
        raise _not_torch(path, error) from None
    except Exception as error:  # whatever a damaged file makes the readers of zip files and pickles raise
        raise _not_torch(path, error) from None


def read_state_dict(path: Path, *entries: str) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, or of a pickle: its first entry of ``entries``, else all of it.

    Wrappers' prefixes ("module.", "_orig_mod.") are stripped where every name has them.

    Raises:
        CheckpointError: see :func:`read_safetensors` and :func:`read_pickle`; also no tensors by name.
    """
    content = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    if isinstance(content, dict):
        content = content.get(next((e for e in entries if e in content), None), content)
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        expected = " or ".join([*map(repr, entries), "bare tensors"])
        found = ", ".join(map(str, list(content)[:5])) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{path}: expected a state dict ({expected}), found {found or 'nothing'}")
    return strip_prefixes(content, "module.", "_orig_mod.")


def strip_prefixes(state: dict[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    """Remove each prefix in turn where all names have it."""
    for prefix in prefixes:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


@contextmanager
def objects_ignored() -> Iterator[None]:
    """Let :func:`read_pickle` put empty placeholders where a file has objects; their classes are never imported."""
    token = _ignoring_objects.set(True)
    try:
        yield
    finally:
        _ignoring_objects.reset(token)


class _Placeholder:
    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _placeholders(path: Path) -> Any:
    """The context in which torch's restricted reader makes an empty object of every class that it does not know."""
    named = [(type("Placeholder", (_Placeholder,), {}), name) for name in _foreign_objects(path)]
    return torch.serialization.safe_globals(named)


def _foreign_objects(path: Path) -> list[str]:
    """Qualified names in a pickle that torch's restricted reader refuses."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not even the names can be read
        return []


def _not_torch(path: Path, error: Exception) -> CheckpointError:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return CheckpointError(f"{path}: truncated or not a file of torch.save: {reason[:200]}")


def shape_of(state: dict[str, Tensor], name: str, dimensions: int, source: str | os.PathLike) -> torch.Size:
    """Return a tensor's shape; raises CheckpointError where it is missing or has other dimensions: another layout."""
    if name not in state or state[name].ndim != dimensions:
        found = f"shape {list(state[name].shape)}" if name in state else f"none among {', '.join(list(state)[:5])} ..."
        raise CheckpointError(f"{source}: of another layout: expected {name} of {dimensions} dimensions, found {found}")
    return state[name].shape


def count_layers(state: dict[str, Tensor], prefix: str) -> int:
    """Return how many numbered parts stand below ``prefix``: n for "prefix0.", ..., "prefix{n-1}."."""
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})


# --- loading --------------------------------------------------------------------------------------------------------


def build_on_meta(build: Callable[[], ModuleT], source: str | os.PathLike) -> ModuleT:
    """Build a module without memory and without a draw from the global generator, to be filled by load_exactly.

    Raises:
        CheckpointError: sizes that no network can have.
    """
    try:
        with torch.device("meta"):
            return build()
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: unusable network sizes: {error}") from None


def load_exactly(
    module: nn.Module, state: dict[str, Tensor], source: str | os.PathLike, *, assign: bool = False
) -> None:
    """Copy ``state`` into ``module`` (``assign``: replace its parameters, which may be on the meta device).

    Raises:
        CheckpointError: every name that is missing, unexpected or of another shape.
    """
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
