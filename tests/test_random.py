"""Keys: construction, derivation, and the numbers drawn straight from them."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch

import dimo_ext as dx
from dimo_ext.philox import Tag, random_words, uniform
from dimo_ext.random import random_integers, random_uniform, resolve_key
from tests.conftest import FALSE_ALARM, META, assert_frequencies, assert_independent, assert_rejected
from tests.oracles import FOLD_IN, row_words


def low_bits(words: torch.Tensor, bits: int = 4) -> torch.Tensor:
    return words & (2**bits - 1)


# --- random_key -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "offset", "expected"),
    [
        (7, 0, [7, 0]),
        (-1, 5, [-1, 5]),
        (2**64 - 1, 0, [-1, 0]),
        (2**63, 2**64 - 2, [-(2**63), -2]),
        (-(2**63), 2**63 - 1, [-(2**63), 2**63 - 1]),
        ([3, 2**64 - 3], 9, [[3, 9], [-3, 9]]),
        (range(2), 1, [[0, 1], [1, 1]]),
    ],
)
def test_random_key_holds_seed_and_offset(device, seed, offset, expected):
    """64-bit values of either sign, kept modulo 2^64; one key from a number, one a sample from a sequence."""
    key = dx.random_key(seed, offset, device=device)
    assert key.dtype == torch.int64
    assert key.device == device
    assert key.tolist() == expected


@pytest.mark.parametrize(
    ("arguments", "name", "expected", "given_"),
    [
        ({"seed": 1.0}, "seed", "an int", "float 1.0"),
        ({"seed": True}, "seed", "an int", "bool True"),
        ({"seed": "12"}, "seed", "an int", "str '12'"),
        ({"seed": None}, "seed", "an int", "NoneType"),
        ({"seed": [1, 2.5]}, "seed", "an int", "float 2.5"),
        ({"seed": []}, "seed", "at least one integer", "an empty sequence"),
        ({"seed": 2**64}, "seed", "[-2^63, 2^64)", str(2**64)),
        ({"seed": -(2**63) - 1}, "seed", "[-2^63, 2^64)", "-9223372036854775809"),
        ({"seed": 0, "offset": 0.5}, "offset", "an int", "float 0.5"),
        ({"seed": 0, "offset": 2**64}, "offset", "[-2^63, 2^64)", str(2**64)),
        ({"seed": 0, "device": "gpu"}, "device", "a torch device or its name", "'gpu'"),
        ({"seed": 0, "device": 1.5}, "device", "a torch device or its name", "1.5"),
    ],
)
def test_bad_keys_are_rejected(arguments, name, expected, given_):
    """The error names the argument, what was expected and what was given."""
    assert_rejected(lambda: dx.random_key(**arguments), name, expected, given_)


# --- fold_in --------------------------------------------------------------------------------------------------------


def test_fold_in_is_a_function_of_key_and_number(device):
    """The same arguments give the same key, any other gives another; int and tensor agree."""
    keys = [dx.random_key(seed, offset, device=device) for seed in (0, 1, 2**63) for offset in (0, 1)]
    numbers = [0, 1, 2, 2**16, 2**32 - 1]
    derived = [tuple(dx.fold_in(key, n).tolist()) for key in keys for n in numbers]
    assert derived == [tuple(dx.fold_in(key, n).tolist()) for key in keys for n in numbers]
    assert len(set(derived)) == len(derived)
    for key in keys:
        together = dx.fold_in(key, torch.tensor(numbers, device=device))
        assert together.tolist() == [dx.fold_in(key, n).tolist() for n in numbers]
        assert together.device == device


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 - 2**32])
@pytest.mark.parametrize("offset", [0, -1, 2**33 + 1])
def test_fold_in_is_that_of_the_contract(device, seed, offset):
    """The words of the block whose row is the number: seed low, seed high, offset low, offset high."""
    numbers = [0, 1, 2**31, 2**32 - 1]
    folded = dx.fold_in(dx.random_key(seed, offset, device=device), torch.tensor(numbers, device=device))
    words = [[int(w) for w in row_words(seed, offset, n, 4, FOLD_IN)] for n in numbers]
    expected = [dx.random_key(w[0] | w[1] << 32, w[2] | w[3] << 32).tolist() for w in words]
    assert folded.tolist() == expected


def test_fold_in_broadcasts(device):
    """[B, 2] keys with a scalar, a [B] or a [T, 1] number, each entry as if it were alone."""
    keys = dx.random_key([5, 6, 7], device=device)

    def alone(b, n):
        return dx.fold_in(keys[b], n).tolist()

    assert dx.fold_in(keys, 4).tolist() == [alone(b, 4) for b in range(3)]
    each = dx.fold_in(keys, torch.arange(3, device=device))
    assert each.tolist() == [alone(b, b) for b in range(3)]
    grid = dx.fold_in(keys, torch.arange(2, device=device)[:, None])
    assert grid.tolist() == [[alone(b, n) for b in range(3)] for n in range(2)]
    wrapped = dx.fold_in(keys[0], torch.tensor([2**32 + 3, -1], device=device))
    assert wrapped.tolist() == [alone(0, 3), alone(0, 2**32 - 1)]


def test_folded_keys_draw_independently(device):
    """Draws under neighbouring numbers, and under the parent, share nothing."""
    key, count = dx.random_key(11, device=device), 40_000
    streams = [low_bits(random_words(k, 1, 1, count, Tag.UNIFORM))[0]
               for k in (key, dx.fold_in(key, 0), dx.fold_in(key, 1), dx.fold_in(dx.fold_in(key, 0), 0))]  # fmt: skip
    for i, first in enumerate(streams):
        for second in streams[i + 1 :]:
            assert_independent(first, second, 16)


@pytest.mark.parametrize(
    ("key", "n", "name", "expected", "given_"),
    [
        (dx.random_key(0), -1, "n", "[0, 2^32)", "-1"),
        (dx.random_key(0), 2**32, "n", "[0, 2^32)", "4294967296"),
        (dx.random_key(0), 1.0, "n", "an int or an integer tensor", "float 1.0"),
        (dx.random_key(0), True, "n", "an int or an integer tensor", "bool True"),
        (dx.random_key(0), torch.tensor(1.5), "n", "an int or an integer tensor", "torch.float32"),
        (dx.random_key(0), torch.tensor(True), "n", "an int or an integer tensor", "torch.bool"),
        (dx.random_key([0, 1]), torch.zeros(3, dtype=torch.int64), "n", "broadcasts with [2]", "[3]"),
        (dx.random_key(0), torch.zeros(3, dtype=torch.int64, device=META), "n", "a tensor on", "meta"),
        (7, 0, "key", "int64 tensor", "int 7"),
        (torch.zeros(2), 0, "key", "dtype int64", "torch.float32"),
        (torch.zeros(3, dtype=torch.int64), 0, "key", "shape [2] or [B, 2]", "[3]"),
    ],
)
def test_bad_fold_in_is_rejected(key, n, name, expected, given_):
    """The error names the argument, what was expected and what was given."""
    assert_rejected(lambda: dx.fold_in(key, n), name, expected, given_)


# --- words, uniforms, integers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_uniform_stays_inside_the_open_interval(device, dtype):
    """Neither the smallest nor the largest word reaches 0 or 1, not even in float32."""
    u = uniform(torch.tensor([0, 1, 2**31, 2**32 - 2, 2**32 - 1], device=device), dtype)
    assert u.dtype == dtype
    assert (u > 0).all()
    assert (u < 1).all()
    assert u[0] == 2.0**-33
    assert (u.diff() >= 0).all()
    assert abs(float(u[2]) - 0.5) <= 2.0**-32


def test_random_uniform_is_uniform(device):
    """Kolmogorov-Smirnov, and the same key gives the same numbers."""
    u = random_uniform(dx.random_key(3, device=device), 50_000)
    assert u.dtype == torch.float32
    assert scipy.stats.kstest(u.double().cpu().numpy(), "uniform").pvalue > FALSE_ALARM
    assert torch.equal(u[:7], random_uniform(dx.random_key(3, device=device), 7))


@pytest.mark.parametrize("high", [1, 2, 7, 100, 1000])
def test_random_integers_are_uniform(device, high):
    """All of [0, high) and nothing else, equally often."""
    draws = random_integers(dx.random_key(4, device=device), 50_000, high)
    assert draws.dtype == torch.int64
    assert draws.min() >= 0
    assert_frequencies(torch.bincount(draws, minlength=high), torch.full((high,), 1.0 / high))


def test_random_integers_reach_2_to_24(device):
    """The largest range: never outside, spread over all of it."""
    draws = random_integers(dx.random_key(5, device=device), 50_000, 2**24)
    assert draws.min() >= 0
    assert draws.max() < 2**24
    assert scipy.stats.kstest(draws.double().cpu().numpy() / 2**24, "uniform").pvalue > FALSE_ALARM


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 1023])
def test_words_do_not_depend_on_how_many_are_drawn(device, count):
    """A prefix is a prefix; a row is a row, in a batch of any size; [B, 2] keys restart rows in each sample."""
    key = dx.random_key(6, 2**40 + 1, device=device)
    words = random_words(key, 3, 2, 1023, Tag.UNIFORM)
    assert torch.equal(random_words(key, 3, 2, count, Tag.UNIFORM), words[:, :count])
    assert torch.equal(random_words(key, 1, 2, count, Tag.UNIFORM), words[:2, :count])
    repeated = random_words(key.expand(3, 2), 3, 2, count, Tag.UNIFORM)
    assert torch.equal(repeated, words[:2, :count].repeat(3, 1))


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 1023])
def test_uniform_words_are_those_of_the_contract(device, count):
    """Row 0 of the key's stream, under the tag of uniform numbers."""
    key = dx.random_key(-6, 2**40 + 1, device=device)
    words = torch.ops.dimo_ext.uniform_words(key, count)
    assert torch.equal(words, random_words(key, 1, 1, count, Tag.UNIFORM)[0])


