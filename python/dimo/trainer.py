"""The training loop: steps, logging, checkpoints. No maths: the losses are in distill.py and pretrain.py."""

from __future__ import annotations

import copy
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import dimo_ext
from dimo_ext.random import random_integers

from .checkpoint import fingerprint, load_checkpoint, read_checkpoint_header, save_checkpoint
from .config import ConfigError, DistillConfig, PretrainConfig, RunConfig, to_dict
from .data.digits import DigitsSplit
from .distill import auxiliary_loss, draw_from_student, student_loss
from .files import prepare_output, remove_leftovers
from .graph import Recorded
from .optimizers import Ema, Updater
from .phases import MEASURED_STEPS, PhaseClock, phase
from .pretrain import pretrain_loss
from .runlog import BOARD, LOG, RunLogger
from .teachers import Condition, Teacher

CHECKPOINT = "checkpoint.safetensors"

# Keys that may differ between a checkpoint's configuration and the one that goes on from it.
_FREE_KEYS = (
    "run.output", "run.log_every", "run.save_every", "run.preview_every", "run.device", "run.tensorboard",
    "run.compile", "run.cuda_graph", "run.activation_checkpointing", "prompts.cache",
)  # fmt: skip


class Interrupted(Exception):  # noqa: N818 - an event that callers handle, not an error
    """The run was stopped by a signal after ``step`` steps; its checkpoint is written."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step


def resolve_device(name: str) -> torch.device:
    """Return the device that a configuration names; "auto" is the first GPU if there is one.

    Raises:
        ConfigError: no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    wrong = ConfigError(f"device: expected auto, cpu or an available cuda device, got {name!r}")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise wrong from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda" or not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        raise wrong
    return torch.device("cuda", device.index or 0)


class Trainer(ABC):
    """What :func:`run_training` drives: a step, and the modules and optimisers that make up its state."""

    run: RunConfig
    modules: dict[str, nn.Module]
    updaters: dict[str, Updater]
    headline: tuple[str, ...]  # the scalars that the progress bar shows

    @property
    @abstractmethod
    def origin(self) -> dict[str, str]:
        """What besides the configuration determines the run: a fingerprint of weights or data."""

    @property
    @abstractmethod
    def result(self) -> Teacher:
        """The averaged model that training produces."""

    @abstractmethod
    def step(self, index: int) -> dict[str, Tensor]:
        """Do 0-based step ``index``, a pure function of state, seed and index; return scalars on the device."""

    def prepare(self, *networks: Teacher) -> None:
        """Let the networks run as the configuration says; copies made afterwards would inherit it."""
        for network in networks:
            if self.run.activation_checkpointing:
                network.checkpoint_activations()
            for layer in network.layers() if self.run.compile else []:
                # Layers share their code, so one compilation serves all; few batch sizes come up, each has its own.
                layer.compile(dynamic=False)

    def precision(self) -> torch.autocast:
        """Return the context of one network's forward passes, all with gradients or all without.

        Casts of weights are kept until it ends: none may outlive an optimiser step or a change of gradient mode.
        """
        enabled = self.run.precision == "bfloat16"
        return torch.autocast(self.result.device.type, torch.bfloat16, enabled=enabled)

    def backward(self, loss: Tensor) -> None:
        """Add one batch's part to the gradients."""
        (loss / self.run.accumulation_steps).backward()

    def batch_numbers(self, index: int) -> range:
        """Return the numbers in the whole run of the batches of 0-based step ``index``."""
        count = self.run.accumulation_steps
        return range(index * count, (index + 1) * count)


class _Batch(NamedTuple):
    """A batch of a student update: its key, what it was drawn for, and what came of it."""

    key: Tensor
    condition: Condition
    tokens: Tensor
    scalars: dict[str, Tensor]


