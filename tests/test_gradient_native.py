"""The compiled product of a stored gradient and what backward brings, against the same in PyTorch."""

from __future__ import annotations

from contextlib import nullcontext
from math import inf

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import dimo_ext as dx
from dimo_ext._autograd import _scale
from tests.conftest import LAYOUTS, LogitsCase, cross

pytest.importorskip("dimo_ext._core")

CPU = torch.device("cpu")


class Scaled(torch.autograd.Function):
    """Hands a stored gradient on as the operators do."""

    @staticmethod
    def forward(ctx, logits: Tensor, stored: Tensor, factor: Tensor | None, backend: str, value: Tensor) -> Tensor:
        ctx.stored, ctx.factor, ctx.backend = stored, factor, backend
        return value.clone()

    @staticmethod
    def backward(ctx, upstream: Tensor):
        return _scale(ctx.stored, upstream, ctx.factor, ctx.backend, True), None, None, None, None


def scaled(stored: Tensor, upstream: Tensor, factor: Tensor | None, backend: str, *, kept: bool = False) -> Tensor:
    logits = torch.zeros_like(stored).requires_grad_()
    value = Scaled.apply(logits, stored, factor, backend, torch.zeros_like(upstream))
    (gradient,) = torch.autograd.grad(value, logits, upstream, retain_graph=kept)
    return gradient


@pytest.mark.parametrize(
    ("shape", "vocab", "dtype", "layout", "rows", "factor"),
    cross(
        [(), (5,), (3, 70), (2, 3, 17)], [1, 7, 33, 1025, 2500], [torch.float32, torch.float16, torch.bfloat16],
        LAYOUTS, ["one", "each"], [None, "one", "each"],
    ),
)  # fmt: skip
@pytest.mark.parametrize("kept", [False, True])
def test_it_is_the_product(isa, shape, vocab, dtype, layout, rows, factor, kept):
    """Bit for bit; a kept graph keeps what was stored; zeros meet an infinite multiplier."""
    (stored,) = LogitsCase(shape, vocab, dtype, layout).build(CPU, 1)
    stored[torch.rand(shape) < 0.3] = 0.0
    multiplier = {"one": torch.tensor(0.37), "each": torch.rand(shape) + 0.5}
    upstream, before = multiplier[rows], stored.clone()
    if rows == "each":
        upstream[stored.flatten(-1).eq(0).all(-1)] = inf
    factor = None if factor is None else multiplier[factor]
    if factor is not None:
        factor = factor.where(factor.isfinite(), torch.ones(()))
    expected = scaled(stored.clone(), upstream, factor, "reference")
    given = stored.clone(memory_format=torch.preserve_format)
    actual = scaled(given, upstream, factor, "native", kept=kept)
    assert actual.dtype == dtype
    assert torch.equal(actual, expected)
    if kept:
        assert torch.equal(given, before)


@pytest.mark.parametrize("layout", ["contiguous", "vocab_first"])
def test_whose_memory_it_takes(layout):
    """The gradient's own, unless the graph is kept or someone packed what was saved; so the kernel is what ran."""
    (logits,) = LogitsCase((4, 64), 33, layout=layout).build(CPU, 1)
    targets = torch.zeros(4, 64, dtype=torch.int64)
    saved: list[Tensor] = []

    def gradient(*, kept: bool = False, hooked: bool = False) -> tuple[Tensor, int]:
        """Of twice the loss, and where the stored one lies."""
        z = logits.clone(memory_format=torch.preserve_format).requires_grad_()
        hooks = saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x) if hooked else nullcontext()
        with hooks:
            loss = dx.masked_cross_entropy(z, targets)
        address = loss.grad_fn.next_functions[0][0] if loss.grad_fn.name().startswith("View") else loss.grad_fn
        stored = address._saved_tensors[0] if hasattr(address, "_saved_tensors") else address.saved_tensors[0]
        pointer, first = stored.data_ptr(), stored.clone()
        del stored, address
        (result,) = torch.autograd.grad(2 * loss, z, retain_graph=kept)
        assert torch.equal(result, 2 * first)
        if hooked:
            assert torch.equal(saved[0], first)
        return result, pointer

    result, pointer = gradient()
    assert result.data_ptr() == pointer
    for options in ({"kept": True}, {"hooked": True}):
        result, pointer = gradient(**options)
        assert result.data_ptr() != pointer


def test_an_ordinary_backward_with_a_scaled_loss():
    """Gradient accumulation divides the loss: the gradient is divided, whatever the layout."""
    teacher, auxiliary = (z for z in LogitsCase((2, 40), 33, layout="vocab_first").build(CPU, 2))
    gradients = []
    for scale in (1.0, 0.25):
        student = torch.zeros_like(auxiliary, requires_grad=True)
        (dx.distribution_matching_loss(student, teacher, auxiliary, "forward_kl") * scale).backward()
        gradients.append(student.grad)
    assert torch.equal(gradients[1], gradients[0] * 0.25)
