"""Keys: every random operator is a pure function of one (seed, offset) pair held in a tensor.

A key is int64 ``[2]``, or ``[B, 2]`` with one key a sample. Draws come from Philox4x32-10 (see :mod:`dimo_ext.philox`);
the same key gives the same draws on every backend.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from ._backend import native_kernel, placement
from ._checks import check_device, check_integer, require, require_type
from .philox import WORD, uniform

_INT64_RANGE = (-(2**63), 2**63)

_LIB = torch.library.Library("dimo_ext", "FRAGMENT")
_LIB.define("fold_in(Tensor key, SymInt n, Tensor? n_tensor) -> Tensor")
_LIB.define("uniform_words(Tensor key, SymInt count) -> Tensor")


def _fold_in(key: Tensor, n: int, n_tensor: Tensor | None) -> Tensor:
    kernel = native_kernel("fold_in", key.device)
    if kernel is None:
        return reference.fold_in(key, n, n_tensor)
    shape = _folded_shape(key, n_tensor)
    key = key.contiguous() if key.dim() == 1 else key.expand(shape).contiguous()
    numbers = None if n_tensor is None else n_tensor.to(torch.int64).expand(shape[:-1]).contiguous()
    folded = key.new_empty(shape)
    kernel(
        key.data_ptr(), 0 if key.dim() == 1 else 2, n, 0 if numbers is None else numbers.data_ptr(), folded.data_ptr(),
        folded.numel() // 2, *placement(key.device),
    )  # fmt: skip
    return folded


def _folded_shape(key: Tensor, n_tensor: Tensor | None) -> torch.Size:
    numbers = torch.Size() if n_tensor is None else n_tensor.shape
    return torch.Size([*torch.broadcast_shapes(numbers, key.shape[:-1]), 2])


def _uniform_words(key: Tensor, count: int) -> Tensor:
    kernel = native_kernel("uniform_words", key.device)
    if kernel is None:
        return reference.uniform_words(key, count)
    key, words = key.contiguous(), key.new_empty(count)
    kernel(key.data_ptr(), words.data_ptr(), count, *placement(key.device))
    return words


for _device in ("CPU", "CUDA"):
    _LIB.impl("fold_in", _fold_in, _device)
    _LIB.impl("uniform_words", _uniform_words, _device)
torch.library.register_fake(
    "dimo_ext::fold_in", lambda key, n, n_tensor: key.new_empty(_folded_shape(key, n_tensor)), lib=_LIB
)
torch.library.register_fake("dimo_ext::uniform_words", lambda key, count: key.new_empty(count), lib=_LIB)


def random_key(seed: int | Sequence[int], offset: int = 0, *, device: torch.device | str | None = None) -> Tensor:
    """Return a key: int64 ``[2]`` from one seed, ``[B, 2]`` from a sequence of seeds (one key a sample).

    Args:
        seed: an integer in [-2^63, 2^64), or a sequence of them; negative ones count modulo 2^64.
        offset: position in the seed's stream, in the same range; another offset gives independent draws.
        device: where the key lives; it must be the device of the operator's other tensors.

    Returns:
        The key, a tensor that operators take as ``key``.

    Raises:
        TypeError: seed or offset is no integer.
        ValueError: one is out of range, the sequence is empty, or the machine has no such device.

    Example:
        >>> random_key(7)
        tensor([7, 0])
        >>> random_key([7, 8], offset=3)
        tensor([[7, 3],
                [8, 3]])
    """
    device = None if device is None else check_device(device)
    offset = _as_int64("offset", offset)
    if isinstance(seed, Sequence) and not isinstance(seed, str | bytes):
        require(len(seed) > 0, "seed", "at least one integer", "an empty sequence")
        rows = [[_as_int64("seed", s), offset] for s in seed]
        return torch.tensor(rows, dtype=torch.int64, device=device)
    return torch.tensor([_as_int64("seed", seed), offset], dtype=torch.int64, device=device)


def fold_in(key: Tensor, n: int | Tensor) -> Tensor:
    """Derive a new key, independent of ``key`` and of every other ``n``.

    Args:
        key: int64 ``[2]`` or ``[B, 2]``.
        n: an integer in [0, 2^32), or an integer tensor that broadcasts with ``key.shape[:-1]`` (taken modulo 2^32).

    Returns:
        A key on the same device, of shape ``[*broadcast, 2]``.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given.

    Example:
        >>> key = random_key(7)
        >>> fold_in(key, 1)
        tensor([-2652844570741153158,  -158811585324974061])
        >>> fold_in(key, torch.arange(3)).shape  # a key each for three samples
        torch.Size([3, 2])
    """
    check_key(key)
    if not isinstance(n, Tensor):
        require_type(n, (int, torch.SymInt), "n", "an int or an integer tensor")
        require(0 <= n <= WORD, "n", "an integer in [0, 2^32)", n)
        return torch.ops.dimo_ext.fold_in(key, n, None)
    integral = not (n.dtype.is_floating_point or n.dtype.is_complex or n.dtype == torch.bool)
    require(integral, "n", "an int or an integer tensor", n.dtype, TypeError)
    require(n.device == key.device, "n", f"a tensor on {key.device}", f"one on {n.device}")
    batch = key.shape[:-1]
    fits = not batch or not n.dim() or n.shape[-1] == 1 or batch[0] in (1, n.shape[-1])
    require(fits, "n", f"a shape that broadcasts with {list(batch)}", list(n.shape))
    return torch.ops.dimo_ext.fold_in(key, 0, n)


def random_uniform(key: Tensor, count: int) -> Tensor:
    """Draw ``count`` numbers in (0, 1), float32, from a ``[2]`` key: mask times, coin flips."""
    return uniform(_one_row(key, count), torch.float32)


def random_integers(key: Tensor, count: int, high: int) -> Tensor:
    """Draw ``count`` integers in [0, high), int64, high up to 2^24, from a ``[2]`` key: class ids, data rows."""
    check_integer(high, "high", low=1, high=2**24)
    return (_one_row(key, count) * high) >> 32


def _one_row(key: Tensor, count: int) -> Tensor:
    check_key(key)
    require(key.dim() == 1, "key", "shape [2]", list(key.shape))
    check_integer(count, "count", low=0, high=2**26)
    return torch.ops.dimo_ext.uniform_words(key, count)


def check_key(key: Tensor, *, batch_size: int | None = None, device: torch.device | None = None) -> None:
    """Raise unless ``key`` is an int64 ``[2]`` or ``[B, 2]`` tensor on ``device``."""
    require_type(key, Tensor, "key", "an int64 tensor from random_key")
    require(key.dtype == torch.int64, "key", "dtype int64", key.dtype, TypeError)
    fits = key.shape == (2,) or (key.dim() == 2 and key.shape[1] == 2 and batch_size in (None, key.shape[0]))
    if not fits:  # formatted on failure alone: a size may be symbolic
        require(False, "key", f"shape [2] or [{'B' if batch_size is None else batch_size}, 2]", list(key.shape))
    if device is not None:
        require(key.device == device, "key", f"a tensor on {device}", f"one on {key.device}")


def resolve_key(
    key: Tensor | None, generator: torch.Generator | None, *, batch_size: int, device: torch.device
) -> Tensor:
    """Return the operator's key: the one given, or one drawn from ``generator`` (None: the device's default)."""
    if key is not None:
        require(generator is None, "generator", "None when a key is given", "both")
        check_key(key, batch_size=batch_size, device=device)
        return key
    if generator is not None:
        require_type(generator, torch.Generator, "generator", "a torch.Generator or None")
        if torch.compiler.is_compiling():
            raise RuntimeError("generator: not supported under torch.compile; pass key=dimo_ext.random_key(seed)")
    where = device if generator is None else generator.device
    return torch.randint(*_INT64_RANGE[:1], _INT64_RANGE[1] - 1, (2,), generator=generator, device=where).to(device)


def _as_int64(name: str, value: int) -> int:
    require_type(value, int, name, "an int")
    require(-(2**63) <= value < 2**64, name, "an integer in [-2^63, 2^64)", value)
    return value - 2**64 if value >= 2**63 else value
