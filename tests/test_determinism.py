"""Results are a function of inputs and key alone: repeats, threads, processes, other generators, known values."""

from __future__ import annotations

import multiprocessing
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import dimo_ext as dx
from dimo_ext import _backend
from dimo_ext.random import random_integers
from tests.calls import CALLS, FORWARD, Inputs, every_call
from tests.conftest import DTYPES


def test_every_operator_is_covered_here():
    assert {name.split(":")[0] for name in CALLS} == set(_backend.OPERATORS)


def assert_same_bits(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """This many threads for torch and for the kernels on the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- the same call again --------------------------------------------------------------------------------------------


@every_call
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_agree_bit_for_bit(device, name, dtype):
    x = Inputs.build(device, dtype)
    assert_same_bits(CALLS[name](x), CALLS[name](x))


@every_call
def test_the_number_of_threads_does_not_matter(name):
    """Tokens, masks and keys are the same for any number of threads; with two threads, repeats are bit-equal."""
    x = Inputs.build("cpu", batch=4, length=32, vocab=1025)
    with threads(1):
        alone = CALLS[name](x)
    with threads(2):
        shared, again = CALLS[name](x), CALLS[name](x)
    assert_same_bits(shared, again)
    assert_same_bits([b for b in shared if not b.is_floating_point()], [a for a in alone if not a.is_floating_point()])


@every_call
@pytest.mark.filterwarnings("ignore:.*deterministic")  # of torch's own operations on a GPU
def test_no_output_is_left_unwritten(device, name):
    """In this mode torch fills what it allocates with NaN and the largest integers."""
    x = Inputs.build(device)
    expected = CALLS[name](x)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert_same_bits(CALLS[name](x), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@every_call
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_does_not_matter(device, name, dtype):
    x = Inputs.build(device)
    expected = CALLS[name](x)
    torch.set_default_dtype(dtype)
    try:
        assert_same_bits(CALLS[name](x), expected)
    finally:
        torch.set_default_dtype(torch.float32)


# --- beside others --------------------------------------------------------------------------------------------------


def test_two_threads_get_what_one_gets(device):
    """Both run every operator at once, each on inputs of its own."""
    inputs, start = [Inputs.build(device), Inputs.build(device)], threading.Barrier(2)
    inputs[1].advance()
    expected = [{name: run(x) for name, run in CALLS.items()} for x in inputs]
    results = [{}, {}]

    def work(i: int) -> None:
        start.wait()
        results[i].update((name, run(inputs[i])) for name, run in CALLS.items())

    workers = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for result, known in zip(results, expected, strict=True):
        assert result.keys() == known.keys()
        for name in CALLS:
            assert_same_bits(result[name], known[name])


# As text, since a spawned child cannot import a test module by itself; torch's own thread pool does not survive a fork,
# nor does its autograd engine where there is a GPU.
IN_A_CHILD = """
import sys
sys.path.append(root)  # behind the installed package
import torch
from tests.calls import FORWARD, Inputs
torch.set_num_threads(1)
x = Inputs.build("cpu")
queue.put({name: [y.tolist() for y in run(x)] for name, run in FORWARD.items()})
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # forking a process with threads is what is tested
def test_child_processes(method):
    context, x = multiprocessing.get_context(method), Inputs.build("cpu")
    with threads(1):
        expected = {name: [y.tolist() for y in run(x)] for name, run in FORWARD.items()}
    queue, root = context.Queue(), str(Path(__file__).parents[1])
    child = context.Process(target=exec, args=(IN_A_CHILD, {"queue": queue, "root": root}))
    child.start()
    try:
        assert queue.get(timeout=60) == expected
    finally:
        child.join(timeout=10)
        child.kill()
    assert child.exitcode == 0


# --- other sources of randomness ------------------------------------------------------------------------------------


def generator_states() -> list[object]:
    """Torch's default generators, Python's and numpy's."""
    name, words, *rest = np.random.get_state()  # noqa: NPY002 (the legacy generator is the global one)
    everywhere = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]
    return [*(state.tolist() for state in everywhere), random.getstate(), name, words.tolist(), rest]


