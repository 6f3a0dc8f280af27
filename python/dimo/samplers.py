"""Samplers: flat functions that take a model; every draw is a pure function of ``key``.

Each returns int64 tokens ``[B, L]`` without [MASK] and decides nothing by them on the host, so that a whole loop goes
into a CUDA graph. ``key`` is int64 ``[2]``, or ``[B, 2]`` with one key a sample: then a sample does not depend on the
batch that it is drawn in.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import dimo_ext
from dimo_ext.philox import Tag, random_words, uniform

from .config import SamplingConfig
from .distill import draw_from_student
from .guidance import guided_logits
from .schedules import halton_order, sampling_ratios
from .teachers.base import Condition, Teacher, condition_size


@torch.no_grad()
def sample_one_step(student: Teacher, condition: Condition, sampling: SamplingConfig, *, key: Tensor) -> Tensor:
    """One network evaluation: x_init → logits → independent draws (Di[M]O, arXiv 2503.15457, Figure 2).

    Args:
        student: the distilled model.
        condition: a pytree with leading batch dimension B.
        sampling: r_init, embedding noise and temperature, those that it was trained with (a MethodConfig is one).
        key: int64 ``[2]``, or ``[B, 2]`` with one key a sample, from :func:`dimo_ext.random_key`.
    """
    return draw_from_student(student, condition, sampling, key).tokens


@torch.no_grad()
def sample_few_steps(
    student: Teacher,
    condition: Condition,
    sampling: SamplingConfig,
    *,
    steps: int,
    mask_schedule: str = "arccos",
    key: Tensor,
) -> Tensor:
    """Refine a one-step sample: mask part of it again, let the student draw that part anew, less of it each time.

    Step 0 is :func:`sample_one_step`. Step k masks round(r·L) tokens, r the schedule's ratio at time 1 - k/steps, and
    draws each of them from the student's logits at the tokens that are left. It is the distillation's own forward
    process, and the multi-step sampling of consistency models (arXiv 2303.01469, Algorithm 1) with masks as noise; the
    embedding noise is for step 0 alone. A student that was distilled for one step need not gain by more of them.

    Args:
        student: the distilled model.
        condition: a pytree with leading batch dimension B.
        sampling: as in :func:`sample_one_step`; the temperature holds for every step.
        steps: network evaluations; 1 is :func:`sample_one_step`.
        mask_schedule: gives r at times from 1 to 0; see :mod:`dimo.schedules`.
        key: int64 ``[2]``, or ``[B, 2]`` with one key a sample, from :func:`dimo_ext.random_key`.
    """
    ratios = sampling_ratios(mask_schedule, steps)
    tokens = sample_one_step(student, condition, sampling, key=key)
    for step in range(1, steps):
        ratio, step_key = ratios[step].item(), dimo_ext.fold_in(key, 2 + step)  # 0 to 2 are the first step's
        tokens = dimo_ext.mask_tokens(tokens, ratio, student.mask_id, key=step_key).tokens
        draw = draw_at(student, tokens, condition, ratio, 1.0, sampling.student_temperature, step_key)
        tokens = dimo_ext.reveal_ancestral(tokens=tokens, probability=1.0, mask_id=student.mask_id, **draw)
    return tokens


@torch.no_grad()
def sample_ancestral(
    model: Teacher,
    condition: Condition,
    *,
    steps: int,
    mask_schedule: str = "arccos",
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    key: Tensor,
) -> Tensor:
    """The reverse process of Di[M]O's Figure 2: each masked token is revealed with probability (r_t - r_s)/r_t.

    Args:
        model: the teacher.
        condition: a pytree with leading batch dimension B.
        steps: network evaluations; the last one reveals everything left.
        mask_schedule: gives r at times from 1 to 0; see :mod:`dimo.schedules`.
        guidance_scale: classifier-free guidance, 1 = off.
        temperature: divides the logits, >= 0.
        key: int64 ``[2]``, or ``[B, 2]`` with one key a sample, from :func:`dimo_ext.random_key`.
    """
    states = ancestral_states(
        model, condition, steps=steps, mask_schedule=mask_schedule, guidance_scale=guidance_scale,
        temperature=temperature, key=key,
    )  # fmt: skip
    return deque(states, maxlen=1).pop()


@torch.no_grad()
def ancestral_states(
    model: Teacher,
    condition: Condition,
    *,
    steps: int,
    mask_schedule: str = "arccos",
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    key: Tensor,
) -> Iterator[Tensor]:
    """Yield the tokens int64 ``[B, L]`` of :func:`sample_ancestral` before the first step and after each one.

    The first state is all [MASK], the last one holds none.
    """
    ratios = sampling_ratios(mask_schedule, steps)
    tokens = all_masked(model, condition)
    yield tokens
    for step in range(steps):
        r_t, r_s = ratios[step].item(), ratios[step + 1].item()
        draw = draw_at(model, tokens, condition, r_t, guidance_scale, temperature, dimo_ext.fold_in(key, step))
        probability = (r_t - r_s) / r_t if step < steps - 1 else 1.0
        tokens = dimo_ext.reveal_ancestral(tokens=tokens, probability=probability, mask_id=model.mask_id, **draw)
        yield tokens


@torch.no_grad()
def sample_confident(
    model: Teacher,
    condition: Condition,
    *,
    steps: int,
    mask_schedule: str = "arccos",
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    choice_temperature: float = 4.5,
    key: Tensor,
) -> Tensor:
    """MaskGIT's parallel decoding (arXiv 2202.04200): reveal the most confident draws, a fixed number a step.

    Confidence = log-probability of the draw + choice_temperature · (1 - progress) · Gumbel noise, progress from 1/steps
    to 1. After step i, round(r·L) tokens stay masked, always at least one fewer than before.

    Args:
        model, condition, steps, mask_schedule, guidance_scale, temperature, key: as in :func:`sample_ancestral`, but it
            ends as soon as nothing is masked, after L evaluations at most, and needs a temperature > 0: greedy draws
            are all equally confident.
        choice_temperature: scale of the annealed noise, >= 0.
    """
    if temperature == 0.0:
        raise ValueError("temperature: expected a number > 0, got 0: greedy draws are all equally confident")
    tokens, ratios, remaining = all_masked(model, condition), sampling_ratios(mask_schedule, steps), model.seq_len
    for step in range(steps):
        left = min(round(ratios[step + 1].item() * model.seq_len), remaining - 1) if step < steps - 1 else 0
        ratio, step_key = ratios[step].item(), dimo_ext.fold_in(key, step)
        draw = draw_at(model, tokens, condition, ratio, guidance_scale, temperature, step_key)
        noise = choice_temperature * (1.0 - (step + 1) / steps)
        tokens = dimo_ext.reveal_confident(
            tokens=tokens, count=remaining - left, mask_id=model.mask_id, noise_scale=noise, **draw
        )
        remaining = left
        if remaining == 0:
            break
    return tokens


@torch.no_grad()
def sample_halton(
    model: Teacher,
    condition: Condition,
    *,
    steps: int,
    mask_schedule: str = "arccos",
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    randomize: bool = True,
    key: Tensor,
) -> Tensor:
    """Halton-MaskGIT's decoding (arXiv 2503.17076): reveal along a Halton sequence, which spreads over the image.

    After step i, floor((1 - r)·L) tokens are revealed, always at least one more than before.

    Args:
        model, condition, steps, mask_schedule, guidance_scale, temperature, key: as in :func:`sample_ancestral`, but it
            ends as soon as nothing is masked, after L evaluations at most; L is a square.
        randomize: start each sample's sequence at a random place of it, as published; off: all reveal alike.
    """
    side, ratios, tokens = (
        math.isqrt(model.seq_len),
        sampling_ratios(mask_schedule, steps),
        all_masked(model, condition),
    )
    if side * side != model.seq_len:
        raise ValueError(f"model: expected a square grid of tokens, got {model.seq_len}")
    order = halton_order(side).to(tokens.device).expand(len(tokens), -1)
    if randomize:
        words = random_words(dimo_ext.fold_in(key, steps), len(tokens), 1, 1, Tag.REVEAL)
        start = (uniform(words) * model.seq_len).long()
        order = order.gather(1, (torch.arange(model.seq_len, device=tokens.device) + start) % model.seq_len)
    revealed = 0
    for step in range(steps):
        until = max(revealed + 1, math.floor((1.0 - ratios[step + 1].item()) * model.seq_len))
        cells = order[:, revealed:until]
        step_key, ratio = dimo_ext.fold_in(key, step), ratios[step].item()
        draw = draw_at(model, tokens, condition, ratio, guidance_scale, temperature, step_key)
        drawn = dimo_ext.sample_categorical(**draw).tokens
        tokens, revealed = tokens.scatter(1, cells, drawn.gather(1, cells)), until
        if revealed == model.seq_len:
            break
    return tokens


def all_masked(model: Teacher, condition: Condition) -> Tensor:
    """Return [MASK] everywhere, int64 ``[B, L]``."""
    shape = (condition_size(condition), model.seq_len)
    return torch.full(shape, model.mask_id, dtype=torch.int64, device=model.device)


def draw_at(model, tokens, condition, ratio, guidance_scale, temperature, key) -> dict[str, Any]:
    """Evaluate the model and return what a reveal needs to draw from it."""
    ratio_B = torch.full((tokens.shape[0],), ratio, device=tokens.device)
    logits = guided_logits(model, tokens, condition, guidance_scale, mask_ratio=ratio_B)
    guidance = {"uncond_logits": logits.uncond, "guidance_scale": guidance_scale}
    return {"logits": logits.cond, "temperature": temperature, "key": key} | guidance
