"""Switches that are read from environment variables."""

from __future__ import annotations

import os

_ON, _OFF = ("1", "true", "on", "yes"), ("0", "false", "off", "no")


def switched_on(name: str) -> bool:
    """Return whether the environment variable ``name`` says yes; unset or empty is no.

    Raises:
        ValueError: neither a yes nor a no; upper and lower case are the same.
    """
    value = os.environ.get(name, "")
    if value.lower() not in ("", *_ON, *_OFF):
        raise ValueError(f"{name} must be one of {', '.join(_ON + _OFF)} or unset, got {value!r}")
    return value.lower() in _ON
