"""Shared by every operator's tests: devices, one tolerance table, comparisons, awkward logits, bad arguments."""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dimo_ext as dx
from dimo_ext._backend import _core
from tests import shim as shims

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci")
_SHARED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("ci", max_examples=15, derandomize=True, database=None, **_SHARED)
settings.register_profile("full", max_examples=200, **_SHARED)
settings.load_profile(PROFILE)

# The command line needs tyro, pictures need Pillow; a machine that only checks the kernels may lack them.
_NEEDS = {
    "tyro": ["test_cli.py", "test_sample.py", "test_teacher_pages.py", "test_text_pages.py", "test_text_samples.py"],
    "PIL": ["test_pictures.py", "test_sample.py", "test_teacher_pages.py", "test_generator.py"],
}
collect_ignore = [test for module, tests in _NEEDS.items() if not importlib.util.find_spec(module) for test in tests]

DEVICES = ["cpu", *(["cuda:0"] if torch.cuda.is_available() else [])]
FALSE_ALARM = 1e-6  # how often a correct sampler fails one statistical test, were its key drawn at random


@pytest.fixture(scope="session", params=DEVICES)
def device(request) -> torch.device:
    """Every device of this machine."""
    return torch.device(request.param)


@pytest.fixture
def shim() -> Iterator[shims.Shim]:
    """The CUDA kernels compiled for the CPU, as on a GPU without clusters unless the test says otherwise."""
    yield shims.loaded()
    shims.loaded().hopper(False)


def cross(*axes: Iterable) -> list[tuple]:
    """For ``parametrize``: every combination under the profile "full", else :func:`pairwise`."""
    return list(itertools.product(*axes)) if PROFILE == "full" else pairwise(*axes)


def pairwise(*axes: Iterable) -> list[tuple]:
    """Few combinations, in which any two values of any two axes meet.

    The rows (a, b, b + a, b + 2a, ...) modulo a prime are an orthogonal array of strength 2 (Bush, 1952).
    """
    axes = [list(axis) for axis in axes]
    least = max(2, len(axes) - 1, *map(len, axes))
    prime = next(n for n in itertools.count(least) if all(n % d for d in range(2, n)))
    rows, met = [], set()
    for a, b in itertools.product(range(prime), repeat=2):
        columns = [a, *((b + k * a) % prime for k in range(len(axes) - 1))]
        row = [column % len(axis) for column, axis in zip(columns, axes, strict=True)]
        pairs = set(itertools.combinations(enumerate(row), min(2, len(row))))
        if not pairs <= met:
            rows.append(tuple(axis[i] for axis, i in zip(axes, row, strict=True)))
            met |= pairs
    return rows


# --- tolerances -----------------------------------------------------------------------------------------------------


class Tolerance(NamedTuple):
    """Against a float64 oracle that is given the same, already rounded inputs."""

    rtol: float  # values, which are float32 for every half type
    atol: float
    gradient: float  # relative L2 error of a row; more only where rounding the exact row to the type costs more
    gradient_near: float  # the same where teacher and auxiliary logits differ by about 0.01
    gradient_atol: float  # what rounding leaves of a row whose exact gradient is 0
    rounding: float  # largest relative error of one rounding to the type


TOLERANCES = {
    torch.float64: Tolerance(1e-10, 1e-13, 1e-10, 1e-10, 1e-12, 2.0**-53),
    torch.float32: Tolerance(2e-5, 2e-6, 1e-5, 1e-3, 1e-6, 2.0**-24),
    torch.float16: Tolerance(2e-5, 2e-6, 1e-3, 1e-3, 2e-6, 2.0**-11),
    torch.bfloat16: Tolerance(2e-5, 2e-6, 3e-3, 3e-3, 1e-6, 2.0**-8),
}
DTYPES = list(TOLERANCES)


def assert_close(
    actual: Tensor, expected: Tensor | float, dtype: torch.dtype = torch.float32, *, scale: float = 1.0
) -> None:
    """Compare with the tolerances of ``dtype`` times ``scale``; equal infinities agree, NaN never does."""
    rtol, atol = (scale * x for x in TOLERANCES[dtype][:2])
    actual, expected = (torch.as_tensor(x, dtype=torch.float64).detach().cpu() for x in (actual, expected))
    assert actual.shape == expected.shape
    assert not torch.isnan(actual).any(), f"NaN in {actual}"
    assert not torch.isnan(expected).any(), f"the oracle itself gives NaN: {expected}"
    finite = torch.isfinite(expected)
    error = torch.where(finite & torch.isfinite(actual), (actual - expected).abs(), inf)
    wrong = torch.where(finite, error > atol + rtol * expected.abs(), actual != expected)
    assert not wrong.any(), f"{actual[wrong][:5]} instead of {expected[wrong][:5]} at {wrong.nonzero()[:5].tolist()}"


