"""How the gradient that an operator computes together with its value reaches the logits, and how values are reduced."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import forward_ad

from ._backend import MAX_DIMS, address, compiled_function, current_backend, logit_rows, placement
from ._memory import output_like


def needs_gradient(receiver: Tensor) -> bool:
    """Whether a backward pass can reach ``receiver``: only then is its gradient computed."""
    if not torch.compiler.is_compiling():
        while not receiver.requires_grad and functorch.is_functorch_wrapped_tensor(receiver):  # vmap hides it
            receiver = functorch.get_unwrapped(receiver)
    return torch.is_grad_enabled() and receiver.requires_grad


def refuse_forward_mode(*tensors: Tensor | None) -> None:
    """Raise for forward-mode differentiation (jvp): without a formula its tangents would silently be 0."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError("dimo_ext operators have no forward-mode derivative (jvp): use backward()")


def value_dtype(*logits: Tensor) -> torch.dtype:
    """Return the dtype of values: float64 where an input has it, else float32."""
    return torch.float64 if any(z.dtype == torch.float64 for z in logits) else torch.float32


def token_factor(
    logits: Tensor, counted: Tensor | None, weight: Tensor | None, reduction: str, dtype: torch.dtype
) -> Tensor | None:
    """Return weight ÷ count: what multiplies each token's value and gradient, ``[...]`` or a scalar; None = 1.

    The tokens are the rows of ``logits``; ``counted`` None counts them all. ``dtype`` is that of the values.
    """
    shape = logits.shape[:-1]
    if weight is not None and counted is not None:
        weight = torch.where(counted, weight, 0.0)
    if reduction in ("none", "sum"):
        return weight
    factor = torch.ones((), dtype=dtype, device=logits.device) if weight is None else weight
    if reduction == "batchmean":
        return factor / max(shape[0], 1)
    return factor / (torch.sym_max(shape.numel(), 1) if counted is None else counted.sum().clamp(min=1))


def register_saved_gradient(
    name: str, lib: torch.library.Library, factor: Callable[[tuple, tuple], Tensor | None]
) -> None:
    """Register the autograd formula of an operator whose backward was computed in its forward.

    The first input receives the gradient, the last one is ``need_gradient``. ``factor(inputs, output)`` is what
    multiplies each token's value and gradient, None = 1. The first output is the value, the last one
    factor · ∂value/∂input ``[..., V]`` in the receiver's dtype. float16 stores it without the factor, which backward
    applies in float32 together with the upstream gradient: only there is a loss scaler's factor known.
    """
    operator = getattr(getattr(torch.ops, lib.ns), name).default
    # The dispatcher would leave out what equals its default.
    assert not any(a.has_default_value() or a.kwarg_only for a in operator._schema.arguments)

    def below(keyset, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    def forward(ctx, keyset, *inputs):
        output = below(keyset, *inputs)
        ctx.set_materialize_grads(False)
        ctx.available, ctx.inputs = inputs[-1], len(inputs)
        ctx.backend = current_backend()  # the backward may run on another thread
        ctx.own = not _is_packed()
        half = inputs[0].dtype == torch.float16
        ctx.save_for_backward(output[-1], factor(inputs, output) if half else None)
        return output

    def backward(ctx, *upstream):
        return None, _backward(ctx, upstream[0]), *[None] * (ctx.inputs - 1)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = type(name, (torch.autograd.Function,), methods)  # its name is the graph's node's

    def autograd(keyset, *inputs):
        recorded = torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)
        return function.apply(keyset, *inputs) if recorded else below(keyset, *inputs)

    # What torch.library.register_autograd makes of it spends some 60 us a call on the defaults of a dozen arguments.
    lib.impl(name, autograd, "Autograd", with_keyset=True)


def factor_in_forward(receiver: Tensor, factor: Tensor | None) -> Tensor | None:
    """Return the factor that the stored gradient of ``receiver`` includes."""
    return None if receiver.dtype == torch.float16 else factor


