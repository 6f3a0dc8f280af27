"""The README's Python and the docstrings' examples run as written, and the API page is up to date."""

from __future__ import annotations

import doctest
import inspect
import re
import runpy
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


@pytest.mark.parametrize("path", sorted((ROOT / "configs").iterdir()), ids=lambda path: path.stem)
def test_committed_configurations_load(path):
    load_config(PretrainConfig if path.stem == "digits_teacher" else DistillConfig, path)


def test_maskgit_has_the_released_settings():
    """github.com/yuanzhi-zhu/DiMO at 24613741: configs/DIMO_MaskGit.yaml, with the launch script's batch."""
    config = load_config(DistillConfig, ROOT / "configs" / "maskgit_imagenet256.yaml")
    method = config.method
    assert (method.r_init, method.embedding_noise, method.embedding_noise_scale) == (0.6, 0.1, "unit")
    assert (method.mask_schedule, method.guidance_scale, method.student_temperature) == ("arccos", 2.0, 1.0)
    assert dimo_ext.parse_divergence(method.divergence) == dimo_ext.Jeffreys(0.0)
    assert (method.num_auxiliary_steps, method.freeze, method.label_smoothing) == (1, "recipe", 0.1)
    assert config.student == config.auxiliary
    assert (config.student.learning_rate, config.student.betas, config.student.eps) == (1e-5, (0.9, 0.999), 1e-6)
    assert (config.student.clip_norm, config.student.warmup_steps, config.student.decay) == (1.0, 100, "constant")
    assert (config.run.batch_size, config.run.ema_decay, config.run.precision) == (64, 0.9999, "bfloat16")


# --- the API page and the docstrings it is made of ------------------------------------------------------------------


def test_the_api_page_is_what_the_docstrings_say():
    page = runpy.run_path(str(ROOT / "scripts" / "api_page.py"))["page"]()
    assert page == (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), "run make docs"


FUNCTIONS = [name for name in dimo_ext.__all__ if not inspect.isclass(getattr(dimo_ext, name))]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", [*FUNCTIONS, "Divergence"])
def test_examples_of_docstrings(name, backend):
    """Each has one, which gives what it says whatever serves it."""
    globs = {"torch": torch} | {public: getattr(dimo_ext, public) for public in dimo_ext.__all__}
    (docstring,) = doctest.DocTestFinder(recurse=False).find(getattr(dimo_ext, name), name, globs=globs)
    assert docstring.examples
    with dimo_ext.use_backend(backend):
        assert doctest.DocTestRunner().run(docstring).failed == 0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_is_described(name):
    value = getattr(dimo_ext, name)
    _, _, rest = inspect.getdoc(value).partition("Args:\n")
    names = re.findall(r"^ {4}(\w[\w, \n]*):", rest.partition("\n\n")[0], re.MULTILINE)
    assert set(re.findall(r"\w+", " ".join(names))) == set(inspect.signature(value).parameters)


def test_every_key_of_build_info_is_described():
    keys = inspect.getdoc(dimo_ext.build_info).split("Keys:\n")[1].split("\n\n")[0]
    assert re.findall(r"^ {4}(\w+): ", keys, re.MULTILINE) == list(dimo_ext.build_info())


@pytest.mark.filterwarnings("ignore:.*batching rule.*")
def test_draws_under_vmap_are_as_the_conventions_say():
    """A key made inside serves every element alike; a batch of keys gives each its own draws."""
    tokens, elements = torch.zeros(3, 1, 64, dtype=torch.int64), torch.arange(3)

    def masks(key_of):
        return torch.vmap(lambda x, n: dimo_ext.mask_tokens(x, 0.5, 1, key=key_of(n)).mask)(tokens, elements)

    inside = masks(lambda _: dimo_ext.random_key(5))
    mapped = masks(lambda n: dimo_ext.fold_in(dimo_ext.random_key(5), n))
    assert len(inside.unique(dim=0)) == 1
    assert len(mapped.unique(dim=0)) == 3
