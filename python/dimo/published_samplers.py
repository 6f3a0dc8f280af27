"""Samplers as text-to-image and text teachers were released with; flat functions like those of :mod:`dimo.samplers`."""

from __future__ import annotations

import torch
from torch import Tensor

import dimo_ext
from dimo_ext.philox import Tag, random_words, uniform

from .samplers import all_masked, draw_at
from .schedules import mask_ratio, sampling_ratios
from .teachers.base import Condition, Teacher


@torch.no_grad()
def sample_amused(
    model: Teacher,
    condition: Condition,
    *,
    steps: int,
    mask_schedule: str = "cosine",
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    choice_temperature: tuple[float, float] = (2.0, 0.0),
    key: Tensor,
) -> Tensor:
    """The decoding of aMUSEd (arXiv 2401.01808) and Meissonic: MaskGIT's with their schedulers' numbers.

    Confidence = log-probability of the draw + Gumbel noise times a scale that goes linearly through
    ``choice_temperature``. After each step but the last floor(r·L) tokens stay masked, at least one.

    Args:
        model, condition, steps, mask_schedule, guidance_scale, temperature, key: as in
            :func:`~dimo.samplers.sample_ancestral`, with one evaluation a step whatever L.
        choice_temperature: scale of the noise at the first and at the last step, >= 0.

    Returns:
        Tokens int64 ``[B, L]`` without [MASK].
    """
    if temperature == 0.0:
        raise ValueError("temperature: expected a number > 0, got 0: greedy draws are all equally confident")
    ratios, tokens = sampling_ratios(mask_schedule, steps), all_masked(model, condition)
    for step, (count, scale) in enumerate(amused_plan(mask_schedule, steps, model.seq_len, choice_temperature)):
        ratio, step_key = ratios[step].item(), dimo_ext.fold_in(key, step)
        draw = draw_at(model, tokens, condition, ratio, guidance_scale, temperature, step_key)
        tokens = dimo_ext.reveal_confident(tokens=tokens, count=count, mask_id=model.mask_id, noise_scale=scale, **draw)
    return tokens


def amused_plan(
    mask_schedule: str, steps: int, masked: int, choice_temperature: tuple[float, float], *, of: float | None = None
) -> list[tuple[int, float]]:
    """Return for each step how many tokens it reveals, and the scale of the confidence's noise.

    After each step but the last floor(r·L) tokens stay masked, never more than before less one, and at least one. In
    float32 as published, where 16·cos(π/3) is a little less than 8.

    Args:
        mask_schedule: gives r at times from 1 to 0.
        steps: at least one.
        masked: tokens that are masked before the first step.
        choice_temperature: scale of the noise at the first and at the last step.
        of: L of floor(r·L), times the mask ratio that sampling starts from; None = ``masked``.
    """
    progress = torch.arange(1, steps + 1, dtype=torch.float32) / steps
    planned = ((masked if of is None else of) * mask_ratio(mask_schedule, 1.0 - progress)).floor().long().tolist()
    counts = []
    for left in [*planned[:-1], None]:
        stay = 0 if left is None else max(1, min(left, masked - 1))
        counts.append(masked - stay)
        masked = stay
    return list(zip(counts, torch.linspace(*choice_temperature, steps).tolist(), strict=True))


@torch.no_grad()
def sample_mdlm(model: Teacher, condition: Condition, *, steps: int, temperature: float = 1.0, key: Tensor) -> Tensor:
    """MDLM's ancestral sampling (arXiv 2406.07524): each masked token appears with probability 1/(steps left).

    The network is evaluated only in steps that reveal something, at most L of them a sample however many steps there
    are: what the published caching saves (``ddpm_cache``), but known before the evaluation. Draws are those of
    :func:`~dimo.samplers.sample_ancestral` with the linear schedule; the last step draws whatever is left, where the
    published code, which stops at time 1e-5, takes its most probable token.

    Args:
        model, condition, temperature, key: as in :func:`~dimo.samplers.sample_ancestral`.
        steps: how finely time is divided.

    Returns:
        Tokens int64 ``[B, L]`` without [MASK].
    """
    ratios, tokens = sampling_ratios("linear", steps), all_masked(model, condition)
    for step in range(steps):
        r_t, r_s = ratios[step].item(), ratios[step + 1].item()
        step_key, chance = dimo_ext.fold_in(key, step), (r_t - r_s) / r_t if step < steps - 1 else 1.0
        words = random_words(step_key, len(tokens), 1, model.seq_len, Tag.REVEAL)  # those of reveal_ancestral
        if not ((tokens == model.mask_id) & (uniform(words) < chance)).any():  # waits for the device: it is cheaper
            continue
        draw = draw_at(model, tokens, condition, r_t, 1.0, temperature, step_key)
        tokens = dimo_ext.reveal_ancestral(tokens=tokens, probability=chance, mask_id=model.mask_id, **draw)
    return tokens
