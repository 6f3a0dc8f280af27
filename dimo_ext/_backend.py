"""Loads the compiled module once and says which backend serves an operator on a device, and why not the native one."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import math
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ._environment import switched_on

BACKENDS = ("auto", "native", "reference")

# Every operator; the compiled module serves one natively where it has `cpu_<name>` or `cuda_<name>`.
OPERATORS = (
    "fold_in",
    "uniform_words",
    "token_divergence",
    "masked_cross_entropy",
    "sample_categorical",
    "reveal_ancestral",
    "reveal_confident",
    "mask_tokens",
    "init_tokens",
    "perturb_embeddings",
    "embed_and_perturb",
)

_REINSTALL = "To get the compiled kernels, install from source with a C++17 compiler: `pip install --force-reinstall .`"


def _validated(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name


def _load_core() -> tuple[ModuleType | None, str | None]:
    """The compiled module, or None and the reason."""
    name = f"{__package__}._core"
    try:
        return importlib.import_module(name), None
    except ModuleNotFoundError as error:
        if error.name != name:
            return None, f"the compiled module does not load: {error}"
        return None, "this installation has no compiled module (built with DIMO_EXT_NATIVE=off, or a source folder)"
    except ImportError as error:
        return None, f"the compiled module does not load: {error}"


_default = _validated(os.environ.get("DIMO_EXT_BACKEND") or "auto", "DIMO_EXT_BACKEND")
_backend: ContextVar[str] = ContextVar("dimo_ext_backend", default=_default)
_core, _core_problem = _load_core()

# Asks for the module alone: whether it has a kernel for an operator and a device shows when that operator is called.
if switched_on("DIMO_EXT_REQUIRE_NATIVE") and _core_problem is not None:
    raise ImportError(f"DIMO_EXT_REQUIRE_NATIVE is set, but {_core_problem}. {_REINSTALL}")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the backend inside a ``with`` block, for this thread or async task alone.

    Under "auto", the first operator that runs on plain PyTorch on a device warns (RuntimeWarning), once, with the
    reason and the names of all operators that do.

    Args:
        name: "auto" (native where it exists, else the reference), "native" (an operator without a native kernel for
            the device raises RuntimeError) or "reference" (plain PyTorch). DIMO_EXT_BACKEND sets the default. Kernels
            take float32 and half types: float64 logits, and more than 9 dimensions, run on plain PyTorch always.

    Raises:
        ValueError: unknown name.

    Example:
        >>> with use_backend("reference"):
        ...     build_info()["operators"]["mask_tokens"]["cpu"]
        {'backend': 'reference', 'problem': 'the reference backend was chosen'}
    """
    token = _backend.set(_validated(name, "backend"))
    try:
        yield
    finally:
        _backend.reset(token)


def current_backend() -> str:
    """The choice in force: "auto", "native" or "reference".

    Autograd runs CUDA backward passes on threads of its own, which do not see `use_backend`: a backward that needs
    the choice of its forward has to save it.
    """
    return _backend.get()


def native_kernel(op: str, device: torch.device) -> Callable[..., Any] | None:
    """The compiled function that serves `op` on `device` under the current choice; None means the reference.

    Raises:
        RuntimeError: the choice is "native" and there is no native kernel; the message says why.
        ValueError: `op` is not in OPERATORS.
    """
    choice = _backend.get()
    if choice == "reference":
        return None
    index = device.index
    if index is None and device.type == "cuda":
        index = torch.cuda.current_device()
    kernel, problem = _find_kernel(op, device.type, index)
    if problem is not None:
        if choice == "native":
            raise RuntimeError(f"{op} has no native kernel on {device}: {problem}")
        _announce(device.type, index)
    return kernel


def compiled_function(name: str, device: torch.device) -> Callable[..., Any] | None:
    """A helper of the operators in the compiled module, where the device can run it."""
    usable = _device_problem(device.type, device.index) is None
    return getattr(_core, f"{device.type}_{name}", None) if usable else None


def placement(device: torch.device) -> tuple[int, ...]:
    """The trailing arguments of a native launcher: threads on the CPU, device and stream on a GPU."""
    if device.type == "cpu":
        return (torch.get_num_threads(),)
    return device.index, torch.cuda.current_stream(device).cuda_stream


def native_module() -> ModuleType:
    """The compiled module, where :func:`native_kernel` found one."""
    assert _core is not None
    return _core


