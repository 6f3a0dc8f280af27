"""What the operators should give, written from their definitions in float64: no code of theirs is used here."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from math import inf

import numpy as np
import torch
from torch import Tensor

import dimo_ext as dx

# --- token divergences ----------------------------------------------------------------------------------------------

CONVEX = [
    dx.ForwardKL(), dx.ReverseKL(), dx.Jeffreys(0.0), dx.Jeffreys(0.3), dx.Jeffreys(1.0), dx.JensenShannon(),
    dx.JensenShannon(0.1), dx.JensenShannon(0.9), dx.SquaredHellinger(), dx.TotalVariation(), dx.PearsonChi2(),
    dx.NeymanChi2(), dx.Alpha(-1.0), dx.Alpha(0.5), dx.Alpha(2.0), dx.Alpha(3.0), dx.LeCam(),
]  # fmt: skip
DIVERGENCES = [*CONVEX, dx.Jeffreys(-0.2), dx.Jeffreys(1.5)]


def definition(divergence: dx.Divergence) -> tuple[Callable[[Tensor], Tensor], float, float]:
    """f, f(0) and the limit of f(u)/u at infinity."""
    if isinstance(divergence, dx.Jeffreys):
        b = divergence.beta
        at_zero, at_infinity = (0.0 if c == 0 else math.copysign(inf, c) for c in (b, 1 - b))
        return lambda u: (1 - b) * u * u.log() - b * u.log(), at_zero, at_infinity
    if isinstance(divergence, dx.JensenShannon):
        w = divergence.pi
        return (
            lambda u: w * u * u.log() - (w * u + 1 - w) * (w * u + 1 - w).log(),
            -(1 - w) * math.log(1 - w),
            -w * math.log(w),
        )
    if isinstance(divergence, dx.Alpha):
        a = divergence.alpha
        at_zero, at_infinity = 1 / a if a > 0 else inf, 1 / (1 - a) if a < 1 else inf
        return lambda u: (u**a - a * u - (1 - a)) / (a * (a - 1)), at_zero, at_infinity
    return WITHOUT_PARAMETERS[type(divergence)]


WITHOUT_PARAMETERS = {
    dx.ForwardKL: (lambda u: u * u.log(), 0.0, inf),
    dx.ReverseKL: (lambda u: -u.log(), inf, 0.0),
    dx.SquaredHellinger: (lambda u: (u.sqrt() - 1) ** 2, 1.0, 1.0),
    dx.TotalVariation: (lambda u: (u - 1).abs() / 2, 0.5, 0.5),
    dx.PearsonChi2: (lambda u: (u - 1) ** 2, 1.0, inf),
    dx.NeymanChi2: (lambda u: (1 - u) ** 2 / u, inf, 1.0),
    dx.LeCam: (lambda u: (u - 1) ** 2 / (u + 1), 1.0, 1.0),
}


def oracle(divergence: dx.Divergence, z_p: Tensor, z_q: Tensor) -> Tensor:
    """Σ q f(p/q) in float64, with limits where p or q vanishes and the rules for rows that have no value."""
    z_p, z_q = z_p.double(), z_q.double()
    dead = (z_p.amax(-1) == -inf) | (z_q.amax(-1) == -inf)
    p = z_p.masked_fill(dead[..., None], 0.0).softmax(-1)
    q = z_q.masked_fill(dead[..., None], 0.0).softmax(-1)
    f, at_zero, at_infinity = definition(divergence)
    both = (p > 0) & (q > 0)
    u = torch.where(both, p, 1.0) / torch.where(both, q, 1.0)
    limits = torch.zeros_like(p).masked_fill((q > 0) & ~both, at_zero).masked_fill((p > 0) & ~both, at_infinity)
    limits = torch.where(both | (limits == 0), 0.0, limits * torch.where(q > 0, q, p))
    value = torch.where(both, q * f(u), limits.detach()).sum(-1)
    return torch.where(dead, 0.0, torch.where(value.isnan(), inf, value))


def oracle_gradient(divergence: dx.Divergence, z_p: Tensor, z_q: Tensor) -> Tensor:
    """∂D/∂z_q by float64 autograd."""
    z_q = z_q.detach().double().requires_grad_()
    return torch.autograd.grad(oracle(divergence, z_p, z_q).sum(), z_q)[0]


def cancelling_terms(divergence: dx.Divergence, z_p: Tensor, z_q: Tensor) -> Tensor:
    """Size of the two terms whose difference is a row's gradient, q·g and q·Σ q·g, with g(1) = 0."""
    p, q = z_p.double().softmax(-1), z_q.double().softmax(-1)
    both = (p > 0) & (q > 0)
    u = (torch.where(both, p, 1.0) / torch.where(both, q, 1.0)).requires_grad_()
    one, f = torch.ones_like(u).requires_grad_(), definition(divergence)[0]
    slope, slope_at_one = torch.autograd.grad(f(u).sum() + f(one).sum(), (u, one))
    pull = (q * (f(u) - u * slope + slope_at_one)).detach()
    return pull.norm(dim=-1) + q.norm(dim=-1) * pull.sum(-1).abs()