@every_call
def test_with_a_key_no_generator_moves(device, name):
    x = Inputs.build(device)
    before = generator_states()
    CALLS[name](x)
    assert generator_states() == before


FROM_A_GENERATOR = {
    "mask_tokens": lambda x, g: dx.mask_tokens(x.tokens, 0.5, -1, generator=g).tokens,
    "init_tokens": lambda x, g: dx.init_tokens(
        4, 16, vocab_size=300, mask_id=300, r_init=0.5, device=x.tokens.device, generator=g
    ),
    "sample_categorical": lambda x, g: dx.sample_categorical(x.teacher, generator=g).tokens,
    "reveal_ancestral": lambda x, g: dx.reveal_ancestral(x.teacher, x.mask.long(), 0.5, 1, generator=g),
    "reveal_confident": lambda x, g: dx.reveal_confident(x.teacher, x.mask.long(), 4, 1, generator=g),
    "embed_and_perturb": lambda x, g: dx.embed_and_perturb(x.tokens % 16, x.student[0], 0.5, generator=g),
    "perturb_embeddings": lambda x, g: dx.perturb_embeddings(x.student, 0.5, generator=g),
}


@pytest.mark.parametrize("name", FROM_A_GENERATOR)
def test_with_a_generator_no_other_moves(device, name):
    """Its state alone decides, and it moves on."""
    x, generator = Inputs.build(device), torch.Generator(device).manual_seed(3)
    before = generator_states()
    first, second = (FROM_A_GENERATOR[name](x, generator) for _ in range(2))
    assert generator_states() == before
    assert torch.equal(first, FROM_A_GENERATOR[name](x, torch.Generator(device).manual_seed(3)))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", FROM_A_GENERATOR)
def test_without_either_the_devices_default_generator_decides(device, name):
    """torch.manual_seed makes it reproducible; Python's and numpy's generators stay where they are."""
    x, others = Inputs.build(device), generator_states()[-4:]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first, second = (FROM_A_GENERATOR[name](x, None) for _ in range(2))
        torch.manual_seed(3)
        assert torch.equal(first, FROM_A_GENERATOR[name](x, None))
    assert not torch.equal(first, second)
    assert generator_states()[-4:] == others


# --- the draws are part of the contract: values that no later version may change ------------------------------------

KEY_12 = (1, 2)
KNOWN_DRAWS = {
    "fold_in": [-8200629057115953869, -7815700616092848060],
    "init_tokens": [20, 5, -1, -1, 60, 29, 48, 23],
    "mask_tokens": [-1, -1, -1, -1, 4, 5, 6, 7],
    "sample_categorical": [488, 478, 415, 337],
    "perturb_embeddings": [-0.0496, 0.3029, -1.4616, 1.0193],
    "random_integers": [250, 698, 603, 948],
}


def test_known_draws(device):
    key = dx.random_key(*KEY_12, device=device)
    logits = torch.linspace(-2, 2, 600, device=device).repeat(1, 4, 1)
    drawn = {
        "fold_in": dx.fold_in(key, 7).tolist(),
        "init_tokens": dx.init_tokens(1, 8, vocab_size=100, mask_id=-1, r_init=0.25, key=key)[0].tolist(),
        "mask_tokens": dx.mask_tokens(torch.arange(8, device=device), 0.5, -1, key=key).tokens.tolist(),
        "sample_categorical": dx.sample_categorical(logits, key=key).tokens[0].tolist(),
        "perturb_embeddings": [
            round(v, 4) for v in dx.perturb_embeddings(torch.zeros(1, 4, device=device), 1.0, key=key)[0].tolist()
        ],
        "random_integers": random_integers(key, 4, 1000).tolist(),
    }
    assert drawn == KNOWN_DRAWS
