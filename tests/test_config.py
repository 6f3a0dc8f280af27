"""Configurations: YAML in and out, one clear error a mistake, defaults, immutability."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from dimo.config import (
    ConfigError,
    DistillConfig,
    EvaluateConfig,
    MethodConfig,
    NetworkConfig,
    OptimizerConfig,
    PretrainConfig,
    ReportConfig,
    RunConfig,
    SampleConfig,
    SamplingConfig,
    TeacherConfig,
    from_dict,
    load_config,
    to_dict,
)

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
RUN = {"output": "runs/x"}


def config_class(path: Path) -> type:
    """The configuration that a shipped file fills: a teacher's has a network."""
    return PretrainConfig if "network" in yaml.safe_load(path.read_text(encoding="utf-8")) else DistillConfig


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# --- YAML -----------------------------------------------------------------------------------------------------------


def test_there_are_shipped_configs():
    assert {"digits.yaml", "digits_teacher.yaml"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_config_survives_a_round_trip(path, tmp_path):
    """What is written back reads as the same configuration, and holds every key of the file."""
    config = load_config(config_class(path), path)
    again = write(tmp_path, yaml.safe_dump(to_dict(config), sort_keys=False))
    assert load_config(type(config), again) == config
    given, stored = yaml.safe_load(path.read_text(encoding="utf-8")), to_dict(config)

    def held(part, whole):
        for key, value in part.items():
            if isinstance(value, dict):
                held(value, whole[key])
            else:
                assert whole[key] == value, key

    held(given, stored)


def test_to_dict_holds_plain_values():
    """Tuples become lists: JSON and YAML read them back equal."""
    values = to_dict(DistillConfig(RunConfig("x")))
    assert values["student"]["betas"] == [0.5, 0.99]
    assert values["report"]["teacher_steps"] == [1, 2, 4, 8, 16]
    assert from_dict(DistillConfig, values) == DistillConfig(RunConfig("x"))


def test_numbers_that_yaml_reads_as_strings(tmp_path):
    """YAML 1.1 takes 1e-3 for a string; a float field takes it as the number it is, an integer field does not."""
    path = write(tmp_path, "run: {output: x}\nstudent: {learning_rate: 1e-3, betas: [0.5, 9e-1], eps: 1}\n")
    config = load_config(DistillConfig, path).student
    assert (config.learning_rate, config.betas, config.eps) == (1e-3, (0.5, 0.9), 1.0)
    assert isinstance(config.eps, float)
    with pytest.raises(ConfigError, match=r"run\.steps: expected an integer, got '1e3'"):
        from_dict(DistillConfig, {"run": {**RUN, "steps": "1e3"}})


def test_lists_become_tuples():
    config = from_dict(DistillConfig, {"run": RUN, "report": {"teacher_steps": [2, 5]}})
    assert config.report.teacher_steps == (2, 5)
    assert from_dict(DistillConfig, {"run": RUN, "report": {"few_steps": []}}).report.few_steps == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: [", "not valid YAML"),
        ("- 1\n- 2\n", "the file: expected a mapping of keys to values"),
        ("", "missing key run"),
        ("run: {steps: 3}", "missing key run.output"),
        ("run: {output: x, seed: 1, seed: 2}", "key 'seed' stands twice"),
        ("run: {output: x}\nrun: {output: y}", "key 'run' stands twice, the second time in line 2"),
        ("run:\n", "run: expected a mapping of keys to values, got None"),
    ],
)
def test_unusable_files(text, message, tmp_path):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(DistillConfig, path)
    assert str(caught.value).startswith(f"config {path}: ")
    assert message in str(caught.value)


def test_unreadable_files(tmp_path):
    missing, binary = tmp_path / "no.yaml", tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    for path in (missing, binary, tmp_path):
        with pytest.raises(ConfigError, match="cannot be read") as caught:
            load_config(DistillConfig, path)
        assert str(path) in str(caught.value)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"method": {"r_innit": 0.5}}, "unknown key method.r_innit: did you mean method.r_init?"),
        ({"student": {"learning_rat": 1}}, "unknown key student.learning_rat: did you mean student.learning_rate?"),
        ({"methods": {}}, "unknown key methods: did you mean method?"),
        ({"r_init": 0.5}, "unknown key r_init: did you mean method.r_init?"),
        ({"run": {"output": "x", "divergence": 4}}, "unknown key run.divergence: did you mean method.divergence?"),
        ({"teacher": {"zzz": 1}}, "unknown key teacher.zzz; valid keys: kind, path"),
        ({"run": {"output": "x", 3: 4}}, "unknown key run.3"),
    ],
)
def test_unknown_key_names_its_path_and_the_nearest_valid_one(data, message):
    with pytest.raises(ConfigError) as caught:
        from_dict(DistillConfig, {"run": RUN} | data)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("section", "key", "value", "expected"),
    [
        ("run", "steps", 1.5, "an integer"),
        ("run", "steps", True, "an integer"),
        ("run", "steps", "ten", "an integer"),
        ("run", "output", 3, "a string"),
        ("run", "tensorboard", 1, "true or false"),
        ("run", "tensorboard", "false", "true or false"),
        ("run", "ema_decay", "high", "a number"),
        ("run", "ema_decay", True, "a number"),
        ("method", "freeze", "all", "one of none, recipe"),
        ("method", "embedding_noise_scale", "std", "one of unit, rms"),
        ("student", "betas", 0.9, "a list"),
        ("student", "betas", [0.9], "a list of 2 values"),
        ("student", "decay", "linear", "one of constant, cosine"),
        ("run", "precision", "float16", "one of float32, bfloat16"),
        ("student", "clip_norm", "off", "a number"),
        ("report", "teacher_steps", 4, "a list"),
        ("report", "reference", "train", "one of validation, test"),
        ("teacher", "path", 4, "a string"),
    ],
)
def test_wrong_types(section, key, value, expected):
    values = {"run": dict(RUN)}
    values.setdefault(section, {})[key] = value
    with pytest.raises(ConfigError) as caught:
        from_dict(DistillConfig, values)
    assert str(caught.value) == f"{section}.{key}: expected {expected}, got {value!r}"


