"""Argument checks: one clear error that names the argument, what was expected and what was given.

Shapes, dtypes, devices and Python scalars are always checked. Values inside tensors may live on a GPU, where reading
them would wait for it: they are checked under DIMO_EXT_DEBUG=1 alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._environment import switched_on

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DEBUG = switched_on("DIMO_EXT_DEBUG")
_REDUCTIONS = ("none", "sum", "mean", "batchmean")


def require(holds: bool, name: str, expected: str, given: Any, error: type[Exception] = ValueError) -> None:
    """Raise ``error`` saying that argument ``name`` must be ``expected``, unless ``holds``."""
    if not holds:
        raise error(f"{name}: expected {expected}, got {given}")


def require_type(value: Any, types: type | tuple[type, ...], name: str, expected: str) -> None:
    """Raise TypeError unless ``value`` has one of ``types``; bool never counts as a number."""
    plain_bool = isinstance(value, bool) and bool not in (types if isinstance(types, tuple) else (types,))
    if plain_bool or not isinstance(value, types):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__} {value!r:.80}")


def check_number(
    value: float, name: str, *, low: float = -math.inf, high: float = math.inf, open_low: bool = False
) -> float:
    """Return ``value`` as a finite float in [low, high], or in (low, high] with ``open_low``."""
    number = isinstance(value, (int, float, torch.SymFloat)) and not isinstance(value, bool)
    # Comparisons alone, so that torch.compile can keep the number symbolic; 2^1023 keeps huge ints out of float().
    inside = number and -(2.0**1023) < value < 2.0**1023 and low <= value <= high and not (open_low and value == low)
    if not inside:  # what was expected is formatted on failure alone
        brackets = "(" if open_low else "["
        bounds = "" if math.isinf(low) and math.isinf(high) else f" in {brackets}{low:g}, {high:g}]"
        require_type(value, (int, float, torch.SymFloat), name, f"a finite number{bounds}")
        require(False, name, f"a finite number{bounds}", value)
    return float(value)


def check_integer(value: int, name: str, *, low: int, high: int | None = None) -> int:
    """Return ``value`` if it is an int in [low, high]."""
    expected = f"an integer >= {low}"
    require_type(value, (int, torch.SymInt), name, expected)
    if not (value >= low and (high is None or value <= high)):
        require(False, name, expected if high is None else f"an integer in [{low}, {high}]", value)
    return value


def check_choice(value: str, name: str, choices: tuple[str, ...]) -> str:
    """Return ``value`` if it is one of ``choices``."""
    require(isinstance(value, str) and value in choices, name, f"one of {', '.join(choices)}", repr(value))
    return value


def check_reduction(reduction: str, logits: Tensor) -> None:
    """Raise unless ``reduction`` is a valid name, and one that the dimensions of ``logits`` allow."""
    check_choice(reduction, "reduction", _REDUCTIONS)
    allowed = reduction != "batchmean" or logits.dim() >= 3
    require(allowed, "reduction", "another than 'batchmean' for logits of fewer than 3 dimensions", repr(reduction))


def check_logits(logits: Tensor, name: str, like: Tensor | None = None) -> None:
    """Raise unless ``logits`` is a floating-point ``[..., V]`` tensor, V >= 1 (of the shape and device of ``like``)."""
    require_type(logits, Tensor, name, "a floating-point tensor [..., V]")
    if logits.layout != torch.strided:
        require(False, name, "a dense tensor", f"layout {logits.layout}")
    require(logits.dtype in FLOATS, name, "dtype float32, float16, bfloat16 or float64", logits.dtype, TypeError)
    if logits.dim() < 1 or logits.shape[-1] < 1:
        require(False, name, "shape [..., V] with V >= 1", list(logits.shape))
    if like is not None:
        check_like(logits, name, like.shape, like.device)


def check_like(value: Tensor, name: str, shape: torch.Size, device: torch.device) -> None:
    """Raise unless ``value`` has that shape and lies on that device."""
    if value.shape != shape:  # formatted on failure alone: a size may be symbolic
        require(False, name, f"shape {list(shape)}", list(value.shape))
    if value.device != device:
        require(False, name, f"a tensor on {device}", f"one on {value.device}")


def check_values(valid: Callable[[], Tensor], name: str, expected: str) -> None:
    """Under DIMO_EXT_DEBUG=1, raise ValueError unless the boolean tensor that ``valid`` computes is all True."""
    if DEBUG and not torch.compiler.is_compiling():
        wrong = int((~valid()).sum())
        require(wrong == 0, name, expected, f"{wrong} other value{'s' if wrong > 1 else ''}")


def check_logit_values(logits: Tensor, name: str, counted: Tensor | None = None) -> None:
    """Under DIMO_EXT_DEBUG=1, raise ValueError for NaN or +inf in a counted row."""

    def valid() -> Tensor:
        usable = (logits < math.inf).all(-1)
        return usable if counted is None else usable | ~counted

    check_values(valid, name, "rows of numbers below +inf")


def check_device(device: torch.device | str, name: str = "device") -> torch.device:
    """Return ``device`` with its index, as tensors report it."""
    try:
        found = torch.device(device)
        if found.type == "cuda" and found.index is None:
            found = torch.device("cuda", torch.cuda.current_device())
        if found.type not in ("cpu", "meta"):
            torch.empty(0, device=found)
    except (RuntimeError, TypeError, AssertionError):  # AssertionError: torch was built without it
        raise ValueError(f"{name}: expected a torch device or its name, one of this machine, got {device!r}") from None
    return found


def check_tensor(value: Tensor, name: str, shape: torch.Size, dtypes: tuple[torch.dtype, ...], device: torch.device):
    """Raise unless ``value`` is a tensor of that shape, device and one of those dtypes."""
    names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
    require_type(value, Tensor, name, f"a {names} tensor")
    require(value.dtype in dtypes, name, f"dtype {names}", value.dtype, TypeError)
    check_like(value, name, shape, device)


def split_scalar_or_per_sample(
    value: float | Tensor, name: str, batch_size: int, device: torch.device, *, low: float, high: float = math.inf
) -> tuple[float, Tensor | None]:
    """Split a float-or-``[B]``-tensor argument into the two that an operator's schema takes.

    Values inside a tensor live on the device and are not read here.
    """
    if isinstance(value, Tensor):
        check_tensor(value, name, torch.Size([batch_size]), FLOATS, device)
        inside = f"finite numbers in [{low:g}, {high:g}]"
        check_values(lambda: torch.isfinite(value) & (value >= low) & (value <= high), name, inside)
        return 0.0, value.detach() if value.dtype == torch.float64 else value.detach().to(torch.float32)
    return check_number(value, name, low=low, high=high), None


def check_guidance(
    logits: Tensor, uncond_logits: Tensor | None, name: str, guidance_scale: float | Tensor
) -> tuple[float, Tensor | None]:
    """Check classifier-free guidance's arguments; return the scale as :func:`split_scalar_or_per_sample` does.

    ``name`` is that of the unconditional logits; without them the scale must be 1.
    """
    if uncond_logits is None:
        unused = not isinstance(guidance_scale, Tensor) and guidance_scale == 1.0
        require(unused, "guidance_scale", f"1 without {name}", guidance_scale)
        return 1.0, None
    check_logits(uncond_logits, name, logits)
    check_logit_values(uncond_logits, name)
    batch = logits.shape[0] if logits.dim() > 1 else 1
    return split_scalar_or_per_sample(guidance_scale, "guidance_scale", batch, logits.device, low=-math.inf)