class DistillationTrainer(Trainer):
    """Di[M]O: a student update, then ``num_auxiliary_steps`` auxiliary updates."""

    headline = ("student_divergence", "auxiliary_loss")

    def __init__(self, teacher: Teacher, config: DistillConfig) -> None:
        self.method, self.run = config.method, config.run
        self.teacher = teacher.eval().requires_grad_(False)
        self.student = copy.deepcopy(teacher).float().requires_grad_(True)
        self.auxiliary = copy.deepcopy(teacher).float().requires_grad_(True)
        if config.method.freeze == "recipe":
            for name in teacher.frozen_parameters():
                self.student.get_parameter(name).requires_grad_(False)
        self.ema = Ema(self.student, config.run.ema_decay)
        self.prepare(teacher, self.student, self.auxiliary)
        self.key = dimo_ext.random_key(config.run.seed, device=teacher.device)
        self.keys = [torch.empty_like(self.key) for _ in range(config.run.accumulation_steps)]
        self.updates = Recorded(self._updates, teacher.device) if self._on_gpu_as_graph() else self._updates
        self.modules = {"student": self.student, "auxiliary": self.auxiliary, "ema": self.ema.model}
        steps, auxiliary_steps = config.run.steps, config.method.num_auxiliary_steps
        self.updaters = {
            "student_optimizer": Updater(list(self.student.parameters()), config.student, steps),
            "auxiliary_optimizer": Updater(list(self.auxiliary.parameters()), config.auxiliary, steps, auxiliary_steps),
        }

    @cached_property
    def origin(self) -> dict[str, str]:
        """The teacher's weights, which stay as they are, and what it draws conditions from."""
        return {"teacher_weights": fingerprint(self.teacher), **self.teacher.origin()}

    @property
    def result(self) -> Teacher:
        """The student's moving average."""
        return self.ema.model

    def step(self, index: int) -> dict[str, Tensor]:
        """One student update and its auxiliary updates."""
        for key, number in zip(self.keys, self.batch_numbers(index), strict=True):
            key.copy_(dimo_ext.fold_in(self.key, number))
        for updater in self.updaters.values():
            updater.schedule(index)
        scalars = self.updates()
        with phase("average"):
            self.ema.update(self.student, index)
        return scalars

    def _updates(self) -> dict[str, Tensor]:
        """All updates of the step that ``keys`` and the updaters' rates were set for."""
        batches = [self._student_batch(key) for key in self.keys]
        with phase("student optimiser"):
            norm = self.updaters["student_optimizer"].update()
        auxiliary = [self._update_auxiliary(k, batches) for k in range(self.method.num_auxiliary_steps)]
        return _mean([batch.scalars for batch in batches]) | {"gradient_norm": norm} | auxiliary[-1]

    def _on_gpu_as_graph(self) -> bool:
        """Whether the step is to be recorded; raises ConfigError where it cannot be."""
        if self.run.cuda_graph and self.teacher.device.type != "cuda":
            raise ConfigError(f"run.cuda_graph: expected a cuda device, got {self.teacher.device}")
        if self.run.cuda_graph and self.teacher.prompted:
            raise ConfigError(
                f"run.cuda_graph: kind {self.teacher.kind!r} reads prompts in every step, which no graph can"
            )
        return self.run.cuda_graph

    def _student_batch(self, key: Tensor) -> _Batch:
        """Add the student's gradient on a new batch, and on the same one the auxiliary's if it is re-used."""
        condition = self.teacher.sample_condition(self.run.batch_size, dimo_ext.fold_in(key, 0))
        with self.precision():
            losses = student_loss(
                self.student, self.teacher, self.auxiliary, condition, self.method, dimo_ext.fold_in(key, 1)
            )
        with phase("student backward"):
            self.backward(losses.loss)
        if not self.method.fresh_auxiliary_batch:
            with phase("auxiliary backward"):
                self.backward(losses.auxiliary)
        scalars = {
            "student_divergence": losses.loss, "token_entropy": losses.token_entropy, "auxiliary_loss": losses.auxiliary
        }  # fmt: skip
        return _Batch(key, condition, losses.draw.tokens, {name: value.detach() for name, value in scalars.items()})

    def _update_auxiliary(self, k: int, batches: list[_Batch]) -> dict[str, Tensor]:
        """The ``k``-th of the step's auxiliary updates."""
        fresh = self.method.fresh_auxiliary_batch
        losses = [self._auxiliary_batch(k, batch) for batch in batches] if k > 0 or fresh else []
        with phase("auxiliary optimiser"):
            norm = self.updaters["auxiliary_optimizer"].update(k)
        return _mean(losses) | {"auxiliary_gradient_norm": norm}

    def _auxiliary_batch(self, k: int, batch: _Batch) -> dict[str, Tensor]:
        """Add the auxiliary's gradient on tokens masked anew, of a new draw if it is to be fresh."""
        key, condition, tokens = dimo_ext.fold_in(batch.key, 2 + k), batch.condition, batch.tokens
        if self.method.fresh_auxiliary_batch:
            condition = self.teacher.sample_condition(self.run.batch_size, dimo_ext.fold_in(key, 0))
            with torch.no_grad(), self.precision():
                tokens = draw_from_student(self.student, condition, self.method, dimo_ext.fold_in(key, 1)).tokens
        with self.precision():
            loss = auxiliary_loss(self.auxiliary, tokens, condition, self.method, dimo_ext.fold_in(key, 2))
        with phase("auxiliary backward"):
            self.backward(loss)
        return {"auxiliary_loss": loss.detach()}


