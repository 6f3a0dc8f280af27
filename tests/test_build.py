"""What the build says about itself, how the backend is chosen, and that the library survives without compiled code."""

import ast
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import types
import warnings
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

import dimo_ext
from dimo_ext import _backend
from dimo_ext._environment import switched_on

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
        _backend._core.cuda_mask_tokens(0, 0, 0, 1, 1, 0.5, 0, 0, 0, 9, False, 1, 0, 0, 0)


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


def test_unregistered_operator() -> None:
    with dimo_ext.use_backend("auto"), pytest.raises(ValueError, match=r"operator 'nonsense'.*mask_tokens"):
        _backend.native_kernel("nonsense", CPU)


# ------------------------------------------------------- another compiled module: kernels missing, or a driver too old

SERVED, MISSING = ("mask_tokens", "fold_in"), ("token_divergence", "sample_categorical", "init_tokens")
OLD_DRIVER = "the driver is too old (the driver supports CUDA 11.0, the module was built with CUDA 13.0)"


def pretend(monkeypatch: pytest.MonkeyPatch, driver: tuple[bool, str, int, int], device_problem: str = "") -> None:
    """Let dimo_ext see a compiled module with kernels for SERVED alone, this driver, and a GPU with this problem."""
    kernels = {f"{device}_{op}": object() for device in ("cpu", "cuda") for op in SERVED}
    built = {"compiler": "GNU 13", "build_type": "Release", "cuda_toolkit": "13.0", "cuda_architectures": ["90"]}
    module = types.SimpleNamespace(
        **kernels, **built, __file__="_core.so", cuda_driver_status=lambda: driver,
        cuda_device_problem=lambda index: device_problem,
    )  # fmt: skip
    monkeypatch.setattr(_backend, "_core", module)
    monkeypatch.setattr(_backend, "_core_problem", None)
    for name in ("_announce", "_find_kernel", "_cuda_problem", "_warn_once"):  # with caches of their own, still empty
        monkeypatch.setattr(_backend, name, functools.cache(getattr(_backend, name).__wrapped__))


def announcements(calls: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught, dimo_ext.use_backend("auto"):
        warnings.simplefilter("always")
        calls()
    return [str(warning.message) for warning in caught if warning.category is RuntimeWarning]


def look_up_all(*devices: str) -> None:
    for _ in range(2):
        for op in (*SERVED, *MISSING):
            for device in devices:
                assert (_backend.native_kernel(op, torch.device(device)) is not None) == (op in SERVED)


def test_operators_without_a_kernel_are_announced_once_a_device_type(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, driver=(True, "", 13000, 13000))
    missing = [op for op in _backend.OPERATORS if op not in SERVED]
    assert announcements(lambda: look_up_all("cpu", "cuda:0", "cuda:1")) == [
        f"dimo_ext: on {device}, plain PyTorch runs {', '.join(missing)}: the compiled module has no kernel for them"
        for device in ("cpu", "cuda")
    ]


def test_native_never_falls_back_where_an_operator_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, driver=(True, "", 13000, 13000))
    with dimo_ext.use_backend("native"):
        for device in ("cpu", "cuda:0"):
            kind = torch.device(device).type
            for op in MISSING:
                reason = f"^{op} has no native .* {device}: the compiled module has no {kind} kernel for {op}$"
                with pytest.raises(RuntimeError, match=reason):
                    _backend.native_kernel(op, torch.device(device))
            for op in SERVED:
                assert _backend.native_kernel(op, torch.device(device)) is getattr(_backend._core, f"{kind}_{op}")


def test_an_announcement_points_at_the_callers_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, driver=(True, "", 13000, 13000))
    logits = torch.zeros(2, 3)
    with dimo_ext.use_backend("auto"), pytest.warns(RuntimeWarning, match="dimo_ext: on cpu, ") as caught:
        dimo_ext.token_divergence(logits, logits, "forward_kl")
    assert [warning.filename for warning in caught] == [__file__]


