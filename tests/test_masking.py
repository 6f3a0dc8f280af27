"""Masking and initial tokens: exact counts, exact laws, and draws that depend on the key alone."""

from __future__ import annotations

import functools
import itertools
import math
from math import nan

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import dimo_ext as dx
from dimo_ext.schedules import MASK_SCHEDULES, mask_ratio
from tests import oracles
from tests.conftest import assert_frequencies, assert_independent, assert_rate, cross

MASK_ID = -7
LENGTHS = [1, 2, 3, 5, 63, 64, 65, 257, 1000]
RATIOS = [0.0, 1e-9, 0.1, 0.25, 0.3, 0.5, 1 / 3, 0.7, 0.999, 1.0]


def rounded(ratio: float, length: int) -> int:
    """round(ratio·L), half to even, in float32."""
    return int(np.rint(np.float32(ratio) * np.float32(length)))


def tokens_of(batch: int, length: int, device, vocab: int = 50) -> Tensor:
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)


def masks(batch: int, length: int, ratio, key: Tensor, **options) -> Tensor:
    tokens = torch.zeros(batch, length, dtype=torch.int64, device=key.device)
    return dx.mask_tokens(tokens, ratio, MASK_ID, key=key, **options).mask


# --- counts ---------------------------------------------------------------------------------------------------------


@given(
    batch=st.sampled_from([0, 1, 2, 5]),
    length=st.sampled_from([0, *LENGTHS]),
    ratio=st.sampled_from(RATIOS),
    min_masked=st.sampled_from([0, 1, 3, 10**6]),
    per_sample=st.booleans(),
    seed=st.integers(-(2**63), 2**64 - 1),
)
@example(batch=1, length=1, ratio=0.0, min_masked=1, per_sample=False, seed=0)
@example(batch=2, length=5, ratio=0.5, min_masked=0, per_sample=True, seed=0)  # 2.5 rounds to 2
@example(batch=2, length=3, ratio=0.5, min_masked=0, per_sample=True, seed=0)  # 1.5 rounds to 2
def test_exact_count(device, batch, length, ratio, min_masked, per_sample, seed):
    """Exactly max(round(ratio·L), min_masked) positions, at most L; masked ones get the id, others stay."""
    tokens, key = tokens_of(batch, length, device), dx.random_key(seed, device=device)
    given_ratio = torch.full((batch,), ratio, device=device) if per_sample else ratio
    masked = dx.mask_tokens(tokens, given_ratio, MASK_ID, min_masked=min_masked, key=key)
    expected = min(max(rounded(ratio, length), min_masked), length)
    assert masked.mask.dtype == torch.bool
    assert masked.mask.shape == tokens.shape
    assert (masked.mask.sum(1) == expected).all()
    assert torch.equal(masked.tokens, torch.where(masked.mask, MASK_ID, tokens))


@pytest.mark.parametrize("length", LENGTHS)
def test_every_count_is_reached(device, length):
    """A ratio of k/L masks k positions for every k: no count is lost to rounding."""
    counts = torch.arange(length + 1, device=device)
    mask = masks(length + 1, length, counts / length, dx.random_key(1, device=device), min_masked=0)
    assert torch.equal(mask.sum(1), counts)


def test_the_longest_sequence(device):
    """65,536 positions, the most there may be: exact counts, and the halves share them as they should."""
    ratio = torch.tensor([1.0 / 65536, 0.3, 0.5, 1.0], device=device)
    mask = masks(4, 65536, ratio, dx.random_key(2, device=device))
    assert mask.sum(1).tolist() == [1, rounded(0.3, 65536), 32768, 65536]
    first_half = int(mask[2, :32768].sum())
    law = scipy.stats.hypergeom(65536, 32768, 32768)
    assert min(law.cdf(first_half), law.sf(first_half - 1)) > 5e-7


def test_one_sample_without_a_batch(device):
    """[L] tokens are a batch of one."""
    tokens, key = tokens_of(1, 9, device), dx.random_key(3, device=device)
    alone, batched = (dx.mask_tokens(t, 0.4, MASK_ID, key=key) for t in (tokens[0], tokens))
    assert torch.equal(alone.tokens, batched.tokens[0])
    assert torch.equal(alone.mask, batched.mask[0])


