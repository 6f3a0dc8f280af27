"""Categorical draws: guidance, temperature, filters, then a Gumbel-max draw over chunks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..philox import Tag, random_words, uniform
from ._logits import guided, tempered

CHUNK = 256  # ids that share one Gumbel key in a categorical draw
_WEIGHT_BITS = 40  # fixed point of the weights inside a chunk: sums are exact, so their order is free


def sample_categorical(
    logits: Tensor, key: Tensor, temperature: float, top_k: int, top_p: float, min_p: float,
    uncond_logits: Tensor | None, guidance_scale: float, guidance_per_sample: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Guidance, temperature and filters, then a chunk-Gumbel draw: the id and its log-probability."""
    shape = logits.shape[:-1]
    batch = shape[0] if shape else 1
    z = guided(logits, uncond_logits, guidance_scale, guidance_per_sample).reshape(-1, logits.shape[-1])
    dead = ~torch.isfinite(z.amax(-1))
    z = z.masked_fill(dead[:, None], 0.0)
    if temperature == 0.0:
        tokens, log_prob = z.argmax(-1), torch.zeros_like(z[:, 0])
    else:
        log_probs = torch.log_softmax(_filtered(tempered(z, temperature), top_k, top_p, min_p), -1)
        rows, chunks = z.shape[0] // max(batch, 1), -(-z.shape[-1] // CHUNK)
        words = random_words(key, batch, rows, 4 * chunks, Tag.SAMPLE_CATEGORICAL)
        tokens = _chunk_gumbel(log_probs, words.view(z.shape[0], chunks, 4))
        log_prob = log_probs.gather(-1, tokens[:, None])[:, 0]
    tokens = tokens.masked_fill(dead, -1).view(shape)
    return tokens, log_prob.masked_fill(dead, -math.inf).to(torch.float32).view(shape)


def _chunk_gumbel(log_probs: Tensor, words: Tensor) -> Tensor:
    """Pick a chunk of 256 ids by a Gumbel-max draw over the chunks' masses, then an id inside it.

    Exact by the Gumbel-max factorisation. Word 0 of a chunk's Philox block is its Gumbel key, words 1 and 2 the 53-bit
    uniform that picks inside the winner.
    """
    rows, vocab = log_probs.shape
    width = min(vocab, CHUNK)
    chunks = torch.nn.functional.pad(log_probs, (0, -vocab % width), value=-math.inf).unflatten(-1, (-1, width))
    winner = torch.zeros(rows, dtype=torch.int64, device=log_probs.device)
    if chunks.shape[1] > 1:
        gumbel = -torch.log(-torch.log1p(-uniform(words[..., 0])))
        winner = (chunks.logsumexp(-1).double() + gumbel).argmax(-1)
    inside = chunks[torch.arange(rows, device=winner.device), winner]
    chosen = words[torch.arange(rows, device=winner.device), winner]
    return winner * width + _pick(inside, chosen[:, 1] << 21 | chosen[:, 2] >> 11)


def _pick(log_weights: Tensor, random53: Tensor) -> Tensor:
    """Index drawn with probability ∝ exp(log_weights) in 40-bit fixed point; ``random53`` in [0, 2^53)."""
    top = log_weights.amax(-1, keepdim=True)
    weights = torch.exp((log_weights - torch.where(top == -math.inf, 0.0, top)).float()).double()
    cumulative = (weights * 2.0**_WEIGHT_BITS).long().cumsum(-1)
    total = cumulative[:, -1]
    target = torch.minimum((total.double() * (random53.double() * 2.0**-53)).long(), total - 1)
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0].clamp(max=log_weights.shape[-1] - 1)


def _filtered(z: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Set filtered ids to -inf: top-k, then top-p on what is left, then min-p; ties at a threshold stay."""
    if 0 < top_k < z.shape[-1]:
        z = _keep_from(z, z.topk(top_k, -1).values[:, -1:])
    if top_p < 1.0:
        ordered = z.sort(-1, descending=True).values
        mass = (ordered.softmax(-1).double() * 2.0**_WEIGHT_BITS).long().cumsum(-1)
        crossing = (mass < top_p * mass[:, -1:].double()).sum(-1, keepdim=True).clamp(max=z.shape[-1] - 1)
        z = _keep_from(z, ordered.gather(-1, crossing))
    if min_p > 0.0:
        z = _keep_from(z, z.amax(-1, keepdim=True) + math.log(min_p))
    return z


def _keep_from(z: Tensor, threshold: Tensor) -> Tensor:
    return z.masked_fill(z < threshold, -math.inf)
