"""Categorical draws, tested as distributions: frequencies against exact float64 probabilities at fixed keys.

Every statistical test would fail a correct sampler once in ``FALSE_ALARM``⁻¹ keys; the keys are fixed.
"""

from __future__ import annotations

import math
from math import inf, nan

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

import dimo_ext as dx
from tests import oracles
from tests.conftest import (
    DTYPES,
    LAYOUTS,
    LogitsCase,
    assert_close,
    assert_frequencies,
    assert_independent,
    assert_rate,
    cross,
    logits_cases,
)
from tests.oracles import filtered_probabilities, guided

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def draw(row: Tensor, n: int, seed: int = 1, **options) -> dx.CategoricalSample:
    """``n`` draws from one row."""
    key = dx.random_key(seed, device=row.device)
    return dx.sample_categorical(row.expand(1, n, -1), key=key, **options)


def assert_draws(row: Tensor, n: int, seed: int = 1, **options) -> None:
    """Frequencies and log-probabilities agree with the oracle; ids of probability 0 never appear."""
    tokens, log_prob = draw(row, n, seed, **options)
    p = filtered_probabilities(row.cpu(), **options)
    assert tokens.dtype == torch.int64
    assert log_prob.dtype == torch.float32
    assert_frequencies(torch.bincount(tokens.flatten().cpu(), minlength=len(p)), p)
    assert_close(log_prob.cpu(), p.log()[tokens.cpu()])


# --- laws -----------------------------------------------------------------------------------------------------------

FILTERS = {
    "plain": {},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "all": {"top_k": 40, "top_p": 0.9, "min_p": 0.02},
}


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("vocab", [1, 2, 17, 255, 256, 257, 1025])
def test_frequencies(device, vocab, temperature, filters):
    """χ² over every vocabulary around a chunk's borders, temperature and filter."""
    options = {k: min(v, vocab) if k == "top_k" else v for k, v in FILTERS[filters].items()}
    row = 2.0 * torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)).to(device)
    assert_draws(row, 4_000 if vocab > 257 else 10_000, seed=vocab, temperature=temperature, **options)


@every_dtype
def test_frequencies_in_every_dtype(device, dtype):
    """The distribution is that of the rounded logits."""
    (row,) = LogitsCase((), 300, dtype, "sliced").build(device, 1)
    assert_draws(row, 10_000, temperature=0.7)


@pytest.mark.parametrize("seed", range(3))
def test_uniform_rows(device, seed):
    """All ids alike, the last chunk being the smaller: no position is favoured."""
    assert_draws(torch.zeros(600, device=device), 30_000, seed=seed)


def test_tail_ids_come_at_their_rate(device):
    """Ids of probability 1e-4, 1e-5 and 1e-6 beside a dominant one, in two chunks: neither starved nor inflated."""
    rates = {1e-4: range(30, 300, 30), 1e-5: range(1, 300, 6), 1e-6: range(2, 300, 3)}
    p = torch.zeros(300, dtype=torch.float64)
    for rate, ids in rates.items():
        p[list(ids)] = rate
    p[[0, 297]] = (1 - p.sum()) / 2
    row, batches, n = p.log().float().to(device), 4, 50_000
    counts = sum(torch.bincount(draw(row, n, seed).tokens[0], minlength=300).cpu() for seed in range(batches))
    for rate, ids in rates.items():
        assert_rate(int(counts[list(ids)].sum()), batches * n, rate * len(ids))


def test_the_tail_inside_one_chunk_far_below_its_head(device):
    """A vocabulary of one chunk, where the fixed point of the second step alone decides."""
    p = torch.tensor([1 - 3e-4 - 5e-5, 3e-4, 5e-5], dtype=torch.float64)
    counts = torch.bincount(draw(p.log().to(device), 400_000).tokens[0], minlength=3)
    for i, probability in enumerate(p.tolist()):
        assert_rate(int(counts[i]), 400_000, probability)


