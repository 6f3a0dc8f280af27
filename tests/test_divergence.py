"""Token divergences against their float64 definition Σ q f(p/q), and the loss that hands their gradient on."""

from __future__ import annotations

import math
from collections.abc import Callable
from math import inf, nan

import pytest
import scipy.spatial.distance
import scipy.special
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

import dimo_ext as dx
from tests.conftest import (
    DTYPES,
    META,
    LogitsCase,
    assert_close,
    assert_gradient,
    assert_rejected,
    computed_gradients,
    logits_cases,
)

CONVEX = [
    dx.ForwardKL(), dx.ReverseKL(), dx.Jeffreys(0.0), dx.Jeffreys(0.3), dx.Jeffreys(1.0), dx.JensenShannon(),
    dx.JensenShannon(0.1), dx.JensenShannon(0.9), dx.SquaredHellinger(), dx.TotalVariation(), dx.PearsonChi2(),
    dx.NeymanChi2(), dx.Alpha(-1.0), dx.Alpha(0.5), dx.Alpha(2.0), dx.Alpha(3.0), dx.LeCam(),
]  # fmt: skip
DIVERGENCES = [*CONVEX, dx.Jeffreys(-0.2), dx.Jeffreys(1.5)]
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
temperatures = st.sampled_from([0.5, 0.9, 1.0, 2.0, 1e3])


# --- the oracle -----------------------------------------------------------------------------------------------------


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