def test_ratios_on_the_device_are_clamped(device):
    """Below 0 is 0, above 1 is 1, NaN is 0; a half type is read as it is."""
    ratio = torch.tensor([-1.0, 2.0, nan, math.inf, -math.inf, 0.5], device=device)
    expected = [0, 8, 0, 8, 0, 4]
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        mask = masks(6, 8, ratio.to(dtype), dx.random_key(4, device=device), min_masked=0)
        assert mask.sum(1).tolist() == expected
    bernoulli = masks(6, 8, ratio, dx.random_key(4, device=device), min_masked=0, mode="bernoulli").sum(1)
    assert bernoulli[:5].tolist() == expected[:5]


@pytest.mark.parametrize("mask_id", [-(2**63), -1, 0, 2**31, 2**62 + 1, 2**63 - 1])
def test_ids_of_any_size(device, mask_id):
    """int64 end to end: no id passes through a narrower type."""
    tokens = torch.tensor([[2**63 - 1, -(2**63), 2**53 + 1, -1, 2**31, 5]], device=device)
    masked = dx.mask_tokens(tokens, 0.5, mask_id, key=dx.random_key(5, device=device))
    assert masked.tokens[masked.mask].tolist() == [mask_id] * 3
    assert torch.equal(masked.tokens[~masked.mask], tokens[~masked.mask])


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_strides_do_not_matter(device, layout):
    """The same tokens give the same result, and the input is left alone."""
    dense = tokens_of(6, 10, device)
    tokens = {"transposed": dense.T, "sliced": dense[1:4, ::3], "expanded": dense[:1].expand(6, 10)}[layout]
    before, key = tokens.clone(), dx.random_key(6, device=device)
    strided, compact = (dx.mask_tokens(t, 0.5, MASK_ID, key=key) for t in (tokens, tokens.contiguous()))
    assert torch.equal(strided.tokens, compact.tokens)
    assert torch.equal(strided.mask, compact.mask)
    assert torch.equal(tokens, before)


def keys_of(seeds: list[int] | int, batch: int) -> list[tuple[int, int]]:
    """Seed and row of the words of each sample: one key counts rows on, a key a sample starts anew."""
    return [(seeds, row) for row in range(batch)] if isinstance(seeds, int) else [(seed, 0) for seed in seeds]


@pytest.mark.parametrize(
    ("length", "ratio", "mode", "min_masked", "per_sample", "own_keys"),
    cross(LENGTHS, [*RATIOS, nan, 7.0], ["exact", "bernoulli"], [0, 1, 3, 10**6], [False, True], [False, True]),
)
def test_every_combination_of_masks(device, length, ratio, mode, min_masked, per_sample, own_keys):
    """The positions of the smallest words, as numpy finds them."""
    tokens, seeds = tokens_of(3, length, device), [5, 2**63, -1] if own_keys else 2**64 - 7
    ratios = [ratio, 0.37, 1.0] if per_sample or not 0 <= ratio <= 1 else [ratio] * 3
    share = torch.tensor(ratios, device=device) if len(set(ratios)) > 1 else ratio
    key = dx.random_key(seeds, 2**33 + 1, device=device)
    masked = dx.mask_tokens(tokens, share, MASK_ID, mode=mode, min_masked=min_masked, key=key)
    words = [oracles.row_words(s, 2**33 + 1, row, length, oracles.MASK_TOKENS) for s, row in keys_of(seeds, 3)]
    counts = [oracles.masked_count(w, r, mode == "bernoulli", min_masked) for w, r in zip(words, ratios, strict=True)]
    expected = torch.from_numpy(np.stack([oracles.smallest(w, n) for w, n in zip(words, counts, strict=True)]))
    assert torch.equal(masked.mask.cpu(), expected)
    assert torch.equal(masked.tokens, tokens.masked_fill(masked.mask, MASK_ID))


@pytest.mark.parametrize(
    ("length", "ratio", "vocab", "own_keys"), cross(LENGTHS, RATIOS, [1, 17, 1024, 2**24], [False, True])
)
def test_every_combination_of_initial_tokens(device, length, ratio, vocab, own_keys):
    """Ids by multiply-shift, the mask by words of their own."""
    seeds = [5, 2**63, -1] if own_keys else 2**64 - 7
    key = dx.random_key(seeds, 2**33 + 1, device=device)
    tokens = dx.init_tokens(3, length, vocab_size=vocab, mask_id=MASK_ID, r_init=ratio, key=key)
    for sample, (seed, row) in zip(tokens.cpu().numpy(), keys_of(seeds, 3), strict=True):
        ids, words = (oracles.row_words(seed, 2**33 + 1, row, length, t) for t in (oracles.INIT_IDS, oracles.INIT_MASK))
        expected = (ids * np.uint64(vocab) >> np.uint64(32)).astype(np.int64)
        assert (sample == np.where(oracles.smallest(words, rounded(ratio, length)), MASK_ID, expected)).all()


