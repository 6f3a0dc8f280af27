"""Parallel decoding: which positions are revealed, against the written definition, and how often."""

from __future__ import annotations

import itertools
from math import inf, nan

import numpy as np
import pytest
import torch
from torch import Tensor

import dimo_ext as dx
from tests import oracles
from tests.conftest import DTYPES, LAYOUTS, LogitsCase, assert_frequencies, assert_independent, assert_rate, cross

MASK = 9
VOCABULARIES = [1, 2, 17, 33, 34, 64, 65, 257, 1025, 4097]
FILTERS = {
    "plain": {},
    "cold": {"temperature": 0.7},
    "filtered": {"top_k": 40, "top_p": 0.9, "min_p": 0.02, "temperature": 1.3},
}


def options_of(filters: str, vocab: int) -> dict:
    return {k: min(v, vocab) if k == "top_k" else v for k, v in FILTERS[filters].items()}


def half_masked(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Tokens 0 to 8, about half of the positions masked, the last sample wholly."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(MASK, shape, generator=generator)
    tokens[torch.rand(shape, generator=generator) < 0.5] = MASK
    tokens[-1] = MASK
    return tokens.to(device)


def words_of(seeds: int | list[int], offset: int, batch: int, length: int) -> np.ndarray:
    """The words of every position, ``[B, L]``."""
    if isinstance(seeds, int):
        return np.stack([oracles.row_words(seeds, offset, row, length, oracles.REVEAL) for row in range(batch)])
    return np.stack([oracles.row_words(seed, offset, 0, length, oracles.REVEAL) for seed in seeds])


def most_confident(log_prob: Tensor, noise_scale: float, words: np.ndarray, masked: Tensor, counts: list) -> Tensor:
    """Where the most confident masked positions of each sample are, ``[B, L]``, one after the other."""
    chosen = torch.zeros(masked.shape, dtype=torch.bool)
    noise = -np.log(-np.log((words + 0.5) / 2.0**32))
    confidence = log_prob.double().cpu().numpy() + noise_scale * noise
    for sample, count in enumerate(counts):
        positions = masked[sample].nonzero()[:, 0].tolist()
        for i in sorted(positions, key=lambda i: (-confidence[sample, i], i))[:count]:
            chosen[sample, i] = True
    return chosen


# --- definition -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vocab", "dtype", "layout", "filters", "chance", "scale", "own_keys"),
    cross(VOCABULARIES, DTYPES, LAYOUTS, FILTERS, [0.0, 0.3, 1.0, "each"], [1.0, 2.0], [False, True]), ids=str,
)  # fmt: skip
def test_ancestral(device, vocab, dtype, layout, filters, chance, scale, own_keys):
    """The ids of sample_categorical, at the masked positions whose words say so."""
    logits, uncond = LogitsCase((3, 2, 5), vocab, dtype, layout).build(device)
    tokens, seeds = half_masked((3, 2, 5), device), [7, 2**64 - 1, 0] if own_keys else -3
    key = dx.random_key(seeds, 2**33 + 1, device=device)
    draw = {"uncond_logits": uncond, "guidance_scale": scale, "key": key} | options_of(filters, vocab)
    chances = [nan, 0.25, 1.5] if chance == "each" else [chance] * 3
    given = torch.tensor(chances, device=device) if chance == "each" else chance
    revealed = dx.reveal_ancestral(logits, tokens, given, MASK, **draw)
    below = torch.tensor([0.0, 0.25, 1.0] if chance == "each" else chances, dtype=torch.float64)[:, None] * 2.0**32
    chosen = torch.from_numpy(words_of(seeds, 2**33 + 1, 3, 10) + 0.5) < below
    chosen = chosen.view(3, 2, 5).to(device) & (tokens == MASK)
    assert torch.equal(revealed, torch.where(chosen, dx.sample_categorical(logits, **draw).tokens, tokens))
    assert revealed.is_contiguous()


