"""`dimo sample`: a seed a sample, batches that change nothing, grids, folders of files, sweeps of settings."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

import dimo_ext

from .checkpoint import load_model, model_folder
from .comparison import Draw, Sampler, row_name, teacher_sampling
from .config import ConfigError, MethodConfig, PromptsConfig, SampleConfig, SamplerConfig, to_dict
from .data.prompts import read_prompts
from .files import prepare_output, write_text
from .generator import FORMAT as STUDENT_FORMAT
from .generator import OneStepGenerator
from .pictures import grid, save_png, to_pil
from .published_samplers import sample_amused, sample_mdlm
from .report import COMPARISON
from .samplers import sample_ancestral, sample_confident, sample_few_steps, sample_halton, sample_one_step
from .teachers import Teacher
from .texts import TextSample, sequence_entropy, summary, write_lines
from .trainer import Preview, resolve_device

if TYPE_CHECKING:
    from PIL.Image import Image

_SAMPLERS = {
    "ancestral": sample_ancestral, "confident": sample_confident, "halton": sample_halton, "amused": sample_amused,
    "mdlm": sample_mdlm,
}  # fmt: skip
_FILES = (".png", ".jsonl")  # of pictures, of texts; another output is a folder
_EXAMPLES = 10  # classes or prompts that are shown of many, unless the configuration names them
_LABEL = 40  # characters of a prompt beside its row


def write_samples(config: SampleConfig) -> Path:
    """Draw samples into a picture or a folder of pictures and return where they are.

    Sample n is drawn with seed ``config.seed + n`` alone: how samples are batched, or divided among processes that get
    different seeds, changes none of them.
    """
    device, target = resolve_device(config.device), Path(config.output)
    variants, prompts = _variants(config), _prompts(config)
    model, entries = load_model(model_folder(config.model))
    inputs = _inputs(model, config, prompts)
    samplers = {label: make_sampler(model, entries, variant) for label, variant in variants.items()}
    if not model.decodes:
        raise ConfigError(f"model: expected one with a tokeniser, {config.model} of kind {model.kind!r} has none")
    _check_output(model, config)
    model.to(device)
    if target.suffix in _FILES:
        prepare_output(target.parent, files=(target.name,))
    else:
        prepare_output(target)
    write = _write_texts if model.writes_text else _write_grid if target.suffix in _FILES else _write_folder
    write(model, samplers, inputs, config)
    return target


def _check_output(model: Teacher, config: SampleConfig) -> None:
    wrong, right = _FILES if model.writes_text else _FILES[::-1]
    if Path(config.output).suffix == wrong:
        wanted = f"a path that ends in {right}, or a folder, for kind {model.kind!r}"
        raise ConfigError(f"output: expected {wanted}, got {config.output!r}")


def make_sampler(model: Teacher, entries: dict[str, Any], config: SamplerConfig) -> Sampler:
    """Return the sampler that a loaded model's kind and the configuration ask for; it takes conditions and keys."""
    if entries["format"] == STUDENT_FORMAT:
        return _student_sampler(OneStepGenerator.from_entries(model, entries, config.model), config)
    sampler = _SAMPLERS[config.sampler]
    steps, temperature = config.steps or 16, 1.0 if config.temperature is None else config.temperature
    settings = {"mask_schedule": config.mask_schedule, "guidance_scale": config.guidance_scale}
    if sampler is sample_mdlm:  # has a schedule of its own, and nothing to guide by
        if config.guidance_scale != 1.0:
            raise ConfigError(f"guidance_scale: expected 1 for the sampler 'mdlm', got {config.guidance_scale}")
        settings = {}

    def draw(condition: Any, keys: Tensor) -> Tensor:
        return sampler(model, condition, steps=steps, temperature=temperature, key=keys, **settings)

    evaluations = steps if sampler in (sample_ancestral, sample_amused) else min(steps, model.seq_len)
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

    def preview(step: int, model: Teacher) -> tuple[dict[str, float], Tensor | None]:
        inputs = model.examples(_EXAMPLES)
        keys = dimo_ext.random_key(range(len(inputs)), device=model.device)
        tokens = sample_one_step(model, model.condition(inputs), method, key=keys)
        if model.writes_text:
            return {"sequence_entropy": sequence_entropy(tokens).mean().item()}, None
        return {}, model.decode(tokens).permute(1, 2, 0, 3).flatten(2).cpu()

    return preview


def write_comparison(teacher: Teacher, student: OneStepGenerator, method: MethodConfig, folder: Path) -> None:
    """Draw some examples by the teacher in 16 steps and in 1, and by the student in 1, with the same seeds.

    Pictures go side by side into comparison.png, texts into comparison.jsonl, and their entropies are printed.
    """
    inputs = teacher.examples(_EXAMPLES)
    condition = teacher.condition(inputs)
    keys = dimo_ext.random_key(range(len(inputs)), device=teacher.device)
    drawn = {
        f"teacher, {steps} step{'s' if steps > 1 else ''}": sample_ancestral(
            teacher, condition, steps=steps, key=keys, **teacher_sampling(method)
        )
        for steps in (16, 1)
    }
    drawn["student, 1 step"] = student.tokens(condition, key=keys)
    if teacher.writes_text:
        texts = {label: _texts(teacher, range(len(inputs)), tokens) for label, tokens in drawn.items()}
        write_lines(folder / "comparison.jsonl", [(label, text) for label, part in texts.items() for text in part])
        print("\n".join(summary(label, part) for label, part in texts.items()))
    else:
        save_png(grid([to_pil(teacher.decode(t)) for t in drawn.values()], list(drawn)), folder / COMPARISON)


