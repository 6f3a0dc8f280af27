"""Writing without half-written files, and imports that name the extra which provides them."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from .config import ConfigError


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, a file or a folder, and rename it to ``path`` once the block succeeds.

    On an error ``path`` stays as it was. The parent folder is created; the temporary name keeps the suffix, from which
    writers derive the format.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unique = uuid.uuid4().hex[:12]
    temporary = path.with_name(f".{path.stem}.{unique}{path.suffix}")
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir():  # a folder cannot be replaced in one rename
            previous = path.with_name(f".{path.stem}.{unique}.old")
            path.rename(previous)
            temporary.rename(path)
            shutil.rmtree(previous)
        else:
            temporary.replace(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically; raises ValueError for NaN and infinities."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def prepare_output(folder: str | os.PathLike) -> Path:
    """Create a folder and prove that it can be written; raises ConfigError otherwise."""
    folder = Path(folder)
    probe = folder / f".write-test.{uuid.uuid4().hex[:12]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"output: expected a folder that can be written, got {folder}: {error.strerror}") from None
    return folder


def import_extra(module: str, purpose: str) -> ModuleType:
    """Import a module of the extra ``dimo-ext[train]``; ImportError says what needs it and how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name is not None and not module.startswith(error.name.split(".")[0]):
            raise  # the module is there, something below it is broken
        package = {"sklearn": "scikit-learn"}.get(module.split(".")[0], module.split(".")[0])
        raise ImportError(f"{purpose} needs {package}: pip install 'dimo-ext[train]'") from None
