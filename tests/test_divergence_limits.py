"""Token divergences where p or q vanishes, logits are extreme, or a network has diverged."""

from __future__ import annotations

import math
from math import inf, nan

import pytest
import torch
from hypothesis import example, given

import dimo_ext as dx
from tests.calls import pair, value_and_gradient
from tests.conftest import DTYPES, LAYOUTS, LogitsCase, assert_close, assert_gradient, cross, logits_cases
from tests.oracles import CONVEX, DIVERGENCES, guided, limit_gradient, oracle, oracle_with_floor, representable

every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


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
@pytest.mark.parametrize("scale", [1.0, -3.0, 20.0])
def test_extreme_logits_never_give_nan(device, divergence, dtype, temperature, scale):
    """Finite logits up to ±1e4, guided or not, give no NaN, a finite gradient, and a value that is +inf at worst."""
    teacher, auxiliary, uncond = LogitsCase((40,), 9, dtype, pattern="extreme").build(device, 3)
    options = {"teacher_temperature": temperature, "auxiliary_temperature": temperature}
    options |= {"teacher_uncond_logits": uncond, "guidance_scale": scale}
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


# --- a floor under a filtered teacher -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("divergence", "dtype", "layout", "floor", "filtered", "scale", "temperature"),
    cross(
        DIVERGENCES, DTYPES, LAYOUTS, [-2.0, -20.0], ["teacher", "uncond", "both sides", "none"], [1.0, 2.0], [0.7, 1.0]
    ),
    ids=str,
)
def test_teacher_log_floor(device, divergence, dtype, layout, floor, filtered, scale, temperature):
    """Log p is replaced by max(log p, floor) and nothing else; ids that neither side knows stay out."""
    teacher, auxiliary, uncond = LogitsCase((2, 3), 17, dtype, layout).build(device, 3)
    some = torch.arange(17, device=device) % 3 == 0
    for name, z in (("teacher", teacher), ("uncond", uncond), ("both sides", auxiliary)):
        if filtered in (name, "both sides"):
            z.masked_fill_(some, -inf)
    mask = torch.tensor([[True, False, True]] * 2, device=device)
    value, gradient = value_and_gradient(
        divergence, teacher, auxiliary, teacher_uncond_logits=uncond, guidance_scale=scale, mask=mask,
        teacher_log_floor=floor, auxiliary_temperature=temperature,
    )  # fmt: skip
    z_q = (auxiliary.double() / temperature).requires_grad_()
    expected = oracle_with_floor(divergence, guided(teacher, uncond, scale), z_q, floor).where(mask, 0.0)
    (pull,) = torch.autograd.grad(expected.sum() / temperature, z_q)
    assert_close(value, expected, dtype)
    assert_gradient(gradient, representable(pull, dtype))


@pytest.mark.parametrize("divergence", ["reverse_kl", "neyman_chi2", "alpha:-1", "jeffreys:0.5"])
@every_dtype
def test_a_floor_makes_an_infinite_divergence_finite(device, divergence, dtype):
    """Two ids known, one filtered: the closed form."""
    teacher, auxiliary = (torch.tensor(z, dtype=dtype, device=device) for z in ([0.0, 0.0, -inf], [0.0, 0.0, 0.0]))
    assert dx.token_divergence(teacher, auxiliary, divergence).item() == inf
    u, v = 1.5, 3 * math.exp(-5.0)  # p/q of the known ids and of the filtered one
    f = {
        "reverse_kl": lambda u: u - 1 - math.log(u),
        "neyman_chi2": lambda u: (1 - u) ** 2 / u,
        "alpha:-1": lambda u: (1 / u + u - 2) / 2,
        "jeffreys:0.5": lambda u: 0.5 * (u - 1) * math.log(u),
    }[divergence]
    value = dx.token_divergence(teacher, auxiliary, divergence, teacher_log_floor=-5.0)
    assert_close(value, (2 * f(u) + f(v)) / 3, dtype)


def test_teacher_log_floor_leaves_probable_ids_alone(device):
    """A floor below every log p changes no bit."""
    teacher, auxiliary = pair(device)
    plain = dx.token_divergence(teacher, auxiliary, "reverse_kl")
    assert torch.equal(plain, dx.token_divergence(teacher, auxiliary, "reverse_kl", teacher_log_floor=-1e4))


# --- a diverged network ---------------------------------------------------------------------------------------------


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