def assert_gradient(actual: Tensor, expected: Tensor, *, near: bool = False, terms: Tensor | float = 0.0) -> None:
    """Compare every row's gradient in relative L2, with the limit of the actual gradient's dtype; NaN never passes.

    ``terms`` is the size of what cancels in each row: what any method loses of it, where the row's condition is bad.
    """
    dtype, tolerance = actual.dtype, TOLERANCES[actual.dtype]
    limit = tolerance.gradient_near if near else tolerance.gradient
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    error, size = (actual - expected).norm(dim=-1), expected.norm(dim=-1)
    rounding = (expected.to(dtype).double() - expected).norm(dim=-1)  # up to 4e-3 in a bfloat16 row of two ids
    arithmetic = TOLERANCES[torch.promote_types(dtype, torch.float32)].gradient  # half types compute in float32
    lost = 0.4 * arithmetic * torch.as_tensor(terms, dtype=torch.float64).cpu()
    wrong = ~(error <= torch.maximum(limit * size, 1.02 * rounding) + lost + tolerance.gradient_atol)
    assert not wrong.any(), f"errors {error[wrong][:5]} of {size[wrong][:5]} at rows {wrong.nonzero()[:5].tolist()}"


def assert_equivalent(actual: Tensor, expected: Tensor) -> None:
    """Two ways to one result: integers bit for bit, other scalars and rows within the tolerances."""
    assert actual.dtype == expected.dtype
    if not expected.is_floating_point():
        assert torch.equal(actual.cpu(), expected.cpu())
    elif expected.dim() == 0:
        assert_close(actual, expected, expected.dtype)
    else:
        assert_gradient(actual, expected)


def assert_same_draws(call: Callable[[], tuple[Tensor, Tensor]]) -> None:
    """The reference's ids and log-probabilities; of 10,000 ids one may differ, where two are equally good."""
    tokens, log_prob = call()
    with dx.use_backend("reference"):
        expected = call()
    same = tokens == expected[0]
    assert (~same).sum() <= 1 + tokens.numel() // 10_000, f"{(~same).sum()} of {tokens.numel()} ids differ"
    assert_close(log_prob[same], expected[1][same])


def computed_gradients(operator: torch._ops.OpOverload, call: Callable[[], object]) -> list[int]:
    """Sizes of the gradients, always the last output, that ``operator`` computed while ``call`` ran."""
    sizes: list[int] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            outputs = func(*args, **(kwargs or {}))
            if func is operator:
                sizes.append(outputs[-1].numel())
            return outputs

    with Recorder():
        call()
    return sizes


# --- statistics -----------------------------------------------------------------------------------------------------


def assert_frequencies(counts: Tensor, probabilities: Tensor, alarm: float = FALSE_ALARM) -> None:
    """χ² test of counts against exact probabilities; cells of fewer than 10 expected draws are pooled."""
    counts, expected = counts.double().cpu().numpy(), probabilities.double().cpu().numpy()
    expected = expected * counts.sum()
    assert counts[expected == 0].sum() == 0, "an outcome of probability 0 was drawn"
    rare = (expected < 10) & (expected > 0)
    cells = [(counts[expected >= 10], expected[expected >= 10])]
    if rare.any():
        assert_rate(int(counts[rare].sum()), int(counts.sum()), expected[rare].sum() / counts.sum(), alarm / 2)
        cells.append((counts[rare].sum(keepdims=True), expected[rare].sum(keepdims=True)))
    observed, expected = (np.concatenate(parts) for parts in zip(*cells, strict=True))
    observed, expected = observed[expected >= 10], expected[expected >= 10]
    if len(expected) > 1:
        p = scipy.stats.chi2.sf(((observed - expected) ** 2 / expected).sum(), len(expected) - 1)
        assert p > alarm / 2, f"χ² p-value {p}"


def assert_rate(hits: int, trials: int, probability: float, alarm: float = FALSE_ALARM) -> None:
    """Exact binomial test that events of this probability happened as often as they should."""
    p = scipy.stats.binomtest(hits, trials, min(probability, 1.0)).pvalue
    assert p > alarm, f"{hits} of {trials}, expected {trials * probability}: p-value {p}"


def assert_independent(a: Tensor, b: Tensor, values: int) -> None:
    """χ² test of independence between two equally long sequences of draws from ``range(values)``."""
    table = torch.bincount((a * values + b).flatten().cpu(), minlength=values**2).view(values, values)
    p = scipy.stats.chi2_contingency(table.numpy()).pvalue
    assert p > FALSE_ALARM, f"dependent: p-value {p}"


# --- awkward logits -------------------------------------------------------------------------------------------------

SHAPES = [(), (0,), (1,), (5,), (2, 3), (1, 1, 4), (3, 0), (2, 2, 3)]
VOCABULARIES = [1, 2, 3, 7, 8, 9, 13, 31, 33, 64, 65, 127, 257, 1025]
LAYOUTS = ["contiguous", "sliced", "vocab_first", "batch_second"]
PATTERNS = ["normal", "near", "constant", "extreme", "minus_inf", "padded", "one_finite"]


