"""The CPU kernels of masking and initial tokens against the written contract in numpy and exact integers."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.oracles import INIT_IDS, INIT_MASK, MASK_TOKENS, masked_count, row_words, smallest

core = pytest.importorskip("dimo_ext._core")
MASK_ID = -7
LENGTHS = [1, 2, 3, 63, 64, 65, 1000, 65536]


@dataclass(frozen=True)
class Case:
    """One call: `keys` is (seed, offset) for all rows or a list of one a row; `ratio` a float or one a row."""

    batch: int
    length: int
    ratio: float | tuple[float, ...]
    keys: tuple[int, int] | list[tuple[int, int]]
    bernoulli: bool = False
    min_masked: int = 1


# ---------------------------------------------------------------------------------------------------- the contract


def expected_mask(case: Case) -> np.ndarray:
    mask = np.zeros((case.batch, case.length), bool)
    shared = isinstance(case.keys, tuple)
    for row in range(case.batch):
        seed, offset = case.keys if shared else case.keys[row]
        words = row_words(seed, offset, row if shared else 0, case.length, MASK_TOKENS)
        ratio = case.ratio[row] if isinstance(case.ratio, tuple) else case.ratio
        mask[row] = smallest(words, masked_count(words, ratio, case.bernoulli, case.min_masked))
    return mask


# ------------------------------------------------------------------------------------------------------ the kernel


def run(case: Case, num_threads: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens given, tokens and mask returned; the outputs start out as rubbish."""
    tokens = np.arange(case.batch * case.length, dtype=np.int64).reshape(case.batch, case.length)
    out, mask = np.full_like(tokens, 99), np.full(tokens.shape, 0xAA, np.uint8)
    keys = np.array(case.keys, np.int64)
    per_row = isinstance(case.ratio, tuple)
    ratios = np.array(case.ratio if per_row else [], np.float32)
    core.cpu_mask_tokens(
        tokens.ctypes.data,
        out.ctypes.data,
        mask.ctypes.data,
        case.batch,
        case.length,
        0.123 if per_row else case.ratio,
        ratios.ctypes.data if per_row else 0,
        keys.ctypes.data,
        0 if isinstance(case.keys, tuple) else 2,
        MASK_ID,
        case.bernoulli,
        case.min_masked,
        0,
        num_threads,
    )
    return tokens, out, mask


def check(case: Case, num_threads: int = 1) -> None:
    tokens, out, mask = run(case, num_threads)
    want = expected_mask(case)
    assert np.array_equal(mask, want.astype(np.uint8))
    assert np.array_equal(out, np.where(want, MASK_ID, tokens))


@pytest.mark.parametrize("bernoulli", [False, True], ids=["exact", "bernoulli"])
@pytest.mark.parametrize("batch", [0, 1, 7])
@pytest.mark.parametrize("length", LENGTHS)
def test_shapes(length: int, batch: int, bernoulli: bool) -> None:
    ratios = tuple(np.linspace(0.0, 1.0, batch).tolist())
    for num_threads in (1, 2):
        check(Case(batch, length, 0.37, (-3, 2**40 + 5), bernoulli), num_threads)
        check(Case(batch, length, ratios, [(b - 3, b << 33) for b in range(batch)], bernoulli), num_threads)


keys = st.tuples(*[st.integers(-(2**63), 2**63 - 1)] * 2)
ratios = st.floats(width=32, allow_nan=True) | st.floats(0, 1, width=32)


@given(keys, st.integers(1, 80), ratios, st.booleans(), st.integers(0, 90))
@example((0, 0), 5, 0.5, False, 1)  # 2.5 rounds to 2
@example((0, 0), 7, 0.5, False, 1)  # 3.5 rounds to 4
@example((0, 0), 10, 0.25, False, 0)
@example((-1, -1), 64, math.nan, True, 0)
@example((0, 0), 64, math.inf, True, 0)
@example((1, 2), 64, 2.0**-33, True, 0)  # ratio * 2^32 is exactly one half: no word qualifies
@example((1, 2), 3, 1.0, False, 10)
def test_any_ratio_and_key(key: tuple[int, int], length: int, ratio: float, bernoulli: bool, min_masked: int) -> None:
    check(Case(2, length, ratio, key, bernoulli, min_masked))
    check(Case(2, length, (ratio, 0.5), [key, key], bernoulli, min_masked))


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    keys = [(5, 1), (6, 1), (7, 1)]
    together = run(Case(3, 100, 0.5, keys))[2]
    for row, key in enumerate(keys):
        assert np.array_equal(run(Case(1, 100, 0.5, [key]))[2][0], together[row])


@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize("length", LENGTHS)
def test_init_tokens(length: int, batch: int) -> None:
    """Uniform ids by multiply-shift, exactly rint(ratio * length) of them masked; no minimum."""
    for ratio, vocab, shared in [(0.0, 17, True), (0.5, 1, False), (0.8, 1024, True), (1.0, 2**24, False)]:
        keys = np.array([-3, 2**40 + 5] if shared else [[b - 3, b << 33] for b in range(batch)], np.int64)
        out = np.full((batch, length), 99, np.int64)
        core.cpu_init_tokens(
            out.ctypes.data, batch, length, ratio, keys.ctypes.data, 0 if shared else 2, MASK_ID, vocab, 2
        )
        for row in range(batch):
            seed, offset, index = (*map(int, keys), row) if shared else (*map(int, keys[row]), 0)
            want = (row_words(seed, offset, index, length, INIT_IDS) * np.uint64(vocab) >> np.uint64(32)).astype(int)
            words = row_words(seed, offset, index, length, INIT_MASK)
            want[smallest(words, int(np.rint(np.float32(ratio) * np.float32(length))))] = MASK_ID
            assert np.array_equal(out[row], want)


def test_length_beyond_the_counter_is_refused() -> None:
    with pytest.raises(ValueError, match="length must be at most 2\\^26"):
        core.cpu_mask_tokens(0, 0, 0, 0, 2**26 + 1, 0.5, 0, 0, 0, 0, False, 1, 0, 1)