def representable(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient with the rows that the dtype cannot hold set to 0."""
    return torch.where(gradient.to(dtype).isfinite().all(-1, keepdim=True), gradient, 0.0)


def value_and_gradient(divergence, teacher: Tensor, auxiliary: Tensor, **options) -> tuple[Tensor, Tensor]:
    """The operator's value, and the gradient of its sum."""
    auxiliary = auxiliary.detach().requires_grad_()
    value = dx.token_divergence(teacher, auxiliary, divergence, **options)
    (gradient,) = torch.autograd.grad(value, auxiliary, torch.ones_like(value))
    return value.detach(), gradient


def pair(device, shape=(3, 5, 11), dtype=torch.float64, seed=0) -> list[Tensor]:
    return LogitsCase(shape[:-1], shape[-1], dtype, seed=seed).build(device)


# --- values and gradients -------------------------------------------------------------------------------------------


@every_divergence
@given(case=logits_cases(patterns=["normal", "near", "constant", "padded"]), tau_p=temperatures, tau_q=temperatures)
@example(case=LogitsCase(shape=(0,), vocab=1), tau_p=1.0, tau_q=1.0)
@example(case=LogitsCase(shape=(2, 3), vocab=1025, layout="vocab_first", dtype=torch.bfloat16), tau_p=1.0, tau_q=1.0)
def test_matches_the_definition(device, divergence, case, tau_p, tau_q):
    """Value and gradient equal the float64 definition for every shape, stride, dtype and temperature."""
    assume(case.pattern != "near" or divergence != dx.TotalVariation())  # its gradient jumps where p = q
    teacher, auxiliary = case.build(device)
    value, gradient = value_and_gradient(
        divergence, teacher, auxiliary, teacher_temperature=tau_p, auxiliary_temperature=tau_q
    )
    precise = case.dtype == torch.float64
    assert value.dtype == (torch.float64 if precise else torch.float32)
    assert gradient.dtype == case.dtype
    z_p, z_q = teacher.double() / tau_p, auxiliary.double() / tau_q
    assert_close(value, oracle(divergence, z_p, z_q), case.dtype)
    expected = oracle_gradient(divergence, z_p, z_q) / tau_q
    near = case.pattern != "normal" or max(tau_p, tau_q) > 2
    assert_gradient(gradient, representable(expected, case.dtype), near=near)


@every_divergence
def test_gradcheck_in_double(divergence):
    """Finite differences agree with the gradient, guidance, temperatures and mask included."""
    teacher, auxiliary, uncond = LogitsCase((2, 3), 4, torch.float64).build(torch.device("cpu"), 3)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    options = {
        "teacher_uncond_logits": uncond, "guidance_scale": 1.5, "teacher_temperature": 1.3,
        "auxiliary_temperature": 0.8, "mask": mask,
    }  # fmt: skip

    def call(z):
        return dx.token_divergence(teacher, z, divergence, **options)

    assert torch.autograd.gradcheck(call, auxiliary.requires_grad_())


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nearly_equal_distributions_keep_their_digits(device, divergence, dtype):
    """Where logits differ by 0.01, so that D is about 1e-5, the value's relative error stays small."""
    case = LogitsCase((20,), 257, dtype, pattern="near")
    value, gradient = value_and_gradient(divergence, *case.build(device))
    expected = oracle(divergence, *case.build(device))
    assert expected.abs().max() < 1e-2
    limit = 1e-9 if dtype == torch.float64 else 2e-4
    assert ((value.double() - expected).abs() <= limit * expected.abs()).all()
    if divergence != dx.TotalVariation():
        assert_gradient(gradient, oracle_gradient(divergence, *case.build(device)), near=True)


@every_divergence
@given(case=logits_cases(patterns=["minus_inf", "one_finite", "padded"], max_vocab=65))
@example(case=LogitsCase((3,), 1, pattern="minus_inf"))
@example(case=LogitsCase((5,), 2, pattern="one_finite"))
@example(case=LogitsCase((), 2, torch.float64, pattern="one_finite", seed=3))
def test_filtered_ids_give_the_limits(device, divergence, case):
    """-inf on one side gives the value's limit, on both sides nothing; a row without a finite logit gives 0."""
    teacher, auxiliary = case.build(device)
    value, gradient = value_and_gradient(divergence, teacher, auxiliary)
    assert_close(value, oracle(divergence, teacher, auxiliary), case.dtype)
    assert_gradient(gradient, representable(limit_gradient(divergence, teacher, auxiliary), case.dtype))


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


OPPOSITE = [[0.0, -inf, 0.0], [-inf, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("divergence", "z_p", "z_q", "expected"),
    [
        (dx.ForwardKL(), [0.0, 0.0], [0.0, -inf], inf),
        (dx.ForwardKL(), [0.0, -inf], [0.0, 0.0], math.log(2)),
        (dx.ReverseKL(), [0.0, -inf], [0.0, 0.0], inf),
        (dx.ReverseKL(), [0.0, 0.0], [0.0, -inf], math.log(2)),
        (dx.Jeffreys(-0.2), [0.0, -inf], [0.0, 0.0], -inf),
        (dx.Jeffreys(1.5), [0.0, 0.0], [0.0, -inf], -inf),
        (dx.Jeffreys(-0.2), *OPPOSITE, inf),
        (dx.Jeffreys(1.5), *OPPOSITE, inf),
        (dx.Jeffreys(0.0), [0.0, -inf], [0.0, 0.0], math.log(2)),
        (dx.Jeffreys(1.0), [0.0, 0.0], [0.0, -inf], math.log(2)),
        (dx.JensenShannon(), [0.0, -inf], [-inf, 0.0], math.log(2)),
        (dx.SquaredHellinger(), [0.0, -inf], [-inf, 0.0], 2.0),
        (dx.TotalVariation(), [0.0, -inf], [-inf, 0.0], 1.0),
        (dx.LeCam(), [0.0, -inf], [-inf, 0.0], 2.0),
        (dx.PearsonChi2(), [0.0, -inf], [0.0, 0.0], 1.0),
        (dx.PearsonChi2(), [0.0, 0.0], [0.0, -inf], inf),
        (dx.NeymanChi2(), [0.0, -inf], [0.0, 0.0], inf),
        (dx.Alpha(0.5), [0.0, -inf], [-inf, 0.0], 4.0),
        (dx.Alpha(-1.0), [0.0, -inf], [0.0, 0.0], inf),
        (dx.Alpha(3.0), [0.0, 0.0], [0.0, -inf], inf),
        (dx.ForwardKL(), [-inf, -inf], [0.0, 1.0], 0.0),
        (dx.ReverseKL(), [0.0, 1.0], [-inf, -inf], 0.0),
        (dx.PearsonChi2(), [5.0], [-3.0], 0.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_limits_by_hand(device, divergence, z_p, z_q, expected, dtype):
    """The limits, computed with pencil and paper."""
    z_p, z_q = (torch.tensor(z, dtype=dtype, device=device) for z in (z_p, z_q))
    value, gradient = value_and_gradient(divergence, z_p, z_q)
    assert_close(value, expected, dtype)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("divergence", [*DIVERGENCES, dx.Alpha(120.0), dx.Alpha(-120.0)], ids=str)
@every_dtype
@pytest.mark.parametrize("temperature", [1e-3, 1.0, 1e3])
def test_extreme_logits_never_give_nan(device, divergence, dtype, temperature):
    """Finite logits up to ±1e4 give no NaN, a finite gradient, and a value that is +inf at worst."""
    teacher, auxiliary = LogitsCase((40,), 9, dtype, pattern="extreme").build(device)
    options = {"teacher_temperature": temperature, "auxiliary_temperature": temperature}
    value, gradient = value_and_gradient(divergence, teacher, auxiliary, **options)
    assert not value.isnan().any()
    assert gradient.isfinite().all()
    if divergence in CONVEX:
        assert (value >= 0).all()


@pytest.mark.parametrize("alpha", [90.0, 120.0, -120.0])
def test_a_large_alpha_stays_a_number_where_q_underflows(device, alpha):
    """Close ids of vanishing probability contribute 0, not 0·inf."""
    teacher = torch.tensor([0.0, -200.0, -200.0], device=device)
    auxiliary = torch.tensor([0.0, -200.9, -199.1], device=device)
    value, gradient = value_and_gradient(dx.Alpha(alpha), teacher, auxiliary)
    assert_close(value, 0.0)
    assert_gradient(gradient, torch.zeros(3))


@pytest.mark.parametrize("pattern", ["normal", "extreme"])
@pytest.mark.parametrize("temperature", [1e-3, 0.03, 1.0, 1e3])
@every_dtype
def test_kl_agrees_with_torch_in_log_space(device, pattern, temperature, dtype):
    """Forward and reverse KL equal torch's kl_div where probabilities underflow."""
    teacher, auxiliary = LogitsCase((20,), 33, dtype, pattern=pattern).build(device)
    options = {"teacher_temperature": temperature, "auxiliary_temperature": temperature}
    log_p, log_q = ((z.double() / temperature).log_softmax(-1) for z in (teacher, auxiliary))
    for divergence, target, other in ((dx.ForwardKL(), log_p, log_q), (dx.ReverseKL(), log_q, log_p)):
        expected = F.kl_div(other, target, log_target=True, reduction="none").sum(-1)
        value = dx.token_divergence(teacher, auxiliary, divergence, **options)
        assert_close(value, expected, dtype, scale=1.0 if temperature >= 1 else 10.0)


def test_agrees_with_scipy(device):
    """KL and Jensen-Shannon equal scipy's, which share no code with ours."""
    teacher, auxiliary = pair(device)
    p, q = (z.softmax(-1).cpu().numpy() for z in (teacher, auxiliary))
    forward = torch.from_numpy(scipy.special.rel_entr(p, q).sum(-1))
    shannon = torch.from_numpy(scipy.spatial.distance.jensenshannon(p, q, axis=-1) ** 2)
    assert_close(dx.token_divergence(teacher, auxiliary, "forward_kl"), forward, torch.float64)
    assert_close(dx.token_divergence(teacher, auxiliary, "jensen_shannon:0.5"), shannon, torch.float64)


@pytest.mark.parametrize("a", [0.02, 0.5, 0.7])
@pytest.mark.parametrize("b", [0.1, 0.5, 0.95])
def test_closed_forms_for_two_ids(device, a, b):
    """With p = (a, 1-a) and q = (b, 1-b) every divergence is a line of arithmetic."""
    overlap = math.sqrt(a * b) + math.sqrt((1 - a) * (1 - b))
    forward = a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))
    reverse = b * math.log(b / a) + (1 - b) * math.log((1 - b) / (1 - a))

    def entropy(x):
        return -x * math.log(x) - (1 - x) * math.log(1 - x)

    square = (a - b) ** 2
    expected = {
        "forward_kl": forward,
        "reverse_kl": reverse,
        "jeffreys:-0.2": 1.2 * forward - 0.2 * reverse,
        "jensen_shannon:0.3": entropy(0.3 * a + 0.7 * b) - 0.3 * entropy(a) - 0.7 * entropy(b),
        "squared_hellinger": 2 - 2 * overlap,
        "total_variation": abs(a - b),
        "pearson_chi2": square / (b * (1 - b)),
        "neyman_chi2": square / (a * (1 - a)),
        "alpha:0.5": 4 * (1 - overlap),
        "alpha:2": square / (2 * b * (1 - b)),
        "alpha:-1": square / (2 * a * (1 - a)),
        "le_cam": square / (a + b) + square / (2 - a - b),
    }
    logits = [torch.tensor([math.log(x), math.log(1 - x)], dtype=torch.float64, device=device) for x in (a, b)]
    for name, value in expected.items():
        assert_close(dx.token_divergence(*logits, name), value, torch.float64)


# --- what every divergence must obey --------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", CONVEX, ids=str)
@given(case=logits_cases(max_vocab=65))
def test_never_negative_when_convex(device, divergence, case):
    """D >= 0, and 0 against itself but for the rounding of a mixture's logarithm."""
    teacher, auxiliary = case.build(device)
    assert (dx.token_divergence(teacher, auxiliary, divergence) >= 0).all()
    value, gradient = value_and_gradient(divergence, teacher, teacher)
    assert (value <= 1e-12).all()
    assert_gradient(gradient, torch.zeros_like(gradient))


def test_jeffreys_outside_the_unit_interval_can_be_negative(device):
    """Nobody clamps it: β < 0 rewards distance in the reverse direction."""
    z_p, z_q = (torch.tensor(z, device=device) for z in ([0.0, -30.0], [0.0, 0.0]))
    assert dx.token_divergence(z_p, z_q, dx.Jeffreys(-0.2)) < -1


def test_relations_between_divergences(device):
    """Swaps, limits and linear relations that need no definition."""
    p, q = pair(device)

    def d(a, b, x):
        return dx.token_divergence(a, b, x)

    def same(a, b, scale=1.0):
        return assert_close(a, b, torch.float64, scale=scale)

    for symmetric in ("jensen_shannon", "squared_hellinger", "total_variation", "le_cam", "jeffreys:0.5", "alpha:0.5"):
        same(d(p, q, symmetric), d(q, p, symmetric))
    same(d(p, q, dx.JensenShannon(0.2)), d(q, p, dx.JensenShannon(0.8)))
    same(d(p, q, "pearson_chi2"), d(q, p, "neyman_chi2"))
    same(d(p, q, "alpha:2"), d(p, q, "pearson_chi2") / 2)
    same(d(p, q, "alpha:-1"), d(p, q, "neyman_chi2") / 2)
    same(d(p, q, "alpha:3"), d(q, p, "alpha:-2"))
    same(d(p, q, "alpha:0.5"), 2 * d(p, q, "squared_hellinger"))
    same(d(p, q, "jeffreys:0"), d(p, q, "forward_kl"))
    same(d(p, q, "jeffreys:1"), d(p, q, "reverse_kl"))
    for beta in (-0.2, 0.3, 1.5):
        mix = (1 - beta) * d(p, q, "forward_kl") + beta * d(p, q, "reverse_kl")
        same(d(p, q, dx.Jeffreys(beta)), mix)
    for limit, kl in ((1.0, "forward_kl"), (0.0, "reverse_kl")):
        below, above = (d(p, q, dx.Alpha(limit + step)) for step in (-2e-3, 2e-3))
        torch.testing.assert_close((below + above) / 2, d(p, q, kl), rtol=1e-4, atol=0.0)  # an error of step²


@every_divergence
def test_invariant_under_shift_and_permutation(device, divergence):
    """Adding a constant to a row changes nothing; permuting the vocabulary permutes the gradient."""
    teacher, auxiliary = pair(device)
    value, gradient = value_and_gradient(divergence, teacher, auxiliary)
    shift = torch.linspace(-50, 50, 5, dtype=torch.float64, device=device)[:, None]
    shifted = value_and_gradient(divergence, teacher + shift, auxiliary - 3 * shift)
    assert_close(shifted[0], value, torch.float64)
    assert_gradient(shifted[1], gradient)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0)).to(device)
    permuted = value_and_gradient(divergence, teacher[..., order], auxiliary[..., order])
    assert_close(permuted[0], value, torch.float64)
    assert_gradient(permuted[1], gradient[..., order])


@every_dtype
def test_same_inputs_same_bits(device, dtype):
    """Two runs agree bit for bit."""
    teacher, auxiliary = pair(device, (4, 6, 257), dtype)
    first, second = (value_and_gradient(dx.Jeffreys(-0.2), teacher, auxiliary) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


# --- temperature, guidance, mask, dtypes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.float64, torch.float16),
    ],
    ids=str,
)
def test_mixed_dtypes(device, dtypes):
    """Teacher and auxiliary may differ in dtype; the gradient has the auxiliary's."""
    teacher, auxiliary = (z.to(d) for z, d in zip(pair(device), dtypes, strict=True))
    value, gradient = value_and_gradient("jeffreys:0.3", teacher, auxiliary)
    assert value.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
    assert gradient.dtype == dtypes[1]
    assert_close(value, oracle(dx.Jeffreys(0.3), teacher, auxiliary))
    assert_gradient(gradient, oracle_gradient(dx.Jeffreys(0.3), teacher, auxiliary))


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 1.0, 4.0])
@every_dtype
def test_guidance(device, per_sample, scale, dtype):
    """Uncond + s·(cond - uncond), mixed in high precision, with one s for all or one a sample."""
    teacher, auxiliary, uncond = LogitsCase((3, 4), 13, dtype).build(device, 3)
    s = torch.tensor([scale, 1.0, 2.5], device=device) if per_sample else scale
    mixed = uncond.double() + torch.as_tensor(s, device=device).view(-1, 1, 1) * (teacher.double() - uncond.double())
    value, gradient = value_and_gradient(
        "jensen_shannon:0.4", teacher, auxiliary, teacher_uncond_logits=uncond, guidance_scale=s
    )
    assert_close(value, oracle(dx.JensenShannon(0.4), mixed, auxiliary), dtype)
    assert_gradient(gradient, oracle_gradient(dx.JensenShannon(0.4), mixed, auxiliary))