# --- laws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_sample", [False, True])
def test_every_subset_is_equally_likely(device, per_sample):
    """2 of 5 positions: the ten subsets are equally frequent, for one key and for one a sample."""
    n = 20_000
    key = dx.random_key(range(n) if per_sample else 7, device=device)
    codes = (masks(n, 5, 0.4, key) * 2 ** torch.arange(5, device=device)).sum(1)
    subsets = [sum(2**i for i in pair) for pair in itertools.combinations(range(5), 2)]
    probabilities = torch.zeros(32).index_fill(0, torch.tensor(subsets), 0.1)
    assert_frequencies(torch.bincount(codes, minlength=32), probabilities)


@pytest.mark.parametrize("ratio", [0.003, 0.25, 0.5, 0.9])
def test_bernoulli_positions_are_independent_coins(device, ratio):
    """Counts follow the binomial law, every position its rate, two positions nothing of each other."""
    n, length = 20_000, 12
    mask = masks(n, length, ratio, dx.random_key(8, device=device), mode="bernoulli", min_masked=0)
    law = torch.from_numpy(scipy.stats.binom(length, ratio).pmf(np.arange(length + 1)))
    assert_frequencies(torch.bincount(mask.sum(1), minlength=length + 1), law)
    for position in range(length):
        assert_rate(int(mask[:, position].sum()), n, ratio)
    for other in (1, 4, 11):
        assert_independent(mask[:, 0].long(), mask[:, other].long(), 2)


@pytest.mark.parametrize("ratio", [0.0, 1.0, 2.0**-40, 1 - 2.0**-24])
def test_bernoulli_extremes(device, ratio):
    """0 masks nothing, 1 everything, and neighbours of both next to that."""
    mask = masks(20, 500, ratio, dx.random_key(9, device=device), mode="bernoulli", min_masked=0)
    assert int(mask.sum()) == (10_000 if ratio > 0.5 else 0)


def test_bernoulli_boundary(device):
    """A ratio that lies exactly on a token's word excludes it, the next float32 includes it."""
    word = int(oracles.row_words(11, 3, 0, 4096, oracles.MASK_TOKENS).min())
    assert word < 2**22  # so that word + 1/2 is a float32
    ratio = np.float32((word + 0.5) / 2**32)
    for value, count in ((ratio, 0), (np.nextafter(ratio, np.float32(1)), 1)):
        mask = masks(1, 4096, float(value), dx.random_key(11, 3, device=device), mode="bernoulli", min_masked=0)
        assert int(mask.sum()) == count


def test_bernoulli_min_masked(device):
    """Where too few coins fall, the likeliest positions are added: the count is the maximum of both."""
    key, options = dx.random_key(10, device=device), {"mode": "bernoulli"}
    free = masks(500, 10, 0.1, key, min_masked=0, **options)
    bounded = masks(500, 10, 0.1, key, min_masked=2, **options)
    assert torch.equal(bounded.sum(1), free.sum(1).clamp(min=2))
    assert not (free & ~bounded).any()


@pytest.mark.parametrize("mode", ["exact", "bernoulli"])
def test_masks_are_nested_in_the_ratio(device, mode):
    """With one key a larger ratio only adds positions."""
    key = dx.random_key(11, device=device)
    nested = [masks(50, 33, ratio, key, mode=mode) for ratio in sorted(RATIOS)]
    for smaller, larger in itertools.pairwise(nested):
        assert not (smaller & ~larger).any()
    assert nested[0].sum() < nested[4].sum() < nested[-1].sum()


def test_a_ratio_a_sample_equals_one_for_all(device):
    """[B] ratios mask each sample as the same float would."""
    key, ratios = dx.random_key(12, device=device), torch.tensor([0.1, 0.5, 0.9], device=device)
    for mode in ("exact", "bernoulli"):
        together = masks(3, 65, ratios, key, mode=mode)
        alone = [masks(3, 65, float(r), key, mode=mode)[i] for i, r in enumerate(ratios.cpu())]
        assert torch.equal(together, torch.stack(alone))