def test_wrong_type_inside_a_list_names_the_place():
    with pytest.raises(ConfigError, match=r"report\.teacher_steps\[1\]: expected an integer, got 2\.5"):
        from_dict(DistillConfig, {"run": RUN, "report": {"teacher_steps": [1, 2.5]}})


NAN, INF = float("nan"), float("inf")

OUT_OF_RANGE = [
    (NetworkConfig, {"width": 0}, "width"),
    (NetworkConfig, {"depth": 0}, "depth"),
    (NetworkConfig, {"width": 10, "heads": 4}, "width"),
    (NetworkConfig, {"dropout": 1.0}, "dropout"),
    (OptimizerConfig, {"learning_rate": 0.0}, "learning_rate"),
    (OptimizerConfig, {"learning_rate": NAN}, "learning_rate"),
    (OptimizerConfig, {"learning_rate": INF}, "learning_rate"),
    (OptimizerConfig, {"betas": [0.9, 1.0]}, "betas"),
    (OptimizerConfig, {"eps": 0.0}, "eps"),
    (OptimizerConfig, {"weight_decay": -0.1}, "weight_decay"),
    (OptimizerConfig, {"warmup_steps": -1}, "warmup_steps"),
    (OptimizerConfig, {"final_fraction": 1.1}, "final_fraction"),
    (OptimizerConfig, {"clip_norm": 0.0}, "clip_norm"),
    (RunConfig, {"output": "x", "steps": 0}, "steps"),
    (RunConfig, {"output": "x", "batch_size": 0}, "batch_size"),
    (RunConfig, {"output": "x", "accumulation_steps": 0}, "accumulation_steps"),
    (RunConfig, {"output": "x", "log_every": 0}, "log_every"),
    (RunConfig, {"output": "x", "save_every": 0}, "save_every"),
    (RunConfig, {"output": "x", "preview_every": -1}, "preview_every"),
    (RunConfig, {"output": "x", "ema_decay": 1.0}, "ema_decay"),
    (RunConfig, {"output": " "}, "output"),
    (PretrainConfig, {"run": {"output": "x", "cuda_graph": True}}, "run.cuda_graph"),
    (RunConfig, {"output": "x", "seed": -1}, "seed"),
    (RunConfig, {"output": "x", "seed": 2**32}, "seed"),
    (PretrainConfig, {"run": RUN, "mask_schedule": "cosin"}, "mask_schedule"),
    (PretrainConfig, {"run": RUN, "condition_dropout": 1.0}, "condition_dropout"),
    (PretrainConfig, {"run": RUN, "label_smoothing": -0.1}, "label_smoothing"),
    (MethodConfig, {"r_init": 1.01}, "r_init"),
    (MethodConfig, {"r_init": NAN}, "r_init"),
    (MethodConfig, {"embedding_noise": -0.1}, "embedding_noise"),
    (MethodConfig, {"mask_schedule": "sqrt"}, "mask_schedule"),
    (MethodConfig, {"divergence": "kl"}, "divergence"),
    (MethodConfig, {"divergence": "jeffreys:much"}, "divergence"),
    (MethodConfig, {"guidance_scale": -1.0}, "guidance_scale"),
    (MethodConfig, {"guidance_scale": INF}, "guidance_scale"),
    (MethodConfig, {"teacher_temperature": 0.0}, "teacher_temperature"),
    (MethodConfig, {"teacher_temperature": INF}, "teacher_temperature"),
    (MethodConfig, {"student_temperature": 0.0}, "student_temperature"),
    (MethodConfig, {"student_temperature": NAN}, "student_temperature"),
    (MethodConfig, {"student_temperature": INF}, "student_temperature"),
    (MethodConfig, {"num_auxiliary_steps": 0}, "num_auxiliary_steps"),
    (MethodConfig, {"label_smoothing": 1.0}, "label_smoothing"),
    (ReportConfig, {"teacher_steps": []}, "teacher_steps"),
    (ReportConfig, {"teacher_steps": [0]}, "teacher_steps"),
    (ReportConfig, {"teacher_seeds": 0}, "teacher_seeds"),
    (ReportConfig, {"few_steps": [1]}, "few_steps"),
    (ReportConfig, {"sampling_seeds": 0}, "sampling_seeds"),
    (SampleConfig, {"steps": 0}, "steps"),
    (SampleConfig, {"output": "samples.jpg"}, "output"),
    (SampleConfig, {"sampler": "confident", "temperature": 0}, "temperature"),
    (SamplingConfig, {"student_temperature": -0.1}, "student_temperature"),
    (SamplingConfig, {"r_init": -0.1}, "r_init"),
    (SampleConfig, {"mask_schedule": "mage"}, "mask_schedule"),
    (SampleConfig, {"temperature": -1.0}, "temperature"),
    (SampleConfig, {"temperature": INF}, "temperature"),
    (SampleConfig, {"guidance_scale": -0.5}, "guidance_scale"),
    (SampleConfig, {"guidance_scale": INF}, "guidance_scale"),
    (SampleConfig, {"per_class": 0}, "per_class"),
    (SampleConfig, {"seed": -1}, "seed"),
    (EvaluateConfig, {"steps": 0}, "steps"),
    (EvaluateConfig, {"output": "metrics.txt"}, "output"),
    (EvaluateConfig, {"seeds": 0}, "seeds"),
    (EvaluateConfig, {"seed": -1}, "seed"),
    (EvaluateConfig, {"mask_schedule": "mage"}, "mask_schedule"),
]


