"""Embedding noise: its law, its arithmetic and its gradient."""

from __future__ import annotations

import math
from math import inf, nan

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import dimo_ext as dx
from tests import oracles
from tests.conftest import (
    BAD_KEYS,
    DTYPES,
    FALSE_ALARM,
    META,
    TOLERANCES,
    assert_close,
    assert_rejected,
)

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def noise_of(shape: tuple[int, ...], key: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """ε itself: σ = 1 leaves nothing of the embeddings."""
    return dx.perturb_embeddings(torch.full(shape, 1e3, dtype=dtype, device=key.device), 1.0, key=key)


def test_noise_is_standard_normal(device):
    """Kolmogorov-Smirnov, the first four moments and the tails of 256,000 numbers."""
    noise = noise_of((10, 100, 256), dx.random_key(1, device=device)).cpu().flatten().numpy()
    n = noise.size
    bound = scipy.stats.norm.isf(FALSE_ALARM / 2)
    assert scipy.stats.kstest(noise, "norm").pvalue > FALSE_ALARM
    assert abs(noise.mean()) < bound / math.sqrt(n)
    assert abs(noise.var() - 1) < bound * math.sqrt(2 / n)
    assert abs(scipy.stats.skew(noise)) < bound * math.sqrt(6 / n)
    assert abs(scipy.stats.kurtosis(noise)) < bound * math.sqrt(24 / n)
    for level in (3.0, 4.0):
        tail = int((np.abs(noise) > level).sum())
        assert scipy.stats.binomtest(tail, n, 2 * scipy.stats.norm.sf(level)).pvalue > FALSE_ALARM
    assert np.abs(noise).max() < 6.8  # sqrt(66 log 2): the largest that a 32-bit uniform gives


def test_noise_is_uncorrelated(device):
    """Neighbours in a row (both halves of one Box-Muller pair), rows, samples, keys and their squares."""
    noise = noise_of((8, 64, 64), dx.random_key(2, device=device)).cpu()
    other = noise_of((8, 64, 64), dx.random_key(3, device=device)).cpu()
    bound = scipy.stats.norm.isf(FALSE_ALARM / 2)
    pairs = [(noise[..., 1:], noise[..., :-1]), (noise[:, 1:], noise[:, :-1]), (noise[1:], noise[:-1]), (noise, other)]
    for a, b in pairs:
        for x, y in ((a, b), (a**2, b**2)):
            correlation = np.corrcoef(x.flatten().numpy(), y.flatten().numpy())[0, 1]
            assert abs(correlation) < bound / math.sqrt(x.numel())


@pytest.mark.parametrize("width", [1, 2, 7, 256])
@pytest.mark.parametrize("own_keys", [False, True])
@every_dtype
def test_noise_is_that_of_the_contract(device, dtype, own_keys, width):
    """Box-Muller on the words of a row, counted over the batch, or within the sample where it has a key of its own."""
    seeds = [5, 2**64 - 1] if own_keys else -7
    noise = noise_of((2, 3, width), dx.random_key(seeds, 2**33 + 1, device=device), dtype)
    rows = [(seed, 3) for seed in seeds] if own_keys else [(seeds, 6)]
    expected = torch.cat([oracles.noise(width, n, seed, 2**33 + 1) for seed, n in rows]).view(2, 3, width)
    assert (noise.cpu().double() - expected).abs().max() <= 7 * TOLERANCES[dtype].rounding + 1e-12


@given(
    shape=st.sampled_from([(1, 1), (2, 1), (3, 5), (2, 3, 7), (2, 0, 4), (0, 3), (2, 2, 2, 9), (1, 257)]),
    dtype=st.sampled_from(DTYPES),
    sigma=st.sampled_from([1e-6, 0.1, 0.6, 1.0]),
    scale=st.sampled_from([0.0, 0.02, 1.0, 3.0]),
    as_tensor=st.booleans(),
)
@example(shape=(2, 3, 7), dtype=torch.bfloat16, sigma=0.1, scale=0.02, as_tensor=True)
def test_the_sum_is_variance_preserving(device, shape, dtype, sigma, scale, as_tensor):
    """σ·scale·ε + sqrt(1-σ²)·e, rounded once to the dtype, for every shape, odd widths included."""
    key = dx.random_key(4, device=device)
    embeddings = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device, dtype)
    given_scale = torch.tensor(scale, device=device) if as_tensor else scale
    result = dx.perturb_embeddings(embeddings, sigma, scale=given_scale, key=key)
    expected = sigma * np.float32(scale).item() * noise_of(shape, key) + math.sqrt(1 - sigma**2) * embeddings.double()
    assert result.dtype == dtype
    assert result.shape == embeddings.shape
    error = (result.double() - expected).abs()
    half = 2.0**-25 if dtype == torch.float16 else 0.0  # float16 rounds small numbers to a multiple of 2^-24
    assert (error <= 1.01 * TOLERANCES[dtype].rounding * expected.abs() + 2e-6 * max(scale, 1.0) * sigma + half
            + (1e-6 if dtype != torch.float64 else 1e-12)).all()  # fmt: skip


