"""One plain-PyTorch twin an operator: fallback without a kernel, oracle of the tests, baseline of the benchmarks.

Each function takes the arguments of its operator's schema. float64 inputs compute in float64, all others in float32.
"""

from .cross_entropy import masked_cross_entropy
from .divergence import divergence_gradient_, token_divergence
from .embedding import embed_and_perturb, perturb_embeddings
from .masking import init_tokens, mask_tokens
from .random import fold_in, uniform_words
from .reveal import reveal_ancestral, reveal_confident
from .sampling import sample_categorical

__all__ = [
    "divergence_gradient_",
    "embed_and_perturb",
    "fold_in",
    "init_tokens",
    "mask_tokens",
    "masked_cross_entropy",
    "perturb_embeddings",
    "reveal_ancestral",
    "reveal_confident",
    "sample_categorical",
    "token_divergence",
    "uniform_words",
]
