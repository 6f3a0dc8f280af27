"""The transformer of Halton-MaskGIT, with its parameter names and shapes.

Source: Besnier et al., *Halton scheduler for masked generative image transformer* (arXiv 2503.17076), github.com/
valeoai/Halton-MaskGIT. A DiT over tokens: the class modulates every block (adaLN), queries and keys are RMS-normalised
over all heads together, register tokens follow the visual ones. Ids: tokens [0, V), [MASK] = V; null class = C. The
output head is tied to the embedding table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class HaltonConfig:
    """Sizes of a :class:`HaltonTransformer`: grid side (L = grid_size²), vocabulary without [MASK], classes, widths."""

    grid_size: int = 16
    vocab_size: int = 16384
    num_classes: int = 1000
    width: int = 1024
    depth: int = 24
    heads: int = 16
    mlp_width: int = 2816
    """Hidden channels of the gated feed-forward layers."""
    registers: int = 1
    patch_size: int = 1
    """2 joins 2x2 tokens into one position of the blocks."""
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("grid_size", "vocab_size", "num_classes", "width", "depth", "heads", "mlp_width"):
            _check_integer(name, getattr(self, name), 1)
        _check_integer("registers", self.registers, 0)
        if self.patch_size not in (1, 2) or self.grid_size % self.patch_size:
            raise ValueError(f"patch_size: expected 1, or 2 for an even grid_size, got {self.patch_size!r}")
        if self.width < self.heads:
            raise ValueError(f"heads: expected at most the width ({self.width}), got {self.heads}")


def _check_integer(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


class _RMSNorm(nn.Module):
    """x / sqrt(mean x² + 1e-5), in float32, times a weight, plus a bias if there is one."""

    def __init__(self, width: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        scaled = self.weight * _normalize(x)
        return scaled if self.bias is None else scaled + self.bias


def _normalize(x: Tensor) -> Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], eps=1e-5).type_as(x)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        inner = width // heads * heads  # less than the width where the heads do not divide it, as in the small model
        self.wq, self.wk, self.wv = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.wo = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        v = self.wv(x)
        q, k = (_normalize(part(x)).type_as(v) for part in (self.wq, self.wk))
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return F.dropout(self.wo(attended.transpose(1, 2).flatten(2)), self.dropout, self.training)


class _FeedForward(nn.Module):
    def __init__(self, width: int, mlp_width: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.w1, self.w3 = (nn.Linear(width, mlp_width, bias=False) for _ in range(2))
        self.w2 = nn.Linear(mlp_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.dropout(F.silu(self.w1(x)) * self.w3(x), self.dropout, self.training))


class _Block(nn.Module):
    def __init__(self, config: HaltonConfig) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 6 * config.width))
        self.ln1, self.ln2 = _RMSNorm(config.width), _RMSNorm(config.width)
        self.attn = _Attention(config.width, config.heads, config.dropout)
        self.ff = _FeedForward(config.width, config.mlp_width, config.dropout)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.mlp(condition).chunk(6, 1)
        x = x + gate1[:, None] * self.attn(_modulate(self.ln1(x), shift1, scale1))
        return x + gate2[:, None] * self.ff(_modulate(self.ln2(x), shift2, scale2))


class _Blocks(nn.Module):
    def __init__(self, config: HaltonConfig) -> None:
        super().__init__()
        self.recompute = False  # activations in the backward pass
        self.layers = nn.ModuleList(_Block(config) for _ in range(config.depth))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        for block in self.layers:
            recompute = self.recompute and torch.is_grad_enabled()
            x = checkpoint(block, x, condition, use_reentrant=False) if recompute else block(x, condition)
        return x


class _LastNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_final = _RMSNorm(width, bias=True)
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return _modulate(self.norm_final(x), *self.mlp(condition).chunk(2, 1))


class _TiedHead(nn.Module):
    """The output head's bias; its weight is the embedding table."""

    def __init__(self, ids: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(ids))

    def forward(self, x: Tensor, table: Tensor, columns: int) -> Tensor:
        return F.linear(x, table[:columns], self.bias[:columns])


class HaltonTransformer(nn.Module):
    """Tokens and class ids to logits; see the module's docstring for the layout of ids and sequence."""

    def __init__(self, config: HaltonConfig) -> None:
        super().__init__()
        self.config = config
        self.seq_len, self.mask_id, self.null_class = config.grid_size**2, config.vocab_size, config.num_classes
        self.cls_emb = nn.Embedding(config.num_classes + 1, config.width)
        self.tok_emb = nn.Embedding(config.vocab_size + 1, config.width)
        self.pos_emb = nn.Embedding(self.seq_len, config.width)
        if config.registers:
            self.reg_tokens = nn.Embedding(config.registers, config.width)
        if config.patch_size == 2:
            self.in_proj = nn.Conv2d(config.width, config.width, 2, stride=2, bias=False)
            self.out_proj = nn.Conv2d(config.width, 4 * config.width, 1, bias=False)
        self.transformer = _Blocks(config)
        self.last_norm = _LastNorm(config.width)
        self.head = _TiedHead(config.vocab_size + 1)
        self._initialise()

    def forward(
        self,
        tokens_BL: Tensor,
        class_B: Tensor,
        *,
        columns: int | None = None,
        embed: Callable[[Tensor, Tensor], Tensor] = F.embedding,
    ) -> Tensor:
        """Return logits ``[B, L, columns]``.

        Args:
            tokens_BL: int64 ``[B, L]`` in [0, V], V = [MASK].
            class_B: int64 ``[B]`` in [0, C], C = the null class.
            columns: how many leading ids to predict; None = V, the real tokens. The head is sliced before the product.
            embed: looks the tokens' rows ``[B, L, width]`` up in the table, before positions.
        """
        condition, tokens = self.cls_emb(class_B), embed(tokens_BL, self.tok_emb.weight)
        x = self._join(tokens + self.pos_emb.weight)
        positions = x.shape[1]
        if self.config.registers:
            x = torch.cat([x, self.reg_tokens.weight.expand(len(x), -1, -1)], 1)
        x = self._split(self.transformer(x, condition)[:, :positions])
        columns = self.config.vocab_size if columns is None else columns
        return self.head(self.last_norm(x, condition), self.tok_emb.weight, columns)

    def _join(self, x_BLC: Tensor) -> Tensor:
        if self.config.patch_size == 1:
            return x_BLC
        return self.in_proj(x_BLC.transpose(1, 2).unflatten(2, (self.config.grid_size, -1))).flatten(2).transpose(1, 2)

    def _split(self, x_BLC: Tensor) -> Tensor:
        if self.config.patch_size == 1:
            return x_BLC
        grid = self.out_proj(x_BLC.transpose(1, 2).unflatten(2, (self.config.grid_size // 2, -1)))
        return F.pixel_shuffle(grid, 2).flatten(2).transpose(1, 2)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.transformer.layers:  # every block starts as the identity
            nn.init.zeros_(block.mlp[1].weight)