def test_compiled_code_announces_too(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, driver=(True, "", 13000, 13000))
    torch.compiler.reset()
    logits = torch.zeros(2, 3)
    step = torch.compile(lambda x: dimo_ext.token_divergence(x, x, "forward_kl"), fullgraph=True, backend="aot_eager")
    (said,) = announcements(lambda: (step(logits), step(logits)))
    assert said.startswith("dimo_ext: on cpu, ")


def test_the_reference_is_chosen_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, driver=(True, "", 13000, 13000))

    def calls() -> None:
        with dimo_ext.use_backend("reference"):
            dimo_ext.token_divergence(torch.zeros(2, 3), torch.zeros(2, 3), "forward_kl")

    assert announcements(calls) == []


def test_an_old_driver_is_the_reason_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, driver=(False, OLD_DRIVER, 11000, 13000))
    gpu = torch.device("cuda", 0)
    with dimo_ext.use_backend("auto"):
        info = dimo_ext.build_info()
    assert info["cuda_driver"] == {
        "usable": False, "problem": OLD_DRIVER, "driver_version": 11000, "runtime_version": 13000
    }  # fmt: skip
    assert {op["cuda"]["backend"] for op in info["operators"].values()} == {"reference"}
    assert {op["cuda"]["problem"] for op in info["operators"].values()} == {OLD_DRIVER}
    assert info["operators"]["mask_tokens"]["cpu"] == {"backend": "native", "problem": None}
    with dimo_ext.use_backend("native"), pytest.raises(RuntimeError, match=re.escape(f"on cuda:0: {OLD_DRIVER}")):
        _backend.native_kernel("mask_tokens", gpu)
    found = []
    said = announcements(lambda: found.extend(_backend.native_kernel(op, gpu) for op in _backend.OPERATORS))
    assert found == [None] * len(_backend.OPERATORS)
    assert said == [f"dimo_ext: every operator runs on plain PyTorch on cuda:0: {OLD_DRIVER}"]


def test_a_gpu_that_the_module_was_not_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, driver=(True, "", 13000, 13000), device_problem="no kernel image")
    said = announcements(lambda: [_backend.native_kernel("mask_tokens", torch.device("cuda", i)) for i in (0, 1, 0)])
    assert said == [f"dimo_ext: every operator runs on plain PyTorch on cuda:{i}: no kernel image" for i in (0, 1)]


# ------------------------------------------------------------------------------------------------------- switches


@pytest.mark.parametrize("value", ["1", "true", "On", "YES"])
def test_switched_on(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIMO_EXT_DEBUG", value)
    assert switched_on("DIMO_EXT_DEBUG")


@pytest.mark.parametrize("value", [None, "", "0", "False", "off", "NO"])
def test_switched_off(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIMO_EXT_DEBUG", raising=False)
    if value is not None:
        monkeypatch.setenv("DIMO_EXT_DEBUG", value)
    assert not switched_on("DIMO_EXT_DEBUG")


def test_a_misspelt_switch_is_named() -> None:
    result = run_python("import dimo_ext", DIMO_EXT_REQUIRE_NATIVE="ture")
    assert result.returncode != 0
    choices = "1, true, on, yes, 0, false, off, no or unset"
    assert f"ValueError: DIMO_EXT_REQUIRE_NATIVE must be one of {choices}, got 'ture'" in result.stderr


def test_the_debug_switch_reaches_the_checks() -> None:
    script = "import dimo_ext, torch; dimo_ext.sample_categorical(torch.full((2, 3), torch.nan))"
    assert "ValueError: logits: expected" in run_python(script, DIMO_EXT_DEBUG="yes").stderr


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
    assert result.stderr.count("RuntimeWarning: dimo_ext: every operator runs on plain PyTorch: ") == 1
    assert "pip install" in result.stderr


def test_damaged_install_imports_even_where_warnings_are_errors(damaged: Path) -> None:
    result = run_python("import warnings; warnings.simplefilter('error'); import dimo_ext", damaged)
    assert result.returncode == 0, result.stderr


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