@pytest.mark.parametrize(
    ("vocab", "dtype", "layout", "filters", "count", "noise", "scale", "own_keys"),
    cross(VOCABULARIES, DTYPES, LAYOUTS, FILTERS, [0, 1, 3, 100, "each"], [0.0, 0.5, 1e6], [1.0, 2.0], [False, True]),
    ids=str,
)
def test_confident(device, vocab, dtype, layout, filters, count, noise, scale, own_keys):
    """The ids of sample_categorical, at the masked positions of the largest log-probability plus noise."""
    logits, uncond = LogitsCase((3, 2, 5), vocab, dtype, layout).build(device)
    tokens, seeds = half_masked((3, 2, 5), device), [7, 2**64 - 1, 0] if own_keys else -3
    key = dx.random_key(seeds, 2**33 + 1, device=device)
    draw = {"uncond_logits": uncond, "guidance_scale": scale, "key": key} | options_of(filters, vocab)
    counts = [-2, 2, 9] if count == "each" else [count] * 3
    given = torch.tensor(counts, device=device) if count == "each" else count
    revealed = dx.reveal_confident(logits, tokens, given, MASK, noise_scale=noise, **draw)
    drawn, log_prob = dx.sample_categorical(logits, **draw)
    masked, words = (tokens == MASK).flatten(1).cpu(), words_of(seeds, 2**33 + 1, 3, 10)
    chosen = most_confident(log_prob.flatten(1), noise, words, masked, [max(n, 0) for n in counts]).view(3, 2, 5)
    assert torch.equal(revealed, torch.where(chosen.to(device), drawn, tokens))
    assert revealed.is_contiguous()


@pytest.mark.parametrize("noise", [0.0, 2.0])
def test_confident_in_every_small_case(device, noise):
    """Every set of masked positions among five, every count: exactly so many, the most confident of them."""
    sets = torch.tensor(list(itertools.product([0, MASK], repeat=5)), device=device)
    logits, key = LogitsCase((32, 5), 40).build(device, 1)[0], dx.random_key(5, device=device)
    drawn, log_prob = dx.sample_categorical(logits, key=key)
    masked, words = (sets == MASK).cpu(), words_of(5, 0, 32, 5)
    for count in range(7):
        revealed = dx.reveal_confident(logits, sets, count, MASK, noise_scale=noise, key=key)
        chosen = most_confident(log_prob, noise, words, masked, [count] * 32)
        assert torch.equal(revealed, torch.where(chosen.to(device), drawn, sets))
        assert torch.equal(chosen.sum(1), masked.sum(1).clamp(max=count))