def test_the_largest_temperature_flattens(device):
    """At 1e3 the ids are drawn almost uniformly, as the oracle says."""
    assert_draws(torch.linspace(-300.0, 300.0, 17, device=device), 10_000, temperature=1e3)
    assert math.isclose(float(filtered_probabilities(torch.tensor([0.0, 0.0]), 1e3)[0]), 0.5)


# --- filtered and impossible ids ------------------------------------------------------------------------------------


@given(
    case=logits_cases(patterns=["normal", "minus_inf", "padded", "one_finite", "extreme"], max_vocab=257),
    temperature=st.sampled_from([0.0, 1e-3, 0.5, 1.0, 1e3]),
    scale=st.sampled_from([1.0, -3.0, 20.0]),
    top_k=st.sampled_from([0, 1, 5]),
    top_p=st.sampled_from([1e-6, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.2, 1.0]),
    seed=st.integers(0, 2**32),
)
@example(case=LogitsCase((0,), 1), temperature=1.0, scale=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)
@example(case=LogitsCase((3, 0), 257), temperature=0.0, scale=1.0, top_k=1, top_p=0.5, min_p=0.2, seed=0)
@example(
    case=LogitsCase((2, 3), 257, pattern="minus_inf"),
    temperature=1.0,
    scale=-3.0,
    top_k=5,
    top_p=0.9,
    min_p=0.0,
    seed=0,
)
def test_impossible_ids_are_never_drawn(device, case, temperature, scale, top_k, top_p, min_p, seed):
    """For every shape, stride and dtype: a possible id with a finite log-probability, or -1 in a dead row."""
    cond, uncond = case.build(device)
    options = {"temperature": temperature, "top_k": min(top_k, case.vocab), "top_p": top_p, "min_p": min_p}
    tokens, log_prob = dx.sample_categorical(
        cond, uncond_logits=uncond, guidance_scale=scale, key=dx.random_key(seed, device=device), **options
    )
    logits = guided(cond, uncond, scale)
    dead = logits.amax(-1) == -inf
    assert tokens.shape == log_prob.shape == case.shape
    assert (tokens[dead] == -1).all()
    assert (log_prob[dead] == -inf).all()
    assert ((tokens[~dead] >= 0) & (tokens[~dead] < case.vocab)).all()
    chosen = logits.gather(-1, tokens.clamp(min=0)[..., None])[..., 0]
    assert (chosen[~dead] > -inf).all()
    assert ((log_prob[~dead] <= 0) & (log_prob[~dead] > -inf)).all()


@pytest.mark.parametrize("fill", [-inf, nan, inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("vocab", [1, 5, 300])
def test_unsampleable_rows_give_minus_one(device, fill, temperature, vocab):
    """-inf throughout, NaN or +inf somewhere: id -1, log_prob -inf; the neighbours are drawn as ever."""
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(0)).to(device)
    key = dx.random_key(1, device=device)
    clean = dx.sample_categorical(logits, temperature=temperature, key=key)
    logits[1] = -inf
    logits[1, -1] = fill
    tokens, log_prob = dx.sample_categorical(logits, temperature=temperature, key=key)
    assert tokens[1] == -1
    assert log_prob[1] == -inf
    assert torch.equal(tokens[::2], clean.tokens[::2])
    assert torch.equal(log_prob[::2], clean.log_prob[::2])


def kept(p: list[float], device, **options) -> set[int]:
    """The ids that 2,000 draws produce, after checking their log-probabilities against the oracle."""
    row = torch.tensor(p, dtype=torch.float64).log().to(device)
    assert_draws(row, 2_000, **options)
    return set(draw(row, 2_000, **options).tokens.flatten().tolist())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {0, 1, 2, 3}),
        ({"top_k": 3}, {0, 1, 2}),
        ({"top_p": 0.69}, {0, 1}),  # 0.4 + 0.3 reaches it
        ({"top_p": 0.39}, {0}),
        ({"top_p": 0.41}, {0, 1}),  # the id that crosses stays
        ({"min_p": 0.6}, {0, 1}),  # 0.24 is the threshold
        ({"min_p": 1.0}, {0}),
        ({"top_k": 2, "top_p": 0.5}, {0}),  # 4/7 after top-k reaches 0.5; 0.4 before it would not
        ({"top_p": 0.5, "min_p": 0.6}, {0, 1}),  # min-p first would leave 4/7 and drop id 1
        ({"top_k": 3, "temperature": 0.25, "top_p": 0.7}, {0}),  # tempered: 0.73, 0.23, 0.05
        ({"temperature": 4.0, "min_p": 0.6}, {0, 1, 2, 3}),  # tempered: the least is 0.71 of the largest
    ],
    ids=str,
)
def test_order_of_the_filters(device, options, expected):
    """Temperature, then top-k, then top-p on what is left renormalised, then min-p relative to the largest."""
    assert kept([0.4, 0.3, 0.2, 0.1], device, **options) == expected


