"""The equations of Di[M]O (arXiv 2503.15457): student and auxiliary losses; no optimisers."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

import dimo_ext
from dimo_ext.random import random_uniform

from .config import MethodConfig, SamplingConfig
from .guidance import guided_logits
from .phases import phase
from .pretrain import masked_token_loss
from .schedules import mask_ratio
from .teachers.base import Condition, Teacher, condition_size


class StudentDraw(NamedTuple):
    """The student's logits ``[B, L, V]`` at x_init and the tokens x_student ``[B, L]`` drawn from them."""

    logits: Tensor
    tokens: Tensor


class StudentLoss(NamedTuple):
    """Loss (scalar, nats a sample; backward gives the pseudo-gradient), the draw, the mean entropy of a token.

    ``auxiliary`` is the auxiliary's own loss at the same masked tokens: unless ``fresh_auxiliary_batch``, it has a
    gradient and the auxiliary's first update needs no further evaluation.
    """

    loss: Tensor
    draw: StudentDraw
    token_entropy: Tensor
    auxiliary: Tensor


def draw_from_student(student: Teacher, condition: Condition, sampling: SamplingConfig, key: Tensor) -> StudentDraw:
    """x_init → student logits → x_student ~ softmax(logits / τ), each position on its own."""
    with phase("student forward"):
        x_init = dimo_ext.init_tokens(
            condition_size(condition), student.seq_len, vocab_size=student.vocab_size, mask_id=student.mask_id,
            r_init=sampling.r_init, key=dimo_ext.fold_in(key, 0),
        )  # fmt: skip
        logits = student.logits(
            x_init, condition, mask_ratio=torch.full((x_init.shape[0],), sampling.r_init, device=x_init.device),
            embedding_noise=sampling.embedding_noise, embedding_noise_scale=sampling.embedding_noise_scale,
            key=dimo_ext.fold_in(key, 1),
        )  # fmt: skip
    with phase("draws"):
        key = dimo_ext.fold_in(key, 2)
        drawn = dimo_ext.sample_categorical(logits, temperature=sampling.student_temperature, key=key)
    return StudentDraw(logits, drawn.tokens)


def student_loss(
    student: Teacher, teacher: Teacher, auxiliary: Teacher, condition: Condition, method: MethodConfig, key: Tensor
) -> StudentLoss:
    """Token-level distribution matching: D(teacher ‖ auxiliary) at re-masked student draws, moved onto the student.

    dL/dθ ≈ Σ_{i masked} ∂D(p_i ‖ q_i)/∂z_ψ,i · ∂z_θ,i/∂θ, summed over tokens, divided by the batch. Teacher and
    auxiliary see the same tokens and get no gradient.
    """
    draw = draw_from_student(student, condition, method, dimo_ext.fold_in(key, 0))
    with torch.no_grad(), phase("masking"):
        ratio = mask_ratio(method.mask_schedule, random_uniform(dimo_ext.fold_in(key, 1), draw.tokens.shape[0]))
        tokens = _valid_ids(draw.tokens)
        masked = dimo_ext.mask_tokens(tokens, ratio, student.mask_id, key=dimo_ext.fold_in(key, 2))
    with torch.no_grad(), phase("teacher"):
        target = guided_logits(teacher, masked.tokens, condition, method.guidance_scale, mask_ratio=ratio)
    reused = torch.is_grad_enabled() and not method.fresh_auxiliary_batch
    with torch.set_grad_enabled(reused), phase("auxiliary forward"):
        estimate = auxiliary.logits(masked.tokens, condition, mask_ratio=ratio)
    with phase("loss"):
        fit = dimo_ext.masked_cross_entropy(estimate, tokens, masked.mask, label_smoothing=method.label_smoothing)
        entropy = _mean_token_entropy(draw, method.student_temperature)
        loss = dimo_ext.distribution_matching_loss(
            draw.logits, target.cond, estimate, method.divergence, mask=masked.mask,
            teacher_uncond_logits=target.uncond, guidance_scale=method.guidance_scale,
            teacher_temperature=method.teacher_temperature,
        )  # fmt: skip
    return StudentLoss(loss, draw, entropy, fit)


def auxiliary_loss(
    auxiliary: Teacher, tokens_BL: Tensor, condition: Condition, method: MethodConfig, key: Tensor
) -> Tensor:
    """Cross-entropy of the auxiliary against the student's tokens at freshly masked positions (scalar, mean)."""
    tokens_BL = _valid_ids(tokens_BL)
    return masked_token_loss(
        auxiliary, tokens_BL, condition, method.mask_schedule, key, method.label_smoothing, name="auxiliary"
    )


@torch.no_grad()
def _mean_token_entropy(draw: StudentDraw, temperature: float) -> Tensor:
    """Return log V - KL(softmax(logits / τ) ‖ uniform), one pass over the logits; NaN where no token was drawn."""
    vocab = draw.logits.shape[-1]
    uniform = draw.logits.new_zeros(vocab).expand_as(draw.logits)
    distance = dimo_ext.token_divergence(draw.logits, uniform, "forward_kl", teacher_temperature=temperature)
    return (math.log(vocab) - distance).masked_fill(draw.tokens < 0, math.nan).mean()


def _valid_ids(tokens_BL: Tensor) -> Tensor:
    """Replace the -1 that a row without a finite logit draws: the entropy is NaN then, and the trainer reports that."""
    return tokens_BL.clamp(min=0)
