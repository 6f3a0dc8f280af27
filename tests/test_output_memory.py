"""Memory of large outputs on the CPU: what one left serves the next, and nobody else's."""

from __future__ import annotations

import gc
import multiprocessing
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import dimo_ext
from dimo_ext import _backend
from dimo_ext._memory import output_like

pytestmark = pytest.mark.skipif(
    not hasattr(_backend._core, "OutputMemory"), reason="the compiled module keeps no memory here"
)

LARGE = 8 << 20  # bytes


def example(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def address_of(*shape: int) -> int:
    """Where a tensor lies that is gone when this returns."""
    return output_like(example(*shape)).data_ptr()


@pytest.fixture(autouse=True)
def nothing_kept():
    """Push out what earlier tests left: memory of another size, in every place, filled or taken in turn."""
    gc.collect()
    held = [output_like(example((64 << 20) + i)) for i in range(8)]
    del held


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "tensor",
    [
        example(2, 2048, 1025),
        example(4, 1031, 32, 32).movedim(1, -1),
        example(4096, 1031).t(),
        example(3, 4, 1024, 1026)[:, ::2, :, 1:],
        example(1, 1, 4_200_000).expand(3, 1, -1),
    ],
    ids=["dense", "vocabulary first", "transposed", "gaps", "expanded"],
)
def test_it_looks_as_empty_like_does(tensor, dtype):
    tensor = tensor.to(dtype) if tensor.is_contiguous() else torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=dtype
    )  # fmt: skip
    made, expected = output_like(tensor), torch.empty_like(tensor)
    assert (made.shape, made.stride(), made.dtype, made.device) == (
        expected.shape, expected.stride(), expected.dtype, expected.device,
    )  # fmt: skip
    assert not made._is_view()
    assert made.is_leaf
    assert not made.requires_grad
    made.fill_(3)
    assert (made == 3).all()


def test_another_shape_is_contiguous():
    made = output_like(example(7), (3, 1024, 1024))
    assert made.shape == (3, 1024, 1024)
    assert made.is_contiguous()


def test_what_is_gone_serves_the_next():
    first = address_of(2048, 2000)
    assert address_of(2048, 2000) == first
    assert address_of(2048, 1900) == first  # of nearly the same size
    assert address_of(2048, 8000) != first


def test_what_is_alive_is_not_given_twice():
    first = output_like(example(2048, 1025)).fill_(1)
    second = output_like(example(2048, 1025)).fill_(2)
    assert (first == 1).all()
    part, address = first[5:7], first.data_ptr()
    del first
    gc.collect()
    assert address_of(2048, 1025) != address  # the part keeps it
    assert (part == 1).all()
    assert (second == 2).all()


def test_small_tensors_are_torchs():
    """They come from the allocator, where a profile and a memory limit see them."""
    storage = output_like(example(LARGE // 4 - 1)).untyped_storage()
    assert storage.resizable()
    assert not output_like(example(LARGE // 4)).untyped_storage().resizable()


def address_space() -> int:
    """Bytes that the process has mapped."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def test_the_most_that_is_kept_is_four():
    shape = (1 << 14, 1 << 14)  # 1 GiB, of which no page is touched
    held = [output_like(example(1, 1), shape) for _ in range(6)]
    assert len({tensor.data_ptr() for tensor in held}) == 6
    before = address_space()
    del held
    assert 2.5 * 2**30 < before - address_space() < 3.5 * 2**30  # two of these, and four of a quarter of a GiB


def test_what_is_kept_makes_room():
    """A limit on address space counts what is kept: that goes before an output is refused."""
    code = """
import resource, torch
from dimo_ext._memory import output_like
like = torch.empty(1)
mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + (5 << 30),) * 2)
held = [output_like(like, (1 << 28,)) for _ in range(4)]
del held
output_like(like, (5 << 27,))
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=300)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_in_used_memory_are_those_in_fresh_memory(masked):
    """Rows that do not count are zero, whatever lay there."""
    generator = torch.Generator().manual_seed(0)
    teacher, auxiliary = torch.randn(2, 4, 512, 1031, generator=generator).unbind()
    mask = torch.rand(4, 512, generator=generator) < 0.4 if masked else None

    def gradients() -> list[torch.Tensor]:
        student = torch.zeros_like(teacher, requires_grad=True)
        logits = auxiliary.clone().requires_grad_()
        dimo_ext.distribution_matching_loss(student, teacher, auxiliary, "jeffreys:-0.2", mask=mask).backward()
        dimo_ext.masked_cross_entropy(logits, torch.ones(4, 512, dtype=torch.int64), mask).backward()
        return [student.grad, logits.grad]

    expected = [gradient.clone() for gradient in gradients()]
    for poison in (float("nan"), 7.0):
        for tensor in [output_like(teacher) for _ in range(4)]:
            tensor.fill_(poison)
        del tensor
        for gradient, first in zip(gradients(), expected, strict=True):
            assert torch.equal(gradient, first)
            if masked:
                assert (gradient[~mask] == 0).all()


def test_threads_get_memory_of_their_own():
    failures = []

    def work(number: int) -> None:
        for _ in range(30):
            tensor = output_like(example(1024, 2050)).fill_(number)
            if not (tensor == number).all():
                failures.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def _child(queue) -> None:
    torch.set_num_threads(1)  # torch's others stay with the parent
    tensor = output_like(example(2048, 1025)).fill_(5)
    queue.put((tensor.data_ptr(), bool((tensor == 5).all())))


def test_a_forked_process_has_its_own():
    held, address = output_like(example(2048, 1025)).fill_(1), address_of(2048, 1025)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_child, args=(queue,))
    process.start()
    in_child, right = queue.get(timeout=60)
    process.join()
    assert right
    assert in_child == address  # kept memory came along, as a copy
    assert (held == 1).all()


def test_too_much_memory_is_an_error():
    with pytest.raises(RuntimeError, match="bytes"):
        output_like(example(1), (1 << 50,))
