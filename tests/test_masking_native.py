"""The CPU kernels of masking and initial tokens against the written contract in numpy and exact integers."""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

core = pytest.importorskip("dimo_ext._core")

MASK_TOKENS, INIT_MASK, INIT_IDS = 1, 2, 3  # operator tags
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


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Ten rounds on uint64 arrays that hold 32-bit words, [4, n]."""
    c, (k0, k1), low = counter.copy(), key, np.uint64(0xFFFFFFFF)
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        high0, high1 = p0 >> np.uint64(32), p1 >> np.uint64(32)
        c = np.stack([high1 ^ c[1] ^ np.uint64(k0), p1 & low, high0 ^ c[3] ^ np.uint64(k1), p0 & low])
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c


def row_words(seed: int, offset: int, row: int, length: int, tag: int = MASK_TOKENS) -> np.ndarray:
    seed, offset, blocks = seed % 2**64, offset % 2**64, -(-length // 4)
    counter = np.zeros((4, blocks), np.uint64)
    counter[0] = np.arange(blocks, dtype=np.uint64) | np.uint64(tag << 24)
    counter[1:] = np.array([[row], [offset % 2**32], [offset >> 32]], np.uint64)
    return philox(counter, (seed % 2**32, seed >> 32)).T.reshape(-1)[:length]


def expected_count(words: np.ndarray, ratio: float, bernoulli: bool, min_masked: int) -> int:
    length = len(words)
    ratio32 = np.float32(0.0) if math.isnan(ratio) else np.clip(np.float32(ratio), np.float32(0), np.float32(1))
    if bernoulli:  # word + 1/2 < ratio * 2^32, in exact arithmetic
        count = int((words < np.uint64(math.ceil(Fraction(float(ratio32)) * 2**32 - Fraction(1, 2)))).sum())
    else:
        count = int(np.rint(ratio32 * np.float32(length)))
    return min(max(count, min(min_masked, length)), length)


def expected_mask(case: Case) -> np.ndarray:
    mask = np.zeros((case.batch, case.length), bool)
    shared = isinstance(case.keys, tuple)
    for row in range(case.batch):
        seed, offset = case.keys if shared else case.keys[row]
        words = row_words(seed, offset, row if shared else 0, case.length)
        ratio = case.ratio[row] if isinstance(case.ratio, tuple) else case.ratio
        count = expected_count(words, ratio, case.bernoulli, case.min_masked)
        mask[row, np.argsort(words, kind="stable")[:count]] = True
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


@settings(deadline=None, max_examples=200)
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


def test_bernoulli_boundary() -> None:
    """A ratio that lies exactly on a token's word excludes it, the next float32 includes it."""
    key, length = (11, 3), 4096
    words = row_words(*key, 0, length)
    word = int(words.min())  # small, so that word + 1/2 has an exact float32
    assert word < 2**22
    ratio = np.float32((word + 0.5) / 2**32)
    assert float(ratio) * 2**32 == word + 0.5
    for value, count in ((ratio, 0), (np.nextafter(ratio, np.float32(1)), 1)):
        case = Case(1, length, float(value), key, bernoulli=True, min_masked=0)
        check(case)
        assert run(case)[2].sum() == count


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
            order = np.argsort(row_words(seed, offset, index, length, INIT_MASK), kind="stable")
            want[order[: int(np.rint(np.float32(ratio) * np.float32(length)))]] = MASK_ID
            assert np.array_equal(out[row], want)


def test_length_beyond_the_counter_is_refused() -> None:
    with pytest.raises(ValueError, match="length must be at most 2\\^26"):
        core.cpu_mask_tokens(0, 0, 0, 0, 2**26 + 1, 0.5, 0, 0, 0, 0, False, 1, 1)