def test_streams_are_independent(device):
    """Tags, rows, seeds, offsets and neighbouring words share nothing."""

    def draw(seed=1, offset=0, row=0, tag=Tag.UNIFORM):
        return low_bits(random_words(dx.random_key(seed, offset, device=device), 1, row + 1, 40_000, tag))[row]

    base = draw()
    others = [draw(seed=2), draw(seed=1 + 2**32), draw(offset=1), draw(offset=2**32), draw(row=1),
              draw(tag=Tag.MASK_TOKENS), base.roll(1), base.roll(4)]  # fmt: skip
    for other in others:
        assert_independent(base, other, 16)
    assert_frequencies(torch.bincount(base, minlength=16), torch.full((16,), 1 / 16))


@pytest.mark.parametrize(
    ("call", "name", "expected", "given_"),
    [
        (lambda: random_uniform(dx.random_key([1, 2]), 3), "key", "shape [2]", "[2, 2]"),
        (lambda: random_uniform(torch.zeros(2), 3), "key", "dtype int64", "torch.float32"),
        (lambda: random_integers(dx.random_key([1, 2]), 3, 5), "key", "shape [2]", "[2, 2]"),
        (lambda: random_integers(dx.random_key(1), 3, 0), "high", "[1, 16777216]", "0"),
        (lambda: random_integers(dx.random_key(1), 3, 2**24 + 1), "high", "[1, 16777216]", "16777217"),
        (lambda: random_integers(dx.random_key(1), -1, 5), "count", "[0, 67108864]", "-1"),
    ],
)
def test_bad_draws_are_rejected(call, name, expected, given_):
    """The error names the argument, what was expected and what was given."""
    assert_rejected(call, name, expected, given_)


