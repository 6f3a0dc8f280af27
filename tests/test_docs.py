"""The README's Python runs as written, its commands parse, and the API page knows every public name."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

import dimo
import dimo_ext
from dimo.config import DistillConfig, PretrainConfig, SamplingConfig, load_config
from dimo.teachers import DigitsTeacher

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


class Tiny(torch.nn.Module):
    """Stands in for the reader's network: tokens (and a condition) to logits [B, L, V]."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(vocab_size + 1, vocab_size)

    def forward(self, tokens: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        return self.table(tokens)


def test_the_training_step_of_the_readme():
    """Student and auxiliary get gradients, the teacher gets none."""
    networks = {name: Tiny(12) for name in ("student", "teacher", "auxiliary")}
    names = {
        "torch": torch,
        "B": 4,
        "L": 9,
        "V": 12,
        "seed": 0,
        "step": 3,
        "device": "cpu",
        "ratio": 0.5,
        "y": None,
        "null": None,
    }
    exec(compile(SNIPPETS[0], "README.md", "exec"), names | networks)
    moved = {name: network.table.weight.grad is not None for name, network in networks.items()}
    assert moved == {"student": True, "teacher": False, "auxiliary": True}


def test_the_student_of_the_readme(tmp_path, monkeypatch):
    """Ten images of the promised shape and range, from a folder at the promised place."""
    monkeypatch.chdir(tmp_path)
    model = DigitsTeacher.build({"width": 16, "depth": 1, "heads": 2, "mlp_width": 16})
    dimo.OneStepGenerator(model, SamplingConfig()).save_pretrained("runs/digits/student")
    names = {"torch": torch, "dimo": dimo, "dimo_ext": dimo_ext}
    exec(compile(SNIPPETS[1], "README.md", "exec"), names)
    assert names["images"].shape == (10, 1, 8, 8)
    assert 0 <= names["images"].min() <= names["images"].max() <= 1


def test_every_snippet_is_run_here():
    assert len(SNIPPETS) == 2


@pytest.mark.parametrize("path", re.findall(r"\b(?:configs|scripts|docs|benchmarks)/[\w/.]+\.\w+", README))
def test_files_that_the_readme_names_exist(path):
    assert (ROOT / path).is_file()


@pytest.mark.parametrize(("cls", "path"), [(DistillConfig, "digits.yaml"), (PretrainConfig, "digits_teacher.yaml")])
def test_committed_configurations_load(cls, path):
    load_config(cls, ROOT / "configs" / path)


@pytest.mark.parametrize("module", [dimo_ext, dimo])
def test_api_page_is_complete(module):
    """Every public name has its entry, with the first line of its docstring; `make docs` writes the page."""
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8").replace("`", "")
    for name in module.__all__:
        assert f"\n### {name}\n" in page, f"{name} is missing: run make docs"
        value = getattr(module, name)
        if callable(value):
            first = re.sub(r":\w+:", "", inspect.getdoc(value).splitlines()[0]).replace("`", "")
            assert first in page, f"the page is out of date for {name}: run make docs"
