"""Token-level f-divergence: guidance and temperature, a formula a divergence, and the gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import divergences as names
from ._logits import compute_dtype, guided, tempered
from ._results import stored_gradient, weighted

_NEAR_TOPS = 16.0  # nats: up to here the largest logits of both sides count as near


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
    stored, zeroed = stored_gradient(receiver, gradient, factor, counted)
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
    stored, zeroed = stored_gradient(auxiliary_logits, gradient, None, counted)
    auxiliary_logits.copy_(stored)
    return loss, zeroed.sum()


def _divergence(
    teacher_logits: Tensor, auxiliary_logits: Tensor, divergence: str, uncond_logits: Tensor | None,
    guidance_scale: float, guidance_per_sample: Tensor | None, teacher_temperature: float,
    auxiliary_temperature: float, teacher_log_floor: float | None, mask: Tensor | None, factor: Tensor | None,
    reduce: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Divergences times factor, or their sum; the gradient without the factor; which tokens count."""
    z_p = guided(teacher_logits, uncond_logits, guidance_scale, guidance_per_sample)
    compute = torch.promote_types(z_p.dtype, compute_dtype(auxiliary_logits))
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
    return weighted(value, factor, reduce), gradient, counted


def _log_ratio(z_p: Tensor, z_q: Tensor, log_p: Tensor, log_q: Tensor, temperature: float) -> Tensor:
    """Take log p - log q from the logits' difference, exact where they nearly agree, unless the tops lie far apart.

    NaN where both are -inf.
    """
    gap = z_p.amax(-1, keepdim=True) - z_q.amax(-1, keepdim=True)
    sums = [tempered(z, temperature).logsumexp(-1, keepdim=True) for z in (z_p, z_q)]
    near = gap.abs() / temperature < _NEAR_TOPS
    return torch.where(near, ((z_p - z_q) - gap) / temperature - (sums[0] - sums[1]), log_p - log_q)


def _log_softmax(z: Tensor, temperature: float) -> Tensor:
    """Take log softmax(z / temperature) with no NaN: a row without a finite logit becomes all -inf."""
    z = tempered(z, temperature)
    return (z - z.logsumexp(-1, keepdim=True)).masked_fill(z == -math.inf, -math.inf)


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
