"""The command line: help, suggestions, precedence, exit statuses, one-line errors, and the commands end to end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import dimo_ext
from dimo import checkpoint, cli, doctor, state_dicts
from dimo.checkpoint import load_model, read_model_config, save_model, versions
from dimo.config import (
    DistillConfig,
    EvaluateConfig,
    MethodConfig,
    PretrainConfig,
    SampleConfig,
    SamplingConfig,
    load_config,
)
from dimo.evaluation import METRICS
from dimo.generator import OneStepGenerator, sample_keys
from dimo.sample import make_sampler
from dimo.teachers import DigitsTeacher, MaskGITTeacher
from tests.golden import FIXTURES

TINY = {"width": 16, "depth": 1, "heads": 2, "mlp_width": 32, "dropout": 0.0}
NETWORK = ["--network.width", "16", "--network.depth", "1", "--network.mlp-width", "32"]
RUN = ["--run.steps", "3", "--run.batch-size", "8", "--run.preview-every", "0", "--run.device", "cpu"]


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    """Messages are not broken into lines by a narrow terminal."""
    monkeypatch.setenv("COLUMNS", "300")


def tiny(kind=DigitsTeacher, **sizes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind.build(TINY | sizes)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def teacher(tmp_path) -> Path:
    return save_model(tmp_path / "teacher", tiny(), cli.TEACHER_FORMAT)


@pytest.fixture
def student(tmp_path) -> Path:
    OneStepGenerator(tiny(), MethodConfig(student_temperature=1.5)).save_pretrained(tmp_path / "student")
    return tmp_path / "student"


def run(*arguments) -> int:
    """The exit status, whether `main` returns it or the flag parser leaves with it."""
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as leaving:
        return leaving.code


def write(path: Path, values) -> Path:
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), encoding="utf-8")
    return path


def assert_one_line_error(capsys, message: str) -> None:
    """On stderr, prefixed, without traceback; nothing on stdout."""
    out, err = capsys.readouterr()
    assert err.startswith("dimo: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert out == ""


# --- help -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), (["-h"], 0), (["help"], 0), ([], 2)])
def test_usage_lists_every_command(arguments, status, capsys):
    assert run(*arguments) == status
    out = capsys.readouterr().out
    for command in ("pretrain", "distill", "convert", "sample", "evaluate", "report", "doctor"):
        assert f"\n  {command} " in out


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("pretrain", ["--run.output", "--network.width", "--condition-dropout", "--config FILE.yaml"]),
        ("distill", ["--method.r-init", "--teacher.path", "--report.teacher-steps", "--config FILE.yaml"]),
        (
            "sample",
            [
                "--model",
                "--sampler {ancestral,confident,halton,amused,mdlm}",
                "Samples a class",
                "--sweep.steps",
                "--prompts",
            ],
        ),
        ("evaluate", ["--model", "--seeds", "--reference {validation,test}", "--steps", "--guidance-scale"]),
        ("report", ["usage: dimo report FOLDER"]),
        ("doctor", ["--json"]),
    ],
)
def test_help_of_a_command(command, shown, capsys):
    assert run(command, "--help") == 0
    out, err = capsys.readouterr()
    assert f"usage: dimo {command}" in out
    assert all(text in out for text in shown)
    assert err == ""


def test_help_shows_the_values_of_the_config(tmp_path, capsys):
    path = write(tmp_path / "c.yaml", {"run": {"output": "x", "steps": 4321}})
    assert run("distill", "--config", path, "--help") == 0
    assert "4321" in capsys.readouterr().out


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"dimo {versions()['dimo-ext']}\n"


# --- parsing --------------------------------------------------------------------------------------------------------


def test_flags_override_yaml_and_yaml_overrides_defaults(tmp_path):
    path = write(
        tmp_path / "c.yaml",
        "run: {output: x, seed: 3, steps: 50}\nmethod: {r_init: 0.4}\nstudent: {learning_rate: 1e-4, clip_norm: 2}\n",
    )
    flags = ["--run.seed", "9", "--student.clip-norm", "None", "--report.teacher-steps", "3", "5"]
    for config_flag in (["--config", str(path)], [f"--config={path}"]):
        config = cli._parse("distill", DistillConfig, [*config_flag, *flags])
        assert (config.run.output, config.run.seed, config.run.steps) == ("x", 9, 50)
        assert (config.method.r_init, config.method.guidance_scale) == (0.4, MethodConfig().guidance_scale)
        assert (config.student.learning_rate, config.student.clip_norm) == (1e-4, None)
        assert config.report.teacher_steps == (3, 5)


def test_flags_alone_give_the_same_as_yaml(tmp_path):
    path = write(tmp_path / "c.yaml", {"run": {"output": "x"}, "mask_schedule": "cosine", "network": TINY})
    flags = ["--run.output", "x", "--mask-schedule", "cosine", "--network.dropout", "0.0", "--network.heads", "2"]
    assert cli._parse("pretrain", PretrainConfig, [*flags, *NETWORK]) == load_config(PretrainConfig, path)
    assert cli._parse("sample", SampleConfig, []) == SampleConfig()


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("distil", "unknown command 'distil': did you mean distill?"),
        ("docter", "unknown command 'docter': did you mean doctor?"),
        ("xyz", "unknown command 'xyz'; commands: pretrain, distill, convert, sample, evaluate, report, doctor"),
    ],
)
def test_unknown_command(command, message, capsys):
    assert run(command) == 2
    assert_one_line_error(capsys, message)


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["distill", "--run.output", "x", "--run.stepps", "3"], ["--run.stepps", "--run.steps INT"]),
        (["sample", "--temprature", "2"], ["--temprature", "--temperature"]),
        (["distill"], ["--run.output"]),
        (["distill", "--run.output", "x", "--run.steps", "ten"], ["--run.steps", "ten"]),
        (["distill", "--run.output", "x", "--method.r-init", "3"], ["r_init: expected a number in [0, 1], got 3.0"]),
        (["distill", "--run.output", "x", "--method.divergence", "kl"], ["divergence: expected one of forward_kl"]),
        (["sample", "--mask-schedule", "mage"], ["mask_schedule: expected one of linear, square, cosine, arccos, got"]),
        (["sample", "--sampler", "random"], ["random", "ancestral"]),
        (["sample", "--output", "a.jpg"], ["output: expected a path that ends in .png, or a folder, got 'a.jpg'"]),
        (["evaluate", "--output", "a.csv"], ["output: expected a path that ends in .json, got 'a.csv'"]),
        (["evaluate", "--seeds", "0"], ["seeds: expected an integer >= 1, got 0"]),
        (["evaluate", "--reference", "train"], ["train", "validation"]),
    ],
)
def test_bad_flags(arguments, messages, capsys):
    """The flag parser frames its message; status 2, on stderr, with the nearest flag or the valid values."""
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert all(message in err for message in messages)
    assert "Traceback" not in err
    assert out == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"run": {"output": "x"}, "method": {"r_innit": 1}}, "unknown key method.r_innit: did you mean method.r_init?"),
        ({"run": {"output": "x"}, "method": {"r_init": 1.5}}, "method.r_init: expected a number in [0, 1], got 1.5"),
        ({"run": {"output": "x"}, "method": {"divergence": "jefreys:1"}}, "method.divergence: expected one of"),
        ({"run": {"output": "x", "seed": -1}}, "run.seed: expected an integer in [0, 2^32), got -1"),
        ("run: [1,\nmethod: {", "not valid YAML"),
    ],
)
def test_bad_configs(content, message, tmp_path, capsys):
    path = write(tmp_path / "c.yaml", content)
    assert run("distill", "--config", path) == 2
    assert_one_line_error(capsys, message)


def test_bad_paths(tmp_path, teacher, capsys):
    file = write(tmp_path / "file", "")
    usable = save_model(tmp_path / "usable", tiny(), cli.TEACHER_FORMAT)
    (teacher / "model.safetensors").write_bytes(b"abc")
    out = ["--run.output", tmp_path / "run"]
    for arguments, message in [
        (["distill", "--config", tmp_path / "no.yaml"], "no.yaml: cannot be read"),
        (["distill", *out, "--teacher.path", tmp_path / "nowhere"], "nowhere: expected a folder"),
        (["distill", *out, "--teacher.path", teacher], "truncated or not a safetensors file"),
        (["distill", *out, "--teacher.kind", "vq"], "teacher kind: expected one of digits, maskgit, halton"),
        (["distill", "--run.output", file / "run"], "output: expected a folder that can be written"),
        (["pretrain", "--run.output", file / "run"], "output: expected a folder that can be written"),
        (["distill", *out, "--run.device", "tpu"], "device: expected auto, cpu or an available cuda device"),
        (["sample", "--model", tmp_path / "nowhere", "--output", tmp_path / "a.png"], "nowhere: expected a folder"),
        (["sample", "--model", usable, "--output", file / "a.png"], "output: expected a folder that can be written"),
        (["sample", "--model", teacher, "--output", tmp_path / "a.png"], "truncated or not a safetensors file"),
        (["evaluate", "--model", tmp_path / "nowhere", "--output", tmp_path / "a.json"], "nowhere: expected a folder"),
        (["evaluate", "--model", usable, "--output", file / "a.json"], "output: expected a folder that can be written"),
        (["evaluate", "--model", teacher, "--output", tmp_path / "a.json"], "truncated or not a safetensors file"),
        (["doctor", "--jsn"], "unknown argument '--jsn'"),
        (["report"], "report: expected the folder of one run, got nothing"),
        (["report", "a", "b"], "report: expected the folder of one run, got a b"),
        (["report", "--run"], "report: expected the folder of one run, got --run"),
        (["report", tmp_path / "nowhere"], "report: expected the folder of a run (with log.jsonl"),
    ]:
        assert run(*arguments) == 2, arguments
        assert_one_line_error(capsys, message)


@pytest.fixture
def places(tmp_path, monkeypatch) -> Path:
    """The current folder, with what a user may take for a teacher; weights and prompts must stay unread."""
    for name, form, kind in [
        ("digits_teacher", "dimo.teacher", "digits"), ("digits_student", "dimo.one_step_generator", "digits"),
        ("prompted_teacher", "dimo.teacher", "meissonic"), ("prompted_student", "dimo.one_step_generator", "meissonic"),
    ]:  # fmt: skip
        (tmp_path / name).mkdir()
        write(tmp_path / name / "config.json", json.dumps({"format": form, "format_version": 1, "kind": kind}))
    (tmp_path / "released" / "transformer").mkdir(parents=True)
    for module, name in ((checkpoint, "read_safetensors"), (state_dicts, "import_extra"), (cli, "read_prompts")):
        monkeypatch.setattr(module, name, None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


KINDS = "digits, maskgit, halton, meissonic, amused, mdlm"
NO_KIND = f"teacher kind: expected one of {KINDS} (a folder or Hugging Face id belongs in the path), got "
NOT_OURS = "expected a folder with model.safetensors and config.json for kind 'digits', found none"


@pytest.mark.parametrize("prompts", [False, True], ids=["", "prompts"])
@pytest.mark.parametrize("command", ["distill", "doctor"])
@pytest.mark.parametrize(
    ("kind", "path", "message"),
    [
        # a path, an id or nonsense in the place of the kind
        ("digits_teacher", None, NO_KIND + "'digits_teacher'"),
        ("prompted_teacher", None, NO_KIND + "'prompted_teacher'"),
        ("digits_teacher", "digits_teacher", NO_KIND + "'digits_teacher'"),
        ("released", None, NO_KIND + "'released'"),
        ("some-one/teacher", None, NO_KIND + "'some-one/teacher'"),
        ("Meissonic", "prompted_teacher", NO_KIND + "'Meissonic'"),
        # a kind in the place of the path
        (None, "meissonic", "teacher path: expected a file or folder, got 'meissonic', which is a teacher kind"),
        ("meissonic", "meissonic", "teacher path: expected a file or folder, got 'meissonic', which is a teacher kind"),
        # nothing there
        (None, "nowhere", f"nowhere: {NOT_OURS}"),
        ("meissonic", "nowhere", "nowhere: no such file or folder; `dimo convert` writes one"),
        # another kind than the one given, or than digits, which is left out
        ("meissonic", "digits_teacher", "digits_teacher: expected a teacher of kind 'meissonic', got 'digits'"),
        (None, "prompted_teacher", "prompted_teacher: expected a teacher of kind 'digits', got 'meissonic'"),
        (None, "released", f"released: {NOT_OURS}"),
        # a student
        (None, "digits_student", "expected a teacher (dimo.teacher), got a student (dimo.one_step_generator)"),
        ("meissonic", "prompted_student", "expected a teacher (dimo.teacher), got a student (dimo.one_step_generator)"),
    ],
)
def test_what_is_no_teacher_is_told_before_anything_is_read(command, kind, path, message, prompts, places, capsys):
    arguments = ["--config", write(places / "c.yaml", {"run": {"output": "out"}})]
    arguments += ["--teacher.kind", kind] if kind else []
    arguments += ["--teacher.path", path] if path else []
    arguments += ["--prompts.path", "p.txt"] if prompts else []
    assert run(command, *arguments) == 2
    assert_one_line_error(capsys, message)
    assert not (places / "out").exists()


def published(folder: Path) -> dict[str, Path]:
    """Files that a user may point at: good, truncated, foreign, with objects."""
    good, vqgan = FIXTURES / "maskgit" / "MaskGIT_tiny.pth", FIXTURES / "vqgan" / "last.ckpt"
    files = {"good": good, "vqgan": vqgan, "halton": FIXTURES / "halton" / "ImageNet_tiny.pth"}
    files |= {name: folder / f"{name}.pth" for name in ("truncated", "page", "objects", "missing")}
    files["truncated"].write_bytes(good.read_bytes()[:-1000])
    files["page"].write_text("<html>not found</html>")
    torch.save(torch.load(good, weights_only=True) | {"callback": Path("x")}, files["objects"])
    return files


@pytest.mark.parametrize("command", ["distill", "doctor", "convert"])
@pytest.mark.parametrize(
    ("kind", "path", "tokenizer", "message"),
    [
        ("halton", "good", None, "of another layout: expected pos_emb.weight"),
        ("maskgit", "halton", "vqgan", "of another layout: expected pos_emb"),
        ("maskgit", "truncated", "vqgan", "truncated or not a file of torch.save"),
        ("maskgit", "page", "vqgan", "truncated or not a file of torch.save"),
        ("maskgit", "good", "missing", "missing.pth: no such file or folder"),
        ("maskgit", "good", "good", "expected a state dict ('state_dict' or 'model' or bare tensors)"),
        ("maskgit", "missing", "vqgan", "no such file or folder; `dimo convert` writes one"),
        ("maskgit", "objects", "vqgan", "refused, it holds more than tensors (pathlib."),
        ("muse", "good", None, "teacher kind: expected one of digits, maskgit, halton"),
    ],
)
def test_published_files_that_cannot_be_used(command, kind, path, tokenizer, message, tmp_path, capsys):
    """One line and status 2 before anything is trained or written."""
    files = published(tmp_path)
    arguments = ["--teacher.kind", kind, "--teacher.path", files[path], "--teacher.heads", "4"]
    arguments += ["--teacher.tokenizer", files[tokenizer]] if tokenizer else []
    output = ["--output", tmp_path / "out"] if command == "convert" else ["--run.output", tmp_path / "out"]
    if command == "doctor":
        output = ["--config", write(tmp_path / "c.yaml", {"run": {"output": str(tmp_path / "out")}})]
    if path == "objects" and command == "convert":  # pathlib's paths are made of str by a class: left out unread
        assert run(command, *arguments, *output) == 0
        return
    assert run(command, *arguments, *output) == 2
    assert_one_line_error(capsys, message)
    assert not (tmp_path / "out").exists()


def test_convert_needs_a_path_and_a_place(tmp_path, capsys):
    file = write(tmp_path / "file", "")
    good = [
        "--teacher.kind",
        "maskgit",
        "--teacher.heads",
        "4",
        "--teacher.path",
        FIXTURES / "maskgit/MaskGIT_tiny.pth",
    ]
    good += ["--teacher.tokenizer", FIXTURES / "vqgan"]
    for arguments, message in [
        (["--teacher.kind", "maskgit", "--output", tmp_path / "a"], "teacher.path: expected a published checkpoint"),
        ([*good, "--output", file / "a"], "output: expected a folder that can be written"),
        ([*good, "--output", file], "to be a folder or absent, found a file"),
        (
            [*good, "--output", tmp_path / "a", "--teacher.heads", "5"],
            "width: expected a multiple of heads (5), got 32",
        ),
    ]:
        assert run("convert", *arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_doctor_estimates_memory(tmp_path, capsys):
    config = write(tmp_path / "c.yaml", {"run": {"output": "unused", "device": "cpu"}})
    sizes = []
    for batch in ("16", "2048"):
        assert run("doctor", "--config", config, "--run.batch-size", batch) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1].startswith("in all ")
        assert "cpu has" in lines[-1]
        sizes.append(float(next(line for line in lines if line.startswith("activations")).split()[1]))
    assert sizes[1] > sizes[0]


def test_errors_of_a_real_process(tmp_path):
    """Status 2 and nothing but the line on stderr."""
    command = [sys.executable, "-W", "ignore", "-m", "dimo.cli", "distill", "--config", str(tmp_path / "no.yaml")]
    # Not in the source folder, which would stand before the installed package on the path.
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("dimo: error: config ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_missing_package_is_named(tmp_path, monkeypatch, capsys):
    for name in [*(n for n in sys.modules if n.split(".")[0] == "matplotlib"), "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert run("distill", "--run.output", tmp_path / "run", *RUN) == 2
    assert_one_line_error(capsys, "needs matplotlib: pip install 'dimo-ext[train]'")


def test_diverging_training_is_status_1(tmp_path, capsys):
    arguments = ["--run.output", tmp_path, "--optimizer.learning-rate", "1e30", "--optimizer.warmup-steps", "0"]
    assert run("pretrain", *arguments, *RUN, *NETWORK, "--run.no-tensorboard") == 1
    err = capsys.readouterr().err
    last = err.splitlines()[-1]
    assert last.startswith("dimo: error: step ")
    assert "is not finite" in last
    assert "Traceback" not in err


def test_keyboard_interrupt_is_status_130(monkeypatch, capsys):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli._COMMANDS, "sample", (interrupted, SampleConfig))
    assert run("sample") == 130
    assert capsys.readouterr().err == "stopped\n"


def test_full_disk_is_status_1(monkeypatch, capsys):
    def full(config):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(cli._COMMANDS, "sample", (full, SampleConfig))
    assert run("sample") == 1
    assert_one_line_error(capsys, "No space left on device")


def test_one_config_file_at_most(tmp_path, capsys):
    assert run("sample", "--config", tmp_path / "a.yaml", "--config", tmp_path / "b.yaml") == 2
    assert_one_line_error(capsys, "--config: expected one file")


# --- doctor ---------------------------------------------------------------------------------------------------------


def test_doctor_text(capsys):
    assert run("doctor") == 0
    out = capsys.readouterr().out
    for text in (torch.__version__, "cpu ", "gpu ", "module ", "driver ", "backend ", "safetensors ", "matplotlib "):
        assert text in out
    for operator in dimo_ext.build_info()["operators"]:
        assert f"\n  {operator} " in out


def test_doctor_json(capsys):
    assert run("doctor", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(json.dumps(doctor.diagnose()))
    assert report["packages"]["torch"] == torch.__version__
    assert report["memory_gib"] > 0


# --- sample ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("student", []),
        ("student", ["--temperature", "0"]),
        ("student", ["--steps", "3", "--mask-schedule", "linear"]),
        ("teacher", ["--steps", "2", "--guidance-scale", "1.5"]),
        ("teacher", ["--steps", "2", "--sampler", "confident", "--temperature", "0.8"]),
    ],
)
def test_sample_writes_a_picture_that_the_seed_decides(model, flags, request, tmp_path, capsys):
    folder, pictures = request.getfixturevalue(model), []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        target = tmp_path / "new" / f"{name}.png"
        arguments = ["--model", folder, "--output", target, "--per-class", "2", "--seed", seed, "--device", "cpu"]
        assert run("sample", *arguments, *flags) == 0
        assert capsys.readouterr().out == f"{target}\n"
        pictures.append(target.read_bytes())
    assert pictures[0].startswith(b"\x89PNG")
    assert pictures[0] == pictures[1]
    assert pictures[0] != pictures[2]


def test_sample_needs_a_model_of_pictures(tmp_path, capsys):
    model = tiny(MaskGITTeacher, grid_size=2, vocab_size=5, num_classes=3)
    folder = save_model(tmp_path / "maskgit", model, cli.TEACHER_FORMAT)
    assert run("sample", "--model", folder, "--output", tmp_path / "a.png", "--steps", "1") == 2
    assert_one_line_error(capsys, "model: expected one with a tokeniser, ")


# --- evaluate -------------------------------------------------------------------------------------------------------


def test_evaluate_writes_and_prints_the_metrics(student, tmp_path, capsys):
    """Two seeds from the second on: the numbers, their intervals, the recipes and what they were measured with."""
    pytest.importorskip("sklearn")
    target = tmp_path / "new" / "metrics.json"
    arguments = ["--model", student, "--seeds", "2", "--seed", "1", "--reference", "validation", "--device", "cpu"]
    assert run("evaluate", *arguments, "--output", target) == 0
    out = capsys.readouterr().out
    document = json.loads(target.read_text(encoding="utf-8"))
    real, row = document["rows"]
    assert (real["kind"], row["name"], row["network_evaluations"]) == ("real", "student, 1 step", 1)
    assert list(row["metrics"]) == list(METRICS)
    assert (document["sample_count"], document["reference"], document["reveal"]) == (1258, "validation", None)
    assert document["config"]["seed"] == 1
    recall = row["metrics"]["recall"]
    assert len(recall["values"]) == 2
    assert f"{recall['mean']:.3f} ± {(recall['high'] - recall['low']) / 2:.3f}" in out
    assert all(recipe in out for recipe in document["recipes"].values())
    assert f"torch {torch.__version__}" in out
    assert out.endswith(f"{target}\n")


@pytest.mark.parametrize(
    ("model", "flags", "expected"),
    [
        ("student", ["--steps", "2"], ("student, 2 steps", "student", 2, 2)),
        ("student", [], ("student, 1 step", "student", 1, 1)),
        ("teacher", [], ("teacher, 16 steps", "teacher", 16, 16)),
        ("teacher", ["--steps", "3", "--guidance-scale", "2"], ("teacher, 3 steps", "teacher", 3, 6)),
        ("teacher", ["--steps", "99", "--sampler", "confident"], ("teacher, 99 steps", "teacher", 99, 64)),
    ],
)
def test_cost_of_a_sampler(model, flags, expected, request, monkeypatch):
    """What is measured says how often it evaluates its network, and keeps to it."""
    network, entries = load_model(request.getfixturevalue(model))
    sampler = make_sampler(network, entries, cli._parse("evaluate", EvaluateConfig, flags))
    assert sampler[:4] == expected
    rows, logits = [], network.logits
    monkeypatch.setattr(
        network, "logits", lambda tokens, *args, **kw: rows.append(len(tokens)) or logits(tokens, *args, **kw)
    )
    assert sampler.draw(torch.arange(10), sample_keys(0, 10)).shape == (10, 64)
    assert sum(rows) == 10 * sampler.network_evaluations


def test_evaluate_needs_digits(tmp_path, capsys):
    model = tiny(MaskGITTeacher, grid_size=2, vocab_size=5, num_classes=3)
    folder = save_model(tmp_path / "maskgit", model, cli.TEACHER_FORMAT)
    assert run("evaluate", "--model", folder, "--output", tmp_path / "a.json") == 2
    assert_one_line_error(capsys, "model: expected one of kind 'digits', which has metrics, got kind 'maskgit'")
    assert not (tmp_path / "a.json").exists()


# --- pretrain, distill, sample --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A teacher of three steps, a student distilled from it in three, and what was printed."""
    folder = tmp_path_factory.mktemp("chain")
    assert run("pretrain", "--run.output", folder / "pre", *RUN, *NETWORK) == 0
    settings = {"teacher_steps": [1], "few_steps": [], "sampling_seeds": 2}
    config = write(folder / "distill.yaml", {"report": settings, "run": {"output": "unused"}})
    arguments = ["--config", config, "--run.output", folder / "run", "--teacher.path", folder / "pre" / "teacher"]
    assert run("distill", *arguments, *RUN) == 0
    return folder


