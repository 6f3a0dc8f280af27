"""Errors against float64 beside those of the plain PyTorch expression in float32: no larger, but for a tolerance."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dimo_ext as dx
from tests.calls import value_and_gradient, with_gradient
from tests.conftest import DTYPES, PROFILE, LogitsCase, assert_close, assert_gradient
from tests.oracles import DIVERGENCES, definition, oracle, oracle_gradient

TOLERANCE, NEAR = 1e-5, 5e-5  # where p and q differ by 0.01, rounding them costs a hundred times as much
VOCABULARIES = [33, 1025, 50257] if PROFILE == "full" else [8193]
every_vocab = pytest.mark.parametrize("vocab", VOCABULARIES)
every_dtype = pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float64], ids=str)


@torch.no_grad()
def assert_no_worse(actual: Tensor, baseline: Tensor, exact: Tensor, tolerance: float = TOLERANCE) -> None:
    """Relative L2 errors of whole tensors; NaN never passes."""
    ours, theirs = (float((x.double() - exact).norm() / exact.norm()) for x in (actual, baseline))
    assert ours <= theirs + tolerance, f"error {ours:.1e}, PyTorch's {theirs:.1e}"


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("pattern", ["normal", "near"])
@every_vocab
@every_dtype
def test_token_divergence(device, divergence, dtype, vocab, pattern):
    """Beside Σ q f(p/q) of two softmaxes and its autograd."""
    teacher, auxiliary = LogitsCase((4,), vocab, dtype, pattern=pattern).build(device)
    f, tolerance = definition(divergence)[0], NEAR if pattern == "near" else TOLERANCE

    def plain(z: Tensor) -> Tensor:
        p, q = teacher.float().softmax(-1), z.float().softmax(-1)
        return (q * f(p / q)).sum(-1)

    value, gradient = value_and_gradient(divergence, teacher, auxiliary)
    baseline = with_gradient(plain, auxiliary)
    assert_no_worse(value, baseline[0], oracle(divergence, teacher, auxiliary), tolerance)
    if pattern != "near" or divergence != dx.TotalVariation():  # whose gradient jumps where p = q
        assert_no_worse(gradient, baseline[1], oracle_gradient(divergence, teacher, auxiliary), tolerance)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@every_vocab
@every_dtype
def test_masked_cross_entropy(device, dtype, vocab, smoothing):
    (logits,) = LogitsCase((8,), vocab, dtype).build(device, 1)
    targets = torch.arange(8, device=device) * (vocab // 8)

    def plain(z: Tensor) -> Tensor:
        return F.cross_entropy(z, targets, label_smoothing=smoothing)

    value, gradient = with_gradient(lambda z: dx.masked_cross_entropy(z, targets, label_smoothing=smoothing), logits)
    baseline, exact = with_gradient(lambda z: plain(z.float()), logits), with_gradient(plain, logits.double())
    for ours, theirs, truth in zip((value, gradient), baseline, exact, strict=True):
        assert_no_worse(ours, theirs, truth)


@pytest.mark.parametrize("temperature", [0.01, 1.0, 7.0])
@every_vocab
@every_dtype
def test_log_prob_of_a_draw(device, dtype, vocab, temperature):
    (logits,) = LogitsCase((1, 64), vocab, dtype).build(device, 1)
    tokens, log_prob = dx.sample_categorical(logits, temperature=temperature, key=dx.random_key(1, device=device))
    baseline, exact = (
        (z / temperature).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        for z in (logits.float(), logits.double())
    )
    assert_no_worse(log_prob, baseline, exact)


@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
@pytest.mark.parametrize("name", ["divergence", "cross_entropy"])
def test_a_bfloat16_gradient_is_rounded_once(device, name, reduction):
    """Weight and count are applied before: hardly an element differs from float64's, rounded."""
    teacher, auxiliary, student = LogitsCase((3, 7), 257, torch.bfloat16).build(device, 3)
    weight = torch.linspace(0.1, 1.9, 21, device=device).view(3, 7)
    mask = torch.arange(21, device=device).view(3, 7) % 3 > 0
    divisor = {"sum": 1, "mean": 14, "batchmean": 3}[reduction]
    if name == "divergence":
        _, gradient = with_gradient(
            lambda z: dx.distribution_matching_loss(
                z, teacher, auxiliary, "reverse_kl", mask=mask, weight=weight, reduction=reduction
            ),
            student,
        )
        exact = oracle_gradient(dx.ReverseKL(), teacher, auxiliary) * (weight.double() / divisor * mask)[..., None]
    else:
        targets = teacher.argmax(-1)
        _, gradient = with_gradient(lambda z: dx.masked_cross_entropy(z, targets, mask, reduction=reduction), student)
        _, exact = with_gradient(lambda z: F.cross_entropy(z[mask], targets[mask], reduction="sum"), student.double())
        exact = exact / divisor
    differing = (gradient != exact.to(torch.bfloat16)).double().mean()
    assert differing < 0.01, f"{differing:.1%} of the elements"


@pytest.mark.parametrize("temperature", [1e-3, 0.03, 1.0])
@pytest.mark.parametrize("name", [*map(str, DIVERGENCES), "cross_entropy"])
def test_a_large_shift_costs_no_digits(device, name, temperature):
    """The row maximum is subtracted before anything is scaled, or 8192/0.001 would swallow every digit."""
    pair = LogitsCase((6,), 33).build(device)
    teacher, auxiliary = ((temperature * z * 1024.0).round() / 1024.0 for z in pair)  # exact beside 8192
    exact = [z.double() / temperature for z in (teacher, auxiliary)]
    teacher, auxiliary = teacher + 8192.0, auxiliary - 4096.0
    if name == "cross_entropy":
        targets = teacher.argmax(-1)
        value, gradient = with_gradient(lambda z: dx.masked_cross_entropy(z, targets, reduction="sum"), auxiliary)
        expected = with_gradient(lambda z: F.cross_entropy(z, targets, reduction="sum"), auxiliary.double())
    else:
        options = {"teacher_temperature": temperature, "auxiliary_temperature": temperature}
        value, gradient = value_and_gradient(name, teacher, auxiliary, **options)
        divergence = dx.parse_divergence(name)
        expected = oracle(divergence, *exact), oracle_gradient(divergence, *exact) / temperature
    assert_close(value, expected[0])
    assert_gradient(gradient, expected[1])
