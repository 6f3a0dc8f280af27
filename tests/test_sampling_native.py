"""The compiled draws: every instruction set and layout of a row against the reference, and what only they have."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, nan

import pytest
import torch
from torch import Tensor

import dimo_ext as dx
from tests.conftest import TOLERANCES, LogitsCase, assert_close, assert_same_draws, cross

pytest.importorskip("dimo_ext._core")

CPU = torch.device("cpu")
# Rows across and along the lanes of every set, full and partial chunks, more chunks than lanes, rows that filters keep.
VOCABULARIES = [1, 2, 15, 17, 32, 33, 64, 65, 127, 128, 129, 255, 256, 257, 511, 1025, 4096, 4097, 16384, 16385]
STORED = [torch.float32, torch.float16, torch.bfloat16]
FILTERS = [{}, {"top_k": 1}, {"top_k": 50}, {"top_p": 0.5}, {"top_p": 0.99}, {"min_p": 0.05},
           {"top_k": 30, "top_p": 0.8, "min_p": 0.01}]  # fmt: skip


def draw_of(logits: Tensor, key: Tensor, **options) -> Callable[[], dx.CategoricalSample]:
    options = {k: min(v, logits.shape[-1]) if k == "top_k" else v for k, v in options.items()}
    return lambda: dx.sample_categorical(logits, key=key, **options)


@pytest.mark.parametrize(
    ("vocab", "dtype", "layout", "pattern", "filters", "temperature"),
    cross(
        VOCABULARIES, STORED, ["contiguous", "sliced", "vocab_first", "batch_second"],
        ["normal", "constant", "extreme", "minus_inf", "padded", "one_finite"], FILTERS, [0.0, 1e-3, 0.7, 1.0, 1e3],
    ),
)  # fmt: skip
def test_every_row(isa, vocab, dtype, layout, pattern, filters, temperature):
    """The reference's ids, guided and not, with a key for all and one a sample, dead rows among others."""
    logits, uncond = LogitsCase((2, 9), vocab, dtype, layout, pattern, seed=vocab).build(CPU)
    logits[0, 3, vocab - 1], logits[1, 0, 0], logits[1, 8] = nan, inf, -inf
    options = filters | {"temperature": temperature}
    assert_same_draws(draw_of(logits, dx.random_key(vocab, -5), **options))
    scale = torch.tensor([1.0, 1.7])
    keys = dx.random_key([2**63, 7], 2**40)
    assert_same_draws(draw_of(logits, keys, uncond_logits=uncond, guidance_scale=scale, **options))


@pytest.mark.parametrize("options", [*FILTERS, {"temperature": 0.0}])
@pytest.mark.parametrize("vocab", [1, 33, 65, 200])
def test_nothing_is_left_of_an_earlier_call(isa, vocab, options):
    """What a row of NaN left behind the last id, in memory that the next call takes, is none of its logits."""
    logits, uncond = LogitsCase((2, 9), vocab).build(CPU)
    options = options | {"uncond_logits": uncond, "guidance_scale": 1.7}
    call = draw_of(logits, dx.random_key(vocab), **options)
    poison = torch.full((1, 256), nan)
    for _ in range(3):
        draw_of(poison, dx.random_key(1), **options | {"uncond_logits": poison})()
        assert (call().tokens >= 0).all()
        assert_same_draws(call)


@pytest.mark.parametrize("vocab", [18, 300, 1025])
def test_one_id_in_ten_thousand(isa, vocab):
    """30,000 draws from 3,000 rows: the ids of the reference but for floating-point ties."""
    logits = LogitsCase((10, 300), vocab).build(CPU, 1)[0].repeat(1, 10, 1)
    assert_same_draws(draw_of(logits, dx.random_key(3)))


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("vocab", [50257, 262144])
def test_long_rows(isa, vocab, filters):
    """As floats where they lie, and converted a chunk at a time where they do not."""
    for dtype in (torch.float32, torch.bfloat16):
        (logits,) = LogitsCase((3,), vocab, dtype, seed=1).build(CPU, 1)
        assert_same_draws(draw_of(logits, dx.random_key(vocab), **filters))


@pytest.mark.parametrize("options", [*FILTERS, {"temperature": 0.0}])
@pytest.mark.parametrize("vocab", [18, 130, 1025])
def test_a_row_gives_the_same_bits_wherever_it_stands(isa, vocab, options):
    """Threads, neighbours and the split of the batch change nothing, though short rows share a register."""
    (logits,) = LogitsCase((300,), vocab).build(CPU, 1)
    keys = dx.random_key(range(300))
    whole = draw_of(logits, keys, **options)()
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        shared = draw_of(logits, keys, **options)()
    finally:
        torch.set_num_threads(before)
    part = draw_of(logits[7:40], keys[7:40], **options)()
    for a, b, c in zip(whole, shared, part, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[7:40], c)


@pytest.mark.parametrize("top_k", [1, 2, 100, 129, 599, 600])
@pytest.mark.parametrize("step", [2.0, 0.125, 2.0**-10])
def test_ties_at_the_threshold(isa, top_k, step):
    """Many equal logits, zeros of both signs among them: the log-probability shows how many were kept."""
    rng = torch.Generator().manual_seed(top_k)
    logits = (torch.randn(40, 600, generator=rng) / step).round() * step
    assert (logits == 0).any()
    for options in ({"top_k": top_k}, {"top_p": top_k / 600}, {"top_k": top_k, "top_p": 0.5}):
        assert_same_draws(draw_of(logits, dx.random_key(1), **options))


@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "vocab_first"])
@pytest.mark.parametrize("width", [1, 3, 4, 15, 16, 63, 64, 65, 257])
def test_embedding_noise(isa, width, layout, dtype):
    """Every width, dtype and layout against the reference in float64, rounded once."""
    (embeddings,) = LogitsCase((3, 5), width, dtype, layout).build(CPU, 1)
    for key in (dx.random_key(-3, 2**40), dx.random_key([1, 2, 2**63])):
        actual = dx.perturb_embeddings(embeddings, 0.3, scale=0.7, key=key)
        expected = dx.perturb_embeddings(embeddings.double(), 0.3, scale=0.7, key=key)
        error = (actual.double() - expected).abs()
        assert (error <= 1.01 * TOLERANCES[dtype].rounding * expected.abs() + 1e-6).all()
    assert_close(dx.perturb_embeddings(torch.zeros(4, 1000), 1.0, key=key[0]).std(), 1.0, scale=3e3)


def test_many_dimensions_and_ids_are_served_by_the_reference():
    """More than a launcher takes."""
    (logits,) = LogitsCase((1, 2, 1, 2, 1, 2, 1, 1, 2, 1), 5).build(CPU, 1)
    key = dx.random_key(0)
    deep, flat = (dx.sample_categorical(z, key=key) for z in (logits, logits.reshape(1, -1, 5)))
    assert torch.equal(deep.tokens.flatten(), flat.tokens.flatten())
    wide = torch.full((2**22 + 1,), -inf)
    wide[-1] = 0.0
    assert dx.sample_categorical(wide, key=key).tokens == 2**22