@pytest.mark.parametrize("length", [1, 3, 4, 5, 127, 129, 4096, 4097, 9000])
def test_samples_of_any_length(device, length):
    """More tokens than a block has threads; counts of none, some, nearly all and all."""
    (logits,) = LogitsCase((2, length), 17, torch.bfloat16).build(device, 1)
    tokens, key = half_masked((2, length), device), dx.random_key([3, 4], device=device)
    drawn, log_prob = dx.sample_categorical(logits, key=key)
    words = words_of([3, 4], 0, 2, length)
    for count in {0, 1, length // 3, length - 1, length}:
        revealed = dx.reveal_confident(logits, tokens, count, MASK, noise_scale=1.0, key=key)
        chosen = most_confident(log_prob, 1.0, words, (tokens == MASK).cpu(), [count] * 2)
        assert torch.equal(revealed, torch.where(chosen.to(device), drawn, tokens))
    revealed = dx.reveal_ancestral(logits, tokens, 1.0, MASK, key=key)
    assert torch.equal(revealed, torch.where(tokens == MASK, drawn, tokens))


@pytest.mark.parametrize("length", [10, 300, 5000])
def test_equally_confident_positions_are_revealed_in_order(device, length):
    """Ids that are equally likely: the first masked positions; two levels of confidence: the higher one first."""
    tokens, key = half_masked((2, length), device), dx.random_key(3, device=device)
    logits = torch.zeros(2, length, 5, device=device)
    logits[:, 1::3, 2:] = -inf
    level = torch.zeros(length, dtype=torch.int64)
    level[1::3] = -1
    for count in {1, length // 4, length // 2}:
        revealed = dx.reveal_confident(logits, tokens, count, MASK, key=key)
        for sample in range(2):
            masked = (tokens[sample] == MASK).nonzero()[:, 0].tolist()
            expected = sorted(sorted(masked, key=lambda i: (level[i].item(), i))[:count])
            assert (revealed[sample] != tokens[sample]).nonzero()[:, 0].tolist() == expected


@pytest.mark.parametrize("poison", [nan, inf, -inf])
@pytest.mark.parametrize("vocab", [17, 40, 300, 4097])
def test_logits_of_other_positions_have_no_effect(device, vocab, poison):
    """Whatever stands there, guided and filtered or not."""
    cond, uncond = LogitsCase((2, 12), vocab).build(device)
    tokens, key = half_masked((2, 12), device), dx.random_key(1, device=device)
    for options in ({}, {"top_p": 0.9}, {"uncond_logits": uncond, "guidance_scale": 2.0}):
        calls = [
            lambda o=options: dx.reveal_ancestral(cond, tokens, 0.6, MASK, key=key, **o),
            lambda o=options: dx.reveal_confident(cond, tokens, 3, MASK, noise_scale=1.0, key=key, **o),
        ]
        clean = [call() for call in calls]
        for z in (cond, uncond):
            z[tokens != MASK] = poison
        assert all(map(torch.equal, clean, [call() for call in calls]))
        assert all((x[tokens != MASK] == tokens[tokens != MASK]).all() for x in clean)


@pytest.mark.parametrize("fill", [nan, inf, -inf])
def test_rows_without_a_draw_come_last_and_give_minus_one(device, fill):
    logits = torch.randn(1, 6, 40, generator=torch.Generator().manual_seed(0)).to(device)
    logits[0, 1] = -inf
    logits[0, 1, 3], logits[0, 4] = fill, -inf
    tokens, key = torch.full((1, 6), MASK, device=device), dx.random_key(0, device=device)
    tokens[0, 0] = 3
    (revealed,) = dx.reveal_confident(logits, tokens, 3, MASK, noise_scale=100.0, key=key)
    assert (revealed[[1, 4]] == MASK).all()
    assert ((revealed[[2, 3, 5]] >= 0) & (revealed[[2, 3, 5]] != MASK)).sum() >= 2  # 9 is an id here too
    assert dx.reveal_confident(logits, tokens, 4, MASK, key=key)[0, [1, 4]].tolist() == [-1, MASK]
    assert dx.reveal_ancestral(logits, tokens, 1.0, MASK, key=key)[0, [1, 4]].tolist() == [-1, -1]


def test_no_samples_and_no_positions(device):
    for shape in [(0, 4), (3, 0), (0, 0), (2, 0, 3)]:
        tokens, key = torch.zeros(shape, dtype=torch.int64, device=device), dx.random_key(0, device=device)
        logits = torch.zeros(*shape, 5, device=device)
        assert dx.reveal_ancestral(logits, tokens, 0.5, MASK, key=key).shape == shape
        assert dx.reveal_confident(logits, tokens, 2, MASK, key=key).shape == shape


def test_greedy_ancestral_reveals_the_argmax(device):
    (logits,) = LogitsCase((2, 8), 300).build(device, 1)
    tokens = torch.full((2, 8), -1, device=device)
    revealed = dx.reveal_ancestral(logits, tokens, 1.0, -1, temperature=0.0, key=dx.random_key(0, device=device))
    assert torch.equal(revealed, logits.argmax(-1))


# --- laws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probability", [1e-4, 0.3, 0.9])
def test_ancestral_reveals_at_its_rate(device, probability):
    """Every position on its own: the rate, and independence of neighbours, samples and what is drawn there."""
    tokens = torch.full((40, 5000), MASK, device=device)
    logits = torch.zeros(5, device=device).expand(40, 5000, 5)
    key = dx.random_key(2, device=device)
    revealed = dx.reveal_ancestral(logits, tokens, probability, MASK, key=key).cpu()
    shown = (revealed != MASK).long()
    assert_rate(int(shown.sum()), shown.numel(), probability)
    if probability == 0.3:
        assert_independent(shown[:, 1:], shown[:, :-1], 2)
        assert_independent(shown[1:], shown[:-1], 2)
        drawn = dx.sample_categorical(logits, key=key).tokens.cpu()
        assert_independent(shown, drawn // 3, 2)
        assert_frequencies(torch.bincount(revealed[shown == 1], minlength=5), torch.full((5,), 0.2))


def test_confident_sets_are_uniform_where_all_are_alike(device):
    """With noise, each of the ten pairs among five positions; the noise of one key a sample alike."""
    tokens = torch.full((20_000, 5), MASK, device=device)
    logits = torch.zeros(1, device=device).expand(20_000, 5, 1)
    for key in (dx.random_key(4, device=device), dx.random_key(range(20_000), device=device)):
        shown = (dx.reveal_confident(logits, tokens, 2, MASK, noise_scale=1.0, key=key) != MASK).cpu()
        sets = torch.bincount((shown * 2 ** torch.arange(5)).sum(1), minlength=32)
        pairs = [(1 << a) + (1 << b) for a, b in itertools.combinations(range(5), 2)]
        assert sets[pairs].sum() == 20_000
        assert_frequencies(sets[pairs], torch.full((10,), 0.1))


@pytest.mark.parametrize("noise", [0.5, 1.0, 3.0])
def test_confident_choices_follow_the_gumbel_law(device, noise):
    """One of three positions of certain log-probabilities: chosen with probability ∝ exp(log-probability / noise)."""
    logits = torch.full((30_000, 3, 8), -inf, device=device)
    for position, ids in enumerate([1, 2, 8]):
        logits[:, position, :ids] = 0.0
    tokens = torch.full((30_000, 3), MASK, device=device)
    key = dx.random_key(6, device=device)
    shown = dx.reveal_confident(logits, tokens, 1, MASK, noise_scale=noise, key=key) != MASK
    p = (torch.tensor([1.0, 0.5, 0.125]).double().log() / noise).softmax(0)
    assert_frequencies(shown.sum(0), p)


# --- keys and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [7, 300])
def test_keys_a_sample_make_samples_independent_of_the_batch(device, vocab):
    (logits,) = LogitsCase((5, 9), vocab).build(device, 1)
    tokens, keys = half_masked((5, 9), device), dx.random_key([3, 1, 4, 1, 5], device=device)
    calls = [lambda z, t, k: dx.reveal_ancestral(z, t, 0.5, MASK, key=k),
             lambda z, t, k: dx.reveal_confident(z, t, 2, MASK, noise_scale=1.0, key=k)]  # fmt: skip
    for call in calls:
        whole = call(logits, tokens, keys)
        for split in (1, 2, 3):
            parts = [call(*p) for p in zip(*(x.split(split) for x in (logits, tokens, keys)), strict=True)]
            assert torch.equal(torch.cat(parts), whole)


def test_arguments_stay_as_they_are_and_nothing_asks_for_a_gradient(device):
    logits = torch.randn(2, 6, 20, device=device, requires_grad=True)
    tokens, key = half_masked((2, 6), device), dx.random_key(0, device=device)
    before = tokens.clone()
    strided = torch.stack([tokens, tokens], -1)[..., 0]
    for given in (tokens, strided):
        first = dx.reveal_ancestral(logits, given, 0.5, MASK, key=key)
        second = dx.reveal_confident(logits, given, 2, MASK, key=key)
        assert not first.requires_grad
        assert not second.requires_grad
        assert torch.equal(given, before)