# --- keys -----------------------------------------------------------------------------------------------------------


def test_keys_a_sample_make_samples_independent_of_the_batch(device):
    """[B, 2] keys: any split of the batch gives the same masks and the same initial tokens."""
    keys = dx.random_key([3, 1, 4, 1, 5], 2**40, device=device)

    def init(k):
        return dx.init_tokens(len(k), 33, vocab_size=9, mask_id=MASK_ID, r_init=0.5, key=k)

    whole_masks, whole_init = masks(5, 33, 0.5, keys), init(keys)
    for split in (1, 2, 3):
        parts = keys.split(split)
        assert torch.equal(torch.cat([masks(len(k), 33, 0.5, k) for k in parts]), whole_masks)
        assert torch.equal(torch.cat([init(k) for k in parts]), whole_init)
    assert torch.equal(whole_masks[1], whole_masks[3])  # equal seeds
    assert not torch.equal(whole_masks[0], whole_masks[2])


def test_a_batch_of_one_key_is_that_key(device):
    """[1, 2] and [2] agree for one sample."""
    assert torch.equal(masks(1, 65, 0.5, dx.random_key([7], device=device)),
                       masks(1, 65, 0.5, dx.random_key(7, device=device)))  # fmt: skip


def test_masks_are_a_function_of_the_key_alone(device):
    """The same key, the same mask; another seed, offset or row, an independent one."""

    def draw(seed, offset=0):
        return masks(2, 40_000, 0.5, dx.random_key(seed, offset, device=device)).long()

    base = draw(1)
    assert torch.equal(base, draw(1))
    for other in (draw(2)[0], draw(1, 1)[0], base[1], base[0].roll(1)):
        assert_independent(base[0], other, 2)


def test_mask_and_initial_tokens_share_nothing(device):
    """One key may serve both operators: their draws are independent."""
    key = dx.random_key(13, device=device)
    mask = masks(1, 40_000, 0.5, key)[0].long()
    initial = dx.init_tokens(1, 40_000, vocab_size=2, mask_id=-1, r_init=0.5, key=key)[0]
    unmasked = dx.init_tokens(1, 40_000, vocab_size=2, mask_id=-1, r_init=0.0, key=key)[0]
    assert_independent(mask, (initial == -1).long(), 2)
    assert_independent(mask, unmasked, 2)
    assert_independent((initial == -1).long(), unmasked, 2)


# --- init_tokens ----------------------------------------------------------------------------------------------------


@given(
    batch=st.sampled_from([0, 1, 3]),
    length=st.sampled_from([0, *LENGTHS]),
    vocab=st.sampled_from([1, 2, 17, 1024, 2**24]),
    r_init=st.sampled_from(RATIOS),
    mask_id=st.sampled_from([-(2**63), -1, 2**63 - 1]),
)
@example(batch=1, length=5, vocab=2, r_init=0.5, mask_id=-1)  # 2.5 rounds to 2
def test_init_counts(device, batch, length, vocab, r_init, mask_id):
    """Exactly round(r_init·L) masked, none at 0, all at 1; every other id in [0, vocab_size)."""
    key = dx.random_key(14, device=device)
    tokens = dx.init_tokens(batch, length, vocab_size=vocab, mask_id=mask_id, r_init=r_init, key=key)
    assert tokens.dtype == torch.int64
    assert tokens.shape == (batch, length)
    assert tokens.device == device
    assert ((tokens == mask_id).sum(1) == rounded(r_init, length)).all()
    real = tokens[tokens != mask_id]
    assert ((real >= 0) & (real < vocab)).all()


@pytest.mark.parametrize("vocab", [2, 3, 17, 1000])
def test_init_ids_are_uniform(device, vocab):
    """All ids equally often, and a position says nothing of the next."""
    tokens = dx.init_tokens(50, 1001, vocab_size=vocab, mask_id=-1, r_init=0.0, key=dx.random_key(15, device=device))
    assert_frequencies(torch.bincount(tokens.flatten(), minlength=vocab), torch.full((vocab,), 1 / vocab))
    if vocab < 20:
        assert_independent(tokens[:, 1:].flatten(), tokens[:, :-1].flatten(), vocab)