def _mean(scalars: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return each scalar's mean over a step's batches."""
    return {name: torch.stack([one[name] for one in scalars]).mean() for name in (scalars[0] if scalars else ())}


class PretrainingTrainer(Trainer):
    """Masked-token training of a teacher on a data set that fits in memory."""

    headline = ("loss",)

    def __init__(self, model: Teacher, data: DigitsSplit, config: PretrainConfig) -> None:
        self.config, self.run, self.model = config, config.run, model.train()
        self.data = data
        self.tokens, self.labels = data.tokens.to(model.device), data.labels.to(model.device)
        self.ema = Ema(model, config.run.ema_decay)
        self.key = dimo_ext.random_key(config.run.seed, device=model.device)
        self.modules = {"model": model, "ema": self.ema.model}
        self.prepare(model)
        self.updaters = {"optimizer": Updater(list(model.parameters()), config.optimizer, config.run.steps)}

    @cached_property
    def origin(self) -> dict[str, str]:
        """The data."""
        return {"data": self.data.checksum()}

    @property
    def result(self) -> Teacher:
        """The model's moving average."""
        return self.ema.model

    def step(self, index: int) -> dict[str, Tensor]:
        """One update on random batches."""
        losses = [{"loss": self._batch(number)} for number in self.batch_numbers(index)]
        with phase("optimiser"):
            self.updaters["optimizer"].schedule(index)
            norm = self.updaters["optimizer"].update()
        with phase("average"):
            self.ema.update(self.model, index)
        return _mean(losses) | {"gradient_norm": norm}

    def _batch(self, number: int) -> Tensor:
        """Add the gradient on a random batch; return its loss."""
        key = dimo_ext.fold_in(self.key, number)
        rows = random_integers(dimo_ext.fold_in(key, 0), self.run.batch_size, len(self.tokens))
        # Only dropout reads torch's generator; seeding it by the batch lets a resumed run repeat.
        with seeded_generator(self.tokens.device, self.run.seed * 1_000_003 + number):
            with self.precision():
                loss = pretrain_loss(
                    self.model, self.tokens[rows], self.labels[rows], self.config, dimo_ext.fold_in(key, 1)
                )
            with phase("backward"):
                self.backward(loss)
        return loss.detach()


@contextmanager
def seeded_generator(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the device's default generator for a block and restore it afterwards; no other generator is touched."""
    generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


Preview = Callable[[int, Teacher], tuple[dict[str, float], Tensor | None]]


def run_training(trainer: Trainer, config: Any, preview: Preview | None = None) -> None:
    """Run to ``config.run.steps``, going on from the folder's checkpoint if there is one.

    Args:
        trainer: freshly built from ``config``.
        config: a :class:`PretrainConfig` or :class:`DistillConfig`, stored in the checkpoint.
        preview: called every ``preview_every`` steps with the step and the averaged model; returns scalars for the log
            and an image ``[C, H, W]`` (or None).

    Raises:
        ConfigError: the folder cannot be written, or holds a checkpoint of another configuration.
        CheckpointError: the checkpoint is truncated.
        TrainingError: a loss is not finite; the last checkpoint stays.
        Interrupted: SIGINT or SIGTERM; the checkpoint is written first. A second signal stops at once.
    """
    run, path = config.run, Path(config.run.output) / CHECKPOINT
    remove_leftovers(prepare_output(run.output, files=(CHECKPOINT, LOG), folders=(BOARD,)))
    start = _resume(path, trainer, config)
    if start >= run.steps:
        print(f"{path} holds all {run.steps} steps already")
        return
    warmup = max(updater.config.warmup_steps for updater in trainer.updaters.values())
    with RunLogger(run, start, trainer.headline, warmup) as logger, _StopFlag() as stop:
        _loop(trainer, config, start, path, logger, stop, preview)


def _loop(
    trainer: Trainer, config: Any, start: int, path: Path, logger: RunLogger, stop: _StopFlag, preview: Preview | None
) -> None:
    run = config.run

    def save(done: int) -> None:
        optimizers = {name: u.optimizer for name, u in trainer.updaters.items()}
        save_checkpoint(path, done, to_dict(config) | trainer.origin, trainer.modules, optimizers)
        logger.restart_clock()

    clock = PhaseClock(trainer.result.device)
    for index in range(start, run.steps):
        with clock.step() if index in MEASURED_STEPS else nullcontext():
            logger.add(trainer.step(index))
        done = index + 1
        if done == MEASURED_STEPS.stop and clock.steps:
            logger.note({"phase_ms": clock.milliseconds()})
        last, stopping = done == run.steps, stop.requested  # read once: a signal may come at any time
        saving = done % run.save_every == 0 or last or stopping
        if done % run.log_every == 0 or saving:  # flush raises on broken losses: no checkpoint of them is written
            logger.flush(done)
        if preview is not None and run.preview_every and (done % run.preview_every == 0 or last):
            logger.preview(done, *preview(done, trainer.result))
        if saving:
            save(done)
        if stopping and not last:
            raise Interrupted(done)


def _resume(path: Path, trainer: Trainer, config: Any) -> int:
    """Restore the folder's checkpoint into ``trainer``; return the number of steps done."""
    if not path.exists():
        return 0
    step, stored = read_checkpoint_header(path)
    defaults = to_dict(type(config)(RunConfig(config.run.output)))
    differing = sorted(_differences(stored, to_dict(config) | trainer.origin, defaults))
    if differing:
        raise ConfigError(
            f"{path.parent} holds a run of another configuration ({'; '.join(differing)}): "
            "choose another run.output or delete the folder"
        )
    load_checkpoint(path, trainer.modules, {name: u.optimizer for name, u in trainer.updaters.items()})
    print(f"going on from {path}, step {step}")
    return step


def _differences(stored: dict, current: dict, defaults: dict, prefix: str = "") -> Iterator[str]:
    """What keeps a run from going on; a key that it was stored without, as older versions did, has its default."""
    for name in sorted(stored.keys() | current.keys()):
        key, default = f"{prefix}{name}", defaults.get(name)
        a, b = stored.get(name, default), current.get(name)
        if key in _FREE_KEYS or key == "report":
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, default, f"{key}.")
        elif name not in current:
            yield f"{key}: {a!r} there, unknown now"
        elif a != b:
            yield f"{key}: {a!r} there, {b!r} now"


class _StopFlag:
    """Turns the first SIGINT or SIGTERM into a request to stop after the current step; a second one acts at once."""

    def __enter__(self) -> _StopFlag:
        self.requested = False
        self._previous: dict[int, Any] = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        except ValueError:  # not the main thread: signals are the caller's business
            pass
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        tqdm.write("\nstopping after this step (once more: at once) ...")
