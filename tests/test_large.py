"""The largest vocabularies, and tensors whose elements lie more than 2^31 apart or are more than 2^31."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dimo_ext as dx
from tests import oracles
from tests.calls import value_and_gradient, with_gradient
from tests.conftest import (
    DTYPES,
    LAYOUTS,
    PROFILE,
    LogitsCase,
    assert_close,
    assert_equivalent,
    assert_gradient,
    pairwise,
)
from tests.oracles import filtered_probabilities, guided, limit_gradient, oracle, representable

# Meissonic's, GPT-2's (odd), LLaDA's, Qwen's, and the largest that the contract names.
VOCABULARIES = [8193, 50257, 126464, 151936, 262144]
DIVERGENCES = [
    dx.ForwardKL(), dx.ReverseKL(), dx.Jeffreys(-0.2), dx.JensenShannon(0.3), dx.SquaredHellinger(),
    dx.TotalVariation(), dx.PearsonChi2(), dx.NeymanChi2(), dx.Alpha(0.5), dx.LeCam(),
]  # fmt: skip


@pytest.mark.parametrize(
    ("divergence", "vocab", "dtype", "layout", "pattern", "scale"),
    pairwise(DIVERGENCES, VOCABULARIES, DTYPES, LAYOUTS, ["normal", "padded"], [1.0, 1.5]),
    ids=str,
)
def test_token_divergence(device, divergence, vocab, dtype, layout, pattern, scale):
    teacher, auxiliary, uncond = LogitsCase((1, 2), vocab, dtype, layout, pattern).build(device, 3)
    value, gradient = value_and_gradient(
        divergence, teacher, auxiliary, teacher_uncond_logits=uncond, guidance_scale=scale
    )
    mixed = guided(teacher, uncond, scale)
    assert_close(value, oracle(divergence, mixed, auxiliary), dtype)
    assert_gradient(gradient, representable(limit_gradient(divergence, mixed, auxiliary), dtype))


@pytest.mark.parametrize(
    ("vocab", "dtype", "layout", "smoothing"), pairwise(VOCABULARIES, DTYPES, LAYOUTS, [0.0, 0.1]), ids=str
)
def test_masked_cross_entropy(device, vocab, dtype, layout, smoothing):
    """Targets at both ends of the vocabulary and beyond."""
    (logits,) = LogitsCase((2, 2), vocab, dtype, layout).build(device, 1)
    targets = torch.tensor([[0, vocab - 1], [vocab, vocab // 2]], device=device)
    options = {"label_smoothing": smoothing, "reduction": "none"}
    value, gradient = with_gradient(lambda z: dx.masked_cross_entropy(z, targets, **options), logits)
    ignored = targets.masked_fill(targets == vocab, -100).flatten()
    expected = with_gradient(lambda z: F.cross_entropy(z.flatten(0, 1), ignored, **options), logits.double())
    assert_close(value, expected[0].view(2, 2), dtype)
    assert_gradient(gradient, expected[1])


FILTERS = [{}, {"top_k": 1000}, {"top_p": 0.9}, {"min_p": 0.01}, {"top_k": 5000, "top_p": 0.95, "min_p": 0.001}]


@pytest.mark.parametrize(
    ("vocab", "dtype", "filters", "scale", "temperature"),
    pairwise(VOCABULARIES, DTYPES, FILTERS, [1.0, 1.5], [0.5, 1.0]),
    ids=str,
)
def test_sample_categorical(device, vocab, dtype, filters, scale, temperature):
    """The very ids that the written algorithm draws, and their log-probability under the filtered distribution."""
    logits, uncond = LogitsCase((1, 3), vocab, dtype).build(device)
    options = {"temperature": temperature, **filters}
    tokens, log_prob = dx.sample_categorical(
        logits, uncond_logits=uncond, guidance_scale=scale, key=dx.random_key(vocab, 1, device=device), **options
    )
    mixed = guided(logits, uncond, scale)[0].cpu()
    log_probs = torch.stack([filtered_probabilities(row, **options) for row in mixed]).log()
    assert tokens[0].tolist() == oracles.draws(log_probs, vocab, 1).tolist()
    assert_close(log_prob[0], log_probs.gather(-1, tokens[0].cpu()[:, None])[:, 0])


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_no_id_of_a_large_vocabulary_is_out_of_reach(device, vocab):
    """The first and the last id, and two at the borders of a chunk, each alone possible."""
    ids = torch.tensor([0, 255, 256, vocab - 1], device=device)
    logits = torch.full((4, vocab), -torch.inf, device=device).scatter_(1, ids[:, None], 0.0)
    assert torch.equal(dx.sample_categorical(logits, key=dx.random_key(1, device=device)).tokens, ids)


# --- offsets beyond 2^31 --------------------------------------------------------------------------------------------


def far_apart(x: Tensor, dim: int) -> Tensor:
    """The same numbers, ``2^31`` elements and more from the first to the last of ``dim``; the gaps are never touched.

    Memory that nobody touches costs nothing on a CPU, and 4 GiB on a GPU.
    """
    strides = list(x.contiguous().stride())
    strides[dim] = max(x.numel(), 2**31 // (x.shape[dim] - 1) + 1)
    last = sum(stride * (size - 1) for stride, size in zip(strides, x.shape, strict=True))
    view = x.new_empty(last + 1).as_strided(x.shape, strides)
    assert last > 2**31
    return view.copy_(x)


FAR = {
    "token_divergence": lambda z, u, key: value_and_gradient("jeffreys:-0.2", z, u),
    "token_divergence: guided": lambda z, u, key: value_and_gradient(
        "forward_kl", u, u.flip(-1), teacher_uncond_logits=z, guidance_scale=2.0
    ),
    "token_divergence: auxiliary": lambda z, u, key: value_and_gradient("jensen_shannon", u, z),
    "token_divergence: student": lambda z, u, key: with_gradient(
        lambda s: dx.distribution_matching_loss(s, u, u.flip(-1), "reverse_kl"), z
    ),
    "masked_cross_entropy": lambda z, u, key: with_gradient(lambda s: dx.masked_cross_entropy(s, u.argmax(-1)), z),
    "sample_categorical": lambda z, u, key: dx.sample_categorical(z, top_p=0.9, key=key),
    "sample_categorical: guided": lambda z, u, key: dx.sample_categorical(
        u, uncond_logits=z, guidance_scale=2.0, key=key
    ),
    "perturb_embeddings": lambda z, u, key: with_gradient(lambda e: dx.perturb_embeddings(e, 0.5, key=key), z),
}


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("name", FAR)
def test_elements_far_apart(device, name, dim):
    """Samples, rows, or the ids of one row 2^31 elements apart change no bit."""
    near, other = LogitsCase((2, 3), 33, torch.float16).build(device)
    key = dx.random_key(1, device=device)
    for a, b in zip(FAR[name](far_apart(near, dim), other, key), FAR[name](near, other, key), strict=True):
        assert_equivalent(a, b)


# --- more than 2^31 elements ----------------------------------------------------------------------------------------


WIDE = 262144
MANY = {
    "token_divergence": lambda z, other, mask, keys: with_gradient(
        lambda s: dx.distribution_matching_loss(s, z, other, "forward_kl", mask=mask, reduction="sum"), z
    )[1],
    "masked_cross_entropy": lambda z, other, mask, keys: with_gradient(
        lambda s: dx.masked_cross_entropy(s, mask.long(), mask, reduction="sum"), z
    )[1],
    "sample_categorical": lambda z, other, mask, keys: dx.sample_categorical(z, key=keys).tokens,
    "perturb_embeddings": lambda z, other, mask, keys: dx.perturb_embeddings(z, 0.5, key=keys),
    "mask_tokens": lambda z, other, mask, keys: (
        dx.mask_tokens(
            torch.arange(65536, device=z.device).expand(4 * len(z), -1), 0.5, -1, key=keys.repeat(4, 1)
        ).tokens
    ),
    "init_tokens": lambda z, other, mask, keys: dx.init_tokens(
        4 * len(z), 65536, vocab_size=50257, mask_id=-1, r_init=0.5, key=keys.repeat(4, 1)
    ),
}


@pytest.mark.parametrize("name", MANY)
def test_more_elements_than_2_31(device, name):
    """The first and the last sample get what one alone gets; those between do too, or are masked out."""
    needed = 45 if device.type == "cuda" or name in ("mask_tokens", "init_tokens") else 15
    served = dx.build_info()["operators"][name][device.type]["backend"]
    if served != "native" or free_gigabytes(device) < needed or (device.type == "cpu" and PROFILE != "full"):
        pytest.skip(f"needs a native kernel, {needed} GB of free memory and, without a GPU, the profile 'full'")
    alone, many = (many_samples(name, device, samples) for samples in (1, 2**31 // WIDE + 2))
    masked = name in ("token_divergence", "masked_cross_entropy")
    for sample in (0, len(many) // 2, -1):
        assert torch.equal(many[sample], torch.zeros_like(alone[0]) if masked and sample > 0 else alone[0])


def many_samples(name: str, device: torch.device, samples: int) -> Tensor:
    """One output of an operator for equal samples with equal keys, all but the first and the last masked out."""
    logits = [z.expand(samples, -1, -1) for z in LogitsCase((1, 1), WIDE, torch.bfloat16).build(device)]
    mask = torch.zeros(samples, 1, dtype=torch.bool, device=device)
    mask[[0, -1]] = True
    return MANY[name](*logits, mask, dx.random_key(1, device=device).expand(samples, 2))


def free_gigabytes(device: torch.device) -> float:
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else os.sysconf("SC_AVPHYS_PAGES") * 4096
    return free / 1e9