@pytest.mark.parametrize(
    ("p", "options", "expected"),
    [
        ([0.4, 0.2, 0.2, 0.1, 0.1], {"top_k": 2}, {0, 1, 2}),
        ([0.2, 0.2, 0.2, 0.2, 0.2], {"top_k": 1}, {0, 1, 2, 3, 4}),
        ([0.4, 0.2, 0.2, 0.1, 0.1], {"top_p": 0.5}, {0, 1, 2}),
        ([0.2, 0.2, 0.2, 0.2, 0.2], {"top_p": 1e-9}, {0, 1, 2, 3, 4}),
        ([0.1, 0.4, 0.1, 0.4], {"min_p": 1.0}, {1, 3}),
    ],
    ids=str,
)
def test_ties_at_a_threshold_stay(device, p, options, expected):
    """Equal ids share one fate."""
    assert kept(p, device, **options) == expected


@given(
    vocab=st.sampled_from([1, 3, 17, 256, 257]),
    temperature=st.sampled_from([0.2, 1.0, 5.0]),
    top_k=st.sampled_from([0, 1, 3, 100]),
    top_p=st.sampled_from([0.05, 0.6, 1.0]),
    min_p=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 2**16),
)
def test_log_prob_is_under_the_filtered_distribution(device, vocab, temperature, top_k, top_p, min_p, seed):
    """Every combination of filters against the oracle, one row at a time, and torch's own Categorical."""
    (logits,) = LogitsCase((4,), vocab, torch.float32, seed=seed).build(device, 1)
    options = {"temperature": temperature, "top_k": min(top_k, vocab), "top_p": top_p, "min_p": min_p}
    p = torch.stack([filtered_probabilities(row, **options) for row in logits.cpu()])
    positive = p.masked_fill(p == 0, 1.0)
    assume((positive / positive.amin(-1, keepdim=True)).isfinite().all())
    tokens, log_prob = dx.sample_categorical(logits, key=dx.random_key(seed, device=device), **options)
    tokens = tokens.cpu()
    assert_close(log_prob, p.gather(-1, tokens[:, None])[:, 0].log())
    assert_close(log_prob, torch.distributions.Categorical(probs=p).log_prob(tokens))


VOCABULARIES = [1, 2, 31, 255, 256, 257, 1025]
LOGITS = ["normal", "near", "constant", "minus_inf", "padded"]


@pytest.mark.parametrize(
    ("vocab", "dtype", "layout", "pattern", "filters", "scale", "own_keys"),
    cross(VOCABULARIES, DTYPES, LAYOUTS, LOGITS, FILTERS, [1.0, 2.0], [False, True]),
    ids=str,
)
def test_every_combination(device, vocab, dtype, layout, pattern, filters, scale, own_keys):
    """The very ids that the written algorithm draws from the written distribution, and their log-probabilities.

    A row's words are those of its position in the flattened batch, with a key a sample of its position in the sample.
    """
    logits, uncond = LogitsCase((3, 4), vocab, dtype, layout, pattern).build(device)
    options = {k: min(v, vocab) if k == "top_k" else v for k, v in FILTERS[filters].items()} | {"temperature": 0.7}
    seeds = [7, 2**64 - 1, 0] if own_keys else -3
    key = dx.random_key(seeds, 2**33 + 1, device=device)
    tokens, log_prob = dx.sample_categorical(logits, uncond_logits=uncond, guidance_scale=scale, key=key, **options)
    mixed = guided(logits, uncond, scale).cpu()
    dead = mixed.amax(-1) == -inf
    rows = mixed.masked_fill(dead[..., None], 0.0).flatten(0, 1)
    p = torch.stack([filtered_probabilities(row, **options) for row in rows])
    samples = zip(p.log().split(4), seeds, strict=True) if own_keys else [(p.log(), seeds)]
    expected = torch.cat([oracles.draws(rows, seed, 2**33 + 1) for rows, seed in samples])
    assert torch.equal(tokens.cpu(), expected.view(3, 4).masked_fill(dead, -1))
    assert_close(log_prob, p.log().gather(-1, expected[:, None]).view(3, 4).masked_fill(dead, -inf))


