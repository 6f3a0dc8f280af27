"""One whole Di[M]O training step: ours against the plain PyTorch step, by phase.

    python benchmarks/step_time.py [preset] [--batch-size N] [--layers N] [--width N] [--out table.csv]

Random weights; candidates take turns in one process. Two ratios to the plain eager step are kept apart: the same
algorithm (as many forwards and backwards; a fresh student batch for the auxiliary) and the recipe that re-uses the
student's batch, which saves a student and an auxiliary forward. The floor is what the matrix multiplications of our
step cost at the speed of a large one. Beside the CSV, a bar chart of the same name is drawn.
"""

from __future__ import annotations

import argparse
import copy
import csv
import dataclasses
import gc
import math
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from common import csv_file, environment
from plain_step import PlainTrainer
from torch import Tensor, nn
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from dimo.config import DistillConfig, MethodConfig, OptimizerConfig, RunConfig
from dimo.graph import WARM_UP_CALLS
from dimo.networks.maskgit import MaskGITConfig, MaskTransformer
from dimo.phases import PhaseClock
from dimo.teachers import MaskGITTeacher
from dimo.trainer import DistillationTrainer

# --- presets --------------------------------------------------------------------------------------------------------


class TextTransformer(MaskTransformer):
    """Any sequence length that is a square, no bias a position."""

    def __init__(self, config: MaskGITConfig) -> None:
        super().__init__(config)
        del self.bias

    def states(self, embeddings: Tensor, class_B: Tensor) -> Tensor:
        """Return the last layer's states ``[B, positions, width]``."""
        label = self.tok_emb(class_B + self.config.vocab_size + 1)[:, None]
        x = torch.cat([embeddings, label], 1) + self.pos_emb
        return self.last_layer(self.transformer(self.first_layer(x)))[:, :-1]

    def forward(self, tokens_BL: Tensor, class_B: Tensor, *, columns=None, embed=F.embedding) -> Tensor:
        """Return logits ``[B, L, columns]``."""
        states = self.states(embed(tokens_BL, self.tok_emb.weight), class_B)
        return F.linear(states, self.tok_emb.weight[: columns or self.config.vocab_size])


