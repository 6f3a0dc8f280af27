"""The CUDA kernels' own source, compiled for the CPU: results in every geometry, in any order of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import IntEnum
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import dimo_ext as dx
from dimo_ext import _backend, _memory, divergence
from dimo_ext.divergences import DIVERGENCES
from dimo_ext.reference._logits import guided
from dimo_ext.schedules import MASK_SCHEDULES
from tests.calls import with_gradient
from tests.conftest import LogitsCase, assert_close, assert_gradient, assert_same_draws, cross
from tests.shim import ORDERS, loaded, needs_shim
from tests.test_divergence_in_place import test_it_is_the_gradient_of_the_loss as test_divergence_in_place
from tests.test_masking import test_backends_are_bit_equal as test_any_masking_is_bit_equal  # noqa: F401
from tests.test_random import test_fold_in_is_a_function_of_key_and_number  # noqa: F401

pytestmark = needs_shim

LENGTHS = [1, 2, 3, 4, 5, 31, 33, 63, 64, 65, 127, 128, 129, 255, 257, 1023, 1025, 4095, 4096, 4097, 5000]
DEVICE = torch.device("cpu")
HALF_AND_SINGLE = [torch.float32, torch.float16, torch.bfloat16]
DivergenceKind = IntEnum("DivergenceKind", [d.__name__ for d in DIVERGENCES.values()], start=0)  # as in csrc/ops.h


@pytest.fixture(scope="module", autouse=True)
def _served_by_the_kernels():
    """Operators on CPU tensors run the CUDA kernels."""
    with pytest.MonkeyPatch.context() as patch, dx.use_backend("native"):
        patch.setattr(_backend, "_find_kernel", loaded().kernel)
        for module in (divergence, _memory):
            patch.setattr(module, "native_module", lambda: SimpleNamespace(DivergenceKind=DivergenceKind))
        yield


@pytest.fixture(scope="module")
def device() -> torch.device:
    """For the tests of other files that this one runs once more."""
    return DEVICE


def assert_equals_reference(call: Callable[[], tuple[Tensor, ...]]) -> None:
    served = call()
    with dx.use_backend("reference"):
        expected = call()
    assert all(torch.equal(a, b) for a, b in zip(served, expected, strict=True))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mode", ["exact", "bernoulli"])
@pytest.mark.parametrize("length", LENGTHS)
def test_mask_tokens(shim, length, mode, order):
    """One key and ratio for all, and one a sample; ratios that mask nothing, all, and NaN."""
    shim.order(order)
    tokens = torch.arange(4 * length).view(4, length)
    ratios = torch.tensor([0.0, 0.5, 1.0, torch.nan])
    masked = partial(dx.mask_tokens, tokens, mask_id=-7, mode=mode)
    assert_equals_reference(lambda: masked(0.37, key=dx.random_key(-3, 2**40 + 5)))
    assert_equals_reference(lambda: masked(ratios, key=dx.random_key([5, 6, 7, 8], 9), min_masked=0))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("length", LENGTHS)
def test_init_tokens(shim, length, order):
    """One key for all and one a sample, no token masked, some and all."""
    shim.order(order)
    for vocab, ratio, key in [(17, 0.6, dx.random_key(1)), (1, 0.0, dx.random_key([2, 3])), (2**24, 1.0, None)]:
        key = dx.random_key([-1, 2**63]) if key is None else key
        init = partial(dx.init_tokens, 2, length, vocab_size=vocab, mask_id=-7, r_init=ratio, key=key)
        assert_equals_reference(lambda init=init: (init(),))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("count", [1, 127, 128, 129, 1000])
def test_fold_in(shim, count, order):
    """One block, a partial one, several; a number for all and one a key."""
    shim.order(order)
    keys, numbers = dx.random_key(range(count), 2**40), torch.arange(count) * 2**33 - 5
    assert_equals_reference(lambda: (dx.fold_in(keys, 7), dx.fold_in(keys, numbers), dx.fold_in(keys[0], numbers)))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("count", [0, 1, 4, 511, 512, 513, 3000])
def test_uniform_words(shim, count, order):
    """None, part of a Philox block, one block of threads, several."""
    shim.order(order)
    key = dx.random_key(-3, 2**40 + 5)
    assert_equals_reference(lambda: (torch.ops.dimo_ext.uniform_words(key, count),))


def value_and_gradient(teacher: Tensor, auxiliary: Tensor, name: str, **options) -> tuple[Tensor, Tensor]:
    auxiliary = auxiliary.detach().requires_grad_()
    value = dx.token_divergence(teacher, auxiliary, name, **options)
    (gradient,) = torch.autograd.grad(torch.where(value.isfinite(), value, 0.0).sum(), auxiliary)
    return value.detach(), gradient


# Geometries: one lane a row, 4, 16, a warp with 2 and with 4 packs a thread, several warps, longer than a block holds.
VOCABULARIES = [1, 17, 33, 65, 129, 300, 1025, 2049, 17001]
# What GPUs with clusters do otherwise: a warp, several, two blocks a row.
GEOMETRIES = [*((vocab, False) for vocab in VOCABULARIES), (300, True), (2049, True), (17001, True)]
LAYOUTS = ["contiguous", "sliced", "vocab_first"]
NAMES = [*(name for name in DIVERGENCES if name not in ("jeffreys", "alpha")), "jeffreys:-0.2", "alpha:0.5", "alpha:-1"]


def flat(cases: Iterable[tuple]) -> list[tuple]:
    """(vocab, hopper) and others, one after another."""
    return [(*geometry, *others) for geometry, *others in cases]


@pytest.mark.parametrize(
    ("vocab", "hopper", "name", "dtype", "layout", "pattern", "temperature"),
    flat(cross(GEOMETRIES, NAMES, HALF_AND_SINGLE, LAYOUTS, ["normal", "minus_inf", "near"], [1.0, 0.9])),
)
def test_token_divergence(shim, vocab, hopper, name, dtype, layout, pattern, temperature):
    """Every geometry, divergence, dtype, layout and kind of logits against float64; some rows do not count."""
    shim.order(vocab)
    shim.hopper(hopper)
    compare_divergence((3, 7), vocab, name, dtype, layout, pattern, temperature)


# Blocks a cluster: 2 (one id more than a block holds), 3, 9, 16.
@pytest.mark.parametrize(
    ("vocab", "name", "dtype", "layout", "pattern", "temperature"),
    cross(
        [16897, 40003, 135301, 262144], ["jeffreys:-0.2", "alpha:0.5"], HALF_AND_SINGLE, ["contiguous", "sliced"],
        ["normal", "minus_inf"], [1.0, 0.9],
    ),
)  # fmt: skip
def test_token_divergence_in_clusters(shim, vocab, name, dtype, layout, pattern, temperature):
    """The same of rows that many blocks share; one cluster has two of them that count."""
    shim.order(vocab)
    shim.hopper(True)
    compare_divergence((1, 5), vocab, name, dtype, layout, pattern, temperature)


@pytest.mark.parametrize(
    ("dtype", "layout", "pattern", "reduction"),
    cross(HALF_AND_SINGLE, ["contiguous", "sliced"], ["normal", "minus_inf", "extreme"], ["none", "mean"]),
)
def test_divergence_in_place_in_clusters(shim, device, dtype, layout, pattern, reduction):
    """Two blocks a row, which wait for each other before they overwrite it."""
    shim.hopper(True)
    test_divergence_in_place(device, 17001, "jeffreys:0.3", dtype, layout, pattern, reduction)


def compare_divergence(shape, vocab, name, dtype, layout, pattern, temperature) -> None:
    teacher, auxiliary, uncond = LogitsCase(shape, vocab, dtype, layout, pattern, seed=vocab).build(DEVICE, 3)
    mask = torch.arange(teacher[..., 0].numel()).view(shape) % 3 > 0
    scale = torch.tensor([1.5, 1.0, -0.5])[: shape[0]]
    options = {"guidance_scale": scale, "teacher_temperature": temperature, "mask": mask}
    actual, gradient = value_and_gradient(teacher, auxiliary, name, teacher_uncond_logits=uncond, **options)
    teacher, auxiliary, uncond = (z.double() for z in (teacher, auxiliary, uncond))
    with dx.use_backend("reference"):
        value, expected = value_and_gradient(teacher, auxiliary, name, teacher_uncond_logits=uncond, **options)
    expected[expected.abs().amax(-1) >= torch.finfo(dtype).max] = 0.0  # the dtype cannot hold the row's gradient
    if name == "total_variation":  # its gradient jumps where p = q, on one side of which rounding puts the entry
        mixed = guided(teacher, uncond, 1.0, scale)
        jumps = ((mixed / temperature).log_softmax(-1) - auxiliary.log_softmax(-1)).abs() < 4e-6
        gradient[jumps] = expected[jumps].to(dtype)
    assert_close(actual, value)
    assert_gradient(gradient, expected, near=pattern == "near")


@pytest.mark.parametrize(("vocab", "hopper"), GEOMETRIES)
def test_divergence_reads_no_row_that_does_not_count(shim, vocab, hopper):
    """Whatever stands there; and the same bits in every order of threads."""
    shim.hopper(hopper)
    teacher, auxiliary = LogitsCase((5,), vocab).build(DEVICE, 2)
    mask = torch.tensor([True, False, True, True, False])
    shim.order(0)
    clean = value_and_gradient(teacher, auxiliary, "jeffreys:0.3", mask=mask)
    for order, poison in enumerate([torch.nan, torch.inf, -torch.inf]):
        shim.order(1 + order)
        dirty = [z.masked_fill(~mask[:, None], poison) for z in (teacher, auxiliary)]
        assert all(map(torch.equal, clean, value_and_gradient(*dirty, "jeffreys:0.3", mask=mask)))
    assert clean[0][~mask].eq(0).all()
    assert clean[1][~mask].eq(0).all()


@pytest.mark.parametrize(("vocab", "hopper"), [geometry for geometry in GEOMETRIES if geometry[0] > 1])
def test_divergence_counts_the_gradients_that_it_zeroes(shim, vocab, hopper):
    """A filtered teacher under reverse KL, a diverged row, a row without a finite logit, the floor."""
    shim.hopper(hopper)
    teacher, auxiliary = LogitsCase((6,), vocab).build(DEVICE, 2)
    teacher[1, 0], teacher[2, 3], teacher[3] = -torch.inf, torch.nan, -torch.inf
    auxiliary.requires_grad_()
    value, zeroed = dx.token_divergence(teacher, auxiliary, "reverse_kl", count_zeroed=True)
    assert value[1] == torch.inf
    assert value[2].isnan()
    assert value[3] == 0
    assert zeroed == 2
    floored = dx.token_divergence(teacher, auxiliary, "reverse_kl", teacher_log_floor=-20.0)
    assert floored[1].isfinite()


# Lanes of a warp, a warp, one warp a block, several, rows too long for a block without clusters.
CROSS_ENTROPY_VOCABULARIES = [1, 17, 20, 65, 257, 300, 1025, 1100, 4097, 25001]
# Two blocks a row, or four of float32.
CROSS_ENTROPY_GEOMETRIES = [*((vocab, False) for vocab in CROSS_ENTROPY_VOCABULARIES), (25001, True)]


@pytest.mark.parametrize(
    ("vocab", "hopper", "dtype", "layout", "pattern", "smoothing", "reduction"),
    flat(
        cross(
            CROSS_ENTROPY_GEOMETRIES, HALF_AND_SINGLE, LAYOUTS, ["normal", "minus_inf", "one_finite"], [0.0, 0.1],
            ["none", "sum", "mean", "batchmean"],
        )
    ),
)  # fmt: skip
def test_masked_cross_entropy(shim, vocab, hopper, dtype, layout, pattern, smoothing, reduction):
    """Every geometry, dtype, layout and kind of logits against float64; some rows do not count."""
    shim.order(vocab)
    shim.hopper(hopper)
    compare_cross_entropy((3, 7), vocab, dtype, layout, pattern, smoothing, reduction)


# Blocks a cluster, of half types and float32: 4 and 8, 8 and 16, 16 and too many, when rows are read twice.
@pytest.mark.parametrize(
    ("vocab", "dtype", "layout", "pattern", "smoothing", "reduction"),
    cross(
        [50257, 100003, 262144], HALF_AND_SINGLE, ["contiguous", "sliced"], ["normal", "minus_inf"], [0.0, 0.1],
        ["none", "mean"],
    ),
)  # fmt: skip
def test_masked_cross_entropy_in_clusters(shim, vocab, dtype, layout, pattern, smoothing, reduction):
    """The same of rows that many blocks share; one cluster has two of them that count."""
    shim.order(vocab)
    shim.hopper(True)
    compare_cross_entropy((1, 5), vocab, dtype, layout, pattern, smoothing, reduction)


def compare_cross_entropy(shape, vocab, dtype, layout, pattern, smoothing, reduction) -> None:
    (logits,) = LogitsCase(shape, vocab, dtype, layout, pattern, seed=vocab).build(DEVICE, 1)
    logits[-1, 2] = -torch.inf
    targets = torch.randint(-1, vocab + 1, shape, generator=torch.Generator().manual_seed(vocab))
    mask = torch.arange(targets.numel()).view(shape) % 3 > 0
    for valid_vocab in {None, max(vocab - 3, 1)}:

        def loss(z, valid_vocab=valid_vocab):
            return dx.masked_cross_entropy(
                z, targets, mask, label_smoothing=smoothing, reduction=reduction, valid_vocab=valid_vocab
            )

        actual = with_gradient(loss, logits)
        with dx.use_backend("reference"):
            expected = with_gradient(loss, logits.double())
        assert_close(actual[0], expected[0])
        assert_gradient(actual[1], expected[1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("vocab", "hopper"), CROSS_ENTROPY_GEOMETRIES)
def test_cross_entropy_reads_no_row_that_does_not_count(shim, vocab, hopper, layout):
    """Whatever stands there; and the same bits in every order of threads."""
    shim.hopper(hopper)
    (logits,) = LogitsCase((5,), vocab, layout=layout).build(DEVICE, 1)
    mask, targets = torch.tensor([True, False, True, True, True]), torch.tensor([0, 0, vocab - 1, 0, vocab])

    def run(z):
        return with_gradient(lambda z: dx.masked_cross_entropy(z, targets, mask), z)

    shim.order(0)
    clean, counted = run(logits), mask & (targets < vocab)
    for order, poison in enumerate([torch.nan, torch.inf, -torch.inf]):
        shim.order(1 + order)
        logits[~counted] = poison  # in place: the order of additions depends on where a row begins
        assert all(map(torch.equal, clean, run(logits)))
    assert clean[1][~counted].eq(0).all()


@pytest.mark.parametrize("rows", [1, 3000, 5000, 70000])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_cross_entropy_counts_and_adds_up_many_tokens(shim, rows, reduction):
    """One block and several that count; several that add up."""
    logits, targets = torch.randn(rows, 3, generator=torch.Generator().manual_seed(1)), torch.arange(rows) % 5
    value, gradient = with_gradient(lambda z: dx.masked_cross_entropy(z, targets, reduction=reduction), logits)
    counted = targets < 3
    expected = torch.nn.functional.cross_entropy(logits.double(), targets.masked_fill(~counted, -100), reduction="sum")
    assert_close(value, expected / (counted.sum() if reduction == "mean" else 1))
    assert gradient[~counted].eq(0).all()


@pytest.mark.parametrize(("vocab", "hopper"), CROSS_ENTROPY_GEOMETRIES)
def test_cross_entropy_of_a_diverged_row(shim, vocab, hopper):
    """NaN is its value, 0 its gradient, as in the reference."""
    shim.hopper(hopper)
    (logits,) = LogitsCase((4,), vocab).build(DEVICE, 1)
    logits[1, 0], logits[2, -1] = torch.nan, torch.inf
    targets = torch.zeros(4, dtype=torch.int64)
    value, gradient = with_gradient(lambda z: dx.masked_cross_entropy(z, targets, reduction="none"), logits)
    assert value.isnan().tolist() == [False, True, True, False]
    assert gradient[1:3].eq(0).all()
    assert gradient.isfinite().all()


# A lane, part of a warp, a warp and a block a row; one chunk and several, full and partial ones.
DRAWN = [1, 2, 5, 16, 17, 32, 33, 34, 64, 65, 255, 256, 257, 1024, 1025, 4097]
FILTERS = [{}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 40, "top_p": 0.9, "min_p": 0.02}]


@pytest.mark.parametrize(
    ("vocab", "dtype", "layout", "pattern", "filters", "temperature", "own_keys"),
    cross(
        DRAWN, HALF_AND_SINGLE, LAYOUTS, ["normal", "minus_inf", "padded", "constant"], FILTERS, [0.0, 0.7, 3.0],
        [False, True],
    ),
)  # fmt: skip
def test_sample_categorical(shim, vocab, dtype, layout, pattern, filters, temperature, own_keys):
    """Every geometry, dtype, layout, filter and kind of logits, a guidance scale a sample, a row that is none."""
    shim.order(vocab)
    logits, uncond = LogitsCase((3, 7), vocab, dtype, layout, pattern, seed=vocab).build(DEVICE)
    logits[1, 2, vocab // 2], logits[2, 3] = torch.nan, -torch.inf
    key = dx.random_key([7, 2**64 - 1, 0] if own_keys else -3, 2**33 + 1)
    options = {k: min(v, vocab) if k == "top_k" else v for k, v in filters.items()} | {"temperature": temperature}
    scale = torch.tensor([1.0, 1.5, -0.5])
    assert_same_draws(lambda: dx.sample_categorical(logits, key=key, **options))
    assert_same_draws(
        lambda: dx.sample_categorical(logits, uncond_logits=uncond, guidance_scale=scale, key=key, **options)
    )


@pytest.mark.parametrize("vocab", [8192, 8193, 70000])
@pytest.mark.parametrize("filters", FILTERS)
def test_sample_from_large_vocabularies(shim, vocab, filters):
    """More chunks than a block's warps have lanes."""
    shim.order(vocab)
    (logits,) = LogitsCase((2,), vocab, torch.bfloat16).build(DEVICE, 1)
    assert_same_draws(lambda: dx.sample_categorical(logits, key=dx.random_key(vocab), **filters))