@every_dtype
def test_sigma_zero_changes_and_draws_nothing(device, dtype):
    """The embeddings come back bit for bit, and no generator moves."""
    embeddings = torch.randn(2, 3, 5, device=device).to(dtype)
    generator = torch.Generator(device).manual_seed(0)
    before = generator.get_state()
    assert torch.equal(dx.perturb_embeddings(embeddings, 0.0, generator=generator), embeddings)
    assert torch.equal(generator.get_state(), before)


def test_sigma_one_forgets_the_embeddings(device):
    """Pure noise: any two embeddings give the same."""
    key = dx.random_key(5, device=device)
    a, b = (dx.perturb_embeddings(torch.full((2, 3, 5), x, device=device), 1.0, key=key) for x in (-7.0, 2.0))
    assert torch.equal(a, b)
    assert a.std() > 0.5


@every_dtype
@pytest.mark.parametrize("sigma", [0.0, 0.1, 0.8, 1.0])
def test_gradient_is_a_constant_factor(device, dtype, sigma):
    """sqrt(1-σ²) × upstream, in the embeddings' dtype; the scale receives none."""
    embeddings = torch.randn(2, 3, 5, device=device).to(dtype).requires_grad_()
    upstream = torch.randn(2, 3, 5, device=device).to(dtype)
    scale = torch.tensor(0.5, device=device, requires_grad=True)
    result = dx.perturb_embeddings(embeddings, sigma, scale=scale, key=dx.random_key(6, device=device))
    result.backward(upstream)
    expected = math.sqrt(1 - sigma**2) * upstream.double()
    assert embeddings.grad.dtype == dtype
    assert (embeddings.grad.double() - expected).abs().max() <= 2 * TOLERANCES[dtype].rounding * expected.abs().max()
    assert scale.grad is None


def test_gradcheck_in_double():
    """Finite differences agree, and a second derivative exists (it is 0)."""
    key = dx.random_key(7)

    def call(e):
        return dx.perturb_embeddings(e, 0.6, key=key)

    embeddings = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, embeddings)
    assert torch.autograd.gradgradcheck(call, embeddings)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_strides_do_not_matter(device, layout):
    """The same numbers give the same noise, however they lie in memory."""
    dense = torch.randn(4, 6, 10, device=device)
    embeddings = {
        "transposed": dense.transpose(0, 1),
        "sliced": dense[:, 1:4, ::3],
        "expanded": dense[:1].expand(4, 6, 10),
    }[layout]
    key = dx.random_key(8, device=device)
    result = dx.perturb_embeddings(embeddings, 0.3, key=key)
    assert torch.equal(result, dx.perturb_embeddings(embeddings.contiguous(), 0.3, key=key))


@every_dtype
def test_keys_a_sample_make_samples_independent_of_the_batch(device, dtype):
    """[B, 2] keys: any split of the batch gives the same bits."""
    embeddings = torch.randn(5, 3, 7, device=device).to(dtype)
    keys = dx.random_key([3, 1, 4, 1, 5], device=device)
    whole = dx.perturb_embeddings(embeddings, 0.5, key=keys)
    for split in (1, 2, 3):
        parts = zip(embeddings.split(split), keys.split(split), strict=True)
        assert torch.equal(torch.cat([dx.perturb_embeddings(e, 0.5, key=k) for e, k in parts]), whole)
    noise = noise_of((5, 3, 7), keys)
    assert torch.equal(noise[1], noise[3])  # equal seeds
    assert not torch.equal(noise[0], noise[2])


def test_noise_is_a_function_of_the_key(device):
    """The same key, the same bits, whatever the dtype of the noise's sum; another seed or offset, others."""
    a, b, c, d = (noise_of((2, 3, 8), dx.random_key(*k, device=device)) for k in ((1, 0), (1, 0), (2, 0), (1, 1)))
    assert torch.equal(a, b)
    assert not torch.isclose(a, c).any()
    assert not torch.isclose(a, d).any()
    assert_close(noise_of((2, 3, 8), dx.random_key(1, device=device), torch.float32), a)


