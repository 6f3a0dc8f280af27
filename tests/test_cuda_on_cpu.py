"""The CUDA kernels' own source, compiled for the CPU: results, thread orders, and the faults that this harness catches.

tests/cuda_on_cpu/cuda_runtime_api.h says how. Sanitizers run under `make sanitize`.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from enum import IntEnum
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
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
from tests.test_divergence_in_place import test_it_is_the_gradient_of_the_loss as test_divergence_in_place
from tests.test_masking import test_backends_are_bit_equal as test_any_masking_is_bit_equal  # noqa: F401
from tests.test_random import test_fold_in_is_a_function_of_key_and_number  # noqa: F401

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX") or next(filter(shutil.which, ["g++", "clang++"]), None)
SUPPORTED = platform.system() == "Linux" and platform.machine() in ("x86_64", "aarch64")

pytestmark = [
    pytest.mark.skipif(not SUPPORTED, reason="switches stacks on Linux on x86-64 and aarch64 only"),
    pytest.mark.skipif(not (COMPILER and shutil.which("make")), reason="needs make and g++ or clang++"),
]

LENGTHS = [1, 2, 3, 4, 5, 31, 33, 63, 64, 65, 127, 128, 129, 255, 257, 1023, 1025, 4095, 4096, 4097, 5000]
ORDERS = range(3)  # seeds of the order in which threads run
THREADS = 64  # of selftest.cu
LANES = np.arange(THREADS) % 32
DEVICE = torch.device("cpu")
HALF_AND_SINGLE = [torch.float32, torch.float16, torch.bfloat16]


def built(target: str) -> Path:
    """The shared library, or a program; compiled anew where a source has changed."""
    command = ["make", "-s", "-f", "tests/cuda_on_cpu/Makefile", f"-j{os.cpu_count()}", f"CXX={COMPILER}", target]
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build" / "cuda_on_cpu.lock").open("w") as lock:  # tests may run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return ROOT / "build" / "cuda_on_cpu" / target


class Shim:
    """Calls launchers on arrays' addresses; a launch that fails raises RuntimeError."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(str(built("library")))
        self.library.cuda_on_cpu_error.restype = ctypes.c_char_p

    def __call__(self, launcher: str, *arguments) -> None:
        if getattr(self.library, launcher)(*map(_as_c, arguments)) != 0:
            raise RuntimeError(self.library.cuda_on_cpu_error().decode())

    def order(self, seed: int) -> None:
        """Seeds the order of blocks and threads."""
        self.library.cuda_on_cpu_seed(ctypes.c_uint64(seed))

    def hopper(self, yes: bool) -> None:
        """Whether the GPU has clusters and mailboxes."""
        self.library.cuda_on_cpu_hopper(ctypes.c_int64(yes))

    def kernel(self, operator: str, *_) -> tuple[Callable[..., None], None]:
        """What dimo_ext calls for a native kernel, which also takes the number of CPU threads."""
        call = getattr(self, operator, partial(self, operator))
        return (lambda *arguments: call(*arguments[:-1])), None

    # The nested arguments of the compiled module, one after another.

    def token_divergence(
        self, kind, parameter, sizes, logits, guidance, temperatures, mask, factor, value, zeroed, _
    ) -> None:
        rows, ticket = _flat(sizes, logits), np.zeros(1, np.int32) if mask else 0  # as with a mask on a GPU
        self(
            "token_divergence", kind, parameter, *rows, *guidance, *temperatures, mask, *factor, value, zeroed, ticket
        )  # fmt: skip

    def masked_cross_entropy(self, sizes, logits, targets, mask, valid_vocab, smoothing, factor, *outputs) -> None:
        rows = _flat(sizes, logits)
        self("masked_cross_entropy", *rows, targets, mask, valid_vocab, smoothing, *factor, *outputs)

    def sample_categorical(self, sizes, logits, guidance, key, temperature, filters, *outputs) -> None:
        self("sample_categorical", *_flat(sizes, logits), *guidance, *key, temperature, *filters, *outputs)

    def reveal_ancestral(self, sizes, logits, guidance, key, temperature, filters, state, mask_id, chance, out) -> None:
        draw = (*_flat(sizes, logits), *guidance, *key, temperature, *filters)
        self("reveal_ancestral", *draw, state, mask_id, *chance, out)

    def reveal_confident(
        self, sizes, logits, guidance, key, temperature, filters, state, mask_id, count, noise, workspace, out
    ) -> None:
        draw = (*_flat(sizes, logits), *guidance, *key, temperature, *filters)
        self("reveal_confident", *draw, state, mask_id, *count, noise, *workspace, out)

    def perturb_embeddings(self, sizes, embeddings, rows_per_sample, key, sigma, scale, ids) -> None:
        self("perturb_embeddings", *_flat(sizes, embeddings), rows_per_sample, *key, sigma, scale, *ids)

    def embed_and_perturb(self, *arguments) -> None:
        self.perturb_embeddings(*arguments)