@pytest.mark.parametrize("top_p", [1.0, 0.6])
@pytest.mark.parametrize("top_k", [1, 50, 250, 257, 2047, 2049])
@pytest.mark.parametrize("vocab", [20, 33, 34, 600, 4096, 9000])
def test_sample_from_the_top_k(shim, vocab, top_k, top_p):
    """Few and many stay, with ties at the threshold, fewer finite logits than that, all equal ones."""
    (logits,) = LogitsCase((5,), vocab).build(DEVICE, 1)
    logits[1] = logits[1].round()
    logits[2, vocab // 3 :] = -torch.inf
    logits[3] = 1.5
    logits[4, 0] = torch.nan
    assert_same_draws(lambda: dx.sample_categorical(logits, key=dx.random_key(9), top_k=min(top_k, vocab), top_p=top_p))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("vocab", [17, 300, 4097])
def test_draws_do_not_depend_on_the_order_of_threads(shim, vocab, order):
    """The same bits, filtered or not, more rows than a block takes."""
    (logits,) = LogitsCase((1, 37), vocab).build(DEVICE, 1)
    draw = partial(dx.sample_categorical, logits, key=dx.random_key(3))
    shim.order(100)
    expected = [draw(), draw(top_k=min(vocab, 50), top_p=0.9)]
    shim.order(order)
    for actual, known in zip([draw(), draw(top_k=min(vocab, 50), top_p=0.9)], expected, strict=True):
        assert all(map(torch.equal, actual, known))


@pytest.mark.parametrize(
    ("vocab", "dtype", "layout", "filters", "temperature", "own_keys", "order"),
    cross(DRAWN, HALF_AND_SINGLE, LAYOUTS, FILTERS, [0.7, 3.0], [False, True], ORDERS),
)
def test_reveals(shim, vocab, dtype, layout, filters, temperature, own_keys, order):
    """Masked positions alone are drawn, in every geometry: the reference's reveals, whatever stands elsewhere."""
    shim.order(order)
    logits, uncond = LogitsCase((3, 7), vocab, dtype, layout, seed=vocab).build(DEVICE)
    tokens = torch.arange(21).view(3, 7) % 3
    logits[tokens != 1] = torch.nan
    key = dx.random_key([7, 2**64 - 1, 0] if own_keys else -3, 2**33 + 1)
    draw = {k: min(v, vocab) if k == "top_k" else v for k, v in filters.items()} | {"temperature": temperature}
    draw |= {"uncond_logits": uncond, "guidance_scale": torch.tensor([1.0, 1.5, -0.5]), "key": key}
    chances, counts = torch.tensor([0.5, 1.0, 0.0]), torch.tensor([2, 7, -1])
    for chance, count in [(0.4, 1), (chances, counts)]:
        assert_equals_reference(lambda p=chance: (dx.reveal_ancestral(logits, tokens, p, 1, **draw),))
        assert_equals_reference(lambda n=count: (dx.reveal_confident(logits, tokens, n, 1, noise_scale=2.0, **draw),))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("length", LENGTHS)
def test_confident_reveals_of_any_length(shim, length, noise, order):
    """Ties everywhere, or nowhere; none revealed, some, all."""
    shim.order(order)
    logits, tokens = torch.zeros(2, length, 2), torch.arange(2 * length).view(2, length) % 5
    for count in (0, 1, length // 8 + 1, length):
        reveal = partial(dx.reveal_confident, logits, tokens, count, 1, noise_scale=noise, key=dx.random_key(length))
        assert_equals_reference(lambda reveal=reveal: (reveal(),))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 257, 1024])
