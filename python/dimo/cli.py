"""The `dimo` command: parse → configuration → call."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import tyro
import yaml
from torch import Tensor

from . import doctor
from .checkpoint import (
    TEACHER_FORMAT,
    CheckpointError,
    check_replaceable,
    check_teacher,
    fingerprint,
    load_model,
    load_teacher,
    model_folder,
    save_model,
    versions,
)
from .comparison import compare, measure, metrics_document, preview_digits, real_row, table, teacher_grid
from .config import (
    ConfigError,
    ConvertConfig,
    DistillConfig,
    EvaluateConfig,
    PretrainConfig,
    SampleConfig,
    TeacherConfig,
    load_config,
    to_dict,
)
from .data.digits import load_digits_split
from .data.prompts import read_prompts
from .evaluation import DigitsEvaluator
from .files import import_extra, prepare_output, write_json, write_text
from .generator import OneStepGenerator
from .memory import device_memory, memory_text, training_memory
from .page import PAGE, write_page
from .pretrain import held_out_loss
from .runlog import TrainingError
from .sample import make_sampler, preview_images, write_comparison, write_samples
from .state_dicts import objects_ignored
from .teachers import DigitsTeacher, Teacher
from .trainer import (
    DistillationTrainer,
    Interrupted,
    PretrainingTrainer,
    resolve_device,
    run_training,
    seeded_generator,
)


def pretrain(config: PretrainConfig) -> None:
    """Train a masked diffusion teacher by masked-token prediction."""
    import_extra("sklearn.datasets", "the digits")
    device = resolve_device(config.run.device)
    output = prepare_output(config.run.output, folders=("teacher",))
    check_replaceable(output / "teacher")
    data = {name: load_digits_split(name) for name in ("train", "validation", "test")}
    with seeded_generator(torch.device("cpu"), config.run.seed):
        model = DigitsTeacher.build(to_dict(config.network)).to(device)
    trainer = PretrainingTrainer(model, data["train"], config)

    def loss_on(name: str, averaged: Teacher) -> float:
        split = data[name]
        return held_out_loss(averaged, split.tokens.to(device), split.labels.to(device), config.mask_schedule)

    def preview(_: int, averaged: Teacher) -> tuple[dict[str, float], Tensor]:
        return {"validation_loss": loss_on("validation", averaged)}, teacher_grid(averaged)

    run_training(trainer, config, preview)
    metrics = {f"{name}_cross_entropy": round(loss_on(name, trainer.result), 4) for name in data}
    save_model(output / "teacher", trainer.result, TEACHER_FORMAT, recipe=to_dict(config), metrics=metrics)
    print(f"masked cross-entropy (nats a token): {metrics}\nteacher: {output / 'teacher'}")


def distill(config: DistillConfig) -> None:
    """Distil a teacher into a one-step generator."""
    device, prompts = resolve_device(config.run.device), _prompts(config)
    teacher = _load(config.teacher).to(device)
    if prompts:
        teacher.attach_prompts(prompts, config.prompts)
    digits = isinstance(teacher, DigitsTeacher)  # the data set that metrics exist for
    if digits:
        for module in ("sklearn.svm", "matplotlib.figure"):
            import_extra(module, "the digits' report")
    output = prepare_output(config.run.output, folders=("student",))
    check_replaceable(output / "student")
    evaluator = DigitsEvaluator() if digits else None
    trainer = DistillationTrainer(teacher, config)
    if evaluator:
        preview = preview_digits(config, evaluator)
    else:
        preview = preview_images(config.method) if teacher.decodes else None
        if preview is None:
            print("the teacher has no tokeniser: neither pictures nor texts of this run", file=sys.stderr)
    run_training(trainer, config, preview)
    write_text(output / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False))
    student = OneStepGenerator(trainer.result, config.method, recipe=to_dict(config), provenance=trainer.origin)
    student.save_pretrained(output / "student")
    if evaluator:
        print("sampling teacher and student ...")
        print(f"\n{compare(teacher, student, config, evaluator)}\n")
    elif teacher.decodes:
        write_comparison(teacher, student, config.method, output)
    page = write_page(output)
    for path in sorted(p for p in output.iterdir() if not p.name.startswith(".") and p.name != PAGE):
        print(path)
    print(page)


def _prompts(config: DistillConfig) -> list[str]:
    """Return what a text-to-image teacher is trained on, before anything heavy is loaded; [] for other kinds."""
    if check_teacher(config.teacher.kind, config.teacher.path).prompted:
        return read_prompts(config.prompts)
    if config.prompts.path is not None:
        raise ConfigError(f"prompts.path: teacher kind {config.teacher.kind!r} takes no prompts")
    return []


def _load(config: TeacherConfig) -> Teacher:
    check_teacher(config.kind, config.path)  # load_teacher also takes a folder in the place of the kind
    return load_teacher(config.kind, config.path, **config.options())


def convert(config: ConvertConfig) -> None:
    """Write a published checkpoint as a folder of safetensors and config.json; code inside pickles is never run."""
    output = Path(config.output)
    check_replaceable(output)
    with objects_ignored():
        model = _load(config.teacher)
    prepare_output(output.parent, folders=(output.name,))
    provenance = {"converted": to_dict(config.teacher), "weights": fingerprint(model)}
    if config.student:
        OneStepGenerator(model, config.sampling, provenance=provenance).save_pretrained(output)
    else:
        save_model(output, model, TEACHER_FORMAT, provenance=provenance)
    print(output)


def sample(config: SampleConfig) -> None:
    """Draw samples from a teacher or a one-step student."""
    print(write_samples(config))


def evaluate(config: EvaluateConfig) -> None:
    """Measure a teacher or a one-step student of the digits against real images."""
    for module in ("sklearn.svm", "scipy.stats"):
        import_extra(module, "the digits' metrics")
    device, target = resolve_device(config.device), Path(config.output)
    model, entries = load_model(model_folder(config.model))
    if not isinstance(model, DigitsTeacher):
        raise ConfigError(f"model: expected one of kind 'digits', which has metrics, got kind {model.kind!r}")
    prepare_output(target.parent, files=(target.name,))
    sampler, evaluator = make_sampler(model.to(device), entries, config), DigitsEvaluator()
    print(f"{sampler.name}: sampling with {config.seeds} seed{'s' if config.seeds > 1 else ''} ...", flush=True)
    seeds = range(config.seed, config.seed + config.seeds)
    rows = [real_row(evaluator, config.reference), measure(sampler, evaluator, config.reference, device, seeds)]
    document = metrics_document(rows, config, evaluator, config.reference)
    write_json(target, document)
    print(f"\n{table(document)}\n\n{target}")


def report(arguments: list[str]) -> int:
    """Write report.html, a run on one page, finished or not: dimo report FOLDER."""
    if arguments in (["-h"], ["--help"]):
        print(f"usage: dimo report FOLDER\n\n{report.__doc__}")
        return 0
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise ConfigError(f"report: expected the folder of one run, got {' '.join(arguments) or 'nothing'}")
    print(write_page(arguments[0]))
    return 0


def memory(config: DistillConfig) -> None:
    """Estimate the memory that `dimo distill` needs with this configuration, before anything is trained."""
    device = resolve_device(config.run.device)
    teacher = _load(config.teacher)
    print(memory_text(training_memory(teacher, config), device, device_memory(device)))


def diagnose(arguments: list[str]) -> int:
    """Show the machine and the build, or with --config what a distillation needs of the machine."""
    if any(argument.split("=")[0] == "--config" for argument in arguments):
        memory(_parse("doctor", DistillConfig, arguments))
        return 0
    return doctor.main(arguments)


_COMMANDS: dict[str, tuple[Callable[[Any], None], type]] = {
    "pretrain": (pretrain, PretrainConfig),
    "distill": (distill, DistillConfig),
    "convert": (convert, ConvertConfig),
    "sample": (sample, SampleConfig),
    "evaluate": (evaluate, EvaluateConfig),
}

_PLAIN: dict[str, Callable[[list[str]], int]] = {"report": report, "doctor": diagnose}  # without a configuration

_USAGE = """usage: dimo COMMAND [--config FILE.yaml] [--key.name VALUE ...]

