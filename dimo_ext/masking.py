"""Forward masking of tokens and the student's initial tokens: draws without gradient, pure functions of a key."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from ._backend import native_kernel, placement
from ._checks import (
    check_choice,
    check_device,
    check_integer,
    check_number,
    require,
    require_type,
    split_scalar_or_per_sample,
)
from .random import resolve_key
from .schedules import MASK_SCHEDULES

_LIB = torch.library.Library("dimo_ext", "FRAGMENT")
_LIB.define(
    "mask_tokens(Tensor tokens, Tensor key, float ratio, Tensor? ratio_per_sample, int mask_id, bool bernoulli, "
    "int min_masked, str schedule='linear') -> (Tensor, Tensor)"
)
_LIB.define(
    "init_tokens(Tensor key, SymInt batch_size, SymInt seq_len, int vocab_size, int mask_id, float r_init) -> Tensor"
)


class MaskedTokens(NamedTuple):
    """What :func:`mask_tokens` returns.

    Attributes:
        tokens: int64 ``[B, L]`` or ``[L]``, with the mask id at the masked positions.
        mask: bool of the same shape, True = masked.
    """

    tokens: Tensor
    mask: Tensor


def _mask_tokens(tokens, key, ratio, ratio_per_sample, mask_id, bernoulli, min_masked, schedule="linear"):
    kernel = native_kernel("mask_tokens", tokens.device)
    if kernel is None:
        return reference.mask_tokens(tokens, key, ratio, ratio_per_sample, mask_id, bernoulli, min_masked, schedule)
    tokens, key = tokens.contiguous(), key.contiguous()
    masked, mask = torch.empty_like(tokens), torch.empty_like(tokens, dtype=torch.bool)
    per_sample = None if ratio_per_sample is None else ratio_per_sample.contiguous()
    kernel(
        tokens.data_ptr(), masked.data_ptr(), mask.data_ptr(), *tokens.shape, ratio,
        0 if per_sample is None else per_sample.data_ptr(), key.data_ptr(), 2 if key.dim() == 2 else 0,
        mask_id, bernoulli, min_masked, MASK_SCHEDULES.index(schedule), *placement(tokens.device),
    )  # fmt: skip
    return masked, mask


def _mask_tokens_fake(tokens, *_):
    contiguous = torch.empty_like(tokens, memory_format=torch.contiguous_format)
    return contiguous, torch.empty_like(contiguous, dtype=torch.bool)


def _init_tokens(key, batch_size, seq_len, vocab_size, mask_id, r_init):
    kernel = native_kernel("init_tokens", key.device)
    if kernel is None:
        return reference.init_tokens(key, batch_size, seq_len, vocab_size, mask_id, r_init)
    key = key.contiguous()
    tokens = key.new_empty(batch_size, seq_len)
    kernel(
        tokens.data_ptr(), batch_size, seq_len, r_init, key.data_ptr(), 2 if key.dim() == 2 else 0,
        mask_id, vocab_size, *placement(key.device),
    )  # fmt: skip
    return tokens


for _device in ("CPU", "CUDA"):
    _LIB.impl("mask_tokens", _mask_tokens, _device)
    _LIB.impl("init_tokens", _init_tokens, _device)
torch.library.register_fake("dimo_ext::mask_tokens", _mask_tokens_fake, lib=_LIB)
torch.library.register_fake(
    "dimo_ext::init_tokens", lambda key, batch, length, *_: key.new_empty(batch, length), lib=_LIB
)


def mask_tokens(
    tokens: Tensor,
    mask_ratio: float | Tensor,
    mask_id: int,
    *,
    schedule: str = "linear",
    mode: str = "exact",
    min_masked: int = 1,
    generator: torch.Generator | None = None,
    key: Tensor | None = None,
) -> MaskedTokens:
    """The forward process: replace part of each sample's tokens by [MASK].

    Every position draws a 32-bit word; the k smallest are masked (ties: lower index). "exact" takes
    k = round(ratio·L), half to even, in float32; "bernoulli" counts the words below ratio·2^32, so that each position
    is masked independently. Both mask at least ``min_masked`` positions, at most L.

    Args:
        tokens: int64 ``[B, L]``, or ``[L]`` for one sample; L up to 65,536.
        mask_ratio: a float in [0, 1], or a ``[B]`` tensor (its values are clamped to [0, 1]; NaN counts as 0).
        mask_id: the id written; any integer.
        schedule: gives the ratio from ``mask_ratio`` as a time u in [0, 1]: "linear" u itself, "square" u², "cosine"
            cos(π(1-u)/2), "arccos" 2·arccos(1-u)/π, or "mage", MAGE's truncated normal (arXiv 2211.09117).
        mode: "exact" or "bernoulli".
        min_masked: at least so many positions are masked in each sample.
        generator: where the key is drawn from; None = the device's default generator.
        key: int64 ``[2]`` or ``[B, 2]`` from :func:`random_key`; the draws are a pure function of it.

    Returns:
        ``MaskedTokens(tokens, mask)``, both of the shape of ``tokens``.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given.

    Example:
        >>> tokens = torch.tensor([[5, 2, 7, 1], [3, 3, 0, 6]])
        >>> mask_tokens(tokens, 0.5, mask_id=8, key=random_key(0))
        MaskedTokens(tokens=tensor([[8, 2, 7, 8],
                [8, 3, 8, 6]]), mask=tensor([[ True, False, False,  True],
                [ True, False,  True, False]]))
    """
    require_type(tokens, Tensor, "tokens", "an int64 tensor [B, L]")
    require(tokens.dtype == torch.int64, "tokens", "dtype int64", tokens.dtype, TypeError)
    require(tokens.dim() in (1, 2), "tokens", "shape [B, L] or [L]", list(tokens.shape))
    rows = tokens if tokens.dim() == 2 else tokens[None]
    require(rows.shape[1] <= 65536, "tokens", "at most 65536 positions", rows.shape[1])
    batch, device = rows.shape[0], tokens.device
    ratio, per_sample = split_scalar_or_per_sample(mask_ratio, "mask_ratio", batch, device, low=0.0, high=1.0)
    per_sample = None if per_sample is None else per_sample.to(torch.float32)
    check_integer(mask_id, "mask_id", low=-(2**63), high=2**63 - 1)
    check_choice(schedule, "schedule", MASK_SCHEDULES)
    bernoulli = check_choice(mode, "mode", ("exact", "bernoulli")) == "bernoulli"
    check_integer(min_masked, "min_masked", low=0, high=2**63 - 1)
    key = resolve_key(key, generator, batch_size=batch, device=device)
    masked, mask = torch.ops.dimo_ext.mask_tokens(
        rows, key, ratio, per_sample, mask_id, bernoulli, min_masked, schedule
    )
    return MaskedTokens(masked.view(tokens.shape), mask.view(tokens.shape))


def init_tokens(
    batch_size: int,
    seq_len: int,
    *,
    vocab_size: int,
    mask_id: int,
    r_init: float,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
    key: Tensor | None = None,
) -> Tensor:
    """The student's input x_init: exactly round(r_init·L) positions are [MASK], the others uniform random tokens.

    Args:
        batch_size: B >= 0.
        seq_len: L >= 0, up to 65,536.
        vocab_size: ids are drawn from [0, vocab_size), 1 to 2^24.
        mask_id: the id written at masked positions.
        r_init: in [0, 1]; 0 masks nothing.
        device: of the result; None = the key's, the generator's, else the CPU.
        generator: where the key is drawn from; None = the device's default generator.
        key: int64 ``[2]`` or ``[B, 2]`` from :func:`random_key`.

    Returns:
        int64 ``[B, L]``.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given.

    Example:
        >>> init_tokens(2, 6, vocab_size=100, mask_id=100, r_init=0.5, key=random_key(0))
        tensor([[100,   1,  92, 100, 100,  84],
                [100, 100,  37,  50, 100,  92]])
    """
    check_integer(batch_size, "batch_size", low=0)
    check_integer(seq_len, "seq_len", low=0, high=65536)
    check_integer(vocab_size, "vocab_size", low=1, high=2**24)
    check_integer(mask_id, "mask_id", low=-(2**63), high=2**63 - 1)
    r_init = check_number(r_init, "r_init", low=0.0, high=1.0)
    if key is not None:
        require_type(key, Tensor, "key", "an int64 tensor from random_key")
    if generator is not None:
        require_type(generator, torch.Generator, "generator", "a torch.Generator or None")
    if device is None:
        device = next((x.device for x in (key, generator) if x is not None), "cpu")
    key = resolve_key(key, generator, batch_size=batch_size, device=check_device(device))
    return torch.ops.dimo_ext.init_tokens(key, batch_size, seq_len, vocab_size, mask_id, r_init)