@pytest.mark.parametrize("fill", [-inf, nan, inf])
@pytest.mark.parametrize("per_sample", [False, True])
def test_guidance_of_one_ignores_the_unconditional_side(device, fill, per_sample):
    """S = 1 is no guidance, whatever the unconditional side holds."""
    teacher, auxiliary = pair(device, (2, 3, 7), torch.float32)
    s = torch.ones(2, device=device) if per_sample else 1.0
    options = {"teacher_uncond_logits": torch.full_like(teacher, fill), "guidance_scale": s}
    assert torch.equal(dx.token_divergence(teacher, auxiliary, "forward_kl", **options),
                       dx.token_divergence(teacher, auxiliary, "forward_kl"))  # fmt: skip


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 3.0])
def test_guidance_keeps_filtered_ids_filtered(device, scale):
    """-inf on either side gives -inf for every s but 1."""
    teacher, auxiliary, uncond = LogitsCase((4, 2), 13, torch.float64, pattern="minus_inf").build(device, 3)
    filtered = (teacher == -inf) | (uncond == -inf)
    finite = [z.masked_fill(filtered, 0.0) for z in (teacher, uncond)]
    mixed = (finite[1] + scale * (finite[0] - finite[1])).masked_fill(filtered, -inf)
    for divergence in (dx.ForwardKL(), dx.LeCam()):
        value = dx.token_divergence(teacher, auxiliary, divergence, teacher_uncond_logits=uncond, guidance_scale=scale)
        assert_close(value, oracle(divergence, mixed, auxiliary), torch.float64)


