"""Memory of the large tensors that CPU kernels fill: what an earlier one left serves the next."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._backend import native_module


def output_like(tensor: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Return uninitialised memory as ``torch.empty_like(tensor)`` does, or contiguous of another shape.

    The system clears what it hands out, page by page, which for a gradient of the logits' size costs more than the
    kernel. Where the compiled module keeps memory (Linux), a large tensor on the CPU takes what an earlier one
    left; the system may have that back whenever it wants it for something else.
    """
    size = math.prod(tensor.shape if shape is None else shape) * tensor.element_size()
    device = "meta" if tensor.is_cpu and size >= _kept_from() else tensor.device
    fresh = torch.empty_like(tensor, device=device) if shape is None else tensor.new_empty(shape, device=device)
    if not fresh.is_meta:
        return fresh
    try:
        memory = torch.frombuffer(native_module().OutputMemory(size), dtype=torch.uint8)
    except MemoryError:  # torch's own error says more
        return torch.empty_like(tensor) if shape is None else tensor.new_empty(shape)
    return tensor.new_empty(0).set_(memory.untyped_storage(), 0, fresh.shape, fresh.stride())


def _kept_from() -> float:
    """The bytes from which on memory is kept."""
    return getattr(native_module(), "large_bytes", math.inf)