@pytest.mark.parametrize(("cls", "values", "key"), OUT_OF_RANGE)
def test_out_of_range_values(cls, values, key):
    with pytest.raises(ConfigError, match=rf"^{key}: expected .*, got "):
        from_dict(cls, values)


def test_out_of_range_value_of_a_section_names_the_full_path():
    with pytest.raises(ConfigError, match=r"^method\.r_init: expected a number in \[0, 1\], got 2\.0"):
        from_dict(DistillConfig, {"run": RUN, "method": {"r_init": 2}})


def test_schedule_and_divergence_errors_list_the_valid_names():
    with pytest.raises(ConfigError, match="linear, square, cosine, arccos, mage"):
        MethodConfig(mask_schedule="cosin")
    with pytest.raises(ConfigError, match=r"linear, square, cosine, arccos, got"):
        SampleConfig(mask_schedule="mage")
    with pytest.raises(ConfigError, match=r"forward_kl, .*jeffreys, .*le_cam"):
        MethodConfig(divergence="kl")


@pytest.mark.parametrize(
    ("cls", "values"),
    [
        (MethodConfig, {"r_init": 0, "embedding_noise": 1, "guidance_scale": 0, "mask_schedule": "mage"}),
        (MethodConfig, {"r_init": 1, "divergence": "jeffreys:-0.2"}),
        (SampleConfig, {"temperature": 0, "guidance_scale": 0}),
        (SampleConfig, {"temperature": None}),
        (EvaluateConfig, {"steps": 1, "seeds": 1}),
        (ReportConfig, {"teacher_seeds": 1, "sampling_seeds": 1}),
        (SamplingConfig, {"student_temperature": 0}),
        (OptimizerConfig, {"warmup_steps": 0, "final_fraction": 0, "clip_norm": None}),
        (RunConfig, {"output": "x", "seed": 2**32 - 1, "ema_decay": 0, "preview_every": 0}),
    ],
)
def test_values_at_the_edge_are_accepted(cls, values):
    config = from_dict(cls, values)
    assert {name: getattr(config, name) for name in values} == values


# --- defaults and immutability --------------------------------------------------------------------------------------


def test_defaults():
    """One test pins the defaults that results depend on: change it together with them."""
    config = from_dict(DistillConfig, {"run": RUN})
    assert config == DistillConfig(run=RunConfig("runs/x"))
    method = dataclasses.asdict(config.method)
    assert (method["r_init"], method["mask_schedule"], method["divergence"]) == (0.85, "arccos", "forward_kl")
    assert (method["teacher_temperature"], method["student_temperature"]) == (1.0, 1.0)
    assert (config.teacher, config.report.reference) == (TeacherConfig("digits", None), "test")
    assert config.student.learning_rate < config.auxiliary.learning_rate
    pretraining = from_dict(PretrainConfig, {"run": RUN})
    assert (pretraining.kind, pretraining.condition_dropout) == ("digits", 0.1)
    assert from_dict(SampleConfig, {}) == SampleConfig()
    assert (config.report.few_steps, config.report.sampling_seeds, config.report.teacher_seeds) == ((2, 4), 5, 1)
    assert (EvaluateConfig().seeds, EvaluateConfig().reference, EvaluateConfig().steps) == (5, "test", None)


@pytest.mark.parametrize(
    "config",
    [DistillConfig(RunConfig("x")), PretrainConfig(RunConfig("x")), SampleConfig(), RunConfig("x"), MethodConfig(),
     OptimizerConfig(), NetworkConfig(), TeacherConfig(), ReportConfig()],
    ids=lambda config: type(config).__name__,
)  # fmt: skip
def test_configurations_are_frozen(config):
    name = dataclasses.fields(config)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, getattr(config, name))
