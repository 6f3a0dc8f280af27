"""One plain-PyTorch twin an operator: fallback without a kernel, oracle of the tests, baseline of the benchmarks.

Each function takes the arguments of its operator's schema. float64 inputs compute in float64, all others in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import divergences as names
from .._autograd import factor_in_forward, token_factor
from ..philox import WORD, Tag, philox, random_words, uniform
from ..schedules import mask_ratio

CHUNK = 256  # ids that share one Gumbel key in a categorical draw
_NEAR_TOPS = 16.0  # nats: up to here the largest logits of both sides count as near
_WEIGHT_BITS = 40  # fixed point of the weights inside a chunk: sums are exact, so their order is free


# --- keys -----------------------------------------------------------------------------------------------------------


def fold_in(key: Tensor, n: int, n_tensor: Tensor | None) -> Tensor:
    """Words of the block whose row is n: seed and offset of a new key."""
    if n_tensor is None:
        n_tensor = torch.full((), n, dtype=torch.int64, device=key.device)
    row = (n_tensor.to(torch.int64) & WORD).expand(torch.broadcast_shapes(n_tensor.shape, key.shape[:-1]))
    words = torch.stack(philox(torch.full_like(row, int(Tag.FOLD_IN) << 24), row, key[..., 1], key[..., 0]), -1)
    return words[..., 0::2] | (words[..., 1::2] << 32)


def uniform_words(key: Tensor, count: int) -> Tensor:
    """Words of row 0."""
    return random_words(key, 1, 1, count, Tag.UNIFORM)[0].contiguous()


# --- forward masking ------------------------------------------------------------------------------------------------


def mask_tokens(
    tokens: Tensor, key: Tensor, ratio: float, ratio_per_sample: Tensor | None, mask_id: int, bernoulli: bool,
    min_masked: int, schedule: str = "linear",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mask the k positions with the smallest words; "exact" fixes k, "bernoulli" counts words below the ratio.

    The schedule is evaluated in float64, so that rounding it to float32 gives the same number everywhere.
    """
    batch, length = tokens.shape
    words = random_words(key, batch, 1, length, Tag.MASK_TOKENS)
    if ratio_per_sample is None:
        ratio_per_sample = torch.full((batch,), ratio, dtype=torch.float32, device=tokens.device)
    if schedule != "linear":
        ratio_per_sample = mask_ratio(schedule, _clamped(ratio_per_sample.double())).to(torch.float32)
    if bernoulli:
        count = _happens(words, ratio_per_sample).sum(1)
    else:
        count = torch.round(_clamped(ratio_per_sample) * length).long()
    mask = _smallest(words, count.clamp(min(min_masked, length), length))
    return tokens.contiguous().masked_fill(mask, mask_id), mask


def init_tokens(key: Tensor, batch_size: int, seq_len: int, vocab_size: int, mask_id: int, r_init: float) -> Tensor:
    """Uniform random ids with exactly round(r_init·L) positions replaced by the mask id."""
    ids = (random_words(key, batch_size, 1, seq_len, Tag.INIT_IDS) * vocab_size) >> 32
    words = random_words(key, batch_size, 1, seq_len, Tag.INIT_MASK)
    count = torch.full((batch_size,), _round_count(r_init, seq_len), device=key.device)
    return ids.masked_fill(_smallest(words, count), mask_id)


def _clamped(ratio: Tensor) -> Tensor:
    return ratio.nan_to_num(0.0).clamp(0.0, 1.0)


def _happens(words: Tensor, probability: Tensor) -> Tensor:
    """Which words ``[B, L]`` say yes to an event of each sample's probability."""
    return words < torch.ceil(_clamped(probability.double()) * 2.0**32 - 0.5).long()[:, None]


def _round_count(ratio: float, length: int) -> int:
    return int(torch.round(torch.tensor(ratio, dtype=torch.float32) * length))


def _smallest(words: Tensor, count: Tensor) -> Tensor:
    """Boolean mask of the ``count`` smallest words of each row; ties go to the lower index."""
    order = words.argsort(dim=1, stable=True)
    chosen = torch.arange(words.shape[1], device=words.device) < count[:, None]
    return torch.zeros_like(words, dtype=torch.bool).scatter_(1, order, chosen)


# --- categorical draws ----------------------------------------------------------------------------------------------


