"""Variance-preserving noise on token embeddings: the student's source of continuous randomness."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import reference
from ._autograd import refuse_forward_mode
from ._backend import MAX_DIMS, key_argument, logit_rows, native_kernel, placement, rows_per_sample
from ._checks import check_logits, check_number, check_tensor, require
from .random import resolve_key

_LIB = torch.library.Library("dimo_ext", "FRAGMENT")
_LIB.define("perturb_embeddings(Tensor embeddings, Tensor key, float sigma, Tensor scale) -> Tensor")


def _perturb_embeddings(embeddings: Tensor, key: Tensor, sigma: float, scale: Tensor) -> Tensor:
    kernel = native_kernel("perturb_embeddings", embeddings.device)
    if kernel is None or embeddings.dtype == torch.float64 or embeddings.dim() > MAX_DIMS:
        return reference.perturb_embeddings(embeddings, key, sigma, scale).contiguous()
    perturbed = embeddings.new_empty(embeddings.shape)
    key, scale = key.contiguous(), scale.to(torch.float32)
    kernel(
        embeddings.shape, [logit_rows(embeddings), logit_rows(perturbed)], rows_per_sample(embeddings),
        key_argument(key), sigma, scale.data_ptr(), *placement(embeddings.device),
    )  # fmt: skip
    return perturbed


def _setup_context(ctx, inputs, output) -> None:
    ctx.keep = math.sqrt(1.0 - inputs[2] ** 2)


def _backward(ctx, upstream: Tensor):
    return upstream * ctx.keep, None, None, None


for _device in ("CPU", "CUDA"):
    _LIB.impl("perturb_embeddings", _perturb_embeddings, _device)
torch.library.register_fake(
    "dimo_ext::perturb_embeddings", lambda embeddings, *_: embeddings.new_empty(embeddings.shape), lib=_LIB
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
    sigma = check_number(sigma, "sigma", low=0.0, high=1.0)
    if isinstance(scale, Tensor):
        check_tensor(scale, "scale", torch.Size([]), (embeddings.dtype, torch.float32), embeddings.device)
    else:
        scale = torch.full((), check_number(scale, "scale", low=0.0), dtype=torch.float32, device=embeddings.device)
    refuse_forward_mode(embeddings)
    if sigma == 0.0:
        return embeddings
    key = resolve_key(key, generator, batch_size=embeddings.shape[0], device=embeddings.device)
    return torch.ops.dimo_ext.perturb_embeddings(embeddings, key, sigma, scale.detach())