def test_init_masks_are_uniform_over_subsets(device):
    """2 of 5 positions: the ten subsets are equally frequent."""
    tokens = dx.init_tokens(20_000, 5, vocab_size=3, mask_id=-1, r_init=0.4, key=dx.random_key(16, device=device))
    codes = ((tokens == -1) * 2 ** torch.arange(5, device=device)).sum(1)
    subsets = [sum(2**i for i in pair) for pair in itertools.combinations(range(5), 2)]
    probabilities = torch.zeros(32).index_fill(0, torch.tensor(subsets), 0.1)
    assert_frequencies(torch.bincount(codes, minlength=32), probabilities)


def test_init_ids_do_not_depend_on_r_init(device):
    """One key: a larger r_init hides ids and changes none."""

    def init(r):
        return dx.init_tokens(4, 65, vocab_size=99, mask_id=-1, r_init=r, key=dx.random_key(17, device=device))

    ids = init(0.0)
    for r in (0.2, 0.6, 1.0):
        tokens = init(r)
        assert torch.equal(torch.where(tokens == -1, ids, tokens), ids)


def test_init_device_follows_the_key_or_generator(device):
    """Without `device`, tokens land where the key or the generator lives."""
    options = {"vocab_size": 3, "mask_id": 3, "r_init": 0.5}
    assert dx.init_tokens(1, 4, key=dx.random_key(0, device=device), **options).device == device
    assert dx.init_tokens(1, 4, generator=torch.Generator(device), **options).device.type == device.type
    assert dx.init_tokens(1, 4, device=device.type, key=dx.random_key(0, device=device), **options).device == device


# --- native against the reference -----------------------------------------------------------------------------------

lengths = st.integers(0, 70) | st.sampled_from([255, 256, 257, 1023, 4097, 65536])
ratios = st.floats(0, 1, width=32) | st.sampled_from([0.0, 0.5, 1.0, 2.0**-33])
numbers = st.integers(-(2**63), 2**63 - 1)


@given(
    st.integers(0, 4),
    lengths,
    ratios,
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 70),
    numbers,
    numbers,
)
@example(3, 65536, 0.5, False, True, True, 1, -1, 2**40)
def test_backends_are_bit_equal(device, batch, length, ratio, bernoulli, per_sample, own_keys, least, seed, offset):
    """Whatever serves mask_tokens and init_tokens on this device gives the reference's very integers."""
    seeds = [(seed + b) % 2**64 for b in range(max(batch, 1))]
    key = dx.random_key(seeds if own_keys and batch else seed, offset, device=device)
    tokens = torch.arange(batch * length, device=device).view(batch, length)
    mode = "bernoulli" if bernoulli else "exact"
    share = torch.tensor([ratio, nan, 1.5, -1.0][:batch], device=device) if per_sample else ratio

    def draws():
        masked = dx.mask_tokens(tokens, share, -7, mode=mode, min_masked=least, key=key)
        return *masked, dx.init_tokens(batch, length, vocab_size=length + 1, mask_id=-7, r_init=ratio, key=key)

    served = draws()
    with dx.use_backend("reference"):
        expected = draws()
    assert all(torch.equal(a, b) for a, b in zip(served, expected, strict=True))


# --- schedules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["exact", "bernoulli"])
@pytest.mark.parametrize("schedule", MASK_SCHEDULES)
def test_a_schedule_gives_the_ratio(device, schedule, mode):
    """The masks of r(u) in float64, rounded to float32; every time in [0, 1], both ends, outside, NaN."""
    times = torch.cat([torch.linspace(0, 1, 2001), torch.tensor([1e-30, -1.0, 2.0, math.nan])])
    ratios = mask_ratio(schedule, times.double().nan_to_num(0.0).clamp(0, 1)).float()
    tokens, key = torch.zeros(len(times), 37, dtype=torch.int64, device=device), dx.random_key(3, device=device)
    masked = functools.partial(dx.mask_tokens, tokens, mask_id=1, mode=mode, min_masked=0, key=key)
    by_schedule = masked(mask_ratio=times.to(device), schedule=schedule)
    assert torch.equal(by_schedule.mask, masked(mask_ratio=ratios.to(device)).mask)
    for time, ratio in zip(times[::400].tolist(), ratios[::400].tolist(), strict=True):
        assert torch.equal(masked(mask_ratio=time, schedule=schedule).mask, masked(mask_ratio=ratio).mask)
