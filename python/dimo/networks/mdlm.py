"""The diffusion transformer of MDLM on scaled-dot-product attention, with its parameter names and shapes.

Source: Sahoo et al., *Simple and Effective Masked Diffusion Language Models* (arXiv 2406.07524),
github.com/kuleshov-group/mdlm, `models/dit.py`. Ids: tokens [0, vocab_size - 1), [MASK] last. Where the original needs
flash-attn, the same rotary positions and attention are plain PyTorch here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .embeddings import SINUSOID, sinusoid

_ROTARY_BASE = 10_000


@dataclass(frozen=True)
class MDLMConfig:
    """Sizes under the names of the released config.json; ``vocab_size`` counts [MASK]."""

    vocab_size: int = 50_258
    model_length: int = 1024
    hidden_dim: int = 768
    n_blocks: int = 12
    n_heads: int = 12
    cond_dim: int = 128
    dropout: float = 0.1
    time_conditioning: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "model_length", "hidden_dim", "n_blocks", "n_heads", "cond_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
        if self.hidden_dim % (2 * self.n_heads):
            raise ValueError(
                f"hidden_dim: expected a multiple of 2 * n_heads ({2 * self.n_heads}), got {self.hidden_dim}"
            )


class _LayerNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), x.shape[-1:]) * self.weight


class _Embedding(nn.Module):
    def __init__(self, ids: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(ids, width))
        nn.init.kaiming_uniform_(self.embedding, a=5**0.5)


class _SigmaMap(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(SINUSOID, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, sigma: Tensor) -> Tensor:
        return self.mlp(sinusoid(sigma))


class _Rotary(nn.Module):
    """Angles of the first half of a head's channels; the released files store ``inv_freq``."""

    def __init__(self, head: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / _ROTARY_BASE ** (torch.arange(0, head, 2).float() / head))

    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        angles = torch.outer(torch.arange(length, device=self.inv_freq.device).float(), self.inv_freq.float())
        return angles.cos(), angles.sin()


def _rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate channel i with channel i + D/2 of ``[B, heads, L, D]``."""
    cos, sin = (t.to(x.dtype) for t in table)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _zero_linear(width: int, width_out: int) -> nn.Linear:
    """A layer that starts as zero, so that every block starts as the identity."""
    layer = nn.Linear(width, width_out)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class _Block(nn.Module):
    def __init__(self, config: MDLMConfig) -> None:
        super().__init__()
        width, self.heads = config.hidden_dim, config.n_heads
        # In the original's order: training checkpoints list their moving averages in it, without names.
        self.norm1 = _LayerNorm(width)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.norm2 = _LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.adaLN_modulation = _zero_linear(config.cond_dim, 6 * width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, condition: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        shift, scale, gate, *mlp = self.adaLN_modulation(condition)[:, None].chunk(6, -1)
        x = x + gate * self.dropout(self._attention(self.norm1(x) * (1 + scale) + shift, table))
        shift, scale, gate = mlp
        return x + gate * self.dropout(self.mlp(self.norm2(x) * (1 + scale) + shift))

    def _attention(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.attn_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(_rotate(q, table), _rotate(k, table), v)
        return self.attn_out(attended.transpose(1, 2).flatten(2))


class _Head(nn.Module):
    def __init__(self, config: MDLMConfig) -> None:
        super().__init__()
        self.norm_final = _LayerNorm(config.hidden_dim)
        self.linear = _zero_linear(config.hidden_dim, config.vocab_size)
        self.adaLN_modulation = _zero_linear(config.cond_dim, 2 * config.hidden_dim)

    def forward(self, x: Tensor, condition: Tensor, columns: int) -> Tensor:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, -1)
        x = self.norm_final(x) * (1 + scale) + shift
        return F.linear(x, self.linear.weight[:columns], self.linear.bias[:columns])


class MDLMTransformer(nn.Module):
    """Tokens and a noise level to logits."""

    def __init__(self, config: MDLMConfig) -> None:
        super().__init__()
        self.config = config
        self.mask_id = config.vocab_size - 1
        self.recompute = False  # the blocks' activations in the backward pass
        self.vocab_embed = _Embedding(config.vocab_size, config.hidden_dim)
        self.sigma_map = _SigmaMap(config.cond_dim)
        self.rotary_emb = _Rotary(config.hidden_dim // config.n_heads)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.n_blocks))
        self.output_layer = _Head(config)

    def forward(
        self,
        tokens_BL: Tensor,
        sigma: Tensor,
        *,
        columns: int | None = None,
        embed: Callable[[Tensor, Tensor], Tensor] = F.embedding,
    ) -> Tensor:
        """Return logits ``[B, L, columns]``.

        Args:
            tokens_BL: int64 ``[B, L]`` in [0, vocab_size).
            sigma: ``[B]``, total noise -log(1 - mask ratio); zeros without time conditioning.
            columns: how many leading ids to predict; None = all but [MASK]. The head is sliced before the product.
            embed: looks the tokens' rows ``[B, L, hidden_dim]`` up in the table.
        """
        x = embed(tokens_BL, self.vocab_embed.embedding)
        condition, table = F.silu(self.sigma_map(sigma)), self.rotary_emb(tokens_BL.shape[1])
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, condition, table, use_reentrant=False)
            else:
                x = block(x, condition, table)
        return self.output_layer(x, condition, self.mask_id if columns is None else columns)


def subs_log_probs(logits: Tensor, tokens_BL: Tensor, mask_id: int) -> Tensor:
    """SUBS, the parameterisation of MDLM: log-probabilities ``[B, L, V]`` of the clean tokens.

    [MASK] is never predicted, and a token that is not masked is carried over: log-probability 0 for itself, -inf for
    the others (arXiv 2406.07524; the published code has -1e6 for -inf).

    Args:
        logits: ``[B, L, V]`` of the real tokens, as :meth:`MDLMTransformer.forward` returns them.
        tokens_BL: the tokens that they were computed from.
        mask_id: the id of [MASK].
    """
    carried = torch.full_like(logits, -torch.inf).scatter(-1, tokens_BL.clamp(max=logits.shape[-1] - 1)[..., None], 0.0)
    return torch.where((tokens_BL == mask_id)[..., None], logits.log_softmax(-1), carried)