def address(tensor: torch.Tensor | None) -> int:
    """Where a contiguous tensor's data begins, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


MAX_DIMS = 9  # of logits that launchers take, the vocabulary included
_STORAGE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def logit_rows(logits: torch.Tensor | None) -> tuple[int, int, tuple[int, ...]] | None:
    """Logits as launchers take them: address, storage type, strides."""
    return None if logits is None else (logits.data_ptr(), _STORAGE[logits.dtype], logits.stride())


def key_argument(key: torch.Tensor) -> tuple[int, int]:
    """A contiguous key as launchers take it: address, and how far apart the keys of two samples are."""
    return key.data_ptr(), 0 if key.dim() == 1 else 2


def rows_per_sample(logits: torch.Tensor) -> int:
    """How many rows of logits ``[B, ..., V]`` a sample has, at least 1."""
    return max(math.prod(logits.shape[1:-1]), 1)


@functools.cache
def _find_kernel(op: str, device_type: str, index: int | None) -> tuple[Callable[..., Any] | None, str | None]:
    """The kernel, or None and the reason; the choice of backend plays no part here."""
    if op not in OPERATORS:
        raise ValueError(f"unknown operator {op!r}, expected one of {', '.join(OPERATORS)}")
    problem = _device_problem(device_type, index)
    if problem is not None:
        return None, problem
    kernel = getattr(_core, f"{device_type}_{op}", None)
    return kernel, None if kernel is not None else f"the compiled module has no {device_type} kernel for {op}"


@functools.cache  # once a device
def _announce(device_type: str, index: int | None) -> None:
    _warn_once(f"dimo_ext: {_announcement(device_type, index)}")


def _announcement(device_type: str, index: int | None) -> str:
    """Which operators run on plain PyTorch on a device and why: all of them, or those without a kernel."""
    if _core is None:
        return f"every operator runs on plain PyTorch: {_core_problem}. {_REINSTALL}"
    problem = _device_problem(device_type, index)
    if problem is not None:
        return f"every operator runs on plain PyTorch on {torch.device(device_type, index)}: {problem}"
    missing = [op for op in OPERATORS if _find_kernel(op, device_type, index)[0] is None]
    return f"on {device_type}, plain PyTorch runs {', '.join(missing)}: the compiled module has no kernel for them"


@functools.cache  # once a process
def _warn_once(text: str) -> None:
    """Warn as if from the line that called the operator, the first one outside this package and torch."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in (__package__, "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, RuntimeWarning, level)


def _device_problem(device_type: str, index: int | None) -> str | None:
    """Why no native kernel at all can run on this device, or None."""
    if device_type not in ("cpu", "cuda"):
        return f"native kernels exist for cpu and cuda only, not for {device_type}"
    return _core_problem if device_type == "cpu" else _cuda_problem(index)


@functools.cache
def _cuda_problem(index: int | None) -> str | None:
    """Why native kernels cannot run on this GPU, or None. Index None asks about the machine, not one GPU."""
    if _core is None:
        return _core_problem
    usable, reason, _, _ = _core.cuda_driver_status()
    if not usable:
        return str(reason)
    if index is None:
        return "torch finds no CUDA device"
    return _core.cuda_device_problem(index) or None


def build_info() -> dict[str, Any]:
    """What was built, what this machine has and which backend serves each operator, as plain JSON types.

    Keys:
        version: str, of dimo-ext; "unknown" where it runs from a folder that was never installed.
        torch: str, torch's version.
        backend: str, the choice in force: "auto", "native" or "reference".
        native_module: str or None, the path of the compiled module.
        native_problem: str or None, why there is no compiled module.
        compiler: str or None, the C++ compiler of the compiled module and its version.
        build_type: str or None, CMake's build type: "Release" unless it was chosen.
        cuda_toolkit: str or None, the version of the nvcc that compiled the CUDA kernels; None without them.
        cuda_architectures: list of str, CMake's names of what they were compiled for, such as "90".
        cuda_driver: dict of usable (bool), problem (str or None, why not), driver_version and runtime_version (int,
            13000 is CUDA 13.0, 0 is none).
        operators: dict from each operator to a dict from "cpu" and "cuda" (the current GPU) to backend ("native" or
            "reference", what a call would run on) and problem (str or None, why not natively).
        gpus: list of a dict for each GPU that torch finds: name (str), memory_bytes (int), capability ([int, int]).
        cpu: dict of name (str) and threads (int, those that torch and the kernels use).

    Example:
        >>> info = build_info()
        >>> sorted(info["operators"]["mask_tokens"])
        ['cpu', 'cuda']
        >>> (info["native_module"] is None) == (info["native_problem"] is not None)
        True
    """
    return {
        "version": _version(),
        "torch": str(torch.__version__),
        "backend": _backend.get(),
        "native_module": None if _core is None else _core.__file__,
        "native_problem": _core_problem,
        "compiler": None if _core is None else _core.compiler,
        "build_type": None if _core is None else _core.build_type,
        "cuda_toolkit": None if _core is None else _core.cuda_toolkit,
        "cuda_architectures": [] if _core is None else list(_core.cuda_architectures),
        "cuda_driver": _driver(),
        "operators": {op: {device: _service(op, device) for device in ("cpu", "cuda")} for op in OPERATORS},
        "gpus": _gpus(),
        "cpu": {"name": _cpu_name(), "threads": torch.get_num_threads()},
    }


def _version() -> str:
    try:
        return importlib.metadata.version("dimo-ext")
    except importlib.metadata.PackageNotFoundError:  # run from a folder that was never installed
        return "unknown"


def _service(op: str, device_type: str) -> dict[str, str | None]:
    if _backend.get() == "reference":
        return {"backend": "reference", "problem": "the reference backend was chosen"}
    index = torch.cuda.current_device() if device_type == "cuda" and torch.cuda.is_available() else None
    kernel, problem = _find_kernel(op, device_type, index)
    return {"backend": "reference" if kernel is None else "native", "problem": problem}


def _driver() -> dict[str, Any]:
    if _core is None:
        return {"usable": False, "problem": _core_problem, "driver_version": 0, "runtime_version": 0}
    usable, reason, driver, runtime = _core.cuda_driver_status()
    return {"usable": usable, "problem": reason or None, "driver_version": driver, "runtime_version": runtime}


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": p.name, "memory_bytes": p.total_memory, "capability": [p.major, p.minor]} for p in found]


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
