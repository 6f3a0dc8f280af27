"""Fused operators for distilling masked diffusion models: masking, sampling, token-level f-divergences.

Every operator runs as a native kernel where one was built for the device, as plain PyTorch elsewhere;
``dimo_ext.build_info()`` says which and why.

Conventions:
    Shapes: logits are ``[..., V]`` of any strides, tokens int64 ``[...]``, masks bool ``[...]``; V is the vocabulary,
        L the sequence length, B the batch and always the first dimension. Dense CPU and CUDA tensors; meta tensors
        give shapes.
    Dtypes: logits and embeddings are float32, float16, bfloat16 or float64. Arithmetic and the values of losses are
        float32, float64 where an input is; a gradient has the dtype of its logits. Autocast changes none of that.
    -inf: a logit of -inf is an id of probability 0. No NaN comes from numbers and -inf; each operator says what a row
        of -inf alone gives, and one with NaN or +inf.
    Masks: True is masked, which is what losses count. A row that is not counted gives value 0 and gradient 0 whatever
        it holds.
    Gradients: of the losses, of ``perturb_embeddings`` and of ``embed_and_perturb``, by ``backward()``; the teacher's
        side, masks, weights and scales are constants. A loss can be differentiated once: a gradient of its gradient,
        ``torch.func.grad`` and forward mode (jvp) raise RuntimeError.
    Randomness: draws are a pure function of the arguments and of ``key``, made by ``random_key`` and ``fold_in``. A
        ``[2]`` key serves the whole batch; with ``[B, 2]`` keys a sample's draws depend on its own key alone, not on
        the batch that it is drawn in. Operators draw independently from one key, but two calls of one operator need
        two keys. Without a key, one is drawn from ``generator`` or, when that is None, from the device's default
        generator (``torch.manual_seed``).
    Determinism: the same key gives the same keys, masks and initial tokens on every backend and device, bit for bit;
        the same sampled tokens up to floating-point ties, the same noise up to rounding.
    Memory: beyond its outputs a loss, draw or mask takes a few numbers a row; ``divergence_gradient_`` has no output of
        the logits' size. On Linux, CPU outputs from 8 MiB on take the memory that earlier ones left: up to four blocks
        stay with the process; the system takes their pages back when it runs short, not their addresses. torch's
        profiler does not count them, and such storage cannot be resized.
    torch.compile: operators are ``torch.library`` ones: one graph (``fullgraph=True``) with symbolic sizes, and
        ``torch.export``. A Python float is a constant of the graph, each new value compiles anew: give a changing mask
        ratio or guidance scale as a ``[B]`` tensor. A ``generator`` is refused there: pass a key.
    vmap: runs an operator once an element, a loop. A key made inside is the same in every element, and so are the
        draws; map over a batch of keys: ``torch.vmap(f)(x, fold_in(key, torch.arange(len(x))))``.
    Errors: a wrong type, shape, dtype, device or number raises ValueError or TypeError naming the argument, what was
        expected and what was given. Values inside tensors are not read, so nothing waits for a GPU, unless
        DIMO_EXT_DEBUG asks for it.

Environment variables:
    DIMO_EXT_BACKEND: at run time, the backend that ``use_backend`` starts from: auto (default), native or reference.
    DIMO_EXT_REQUIRE_NATIVE: at run time, a switch: ``import dimo_ext`` raises ImportError where there is no compiled
        module or it does not load. It says nothing about single operators or devices: "native" as the backend does.
    DIMO_EXT_DEBUG: at run time, a switch: values inside tensors are checked too (ids, ratios, weights, NaN and +inf
        logits), which waits for a GPU; compiled graphs are left alone.
    DIMO_EXT_NATIVE: when the package is built: off, 0, false or no makes a pure Python package; anything else
        compiles.
    DIMO_EXT_CUDA: when the package is built: auto (default, CUDA kernels where nvcc is found), on (fails without) or
        off.

The run-time variables are read on import. A switch is on for 1, true, on or yes, off for 0, false, off, no, empty or
unset, in upper or lower case. Examples start with ``import torch`` and ``from dimo_ext import *``.
"""

from ._backend import build_info, use_backend
from .cross_entropy import masked_cross_entropy
from .divergence import CountedDivergence, distribution_matching_loss, divergence_gradient_, token_divergence
from .divergences import (
    Alpha,
    Divergence,
    ForwardKL,
    Jeffreys,
    JensenShannon,
    LeCam,
    NeymanChi2,
    PearsonChi2,
    ReverseKL,
    SquaredHellinger,
    TotalVariation,
    parse_divergence,
)
from .embedding import embed_and_perturb, perturb_embeddings
from .masking import MaskedTokens, init_tokens, mask_tokens
from .random import fold_in, random_key
from .reveal import reveal_ancestral, reveal_confident
from .sampling import CategoricalSample, sample_categorical

__all__ = [
    "Alpha",
    "CategoricalSample",
    "CountedDivergence",
    "Divergence",
    "ForwardKL",
    "Jeffreys",
    "JensenShannon",
    "LeCam",
    "MaskedTokens",
    "NeymanChi2",
    "PearsonChi2",
    "ReverseKL",
    "SquaredHellinger",
    "TotalVariation",
    "build_info",
    "distribution_matching_loss",
    "divergence_gradient_",
    "embed_and_perturb",
    "fold_in",
    "init_tokens",
    "mask_tokens",
    "masked_cross_entropy",
    "parse_divergence",
    "perturb_embeddings",
    "random_key",
    "reveal_ancestral",
    "reveal_confident",
    "sample_categorical",
    "token_divergence",
    "use_backend",
]