def test_pretraining_saves_a_teacher(chain):
    config = read_model_config(chain / "pre" / "teacher")
    assert config["format"] == cli.TEACHER_FORMAT
    assert config["recipe"]["run"]["steps"] == 3
    assert set(config["metrics"]) == {f"{split}_cross_entropy" for split in ("train", "validation", "test")}
    assert all(2.0 < value < 3.5 for value in config["metrics"].values())  # near log 17 = 2.83 after three steps
    averaged = load_file(chain / "pre" / "checkpoint.safetensors")
    saved = load_file(chain / "pre" / "teacher" / "model.safetensors")
    assert all(torch.equal(value, averaged[f"ema/{name}"]) for name, value in saved.items())


def test_distillation_leaves_its_results(chain):
    folder = chain / "run"
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "checkpoint.safetensors", "comparison.png", "config.yaml", "curves.png", "log.jsonl", "metrics.json",
        "report.html", "student", "student.png", "table.md", "tensorboard",
    }  # fmt: skip
    config = load_config(DistillConfig, folder / "config.yaml")
    assert (config.run.steps, config.report.teacher_steps) == (3, (1,))
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    rows = ["real images (floor)", "teacher, 1 step", "student before training", "student, 1 step"]
    assert [row["name"] for row in metrics["rows"]] == rows
    assert [row["network_evaluations"] for row in metrics["rows"]] == [None, 2, 1, 1]  # the teacher is guided
    assert metrics["config"] == read_model_config(folder / "student")["recipe"]
    table = (folder / "table.md").read_text(encoding="utf-8")
    assert all(name in table for name in rows)


