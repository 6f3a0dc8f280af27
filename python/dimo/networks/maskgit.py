"""The bidirectional transformer of MaskGIT-pytorch v1.0, with its parameter names and shapes.

Source: Besnier & Chen, *A PyTorch reproduction of masked generative image transformer* (arXiv 2310.14400),
github.com/valeoai/Maskgit-pytorch, branch v1.0. Ids: tokens [0, V), [MASK] = V, class y = V+1+y, null class = V+1+C.
The class token stands last in the sequence; the output head is tied to the embedding table, with a bias a position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class MaskGITConfig:
    """Sizes of a :class:`MaskTransformer`: grid side (L = grid_size²), vocabulary without [MASK], classes, widths."""

    grid_size: int = 16
    vocab_size: int = 1024
    num_classes: int = 1000
    width: int = 768
    depth: int = 24
    heads: int = 16
    mlp_width: int = 3072
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("grid_size", "vocab_size", "num_classes", "width", "depth", "heads", "mlp_width"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
        if self.width % self.heads:
            raise ValueError(f"width: expected a multiple of heads ({self.heads}), got {self.width}")


class _MultiHeadAttention(nn.Module):
    """nn.MultiheadAttention's packed parameters on scaled_dot_product_attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor) -> Tensor:
        packed = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = packed.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.mha = _MultiHeadAttention(width, heads)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.mha(x))


class _FeedForward(nn.Module):
    def __init__(self, width: int, mlp_width: int, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(width, mlp_width), nn.GELU(), nn.Dropout(dropout), nn.Linear(mlp_width, width),
            nn.Dropout(dropout),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class _Layer(nn.ModuleList):
    """Attention and feed-forward; a list, so that the weights keep their names."""

    def forward(self, x: Tensor) -> Tensor:
        attention, feed_forward = self
        return feed_forward(attention(x))


class _PreNorm(nn.Module):
    def __init__(self, width: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fn(self.norm(x))


class _Encoder(nn.Module):
    def __init__(self, config: MaskGITConfig) -> None:
        super().__init__()
        self.recompute = False  # activations in the backward pass
        self.layers = nn.ModuleList(
            _Layer(
                [
                    _PreNorm(config.width, _Attention(config.width, config.heads, config.dropout)),
                    _PreNorm(config.width, _FeedForward(config.width, config.mlp_width, config.dropout)),
                ]
            )
            for _ in range(config.depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            recompute = self.recompute and torch.is_grad_enabled()
            # The generator's state is kept for dropout alone: a step that is recorded as a graph cannot read it.
            x = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=self.training) if recompute else layer(x)
        return x


class MaskTransformer(nn.Module):
    """Tokens and class ids to logits; see the module's docstring for the layout of ids and sequence."""

    def __init__(self, config: MaskGITConfig) -> None:
        super().__init__()
        self.config = config
        width, seq_len = config.width, config.grid_size**2
        self.seq_len, self.mask_id, self.null_class = seq_len, config.vocab_size, config.num_classes
        ids = config.vocab_size + 1 + config.num_classes + 1
        self.tok_emb = nn.Embedding(ids, width)
        self.pos_emb = nn.Parameter(torch.empty(1, seq_len + 1, width))
        self.bias = nn.Parameter(torch.zeros(seq_len + 1, ids))
        self.first_layer = nn.Sequential(
            nn.LayerNorm(width, eps=1e-12), nn.Dropout(config.dropout), nn.Linear(width, width), nn.GELU(),
            nn.LayerNorm(width, eps=1e-12), nn.Dropout(config.dropout), nn.Linear(width, width),
        )  # fmt: skip
        self.transformer = _Encoder(config)
        self.last_layer = nn.Sequential(
            nn.LayerNorm(width, eps=1e-12), nn.Dropout(config.dropout), nn.Linear(width, width), nn.GELU(),
            nn.LayerNorm(width, eps=1e-12),
        )  # fmt: skip
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
            embed: looks the tokens' rows ``[B, L, width]`` up in the table, before positions; never the class's.
        """
        columns = self.config.vocab_size if columns is None else columns
        tokens = embed(tokens_BL, self.tok_emb.weight)
        label = self.tok_emb(class_B + self.config.vocab_size + 1)[:, None]
        x = torch.cat([tokens, label], 1) + self.pos_emb
        x = self.last_layer(self.transformer(self.first_layer(x)))[:, : self.seq_len]
        logits = F.linear(x, self.tok_emb.weight[:columns])
        return logits.add_(self.bias[: self.seq_len, :columns].to(logits.dtype))  # half ones stay so under autocast

    def _initialise(self) -> None:
        for parameter in (self.tok_emb.weight, self.pos_emb):
            nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
