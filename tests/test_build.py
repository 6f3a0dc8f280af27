"""What the build says about itself, how the backend is chosen, and that the library survives without compiled code."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

import dimo_ext
from dimo_ext import _backend

ROOT = Path(__file__).parents[1]
PACKAGE = Path(dimo_ext.__file__).parent
CPU = torch.device("cpu")
MASKS = "dimo_ext.mask_tokens(torch.arange(20).view(2, 10), 0.5, 99, key=dimo_ext.random_key(3)).mask.sum().item()"

native = pytest.mark.skipif(_backend._core is None, reason="no compiled module")


# ------------------------------------------------------------------------------------------------------ build_info


def test_build_info_is_json_and_complete() -> None:
    info = dimo_ext.build_info()
    assert json.loads(json.dumps(info)) == info
    assert set(info["operators"]) == set(_backend.OPERATORS)
    assert info["torch"] == torch.__version__
    assert info["cpu"]["name"]
    assert info["cpu"]["threads"] == torch.get_num_threads()
    assert (info["native_module"] is None) == (info["native_problem"] is not None)
    for service in (service for devices in info["operators"].values() for service in devices.values()):
        assert service["backend"] in ("native", "reference")
        assert (service["backend"] == "native") == (service["problem"] is None)


def test_build_info_under_the_reference() -> None:
    with dimo_ext.use_backend("reference"):
        served = dimo_ext.build_info()["operators"]["mask_tokens"]["cpu"]
    assert served == {"backend": "reference", "problem": "the reference backend was chosen"}


@native
def test_driver_status_never_raises() -> None:
    usable, reason, driver, runtime = _backend._core.cuda_driver_status()
    assert usable == (reason == "")
    assert usable <= (driver > 0)
    assert (runtime > 0) == (_backend._core.cuda_toolkit is not None)


@native
def test_a_failed_launch_names_the_operator() -> None:
    if not hasattr(_backend._core, "cuda_mask_tokens") or _backend._core.cuda_driver_status()[0]:
        pytest.skip("needs CUDA kernels and no GPU")
    with pytest.raises(RuntimeError, match=r"mask_tokens: CUDA error \d+: "):
        _backend._core.cuda_mask_tokens(0, 0, 0, 1, 1, 0.5, 0, 0, 0, 9, False, 1, 0, 0)


# --------------------------------------------------------------------------------------------- choosing the backend


def test_use_backend_refuses_unknown_names() -> None:
    with pytest.raises(ValueError, match="'auto', 'native', 'reference', got 'cuda'"), dimo_ext.use_backend("cuda"):
        pass


def test_use_backend_nests_and_restores() -> None:
    outside = _backend.current_backend()
    with dimo_ext.use_backend("reference"):
        with dimo_ext.use_backend("auto"):
            assert _backend.current_backend() == "auto"
        assert _backend.current_backend() == "reference"
        assert _backend.native_kernel("mask_tokens", CPU) is None
    assert _backend.current_backend() == outside


def test_use_backend_is_per_thread() -> None:
    seen = []
    with dimo_ext.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(_backend.current_backend()))
        thread.start()
        thread.join()
    assert seen == [_backend.current_backend()]


@native
def test_native_kernel_is_the_compiled_function() -> None:
    with dimo_ext.use_backend("native"):
        assert _backend.native_kernel("mask_tokens", CPU) is _backend._core.cpu_mask_tokens


@pytest.mark.parametrize("device", ["meta", "cuda:99"])
def test_native_without_a_kernel_says_why(device: str) -> None:
    with dimo_ext.use_backend("native"), pytest.raises(RuntimeError, match=f"mask_tokens has no native .*{device}: .+"):
        _backend.native_kernel("mask_tokens", torch.device(device))


@native
def test_native_on_an_operator_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "OPERATORS", (*_backend.OPERATORS, "future"))
    with dimo_ext.use_backend("auto"):
        assert _backend.native_kernel("future", CPU) is None
    with dimo_ext.use_backend("native"), pytest.raises(RuntimeError, match="no cpu kernel for future"):
        _backend.native_kernel("future", CPU)


def test_unregistered_operator() -> None:
    with dimo_ext.use_backend("auto"), pytest.raises(ValueError, match=r"operator 'nonsense'.*mask_tokens"):
        _backend.native_kernel("nonsense", CPU)


@native
def test_a_gpu_without_kernels_is_announced_once() -> None:
    if _backend._cuda_problem(99) is None:
        pytest.skip("this GPU is served")
    script = """
        import torch
        from dimo_ext._backend import native_kernel
        for _ in range(2):
            assert native_kernel("mask_tokens", torch.device("cuda", 99)) is None
    """
    result = run_python(script, DIMO_EXT_BACKEND="auto")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("cuda:99 is served by plain PyTorch: ") == 1


# ------------------------------------------------------------------------------- imports that meet a broken install


def run_python(script: str, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a fresh interpreter away from the source folder, with only these DIMO_EXT_ variables."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DIMO_EXT_")}
    if path is not None:
        clean["PYTHONPATH"] = os.pathsep.join([str(path), clean.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    command, folder = [sys.executable, "-c", textwrap.dedent(script)], path or PACKAGE.parent
    return subprocess.run(command, env=clean | environment, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.fixture(params=["broken", "missing"])
def damaged(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with a copy of the package whose compiled module is rubbish or not there."""
    ignored = shutil.ignore_patterns("__pycache__", "_core*")
    shutil.copytree(PACKAGE, tmp_path / "dimo_ext", ignore=ignored)
    if request.param == "broken":
        (tmp_path / "dimo_ext" / f"_core{EXTENSION_SUFFIXES[0]}").write_bytes(b"this is no shared object")
    return tmp_path


