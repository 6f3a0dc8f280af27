"""Writing without half-written files, and imports that name the extra which provides them."""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from .config import ConfigError

_LEFTOVER = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{12}(?P<suffix>\.\w+)?")  # of atomic_path, when a process was killed


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, a file or a folder, and rename it to ``path`` once the block succeeds.

    On an error ``path`` stays as it was, and a crash of the machine leaves the old content or the new one, whole; of a
    folder that replaces another, which takes two renames, perhaps both under temporary names. The parent folder is
    created; the temporary name keeps the suffix, from which writers derive the format.
    """
    path = Path(os.path.realpath(path))  # a link's target is replaced, not the link
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path, path.suffix)
    try:
        yield temporary
        _open_permissions(temporary)
        for part in [temporary, *temporary.rglob("*")]:
            _put_on_disk(part)
        if temporary.is_dir() and path.is_dir():
            _replace_folder(temporary, path)
        else:
            temporary.replace(path)
    finally:
        _remove(temporary)


def _open_permissions(path: Path) -> None:
    """Give files the permissions that the umask asks for: safetensors writes them for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for file in path.iterdir() if path.is_dir() else [path]:
        if file.is_file():
            file.chmod(0o666 & ~mask)


def _put_on_disk(path: Path) -> None:
    """Wait for a file's data or a folder's names: a rename may reach the disk before them, and a crash between."""
    if not path.is_file() and not path.is_dir():
        return  # a link to nowhere
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems do not know it of folders
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.stem}.{uuid.uuid4().hex[:12]}{suffix}")


def _replace_folder(new: Path, path: Path) -> None:
    """Swap a folder in two renames, for one cannot do it; the old one comes back if the second fails."""
    previous = _beside(path, ".old")
    path.rename(previous)
    try:
        new.rename(path)
    except BaseException:
        previous.rename(path)
        raise
    shutil.rmtree(previous)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Clean up after a process that was killed while writing: drop temporaries, bring back a folder that was moved."""
    for path in folder.iterdir():
        if not (match := _LEFTOVER.fullmatch(path.name)):
            continue
        if match["suffix"] == ".old" and not (folder / match["name"]).exists():
            path.rename(folder / match["name"])
        else:
            _remove(path)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write ``value`` as indented JSON, a list of numbers on one line, atomically.

    Raises ValueError for NaN and infinities.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    # A string holds no line break, so this meets no string.
    write_text(path, re.sub(r"\[\n([^][{}\"]*)\]", lambda found: f"[{' '.join(found[1].split())}]", text) + "\n")


def prepare_output(folder: str | os.PathLike, *, files: Sequence[str] = (), folders: Sequence[str] = ()) -> Path:
    """Create a folder, prove that it can be written, and that nothing of another kind stands where results will go.

    Raises:
        ConfigError: otherwise.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test.{uuid.uuid4().hex[:12]}"  # other processes may try the same folder
        with atomic_path(probe) as temporary:
            temporary.touch()
        probe.unlink()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"output: expected a folder that can be written, got {folder}: {reason}") from None
    for name in files:
        if (folder / name).is_dir():
            raise ConfigError(f"output: expected {folder / name} to be a file or absent, found a folder")
    for name in folders:
        if (folder / name).exists() and not (folder / name).is_dir():
            raise ConfigError(f"output: expected {folder / name} to be a folder or absent, found a file")
    return folder


def import_extra(module: str, purpose: str, extra: str = "train") -> ModuleType:
    """Import a module of an extra of dimo-ext; ImportError says what needs it and how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name is not None and not module.startswith(error.name.split(".")[0]):
            raise  # the module is there, something below it is broken
        package = {"sklearn": "scikit-learn"}.get(module.split(".")[0], module.split(".")[0])
        raise ImportError(f"{purpose} needs {package}: pip install 'dimo-ext[{extra}]'") from None
