"""Labels for the phases of a training step: ranges in a torch.profiler trace, and wall-clock where it is asked for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch.profiler import record_function

MEASURED_STEPS = range(5, 10)
"""The 0-based steps that a run times: early, so that every run has them, but after the first, slow ones."""

_clock: ContextVar[PhaseClock | None] = ContextVar("_clock", default=None)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Label a block of a training step; blocks do not nest."""
    clock = _clock.get()
    with record_function(f"dimo: {name}"):
        start = clock.enter() if clock else 0.0
        yield
        if clock:
            clock.leave(name, start)


@contextmanager
def unmeasured() -> Iterator[None]:
    """Leave a block of a training step out of the times: it may not wait for the device."""
    token = _clock.set(None)
    try:
        yield
    finally:
        _clock.reset(token)


class PhaseClock:
    """Times the phases of the steps that run inside :meth:`step`; only those wait for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.total, self.steps = 0.0, 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time one training step."""
        token, start = _clock.set(self), self.now()
        try:
            yield
        finally:
            _clock.reset(token)
        self.total += self.now() - start
        self.steps += 1

    def now(self) -> float:
        """Return the time in seconds at which all work so far is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def enter(self) -> float:
        """Begin a phase: return the time."""
        return self.now()

    def leave(self, name: str, start: float) -> None:
        """End the phase that began at ``start``."""
        self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - start

    def milliseconds(self) -> dict[str, float]:
        """Return the mean milliseconds a step by phase, and under "other" what no phase covers."""
        seconds = self.seconds | {"other": self.total - sum(self.seconds.values())}
        return {name: round(1e3 * value / self.steps, 3) for name, value in seconds.items()}
