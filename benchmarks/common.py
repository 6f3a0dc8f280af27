"""Timing, ceilings and tables that every benchmark shares.

Candidates are timed interleaved, one call of each in turn, so that a drift of the machine meets all of them alike and
each finds the caches as the others left them. On a GPU the L2 cache is emptied before each call, and the time between
two CUDA events counts: the GPU is kept busy until the host has prepared the call, so that this is the GPU's time alone.
bench_overhead.py measures the host's.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import dimo_ext

FLUSH_BYTES = 256 << 20  # several times any L2
BUSY_CYCLES = 3_000_000  # of the GPU's clock, more than a millisecond
CPU_SAMPLE_SECONDS = 2e-4  # faster calls are repeated inside one sample

Candidate = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call (median, 20th and 80th percentile) and, on a GPU, the peak of memory beyond the inputs."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    peak_mib: float | None

    @classmethod
    def of(cls, samples_ms: Sequence[float], peak_mib: float | None = None) -> Timing:
        """Summarise at least two samples."""
        fifths = statistics.quantiles(samples_ms, n=5)
        return cls(statistics.median(samples_ms), fifths[0], fifths[3], peak_mib)


def time_interleaved(
    candidates: dict[str, Candidate], device: torch.device, *, seconds: float = 1.0, max_rounds: int = 200,
    host: bool = False,
) -> dict[str, Timing]:  # fmt: skip
    """Time each candidate in turn for about ``seconds`` in all, at least 5 rounds after a warm-up.

    ``host`` measures on a GPU what a call costs the host, which does not wait for it.
    """
    peaks = {name: _warm_up(call, device) for name, call in candidates.items()}
    sample = _gpu_sampler(device) if device.type == "cuda" and not host else _cpu_sampler(candidates)
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    deadline = time.perf_counter() + seconds
    for done in range(max_rounds):
        for name, call in candidates.items():
            samples[name].append(sample(name, call))
        if done >= 4 and time.perf_counter() > deadline:
            break
    return {name: Timing.of(values, peaks[name]) for name, values in samples.items()}


def copy_bandwidth(device: torch.device) -> float:
    """GB/s, read and written, of a large copy in this process: the ceiling of a memory-bound operator."""
    source = torch.ones((512 if device.type == "cuda" else 128) << 18, device=device)
    target = torch.empty_like(source)
    timing = time_interleaved({"copy": lambda: target.copy_(source)}, device, seconds=0.5)["copy"]
    return 2 * source.nbytes / timing.median_ms / 1e6


def environment(device: torch.device) -> dict[str, Any]:
    """What a number was measured on."""
    info = dimo_ext.build_info()
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else info["cpu"]["name"],
        "threads": info["cpu"]["threads"],
        "python": platform.python_version(),
        "torch": info["torch"],
        "cuda": torch.version.cuda if on_gpu else None,
        "dimo_ext": info["version"],
        "commit": _commit(),
    }


def result_rows(
    case: dict[str, Any], timings: dict[str, Timing], useful_bytes: int, ceiling: float
) -> list[dict[str, Any]]:
    """One row a candidate: the case, the times, GB/s of ``useful_bytes`` and their share of the ceiling."""
    rows = []
    for name, timing in timings.items():
        bandwidth = useful_bytes / timing.median_ms / 1e6
        rows.append(
            case
            | {
                "candidate": name,
                "median_ms": round(timing.median_ms, 5),
                "p20_ms": round(timing.p20_ms, 5),
                "p80_ms": round(timing.p80_ms, 5),
                "gb_per_s": round(bandwidth, 3),
                "share_of_copy": round(bandwidth / ceiling, 4),
                "peak_mib": None if timing.peak_mib is None else round(timing.peak_mib, 2),
            }
        )
    return rows


def report(rows: list[dict[str, Any]], device: torch.device, ceiling: float, out: Path | None) -> None:
    """Print the rows as a table under a line of facts about the machine; write both as CSV to ``out``."""
    facts = environment(device) | {"copy_gb_per_s": round(ceiling, 1)}
    print(", ".join(f"{name} {value}" for name, value in facts.items() if value is not None))
    shown = [{name: "" if value is None else str(value) for name, value in row.items()} for row in rows]
    widths = {name: max(len(name), *(len(row[name]) for row in shown)) for name in shown[0]}
    for line in [{name: name for name in widths}, *shown]:
        print("  ".join(line[name].rjust(width) for name, width in widths.items()))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *facts])
            writer.writeheader()
            writer.writerows(row | facts for row in rows)


def arguments(description: str | None) -> argparse.Namespace:
    """The command line of every benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=_device, default=torch.device(default), help="where to run")
    parser.add_argument("--out", type=csv_file, help="CSV file to write")
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on one case")
    parser.add_argument("--vocab", type=int, nargs="*", help="these vocabularies alone, where there are several")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    args = parser.parse_args()
    try:
        torch.empty(1, device=args.device).zero_()
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        parser.error(f"--device: expected one that is there, got {args.device} ({str(error).splitlines()[0]})")
    return args


def csv_file(name: str) -> Path:
    """A path that can be a file: known before anything is timed."""
    path = Path(name)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file, got the folder {name}")
    return path


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {name}") from error
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {name}")
    return device


def chosen(cases: Sequence[tuple], vocab: Sequence[int] | None) -> list[tuple]:
    """The cases, (rows, vocabulary, ...), with these vocabularies; all without."""
    if not vocab:
        return list(cases)
    there = sorted({case[1] for case in cases})
    unknown = sorted(set(vocab) - set(there))
    if unknown:
        raise SystemExit(f"--vocab: expected some of {there}, got {unknown}")
    return [case for case in cases if case[1] in vocab]


def _warm_up(call: Candidate, device: torch.device) -> float | None:
    call()
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _gpu_sampler(device: torch.device) -> Callable[[str, Candidate], float]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(_: str, call: Candidate) -> float:
        with torch.cuda.device(device):
            flush.zero_()
            torch.cuda._sleep(BUSY_CYCLES)
            begin.record()
            call()
            end.record()
            end.synchronize()
        return begin.elapsed_time(end)

    return sample


def _cpu_sampler(candidates: dict[str, Candidate]) -> Callable[[str, Candidate], float]:
    def elapsed(call: Candidate, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats

    repeats = {name: max(1, int(CPU_SAMPLE_SECONDS / elapsed(call, 1))) for name, call in candidates.items()}
    return lambda name, call: 1e3 * elapsed(call, repeats[name])


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"
