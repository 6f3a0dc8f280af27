"""Categorical draws from logits: guidance, temperature, filters and the draw, a pure function of a key."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from ._backend import MAX_DIMS, address, key_argument, logit_rows, native_kernel, placement, rows_per_sample
from ._checks import (
    check_guidance,
    check_integer,
    check_logit_values,
    check_logits,
    check_number,
    check_values,
)
from .random import resolve_key

_LIB = torch.library.Library("dimo_ext", "FRAGMENT")
# What every operator that draws takes after its own arguments.
DRAW_SCHEMA = (
    "float temperature, int top_k, float top_p, float min_p, Tensor? uncond_logits, float guidance_scale, "
    "Tensor? guidance_per_sample"
)
_LIB.define(f"sample_categorical(Tensor logits, Tensor key, {DRAW_SCHEMA}) -> (Tensor, Tensor)")


class CategoricalSample(NamedTuple):
    """What :func:`sample_categorical` returns.

    Attributes:
        tokens: int64 ``[...]``, the drawn ids.
        log_prob: float32 ``[...]``, their log-probability under the distribution that they were drawn from.
    """

    tokens: Tensor
    log_prob: Tensor


_MAX_VOCAB = 2**22  # of the kernels: as many masses of 40 bits fit 64


def draw_kernel(
    name: str, logits: Tensor, key: Tensor, temperature: float, top_k: int, top_p: float, min_p: float,
    uncond: Tensor | None, guidance_scale: float, guidance_per_sample: Tensor | None,
) -> Callable[..., None] | None:  # fmt: skip
    """Return the launcher of an operator that draws, which takes the rest of its arguments; None: the reference's."""
    kernel = native_kernel(name, logits.device)
    doubles = torch.float64 in (logits.dtype, None if uncond is None else uncond.dtype)
    if kernel is None or doubles or logits.dim() > MAX_DIMS or logits.shape[-1] > _MAX_VOCAB:
        return None
    guidance = None if guidance_per_sample is None else guidance_per_sample.to(torch.float32).contiguous()
    key = key.contiguous()

    def launch(*rest) -> None:
        kernel(
            logits.shape, [logit_rows(logits), logit_rows(uncond)],
            (guidance_scale, address(guidance), rows_per_sample(logits)), key_argument(key), temperature,
            (top_k, top_p, min_p), *rest, *placement(logits.device),
        )  # fmt: skip

    return launch


def _sample_categorical(logits: Tensor, key: Tensor, *draw) -> tuple[Tensor, Tensor]:
    kernel = draw_kernel("sample_categorical", logits, key, *draw)
    if kernel is None:
        return reference.sample_categorical(logits, key, *draw)
    tokens, log_prob = _fake(logits)
    kernel(tokens.data_ptr(), log_prob.data_ptr())
    return tokens, log_prob


def _fake(logits, *_):
    shape = logits.shape[:-1]
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=torch.float32)


for _device in ("CPU", "CUDA"):
    _LIB.impl("sample_categorical", _sample_categorical, _device)
torch.library.register_fake("dimo_ext::sample_categorical", _fake, lib=_LIB)


def check_draw(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, uncond_logits: Tensor | None,
    guidance_scale: float | Tensor,
) -> tuple:  # fmt: skip
    """Check what every draw takes and return it as schemas do."""
    check_logits(logits, "logits")
    scale, per_sample = check_guidance(logits, uncond_logits, "uncond_logits", guidance_scale)
    temperature = check_number(temperature, "temperature", low=0.0)
    check_integer(top_k, "top_k", low=0, high=logits.shape[-1])
    top_p = check_number(top_p, "top_p", low=0.0, high=1.0, open_low=True)
    min_p = check_number(min_p, "min_p", low=0.0, high=1.0)
    uncond = None if uncond_logits is None else uncond_logits.detach()
    return temperature, top_k, top_p, min_p, uncond, scale, per_sample


def sample_categorical(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    uncond_logits: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
    generator: torch.Generator | None = None,
    key: Tensor | None = None,
) -> CategoricalSample:
    """Draw one id a row from softmax(logits / temperature), after guidance and filters; no gradient.

    Order: guidance → temperature → top-k → top-p on what is left, renormalised → min-p relative to the largest
    probability left. Ties at a threshold stay; the id that crosses top-p stays.

    Args:
        logits: ``[..., V]`` float32, float16, bfloat16 or float64; -inf marks ids that are never drawn.
        temperature: divides the logits; 0 gives the argmax (lowest index on ties).
        top_k: keep the k most probable ids, 0 = all.
        top_p: keep the smallest set of ids whose mass reaches p, in (0, 1], 1 = all.
        min_p: keep ids of at least min_p times the largest probability, in [0, 1], 0 = all.
        uncond_logits: ``[..., V]``: logits become uncond + s·(logits - uncond).
        guidance_scale: s, a float or a ``[B]`` tensor; needs ``uncond_logits`` unless 1.
        generator: where the key is drawn from; None = the device's default generator.
        key: int64 ``[2]`` or ``[B, 2]`` from :func:`random_key`; the draws are a pure function of it.

    Returns:
        ``CategoricalSample(tokens, log_prob)``. A row without a finite logit, or with NaN or +inf, gives id -1 and
        log_prob -inf.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given.

    Example:
        >>> logits = torch.tensor([[0.0, 2.0, 1.0, -torch.inf]]).repeat(2, 1)
        >>> sample_categorical(logits, top_k=2, key=random_key(0))
        CategoricalSample(tokens=tensor([2, 1]), log_prob=tensor([-1.3133, -0.3133]))
    """
    draw = check_draw(logits, temperature, top_k, top_p, min_p, uncond_logits, guidance_scale)
    check_logit_values(logits, "logits")
    check_values(lambda: (logits > float("-inf")).any(-1), "logits", "a finite logit in every row")
    batch = logits.shape[0] if logits.dim() > 1 else 1
    key = resolve_key(key, generator, batch_size=batch, device=logits.device)
    return CategoricalSample(*torch.ops.dimo_ext.sample_categorical(logits.detach(), key, *draw))