@pytest.mark.parametrize("fill", [nan, inf, -inf])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jeffreys:-0.2", "pearson_chi2"])
def test_masked_out_rows_are_not_read(device, divergence, fill):
    """Whatever stands in a masked-out row, its value and gradient are 0 and its neighbours' are unchanged."""
    teacher, auxiliary = pair(device, (3, 4, 9), torch.float32)
    mask = torch.rand(3, 4, generator=torch.Generator().manual_seed(1)).to(device) < 0.5
    clean = value_and_gradient(divergence, teacher, auxiliary)
    dirty = [z.masked_fill(~mask[..., None], fill) for z in (teacher, auxiliary)]
    value, gradient = value_and_gradient(divergence, *dirty, mask=mask)
    assert torch.equal(value, torch.where(mask, clean[0], 0.0))
    assert torch.equal(gradient, torch.where(mask[..., None], clean[1], 0.0))


@pytest.mark.parametrize("bad", [nan, inf])
def test_the_upstream_of_a_masked_out_row_is_not_read(device, bad):
    """A user's own infinite weight on a masked-out row leaves its gradient 0."""
    teacher, auxiliary = pair(device, (2, 3, 7), torch.float32)
    auxiliary.requires_grad_()
    mask = torch.tensor([[False] * 3, [True] * 3], device=device)
    value = dx.token_divergence(teacher, auxiliary, "forward_kl", mask=mask)
    (gradient,) = torch.autograd.grad(value, auxiliary, torch.where(mask, 2.0, bad))
    assert torch.equal(gradient[0], torch.zeros_like(gradient[0]))
    assert_gradient(gradient[1], 2 * oracle_gradient(dx.ForwardKL(), teacher[1], auxiliary[1]))