def _flat(sizes, logits) -> list:
    rows = [(0, 0, np.zeros(1)) if z is None else (*z[:2], np.array(z[2])) for z in logits]
    return [len(sizes) - 1, np.array(sizes), *(argument for row in rows for argument in row)]


def _as_c(argument):
    if isinstance(argument, float):
        return ctypes.c_double(argument)
    if isinstance(argument, np.ndarray):
        return argument.ctypes
    return argument if isinstance(argument, bytes) else ctypes.c_int64(argument)


DivergenceKind = IntEnum("DivergenceKind", [d.__name__ for d in DIVERGENCES.values()], start=0)  # as in csrc/ops.h


@pytest.fixture(scope="module")
def shim() -> Shim:
    return Shim()


@pytest.fixture(scope="module", autouse=True)
def _served_by_the_kernels(shim):
    """Operators on CPU tensors run the CUDA kernels."""
    with pytest.MonkeyPatch.context() as patch, dx.use_backend("native"):
        patch.setattr(_backend, "_find_kernel", shim.kernel)
        for module in (divergence, _memory):
            patch.setattr(module, "native_module", lambda: SimpleNamespace(DivergenceKind=DivergenceKind))
        yield


@pytest.fixture(autouse=True)
def _without_clusters(shim):
    yield
    shim.hopper(False)


@pytest.fixture(scope="module")
def device() -> torch.device:
    """For the tests of other files that this one runs once more."""
    return torch.device("cpu")


# --- the library's kernels ------------------------------------------------------------------------------------------


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


# --- what the shim promises to do -----------------------------------------------------------------------------------


def source_lane(shuffle: str, argument: int, width: int) -> np.ndarray:
    """The lane that each lane reads, as the CUDA C++ programming guide defines it."""
    inside, segment = LANES % width, LANES - LANES % width
    if shuffle == "index":
        return segment + argument % width
    if shuffle == "up":
        return np.where(inside >= argument, LANES - argument, LANES)
    if shuffle == "down":
        return np.where(inside + argument < width, LANES + argument, LANES)
    return np.where((LANES ^ argument) < segment + width, LANES ^ argument, LANES)


@pytest.mark.parametrize("width", [2, 8, 32])
@pytest.mark.parametrize("argument", [0, 1, 5, 16, 31])
@pytest.mark.parametrize("shuffle", ["index", "up", "down", "xor"])
def test_shuffles(shim, shuffle, argument, width):
    """Each lane gets what its source gave, in 32 and 64 bits."""
    kind = ["index", "up", "down", "xor"].index(shuffle)
    for launcher, dtype in [("shuffle32", np.float32), ("shuffle64", np.float64)]:
        given = np.random.default_rng(0).normal(size=THREADS).astype(dtype)
        taken = np.zeros_like(given)
        shim(launcher, given, taken, kind, argument, width)
        expected = given[np.arange(THREADS) // 32 * 32 + source_lane(shuffle, argument, width)]
        assert np.array_equal(taken, expected)


@pytest.mark.parametrize("split", [1, 7, 16, 31])
def test_votes(shim, split):
    """Ballot, any and all among the lanes of two masks at once."""
    rng = np.random.default_rng(split)
    for share in (0.0, 0.1, 0.9, 1.0):
        given, votes = (rng.random(THREADS) < share).astype(np.int32), np.zeros((THREADS, 3), np.uint32)
        shim("vote", given, votes, split)
        for warp in (0, 32):
            for lanes in (range(split), range(split, 32)):
                said = given[warp + np.array(lanes)]
                ballot = sum(1 << lane for lane, yes in zip(lanes, said, strict=True) if yes)
                expected = [ballot, said.any(), said.all()]
                assert (votes[warp + np.array(lanes)] == expected).all()


def test_atomics(shim):
    """Sums, extremes and bits over several blocks; a loop around compare-and-swap adds up too."""
    given = np.random.default_rng(0).integers(-100, 100, 5 * THREADS).astype(np.int32)
    out, total, bits = np.zeros(4, np.int32), np.zeros(1, np.float32), np.zeros(1, np.uint64)
    shim("atomics", given, out, total, bits, 5)
    assert out.tolist() == [given.sum(), given.max(), given.min(), given.sum()]
    assert total == 0.5 * given.size
    assert int(bits[0]) == np.bitwise_or.reduce(1 << (given.astype(object) & 63))


@pytest.mark.parametrize("low", [0, 1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001])
def test_conversions(shim, low):
    """Every half number, and floats around every boundary between halves, as torch converts them."""
    count = 2**16
    every = torch.arange(count, dtype=torch.int32).to(torch.uint16)
    given = ((np.arange(count, dtype=np.uint32) << 16) | low).view(np.float32)
    rounded = np.zeros((2, count), np.uint16)
    widened = np.zeros((2, count), np.float32)
    shim("convert", given, *rounded, *widened)
    for i, dtype in enumerate([torch.float16, torch.bfloat16]):
        np.testing.assert_array_equal(widened[i], every.view(dtype).float().numpy())
        expected = torch.from_numpy(given).to(dtype).view(torch.uint16).numpy()
        assert np.array_equal(rounded[i], np.where(np.isnan(given), 0x7FFF, expected))


def reversed_by(shim: Shim, launch: Callable[[np.ndarray, np.ndarray], None], order: int) -> bool:
    given, out = np.arange(THREADS, dtype=np.float32), np.zeros(THREADS, np.float32)
    shim.order(order)
    launch(given, out)
    return np.array_equal(out, given[::-1])


def test_a_missing_barrier_gives_wrong_numbers(shim):
    """Through dynamic shared memory; with its barrier the kernel is right in every order."""
    assert all(reversed_by(shim, partial(shim, "reverse"), order) for order in range(20))
    assert not any(reversed_by(shim, partial(shim, "fault", b"dropped_barrier"), order) for order in range(20))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("cluster", "clusters"), [(1, 3), (2, 3), (9, 2), (16, 1)])