class PackedTransformer(TextTransformer):
    """2 x 2 tokens a position; the head is a convolution, so that logits come as ``[B, V, H, W]``."""

    def __init__(self, config: MaskGITConfig) -> None:
        super().__init__(config)
        self.side = 2 * config.grid_size
        self.seq_len = self.side**2
        self.pack = nn.Linear(4 * config.width, config.width)
        self.unpack = nn.Linear(config.width, 4 * config.width)

    def forward(self, tokens_BL: Tensor, class_B: Tensor, *, columns=None, embed=F.embedding) -> Tensor:
        """Return logits ``[B, L, columns]``, a view of ``[B, columns, H, W]``."""
        grid = embed(tokens_BL, self.tok_emb.weight).unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        states = self.states(self.pack(F.pixel_unshuffle(grid, 2).flatten(2).transpose(1, 2)), class_B)
        grid = self.unpack(states).transpose(1, 2).unflatten(2, (self.side // 2, self.side // 2))
        weight = self.tok_emb.weight[: columns or self.config.vocab_size, :, None, None]
        return F.conv2d(F.pixel_shuffle(grid, 2), weight).flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class Preset:
    """A network, a batch and the method's settings; ``on_cpu`` are (batch size, layers, width) that a CPU can do."""

    network: type[MaskTransformer]
    sizes: MaskGITConfig
    batch_size: int
    method: MethodConfig
    on_cpu: tuple[int, int, int]


def _sizes(grid: int, vocab: int, classes: int, width: int, depth: int, heads: int) -> MaskGITConfig:
    return MaskGITConfig(grid, vocab, classes, width, depth, heads, mlp_width=4 * width, dropout=0.0)


def _method(scale: float, noise: float, **settings) -> MethodConfig:
    shared = {"num_auxiliary_steps": 1, "fresh_auxiliary_batch": True, "label_smoothing": 0.1}
    return MethodConfig(
        guidance_scale=scale, embedding_noise=noise, embedding_noise_scale="unit", **(shared | settings)
    )


PRESETS = {
    "digits": Preset(
        MaskTransformer, _sizes(8, 17, 10, 64, 4, 2), 48, _method(1.25, 0.1, label_smoothing=0.0), (48, 4, 64)
    ),
    "maskgit-imagenet256": Preset(
        MaskTransformer, _sizes(16, 1024, 1000, 768, 24, 16), 64,
        _method(2.0, 0.1, r_init=0.6, divergence="jeffreys:-0.2"), (8, 2, 128),
    ),
    "meissonic-shape": Preset(
        PackedTransformer, _sizes(32, 8192, 1, 1024, 14, 16), 4,
        _method(4.0, 0.3, r_init=0.5, mask_schedule="cosine", divergence="jeffreys:-0.2"), (1, 1, 64),
    ),
    "mdlm-owt": Preset(
        TextTransformer, _sizes(32, 50258, 1, 768, 12, 12), 8,
        _method(2.0, 0.1, r_init=0.6, mask_schedule="linear", divergence="jeffreys:-0.2"), (1, 1, 64),
    ),
}  # fmt: skip


def scaled(preset: Preset, args: argparse.Namespace) -> Preset:
    """The preset in the sizes asked for, on a CPU in those that it can do; a head keeps 16 channels at least."""
    small = args.device.type == "cpu"
    defaults = preset.on_cpu if small else (preset.batch_size, preset.sizes.depth, preset.sizes.width)
    batch, layers, width = (
        given or default for given, default in zip((args.batch_size, args.layers, args.width), defaults, strict=True)
    )
    heads = max(n for n in range(1, preset.sizes.heads + 1) if width % n == 0 and (n == 1 or width // n >= 16))
    sizes = dataclasses.replace(preset.sizes, depth=layers, width=width, heads=heads, mlp_width=4 * width)
    return dataclasses.replace(preset, sizes=sizes, batch_size=batch)


# --- candidates -----------------------------------------------------------------------------------------------------

Step = Callable[[int], object]
BASELINE = "plain eager"


@dataclass(frozen=True)
class Setting:
    """What all candidates share."""

    preset: Preset
    teacher: MaskGITTeacher
    precision: str

    def config(self, *, reuse: bool = False, **run: bool) -> DistillConfig:
        """The trainer's configuration; both networks clip as the baseline does."""
        method = dataclasses.replace(self.preset.method, fresh_auxiliary_batch=not reuse)
        optimizer = OptimizerConfig(learning_rate=1e-5, clip_norm=1.0)
        shared = {"batch_size": self.preset.batch_size, "ema_decay": 0.9999, "precision": self.precision}
        return DistillConfig(
            RunConfig("unused", **shared, **run), method=method, student=optimizer, auxiliary=optimizer
        )

    def plain(self, *, compiled: bool) -> Step:
        """The baseline."""
        return PlainTrainer(self.teacher, self.config(), compiled=compiled).step

    def ours(self, **options: bool) -> Step:
        """The library's own trainer."""
        return DistillationTrainer(copy.deepcopy(self.teacher), self.config(**options)).step


def candidates(setting: Setting, *, with_compile: bool) -> dict[str, Callable[[], Step]]:
    """By name, what makes a step; each has networks of its own, all with the same weights."""
    modes = {"eager": {}, "compiled": {"compile": True}, "CUDA graph": {"cuda_graph": True}}
    modes["compiled CUDA graph"] = modes["compiled"] | modes["CUDA graph"]
    on_gpu = setting.teacher.device.type == "cuda"
    modes = {
        name: options for name, options in modes.items()
        if (with_compile or "compile" not in options) and (on_gpu or "cuda_graph" not in options)
    }  # fmt: skip
    makers = {
        f"plain {name}": partial(setting.plain, compiled=bool(modes[name])) for name in modes if "CUDA" not in name
    }
    for reuse, suffix in ((False, ""), (True, ", batch re-used")):
        makers |= {f"ours {name}{suffix}": partial(setting.ours, reuse=reuse, **modes[name]) for name in modes}
    return makers


# --- measuring ------------------------------------------------------------------------------------------------------


LEAST_TURNS, MOST_TURNS = 2, 50
STEPS_A_TURN = 4


def reset_peak(device: torch.device) -> int:
    """Start to watch the peak of memory; return the bytes in use, of the GPU or resident in the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def peak(device: torch.device) -> int:
    """The most bytes in use since the last reset."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")


def _resident(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


class MemoryClock(PhaseClock):
    """Also keeps each phase's peak of memory beyond what was in use when the step began."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.peaks: dict[str, int] = {}
        self.begin = reset_peak(device)

    def enter(self) -> float:
        reset_peak(self.device)
        return super().enter()

    def leave(self, name: str, start: float) -> None:
        super().leave(name, start)
        self.peaks[name] = peak(self.device) - self.begin


@dataclass
class Samples:
    """What was measured of a candidate: whole steps in ms, phases in ms, peaks in bytes.

    The peak of the whole step includes weights and optimisers; a phase's is what lies beyond those at its time.
    """

    totals: list[float]
    phases: dict[str, list[float]]
    peaks: dict[str, int]


def measure(makers: dict[str, Callable[[], Step]], device: torch.device, seconds: float) -> dict[str, Samples]:
    """Take turns for about ``seconds``, at least two; a candidate lives for its turn alone, so that memory suffices.

    One that needs more memory than there is has no samples.
    """
    samples = {name: Samples([], {}, {}) for name in makers}
    begin, share = time.perf_counter(), seconds / LEAST_TURNS / len(makers)
    for turn in range(MOST_TURNS):
        for name, make in makers.items():
            print(f"{time.perf_counter() - begin:6.0f} s: turn {turn + 1}, {name}", file=sys.stderr, flush=True)
            try:
                take_turn(make, device, share, samples[name])
            except torch.OutOfMemoryError:
                print("          out of memory", file=sys.stderr, flush=True)
            free(device)
        if turn + 1 >= LEAST_TURNS and time.perf_counter() - begin > seconds:
            break
    return samples


def take_turn(make: Callable[[], Step], device: torch.device, seconds: float, into: Samples) -> None:
    """Warm up, time whole steps for about ``seconds``, then one phase by phase."""
    begin, step = reset_peak(device), make()
    warm_up(step, device)
    if device.type == "cpu":
        reset_peak(device)  # compiling takes memory of the process, too
    clock = PhaseClock(device)
    deadline = clock.now() + seconds
    for index in range(STEPS_A_TURN):
        start = clock.now()
        step(index)
        into.totals.append(1e3 * (clock.now() - start))
        if clock.now() > deadline:
            break
    into.peaks["whole step"] = max(into.peaks.get("whole step", 0), peak(device) - begin)
    by_phase(step, STEPS_A_TURN, device, into)


def warm_up(step: Step, device: torch.device) -> None:
    """Until code is compiled, memory is had and, on a GPU, a graph is recorded."""
    for index in range(WARM_UP_CALLS + 1 if device.type == "cuda" else 1):
        step(index)


def free(device: torch.device) -> None:
    """Give back what a candidate held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def by_phase(step: Step, index: int, device: torch.device, into: Samples) -> None:
    """One step, phase by phase."""
    clock = MemoryClock(device)
    with clock.step():
        step(index)
    for name, value in clock.milliseconds().items():
        into.phases.setdefault(name, []).append(value)
    for name, size in clock.peaks.items():
        into.peaks[name] = max(into.peaks.get(name, 0), size)


def flops_per_ms(device: torch.device, precision: str) -> float:
    """The speed of a large matrix multiplication."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=getattr(torch, precision))
    clock, times = PhaseClock(device), []
    for _ in range(20):
        start = clock.now()
        a @ a
        times.append(clock.now() - start)
    return 2e-3 * size**3 / min(times)


def flops_of(step: Step) -> int:
    """Of the step's matrix multiplications."""
    with FlopCounterMode(display=False) as counter:
        step(0)
    return counter.get_total_flops()


def trace(makers: dict[str, Callable[[], Step]], folder: Path, device: torch.device) -> None:
    """Write one step of each candidate as a trace for chrome://tracing or Perfetto."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in makers.items():
        step = make()
        warm_up(step, device)
        with profile(record_shapes=True) as prof:
            step(0)
            PhaseClock(device).now()
        prof.export_chrome_trace(str(folder / f"{name.replace(', ', '_').replace(' ', '_')}.json.gz"))
        del step
        free(device)


# --- results --------------------------------------------------------------------------------------------------------


def table(samples: dict[str, Samples], floors: dict[str, float]) -> list[dict[str, object]]:
    """A row a candidate and phase, the whole step first."""
    base = statistics.median(samples[BASELINE].totals or [math.nan])
    rows = []
    for name, measured in samples.items():
        total = statistics.median(measured.totals or [math.nan])
        kind = "recipe" if "re-used" in name else "same algorithm"
        whole = {"candidate": name, "phase": "whole step", "ms": round(total, 3)}
        whole["peak_mib"] = round(measured.peaks.get("whole step", math.nan) / 2**20, 1)
        whole |= {"ratio": f"{base / total:.2f}", "ratio_of": kind, "floor_ms": round(floors[kind], 3)}
        rows.append(whole)
        for phase, values in measured.phases.items():
            size = measured.peaks.get(phase)
            row = {"candidate": name, "phase": phase, "ms": round(statistics.median(values), 3)}
            row["peak_mib"] = None if size is None else round(size / 2**20, 1)
            rows.append(row | {"ratio": None, "ratio_of": None, "floor_ms": None})
    return rows


def show(rows: list[dict[str, object]], facts: dict[str, object], out: Path | None) -> None:
    """Print the table; write CSV and chart."""
    print(", ".join(f"{name} {value}" for name, value in facts.items() if value is not None))
    print(f"{'':34}" + "".join(f"{name:>16}" for name in list(rows[0])[2:]))
    for row in rows:
        texts = ["" if value is None else str(value) for value in row.values()]
        indent = "" if row["phase"] == "whole step" else "    "
        print(
            f"{indent + str(row['phase'] if indent else row['candidate']):34}" + "".join(f"{t:>16}" for t in texts[2:])
        )
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *facts])
        writer.writeheader()
        writer.writerows(row | facts for row in rows)
    draw(rows, str(facts["preset"]), out.with_suffix(".png"))


def draw(rows: list[dict[str, object]], title: str, path: Path) -> None:
    """Stacked bars, a phase a colour."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["candidate"] for row in rows))
    phases = list(dict.fromkeys(row["phase"] for row in rows if row["phase"] != "whole step"))
    times = {(row["candidate"], row["phase"]): float(row["ms"]) for row in rows}
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(names) + 1.8), layout="constrained")
    begin = [0.0] * len(names)
    for number, phase in enumerate(phases):
        widths = [times.get((name, phase), 0.0) for name in names]
        color = "lightgrey" if phase == "other" else plt.get_cmap("tab20")(number)
        axes.barh(names, widths, left=begin, label=phase, color=color)
        begin = [a + b for a, b in zip(begin, widths, strict=True)]
    for name, x in zip(names, begin, strict=True):
        total = times[name, "whole step"]
        if x == 0.0:  # nothing inside a graph can be timed
            axes.barh([name], [total], color="grey")
        axes.text(max(x, total), name, f" {total:.0f} ms" if total >= 100 else f" {total:.3g} ms", va="center")
    for floor in sorted({float(row["floor_ms"]) for row in rows if row["floor_ms"]}):
        axes.axvline(floor, color="black", linestyle=":", linewidth=1)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(title=title, xlabel="ms, phase by phase; numbers: the whole step; dotted: matrix products")
    axes.legend(fontsize="small", loc="lower right")
    figure.savefig(path, dpi=120)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("preset", nargs="?", default="digits", choices=PRESETS)
    parser.add_argument("--device", type=torch.device, default=torch.device(default))
    for name in ("batch-size", "layers", "width"):
        parser.add_argument(f"--{name}", type=int, help="another one than the preset's, on a CPU a small one")
    parser.add_argument("--seconds", type=float, default=60.0, help="time spent on measuring, at least 2 turns each")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 on a GPU")
    parser.add_argument("--trace", type=Path, help="write a torch.profiler trace a candidate into this folder instead")
    parser.add_argument("--out", type=csv_file, help="CSV file to write, with a chart beside it")
    return parser.parse_args()


def main() -> None:
    """Take turns, print and write."""
    args = arguments()
    torch._dynamo.config.recompile_limit = 64  # layers of two classes, with gradients and without, in two precisions
    preset, device = scaled(PRESETS[args.preset], args), args.device
    torch.manual_seed(0)
    teacher = MaskGITTeacher(preset.network(preset.sizes)).to(device).eval()
    setting = Setting(preset, teacher, "bfloat16" if device.type == "cuda" and not args.float32 else "float32")
    makers = candidates(setting, with_compile=args.compile)
    if args.trace:
        trace(makers, args.trace, device)
        return
    samples = measure(makers, device, args.seconds)
    speed = flops_per_ms(device, setting.precision)
    floors = {
        "same algorithm": flops_of(setting.ours()) / speed,
        "recipe": flops_of(setting.ours(reuse=True)) / speed,
    }
    sizes = {"batch_size": preset.batch_size, "layers": preset.sizes.depth, "width": preset.sizes.width}
    facts = {"preset": args.preset, **sizes, "precision": setting.precision}
    show(table(samples, floors), facts | environment(device), args.out)


if __name__ == "__main__":
    main()