def _backward(ctx, upstream: Tensor | None) -> Tensor | None:
    gradient, factor = ctx.saved_tensors
    if upstream is None:
        return None
    if not ctx.available:
        raise RuntimeError("dimo_ext: the operator was called with need_gradient=False, so it has no backward")
    scale = _Scale.apply if torch.is_grad_enabled() else _scale
    return scale(gradient, upstream, factor, ctx.backend, ctx.own)


class _Scale(torch.autograd.Function):
    """:func:`_scale` where a graph of the backward pass is made: the operator keeps only its first derivative."""

    @staticmethod
    def forward(ctx, gradient: Tensor, upstream: Tensor, factor: Tensor | None, backend: str, own: bool) -> Tensor:
        return _scale(gradient, upstream, factor, backend, own)

    @staticmethod
    def backward(ctx, *_: Tensor):
        raise RuntimeError("dimo_ext operators are once differentiable: no gradient of a gradient (create_graph=True)")


def _scale(gradient: Tensor, upstream: Tensor, factor: Tensor | None, backend: str, own: bool) -> Tensor:
    """Gradient × upstream × factor; ``own`` says that nobody else holds the gradient that was saved."""
    if factor is None and _is_one(upstream):
        return gradient.clone() if _is_kept() else gradient
    if backend != "reference" and _is_plain(gradient, upstream, factor):
        kernel = compiled_function("scale_gradient", gradient.device)
        single = torch.float64 not in (gradient.dtype, upstream.dtype)
        if kernel is not None and single and gradient.dim() <= MAX_DIMS:
            return _scale_natively(kernel, gradient, upstream, factor, own)
    upstream = upstream.to(torch.promote_types(upstream.dtype, torch.float32))
    upstream = upstream if factor is None else upstream * factor
    scaled = gradient * upstream[..., None]  # in float32 for half types: [1] promotes where a scalar would not
    # A masked-out row may meet an infinite upstream: its gradient stays exactly zero.
    return torch.where(gradient == 0, 0.0, scaled).to(gradient.dtype)


def _scale_natively(kernel, gradient: Tensor, upstream: Tensor, factor: Tensor | None, own: bool) -> Tensor:
    """Gradient × upstream × factor in the gradient's own memory, unless someone needs it as it is."""
    # Three references: the graph's, this one, and the handle that asks. Who called the bare operator has another.
    shared = torch._C._storage_Use_Count(gradient.untyped_storage()._cdata) > 3
    to = output_like(gradient) if shared or not own or _is_kept() else gradient
    upstream, factor = (None if t is None else t.contiguous() for t in (upstream, factor))
    kernel(
        gradient.shape, logit_rows(gradient), logit_rows(to), upstream.data_ptr(), min(upstream.dim(), 1),
        address(factor), 0 if factor is None else min(factor.dim(), 1), *placement(gradient.device),
    )  # fmt: skip
    return to


def _is_packed() -> bool:
    """Whether someone packs what is saved now, and so may hold the very gradient; older torch versions do not tell."""
    top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top_hooks is None or top_hooks(True) is not None


def _is_kept() -> bool:
    """Whether the running backward retains its graph."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def _is_plain(*tensors: Tensor | None) -> bool:
    """Whether these are tensors with memory of their own, not traced and not wrapped."""
    given = [t for t in tensors if t is not None]
    wrapped = any(type(t) is not Tensor or functorch.is_functorch_wrapped_tensor(t) for t in given)
    return not wrapped and not torch.compiler.is_compiling()


def _is_one(upstream: Tensor) -> bool:
    """Whether the upstream gradient, of a loss or of a sum over tokens, is known to be 1 without a device's wait."""
    if upstream.device.type != "cpu" or not _is_plain(upstream) or any(upstream.stride()) or upstream.numel() == 0:
        return False
    return upstream[(0,) * upstream.dim()].item() == 1.0  # all are this one number
