"""Token divergences against their float64 definition Σ q f(p/q): values, gradients, options."""

from __future__ import annotations

import math
from math import inf, nan

import pytest
import scipy.spatial.distance
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given
from hypothesis import strategies as st

import dimo_ext as dx
from tests.calls import pair, value_and_gradient
from tests.conftest import (
    DTYPES,
    LAYOUTS,
    PATTERNS,
    LogitsCase,
    assert_close,
    assert_gradient,
    computed_gradients,
    cross,
    logits_cases,
)
from tests.oracles import (
    CONVEX,
    DIVERGENCES,
    cancelling_terms,
    guided,
    limit_gradient,
    oracle,
    oracle_gradient,
    representable,
)

every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
temperatures = st.sampled_from([0.5, 0.9, 1.0, 2.0, 1e3])

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
    terms = cancelling_terms(divergence, z_p, z_q) / tau_q
    assert_gradient(gradient, representable(expected, case.dtype), near=near, terms=terms)


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


MASKS = ["none", "some rows", "every row"]


@pytest.mark.parametrize(
    ("divergence", "dtype", "layout", "pattern", "masked", "scale"),
    cross(DIVERGENCES, DTYPES, LAYOUTS, PATTERNS, MASKS, [1.0, 2.0]),
    ids=str,
)
def test_every_combination(device, divergence, dtype, layout, pattern, masked, scale):
    """Guidance, masked-out rows, -inf and strides together; where float64 itself underflows, no NaN at least."""
    teacher, auxiliary, uncond = LogitsCase((2, 2, 3), 13, dtype, layout, pattern).build(device, 3)
    mask = None if masked == "none" else torch.zeros(2, 2, 3, dtype=torch.bool, device=device)
    if masked == "some rows":
        mask[:, 1] = True
    value, gradient = value_and_gradient(
        divergence, teacher, auxiliary, teacher_uncond_logits=uncond, guidance_scale=scale, mask=mask
    )
    mixed = guided(teacher, uncond, scale)
    expected, pull = oracle(divergence, mixed, auxiliary), limit_gradient(divergence, mixed, auxiliary)
    if mask is not None:
        expected, pull = expected.where(mask, 0.0), pull.where(mask[..., None], 0.0)
    if pattern == "extreme":
        assert not value.isnan().any()
        assert gradient.isfinite().all()
        return
    assert_close(value, expected, dtype)
    if pattern != "near" or divergence != dx.TotalVariation():  # whose gradient jumps where p = q
        assert_gradient(gradient, representable(pull, dtype), near=pattern == "near")


@every_divergence
@pytest.mark.parametrize("difference", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nearly_equal_distributions_keep_their_digits(device, divergence, dtype, difference):
    """Where logits differ by little, so that D is down to 1e-9, the value's relative error stays small."""
    (teacher,) = LogitsCase((20,), 257, torch.float64).build(device, 1)
    noise = torch.randn(20, 257, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
    teacher, auxiliary = teacher.to(dtype), (teacher + difference * noise).to(dtype)
    value, gradient = value_and_gradient(divergence, teacher, auxiliary)
    expected = oracle(divergence, teacher, auxiliary)
    assert expected.abs().max() < difference
    limit = 1e-6 if dtype == torch.float64 else min(1e-3, 3e-7 / difference)  # the oracle itself loses digits
    assert ((value.double() - expected).abs() <= limit * expected.abs()).all()
    if divergence in CONVEX:
        assert (value >= 0).all()
    if difference == 1e-2 and divergence != dx.TotalVariation():
        assert_gradient(gradient, oracle_gradient(divergence, teacher, auxiliary), near=True)


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


def test_agrees_with_scipy_and_torch(device):
    """KL, Jensen-Shannon and the α-family equal others', which share no code with ours."""
    teacher, auxiliary = pair(device)
    p, q = (z.softmax(-1).cpu().numpy() for z in (teacher, auxiliary))
    forward = torch.from_numpy(scipy.special.rel_entr(p, q).sum(-1))
    shannon = torch.from_numpy(scipy.spatial.distance.jensenshannon(p, q, axis=-1) ** 2)
    assert_close(dx.token_divergence(teacher, auxiliary, "forward_kl"), forward, torch.float64)
    assert_close(dx.token_divergence(teacher, auxiliary, "jensen_shannon:0.5"), shannon, torch.float64)
    for alpha in (-1.0, 0.0, 0.5, 1.0, 2.0, 3.0):  # Cressie and Read's family, with λ = α - 1
        powers = scipy.stats.power_divergence(p, q, axis=-1, lambda_=alpha - 1.0).statistic / 2.0
        same = {0.0: dx.ReverseKL(), 1.0: dx.ForwardKL()}.get(alpha) or dx.Alpha(alpha)
        assert_close(dx.token_divergence(teacher, auxiliary, same), torch.from_numpy(powers), torch.float64)
    categoricals = [torch.distributions.Categorical(logits=z) for z in (teacher, auxiliary)]
    forward = torch.distributions.kl_divergence(*categoricals)
    assert_close(dx.token_divergence(teacher, auxiliary, "forward_kl"), forward, torch.float64)


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


# --- temperature, guidance, dtypes, autograd ------------------------------------------------------------------------


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


def test_autocast_changes_nothing(device):
    """Under autocast the loss is computed from the logits it is given."""
    teacher, auxiliary = pair(device, dtype=torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        value = dx.token_divergence(teacher, auxiliary, "pearson_chi2")
    assert torch.equal(value, dx.token_divergence(teacher, auxiliary, "pearson_chi2"))