@pytest.mark.parametrize("vocab", [31, 1025])
def test_many_draws(device, vocab):
    """4,000 ids are those that numpy draws in float64; rounding may change one where two are equally good."""
    (logits,) = LogitsCase((1, 4_000), vocab).build(device, 1)
    tokens = dx.sample_categorical(logits, key=dx.random_key(6, device=device)).tokens
    expected = oracles.draws(logits[0].double().log_softmax(-1), 6, 0)
    assert (tokens[0].cpu() != expected).sum() <= 1


@pytest.mark.parametrize("temperature", [1e-3, 0.03, 1.0])
@pytest.mark.parametrize("filters", FILTERS)
def test_a_large_shift_changes_no_draw(device, filters, temperature):
    """The row maximum is subtracted before the temperature divides, or 8192/0.001 would swallow every digit."""
    logits = (8.0 * LogitsCase((2, 50), 300).build(device, 1)[0]).round() / 64.0  # exact next to 8192
    key = dx.random_key(5, device=device)
    options = FILTERS[filters] | {"temperature": temperature, "key": key}
    plain, shifted = (dx.sample_categorical(z, **options) for z in (logits, logits + 8192.0))
    assert torch.equal(plain.tokens, shifted.tokens)
    assert torch.equal(plain.log_prob, shifted.log_prob)


# --- greedy ---------------------------------------------------------------------------------------------------------


@given(case=logits_cases(max_vocab=257))
@example(case=LogitsCase((5,), 257, pattern="constant"))
@example(case=LogitsCase((5,), 9, torch.bfloat16, pattern="extreme"))
def test_greedy_takes_the_lowest_of_the_largest(device, case):
    """At temperature 0: the argmax, the first of equals, log_prob 0."""
    (logits,) = case.build(device, 1)
    tokens, log_prob = dx.sample_categorical(logits, temperature=0.0, key=dx.random_key(0, device=device))
    largest = logits == logits.amax(-1, keepdim=True)
    first = torch.where(largest, torch.arange(case.vocab, device=device), case.vocab).amin(-1)
    dead = logits.amax(-1) == -inf
    assert torch.equal(tokens, torch.where(dead, -1, first))
    assert torch.equal(log_prob, torch.where(dead, -inf, 0.0))


def test_low_temperature_approaches_greedy(device):
    """At 1e-3 distinct logits leave one candidate, without overflow."""
    (logits,) = LogitsCase((50,), 33, pattern="normal").build(device, 1)
    key = dx.random_key(2, device=device)
    cold, greedy = (dx.sample_categorical(1e4 * logits, temperature=t, key=key) for t in (1e-3, 0.0))
    assert torch.equal(cold.tokens, greedy.tokens)
    assert_close(cold.log_prob, torch.zeros(50))


# --- guidance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_guidance_frequencies(device, scale):
    """Guidance first, uncond + s·(cond - uncond), then temperature."""
    cond, uncond = LogitsCase((), 19).build(device)
    mixed = (uncond + scale * (cond - uncond)) / 1.5
    options = {"uncond_logits": uncond.expand(1, 10_000, -1), "guidance_scale": scale, "temperature": 1.5}
    tokens, log_prob = draw(cond, 10_000, **options)
    p = mixed.double().softmax(-1).cpu()
    assert_frequencies(torch.bincount(tokens.flatten(), minlength=19), p)
    assert_close(log_prob.cpu(), p.log()[tokens.cpu()])


