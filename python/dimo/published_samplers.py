"""Samplers as text-to-image and text teachers were released with; flat functions like those of :mod:`dimo.samplers`."""

from __future__ import annotations

import torch
from torch import Tensor

import dimo_ext
from dimo_ext.philox import Tag, random_words, uniform

from .guidance import guided_logits
from .schedules import mask_ratio, sampling_ratios
from .teachers.base import Condition, Teacher, condition_size


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
    batch = condition_size(condition)
    tokens = torch.full((batch, model.seq_len), model.mask_id, dtype=torch.int64, device=model.device)
    ratios = sampling_ratios(mask_schedule, steps)
    for step, (left, scale) in enumerate(amused_plan(mask_schedule, steps, model.seq_len, choice_temperature)):
        step_key, ratio_B = dimo_ext.fold_in(key, step), torch.full((batch,), ratios[step].item(), device=tokens.device)
        logits = guided_logits(model, tokens, condition, guidance_scale, mask_ratio=ratio_B)
        drawn = dimo_ext.sample_categorical(
            logits.cond, temperature=temperature, uncond_logits=logits.uncond, guidance_scale=guidance_scale,
            key=step_key,
        )  # fmt: skip
        words = random_words(step_key, batch, 1, model.seq_len, Tag.REVEAL)
        tokens = amused_step(tokens, drawn.tokens, drawn.log_prob, uniform(words), left, scale, model.mask_id)
    return tokens


def amused_plan(
    mask_schedule: str, steps: int, seq_len: int, choice_temperature: tuple[float, float]
) -> list[tuple[int, float]]:
    """Return for each step how many tokens stay masked after it, and the scale of the confidence's noise.

    In float32 as published, where 16·cos(π/3) is a little less than 8.
    """
    progress = torch.arange(1, steps + 1, dtype=torch.float32) / steps
    left = (seq_len * mask_ratio(mask_schedule, 1.0 - progress)).floor().long().tolist()
    return list(zip([*left[:-1], 0], torch.linspace(*choice_temperature, steps).tolist(), strict=True))


def amused_step(
    tokens_BL: Tensor, drawn_BL: Tensor, log_prob_BL: Tensor, uniform_BL: Tensor, left: int, scale: float, mask_id: int
) -> Tensor:
    """Reveal the most confident draws until ``left`` tokens of a sample stay masked.

    Never more stay than are masked now less one, and at least one unless ``left`` is 0.
    """
    masked = tokens_BL == mask_id
    noise = -torch.log(-torch.log(uniform_BL))
    confidence = (log_prob_BL + scale * noise).masked_fill(~masked, torch.inf)
    rank = confidence.argsort(-1).argsort(-1)
    stay = (masked.sum(-1, keepdim=True) - 1).clamp(max=left).clamp(min=min(left, 1))
    return torch.where(masked & (rank >= stay), drawn_BL, tokens_BL)


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
    batch, ratios = condition_size(condition), sampling_ratios("linear", steps)
    tokens = torch.full((batch, model.seq_len), model.mask_id, dtype=torch.int64, device=model.device)
    for step in range(steps):
        r_t, r_s = ratios[step].item(), ratios[step + 1].item()
        step_key, reveal = dimo_ext.fold_in(key, step), tokens == model.mask_id
        if step < steps - 1:
            reveal &= uniform(random_words(step_key, batch, 1, model.seq_len, Tag.REVEAL)) < (r_t - r_s) / r_t
        if not reveal.any():  # waits for the device, which is cheaper than an evaluation
            continue
        logits = model.logits(tokens, condition, mask_ratio=torch.full((batch,), r_t, device=tokens.device))
        drawn = dimo_ext.sample_categorical(logits, temperature=temperature, key=step_key)
        tokens = torch.where(reveal, drawn.tokens, tokens)
    return tokens