# --- generators -----------------------------------------------------------------------------------------------------


def test_a_key_from_a_generator(device):
    """One generator gives one key a call, reproducibly; its state alone decides."""

    def keys(seed):
        generator = torch.Generator(device).manual_seed(seed)
        return [resolve_key(None, generator, batch_size=2, device=device).tolist() for _ in range(3)]

    assert keys(1) == keys(1)
    assert len({tuple(k) for k in keys(1) + keys(2)}) == 6


def test_keys_from_generators_fill_64_bits():
    """The top bits of seed and offset are drawn as well."""
    generator = torch.Generator().manual_seed(0)
    drawn = [resolve_key(None, generator, batch_size=1, device=torch.device("cpu")) for _ in range(64)]
    bits = np.array([[int(x) >> 63 & 1 for x in key] for key in drawn])
    assert (bits.sum(0) > 10).all()
    assert (bits.sum(0) < 54).all()


def test_without_key_the_default_generator_is_used(device):
    """torch.manual_seed decides, as everywhere in torch."""

    def draw():
        torch.manual_seed(5)
        return resolve_key(None, None, batch_size=1, device=device)

    with torch.random.fork_rng():
        first, second = draw(), draw()
        assert torch.equal(first, second)
        assert not torch.equal(first, resolve_key(None, None, batch_size=1, device=device))