@every_dtype
def test_guidance_a_sample(device, dtype):
    """A [B] scale draws as the same floats would, sample by sample; 1 ignores even NaN."""
    cond, uncond = LogitsCase((3, 5), 33, dtype).build(device)
    keys, scales = dx.random_key([1, 2, 3], device=device), [0.5, 1.0, 2.0]
    uncond[1] = nan
    together = dx.sample_categorical(
        cond, uncond_logits=uncond, guidance_scale=torch.tensor(scales, device=device), key=keys
    )
    for i, s in enumerate(scales):
        one = slice(i, i + 1)
        alone = dx.sample_categorical(cond[one], uncond_logits=uncond[one], guidance_scale=s, key=keys[one])
        assert torch.equal(together.tokens[one], alone.tokens)
        assert torch.equal(together.log_prob[one], alone.log_prob)
    plain = dx.sample_categorical(cond[1:2], key=keys[1:2])
    assert torch.equal(plain.tokens, together.tokens[1:2])


@pytest.mark.parametrize("scale", [-1.0, 0.0, 2.0])
def test_guidance_keeps_filtered_ids_filtered(device, scale):
    """-inf on either side is -inf in the mix: never drawn, never NaN."""
    cond, uncond = LogitsCase((200, 3), 9, pattern="minus_inf").build(device)
    tokens, log_prob = dx.sample_categorical(
        cond, uncond_logits=uncond, guidance_scale=scale, key=dx.random_key(3, device=device)
    )
    possible = (cond > -inf) & (uncond > -inf)
    dead = ~possible.any(-1)
    assert dead.any()
    assert torch.equal(tokens == -1, dead)
    assert possible.gather(-1, tokens.clamp(min=0)[..., None])[..., 0][~dead].all()
    assert not log_prob.isnan().any()


# --- keys -----------------------------------------------------------------------------------------------------------


def test_draws_are_a_function_of_the_key_alone(device):
    """The same key, the same ids; another seed, offset or row, independent ones."""
    row = torch.randn(4, generator=torch.Generator().manual_seed(0)).to(device)

    def ids(seed, offset=0):
        key = dx.random_key(seed, offset, device=device)
        return dx.sample_categorical(row.expand(2, 20_000, -1), key=key).tokens

    base = ids(1)
    assert torch.equal(base, ids(1))
    for other in (ids(2)[0], ids(1, 1)[0], ids(1 + 2**32)[0], base[1], base[0].roll(1)):
        assert_independent(base[0], other, 4)


def test_both_steps_of_a_draw_are_independent(device):
    """The chunk and the place inside it come from different words."""
    tokens = draw(torch.zeros(1024, device=device), 20_000).tokens.flatten()
    assert_independent(tokens // 256, tokens % 256 // 64, 4)


@pytest.mark.parametrize("vocab", [7, 300])
@every_dtype
def test_keys_a_sample_make_samples_independent_of_the_batch(device, dtype, vocab):
    """[B, 2] keys: any split of the batch gives the same draws."""
    (logits,) = LogitsCase((5, 4), vocab, dtype).build(device, 1)
    keys = dx.random_key([3, 1, 4, 1, 5], device=device)
    whole = dx.sample_categorical(logits, key=keys, top_p=0.9)
    for split in (1, 2, 3):
        parts = [dx.sample_categorical(z, key=k, top_p=0.9)
                 for z, k in zip(logits.split(split), keys.split(split), strict=True)]  # fmt: skip
        assert torch.equal(torch.cat([p.tokens for p in parts]), whole.tokens)
        assert torch.equal(torch.cat([p.log_prob for p in parts]), whole.log_prob)


def test_no_gradient(device):
    """Neither output asks for one."""
    logits = torch.randn(2, 3, 5, device=device, requires_grad=True)
    tokens, log_prob = dx.sample_categorical(logits, key=dx.random_key(0, device=device))
    assert not tokens.requires_grad
    assert not log_prob.requires_grad
