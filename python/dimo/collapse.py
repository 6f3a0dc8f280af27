"""Warnings of a training that is about to collapse, from the means that a run logs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

_BLOCK = 10  # steps: what is judged is a mean over at least so many, however often the run logs
_ENTROPY_SHARE = 0.4  # of the first block's; the digits' default recipe ends at 0.57
_ENTROPY_FLOOR = 0.05  # nats
_ENTROPY_RISE = 1.25  # times the first block's; healthy runs fall, and one without any input noise stays below 1.05
_GRADIENT_RATIO = 3.0  # to the median of the blocks before; the default recipe stays below 1.4
_DIVERSITY = 0.85  # of the real images'; the default recipe stays above 0.95
_LESS = "try a lower student.learning_rate"
_SPREAD = "a divergence with less reverse KL (forward_kl, jeffreys:-0.2)"


class CollapseWatch:
    """Looks at a run's log records in their order and warns once of each sign of a collapse.

    The signs: the student's token entropy falls far below its first value or rises above it, its gradient norm rises
    far above its running median, or the samples of a preview vary much less within a class than real ones do. The state
    is a function of the records, so a resumed run that reads its log goes on as if it had not stopped.

    Args:
        warmup_steps: of the learning rate. Gradients grow with it at first, so half of it must have passed before they
            are judged.
    """

    def __init__(self, warmup_steps: int) -> None:
        self.warmup_steps = warmup_steps
        self.given: set[str] = set()
        self.block: list[tuple[int, Mapping[str, Any]]] = []  # step counts and records since the last block
        self.last_step = 0
        self.first_entropy: float | None = None
        self.norms: list[float] = []

    def see(self, step: int, record: Mapping[str, Any]) -> list[str]:
        """Take in the record of ``step`` and return the warnings that it gives rise to, mostly none."""
        signs = {"diversity": _diversity_sign(record)} if "diversity" in record else {}
        if "token_entropy" in record:
            self.block.append((step - self.last_step, record))
            self.last_step = step
            length = sum(count for count, _ in self.block)
            if length >= _BLOCK:
                signs |= self._judge_block(start=step - length)
        new = {name: text for name, text in signs.items() if text and name not in self.given}
        self.given |= set(new)
        return [f"step {step}: {text}" for text in new.values()]

    def _judge_block(self, start: int) -> dict[str, str | None]:
        entropy, norm = self._block_mean("token_entropy"), self._block_mean("gradient_norm")
        self.block = []
        if self.first_entropy is None:
            self.first_entropy = entropy
        signs = {
            "entropy": _entropy_sign(entropy, self.first_entropy), "noise": _noise_sign(entropy, self.first_entropy)
        }  # fmt: skip
        if self.norms and 2 * start >= self.warmup_steps:
            signs["gradient"] = _gradient_sign(norm, statistics.median(self.norms))
        self.norms.append(norm)
        return signs

    def _block_mean(self, name: str) -> float:
        return sum(n * record[name] for n, record in self.block) / sum(n for n, _ in self.block)


def _entropy_sign(entropy: float, first: float) -> str | None:
    if entropy >= max(_ENTROPY_SHARE * first, _ENTROPY_FLOOR):
        return None
    return (
        f"token entropy {entropy:.3g} nats, {first:.3g} at the start: the student is losing its variety; "
        f"{_LESS}, more noise at its input (method.r_init below 1, method.embedding_noise) or {_SPREAD}"
    )


def _noise_sign(entropy: float, first: float) -> str | None:
    if entropy <= _ENTROPY_RISE * first:
        return None
    return (
        f"token entropy {entropy:.3g} nats, {first:.3g} at the start: the student is drifting towards noise; "
        f"{_LESS} or more auxiliary updates (method.num_auxiliary_steps)"
    )


def _gradient_sign(norm: float, median: float) -> str | None:
    if norm <= _GRADIENT_RATIO * median:
        return None
    return (
        f"gradient norm {norm:.3g}, {median:.3g} in the median so far: the student may be diverging; "
        f"{_LESS}, student.clip_norm or more auxiliary updates (method.num_auxiliary_steps)"
    )


def _diversity_sign(record: Mapping[str, Any]) -> str | None:
    if record["diversity"] >= _DIVERSITY:
        return None
    return (
        f"diversity of the preview {record['diversity']:.2f}, 1 for real images: the samples of a class grow alike; "
        f"try method.r_init below 1 or {_SPREAD}"
    )