def representable(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient with the rows that the dtype cannot hold set to 0."""
    return torch.where(gradient.to(dtype).isfinite().all(-1, keepdim=True), gradient, 0.0)


def limit_gradient(divergence, teacher: Tensor, auxiliary: Tensor) -> Tensor:
    """The gradient's limit as -inf is approached, found by going there in two steps; 0 in rows without one.

    A row with q > 0 = p counts as one without where f(0) is infinite, even if the supports are disjoint.
    """
    dead = (teacher.amax(-1) == -inf) | (auxiliary.amax(-1) == -inf)
    if math.isinf(definition(divergence)[1]):
        dead |= ((auxiliary > -inf) & (teacher == -inf)).any(-1)
    steps = [[z.double().clamp(min=floor) for z in (teacher, auxiliary)] for floor in (-100.0, -150.0)]
    far, further = (oracle_gradient(divergence, *z) for z in steps)
    settled = ((far - further).abs() <= 1e-9).all(-1) & ~dead
    return torch.where(settled[..., None], further, 0.0)


def oracle_with_floor(divergence, z_p: Tensor, z_q: Tensor, floor: float) -> Tensor:
    """Σ q f(u) with log p raised to the floor wherever an id is known to one side, and f made to have f'(1) = 0.

    Since p no longer sums to 1, a term c·(u - 1) of f would count.
    """
    log_p, q = z_p.double().log_softmax(-1), z_q.double().softmax(-1)
    p = log_p.clamp(min=floor).exp().where((log_p > -inf) | (q > 0), 0.0)
    f, _, at_infinity = definition(divergence)
    one = torch.ones((), dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(f(one), one)[0].item()
    both = (p > 0) & (q > 0)
    u = torch.where(both, p, 1.0) / torch.where(both, q, 1.0)
    only_p = torch.where(p > 0, p, 1.0) * (at_infinity - slope)
    return torch.where(both, q * (f(u) - slope * (u - 1)), torch.where(p > 0, only_p, 0.0)).sum(-1)


def guided(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """Uncond + s·(cond - uncond) in float64, one s for all or ``[B]``; -inf on either side gives -inf unless s = 1."""
    s = torch.as_tensor(scale, dtype=torch.float64, device=cond.device)
    s = s.view(-1, *[1] * (cond.dim() - 1)) if s.dim() else s
    filtered = (cond == -inf) | (uncond == -inf)
    mixed = uncond.double() + s * (cond.double() - uncond.double())
    return torch.where(s == 1, cond.double(), mixed.masked_fill(filtered, -inf))


# --- categorical draws ----------------------------------------------------------------------------------------------


def filtered_probabilities(row: Tensor, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> Tensor:
    """The distribution of one row, id by id in float64, as the documentation words it."""
    p = (row.double() / temperature).softmax(-1)
    if top_k > 0:
        p = renormalised(p, p >= p.sort(descending=True).values[top_k - 1])
    if top_p < 1.0:
        mass, threshold = 0.0, inf
        for value in p.sort(descending=True).values.tolist():
            mass, threshold = mass + value, value
            if mass >= top_p:
                break
        p = renormalised(p, p >= threshold)
    return renormalised(p, p >= min_p * p.max())


def renormalised(p: Tensor, keep: Tensor) -> Tensor:
    return torch.where(keep, p, 0.0) / p[keep].sum()


# --- Philox4x32-10 --------------------------------------------------------------------------------------------------


# tags
MASK_TOKENS, INIT_MASK, INIT_IDS, SAMPLE_CATEGORICAL, PERTURB_EMBEDDINGS, REVEAL, FOLD_IN = 1, 2, 3, 4, 5, 6, 255


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Ten rounds on uint64 arrays that hold 32-bit words, [4, n]."""
    c, (k0, k1), low = counter.copy(), key, np.uint64(0xFFFFFFFF)
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        high0, high1 = p0 >> np.uint64(32), p1 >> np.uint64(32)
        c = np.stack([high1 ^ c[1] ^ np.uint64(k0), p1 & low, high0 ^ c[3] ^ np.uint64(k1), p0 & low])
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c


def row_words(seed: int, offset: int, row: int, length: int, tag: int) -> np.ndarray:
    """The first words of a row: word i is word i % 4 of block i // 4."""
    seed, offset, blocks = seed % 2**64, offset % 2**64, -(-length // 4)
    counter = np.zeros((4, blocks), np.uint64)
    counter[0] = np.arange(blocks, dtype=np.uint64) | np.uint64(tag << 24)
    counter[1:] = np.array([[row], [offset % 2**32], [offset >> 32]], np.uint64)
    return philox(counter, (seed % 2**32, seed >> 32)).T.reshape(-1)[:length]


def smallest(words: np.ndarray, count: int) -> np.ndarray:
    """Where the ``count`` smallest words are, the lower index first among equals."""
    mask = np.zeros(len(words), bool)
    mask[np.argsort(words, kind="stable")[:count]] = True
    return mask


def masked_count(words: np.ndarray, ratio: float, bernoulli: bool, min_masked: int) -> int:
    """How many positions of a sample are masked, in float32 and exact integers."""
    length = len(words)
    ratio32 = np.float32(0.0) if math.isnan(ratio) else np.clip(np.float32(ratio), np.float32(0), np.float32(1))
    if bernoulli:  # word + 1/2 < ratio * 2^32, in exact arithmetic
        count = int((words < np.uint64(math.ceil(Fraction(float(ratio32)) * 2**32 - Fraction(1, 2)))).sum())
    else:
        count = int(np.rint(ratio32 * np.float32(length)))
    return min(max(count, min(min_masked, length)), length)


def draws(log_probs: Tensor, seed: int, offset: int) -> Tensor:
    """The ids that the contract draws from the rows of ``log_probs`` ``[rows, V]`` under one key, in numpy.

    A chunk is 256 ids, V if there are fewer. Word 0 of a chunk's block is its Gumbel key, the 53 bits of words 1 and 2
    pick an id inside the winner, by weights in 40-bit fixed point.
    """
    rows, vocab = log_probs.shape
    width = min(vocab, 256)
    chunks = -(-vocab // width)
    padded = np.full((rows, chunks * width), -inf)
    padded[:, :vocab] = log_probs.double().cpu().numpy()
    tokens = []
    for row, lp in enumerate(padded.reshape(rows, chunks, width)):
        words = row_words(seed, offset, row, 4 * chunks, SAMPLE_CATEGORICAL).reshape(chunks, 4)
        with np.errstate(divide="ignore"):
            mass = np.log(np.exp(lp).sum(1))
        winner = int(np.argmax(mass - np.log(-np.log1p(-(words[:, 0] + 0.5) / 2.0**32)))) if chunks > 1 else 0
        weights = np.floor(np.exp(lp[winner] - lp[winner].max()) * 2.0**40)
        uniform = ((int(words[winner, 1]) << 21) + (int(words[winner, 2]) >> 11)) / 2.0**53
        inside = np.searchsorted(weights.cumsum(), np.floor(weights.sum() * uniform), side="right")
        tokens.append(winner * width + int(inside))
    return torch.tensor(tokens)


def noise(width: int, rows: int, seed: int, offset: int) -> Tensor:
    """The standard normal numbers ``[rows, width]`` of the contract, by Box-Muller on pairs of words."""
    pairs = -(-width // 2)
    words = np.stack([row_words(seed, offset, row, 2 * pairs, PERTURB_EMBEDDINGS) for row in range(rows)])
    u, v = ((words.reshape(rows, pairs, 2) + 0.5) / 2.0**32).transpose(2, 0, 1)
    radius, angle = np.sqrt(-2.0 * np.log(u)), 2.0 * np.pi * v
    return torch.from_numpy(np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).reshape(rows, -1)[:, :width])
