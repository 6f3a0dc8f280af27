"""Prompts as text: a text file, a column of CSV or JSON lines, or a Hugging Face data set."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from ..config import ConfigError, PromptsConfig
from ..files import import_extra


def read_prompts(config: PromptsConfig) -> list[str]:
    """Return the prompts that a configuration names, in their order, without empty ones.

    ``config.path`` is a file (.csv, .jsonl or .json with a column ``config.column``; others: a prompt a line), or
    else a folder or id that `datasets.load_dataset` streams.

    Raises:
        ConfigError: no such file, no such column (those that there are get named), a broken line, or no prompt at all.
        ImportError: a data set, and `datasets` is not installed.
    """
    if config.path is None:
        raise ConfigError("prompts.path: expected a text, CSV or JSONL file or a Hugging Face data set, got None")
    stripped = (" ".join(prompt.split()) for prompt in _rows(Path(config.path), config))
    prompts = list(itertools.islice((p for p in stripped if p), config.limit))
    if not prompts:
        raise ConfigError(f"prompts.path: expected at least one prompt, found none in {config.path}")
    return prompts


def _rows(path: Path, config: PromptsConfig) -> Iterator[str]:
    if not path.is_file():
        if path.suffix.lower() in (".txt", *_READERS):  # nobody names a data set so
            raise ConfigError(f"prompts.path: {path}: no such file")
        return _data_set(config)
    reader: Callable[[Path, str], Iterator[str]] = _READERS.get(path.suffix.lower(), _text)
    return _readable(path, reader(path, config.column))


def _readable(path: Path, rows: Iterator[str]) -> Iterator[str]:
    try:
        yield from rows
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"prompts.path: {path} cannot be read: {error}") from None


def _text(path: Path, _: str) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as file:
        yield from file


def _csv(path: Path, column: str) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        _check_column(column, list(reader.fieldnames or ()), path)
        yield from (row[column] or "" for row in reader)


def _json_lines(path: Path, column: str) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"prompts.path: {path}, line {number}: not valid JSON: {error}") from None
            _check_column(column, list(row) if isinstance(row, dict) else [], f"{path}, line {number}")
            yield _as_text(row[column], f"{path}, line {number}")


def _data_set(config: PromptsConfig) -> Iterator[str]:
    datasets = import_extra("datasets", f"{config.path}, which is no file, as a Hugging Face data set", extra="hub")
    try:
        rows = datasets.load_dataset(config.path, split=config.split, streaming=True)
        first = next(iter(rows), {})
    except Exception as error:  # whatever the libraries below it raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(
            f"prompts.path: expected a file or a Hugging Face data set with split {config.split!r}, "
            f"got {config.path}: {reason}"
        ) from None
    _check_column(config.column, list(first), config.path)
    for number, row in enumerate(rows):
        yield _as_text(row[config.column], f"{config.path}, row {number}")


def _check_column(column: str, columns: list[str], place: object) -> None:
    if column not in columns:
        raise ConfigError(f"prompts.column: expected one of {', '.join(columns) or 'none'} ({place}), got {column!r}")


def _as_text(value: object, place: str) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    raise ConfigError(f"prompts.column: expected text, got {value!r} ({place})")


_READERS = {".csv": _csv, ".jsonl": _json_lines, ".json": _json_lines}
