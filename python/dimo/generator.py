"""The product: a one-step generator as a self-contained folder, loaded and called without any training code."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import dimo_ext

from .checkpoint import PATTERNS, CheckpointError, load_model, save_model
from .config import ConfigError, SamplingConfig, from_dict
from .files import import_extra
from .pictures import to_pil
from .samplers import sample_few_steps
from .state_dicts import locate
from .teachers import Teacher
from .teachers.base import Condition

FORMAT = "dimo.one_step_generator"
_SAMPLING = tuple(f.name for f in dataclasses.fields(SamplingConfig))


class OneStepGenerator:
    """A distilled student with the settings that it samples with.

    The folder of :meth:`save_pretrained` holds ``model.safetensors``, the tokeniser's ``tokenizer.safetensors``, a
    text-to-image model's ``text_encoder`` and ``tokenizer``, and ``config.json``: format and version, the teacher's
    kind, sizes of network and tokeniser, ``sampling`` (r_init, embedding noise and its scale, temperature), the whole
    training ``recipe``, the ``provenance`` of the weights and the versions it ran with.
    """

    def __init__(
        self,
        model: Teacher,
        sampling: SamplingConfig,
        recipe: dict[str, Any] | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.sampling = SamplingConfig(**{name: getattr(sampling, name) for name in _SAMPLING})
        self.recipe, self.provenance = recipe or {}, provenance or {}

    def __call__(
        self,
        condition: Condition,
        *,
        key: Tensor,
        temperature: float | None = None,
        few_steps: int = 1,
        output: Literal["tensor", "pil"] = "tensor",
    ) -> Any:
        """Return decoded samples; see :meth:`tokens` for the other arguments.

        Args:
            output: "tensor" for images float ``[B, C, H, W]`` in [0, 1] (or texts), "pil" for a list of Pillow images.
        """
        if output not in ("tensor", "pil"):
            raise ValueError(f"output: expected one of tensor, pil, got {output!r}")
        decoded = self.model.decode(self.tokens(condition, key=key, temperature=temperature, few_steps=few_steps))
        return to_pil(decoded) if output == "pil" else decoded

    def tokens(
        self, condition: Condition, *, key: Tensor, temperature: float | None = None, few_steps: int = 1
    ) -> Tensor:
        """Return tokens int64 ``[B, L]``, in one network evaluation unless ``few_steps`` asks for more.

        Args:
            condition: what the model's kind takes: class ids, a list or int64 ``[B]``, for images by class; a list of
                prompts for text-to-image models; how many texts for a text model.
            key: from :func:`dimo_ext.random_key`, ``[2]`` or ``[B, 2]``.
            temperature: divides the logits, >= 0, 0 takes the most probable token; None = the one the student was saved
                with.
            few_steps: network evaluations; each after the first draws anew what :func:`dimo.sample_few_steps` masks.
        """
        sampling = self.sampling
        if temperature is not None:
            sampling = dataclasses.replace(sampling, student_temperature=temperature)
        return sample_few_steps(self.model, self.model.condition(condition), sampling, steps=few_steps, key=key)

    def to(self, device: torch.device | str) -> OneStepGenerator:
        """Move the network to ``device`` and return self."""
        self.model.to(device)
        return self

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write the generator as a folder, atomically; an older one there is replaced."""
        entries = {"recipe": self.recipe, "provenance": self.provenance}
        save_model(folder, self.model, FORMAT, sampling=dataclasses.asdict(self.sampling), **entries)

    def push_to_hub(self, repository: str, *, private: bool = False) -> str:
        """Upload what :meth:`save_pretrained` writes to a Hugging Face repository, made if it is not there.

        Args:
            repository: "organisation/name"; `hf auth login` or HF_TOKEN gives the right to write there.
            private: of a repository that is made.

        Returns:
            The address of the commit.

        Raises:
            ImportError: huggingface_hub is not installed; its own errors pass through.
        """
        hub = import_extra("huggingface_hub", "push_to_hub", extra="hub")
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "generator"
            self.save_pretrained(folder)
            hub.create_repo(repository, private=private, exist_ok=True)
            return str(hub.upload_folder(repo_id=repository, folder_path=folder))

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, *, device: torch.device | str = "cpu") -> OneStepGenerator:
        """Load a folder of :meth:`save_pretrained`, or a Hugging Face repository of :meth:`push_to_hub`.

        Raises:
            CheckpointError: missing, truncated or of another format; the message names the file.
        """
        return cls.from_entries(*load_model(locate(folder, PATTERNS)), folder).to(device)

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
        return cls(model, sampling, entries.get("recipe"), entries.get("provenance"))


def labels_per_class(num_classes: int, per_class: int) -> Tensor:
    """Class ids ``[num_classes * per_class]``: 0, 0, ..., 1, 1, ..."""
    return torch.arange(num_classes).repeat_interleave(per_class)


def sample_keys(seed: int, count: int, *, device: torch.device | str | None = None) -> Tensor:
    """One key a sample, int64 ``[count, 2]``: samples do not depend on how they are batched."""
    base = dimo_ext.random_key(seed, device=device)
    return dimo_ext.fold_in(base, torch.arange(count, device=device))