SHOW = (
    f"import dimo_ext, torch; print(dimo_ext.__file__); print({MASKS}); print(dimo_ext.build_info()['native_problem'])"
)


def test_damaged_install_runs_on_the_reference(damaged: Path) -> None:
    result = run_python(SHOW, damaged)
    assert result.returncode == 0, result.stderr
    file, masked, problem = result.stdout.splitlines()
    assert Path(file).is_relative_to(damaged)
    assert masked == "10"
    assert "compiled module" in problem
    assert result.stderr.count("RuntimeWarning: dimo_ext: running on plain PyTorch") == 1
    assert "pip install" in result.stderr


def test_damaged_install_is_quiet_when_the_reference_is_wanted(damaged: Path) -> None:
    result = run_python(SHOW, damaged, DIMO_EXT_BACKEND="reference")
    assert result.returncode == 0, result.stderr
    assert "RuntimeWarning" not in result.stderr


def test_damaged_install_fails_when_native_is_required(damaged: Path) -> None:
    result = run_python("import dimo_ext", damaged, DIMO_EXT_REQUIRE_NATIVE="1")
    assert result.returncode != 0
    assert "ImportError: DIMO_EXT_REQUIRE_NATIVE is set, but " in result.stderr


def test_damaged_install_refuses_the_native_backend(damaged: Path) -> None:
    result = run_python(SHOW, damaged, DIMO_EXT_BACKEND="native")
    assert result.returncode != 0
    assert "RuntimeError: mask_tokens has no native kernel on cpu: " in result.stderr


def test_bad_environment_variable_is_named() -> None:
    result = run_python("import dimo_ext", DIMO_EXT_BACKEND="fast")
    assert result.returncode != 0
    assert "ValueError: DIMO_EXT_BACKEND must be one of 'auto', 'native', 'reference', got 'fast'" in result.stderr


@native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_fork_after_threads_have_run() -> None:
    # numpy counts the mask: torch's own thread pool does not survive a fork, the kernel's threads must.
    script = """
        import os, torch, dimo_ext
        torch.set_num_threads(2)
        tokens, key = torch.zeros(64, 4096, dtype=torch.int64), dimo_ext.random_key(1)
        def count():
            return int(dimo_ext.mask_tokens(tokens, 0.5, 9, key=key).mask.numpy().sum())
        before = count()
        child = os.fork()
        if child == 0:
            os._exit(0 if count() == before == 64 * 2048 else 1)
        raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    result = run_python(script, DIMO_EXT_BACKEND="native")
    assert result.returncode == 0, result.stderr


# ----------------------------------------------------------------------------------------------- arrows point down


def imported_modules(path: Path) -> set[str]:
    """Absolute names a Python file imports."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {
        node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module
    }


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_operators_do_not_import_the_training_layer(path: Path) -> None:
    assert not {name for name in imported_modules(path) if name.split(".")[0] == "dimo"}


@pytest.mark.parametrize("path", sorted(p for p in (ROOT / "csrc").rglob("*.*")), ids=lambda path: path.name)
def test_kernels_know_no_framework(path: Path) -> None:
    includes = re.findall(r'#include\s*[<"]([^>"]+)', path.read_text())
    forbidden = ("torch/", "ATen/", "c10/", "Python.h") + (() if path.name == "bindings.cpp" else ("pybind11/",))
    assert not [name for name in includes if name.startswith(forbidden)]
