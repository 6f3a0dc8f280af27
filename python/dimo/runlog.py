"""A run's log: log.jsonl, TensorBoard and the progress bar are written here, and log.jsonl is read back."""

from __future__ import annotations

import json
import math
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .checkpoint import CheckpointError
from .collapse import CollapseWatch
from .config import RunConfig
from .files import import_extra, write_text

LOG, BOARD = "log.jsonl", "tensorboard"


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and what to try."""


class RunLogger:
    """Averages scalars on the device, writes log.jsonl and TensorBoard, moves the progress bar, warns of a collapse."""

    def __init__(self, run: RunConfig, start: int, headline: tuple[str, ...], warmup_steps: int) -> None:
        self.run, self.start, self.headline = run, start, headline
        self.path = Path(run.output) / LOG
        self.watch = CollapseWatch(warmup_steps)
        self.sums: dict[str, Tensor] = {}
        self.notes: dict[str, Any] = {}
        self.count = 0

    def __enter__(self) -> RunLogger:
        for record in _truncate_log(self.path, self.start):
            self.watch.see(record["step"], record)
        self.file = self.path.open("a", encoding="utf-8")
        self.board = _open_board(self.run, self.start)
        self.bar = tqdm(total=self.run.steps, initial=self.start, unit="step", dynamic_ncols=True, smoothing=0.05)
        self.clock = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        self.file.close()
        if self.board is not None:
            self.board.close()

    def add(self, scalars: dict[str, Tensor]) -> None:
        """Add one step's scalars without reading them."""
        for name, value in scalars.items():
            value = value.detach()
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
        self.count += 1
        self.bar.update()

    def note(self, entries: dict[str, Any]) -> None:
        """Add JSON-able ``entries`` to the line that the next flush writes."""
        self.notes |= entries

    def flush(self, step: int) -> None:
        """Read the means since the last flush and write them; raises TrainingError when one is not finite."""
        names = list(self.sums)
        means = torch.stack([self.sums[n].float() for n in names]).div(self.count).tolist()
        record = dict(zip(names, means, strict=True))
        broken = [n for n, value in record.items() if not math.isfinite(value)]
        if broken:
            raise TrainingError(
                f"step {step}: {', '.join(broken)} is not finite; lower the learning rates or set clip_norm. "
                "The last checkpoint is kept."
            )
        seconds = (time.perf_counter() - self.clock) / self.count
        self._write(step, record | {"seconds_per_step": seconds})
        self.bar.set_postfix({n: f"{record[n]:.3g}" for n in self.headline})
        self.sums, self.count = {}, 0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out of the time of a step what was not training."""
        self.clock = time.perf_counter()

    def preview(self, step: int, scalars: dict[str, float], image: Tensor | None) -> None:
        """Write a preview's scalars and image; its time does not count as training."""
        if scalars:
            self._write(step, scalars)
        if image is not None and self.board is not None:
            self.board.add_image("samples", image, step)
        self.restart_clock()

    def _write(self, step: int, scalars: dict[str, float]) -> None:
        record = {"step": step} | {k: round(v, 6) for k, v in scalars.items()} | self.notes
        warnings = self.watch.see(step, record)
        for text in warnings:
            tqdm.write(f"warning: {text}")
        self.file.write(json.dumps(record | ({"warning": warnings} if warnings else {})) + "\n")
        self.file.flush()
        self.notes = {}
        if self.board is not None:
            for name, value in scalars.items():
                self.board.add_scalar(name, value, step)


def read_log(path: str | os.PathLike[str]) -> dict[int, dict[str, Any]]:
    """Return the records of a log.jsonl by ascending step.

    Lines of one step are merged, the later one wins, but all warnings stay. A last line cut short by a stopped run is
    skipped.

    Raises:
        CheckpointError: the file cannot be read or another line is no record.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{os.fspath(path)}: cannot be read: {error}") from None
    records: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = _parse(line)
        except ValueError as error:
            if number == len(lines) and line.startswith("{"):
                break
            raise CheckpointError(f"{os.fspath(path)}, line {number}: {error}") from None
        merged = records.setdefault(record["step"], {})
        earlier = merged.get("warning", [])
        merged.update(record)
        if earlier:
            merged["warning"] = earlier + record.get("warning", [])
    return dict(sorted(records.items()))


def _parse(line: str) -> dict[str, Any]:
    record = json.loads(line)
    usable = isinstance(record, dict) and isinstance(record.get("step"), int)
    if not usable or not isinstance(record.get("warning", []), list):
        raise ValueError(f"expected a record with a step, got {line[:60]!r}")
    return record


def _truncate_log(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop lines after ``step``, which a resumed run writes again; return the records that stay."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):  # the half-written last line of a killed run
            kept.append((line, _parse(line)))
    kept = [(line, record) for line, record in kept if record["step"] <= step]
    write_text(path, "".join(f"{line}\n" for line, _ in kept))
    return [record for _, record in kept]


def _open_board(run: RunConfig, start: int) -> Any:
    if not run.tensorboard:
        return None
    import_extra("tensorboard", "run.tensorboard")
    writer = import_extra("torch.utils.tensorboard", "run.tensorboard").SummaryWriter
    return writer(Path(run.output) / BOARD, purge_step=start + 1 if start else None)