Distil masked diffusion models into one-step generators.

commands:
  pretrain   {pretrain}
  distill    {distill}
  convert    {convert}
  sample     {sample}
  evaluate   {evaluate}
  report     {report}
  doctor     {doctor}

`dimo COMMAND --help` lists every key with its default. A YAML file fills keys first, flags override it.
example: dimo distill --config configs/digits.yaml --run.seed 1 --run.output runs/seed1"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0, 1 training failed, 2 bad input, 130 stopped by a signal."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        summaries = {name: call.__doc__ for name, (call, _) in _COMMANDS.items()}
        print(_USAGE.format(doctor=doctor.SUMMARY, report=report.__doc__, **summaries))
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"dimo {versions()['dimo-ext']}")
        return 0
    try:
        return _dispatch(arguments[0], arguments[1:])
    except (ConfigError, CheckpointError, ImportError) as error:
        print(f"dimo: error: {error}", file=sys.stderr)
        return 2
    except (TrainingError, OSError, torch.OutOfMemoryError) as error:  # OSError: a disk that is full, say
        print(f"dimo: error: {error}", file=sys.stderr)
        return 1
    except Interrupted as event:
        print(f"{event}; the same command goes on from there", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _dispatch(command: str, arguments: list[str]) -> int:
    if command in _PLAIN:
        return _PLAIN[command](arguments)
    if command not in _COMMANDS:
        names = [*_COMMANDS, *_PLAIN]
        close = difflib.get_close_matches(command, names, n=1)
        hint = f": did you mean {close[0]}?" if close else f"; commands: {', '.join(names)}"
        raise ConfigError(f"unknown command {command!r}{hint}")
    call, cls = _COMMANDS[command]
    call(_parse(command, cls, arguments))
    return 0


def _parse(command: str, cls: type, arguments: list[str]) -> Any:
    """Read ``--config`` first, then let flags override its values."""
    first = argparse.ArgumentParser(prog=f"dimo {command}", add_help=False, allow_abbrev=False)
    first.add_argument("--config", action="append", default=[])
    known, rest = first.parse_known_args(arguments)
    if len(known.config) > 1:
        raise ConfigError(f"--config: expected one file, got {', '.join(known.config)}")
    summary = memory.__doc__ if command == "doctor" else _COMMANDS[command][0].__doc__
    description = f"{summary} --config FILE.yaml fills the keys below, flags override it."
    prog = f"dimo {command}"
    if not known.config:
        return tyro.cli(cls, args=rest, prog=prog, description=description)
    return tyro.cli(cls, args=rest, default=load_config(cls, known.config[0]), prog=prog, description=description)


if __name__ == "__main__":
    sys.exit(main())
