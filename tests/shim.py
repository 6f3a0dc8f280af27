"""The CUDA kernels' own source, compiled for the CPU and called from Python.

tests/cuda_on_cpu/cuda_runtime_api.h says how it runs. test_cuda_on_cpu.py holds the kernels against the reference,
test_shim.py this harness against its promises.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX") or next(filter(shutil.which, ["g++", "clang++"]), None)
SUPPORTED = platform.system() == "Linux" and platform.machine() in ("x86_64", "aarch64")
ORDERS = range(3)  # seeds of the order in which threads run

needs_shim = [
    pytest.mark.skipif(not SUPPORTED, reason="switches stacks on Linux on x86-64 and aarch64 only"),
    pytest.mark.skipif(not (COMPILER and shutil.which("make")), reason="needs make and g++ or clang++"),
]


def built(target: str) -> Path:
    """The shared library, or a program; compiled anew where a source has changed."""
    import fcntl  # which is not everywhere

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


@functools.cache
def loaded() -> Shim:
    return Shim()
