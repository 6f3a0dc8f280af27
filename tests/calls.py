"""The operators as the tests of the contract call them: each in every way that takes a path of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import pytest
import torch
from torch import Tensor

import dimo_ext as dx
from dimo_ext.random import random_integers, random_uniform
from tests.conftest import LogitsCase


def value_and_gradient(divergence, teacher: Tensor, auxiliary: Tensor, **options) -> tuple[Tensor, Tensor]:
    """Each token's divergence, and the gradient of their sum."""
    return with_gradient(lambda z: dx.token_divergence(teacher, z, divergence, **options), auxiliary)


def with_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """``function(x)`` and the gradient of its sum."""
    x = x.detach().requires_grad_()
    value = function(x)
    (gradient,) = torch.autograd.grad(value, x, torch.ones_like(value))
    return value.detach(), gradient


def pair(device, shape=(3, 5, 11), dtype=torch.float64, seed=0) -> list[Tensor]:
    """Teacher and auxiliary logits."""
    return LogitsCase(shape[:-1], shape[-1], dtype, seed=seed).build(device)


@dataclass
class Inputs:
    """What any operator takes: logits ``[B, L, V]``, tokens and mask ``[B, L]``, per-sample numbers ``[B]``, keys."""

    student: Tensor
    teacher: Tensor
    auxiliary: Tensor
    uncond: Tensor
    tokens: Tensor
    mask: Tensor
    weight: Tensor
    ratio: Tensor
    scale: Tensor
    key: Tensor
    keys: Tensor

    @staticmethod
    def build(device, dtype: torch.dtype = torch.float32, batch: int = 5, length: int = 16, vocab: int = 300) -> Inputs:
        """Awkward enough: V no multiple of a chunk, rows masked out, a guidance scale of 1 among others."""
        logits = LogitsCase((batch, length), vocab, dtype).build(torch.device("cpu"), 4)
        generator = torch.Generator().manual_seed(1)
        others = (
            torch.randint(vocab, (batch, length), generator=generator),
            torch.rand(batch, length, generator=generator) < 0.6,
            torch.rand(batch, length, generator=generator),
            torch.rand(batch, generator=generator),
            1.0 + 0.5 * torch.arange(batch),
            dx.random_key(5, 2**40 + 3),
            dx.random_key(range(batch), 7),
        )
        return Inputs(*(x.to(device) for x in (*logits, *others)))

    def advance(self) -> None:
        """Other values in the same memory: samples are shuffled, keys become new ones."""
        for i, field in enumerate(fields(self)):
            x = getattr(self, field.name)
            x.copy_(dx.fold_in(x, 1) if field.name in ("key", "keys") else x.roll(1 + i % 4, 0))


# From "operator" or "operator: variant" to a call that returns every output.
FORWARD: dict[str, Callable[[Inputs], tuple[Tensor, ...]]] = {
    "fold_in": lambda x: (dx.fold_in(x.keys, 2**32 - 1), dx.fold_in(x.key, x.tokens)),
    "uniform_words": lambda x: (random_uniform(x.key, 1003), random_integers(x.key, 1003, 300)),
    "token_divergence": lambda x: (dx.token_divergence(x.teacher, x.auxiliary, "alpha:0.5"),),
    "masked_cross_entropy": lambda x: (dx.masked_cross_entropy(x.student, x.tokens, x.mask),),
    "sample_categorical": lambda x: dx.sample_categorical(x.teacher, key=x.key),
    "sample_categorical: guided": lambda x: dx.sample_categorical(
        x.teacher, uncond_logits=x.uncond, guidance_scale=x.scale, temperature=0.7, key=x.keys
    ),
    "sample_categorical: filtered": lambda x: dx.sample_categorical(
        x.teacher, uncond_logits=x.uncond, guidance_scale=1.5, top_k=40, top_p=0.9, min_p=0.01, key=x.keys
    ),
    "sample_categorical: greedy": lambda x: dx.sample_categorical(x.teacher, temperature=0.0, key=x.key),
    "reveal_ancestral": lambda x: (dx.reveal_ancestral(x.teacher, x.mask.long(), x.ratio, 1, key=x.key),),
    "reveal_ancestral: greedy": lambda x: (
        dx.reveal_ancestral(x.teacher, x.mask.long(), 0.5, 1, temperature=0.0, key=x.keys),
    ),
    "reveal_confident": lambda x: (
        dx.reveal_confident(x.teacher, x.mask.long(), 4, 1, noise_scale=2.0, top_p=0.9, key=x.key),
    ),
    "reveal_confident: guided": lambda x: (
        dx.reveal_confident(
            x.teacher, x.mask.long(), x.tokens[:, 0] % 7, 1, uncond_logits=x.uncond, guidance_scale=x.scale, key=x.keys
        ),
    ),
    "mask_tokens": lambda x: dx.mask_tokens(x.tokens, 0.55, -1, key=x.key),
    "mask_tokens: bernoulli": lambda x: dx.mask_tokens(x.tokens, x.ratio, -1, mode="bernoulli", key=x.keys),
    "init_tokens": lambda x: (dx.init_tokens(*x.tokens.shape, vocab_size=300, mask_id=300, r_init=0.6, key=x.key),),
    "init_tokens: a key a sample": lambda x: (
        dx.init_tokens(*x.tokens.shape, vocab_size=300, mask_id=300, r_init=0.6, key=x.keys),
    ),
    "mask_tokens: scheduled": lambda x: dx.mask_tokens(x.tokens, x.ratio, -1, schedule="arccos", key=x.keys),
    "perturb_embeddings": lambda x: (dx.perturb_embeddings(x.student, 0.3, key=x.key),),
    "embed_and_perturb": lambda x: (dx.embed_and_perturb(x.tokens % 16, x.student[0], 0.3, key=x.key),),
}

# The last output is the gradient.
BACKWARD: dict[str, Callable[[Inputs], tuple[Tensor, ...]]] = {
    "token_divergence: gradient": lambda x: value_and_gradient("jeffreys:-0.2", x.teacher, x.auxiliary),
    "token_divergence: guided, masked": lambda x: value_and_gradient(
        "jensen_shannon:0.3", x.teacher, x.auxiliary, teacher_uncond_logits=x.uncond, guidance_scale=x.scale,
        mask=x.mask, teacher_temperature=0.7, auxiliary_temperature=1.3, teacher_log_floor=-20.0,
    ),
    "token_divergence: loss": lambda x: with_gradient(
        lambda z: dx.distribution_matching_loss(
            z, x.teacher, x.auxiliary, "reverse_kl", mask=x.mask, weight=x.weight, reduction="mean",
            teacher_uncond_logits=x.uncond, guidance_scale=2.0,
        ),
        x.student,
    ),
    "masked_cross_entropy: gradient": lambda x: with_gradient(
        lambda z: dx.masked_cross_entropy(z, x.tokens), x.student
    ),
    "masked_cross_entropy: smoothed, masked": lambda x: with_gradient(
        lambda z: dx.masked_cross_entropy(z, x.tokens, x.mask, label_smoothing=0.1, reduction="none"), x.student
    ),
    "embed_and_perturb: gradient": lambda x: with_gradient(
        lambda e: dx.embed_and_perturb(x.tokens % 16, e, 0.3, scale=x.ratio[0], key=x.keys), x.student[0]
    ),
    "perturb_embeddings: gradient": lambda x: with_gradient(
        lambda e: dx.perturb_embeddings(e, 0.3, scale=x.ratio[0], key=x.keys), x.student
    ),
}  # fmt: skip
CALLS = FORWARD | BACKWARD
every_call = pytest.mark.parametrize("name", CALLS)