def test_teacher_is_a_constant(device):
    """No gradient reaches the teacher's side, guided or not."""
    teacher, auxiliary, uncond = (z.requires_grad_() for z in LogitsCase((2, 3), 5).build(device, 3))
    dx.token_divergence(teacher, auxiliary, "le_cam", teacher_uncond_logits=uncond, guidance_scale=2.0).sum().backward()
    assert teacher.grad is None
    assert uncond.grad is None
    assert auxiliary.grad.abs().sum() > 0


def test_gradient_is_computed_only_when_needed(device):
    """One pass serves both when a gradient is needed; otherwise none is computed."""
    operator = torch.ops.dimo_ext.token_divergence.default
    teacher, auxiliary = (z.requires_grad_() for z in pair(device))

    def call(z=auxiliary):
        return dx.token_divergence(teacher, z, "forward_kl")

    assert computed_gradients(operator, call) == [auxiliary.numel()]
    with torch.no_grad():
        assert computed_gradients(operator, call) == [0]
    assert computed_gradients(operator, lambda: call(auxiliary.detach())) == [0]

    def loss(student):
        return dx.distribution_matching_loss(student, teacher, auxiliary, "forward_kl")

    assert computed_gradients(operator, lambda: loss(auxiliary.detach())) == [0]
    assert computed_gradients(operator, lambda: loss(torch.zeros_like(auxiliary, requires_grad=True))) == [
        auxiliary.numel()
    ]


# --- distribution_matching_loss -------------------------------------------------------------------------------------

REDUCTIONS = ["none", "sum", "mean", "batchmean"]


def reduced(value: Tensor, mask: Tensor | None, reduction: str) -> Tensor:
    """The reductions, as their documentation words them."""
    counted = value.numel() if mask is None else int(mask.sum())
    divisor = {"none": 1, "sum": 1, "mean": max(counted, 1), "batchmean": max(len(value), 1)}[reduction]
    return value if reduction == "none" else value.sum() / divisor


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighting", [None, "sample", "token"])
@pytest.mark.parametrize("masked", [False, True])
def test_loss_is_the_weighted_divergence_and_its_gradient_goes_to_the_student(device, reduction, weighting, masked):
    """Value and gradient are token_divergence's × weight ÷ count; nothing reaches teacher or auxiliary."""
    teacher, auxiliary, uncond = LogitsCase((3, 4), 13).build(device, 3)
    student = torch.full_like(teacher, nan).requires_grad_()  # not read
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(3, 4, generator=generator).to(device) < 0.6 if masked else None
    weight = {None: None, "sample": torch.rand(3, generator=generator), "token": torch.rand(3, 4, generator=generator)}[
        weighting
    ]
    weight = weight if weight is None else weight.to(device)
    options = {"teacher_uncond_logits": uncond, "guidance_scale": 2.0, "teacher_temperature": 0.7,
               "auxiliary_temperature": 1.2, "mask": mask}  # fmt: skip
    auxiliary.requires_grad_()
    teacher.requires_grad_()
    loss = dx.distribution_matching_loss(
        student, teacher, auxiliary, "jeffreys:-0.2", weight=weight, reduction=reduction, **options
    )
    loss.sum().backward()
    assert teacher.grad is None
    assert auxiliary.grad is None

    value = dx.token_divergence(teacher, auxiliary, "jeffreys:-0.2", **options)
    factor = 1.0 if weight is None else weight.view(*weight.shape, *[1] * (2 - weight.dim()))
    expected = reduced(value * factor, mask, reduction)
    (gradient,) = torch.autograd.grad(expected.sum(), auxiliary)
    assert_close(loss, expected)
    assert_gradient(student.grad, gradient)


@every_dtype
def test_loss_equals_the_definition(device, dtype):
    """The whole loss against float64, so that no error is shared with token_divergence."""
    teacher, auxiliary = pair(device, (4, 6, 33), dtype)
    student = torch.zeros_like(teacher, requires_grad=True)
    loss = dx.distribution_matching_loss(student, teacher, auxiliary, "reverse_kl")
    loss.backward()
    assert student.grad.dtype == dtype
    assert_close(loss, oracle(dx.ReverseKL(), teacher, auxiliary).sum() / 4, dtype)
    assert_gradient(student.grad, oracle_gradient(dx.ReverseKL(), teacher, auxiliary) / 4)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("batch", [0, 2])
