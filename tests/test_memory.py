"""What the loss part of a training step allocates: of the vocabulary's size, one gradient a network, nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import dimo_ext
from dimo.config import MethodConfig
from dimo.distill import student_loss
from dimo.teachers import MaskGITTeacher

pytestmark = pytest.mark.skipif(
    any(
        dimo_ext.build_info()["operators"][name]["cpu"]["backend"] != "native"
        for name in ("token_divergence", "masked_cross_entropy")
    ),
    reason="the reference works with many tensors of that size",
)

BATCH, GRID, VOCAB = 3, 4, 1031
LENGTH = GRID**2
PHASES = ["student forward", "teacher", "auxiliary forward", "loss"]


class Table(MaskGITTeacher):
    """A network that allocates its logits and nothing else, forward and backward."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        torch.nn.Module.__init__(self)
        self.vocab_size, self.mask_id, self.seq_len, self.num_classes = VOCAB, VOCAB, LENGTH, 1
        self.table = torch.randn(2 * BATCH, LENGTH, VOCAB, generator=torch.Generator().manual_seed(seed)).to(dtype)
        self.weight = torch.nn.Parameter(torch.zeros(VOCAB, dtype=dtype))

    def logits(self, tokens_BL: Tensor, *_, **__) -> Tensor:
        """Whatever the tokens."""
        return self.table[: len(tokens_BL)] + self.weight


def large_allocations(prof: profile, dtype: torch.dtype) -> dict[str, int]:
    """How many tensors at least as large as a network's logits were allocated, by the labelled block around them."""
    large, found = BATCH * LENGTH * VOCAB * dtype.itemsize, {}

    def walk(node, label: str) -> None:
        label = node.name if node.name.startswith("dimo: ") or node.name == "backward" else label
        if getattr(node.extra_fields, "alloc_size", 0) >= large:
            found[label] = found.get(label, 0) + 1
        for child in node.children:
            walk(child, label)

    for root in prof.profiler.kineto_results.experimental_event_tree():
        walk(root, "elsewhere")
    return found


@pytest.mark.parametrize("divergence", ["forward_kl", "jeffreys:-0.2", "jensen_shannon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_allocates_a_gradient_a_network(dtype, divergence):
    """Divergence with guidance, the auxiliary's cross-entropy and the entropy; the backward passes hand them over."""
    student, teacher, auxiliary = (Table(seed, dtype) for seed in range(3))
    method = MethodConfig(divergence=divergence, guidance_scale=2.0, embedding_noise=0.0, label_smoothing=0.1)
    condition, key = torch.zeros(BATCH, dtype=torch.int64), dimo_ext.random_key(1)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True, profile_memory=True, record_shapes=True) as prof:
        losses = student_loss(student, teacher, auxiliary, condition, method, key)
        with torch.profiler.record_function("backward"):
            losses.loss.backward()
            losses.auxiliary.backward()
    for network in (student, auxiliary):
        assert network.weight.grad.abs().sum() > 0
    found = large_allocations(prof, dtype)
    assert found["dimo: loss"] == 2
    assert found["dimo: auxiliary forward"] == found["dimo: teacher"] == 1  # logits
    assert found.keys() <= {f"dimo: {name}" for name in PHASES}


def test_the_gradient_in_place_allocates_nothing():
    """Of the vocabulary's size."""
    auxiliary, teacher, uncond = torch.randn(3, BATCH, LENGTH, VOCAB).unbind()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True, profile_memory=True, record_shapes=True) as prof:
        dimo_ext.divergence_gradient_(
            auxiliary.clone(), teacher, "jeffreys:-0.2", teacher_uncond_logits=uncond, guidance_scale=2.0
        )
    assert large_allocations(prof, torch.float32) == {"elsewhere": 1}  # the clone