def _variants(config: SampleConfig) -> dict[str, SampleConfig]:
    """The configurations of a sweep by label, in the order of their rows; without a sweep, the one."""
    swept = {name: values for name, values in vars(config.sweep).items() if values}
    if swept and Path(config.output).suffix not in _FILES:
        raise ConfigError(f"output: expected a path that ends in .png for a sweep, or in .jsonl, got {config.output!r}")
    variants = {}
    for values in itertools.product(*swept.values()):
        chosen = dict(zip(swept, values, strict=True))
        label = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in chosen.items())
        variants[label] = dataclasses.replace(config, **chosen)
    return variants


def _prompts(config: SampleConfig) -> list[str]:
    """The prompts that a configuration gives or names, before anything heavy is loaded."""
    if config.prompts and config.prompts_file:
        raise ConfigError(f"prompts_file: expected None beside prompts, got {config.prompts_file!r}")
    if config.prompts_file:
        return read_prompts(PromptsConfig(config.prompts_file))
    return list(config.prompts)


def _inputs(model: Teacher, config: SampleConfig, prompts: list[str]) -> list[Any]:
    """What the samples are drawn for, each once: classes by number, prompts, or nothing."""
    if prompts and not model.prompted:
        raise ConfigError(f"prompts: kind {model.kind!r} takes none")
    classes = getattr(model, "num_classes", 0)
    wrong = [c for c in config.classes if not 0 <= c < classes]
    if wrong:
        expected = f"numbers in [0, {classes})" if classes else f"none for kind {model.kind!r}"
        raise ConfigError(f"classes: expected {expected}, got {wrong[0]}")
    return prompts or list(config.classes) or model.examples(_EXAMPLES if classes or model.prompted else 1)


def _batches(
    model: Teacher, draw: Draw, inputs: list[Any], config: SampleConfig
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], Tensor]]:
    """Yield seeds, numbers of the inputs and tokens of each batch, ``per_class`` samples of each input in turn."""
    samples = [(config.seed + n, n // config.per_class) for n in range(len(inputs) * config.per_class)]
    for start in range(0, len(samples), config.batch_size):
        seeds, asked = zip(*samples[start : start + config.batch_size], strict=True)
        keys = dimo_ext.random_key(seeds, device=model.device)
        yield seeds, asked, draw(model.condition([inputs[n] for n in asked]), keys)


def _pictures(model: Teacher, draw: Draw, inputs: list[Any], config: SampleConfig) -> Iterator[tuple[int, int, Image]]:
    """Yield seed, number of the input and picture of each sample."""
    for seeds, asked, tokens in _batches(model, draw, inputs, config):
        yield from zip(seeds, asked, to_pil(model.decode(tokens)), strict=True)


def _texts(model: Teacher, seeds: Sequence[int], tokens: Tensor) -> list[TextSample]:
    return [TextSample(*s) for s in zip(seeds, model.decode(tokens), sequence_entropy(tokens).tolist(), strict=True)]


def _write_texts(model: Teacher, samplers: dict[str, Sampler], inputs: list[Any], config: SampleConfig) -> None:
    """A line a text, or a file; the entropy of every set is printed."""
    drawn = {}
    for label, sampler in samplers.items():
        batches = _batches(model, sampler.draw, inputs, config)
        drawn[label] = [text for seeds, _, tokens in batches for text in _texts(model, seeds, tokens)]
        print(summary(label, drawn[label]))
    if Path(config.output).suffix in _FILES:
        write_lines(config.output, [(label, text) for label, part in drawn.items() for text in part])
        return
    for text in next(iter(drawn.values())):
        write_text(Path(config.output) / f"seed{text.seed:08d}.txt", text.text)


def _write_grid(model: Teacher, samplers: dict[str, Sampler], inputs: list[Any], config: SampleConfig) -> None:
    """A row a class or prompt; of a sweep, a row a setting, with the same seeds in all."""
    drawn = [[p for *_, p in _pictures(model, s.draw, inputs, config)] for s in samplers.values()]
    if len(samplers) > 1:
        rows, labels = drawn, list(samplers)
    else:
        count = config.per_class
        rows = [drawn[0][i : i + count] for i in range(0, len(drawn[0]), count)]
        labels = [str(asked)[:_LABEL] for asked in inputs]
    save_png(grid(rows, labels), config.output, _provenance(config))


def _write_folder(model: Teacher, samplers: dict[str, Sampler], inputs: list[Any], config: SampleConfig) -> None:
    """A file a sample, named by seed and class or prompt, which draw it again."""
    for seed, number, picture in _pictures(model, next(iter(samplers.values())).draw, inputs, config):
        asked = f"prompt{number:04d}" if model.prompted else f"class{inputs[number]:04d}"
        text = _provenance(config) | ({"prompt": inputs[number]} if model.prompted else {})
        save_png(picture, Path(config.output) / f"seed{seed:08d}_{asked}.png", text)


def _provenance(config: SampleConfig) -> dict[str, str]:
    return {"dimo": json.dumps({k: v for k, v in to_dict(config).items() if k not in ("output", "batch_size")})}