def test_nothing_counted_gives_zero(device, reduction, batch):
    """An empty batch and an empty mask give loss 0 and gradient 0."""
    teacher, auxiliary = pair(device, (batch, 3, 7), torch.float32)
    student = torch.zeros_like(teacher, requires_grad=True)
    mask = torch.zeros(batch, 3, dtype=torch.bool, device=device)
    loss = dx.distribution_matching_loss(student, teacher, auxiliary, "le_cam", mask=mask, reduction=reduction)
    loss.sum().backward()
    assert torch.equal(loss, torch.zeros(batch, 3, device=device) if reduction == "none" else loss.new_zeros(()))
    assert torch.equal(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize("bad", [nan, inf])
def test_the_weight_of_a_masked_out_row_is_not_read(device, bad):
    """A schedule's w(t) may be infinite where nothing is masked; the loss stays finite."""
    teacher, auxiliary = pair(device, (2, 3, 7), torch.float32)
    student = torch.zeros_like(teacher, requires_grad=True)
    mask = torch.tensor([[False] * 3, [True] * 3], device=device)
    loss = dx.distribution_matching_loss(
        student, teacher, auxiliary, "forward_kl", mask=mask, weight=torch.tensor([bad, 2.0], device=device)
    )
    loss.backward()
    assert_close(loss, oracle(dx.ForwardKL(), teacher[1], auxiliary[1]).sum())
    assert_gradient(student.grad[1], oracle_gradient(dx.ForwardKL(), teacher[1], auxiliary[1]))
    assert torch.equal(student.grad[0], torch.zeros_like(student[0]))


def test_weight_zero_drops_an_infinite_divergence(device):
    """0 × inf is 0 here: a row without weight adds nothing."""
    teacher = torch.tensor([[[0.0, -inf]], [[0.0, 1.0]]], device=device)
    student = torch.zeros_like(teacher, requires_grad=True)
    loss = dx.distribution_matching_loss(
        student, teacher, torch.zeros_like(teacher), "reverse_kl", weight=torch.tensor([0.0, 2.0], device=device)
    )
    loss.backward()
    assert_close(loss, oracle(dx.ReverseKL(), teacher[1], torch.zeros_like(teacher[1])).sum())
    assert student.grad.isfinite().all()


def test_float16_gradient_survives_a_small_factor(device):
    """The O(1) gradient is saved: weight, count and loss scale meet in float32, so nothing underflows."""
    teacher, auxiliary = pair(device, (2, 3, 33), torch.float16)
    student = torch.zeros_like(teacher, requires_grad=True)
    weight = torch.full((2,), 2.0**-20, device=device)
    loss = dx.distribution_matching_loss(student, teacher, auxiliary, "forward_kl", weight=weight)
    (loss * 2.0**21).backward()
    assert_gradient(student.grad, oracle_gradient(dx.ForwardKL(), teacher, auxiliary))


def test_gradients_accumulate_and_a_retained_graph_gives_them_again(device):
    """Backward adds to .grad; a second backward through the same graph gives the same, scaled or not."""
    teacher, auxiliary = pair(device)
    student = torch.zeros_like(teacher, requires_grad=True)
    loss = dx.distribution_matching_loss(student, teacher, auxiliary, "jeffreys:0.3")
    loss.backward(retain_graph=True)
    once = student.grad.clone()
    assert_gradient(once, oracle_gradient(dx.Jeffreys(0.3), teacher, auxiliary) / 3)
    loss.backward(torch.tensor(-2.5, device=device, dtype=loss.dtype), retain_graph=True)
    assert_gradient(student.grad, -1.5 * once)
    student.grad = None
    loss.backward()
    assert torch.equal(student.grad, once)


def test_no_second_derivative(device):
    """The loss is once-differentiable, and says so."""
    teacher, auxiliary = pair(device)
    student = torch.zeros_like(teacher, requires_grad=True)
    loss = dx.distribution_matching_loss(student, teacher, auxiliary, "forward_kl")
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="once differentiable"):
        gradient.sum().backward()


def test_student_dtype_may_differ(device):
    """A bfloat16 student trains against float32 logits; its gradient is bfloat16."""
    teacher, auxiliary = pair(device, dtype=torch.float32)
    student = torch.zeros_like(teacher, dtype=torch.bfloat16, requires_grad=True)
    dx.distribution_matching_loss(student, teacher, auxiliary, "forward_kl").backward()
    assert student.grad.dtype == torch.bfloat16
    assert_gradient(student.grad, oracle_gradient(dx.ForwardKL(), teacher, auxiliary) / 3)