def test_perturb_embeddings(shim, width, layout, dtype):
    """Every dtype and layout, one key and one a sample."""
    (embeddings,) = LogitsCase((3, 7), width, dtype, layout).build(DEVICE, 1)
    for key in (dx.random_key(-3, 2**40), dx.random_key([1, 2, 2**63])):
        actual = dx.perturb_embeddings(embeddings, 0.3, scale=0.7, key=key)
        with dx.use_backend("reference"):
            expected = dx.perturb_embeddings(embeddings.double(), 0.3, scale=0.7, key=key)
        assert_gradient(actual, expected)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("width", [1, 4, 5, 257])
def test_embed_and_perturb(shim, width, transposed, dtype):
    """Rows of a table, ids outside of it the first or the last."""
    table = torch.randn(11, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    table = table.T.contiguous().T if transposed else table
    tokens = torch.arange(-3, 18).view(3, 7)
    for key in (dx.random_key(-3, 2**40), dx.random_key([1, 2, 2**63])):
        actual = dx.embed_and_perturb(tokens, table, 0.3, scale=0.7, key=key)
        assert torch.equal(actual, dx.perturb_embeddings(table[tokens.clamp(0, 10)], 0.3, scale=0.7, key=key))


@pytest.mark.parametrize("schedule", MASK_SCHEDULES)
def test_mask_tokens_by_a_schedule(shim, schedule):
    tokens, times = torch.zeros(200, 300, dtype=torch.int64), torch.linspace(-0.1, 1.1, 200)
    masked = partial(dx.mask_tokens, tokens, times, -7, schedule=schedule, min_masked=0, key=dx.random_key(1))
    assert_equals_reference(masked)
