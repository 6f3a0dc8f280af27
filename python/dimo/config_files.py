"""Configurations from YAML files and plain values, strictly: what does not fit is one error that names the key."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

ConfigT = TypeVar("ConfigT")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, what was expected and what was given."""


def check(holds: bool, key: str, expected: str, given: Any) -> None:
    if not holds:
        raise ConfigError(f"{key}: expected {expected}, got {given!r}")


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as plain, YAML- and JSON-able values."""
    return dataclasses.asdict(config, dict_factory=lambda items: {k: _plain(v) for k, v in items})


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def load_config(cls: type[ConfigT], path: str | Path) -> ConfigT:
    """Read a YAML file into the dataclass ``cls``.

    Raises:
        ConfigError: no such file, no YAML, an unknown key (the nearest valid one is named), a wrong type or value.
    """
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), _UniqueKeyLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path}: cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        raise ConfigError(f"config {path}: not valid YAML: {' '.join(str(error).split())}") from None
    try:
        return from_dict(cls, {} if data is None else data)
    except ConfigError as error:
        raise ConfigError(f"config {path}: {error}") from None


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML lets the last of two equal keys win; here that is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.YAMLError(
                    f"key {key!r} stands twice, the second time in line {key_node.start_mark.line + 1}"
                )
            seen.add(key if isinstance(key, str) else None)
        return super().construct_mapping(node, deep)


def from_dict(cls: type[ConfigT], data: Any, prefix: str = "", root: type | None = None) -> ConfigT:
    """Build the dataclass ``cls`` from nested dictionaries; see :func:`load_config` for the errors."""
    check(isinstance(data, dict), prefix.rstrip(".") or "the file", "a mapping of keys to values", data)
    hints, fields = typing.get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            raise ConfigError(f"unknown key {prefix}{key}{_nearest(str(key), prefix, list(fields), root or cls)}")
    values = {key: _convert(hints[key], value, f"{prefix}{key}", root or cls) for key, value in data.items()}
    for name, f in fields.items():
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"missing key {prefix}{name}")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from None


def _nearest(key: str, prefix: str, valid: list[str], root: type) -> str:
    """Name the closest key of the same section, else of another one, else list the section's keys."""
    if close := difflib.get_close_matches(key, valid, n=1, cutoff=0.6):
        return f": did you mean {prefix}{close[0]}?"
    elsewhere = {path.rsplit(".", 1)[-1]: path for path in reversed(_paths(root))}
    if close := difflib.get_close_matches(key, list(elsewhere), n=1, cutoff=0.8):
        return f": did you mean {elsewhere[close[0]]}?"
    return f"; valid keys: {', '.join(valid)}"


def _paths(cls: type, prefix: str = "") -> list[str]:
    """All keys of a configuration, dotted."""
    paths = []
    for name, hint in typing.get_type_hints(cls).items():
        paths.append(prefix + name)
        if dataclasses.is_dataclass(hint):
            paths += _paths(hint, f"{prefix}{name}.")
    return paths


def _convert(hint: Any, value: Any, key: str, root: type) -> Any:
    """Convert a YAML value to a field's type, strictly: no strings for numbers, no booleans for integers."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, f"{key}.", root)
    if origin is Literal:
        check(value in args, key, f"one of {', '.join(map(str, args))}", value)
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, key, root)
    if origin is tuple:
        return _convert_tuple(args, value, key, root)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string
        try:
            value = float(value)
        except ValueError:
            check(False, key, "a number", value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        check(abs(value) < 2**1023, key, "a number that a float can hold", f"{str(value)[:12]}...")
        value = float(value)
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    check(isinstance(value, hint) and (hint is bool or not isinstance(value, bool)), key, names[hint], value)
    return value


def _convert_tuple(args: tuple[Any, ...], value: Any, key: str, root: type) -> tuple[Any, ...]:
    check(isinstance(value, list), key, "a list", value)
    if len(args) == 2 and args[1] is Ellipsis:
        args = (args[0],) * len(value)
    check(len(value) == len(args), key, f"a list of {len(args)} values", value)
    return tuple(_convert(a, v, f"{key}[{i}]", root) for i, (a, v) in enumerate(zip(args, value, strict=True)))
