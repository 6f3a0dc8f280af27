"""Texts as samples: files of them, and the entropy that tells a collapse."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .files import write_text


class TextSample(NamedTuple):
    """A text, the seed that draws it again, and :func:`sequence_entropy` of its tokens."""

    seed: int
    text: str
    entropy: float


def sequence_entropy(tokens_BL: Tensor) -> Tensor:
    """Return the entropy in nats of the tokens that occur in each row, float64 ``[B]``, in [0, log L].

    -Σ p log p over the shares p of the distinct tokens, as reported of masked diffusion language models
    (arXiv 2409.02908). A model that repeats itself has a good perplexity and a low entropy.
    """
    rows = [torch.unique(row, return_counts=True)[1].double() / row.numel() for row in tokens_BL.cpu()]
    return torch.stack([-(share * share.log()).sum() for share in rows])


def write_lines(path: str | os.PathLike, samples: Iterable[tuple[str, TextSample]]) -> None:
    """Write a JSON object a line: the setting's label where there is one, seed, entropy, text."""
    lines = [({"setting": label} if label else {}) | s._asdict() for label, s in samples]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def summary(label: str, samples: list[TextSample]) -> str:
    """Return one line: how many texts, their mean and least entropy."""
    entropies = [sample.entropy for sample in samples]
    mean = sum(entropies) / len(entropies)
    return f"{label or 'samples'}: {len(samples)} texts, entropy {mean:.3f} nats (least {min(entropies):.3f})"
