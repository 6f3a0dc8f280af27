"""What the CUDA compiler says of the divergence's kernels: a row's numbers stay in registers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from dimo_ext.divergences import DIVERGENCES
from tests.conftest import PROFILE

CSRC = Path(__file__).parents[1] / "csrc"
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")
# Bytes a thread: a few of what goes on from row to row may lie in memory, which costs less than a block less on the
# processor; a number of the row, which every sweep reads, may not: the 2 x 33 of a thread are 264 bytes.
LIMIT = 24
REPORT = re.compile(
    r"Compiling entry function '\S*?(lanes|block|columns)_kernel.*?(\d+) bytes spill stores, (\d+) bytes spill loads",
    re.DOTALL,
)


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize(
    "divergence", [d.__name__ for d in DIVERGENCES.values()] if PROFILE == "full" else ["Jeffreys"]
)
def test_rows_stay_in_registers(divergence):
    """For sm_90, where a thread of the longest blocks has 128 of them."""
    command = [
        NVCC, "-std=c++17", "-arch=sm_90", "-Xptxas", "-v", f"-DDIMO_DIVERGENCE={divergence}", "-I", CSRC,
        "-c", CSRC / "cuda" / "divergence.cu", "-o", os.devnull,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reports = REPORT.findall(done.stdout + done.stderr)
    assert sorted({kernel for kernel, *_ in reports}) == ["block", "columns", "lanes"]
    assert len(reports) == 6
    assert all(int(stores) <= LIMIT for _, stores, _ in reports), reports
