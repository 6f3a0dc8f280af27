"""Rows over the CPU's threads: torch's own team where it is there, threads of the call where it is not."""

from __future__ import annotations

import multiprocessing
import threading

import pytest
import torch

import dimo_ext as dx

pytest.importorskip("dimo_ext._core")

LOGITS = torch.randn(2000, 301, generator=torch.Generator().manual_seed(0))  # several tasks


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def draws() -> torch.Tensor:
    return dx.sample_categorical(LOGITS, key=dx.random_key(1)).tokens


def _child(queue) -> None:
    torch.set_num_threads(2)
    queue.put([draws().tolist() for _ in range(2)])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # forking a process with threads is what is tested
def test_a_forked_process_starts_threads_of_its_own():
    """OpenMP's threads stay with the parent: a child that waited for them would wait for ever."""
    torch.randn(1000, 1000).exp_()  # with torch's threads
    expected = draws().tolist()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_child, args=(queue,))
    process.start()
    try:
        assert queue.get(timeout=60) == [expected, expected]
    finally:
        process.join(timeout=10)
        process.kill()
    assert draws().tolist() == expected


def test_many_callers_at_once():
    """Each Python thread has a team; none takes another's rows."""
    expected, wrong = draws(), []

    def call() -> None:
        torch.set_num_threads(2)  # per thread in OpenMP
        wrong.extend(1 for _ in range(20) if not torch.equal(draws(), expected))

    callers = [threading.Thread(target=call) for _ in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_any_number_of_threads_gives_the_same_bits(count):
    torch.set_num_threads(2)
    expected = dx.token_divergence(LOGITS, LOGITS.flip(0), "jensen_shannon")
    torch.set_num_threads(count)
    assert torch.equal(dx.token_divergence(LOGITS, LOGITS.flip(0), "jensen_shannon"), expected)
