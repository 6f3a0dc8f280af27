"""Parallel decoding of masked positions: draw, score and reveal in one or two launches, pure functions of a key."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from ._backend import address
from ._checks import (
    check_integer,
    check_logits,
    check_number,
    check_tensor,
    check_values,
    require,
    split_scalar_or_per_sample,
)
from .random import resolve_key
from .sampling import DRAW_SCHEMA, check_draw, draw_kernel

_LIB = torch.library.Library("dimo_ext", "FRAGMENT")
_LIB.define(
    "reveal_ancestral(Tensor logits, Tensor tokens, Tensor key, float probability, Tensor? probability_per_sample, "
    f"int mask_id, {DRAW_SCHEMA}) -> Tensor"
)
_LIB.define(
    "reveal_confident(Tensor logits, Tensor tokens, Tensor key, SymInt count, Tensor? count_per_sample, "
    f"float noise_scale, int mask_id, {DRAW_SCHEMA}) -> Tensor"
)
_MOST_POSITIONS = 65536


def _reveal_ancestral(logits, tokens, key, probability, probability_per_sample, mask_id, *draw):
    kernel = draw_kernel("reveal_ancestral", logits, key, *draw)
    if kernel is None:
        return reference.reveal_ancestral(
            logits, tokens, key, probability, probability_per_sample, mask_id, *draw
        ).contiguous()
    tokens = tokens.contiguous()
    revealed = torch.empty_like(tokens)
    chances = None if probability_per_sample is None else probability_per_sample.contiguous()
    kernel(tokens.data_ptr(), mask_id, (probability, address(chances)), revealed.data_ptr())
    return revealed


def _reveal_confident(logits, tokens, key, count, count_per_sample, noise_scale, mask_id, *draw):
    kernel = draw_kernel("reveal_confident", logits, key, *draw)
    if kernel is None:
        return reference.reveal_confident(
            logits, tokens, key, count, count_per_sample, noise_scale, mask_id, *draw
        ).contiguous()
    tokens = tokens.contiguous()
    revealed, drawn = torch.empty_like(tokens), torch.empty_like(tokens)
    log_prob = torch.empty_like(tokens, dtype=torch.float32)
    counts = None if count_per_sample is None else count_per_sample.contiguous()
    kernel(
        tokens.data_ptr(), mask_id, (count, address(counts)), noise_scale, (drawn.data_ptr(), log_prob.data_ptr()),
        revealed.data_ptr(),
    )  # fmt: skip
    return revealed


def _fake(logits, tokens, *_):
    return torch.empty_like(tokens, memory_format=torch.contiguous_format)


for _device in ("CPU", "CUDA"):
    _LIB.impl("reveal_ancestral", _reveal_ancestral, _device)
    _LIB.impl("reveal_confident", _reveal_confident, _device)
torch.library.register_fake("dimo_ext::reveal_ancestral", _fake, lib=_LIB)
torch.library.register_fake("dimo_ext::reveal_confident", _fake, lib=_LIB)


def reveal_ancestral(
    logits: Tensor,
    tokens: Tensor,
    probability: float | Tensor,
    mask_id: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    uncond_logits: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
    generator: torch.Generator | None = None,
    key: Tensor | None = None,
) -> Tensor:
    """Reveal each masked position with a probability, as a draw from its logits; no gradient.

    A step of the reverse process of masked diffusion from mask ratio r_t to r_s: probability = (r_t - r_s)/r_t, 1 in
    the last step. The logits of positions that stay as they are have no effect.

    Args:
        logits: ``[B, ..., V]`` as in :func:`sample_categorical`, which explains the draw's other arguments.
        tokens: int64 ``[B, ...]``, up to 65,536 positions a sample.
        probability: a float in [0, 1], or a ``[B]`` tensor (its values are clamped to [0, 1]; NaN counts as 0).
        mask_id: the id that masked positions hold.
        temperature, top_k, top_p, min_p, uncond_logits, guidance_scale: of the draw.
        generator: where the key is drawn from; None = the device's default generator.
        key: int64 ``[2]`` or ``[B, 2]`` from :func:`random_key`; the ids are those of :func:`sample_categorical`.

    Returns:
        int64 ``[B, ...]``: ``tokens`` with ids at the positions that are revealed; -1 where none can be drawn.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given.

    Example:
        >>> tokens, logits = torch.tensor([[9, 3, 9, 9, 9, 9]]), torch.zeros(1, 6, 9)
        >>> reveal_ancestral(logits, tokens, 0.5, 9, key=random_key(0))
        tensor([[7, 3, 1, 7, 2, 9]])
    """
    _check_tokens(tokens, logits, mask_id)
    chance, per_sample = split_scalar_or_per_sample(
        probability, "probability", tokens.shape[0], tokens.device, low=0.0, high=1.0
    )
    per_sample = None if per_sample is None else per_sample.to(torch.float32)
    draw = check_draw(logits, temperature, top_k, top_p, min_p, uncond_logits, guidance_scale)
    key = resolve_key(key, generator, batch_size=tokens.shape[0], device=tokens.device)
    return torch.ops.dimo_ext.reveal_ancestral(logits.detach(), tokens, key, chance, per_sample, mask_id, *draw)


def reveal_confident(
    logits: Tensor,
    tokens: Tensor,
    count: int | Tensor,
    mask_id: int,
    *,
    noise_scale: float = 0.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    uncond_logits: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
    generator: torch.Generator | None = None,
    key: Tensor | None = None,
) -> Tensor:
    """Draw an id for every masked position and reveal the most confident ones, an exact number a sample; no gradient.

    Confidence = the draw's log-probability + noise_scale · Gumbel noise, in float64; of equal ones the lower index
    first. A step of parallel decoding (MaskGIT, arXiv 2202.04200), whose noise is annealed to 0. Logits of positions
    that are not masked have no effect.

    Args:
        logits: ``[B, ..., V]`` as in :func:`sample_categorical`, which explains the draw's other arguments.
        tokens: int64 ``[B, ...]``, up to 65,536 positions a sample.
        count: how many positions of each sample are revealed, an int >= 0 or an int64 ``[B]`` tensor (below 0 counts
            as 0); all where fewer are masked.
        mask_id: the id that masked positions hold.
        noise_scale: >= 0.
        temperature: divides the logits, > 0: greedy draws are all equally confident.
        top_k, top_p, min_p, uncond_logits, guidance_scale: of the draw.
        generator: where the key is drawn from; None = the device's default generator.
        key: int64 ``[2]`` or ``[B, 2]`` from :func:`random_key`; the ids are those of :func:`sample_categorical`.

    Returns:
        int64 ``[B, ...]``: ``tokens`` with ids at the positions that are revealed. Where none can be drawn the
        confidence is -inf and the id -1.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given.

    Example:
        >>> tokens, logits = torch.tensor([[9, 3, 9, 9, 9, 9]]), torch.zeros(1, 6, 9)
        >>> reveal_confident(logits, tokens, 2, 9, noise_scale=1.0, key=random_key(0))
        tensor([[7, 3, 9, 9, 9, 1]])
    """
    _check_tokens(tokens, logits, mask_id)
    per_sample = None
    if isinstance(count, Tensor):
        check_tensor(count, "count", tokens.shape[:1], (torch.int64,), tokens.device)
        count, per_sample = 0, count
    check_integer(count, "count", low=0, high=2**62)
    noise_scale = check_number(noise_scale, "noise_scale", low=0.0)
    draw = check_draw(logits, temperature, top_k, top_p, min_p, uncond_logits, guidance_scale)
    require(draw[0] > 0.0, "temperature", "a number > 0: greedy draws are all equally confident", temperature)
    key = resolve_key(key, generator, batch_size=tokens.shape[0], device=tokens.device)
    return torch.ops.dimo_ext.reveal_confident(
        logits.detach(), tokens, key, count, per_sample, noise_scale, mask_id, *draw
    )


def _check_tokens(tokens: Tensor, logits: Tensor, mask_id: int) -> None:
    """Check what positions hold against their logits."""
    check_logits(logits, "logits")
    require(logits.dim() >= 3, "logits", "shape [B, ..., V] of at least 3 dimensions", list(logits.shape))
    check_tensor(tokens, "tokens", logits.shape[:-1], (torch.int64,), logits.device)
    positions = tokens.shape[1:].numel()
    require(positions <= _MOST_POSITIONS, "tokens", f"at most {_MOST_POSITIONS} positions a sample", positions)
    check_integer(mask_id, "mask_id", low=-(2**63), high=2**63 - 1)
    expected = "at masked positions, numbers below +inf of which one is finite"
    check_values(lambda: (logits.amax(-1).abs() < torch.inf) | (tokens != mask_id), "logits", expected)
