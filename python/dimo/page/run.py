"""What a run's folder holds, read for its page."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import CheckpointError, read_checkpoint_header
from ..config import ConfigError
from ..runlog import LOG, read_log
from ..trainer import CHECKPOINT
from .results import RESULTS, Results, read_results


@dataclass(frozen=True)
class Run:
    """A run so far: `step` counts the steps done, `log` holds records by step, `results` is None until measured."""

    folder: Path
    config: Mapping[str, Any]
    step: int
    log: Mapping[int, Mapping[str, Any]]
    results: Results | None

    def setting(self, *keys: str) -> Any:
        """Return an entry of the configuration, or None where there is none."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Read a run's folder.

    Raises:
        ConfigError: `folder` is not the folder of a run.
        CheckpointError: a file there is broken or of another kind; the message names it.
    """
    folder = Path(folder)
    log, results, checkpoint = folder / LOG, folder / RESULTS, folder / CHECKPOINT
    if not any(path.is_file() for path in (log, results, checkpoint)):
        raise ConfigError(f"report: expected the folder of a run (with {LOG} or {CHECKPOINT}), got {folder}")
    records = read_log(log) if log.exists() else {}
    step, config = read_checkpoint_header(checkpoint) if checkpoint.exists() else (0, {})
    measured = read_results(results) if results.exists() else None
    config = config or (measured.provenance.get("config") if measured else {})
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{folder}: expected a configuration with keys and values, got {config!r}")
    return Run(folder.resolve(), config, max([step, *records]), records, measured)
