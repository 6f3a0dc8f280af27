"""Phases of a step: ranges for the profiler, times for the log, nothing that a run without them would not do."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile

from dimo import phases
from dimo.config import DistillConfig, NetworkConfig, PretrainConfig, RunConfig
from dimo.data.digits import DigitsSplit
from dimo.phases import PhaseClock, phase
from dimo.runlog import LOG
from dimo.teachers import MaskGITTeacher
from dimo.trainer import CHECKPOINT, DistillationTrainer, PretrainingTrainer, run_training

SIZES = {"grid_size": 3, "vocab_size": 5, "num_classes": 3, "width": 16, "depth": 1, "heads": 2, "mlp_width": 32}
DISTILLATION = [
    "student forward", "draws", "masking", "teacher", "auxiliary forward", "loss", "student backward",
    "auxiliary backward", "student optimiser", "auxiliary optimiser",
]  # fmt: skip
SECOND_AUXILIARY_STEP = ["masking", "auxiliary forward", "loss", "auxiliary backward", "auxiliary optimiser"]
AVERAGE = ["average"]
PRETRAINING = ["masking", "model forward", "loss", "backward", "optimiser", "average"]


def tiny() -> MaskGITTeacher:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MaskGITTeacher.build({**SIZES, "dropout": 0.0})


def make(kind: str, folder, **changes):
    settings = {"steps": 12, "batch_size": 4, "save_every": 4, "preview_every": 0, "tensorboard": False}
    run = RunConfig(output=str(folder), **(settings | changes))
    if kind == "distill":
        config = DistillConfig(run=run)
        return DistillationTrainer(tiny(), config), config
    config = PretrainConfig(run=run, network=NetworkConfig(width=16, depth=1, mlp_width=32))
    data = DigitsSplit(torch.zeros(20, 9, dtype=torch.int64), torch.zeros(20, dtype=torch.int64))
    return PretrainingTrainer(tiny(), data, config), config


def measured(folder) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    return {line["step"]: line["phase_ms"] for line in lines if "phase_ms" in line}


@pytest.fixture
def ticking(monkeypatch):
    """A clock that goes one second on whenever it is read."""
    times = iter(range(10_000))
    monkeypatch.setattr(phases.time, "perf_counter", lambda: float(next(times)))


@pytest.mark.usefixtures("ticking")
def test_times_are_means_over_the_steps():
    clock = PhaseClock(torch.device("cpu"))
    for _ in range(4):
        with clock.step():
            for name in ("forward", "backward", "forward"):
                with phase(name):
                    pass
        with phase("outside"):
            pass
    # Each block lasts one tick; so do the 4 gaps around and between the 3 blocks.
    assert clock.milliseconds() == {"forward": 2000.0, "backward": 1000.0, "other": 4000.0}


def test_only_measured_steps_wait_for_the_device(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    clock = PhaseClock(torch.device("cuda:0"))
    with phase("outside"):
        pass
    assert waits == []
    with clock.step(), phase("inside"):
        pass
    assert waits == [torch.device("cuda:0")] * 4


def test_a_step_that_fails_leaves_no_clock_behind():
    clock = PhaseClock(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="boom"), clock.step(), phase("inside"):
        raise RuntimeError("boom")
    with phase("after"):
        pass
    assert clock.steps == 0
    assert "after" not in clock.seconds


@pytest.mark.parametrize(
    ("kind", "names"), [("distill", DISTILLATION + SECOND_AUXILIARY_STEP + AVERAGE), ("pretrain", PRETRAINING)]
)
def test_a_profile_shows_the_phases_in_order(kind, names, tmp_path):
    trainer, _ = make(kind, tmp_path)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as trace:
        trainer.step(0)
    ranges = sorted((e for e in trace.events() if e.name.startswith("dimo: ")), key=lambda e: e.time_range.start)
    assert [event.name.removeprefix("dimo: ") for event in ranges] == names


@pytest.mark.parametrize(("kind", "names"), [("distill", DISTILLATION + AVERAGE), ("pretrain", PRETRAINING)])
@pytest.mark.parametrize(("log_every", "step"), [(1, 10), (7, 12), (100, 12)])
def test_the_log_holds_the_times_once(kind, names, log_every, step, tmp_path):
    run_training(*make(kind, tmp_path, log_every=log_every))
    times = measured(tmp_path)
    assert list(times) == [step]
    assert list(times[step]) == [*names, "other"]
    assert all(math.isfinite(ms) and ms >= 0 for ms in times[step].values())


def test_a_run_resumed_while_it_is_measured_is_bit_identical(tmp_path):
    """The checkpoint of step 8 lies within the measured steps; the rest of them is measured after it."""
    straight, config = make("distill", tmp_path / "straight")
    run_training(straight, config)
    dying, config = make("distill", tmp_path / "resumed")
    plain = dying.step

    def step(index):
        if index == 9:
            raise KeyboardInterrupt
        return plain(index)

    dying.step = step
    with pytest.raises(KeyboardInterrupt):
        run_training(dying, config)
    run_training(*make("distill", tmp_path / "resumed"))
    first, second = (load_file(tmp_path / name / CHECKPOINT) for name in ("straight", "resumed"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert list(measured(tmp_path / "resumed")) == list(measured(tmp_path / "straight"))
