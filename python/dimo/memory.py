"""The memory that a distillation needs on its device, estimated before it starts."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

from .config import DistillConfig
from .state_dicts import build_on_meta
from .teachers import Teacher

_FLOAT32 = 4
_LOGITS = 6  # student and auxiliary with their gradients, teacher with and without condition


def training_memory(teacher: Teacher, config: DistillConfig) -> dict[str, int]:
    """Return bytes by part of what a training step holds at its peak.

    The activations are what autograd keeps of one forward pass, run on tensors without memory at the configuration's
    batch size and precision. Not counted: temporaries of single operators, the allocator's fragments, the CUDA context.
    On an H100 with torch 2.11 the sum was 0.87 to 1.12 of what two training steps allocated, for MaskGIT and
    Halton-MaskGIT in float32, in bfloat16 and with recomputed activations.

    Args:
        teacher: on any device; only sizes matter.
        config: batch size, precision, what is frozen and recomputed.
    """
    frozen = set(teacher.frozen_parameters()) if config.method.freeze == "recipe" else set()
    sizes = {name: parameter.numel() for name, parameter in teacher.named_parameters()}
    every, trained = sum(sizes.values()), sum(size for name, size in sizes.items() if name not in frozen)
    kept, recomputed, logits = _forward(teacher, config)
    graphs = 1 if config.method.fresh_auxiliary_batch else 2  # the student's, and the auxiliary's of the same batch
    guided = 0 if config.method.guidance_scale == 1.0 else 1
    parts = {
        "teacher": _bytes(teacher.parameters()),
        "tokeniser": _bytes(teacher.tokenizer.parameters()) if teacher.tokenizer is not None else 0,
        "student": every * _FLOAT32,
        "student's gradients": trained * _FLOAT32,
        "student's optimiser states": 2 * trained * _FLOAT32,
        "student's average (EMA)": every * _FLOAT32,
        "auxiliary": every * _FLOAT32,
        "auxiliary's gradients": every * _FLOAT32,
        "auxiliary's optimiser states": 2 * every * _FLOAT32,
        "bfloat16 copies of weights": 3 * every * 2 if config.run.precision == "bfloat16" else 0,
        "logits and their gradients": (_LOGITS - 1 + guided) * logits,
        "activations": graphs * kept + recomputed,
    }
    return {name: size for name, size in parts.items() if size}


def memory_text(parts: dict[str, int], device: torch.device, available: int) -> str:
    """Return the estimate as lines of text, with what the device has."""
    width, total = max(map(len, parts)), sum(parts.values())
    lines = [f"{name:<{width}} {size / 2**30:8.2f} GiB" for name, size in parts.items()]
    verdict = "enough" if total < 0.9 * available else "tight" if total < available else "too little"
    lines.append(f"{'in all':<{width}} {total / 2**30:8.2f} GiB, {device} has {available / 2**30:.1f} GiB: {verdict}")
    if verdict != "enough":
        lines.append("less: a smaller run.batch_size with more run.accumulation_steps, run.activation_checkpointing")
    return "\n".join(lines)


def device_memory(device: torch.device) -> int:
    """Return the bytes of a device's memory, all of it, free or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _forward(teacher: Teacher, config: DistillConfig) -> tuple[int, int, int]:
    """Bytes that autograd keeps of one forward pass, those of one layer that is recomputed, those of the logits."""
    recompute = config.run.activation_checkpointing
    kept, logits = _saved(teacher, config, recompute=recompute)
    whole, _ = _saved(teacher, config, recompute=False) if recompute else (kept, logits)
    return kept, (whole - kept) // max(1, len(teacher.layers())) if recompute else 0, logits


def _saved(teacher: Teacher, config: DistillConfig, *, recompute: bool) -> tuple[int, int]:
    batch = config.run.batch_size
    condition = pytree.tree_map(lambda t: t.cpu(), teacher.blank_condition(batch))
    tokens, ratio = torch.full((batch, teacher.seq_len), teacher.mask_id), torch.full((batch,), 0.5)
    model = build_on_meta(lambda: type(teacher).build(teacher.network_config()), "teacher")
    storages: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor
        return tensor

    half = config.run.precision == "bfloat16"
    # Fake tensors of a CPU, not the meta device: they take the fused attention that real ones take.
    with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad():
        model = model.to_empty(device="cpu").eval().requires_grad_(True)
        if recompute:
            model.checkpoint_activations()
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        with torch.autocast("cpu", torch.bfloat16, enabled=half), saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = model.logits(tokens, condition, mask_ratio=ratio)
    kept = sum(t.untyped_storage().nbytes() for key, t in storages.items() if key not in own)
    return kept, logits.numel() * logits.element_size()