def test_report_of_a_finished_run_and_of_a_pretraining(chain, capsys):
    finished = (chain / "run" / "report.html").read_bytes()
    assert b"One network evaluation" in finished
    for folder in ("run", "pre"):
        assert run("report", chain / folder) == 0
        assert capsys.readouterr().out == f"{chain / folder / 'report.html'}\n"
    assert (chain / "run" / "report.html").read_bytes() == finished
    assert b"Pretraining: step 3 of 3" in (chain / "pre" / "report.html").read_bytes()


def test_distilled_student_is_its_moving_average(chain):
    student = OneStepGenerator.from_pretrained(chain / "run" / "student")
    averaged = load_file(chain / "run" / "checkpoint.safetensors")
    for name, value in student.model.state_dict().items():
        assert torch.equal(value, averaged[f"ema/{name}"])
    assert student.sampling == SamplingConfig()


def test_distilled_student_samples(chain, tmp_path):
    assert run("sample", "--model", chain / "run" / "student", "--output", tmp_path / "s.png", "--per-class", "1") == 0
    assert (tmp_path / "s.png").stat().st_size > 1000


def test_distilling_into_the_folder_again_refuses_another_setting(chain, capsys):
    arguments = ["--run.output", chain / "run", "--teacher.path", chain / "pre" / "teacher", *RUN]
    assert run("distill", *arguments, "--method.r-init", "0.5") == 2
    err = capsys.readouterr().err
    assert "method.r_init: 0.85 there, 0.5 now" in err.splitlines()[-1]
