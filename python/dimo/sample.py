"""`dimo sample`: a seed a sample, batches that change nothing, grids, folders of PNG files, sweeps of settings."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

import dimo_ext

from .checkpoint import load_model, model_folder
from .comparison import Draw, Sampler, row_name, teacher_sampling
from .config import ConfigError, MethodConfig, SampleConfig, SamplerConfig, to_dict
from .files import prepare_output
from .generator import FORMAT as STUDENT_FORMAT
from .generator import OneStepGenerator
from .pictures import grid, save_png, to_pil
from .samplers import sample_ancestral, sample_confident, sample_few_steps, sample_halton, sample_one_step
from .teachers import Teacher
from .trainer import Preview, resolve_device

if TYPE_CHECKING:
    from PIL.Image import Image

_SAMPLERS = {"ancestral": sample_ancestral, "confident": sample_confident, "halton": sample_halton}
_FEW_CLASSES = 10  # shown of a model with many, unless the configuration names them


def write_samples(config: SampleConfig) -> Path:
    """Draw samples into a picture or a folder of pictures and return where they are.

    Sample n is drawn with seed ``config.seed + n`` alone: how samples are batched, or divided among processes that get
    different seeds, changes none of them.
    """
    device, target = resolve_device(config.device), Path(config.output)
    variants = _variants(config)
    model, entries = load_model(model_folder(config.model))
    inputs = _inputs(model, config)
    samplers = {label: make_sampler(model, entries, variant) for label, variant in variants.items()}
    if not model.decodes:
        raise ConfigError(f"model: expected one with a tokeniser, {config.model} of kind {model.kind!r} has none")
    model.to(device)
    if target.suffix == ".png":
        prepare_output(target.parent, files=(target.name,))
        _write_grid(model, samplers, inputs, config)
    else:
        prepare_output(target)
        _write_folder(model, samplers.popitem()[1], inputs, config)
    return target


def make_sampler(model: Teacher, entries: dict[str, Any], config: SamplerConfig) -> Sampler:
    """Return the sampler that a loaded model's kind and the configuration ask for; it takes conditions and keys."""
    if entries["format"] == STUDENT_FORMAT:
        return _student_sampler(OneStepGenerator.from_entries(model, entries, config.model), config)
    sampler = _SAMPLERS[config.sampler]
    steps, temperature = config.steps or 16, 1.0 if config.temperature is None else config.temperature

    def draw(condition: Any, keys: Tensor) -> Tensor:
        return sampler(
            model, condition, steps=steps, mask_schedule=config.mask_schedule, guidance_scale=config.guidance_scale,
            temperature=temperature, key=keys,
        )  # fmt: skip

    evaluations = steps if sampler is sample_ancestral else min(steps, model.seq_len)
    calls = 1 if config.guidance_scale == 1.0 else 2
    return Sampler(row_name("teacher", steps), "teacher", steps, evaluations * calls, draw)


def _student_sampler(student: OneStepGenerator, config: SamplerConfig) -> Sampler:
    if config.guidance_scale != 1.0:
        raise ConfigError(f"guidance_scale: expected 1 for a student, which has learnt it, got {config.guidance_scale}")
    steps, sampling = config.steps or 1, student.sampling
    if config.temperature is not None:
        sampling = dataclasses.replace(sampling, student_temperature=config.temperature)

    def draw(condition: Any, keys: Tensor) -> Tensor:
        return sample_few_steps(
            student.model, condition, sampling, steps=steps, mask_schedule=config.mask_schedule, key=keys
        )

    return Sampler(row_name("student", steps), "student", steps, steps, draw)


def preview_images(method: MethodConfig) -> Preview:
    """Return the preview of a distillation: the same one-step samples every time, side by side; no numbers."""

    def preview(step: int, model: Teacher) -> tuple[dict[str, float], Tensor]:
        inputs = _spread_classes(model)
        keys = dimo_ext.random_key(range(len(inputs)), device=model.device)
        images = model.decode(sample_one_step(model, model.condition(inputs), method, key=keys))
        return {}, images.permute(1, 2, 0, 3).flatten(2).cpu()

    return preview