def test_blocks_of_a_cluster_write_to_each_other(shim, cluster, clusters, order):
    """Each has shared memory of its own, dynamic and static; messages come whenever they come."""
    given = np.random.default_rng(0).normal(size=(clusters, cluster)).astype(np.float32)
    taken = np.zeros((clusters, cluster, cluster), np.float32)
    shim.order(order)
    shim.hopper(True)
    for keep, expected in [(False, given[:, None]), (True, given[:, :, None])]:
        shim("exchange_in_clusters", given, taken, cluster, clusters, keep)
        assert np.array_equal(taken, np.broadcast_to(expected, taken.shape))


@pytest.mark.parametrize(("mailbox", "dropped"), [(False, b"dropped_wait"), (True, b"dropped_mailbox_wait")])
def test_copies_are_there_when_they_were_waited_for(shim, mailbox, dropped):
    """A kernel that does not wait reads NaN in some order."""
    given, out, hasty = np.ones(THREADS, np.float32), *np.zeros((2, THREADS), np.float32)
    shim.hopper(True)
    read = []
    for order in range(20):
        shim.order(order)
        shim("copy", given, out, mailbox)
        assert (out[: THREADS // 2] == 1).all()
        shim("fault", dropped, given, hasty)
        read.append(hasty[: THREADS // 2].copy())
    assert np.isnan(read).any()


# --- what the shim promises to catch --------------------------------------------------------------------------------


def failure(shim: Shim, fault: str) -> str:
    given, out = np.zeros(THREADS + 4, np.float32), np.zeros(THREADS, np.float32)
    shim.hopper(True)
    with pytest.raises(RuntimeError, match=rf"{fault}\(float const\*, float\*\), block \([01], 0, 0\)") as caught:
        shim("fault", fault.encode(), given, out)
    return str(caught.value)


@pytest.mark.parametrize(
    ("fault", "operation", "why"),
    [
        ("divergent_barrier", "__syncthreads", "other threads wait elsewhere"),
        ("barrier_after_exit", "__syncthreads", r"deadlock\n *1 threads \(5 to 5\) have exited\n *63 threads"),
        ("absent_lanes", "__shfl_down_sync", "deadlock\n.* 32 threads .* wait in .*mask 0xffffffff"),
        ("lane_outside_mask", "__shfl_xor_sync", "mask 0x0000ffff: the mask leaves out the calling lane"),
        ("source_outside_mask", "__shfl_xor_sync", "mask 0x0000ffff: the mask leaves out the lane that is read"),
        ("misaligned_load", "__ldg", "misaligned address"),
        ("misaligned_copy", "copy_async", "misaligned address"),
        ("lonely_cluster_sync", "cluster_sync", r"deadlock\n block \(0, 0, 0\)\n.* wait in .* 64 threads .* have exit"),
        ("absent_rank", "send", "the cluster has no such block"),
        ("foreign_address", "send", "this is not the block's dynamic shared memory"),
        ("closed_mailbox", "send", "the mailbox is not open"),
        ("wrong_rank", "wait", r"deadlock\n.* block \(1, 0, 0\)\n *64 threads \(0 to 63\) wait in Mailbox::wait"),
        ("too_many_bytes", "wait", r"deadlock\n.* 64 threads .* wait in Mailbox::wait"),
    ],
)
@pytest.mark.parametrize("order", ORDERS)
def test_a_fault_ends_the_launch(shim, fault, operation, why, order):
    """The message names the kernel and the line; the next launch works."""
    shim.order(order)
    message = failure(shim, fault)
    assert re.search(why, message, re.DOTALL), message
    file, line = re.search(rf"{operation} at (\S+):(\d+)", message).groups()
    assert operation in (ROOT / file).read_text().splitlines()[int(line) - 1]
    assert reversed_by(shim, partial(shim, "reverse"), order)


@pytest.mark.parametrize("fault", ["dropped_cluster_sync", "too_few_bytes"])
def test_a_message_to_a_block_that_left_ends_the_launch(shim, fault):
    """In some orders it comes too late."""
    given, out, messages = np.zeros(THREADS, np.float32), np.zeros(THREADS, np.float32), []
    shim.hopper(True)
    for order in range(20):
        shim.order(order)
        with contextlib.suppress(RuntimeError):
            shim("fault", fault.encode(), given, out)
        messages.append(shim.library.cuda_on_cpu_error().decode())
    assert any(re.search(r"Mailbox::send at .* writes to a block that has exited", text) for text in messages), messages


def test_an_endless_loop_ends_the_launch(shim):
    """A loop that waits for others time and again."""
    assert "endless loop" in failure(shim, "endless_loop")


@pytest.mark.parametrize(
    ("threads", "shared_bytes", "cluster", "hopper"),
    [
        *((*launch, False) for launch in [(0, 0, 1), (1025, 0, 1), (32, 2**18, 1), (32, 0, 2)]),
        (32, 0, 3, True),
        (32, 0, 32, True),
    ],
)
def test_an_impossible_launch_is_refused(shim, threads, shared_bytes, cluster, hopper):
    """As a GPU refuses it: also clusters where it has none, larger ones, those that do not divide the grid."""
    shim.hopper(hopper)
    what = f"32 blocks of {threads} threads with {shared_bytes} bytes, {cluster} a cluster, are no launch"
    with pytest.raises(RuntimeError, match=what):
        shim("refused", threads, shared_bytes, cluster)


# --- sanitizers -----------------------------------------------------------------------------------------------------

sanitized = pytest.mark.skipif(not os.environ.get("DIMO_SANITIZE"), reason="`make sanitize` runs it")


def run_program(sanitizer: str, *arguments: str) -> tuple[int, str]:
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}  # a race may leave a kernel in an endless loop
    command = [built(sanitizer), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


@sanitized
@pytest.mark.parametrize("sanitizer", ["asan", "tsan"])
def test_kernels_are_clean(sanitizer):
    """Every kernel at small sizes: nothing to report, and the results of the CPU kernels."""
    assert run_program(sanitizer) == (0, "")


@sanitized
@pytest.mark.parametrize(
    ("sanitizer", "fault", "report", "lines"),
    [
        ("asan", "static_overrun", "global-buffer-overflow|insufficient space", ["next[threadIdx.x] ="]),
        ("asan", "dynamic_overrun", "heap-buffer-overflow", ["shared_memory<float>()[threadIdx.x + 1] ="]),
        ("asan", "tail_overrun", "heap-buffer-overflow", ["i <= kThreads"]),
        ("asan", "misaligned_access", "misaligned address", ["reinterpret_cast<const float4*>(in + 1)"]),
        ("tsan", "dropped_barrier", "data race", ["row[threadIdx.x] =", "= row[kThreads - 1 - threadIdx.x]"]),
        ("tsan", "unguarded_count", "data race", ["*out += 1.0f"]),
        ("tsan", "hasty_message", "data race", ["inbox.mailbox.send(", "= inbox.board["]),
    ],
)
def test_sanitizers_see(sanitizer, fault, report, lines):
    """The program fails with a report that names the kernel's lines."""
    status, output = run_program(sanitizer, fault)
    assert status != 0
    assert re.search(report, output), output
    named = "\n".join(
        (ROOT / "tests" / "cuda_on_cpu" / file).read_text().splitlines()[int(line) - 1]
        for file, line in re.findall(r"(selftest\w*\.(?:cu|h)):(\d+)", output)
    )
    assert all(line in named for line in lines), output


@sanitized
@pytest.mark.parametrize("sanitizer", ["asan", "tsan"])
@pytest.mark.parametrize("fault", ["divergent_barrier", "too_many_bytes", "closed_mailbox"])
def test_a_failed_launch_leaves_nothing_to_report(sanitizer, fault):
    """Threads that were abandoned are no leak and no race, nor are messages on their way."""
    status, output = run_program(sanitizer, fault)
    assert status == 1
    assert output.startswith(f"dimo::cuda::(anonymous namespace)::{fault}"), output
    assert "Sanitizer" not in output
