"""`dimo doctor`: what was built, what serves which device and why not, versions, GPU, memory."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from typing import Any

import dimo_ext

from .config import ConfigError

SUMMARY = "Show what was built, what serves which device and why not, versions; with --config the memory a run needs."
_PACKAGES = ("torch", "numpy", "safetensors", "tyro", "scikit-learn", "matplotlib", "tensorboard", "huggingface_hub")


def diagnose() -> dict[str, Any]:
    """Return the build information of dimo_ext with versions and memory, as JSON-able values."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "memory_gib": _memory_gib(),
        "dimo_ext": dimo_ext.build_info(),
    }


def main(arguments: list[str]) -> int:
    """Print the diagnosis as text, or as JSON with ``--json``."""
    if arguments in (["-h"], ["--help"]):
        print(f"usage: dimo doctor [--json]\n       dimo doctor --config FILE.yaml [--key.name VALUE ...]\n\n{SUMMARY}")
        return 0
    unknown = [a for a in arguments if a != "--json"]
    if unknown:
        raise ConfigError(f"unknown argument {unknown[0]!r}: dimo doctor takes --json, --config FILE or nothing")
    report = diagnose()
    print(json.dumps(report, indent=2) if arguments else _as_text(report))
    return 0


def _as_text(report: dict[str, Any]) -> str:
    build = report["dimo_ext"]
    packages = ", ".join(f"{name} {version or 'missing'}" for name, version in report["packages"].items())
    lines = [
        f"dimo-ext {build['version']}, Python {report['python']}, {report['platform']}",
        f"packages   {packages}",
        f"cpu        {build['cpu']['name']}, {build['cpu']['threads']} threads, memory {report['memory_gib']} GiB",
        *([f"gpu        {_gpu(g)}" for g in build["gpus"]] or ["gpu        none that torch can use"]),
        f"module     {build['native_module'] or build['native_problem']}",
    ]
    if build["native_module"]:
        toolkit = build["cuda_toolkit"]
        cuda = f"CUDA {toolkit} for {', '.join(build['cuda_architectures'])}" if toolkit else "without CUDA"
        lines.append(f"built      {build['compiler']}, {build['build_type']}, {cuda}")
    driver = build["cuda_driver"]
    lines.append(f"driver     {'usable' if driver['usable'] else driver['problem']}")
    lines.append(f"backend    {build['backend']} (DIMO_EXT_BACKEND or dimo_ext.use_backend)")
    for operator, services in build["operators"].items():
        served = "; ".join(f"{device} {_service(s)}" for device, s in services.items())
        lines.append(f"  {operator:<21}{served}")
    return "\n".join(lines)


def _gpu(gpu: dict[str, Any]) -> str:
    major, minor = gpu["capability"]
    return f"{gpu['name']}, sm_{major}{minor}, {gpu['memory_bytes'] / 2**30:.0f} GiB"


def _service(service: dict[str, str | None]) -> str:
    return service["backend"] + (f" ({service['problem']})" if service["problem"] else "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):  # not every platform tells
        return None