def sample_categorical(
    logits: Tensor, key: Tensor, temperature: float, top_k: int, top_p: float, min_p: float,
    uncond_logits: Tensor | None, guidance_scale: float, guidance_per_sample: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Guidance, temperature and filters, then a chunk-Gumbel draw: the id and its log-probability."""
    shape = logits.shape[:-1]
    batch = shape[0] if shape else 1
    z = _guided(logits, uncond_logits, guidance_scale, guidance_per_sample).reshape(-1, logits.shape[-1])
    dead = ~torch.isfinite(z.amax(-1))
    z = z.masked_fill(dead[:, None], 0.0)
    if temperature == 0.0:
        tokens, log_prob = z.argmax(-1), torch.zeros_like(z[:, 0])
    else:
        log_probs = torch.log_softmax(_filtered(_tempered(z, temperature), top_k, top_p, min_p), -1)
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


# --- parallel decoding ----------------------------------------------------------------------------------------------


def reveal_ancestral(
    logits: Tensor, tokens: Tensor, key: Tensor, probability: float, probability_per_sample: Tensor | None,
    mask_id: int, *draw,
) -> Tensor:  # fmt: skip
    """Draw an id for each masked position with this probability; ``draw`` are what else sample_categorical takes."""
    drawn, _ = sample_categorical(logits, key, *draw)
    batch, length = tokens.shape[0], tokens[:1].numel()
    if probability_per_sample is None:
        probability_per_sample = torch.full((batch,), probability, dtype=torch.float64, device=tokens.device)
    chosen = _happens(random_words(key, batch, 1, length, Tag.REVEAL), probability_per_sample).view(tokens.shape)
    return torch.where(chosen & (tokens == mask_id), drawn, tokens)


def reveal_confident(
    logits: Tensor, tokens: Tensor, key: Tensor, count: int, count_per_sample: Tensor | None, noise_scale: float,
    mask_id: int, *draw,
) -> Tensor:  # fmt: skip
    """Draw an id for each masked position; the ``count`` most confident ones of a sample appear."""
    drawn, log_prob = sample_categorical(logits, key, *draw)
    batch, masked = tokens.shape[0], (tokens == mask_id).flatten(1)
    noise = -torch.log(-torch.log(uniform(random_words(key, batch, 1, masked.shape[1], Tag.REVEAL))))
    confidence = log_prob.flatten(1) + noise_scale * noise
    order = confidence.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, masked.gather(1, order).logical_not().to(torch.uint8).argsort(dim=1, stable=True))
    if count_per_sample is None:
        count_per_sample = torch.full((batch,), count, device=tokens.device)
    chosen = torch.arange(masked.shape[1], device=tokens.device) < count_per_sample[:, None]
    revealed = masked & torch.zeros_like(masked).scatter_(1, order, chosen)
    return torch.where(revealed.view(tokens.shape), drawn, tokens)


# --- embedding noise ------------------------------------------------------------------------------------------------


def perturb_embeddings(embeddings: Tensor, key: Tensor, sigma: float, scale: Tensor) -> Tensor:
    """σ·scale·ε + sqrt(1-σ²)·e with ε standard normal (Box-Muller on pairs of words)."""
    batch, width = (embeddings.shape[0] if embeddings.dim() > 1 else 1), embeddings.shape[-1]
    rows = embeddings.numel() // max(width * batch, 1)
    pairs = (width + 1) // 2
    u = uniform(random_words(key, batch, rows, 2 * pairs, Tag.PERTURB_EMBEDDINGS)).view(batch * rows, pairs, 2)
    radius, angle = torch.sqrt(-2.0 * torch.log(u[..., 0])), 2.0 * math.pi * u[..., 1]
    noise = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), -1).flatten(1)[:, :width]
    compute = _compute_dtype(embeddings)
    noise = noise.reshape(embeddings.shape).to(compute) * (sigma * scale.to(compute))
    return (noise + math.sqrt(1.0 - sigma**2) * embeddings.to(compute)).to(embeddings.dtype)


def embed_and_perturb(table: Tensor, tokens: Tensor, key: Tensor, sigma: float, scale: Tensor) -> Tensor:
    """perturb_embeddings of the table's rows."""
    return perturb_embeddings(table[tokens.clamp(0, table.shape[0] - 1)], key, sigma, scale)


# --- cross-entropy --------------------------------------------------------------------------------------------------


def masked_cross_entropy(
    logits: Tensor, targets: Tensor, mask: Tensor | None, label_smoothing: float, valid_vocab: int | None,
    reduction: str, need_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Cross-entropy of each token, or their reduced value; what multiplied it; its gradient (see _autograd.py)."""
    vocab = logits.shape[-1] if valid_vocab is None else valid_vocab
    z = logits[..., :vocab].to(_compute_dtype(logits))
    counted = (targets >= 0) & (targets < vocab)
    counted = counted if mask is None else counted & mask
    factor = token_factor(logits, counted, None, reduction, z.dtype)
    factor = torch.ones((), dtype=z.dtype, device=z.device) if factor is None else factor
    counted = counted & (z.amax(-1) != -math.inf)
    log_probs = torch.log_softmax(z, -1)
    index = targets.clamp(0, vocab - 1)[..., None]
    value = -(1.0 - label_smoothing) * log_probs.gather(-1, index)[..., 0]
    if label_smoothing > 0.0:
        value = value - label_smoothing * log_probs.mean(-1)
    value = _weighted(torch.where(counted, value, 0.0), factor, reduction != "none")
    if not need_gradient:
        return value, factor, logits.new_empty(0)
    gradient = log_probs.exp() - label_smoothing / vocab
    gradient.scatter_add_(-1, index, torch.full_like(gradient[..., :1], label_smoothing - 1.0))
    gradient = torch.nn.functional.pad(gradient, (0, logits.shape[-1] - vocab))
    stored, _ = _stored(logits, gradient, factor, counted)
    return value, factor, stored


# --- token-level f-divergence ---------------------------------------------------------------------------------------


def token_divergence(
    receiver: Tensor, teacher_logits: Tensor, auxiliary_logits: Tensor, divergence: str, uncond_logits: Tensor | None,
    guidance_scale: float, guidance_per_sample: Tensor | None, teacher_temperature: float,
    auxiliary_temperature: float, teacher_log_floor: float | None, mask: Tensor | None, factor: Tensor | None,
    reduce: bool, need_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """D_f(teacher ‖ auxiliary) of each token times factor, or their sum; how many gradients cannot be represented;
    factor · ∂D/∂auxiliary_logits (see _autograd.py).
    """
    loss, gradient, counted = _divergence(
        teacher_logits, auxiliary_logits, divergence, uncond_logits, guidance_scale, guidance_per_sample,
        teacher_temperature, auxiliary_temperature, teacher_log_floor, mask, factor, reduce,
    )  # fmt: skip
    if not need_gradient:
        return loss, loss.new_zeros((), dtype=torch.int64), receiver.new_empty(0)
    stored, zeroed = _stored(receiver, gradient, factor, counted)
    return loss, zeroed.sum(), stored


def divergence_gradient_(
    auxiliary_logits: Tensor, teacher_logits: Tensor, divergence: str, uncond_logits: Tensor | None,
    guidance_scale: float, guidance_per_sample: Tensor | None, teacher_temperature: float,
    auxiliary_temperature: float, teacher_log_floor: float | None, mask: Tensor | None, factor: Tensor | None,
    reduce: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Value and count of token_divergence; factor · ∂D/∂auxiliary_logits goes where the logits were, rounded once."""
    loss, gradient, counted = _divergence(
        teacher_logits, auxiliary_logits, divergence, uncond_logits, guidance_scale, guidance_per_sample,
        teacher_temperature, auxiliary_temperature, teacher_log_floor, mask, factor, reduce,
    )  # fmt: skip
    if factor is not None:
        gradient, counted = gradient * factor[..., None], counted & (factor != 0)
    stored, zeroed = _stored(auxiliary_logits, gradient, None, counted)
    auxiliary_logits.copy_(stored)
    return loss, zeroed.sum()


def _divergence(
    teacher_logits: Tensor, auxiliary_logits: Tensor, divergence: str, uncond_logits: Tensor | None,
    guidance_scale: float, guidance_per_sample: Tensor | None, teacher_temperature: float,
    auxiliary_temperature: float, teacher_log_floor: float | None, mask: Tensor | None, factor: Tensor | None,
    reduce: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Divergences times factor, or their sum; the gradient without the factor; which tokens count."""
    z_p = _guided(teacher_logits, uncond_logits, guidance_scale, guidance_per_sample)
    compute = torch.promote_types(z_p.dtype, _compute_dtype(auxiliary_logits))
    z_p, z_q = z_p.to(compute), auxiliary_logits.to(compute)
    counted = (z_p.amax(-1) != -math.inf) & (z_q.amax(-1) != -math.inf)
    counted = counted if mask is None else counted & mask
    log_p, log_q = _log_softmax(z_p, teacher_temperature), _log_softmax(z_q, auxiliary_temperature)
    same_temperature = teacher_temperature == auxiliary_temperature
    log_ratio = _log_ratio(z_p, z_q, log_p, log_q, teacher_temperature) if same_temperature else log_p - log_q
    if teacher_log_floor is not None:  # ids that neither side knows stay out
        raised = (log_p < teacher_log_floor) & ((log_p > -math.inf) | (log_q > -math.inf))
        log_p = log_p.masked_fill(raised, teacher_log_floor)
        log_ratio = torch.where(raised, log_p - log_q, log_ratio)
    value, pull = divergence_terms(names.parse_divergence(divergence), log_p, log_q, log_ratio)
    value = torch.where(counted, value, 0.0)
    gradient = (pull - log_q.exp() * pull.sum(-1, keepdim=True)) / auxiliary_temperature
    gradient = gradient.masked_fill(value.isnan()[..., None], math.nan)  # a diverged row has no gradient
    return _weighted(value, factor, reduce), gradient, counted


def divergence_terms(
    divergence: names.Divergence, log_p: Tensor, log_q: Tensor, log_ratio: Tensor
) -> tuple[Tensor, Tensor]:
    """Σ_v q f(u) ``[...]`` and q·g(u) ``[..., V]``, where g = f - u f' and ∂D/∂z_q = q·g - q·Σ q·g.

    A constant added to g changes no gradient, c·(u - 1) added to f changes no value: each f is taken in the form with
    f ≥ 0 and f'(1) = 0, so that no large terms cancel where the distributions nearly agree.
    """
    if isinstance(divergence, names.Jeffreys):
        return _jeffreys(divergence.beta, log_p, log_q, log_ratio)
    terms, limits = _FORMULAS[type(divergence)](divergence)
    no_p, no_q = log_p == -math.inf, log_q == -math.inf
    log_p_safe, log_q_safe = log_p.masked_fill(no_p, 0.0), log_q.masked_fill(no_q, 0.0)
    x = log_ratio.masked_fill(no_p | no_q, 0.0)
    p, q = log_p.exp(), log_q.exp()
    value, pull = terms(p, q, x, log_p_safe, log_q_safe)
    value = _at_limits(value, p, q, no_p, no_q, limits.value_no_p, limits.value_no_q)
    pull = _at_limits(pull, p, q, no_p, no_q, limits.pull_no_p, limits.pull_no_q)
    return value.sum(-1), pull


class _Limits(NamedTuple):
    """q·f(u) and q·g(u) as multiples of q where p = 0, and of p where q = 0."""

    value_no_p: float
    value_no_q: float
    pull_no_p: float
    pull_no_q: float


# Of p, q, x = log(p/q), log p, log q.
_Terms = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _at_limits(x: Tensor, p: Tensor, q: Tensor, no_p: Tensor, no_q: Tensor, at_no_p: float, at_no_q: float) -> Tensor:
    x = torch.where(no_p, q * at_no_p if math.isfinite(at_no_p) else at_no_p, x)
    x = torch.where(no_q, p * at_no_q if math.isfinite(at_no_q) else at_no_q, x)
    return torch.where(no_p & no_q, 0.0, x)


def _jeffreys(beta: float, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """(1-β) KL(p‖q) + β KL(q‖p); a term of weight 0 is left out, infinities of opposite sign give +inf."""
    parts = [(1.0 - beta, names.ForwardKL()), (beta, names.ReverseKL())]
    parts = [(weight, *divergence_terms(kl, log_p, log_q, log_ratio)) for weight, kl in parts if weight != 0.0]
    values = torch.stack([weight * value for weight, value, _ in parts])
    value = torch.where((values == math.inf).any(0), math.inf, values.sum(0))
    return value, sum(weight * pull for weight, _, pull in parts)


def _near(x: Tensor) -> Tensor:
    return x.abs() < 1.0


def _expm1_minus(x: Tensor) -> Tensor:
    """exp(x) - 1 - x without cancellation: its series where |x| is small."""
    series = torch.zeros_like(x)
    for n in range(9, 2, -1):
        series = (1.0 + series) * (x / n)
    return torch.where(x.abs() < 0.3, 0.5 * x * x * (1.0 + series), torch.expm1(x) - x)


def _kl_term(p: Tensor, q: Tensor, x: Tensor) -> Tensor:
    """p·x - p + q ≥ 0 with x = log(p/q): the integrand of KL(p‖q)."""
    return torch.where(_near(x), p * _expm1_minus(-x.clamp(-1, 1)), p * x - p + q)


def _forward_kl(_: names.ForwardKL) -> tuple[_Terms, _Limits]:
    def terms(p, q, x, log_p, log_q):
        return _kl_term(p, q, x), -p

    return terms, _Limits(1.0, math.inf, 0.0, -1.0)


def _reverse_kl(_: names.ReverseKL) -> tuple[_Terms, _Limits]:
    def terms(p, q, x, log_p, log_q):
        return _kl_term(q, p, -x), -q * x

    return terms, _Limits(math.inf, 1.0, math.inf, 0.0)


def _jensen_shannon(divergence: names.JensenShannon) -> tuple[_Terms, _Limits]:
    pi, rest = divergence.pi, 1.0 - divergence.pi

    def terms(p, q, x, log_p, log_q):
        # m = pi·p + rest·q; log(m / the larger of p and q) = log1p(the smaller one's weight · (their ratio - 1))
        less = torch.expm1(-x.abs())
        shift = torch.log1p(torch.where(x < 0, pi * less, rest * less))
        m, p_over_m, q_over_m = pi * p + rest * q, x.clamp(max=0.0) - shift, -x.clamp(min=0.0) - shift
        value = pi * _kl_term(p, m, p_over_m) + rest * _kl_term(q, m, q_over_m)
        return value, rest * q * q_over_m

    return terms, _Limits(-rest * math.log(rest), -pi * math.log(pi), -rest * math.log(rest), 0.0)


def _squared_hellinger(_: names.SquaredHellinger) -> tuple[_Terms, _Limits]:
    def terms(p, q, x, log_p, log_q):
        half = torch.expm1(0.5 * x.clamp(-1, 1))
        value = torch.where(_near(x), q * half * half, (p.sqrt() - q.sqrt()).square())
        return value, torch.where(_near(x), -q * half, q - torch.exp(0.5 * (log_p + log_q)))

    return terms, _Limits(1.0, 1.0, 1.0, 0.0)


def _total_variation(_: names.TotalVariation) -> tuple[_Terms, _Limits]:
    def terms(p, q, x, log_p, log_q):
        value = torch.where(_near(x), q * torch.expm1(x.clamp(-1, 1)).abs(), (p - q).abs())
        return 0.5 * value, -0.5 * q * torch.sign(x)

    return terms, _Limits(0.5, 0.5, 0.5, 0.0)


def _pearson_chi2(_: names.PearsonChi2) -> tuple[_Terms, _Limits]:
    def terms(p, q, x, log_p, log_q):
        near = x.clamp(-1, 1)
        ratio = torch.exp(log_p + x)  # p²/q
        value = torch.where(_near(x), q * torch.expm1(near).square(), ratio - 2.0 * p + q)
        return value, torch.where(_near(x), -q * torch.expm1(2.0 * near), q - ratio)

    return terms, _Limits(1.0, math.inf, 1.0, -math.inf)


def _neyman_chi2(_: names.NeymanChi2) -> tuple[_Terms, _Limits]:
    def terms(p, q, x, log_p, log_q):
        near = x.clamp(-1, 1)
        ratio = torch.exp(log_q - x)  # q²/p
        value = torch.where(_near(x), -q * torch.expm1(near) * torch.expm1(-near), ratio - 2.0 * q + p)
        return value, 2.0 * torch.where(_near(x), q * torch.expm1(-near), ratio - q)

    return terms, _Limits(math.inf, 1.0, math.inf, 0.0)


def _alpha(divergence: names.Alpha) -> tuple[_Terms, _Limits]:
    a = divergence.alpha
    norm = a * (a - 1.0)

    reach = min(1.0, 80.0 / abs(a))  # exp(a·x) stays finite in float32

    def terms(p, q, x, log_p, log_q):
        near, is_near = x.clamp(-reach, reach), x.abs() < reach
        power = torch.exp(log_q + a * x)  # p^α q^(1-α)
        value = torch.where(
            is_near, q * (_expm1_minus(a * near) - a * _expm1_minus(near)), power - a * p - (1.0 - a) * q
        )
        return value / norm, torch.where(is_near, -q * torch.expm1(a * near), q - power) / a

    no_p, no_q = (1.0 / a if a > 0 else math.inf), (1.0 / (1.0 - a) if a < 1 else math.inf)
    return terms, _Limits(no_p, no_q, no_p, 0.0 if a < 1 else -math.inf)


def _le_cam(_: names.LeCam) -> tuple[_Terms, _Limits]:
    def terms(p, q, x, log_p, log_q):
        t = torch.tanh(0.5 * x)  # (p-q)/(p+q)
        difference = torch.where(_near(x), q * torch.expm1(x.clamp(-1, 1)), p - q)
        return difference * t, -q * t * (2.0 + t)

    return terms, _Limits(1.0, 1.0, 1.0, 0.0)


_FORMULAS: dict[type[names.Divergence], Callable[..., tuple[_Terms, _Limits]]] = {
    names.ForwardKL: _forward_kl,
    names.ReverseKL: _reverse_kl,
    names.JensenShannon: _jensen_shannon,
    names.SquaredHellinger: _squared_hellinger,
    names.TotalVariation: _total_variation,
    names.PearsonChi2: _pearson_chi2,
    names.NeymanChi2: _neyman_chi2,
    names.Alpha: _alpha,
    names.LeCam: _le_cam,
}


# --- logits ---------------------------------------------------------------------------------------------------------


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _guided(cond: Tensor, uncond: Tensor | None, scale: float, scale_per_sample: Tensor | None) -> Tensor:
    """Mix uncond + s·(cond - uncond); -inf on either side gives -inf, s = 1 ignores the unconditional side."""
    z = cond.to(_compute_dtype(cond))
    if uncond is None or (scale_per_sample is None and scale == 1.0):
        return z
    u = uncond.to(z.dtype)
    s = scale if scale_per_sample is None else scale_per_sample.to(z.dtype).view(-1, *[1] * (z.dim() - 1))
    filtered = (z == -math.inf) | (u == -math.inf)
    mixed = torch.where(filtered, -math.inf, u + s * (z - u))
    return mixed if scale_per_sample is None else torch.where(s == 1.0, z, mixed)


def _tempered(z: Tensor, temperature: float) -> Tensor:
    """(z - max z) / temperature; a row without a finite logit stays -inf."""
    top = z.amax(-1, keepdim=True)
    return (z - torch.where(top == -math.inf, 0.0, top)) / temperature


def _log_ratio(z_p: Tensor, z_q: Tensor, log_p: Tensor, log_q: Tensor, temperature: float) -> Tensor:
    """Take log p - log q from the logits' difference, exact where they nearly agree, unless the tops lie far apart.

    NaN where both are -inf.
    """
    gap = z_p.amax(-1, keepdim=True) - z_q.amax(-1, keepdim=True)
    sums = [_tempered(z, temperature).logsumexp(-1, keepdim=True) for z in (z_p, z_q)]
    near = gap.abs() / temperature < _NEAR_TOPS
    return torch.where(near, ((z_p - z_q) - gap) / temperature - (sums[0] - sums[1]), log_p - log_q)


def _log_softmax(z: Tensor, temperature: float) -> Tensor:
    """Take log softmax(z / temperature) with no NaN: a row without a finite logit becomes all -inf."""
    z = _tempered(z, temperature)
    return (z - z.logsumexp(-1, keepdim=True)).masked_fill(z == -math.inf, -math.inf)


# --- factor and storage ---------------------------------------------------------------------------------------------


def _weighted(value: Tensor, factor: Tensor | None, reduce: bool) -> Tensor:
    """Value × factor, summed if asked for; a factor of 0 wins over an infinite value."""
    if factor is not None:
        value = value.masked_fill(factor == 0, 0.0) * factor
    return value.sum() if reduce else value.contiguous()


def _stored(receiver: Tensor, gradient: Tensor, factor: Tensor | None, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Return factor · gradient in the dtype and strides of ``receiver``, and which counted rows it cannot hold.

    Rows that are not counted, or cannot be held, are 0.
    """
    if factor is not None:
        counted = counted & (factor != 0)
    factor = factor_in_forward(receiver, factor)
    if factor is not None:
        gradient = gradient * factor[..., None]
    stored = torch.empty_like(receiver).copy_(gradient)
    usable = torch.isfinite(stored).all(-1)
    return stored.masked_fill_(~(counted & usable)[..., None], 0.0), counted & ~usable
