"""The harness that runs CUDA kernels on the CPU: what it promises to do, and the faults that it promises to catch.

Sanitizers run under `make sanitize`.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch

from tests.shim import ORDERS, ROOT, Shim, built, needs_shim

pytestmark = needs_shim

THREADS = 64  # of selftest.cu
LANES = np.arange(THREADS) % 32


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
