"""Cross-entropy at the masked positions: the auxiliary model's and the teacher's training loss."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from ._autograd import needs_gradient, refuse_forward_mode, register_saved_gradient, value_dtype
from ._backend import MAX_DIMS, address, logit_rows, native_kernel, placement
from ._checks import (
    check_integer,
    check_logit_values,
    check_logits,
    check_number,
    check_reduction,
    check_tensor,
    check_values,
    require,
)
from ._memory import output_like

_LIB = torch.library.Library("dimo_ext", "FRAGMENT")
_LIB.define(
    "masked_cross_entropy(Tensor logits, Tensor targets, Tensor? mask, float label_smoothing, SymInt? valid_vocab, "
    "str reduction, bool need_gradient) -> (Tensor, Tensor, Tensor)"
)
_WORKSPACE = 257  # kCrossEntropyWorkspace of csrc/ops.h


def _masked_cross_entropy(
    logits: Tensor, targets: Tensor, mask: Tensor | None, label_smoothing: float, valid_vocab: int | None,
    reduction: str, need_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kernel = native_kernel("masked_cross_entropy", logits.device)
    if kernel is None or logits.dim() > MAX_DIMS or logits.dtype == torch.float64:
        return reference.masked_cross_entropy(
            logits, targets, mask, label_smoothing, valid_vocab, reduction, need_gradient
        )
    gradient = output_like(logits) if need_gradient else logits.new_empty(0)
    value = logits.new_empty(logits.shape[:-1], dtype=torch.float32)
    total = None if reduction == "none" else value.new_empty(())
    factor = value.new_empty(())
    workspace = value.new_empty(0 if total is None else _WORKSPACE, dtype=torch.int32)
    targets, mask = targets.contiguous(), None if mask is None else mask.contiguous()
    kernel(
        logits.shape, [logit_rows(logits), logit_rows(gradient if need_gradient else None)], targets.data_ptr(),
        address(mask), logits.shape[-1] if valid_vocab is None else valid_vocab, label_smoothing,
        (1.0 / max(logits.shape[0], 1) if reduction == "batchmean" else 1.0, reduction == "mean",
         logits.dtype != torch.float16),
        value.data_ptr(), address(total), factor.data_ptr(), workspace.data_ptr(), *placement(logits.device),
    )  # fmt: skip
    return value if total is None else total, factor, gradient


def _fake(logits, targets, mask, label_smoothing, valid_vocab, reduction, need_gradient):
    value = logits.new_empty(logits.shape[:-1] if reduction == "none" else (), dtype=value_dtype(logits))
    gradient = torch.empty_like(logits) if need_gradient else logits.new_empty(0)
    return value, value.new_empty(()), gradient


def _factor(inputs: tuple, output: tuple) -> Tensor | None:
    """1 unless the reduction divides."""
    return output[1] if inputs[-2] in ("mean", "batchmean") else None


for _device in ("CPU", "CUDA"):
    _LIB.impl("masked_cross_entropy", _masked_cross_entropy, _device)
torch.library.register_fake("dimo_ext::masked_cross_entropy", _fake, lib=_LIB)
register_saved_gradient("masked_cross_entropy", _LIB, _factor)


def _check_values(logits: Tensor, targets: Tensor, mask: Tensor | None, vocab: int) -> None:
    check_logit_values(logits[..., :vocab], "logits", mask)

    def valid() -> Tensor:
        inside = (targets >= 0) & (targets < vocab)
        return inside if mask is None else inside | ~mask

    check_values(valid, "targets", f"ids in [0, {vocab}) at counted tokens")


def masked_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    valid_vocab: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of softmax(logits) against ``targets``, over the masked tokens alone.

    Per token: -(1-ε) log q_y - ε/V Σ_v log q_v; gradient softmax(logits) - (1-ε)·onehot - ε/V.

    Args:
        logits: ``[..., V]`` float32, float16, bfloat16 or float64. A row of -inf alone gives loss and gradient 0 and
            counts as a token.
        targets: int64 ``[...]``; an id outside the (valid) vocabulary counts as masked out.
        mask: bool ``[...]``, True = counted; None counts all.
        label_smoothing: ε in [0, 1); above 0, a -inf logit makes the loss +inf.
        valid_vocab: of a head padded to V columns, how many are real ids: softmax and smoothing know these alone, the
            others are not read, their gradient is 0. None = V.
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
    if valid_vocab is not None:
        check_integer(valid_vocab, "valid_vocab", low=1, high=logits.shape[-1])
    _check_values(logits, targets, mask, logits.shape[-1] if valid_vocab is None else valid_vocab)
    label_smoothing = check_number(label_smoothing, "label_smoothing", low=0.0, high=1.0)
    require(label_smoothing < 1.0, "label_smoothing", "a number in [0, 1)", label_smoothing)
    check_reduction(reduction, logits)
    refuse_forward_mode(logits)
    return torch.ops.dimo_ext.masked_cross_entropy(
        logits, targets, mask, label_smoothing, valid_vocab, reduction, needs_gradient(logits)
    )[0]
