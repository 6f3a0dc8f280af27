"""Keys: every random operator is a pure function of one (seed, offset) pair held in a tensor.

A key is int64 ``[2]``, or ``[B, 2]`` with one key a sample. Draws come from Philox4x32-10 (Salmon et al., *Parallel
random numbers: as easy as 1, 2, 3*, SC 2011) with the seed as Philox key and the counter words
``[block | tag << 24, row, offset low, offset high]``. Reference, CPU and CUDA share this convention, so that the same
key gives the same draws everywhere.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import torch
from torch import Tensor

from ._checks import check_device, check_integer, require, require_type

_WORD = 0xFFFFFFFF
_ROUND_KEYS = (0x9E3779B9, 0xBB67AE85)
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_INT64_RANGE = (-(2**63), 2**63)


class Tag(enum.IntEnum):
    """Keeps operators that share a key independent: it fills the top byte of the first counter word."""

    MASK_TOKENS = 1
    INIT_MASK = 2
    INIT_IDS = 3
    SAMPLE_CATEGORICAL = 4
    PERTURB_EMBEDDINGS = 5
    REVEAL = 6
    UNIFORM = 7
    FOLD_IN = 255


def random_key(seed: int | Sequence[int], offset: int = 0, *, device: torch.device | str | None = None) -> Tensor:
    """Return a key: int64 ``[2]`` from one seed, ``[B, 2]`` from a sequence of seeds (one key a sample).

    Args:
        seed: an integer in [-2^63, 2^64), or a sequence of them; negative ones count modulo 2^64.
        offset: position in the seed's stream, in the same range; another offset gives independent draws.
        device: where the key lives; it must be the device of the operator's other tensors.

    Raises:
        TypeError: seed or offset is no integer. ValueError: out of range, an empty sequence, or no such device.
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
    """
    check_key(key)
    if not isinstance(n, Tensor):
        require_type(n, int, "n", "an int or an integer tensor")
        require(0 <= n <= _WORD, "n", "an integer in [0, 2^32)", n)
        n = torch.full((), n, dtype=torch.int64, device=key.device)
    integral = not (n.dtype.is_floating_point or n.dtype.is_complex or n.dtype == torch.bool)
    require(integral, "n", "an int or an integer tensor", n.dtype, TypeError)
    require(n.device == key.device, "n", f"a tensor on {key.device}", f"one on {n.device}")
    batch = key.shape[:-1]
    fits = not batch or not n.dim() or n.shape[-1] == 1 or batch[0] in (1, n.shape[-1])
    require(fits, "n", f"a shape that broadcasts with {list(batch)}", list(n.shape))
    row = (n.to(torch.int64) & _WORD).expand(torch.broadcast_shapes(n.shape, batch))
    words = torch.stack(_philox(torch.full_like(row, int(Tag.FOLD_IN) << 24), row, key[..., 1], key[..., 0]), -1)
    return words[..., 0::2] | (words[..., 1::2] << 32)


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
    check_integer(count, "count", low=0)
    return random_words(key, 1, 1, count, Tag.UNIFORM)[0]


def check_key(key: Tensor, *, batch_size: int | None = None, device: torch.device | None = None) -> None:
    """Raise unless ``key`` is an int64 ``[2]`` or ``[B, 2]`` tensor on ``device``."""
    require_type(key, Tensor, "key", "an int64 tensor from random_key")
    require(key.dtype == torch.int64, "key", "dtype int64", key.dtype, TypeError)
    shapes = "[2] or [B, 2]" if batch_size is None else f"[2] or [{batch_size}, 2]"
    fits = key.shape == (2,) or (key.dim() == 2 and key.shape[1] == 2 and batch_size in (None, key.shape[0]))
    require(fits, "key", f"shape {shapes}", list(key.shape))
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


def random_words(key: Tensor, batch_size: int, rows: int, count: int, tag: Tag) -> Tensor:
    """Draw 32-bit words, int64 ``[batch_size * rows, count]`` in [0, 2^32).

    Word i of a row is word i % 4 of Philox block i // 4. The row is the position in the flattened batch for a ``[2]``
    key, the position within the sample for a ``[B, 2]`` key.
    """
    blocks = -(-count // 4)
    row = torch.arange(batch_size * rows, device=key.device)
    if key.dim() == 2:
        key, row = key.repeat_interleave(rows, 0)[:, None, :], row % max(rows, 1)
    block = torch.arange(blocks, device=key.device) | (int(tag) << 24)
    block, row = torch.broadcast_tensors(block, row[:, None])
    words = torch.stack(_philox(block, row, key[..., 1], key[..., 0]), -1)
    return words.reshape(batch_size * rows, blocks * 4)[:, :count]


def uniform(words: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Map 32-bit words to (x + 1/2) / 2^32 in the open interval (0, 1); the largest value stays below 1."""
    below_one = 1.0 - torch.finfo(dtype).eps / 2
    return ((words.to(torch.float64) + 0.5) * 2.0**-32).to(dtype).clamp_(max=below_one)


def _philox(block: Tensor, row: Tensor, offset: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 on int64 tensors that hold 32-bit words; ``offset`` and ``seed`` hold 64 bits."""
    c0, c1, c2, c3 = block, row, offset & _WORD, (offset >> 32) & _WORD
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        # The product of two 32-bit words wraps in int64; its bits are right, so are its halves.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((product1 >> 32) & _WORD) ^ c1 ^ k0, product1 & _WORD
        c2, c3 = ((product0 >> 32) & _WORD) ^ c3 ^ k1, product0 & _WORD
        k0, k1 = (k0 + _ROUND_KEYS[0]) & _WORD, (k1 + _ROUND_KEYS[1]) & _WORD
    return c0, c1, c2, c3


def _as_int64(name: str, value: int) -> int:
    require_type(value, int, name, "an int")
    require(-(2**63) <= value < 2**64, name, "an integer in [-2^63, 2^64)", value)
    return value - 2**64 if value >= 2**63 else value
