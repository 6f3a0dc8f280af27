"""Variance-preserving noise on token embeddings: the student's source of continuous randomness."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import reference
from ._autograd import refuse_forward_mode
from ._backend import MAX_DIMS, key_argument, logit_rows, native_kernel, placement, rows_per_sample
from ._checks import check_logits, check_number, check_tensor, check_values, require, require_type
from ._memory import output_like
from .random import resolve_key

_LIB = torch.library.Library("dimo_ext", "FRAGMENT")
_LIB.define("embed_and_perturb(Tensor table, Tensor tokens, Tensor key, float sigma, Tensor scale) -> Tensor")
_LIB.define("perturb_embeddings(Tensor embeddings, Tensor key, float sigma, Tensor scale) -> Tensor")


def _perturb_embeddings(embeddings: Tensor, key: Tensor, sigma: float, scale: Tensor) -> Tensor:
    kernel = native_kernel("perturb_embeddings", embeddings.device)
    if kernel is None or embeddings.dtype == torch.float64 or embeddings.dim() > MAX_DIMS:
        return reference.perturb_embeddings(embeddings, key, sigma, scale).contiguous()
    perturbed = output_like(embeddings, embeddings.shape)
    key, scale = key.contiguous(), scale.to(torch.float32)
    kernel(
        embeddings.shape, [logit_rows(embeddings), logit_rows(perturbed)], rows_per_sample(embeddings),
        key_argument(key), sigma, scale.data_ptr(), (0, 0), *placement(embeddings.device),
    )  # fmt: skip
    return perturbed


def _embed_and_perturb(table: Tensor, tokens: Tensor, key: Tensor, sigma: float, scale: Tensor) -> Tensor:
    kernel = native_kernel("embed_and_perturb", table.device)
    if kernel is None or table.dtype == torch.float64 or tokens.dim() >= MAX_DIMS:
        return reference.embed_and_perturb(table, tokens, key, sigma, scale).contiguous()
    perturbed = output_like(table, (*tokens.shape, table.shape[1]))
    key, scale, tokens = key.contiguous(), scale.to(torch.float32), tokens.contiguous()
    address, dtype, (row, column) = logit_rows(table)
    rows = (address, dtype, (row, *[0] * (tokens.dim() - 1), column))
    kernel(
        perturbed.shape, [rows, logit_rows(perturbed)], rows_per_sample(perturbed), key_argument(key), sigma,
        scale.data_ptr(), (tokens.data_ptr(), table.shape[0]), *placement(table.device),
    )  # fmt: skip
    return perturbed


def _embed_and_perturb_fake(table: Tensor, tokens: Tensor, *_) -> Tensor:
    return table.new_empty(*tokens.shape, table.shape[1])


def _setup_table_context(ctx, inputs, output) -> None:
    table, tokens, _, sigma, _ = inputs
    ctx.keep, ctx.rows = math.sqrt(1.0 - sigma**2), table.shape[0]
    ctx.save_for_backward(tokens)


def _table_backward(ctx, upstream: Tensor):
    """Sum the gradients of each id's occurrences as nn.Embedding does."""
    tokens = ctx.saved_tensors[0].clamp(0, ctx.rows - 1)
    gradient = torch.ops.aten.embedding_dense_backward(upstream * ctx.keep, tokens, ctx.rows, -1, False)
    return gradient, None, None, None, None


def _setup_context(ctx, inputs, output) -> None:
    ctx.keep = math.sqrt(1.0 - inputs[2] ** 2)


def _backward(ctx, upstream: Tensor):
    return upstream * ctx.keep, None, None, None


for _device in ("CPU", "CUDA"):
    _LIB.impl("perturb_embeddings", _perturb_embeddings, _device)
    _LIB.impl("embed_and_perturb", _embed_and_perturb, _device)
torch.library.register_fake(
    "dimo_ext::perturb_embeddings", lambda embeddings, *_: embeddings.new_empty(embeddings.shape), lib=_LIB
)
torch.library.register_fake("dimo_ext::embed_and_perturb", _embed_and_perturb_fake, lib=_LIB)
torch.library.register_autograd(
    "dimo_ext::embed_and_perturb", _table_backward, setup_context=_setup_table_context, lib=_LIB
)
torch.library.register_autograd("dimo_ext::perturb_embeddings", _backward, setup_context=_setup_context, lib=_LIB)