EMBEDDINGS = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("name", "value", "expected", "given_"),
    [
        ("embeddings", EMBEDDINGS.long(), "dtype float32", "torch.int64"),
        ("embeddings", torch.zeros(4), "shape [B, ..., D]", "[4]"),
        ("embeddings", 1.0, "tensor", "float"),
        ("sigma", 1.1, "[0, 1]", "1.1"),
        ("sigma", -0.1, "[0, 1]", "-0.1"),
        ("sigma", nan, "finite number", "nan"),
        ("sigma", "0.1", "finite number", "str '0.1'"),
        ("scale", -1.0, "[0, inf]", "-1.0"),
        ("scale", inf, "finite number", "inf"),
        ("scale", torch.ones(4), "shape []", "[4]"),
        ("scale", torch.tensor(1), "dtype float32", "torch.int64"),
        ("scale", torch.ones((), device=META), "a tensor on", "meta"),
        ("generator", 3, "a torch.Generator or None", "int 3"),
        *(("key", *bad) for bad in BAD_KEYS),
    ],
)
def test_bad_arguments_are_rejected(device, name, value, expected, given_):
    """The error names the argument, what was expected and what was given."""
    arguments = {"embeddings": EMBEDDINGS.to(device), "sigma": 0.5, name: value}
    assert_rejected(lambda: dx.perturb_embeddings(**arguments), name, expected, given_)


def test_key_and_generator_together_are_rejected(device):
    """Two sources of randomness are one too many."""

    def call():
        return dx.perturb_embeddings(
            EMBEDDINGS.to(device), 0.5, key=dx.random_key(0, device=device), generator=torch.Generator(device)
        )

    assert_rejected(call, "generator", "None when a key is given", "both")


# --- rows of a table ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6,), (3, 4), (2, 2, 3), (0, 4), (3, 0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_lookup_with_noise_is_both_after_one_another(device, dtype, shape):
    """The same bits, with one key and one a sample; ids outside the table are the first or the last."""
    wide = torch.randn(11, 19, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    tokens = torch.arange(torch.Size(shape).numel(), device=device).view(shape) - 1
    for table in (wide[:10], wide[:, 2:-1], wide.T):
        for seed in (3, list(range(shape[0])) or 3):
            key, last = dx.random_key(seed, device=device), len(table) - 1
            for sigma in (0.0, 0.4, 1.0):
                both = dx.embed_and_perturb(tokens, table, sigma, scale=0.5, key=key)
                rows = table[tokens.clamp(0, last)]
                assert torch.equal(both, dx.perturb_embeddings(rows, sigma, scale=0.5, key=key))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_a_table(device, dtype):
    """sqrt(1-σ²) × upstream, summed over the occurrences of each id."""
    table = torch.randn(9, 5, device=device).to(dtype).requires_grad_()
    tokens = torch.tensor([[1, 4, 1, -1], [8, 1, 20, 4]], device=device)
    upstream = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    dx.embed_and_perturb(tokens, table, 0.6, key=dx.random_key(0, device=device)).backward(upstream)
    expected = torch.zeros(9, 5, dtype=torch.float64, device=device)
    expected.index_add_(0, tokens.clamp(0, 8).flatten(), 0.8 * upstream.double().flatten(0, 1))
    assert table.grad.dtype == dtype
    tolerance = {torch.bfloat16: 4e-2, torch.float16: 4e-3}.get(dtype, 1e-6)
    torch.testing.assert_close(table.grad.double(), expected, rtol=tolerance, atol=tolerance)


def test_gradcheck_of_a_table():
    table = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    tokens, key = torch.tensor([[0, 2, 2], [3, 0, 2]]), dx.random_key(0)
    assert torch.autograd.gradcheck(lambda t: dx.embed_and_perturb(tokens, t, 0.6, key=key), table)


TOKENS, TABLE = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(4, 5)


@pytest.mark.parametrize(
    ("name", "value", "expected", "given_"),
    [
        ("tokens", [[0]], "int64 tensor [B, ...]", "list"),
        ("tokens", TOKENS.int(), "dtype int64", "torch.int32"),
        ("tokens", TOKENS[0, 0], "shape [B, ...]", "[]"),
        ("tokens", TOKENS.to(META), "a tensor on", "meta"),
        ("table", TABLE.long(), "dtype float32", "torch.int64"),
        ("table", TABLE[0], "shape [V, D]", "[5]"),
        ("table", TABLE[:0], "at least one row", "[0, 5]"),
        ("sigma", 1.1, "[0, 1]", "1.1"),
        ("scale", -1.0, "[0, inf]", "-1.0"),
        *(("key", *bad) for bad in BAD_KEYS),
    ],
)
def test_bad_arguments_of_a_lookup_are_rejected(device, name, value, expected, given_):
    arguments = {"tokens": TOKENS.to(device), "table": TABLE.to(device), "sigma": 0.5, name: value}
    assert_rejected(lambda: dx.embed_and_perturb(**arguments), name, expected, given_)
