"""Fused operators for distilling masked diffusion models: masking, sampling, token-level f-divergences.

Every operator runs as a native kernel where one was built for the device, as plain PyTorch elsewhere;
``dimo_ext.build_info()`` says which and why.
"""

from ._backend import build_info, use_backend
from .cross_entropy import masked_cross_entropy
from .divergence import CountedDivergence, distribution_matching_loss, token_divergence
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
from .embedding import perturb_embeddings
from .masking import MaskedTokens, init_tokens, mask_tokens
from .random import fold_in, random_key
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
    "fold_in",
    "init_tokens",
    "mask_tokens",
    "masked_cross_entropy",
    "parse_divergence",
    "perturb_embeddings",
    "random_key",
    "sample_categorical",
    "token_divergence",
    "use_backend",
]