@dataclass(frozen=True)
class LogitsCase:
    """A reproducible description of logits, so that a failure reads as one line and becomes an ``@example``."""

    shape: tuple[int, ...] = (5,)
    vocab: int = 7
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    pattern: str = "normal"
    seed: int = 0

    def build(self, device: torch.device, count: int = 2) -> list[Tensor]:
        """``count`` tensors of this kind; with "near", all but the first differ from it by about 0.01."""
        rng = torch.Generator().manual_seed(self.seed)
        base = torch.randn(*self.shape, self.vocab, generator=rng, dtype=torch.float64)
        tensors = [self._patterned(base, i, rng) for i in range(count)]
        return [_laid_out(t.to(self.dtype).to(device), self.layout) for t in tensors]

    def _patterned(self, base: Tensor, i: int, rng: torch.Generator) -> Tensor:
        noise = torch.randn(base.shape, generator=rng, dtype=torch.float64)
        if self.pattern == "near":
            return 2.0 * base + 0.01 * noise * (i > 0)
        if self.pattern == "constant":
            return torch.full_like(base, 3.25)
        if self.pattern == "extreme":
            return torch.randint(-1, 2, base.shape, generator=rng).double() * 1e4
        if self.pattern == "minus_inf":
            return noise.masked_fill(torch.rand(base.shape, generator=rng) < 0.4, -inf)
        if self.pattern == "padded":
            return noise.masked_fill(torch.arange(self.vocab) >= max(1, self.vocab // 2), -inf)
        if self.pattern == "one_finite":
            return noise.masked_fill(torch.arange(self.vocab) != (self.seed + i) % self.vocab, -inf)
        return 2.0 * noise


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers with other strides, surrounded by NaN where the layout leaves gaps."""
    if layout == "sliced":  # an unaligned slice of a larger vocabulary and a longer row
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 4), torch.nan)
        wide[..., 1:-3] = x
        return wide[..., 1:-3]
    if layout == "vocab_first":  # [B, V, ...] as convolutional heads produce it
        return x.movedim(-1, min(1, x.dim() - 1)).contiguous().movedim(min(1, x.dim() - 1), -1)
    if layout == "batch_second" and x.dim() > 2:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    return x


def logits_cases(
    *, patterns: list[str] = PATTERNS, dtypes: list[torch.dtype] = DTYPES, max_vocab: int = 1025
) -> st.SearchStrategy[LogitsCase]:
    """Awkward shapes, vocabularies, dtypes, strides and values."""
    return st.builds(
        LogitsCase,
        shape=st.sampled_from(SHAPES),
        vocab=st.sampled_from([v for v in VOCABULARIES if v <= max_vocab]),
        dtype=st.sampled_from(dtypes),
        layout=st.sampled_from(LAYOUTS),
        pattern=st.sampled_from(patterns),
        seed=st.integers(0, 2**16),
    )


# --- bad arguments --------------------------------------------------------------------------------------------------


class _NothingLaunched(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.namespace != "dimo_ext", f"{func} was launched"
        return func(*args, **(kwargs or {}))


def assert_rejected(call: Callable[[], object], name: str, expected: str = "", given: str = "") -> None:
    """The call raises ValueError or TypeError that names the argument, what was expected and what was given.

    It does so before any operator of the library has started.
    """
    with pytest.raises((ValueError, TypeError)) as caught, _NothingLaunched():
        call()
    message = str(caught.value)
    head, got, tail = message.partition(", got ")
    assert head.startswith(f"{name}: expected "), message
    assert got, message
    assert expected in head, message
    assert given in tail, message


META = torch.device("meta")  # a device that no operator's other arguments live on

# What a `key` may not be, for a batch of 2: (value, expected, given).
BAD_KEYS = [
    (3, "int64 tensor", "int 3"),
    (torch.zeros(2, dtype=torch.int32), "dtype int64", "torch.int32"),
    (torch.zeros(2), "dtype int64", "torch.float32"),
    (torch.zeros(3, dtype=torch.int64), "[2] or [2, 2]", "[3]"),
    (torch.zeros(3, 2, dtype=torch.int64), "[2] or [2, 2]", "[3, 2]"),
    (torch.zeros(2, 2, 2, dtype=torch.int64), "[2] or [2, 2]", "[2, 2, 2]"),
    (torch.zeros((), dtype=torch.int64), "[2] or [2, 2]", "[]"),
    (torch.zeros(2, dtype=torch.int64, device=META), "a tensor on", "meta"),
]


@pytest.fixture(params=[] if _core is None else _core.cpu_isas())
def isa(request):
    """Every instruction set of the CPU that this machine runs; skipped without the compiled module."""
    before = _core.cpu_isa()
    _core.choose_cpu_isa(request.param)
    yield request.param
    _core.choose_cpu_isa(before)