def write_comparison(teacher: Teacher, student: OneStepGenerator, method: MethodConfig, path: Path) -> None:
    """Draw a few classes by the teacher in 16 steps and in 1, and by the student in 1, with the same seeds."""
    inputs = _spread_classes(teacher)
    condition = teacher.condition(inputs)
    keys = dimo_ext.random_key(range(len(inputs)), device=teacher.device)
    drawn = {
        f"teacher, {steps} step{'s' if steps > 1 else ''}": sample_ancestral(
            teacher, condition, steps=steps, key=keys, **teacher_sampling(method)
        )
        for steps in (16, 1)
    }
    drawn["student, 1 step"] = student.tokens(condition, key=keys)
    save_png(grid([to_pil(teacher.decode(tokens)) for tokens in drawn.values()], list(drawn)), path)


def _variants(config: SampleConfig) -> dict[str, SampleConfig]:
    """The configurations of a sweep by label, in the order of their rows; without a sweep, the one."""
    swept = {name: values for name, values in vars(config.sweep).items() if values}
    if swept and not config.output.endswith(".png"):
        raise ConfigError(f"output: expected a path that ends in .png for a sweep, got {config.output!r}")
    variants = {}
    for values in itertools.product(*swept.values()):
        chosen = dict(zip(swept, values, strict=True))
        label = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in chosen.items())
        variants[label] = dataclasses.replace(config, **chosen)
    return variants


def _inputs(model: Teacher, config: SampleConfig) -> list[Any]:
    """What the samples are drawn for, each once: classes by number."""
    count = model.num_classes
    wrong = [c for c in config.classes if not 0 <= c < count]
    if wrong:
        raise ConfigError(f"classes: expected numbers in [0, {count}), got {wrong[0]}")
    return list(config.classes) or _spread_classes(model)


def _spread_classes(model: Teacher) -> list[int]:
    """Every class, or some spread evenly over many."""
    shown = min(model.num_classes, _FEW_CLASSES)
    return [n * model.num_classes // shown for n in range(shown)]


def _batches(model: Teacher, draw: Draw, inputs: list[Any], config: SampleConfig) -> Iterator[tuple[int, Any, Image]]:
    """Yield seed, input and picture of each sample, ``per_class`` of each input in turn."""
    samples = [(config.seed + n, inputs[n // config.per_class]) for n in range(len(inputs) * config.per_class)]
    for start in range(0, len(samples), config.batch_size):
        seeds, asked = zip(*samples[start : start + config.batch_size], strict=True)
        keys = dimo_ext.random_key(seeds, device=model.device)
        pictures = to_pil(model.decode(draw(model.condition(list(asked)), keys)))
        yield from zip(seeds, asked, pictures, strict=True)


def _write_grid(model: Teacher, samplers: dict[str, Sampler], inputs: list[Any], config: SampleConfig) -> None:
    """A row a class; of a sweep, a row a setting, with the same seeds in all."""
    drawn = [[p for *_, p in _batches(model, s.draw, inputs, config)] for s in samplers.values()]
    if len(samplers) > 1:
        rows, labels = drawn, list(samplers)
    else:
        count = config.per_class
        rows = [drawn[0][i : i + count] for i in range(0, len(drawn[0]), count)]
        labels = [str(asked) for asked in inputs]
    save_png(grid(rows, labels), config.output, _provenance(config))


def _write_folder(model: Teacher, sampler: Sampler, inputs: list[Any], config: SampleConfig) -> None:
    """A file a sample, named by seed and class, which draw it again."""
    for seed, asked, picture in _batches(model, sampler.draw, inputs, config):
        save_png(picture, Path(config.output) / f"seed{seed:08d}_class{asked:04d}.png", _provenance(config))


def _provenance(config: SampleConfig) -> dict[str, str]:
    return {"dimo": json.dumps({k: v for k, v in to_dict(config).items() if k not in ("output", "batch_size")})}