def perturb_embeddings(
    embeddings: Tensor,
    sigma: float,
    *,
    scale: float | Tensor = 1.0,
    generator: torch.Generator | None = None,
    key: Tensor | None = None,
) -> Tensor:
    """σ·scale·ε + sqrt(1-σ²)·embeddings with ε standard normal; the gradient is sqrt(1-σ²) × upstream.

    Args:
        embeddings: ``[B, ..., D]`` float32, float16, bfloat16 or float64.
        sigma: σ in [0, 1]; 0 returns the embeddings unchanged and draws nothing.
        scale: of the noise, a float >= 0 or a scalar tensor (for example the embedding table's RMS); a constant.
        generator: where the key is drawn from; None = the device's default generator.
        key: int64 ``[2]`` or ``[B, 2]`` from :func:`random_key`.

    Returns:
        The perturbed embeddings, same shape and dtype.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given.

    Example:
        >>> perturb_embeddings(torch.ones(2, 3), 0.6, scale=0.02, key=random_key(0))
        tensor([[0.8181, 0.7948, 0.8127],
                [0.7968, 0.8153, 0.7860]])
    """
    check_logits(embeddings, "embeddings")
    require(embeddings.dim() >= 2, "embeddings", "shape [B, ..., D]", list(embeddings.shape))
    sigma, scale = _check_noise(embeddings, sigma, scale)
    if sigma == 0.0:
        return embeddings
    key = resolve_key(key, generator, batch_size=embeddings.shape[0], device=embeddings.device)
    return torch.ops.dimo_ext.perturb_embeddings(embeddings, key, sigma, scale)


def embed_and_perturb(
    tokens: Tensor,
    table: Tensor,
    sigma: float,
    *,
    scale: float | Tensor = 1.0,
    generator: torch.Generator | None = None,
    key: Tensor | None = None,
) -> Tensor:
    """:func:`perturb_embeddings` of the table's rows in one launch, which neither writes nor reads the rows themselves.

    Gradient: of the table, sqrt(1-σ²) × the sum of upstream over each id's occurrences.

    Args:
        tokens: int64 ``[B, ...]``; ids outside ``[0, V)`` count as the first or the last one.
        table: ``[V, D]`` float32, float16, bfloat16 or float64, such as the weight of an ``nn.Embedding``.
        sigma, scale, generator, key: as in :func:`perturb_embeddings`; σ = 0 looks up alone.

    Returns:
        The perturbed embeddings ``[B, ..., D]``, the dtype of the table.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given.

    Example:
        >>> embed_and_perturb(torch.tensor([0, 2]), torch.ones(3, 3), 0.6, scale=0.02, key=random_key(0))
        tensor([[0.8181, 0.7948, 0.8127],
                [0.7968, 0.8153, 0.7860]])
    """
    check_logits(table, "table")
    require(table.dim() == 2, "table", "shape [V, D]", list(table.shape))
    require(table.shape[0] >= 1, "table", "at least one row", list(table.shape))
    require_type(tokens, Tensor, "tokens", "an int64 tensor [B, ...]")
    require(tokens.dtype == torch.int64, "tokens", "dtype int64", tokens.dtype, TypeError)
    require(tokens.dim() >= 1, "tokens", "shape [B, ...]", list(tokens.shape))
    require(tokens.device == table.device, "tokens", f"a tensor on {table.device}", f"one on {tokens.device}")
    check_values(lambda: (tokens >= 0) & (tokens < table.shape[0]), "tokens", f"ids in [0, {table.shape[0]})")
    sigma, scale = _check_noise(table, sigma, scale)
    if sigma == 0.0:
        return torch.nn.functional.embedding(tokens.clamp(0, table.shape[0] - 1), table)
    key = resolve_key(key, generator, batch_size=tokens.shape[0], device=table.device)
    return torch.ops.dimo_ext.embed_and_perturb(table, tokens, key, sigma, scale)


def _check_noise(embeddings: Tensor, sigma: float, scale: float | Tensor) -> tuple[float, Tensor]:
    sigma = check_number(sigma, "sigma", low=0.0, high=1.0)
    if isinstance(scale, Tensor):
        check_tensor(scale, "scale", torch.Size([]), (embeddings.dtype, torch.float32), embeddings.device)
    else:
        scale = torch.full((), check_number(scale, "scale", low=0.0), dtype=torch.float32, device=embeddings.device)
    refuse_forward_mode(embeddings)
    return sigma, scale.detach()
