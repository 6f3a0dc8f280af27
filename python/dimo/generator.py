"""The product: a one-step generator as a self-contained folder, loaded and called without any training code."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
from torch import Tensor

import dimo_ext

from .checkpoint import CheckpointError, load_model, save_model
from .config import ConfigError, SamplingConfig, from_dict
from .samplers import sample_one_step
from .teachers import Teacher
from .teachers.base import Condition

FORMAT = "dimo.one_step_generator"
_SAMPLING = tuple(f.name for f in dataclasses.fields(SamplingConfig))


class OneStepGenerator:
    """A distilled student with the settings that it samples with.

    The folder of :meth:`save_pretrained` holds ``model.safetensors`` and ``config.json``: format and version, the
    teacher's kind, network sizes, ``sampling`` (r_init, embedding noise and its scale, temperature), the whole training
    ``recipe`` and the versions it ran with.
    """

    def __init__(self, model: Teacher, sampling: SamplingConfig, recipe: dict[str, Any] | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.sampling = SamplingConfig(**{name: getattr(sampling, name) for name in _SAMPLING})
        self.recipe = recipe or {}

    def __call__(self, condition: Condition, *, key: Tensor, temperature: float | None = None) -> Any:
        """Return decoded samples (images float ``[B, C, H, W]`` in [0, 1], or texts); see :meth:`tokens`."""
        return self.model.decode(self.tokens(condition, key=key, temperature=temperature))

    def tokens(self, condition: Condition, *, key: Tensor, temperature: float | None = None) -> Tensor:
        """Return tokens int64 ``[B, L]`` in one network evaluation.

        Args:
            condition: a pytree with leading batch dimension B; class ids int64 ``[B]`` for MaskGIT kinds.
            key: from :func:`dimo_ext.random_key`, ``[2]`` or ``[B, 2]``.
            temperature: divides the logits, >= 0, 0 takes the most probable token; None = the one the student was saved
                with.
        """
        sampling = self.sampling
        if temperature is not None:
            sampling = dataclasses.replace(sampling, student_temperature=temperature)
        return sample_one_step(self.model, condition, sampling, key=key)

    def to(self, device: torch.device | str) -> OneStepGenerator:
        """Move the network to ``device`` and return self."""
        self.model.to(device)
        return self

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write the generator as a folder, atomically; an older one there is replaced."""
        save_model(folder, self.model, FORMAT, sampling=dataclasses.asdict(self.sampling), recipe=self.recipe)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, *, device: torch.device | str = "cpu") -> OneStepGenerator:
        """Load a folder of :meth:`save_pretrained`.

        Raises:
            CheckpointError: missing, truncated or of another format; the message names the file.
        """
        return cls.from_entries(*load_model(folder), folder).to(device)

    @classmethod
    def from_entries(cls, model: Teacher, entries: dict[str, Any], source: str | os.PathLike) -> OneStepGenerator:
        """Make a generator of a loaded model and its config.json, which was read from ``source``."""
        if entries["format"] != FORMAT:
            raise CheckpointError(f"{source}: expected a {FORMAT}, got a {entries['format']}")
        stored = entries.get("sampling")
        if not isinstance(stored, dict) or set(stored) != set(_SAMPLING):
            raise CheckpointError(f"{source}: expected sampling settings {', '.join(_SAMPLING)}, got {stored!r}")
        try:
            sampling = from_dict(SamplingConfig, stored)
        except ConfigError as error:
            raise CheckpointError(f"{source}: unusable sampling settings: {error}") from None
        return cls(model, sampling, entries.get("recipe"))


def labels_per_class(num_classes: int, per_class: int) -> Tensor:
    """Class ids ``[num_classes * per_class]``: 0, 0, ..., 1, 1, ..."""
    return torch.arange(num_classes).repeat_interleave(per_class)


def sample_keys(seed: int, count: int, *, device: torch.device | str | None = None) -> Tensor:
    """One key a sample, int64 ``[count, 2]``: samples do not depend on how they are batched."""
    base = dimo_ext.random_key(seed, device=device)
    return dimo_ext.fold_in(base, torch.arange(count, device=device))