def test_autocast_changes_nothing(device):
    """Under autocast the loss is computed from the logits it is given."""
    teacher, auxiliary = pair(device, dtype=torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        value = dx.token_divergence(teacher, auxiliary, "pearson_chi2")
    assert torch.equal(value, dx.token_divergence(teacher, auxiliary, "pearson_chi2"))


# --- names and bad arguments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", [*DIVERGENCES, dx.Jeffreys(1 / 3), dx.Alpha(-1 / 300)], ids=str)
def test_string_form_round_trips(divergence):
    """str() and parse_divergence are inverse, to the last bit of a parameter."""
    assert dx.parse_divergence(str(divergence)) == divergence
    assert dx.parse_divergence(divergence) is divergence


@pytest.mark.parametrize(
    ("text", "divergence"),
    [("jensen_shannon", dx.JensenShannon(0.5)), ("alpha:2", dx.Alpha(2.0)), ("jeffreys:-2e-1", dx.Jeffreys(-0.2))],
)
def test_parsing(text, divergence):
    """Defaults may be left out; any spelling of a number will do."""
    assert dx.parse_divergence(text) == divergence


@pytest.mark.parametrize(
    ("text", "name", "expected", "given_"),
    [
        ("Jeffreys_-0.2", "divergence", "one of forward_kl, reverse_kl, jeffreys", "'Jeffreys_-0.2'"),
        ("", "divergence", "one of", "''"),
        ("jeffreys", "divergence", "the form 'jeffreys:beta'", "'jeffreys'"),
        ("forward_kl:1", "divergence", "the form 'forward_kl'", "'forward_kl:1'"),
        ("alpha:2:3", "divergence", "the form 'alpha:alpha'", "'alpha:2:3'"),
        ("alpha:x", "divergence", "a number after 'alpha'", "'alpha:x'"),
        ("jeffreys:nan", "beta", "a finite number", "nan"),
        ("jensen_shannon:1", "pi", "a number in (0, 1)", "1.0"),
        ("jensen_shannon:0", "pi", "a number in (0, 1)", "0.0"),
        ("alpha:0", "alpha", "other than 0 and 1", "0.0: use ReverseKL()"),
        ("alpha:1", "alpha", "other than 0 and 1", "1.0: use ForwardKL()"),
        ("alpha:inf", "alpha", "a finite number", "inf"),
        (dx.ForwardKL, "divergence", "a Divergence or its string", "type"),
        (None, "divergence", "a Divergence or its string", "NoneType"),
    ],
)
def test_bad_names_are_rejected(text, name, expected, given_):
    """An unknown name lists the valid ones; a bad parameter is named."""
    assert_rejected(lambda: dx.parse_divergence(text), name, expected, given_)


LOGITS = torch.zeros(2, 3, 4)
BAD_ARGUMENTS = [
    ("teacher_logits", [0.0], "tensor", "list"),
    ("teacher_logits", LOGITS.long(), "dtype float32, float16, bfloat16 or float64", "torch.int64"),
    ("teacher_logits", torch.zeros(2, 3, 0), "V >= 1", "[2, 3, 0]"),
    ("auxiliary_logits", LOGITS[..., :3], "shape [2, 3, 4]", "[2, 3, 3]"),
    ("auxiliary_logits", LOGITS.to(torch.complex64), "dtype", "torch.complex64"),
    ("auxiliary_logits", LOGITS.to(META), "a tensor on", "meta"),
    ("teacher_uncond_logits", LOGITS[:1], "shape [2, 3, 4]", "[1, 3, 4]"),
    ("teacher_uncond_logits", LOGITS.to(META), "a tensor on", "meta"),
    ("guidance_scale", 2.0, "1 without ", "2.0"),
    ("guidance_scale", nan, "1 without ", "nan"),
    ("teacher_temperature", 0.0, "finite number in (0, inf]", "0.0"),
    ("teacher_temperature", inf, "finite number", "inf"),
    ("auxiliary_temperature", -1, "finite number in (0, inf]", "-1"),
    ("auxiliary_temperature", nan, "finite number", "nan"),
    ("auxiliary_temperature", "1", "finite number", "str '1'"),
    ("auxiliary_temperature", True, "finite number", "bool True"),
    ("divergence", "kl", "one of forward_kl", "'kl'"),
    ("mask", torch.ones(2, 3), "dtype bool", "torch.float32"),
    ("mask", torch.ones(3, 2, dtype=torch.bool), "shape [2, 3]", "[3, 2]"),
    ("mask", torch.ones(2, 3, dtype=torch.bool, device=META), "a tensor on", "meta"),
    ("mask", [True], "bool tensor", "list"),
]


@pytest.mark.parametrize("operator", ["token_divergence", "distribution_matching_loss"])
@pytest.mark.parametrize(("name", "value", "expected", "given_"), BAD_ARGUMENTS)
def test_bad_arguments_are_rejected(device, operator, name, value, expected, given_):
    """The error names the argument, what was expected and what was given, before anything runs."""
    arguments = {"teacher_logits": LOGITS.to(device), "auxiliary_logits": LOGITS.to(device), "divergence": "le_cam"}
    if operator == "distribution_matching_loss":
        arguments["student_logits"] = LOGITS.to(device)
    arguments[name] = value
    assert_rejected(lambda: getattr(dx, operator)(**arguments), name, expected, given_)


@pytest.mark.parametrize(
    ("scale", "expected", "given_"),
    [
        (nan, "finite number", "nan"),
        ("2", "finite number", "str '2'"),
        (torch.ones(3), "shape [2]", "[3]"),
        (torch.ones(2, dtype=torch.int64), "dtype float32", "torch.int64"),
        (torch.ones(2, device=META), "a tensor on", "meta"),
    ],
)
def test_bad_guidance_scale_is_rejected(device, scale, expected, given_):
    """With unconditional logits the scale is a finite number or one a sample."""
    logits = LOGITS.to(device)

    def call():
        return dx.token_divergence(logits, logits, "le_cam", teacher_uncond_logits=logits, guidance_scale=scale)

    assert_rejected(call, "guidance_scale", expected, given_)


@pytest.mark.parametrize(
    ("name", "value", "expected", "given_"),
    [
        ("student_logits", LOGITS.int(), "dtype", "torch.int32"),
        ("student_logits", 1.0, "tensor", "float"),
        ("reduction", "average", "one of none, sum, mean, batchmean", "'average'"),
        ("reduction", None, "one of", "None"),
        ("weight", 2.0, "a tensor of shape [2] or [2, 3]", "2.0"),
        ("weight", torch.ones(3), "a tensor of shape [2] or [2, 3]", "[3]"),
        ("weight", torch.ones(2, 1), "a tensor of shape [2] or [2, 3]", "[2, 1]"),
        ("weight", torch.ones(2, dtype=torch.int64), "dtype float32", "torch.int64"),
        ("weight", torch.ones(2, device=META), "a tensor on", "meta"),
    ],
)
def test_bad_loss_arguments_are_rejected(device, name, value, expected, given_):
    """What only the loss takes is checked as well."""
    arguments = {"student_logits": LOGITS.to(device), "teacher_logits": LOGITS.to(device)}
    arguments |= {"auxiliary_logits": LOGITS.to(device), name: value}
    assert_rejected(lambda: dx.distribution_matching_loss(divergence="le_cam", **arguments), name, expected, given_)


def test_batchmean_needs_a_batch_and_a_sequence(device):
    """On [N, V] logits "batchmean" would divide by tokens, silently: it is refused."""
    logits = torch.zeros(6, 4, device=device)

    def call():
        return dx.distribution_matching_loss(logits, logits, logits, "le_cam")

    assert_rejected(call, "reduction", "another than 'batchmean'", "'batchmean'")
    assert dx.distribution_matching_loss(logits, logits, logits, "le_cam", reduction="mean") == 0


# --- options for filtered teachers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ["reverse_kl", "neyman_chi2", "alpha:-1", "jeffreys:0.5"])
def test_teacher_log_floor(device, divergence):
    """The floor makes an infinite divergence finite: log p is replaced by max(log p, floor) and nothing else."""
    teacher = torch.tensor([[1.0, 0.0, -inf, -inf]], dtype=torch.float64, device=device)
    auxiliary = torch.tensor([[0.5, 0.2, -1.0, -inf]], dtype=torch.float64, device=device, requires_grad=True)
    assert dx.token_divergence(teacher, auxiliary, divergence).item() == inf
    value = dx.token_divergence(teacher, auxiliary, divergence, teacher_log_floor=-5.0)
    (gradient,) = torch.autograd.grad(value.sum(), auxiliary)

    known = auxiliary.detach()[:, :3].requires_grad_()  # the last id is known to neither side
    log_p = torch.cat([teacher[:, :2].log_softmax(-1), torch.full_like(teacher[:, :1], -5.0)], -1)
    log_q = known.log_softmax(-1)
    q, u = log_q.exp(), (log_p - log_q).exp()
    f = {
        "reverse_kl": -u.log() + u - 1,
        "neyman_chi2": (1 - u) ** 2 / u,
        "alpha:-1": (1 / u + u - 2) / 2,
        "jeffreys:0.5": 0.5 * (u * u.log() - u + 1) + 0.5 * (u - 1 - u.log()),
    }[divergence]
    expected = (q * f).sum(-1)
    assert_close(value, expected, torch.float64)
    (want,) = torch.autograd.grad(expected.sum(), known)
    assert_close(gradient[:, :3], want, torch.float64)
    assert gradient[0, 3].item() == 0


def test_teacher_log_floor_leaves_probable_ids_alone(device):
    """A floor below every log p changes no bit."""
    teacher, auxiliary = pair(device)
    plain = dx.token_divergence(teacher, auxiliary, "reverse_kl")
    assert torch.equal(plain, dx.token_divergence(teacher, auxiliary, "reverse_kl", teacher_log_floor=-1e4))


@pytest.mark.parametrize("floor", [0.0, 1.0, -inf, float("nan"), "low"])
def test_bad_teacher_log_floor(device, floor):
    teacher, auxiliary = pair(device)
    with pytest.raises((ValueError, TypeError), match="teacher_log_floor"):
        dx.token_divergence(teacher, auxiliary, "reverse_kl", teacher_log_floor=floor)


def test_rows_of_zeroed_gradient_are_counted(device):
    """Counted are the rows whose gradient has no limit; not masked-out ones, not those without a finite logit."""
    teacher = torch.tensor([[1.0, -inf], [0.0, 1.0], [2.0, -inf], [-inf, -inf]], device=device)
    auxiliary = torch.zeros(4, 2, device=device, requires_grad=True)
    mask = torch.tensor([True, True, False, True], device=device)
    value, zeroed = dx.token_divergence(teacher, auxiliary, "reverse_kl", mask=mask, count_zeroed=True)
    assert value.tolist()[0] == inf
    assert zeroed.dtype == torch.int64
    assert zeroed.item() == 1
    student = torch.zeros(1, 4, 2, device=device, requires_grad=True)
    counted = dx.distribution_matching_loss(
        student, teacher[None], auxiliary[None], "reverse_kl", mask=mask[None], count_zeroed=True
    )
    assert counted.zeroed_rows.item() == 1
    counted.value.backward()
    assert student.grad[0, 0].tolist() == [0, 0]
    assert student.grad[0, 1].abs().sum() > 0


# --- what a diverged network or a narrower student meets --------------------------------------------------------------


def test_a_gradient_that_the_students_dtype_cannot_hold_is_zeroed_and_counted(device):
    """What is representable is judged in the dtype of the logits that receive the gradient."""
    teacher = torch.tensor([[[0.0, -30.0, 0.0]]], device=device)
    auxiliary = torch.tensor([[[0.0, -30.0, -14.0]]], device=device)
    gradients = {}
    for dtype in (torch.float16, torch.float32):
        student = torch.zeros(1, 1, 3, dtype=dtype, device=device, requires_grad=True)
        loss = dx.distribution_matching_loss(student, teacher, auxiliary, "pearson_chi2", count_zeroed=True)
        loss.value.backward()
        gradients[dtype] = (loss.zeroed_rows.item(), student.grad.abs().max().item())
    assert gradients[torch.float16] == (1, 0.0)
    zeroed, largest = gradients[torch.float32]
    assert zeroed == 0
    assert 1e5 < largest < inf


@every_divergence
@pytest.mark.parametrize("bad", [nan, inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_diverged_row_is_seen(device, divergence, bad, side):
    """NaN or +inf reaches the value and the count; the gradient stays 0, other rows are untouched."""
    logits = [z.detach().clone() for z in pair(device)]
    clean = dx.token_divergence(*logits, divergence)
    logits[side].view(-1, logits[side].shape[-1])[0, 1] = bad
    logits[1].requires_grad_()
    value, zeroed = dx.token_divergence(*logits, divergence, count_zeroed=True)
    assert value.flatten()[0].isnan()
    assert_close(value.flatten()[1:], clean.flatten()[1:])
    assert zeroed.item() == 1
    (gradient,) = torch.autograd.grad(value.flatten()[1:].sum() + value.flatten()[0], logits[1])
    assert gradient.view(-1, gradient.shape[-1])[0].abs().sum() == 0
