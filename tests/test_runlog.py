"""A run's log: what is written, what a resumed run keeps of it, and how it is read back."""

import json

import pytest
import torch

from dimo.checkpoint import CheckpointError
from dimo.config import RunConfig
from dimo.runlog import LOG, RunLogger, read_log


def logger(folder, start: int = 0) -> RunLogger:
    return RunLogger(RunConfig(output=str(folder), steps=100, tensorboard=False), start, (), warmup_steps=20)


def write(log: RunLogger, step: int, entropy: float) -> None:
    log.add({"token_entropy": torch.tensor(entropy), "gradient_norm": torch.tensor(1.0)})
    log.flush(step)


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


# --- writing --------------------------------------------------------------------------------------------------------


def test_notes_go_into_the_next_line(tmp_path):
    with logger(tmp_path) as log:
        write(log, 10, 1.0)
        log.note({"phase_ms": {"a": 1.5}})
        write(log, 20, 1.0)
        write(log, 30, 1.0)
    assert [line.get("phase_ms") for line in lines(tmp_path)] == [None, {"a": 1.5}, None]


def test_warnings_are_printed_and_logged_once(tmp_path, capsys):
    with logger(tmp_path) as log:
        for step, entropy in [(10, 1.0), (20, 0.1), (30, 0.1)]:
            write(log, step, entropy)
        log.preview(30, {"diversity": 0.5}, None)
    warned = {line["step"]: line["warning"] for line in lines(tmp_path) if "warning" in line}
    assert list(warned) == [20, 30]
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert printed == [f"warning: {text}" for texts in warned.values() for text in texts]
    assert [text.split(":")[0] for text in printed] == ["warning"] * 2


def test_a_resumed_run_knows_what_it_was_warned_of(tmp_path, capsys):
    """It neither repeats a warning nor takes its own first step for the start of the run."""
    with logger(tmp_path) as log:
        for step, entropy in [(10, 1.0), (20, 0.9), (30, 0.1), (40, 0.1)]:
            write(log, step, entropy)
    assert capsys.readouterr().out.count("warning: ") == 1
    with logger(tmp_path, start=30) as log:
        write(log, 40, 0.1)
    assert "warning: " not in capsys.readouterr().out
    with logger(tmp_path, start=20) as log:
        write(log, 30, 0.1)
    assert "token entropy 0.1 nats, 1 at the start" in capsys.readouterr().out
    assert [(line["step"], "warning" in line) for line in lines(tmp_path)] == [(10, False), (20, False), (30, True)]


# --- reading --------------------------------------------------------------------------------------------------------


def test_lines_of_a_step_are_merged_and_ordered(tmp_path):
    log = tmp_path / LOG
    log.write_text(
        '{"step": 2, "a": 1, "warning": ["x"]}\n{"step": 1, "a": 2}\n'
        '{"step": 2, "a": 3, "b": 4, "warning": ["y"]}\n{"step": 3, "a"'
    )
    assert list(read_log(log).items()) == [
        (1, {"step": 1, "a": 2}),
        (2, {"step": 2, "a": 3, "b": 4, "warning": ["x", "y"]}),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"step": 1\n{"step": 2}\n', "line 1: "),
        ("a table\n", "line 1: "),
        ('[1]\n{"step": 2}\n', r"line 1: expected a record with a step, got '\[1\]'"),
        ('{"step": "1"}\n{"step": 2}\n', "line 1: expected a record with a step"),
        ('{"step": 1, "warning": "x"}\n{"step": 2}\n', "line 1: expected a record with a step"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_other_files_are_refused(content, message, tmp_path):
    log = tmp_path / LOG
    log.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=rf"log\.jsonl(:|,) {message}"):
        read_log(log)
