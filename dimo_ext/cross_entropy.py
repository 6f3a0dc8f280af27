"""Cross-entropy at the masked positions: the auxiliary model's and the teacher's training loss."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from ._autograd import needs_gradient, refuse_forward_mode, register_saved_gradient, token_factor, value_dtype
from ._backend import native_kernel
from ._checks import (
    check_logit_values,
    check_logits,
    check_number,
    check_reduction,
    check_tensor,
    check_values,
    require,
)

_LIB = torch.library.Library("dimo_ext", "FRAGMENT")
_LIB.define(
    "masked_cross_entropy(Tensor logits, Tensor targets, Tensor? mask, float label_smoothing, Tensor? factor, "
    "bool reduce, bool need_gradient) -> (Tensor, Tensor)"
)


def _masked_cross_entropy(logits: Tensor, *args) -> tuple[Tensor, Tensor]:
    native_kernel("masked_cross_entropy", logits.device)  # under "native": raises while there is no kernel
    return reference.masked_cross_entropy(logits, *args)


def _fake(logits, targets, mask, label_smoothing, factor, reduce, need_gradient):
    value = logits.new_empty(() if reduce else logits.shape[:-1], dtype=value_dtype(logits))
    return value, torch.empty_like(logits) if need_gradient else logits.new_empty(0)


for _device in ("CPU", "CUDA"):
    _LIB.impl("masked_cross_entropy", _masked_cross_entropy, _device)
torch.library.register_fake("dimo_ext::masked_cross_entropy", _fake, lib=_LIB)
register_saved_gradient("dimo_ext::masked_cross_entropy", _LIB)


def _check_values(logits: Tensor, targets: Tensor, mask: Tensor | None) -> None:
    check_logit_values(logits, "logits", mask)

    def valid() -> Tensor:
        inside = (targets >= 0) & (targets < logits.shape[-1])
        return inside if mask is None else inside | ~mask

    check_values(valid, "targets", f"ids in [0, {logits.shape[-1]}) at counted tokens")


def masked_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of softmax(logits) against ``targets``, over the masked tokens alone.

    Per token: -(1-ε) log q_y - ε/V Σ_v log q_v; gradient softmax(logits) - (1-ε)·onehot - ε/V.

    Args:
        logits: ``[..., V]`` float32, float16, bfloat16 or float64. A row of -inf alone gives loss and gradient 0 and
            counts as a token.
        targets: int64 ``[...]``; an id outside [0, V) counts as masked out.
        mask: bool ``[...]``, True = counted; None counts all.
        label_smoothing: ε in [0, 1); above 0, a -inf logit makes the loss +inf.
        reduction: "none", "sum", "mean" (÷ counted tokens) or "batchmean" (sum ÷ B, needs at least 3 dimensions of
            logits). Nothing counted gives 0.

    Returns:
        Scalar, or ``[...]`` for "none"; float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given.

    Example:
        >>> logits, targets = torch.zeros(2, 4, requires_grad=True), torch.tensor([3, 0])
        >>> loss = masked_cross_entropy(logits, targets, mask=torch.tensor([True, False]))
        >>> loss.backward()
        >>> f"{loss:.4f}", logits.grad.tolist()
        ('1.3863', [[0.25, 0.25, 0.25, -0.75], [0.0, 0.0, 0.0, 0.0]])
    """
    check_logits(logits, "logits")
    check_tensor(targets, "targets", logits.shape[:-1], (torch.int64,), logits.device)
    if mask is not None:
        check_tensor(mask, "mask", logits.shape[:-1], (torch.bool,), logits.device)
    _check_values(logits, targets, mask)
    label_smoothing = check_number(label_smoothing, "label_smoothing", low=0.0, high=1.0)
    require(label_smoothing < 1.0, "label_smoothing", "a number in [0, 1)", label_smoothing)
    check_reduction(reduction, logits)
    refuse_forward_mode(logits)
    counted = None
    if reduction == "mean":
        counted = (targets >= 0) & (targets < logits.shape[-1])
        counted = counted if mask is None else counted & mask
    factor = token_factor(logits, counted, None, reduction, value_dtype(logits))
    return torch.ops.dimo_ext.masked_cross_entropy(
        logits, targets, mask, label_smoothing, factor, reduction != "none", needs_gradient(logits)
    )[0]
