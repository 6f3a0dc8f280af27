"""The multi-modal transformer of Meissonic, with its parameter names and shapes.

Source: Bai et al., *Meissonic* (arXiv 2410.08261), github.com/viiika/Meissonic, `src/transformer.py`; its released
`transformer/config.json` calls the class Transformer2DModel, which is not the class of that name in diffusers. Blocks
as in Stable Diffusion 3 (double stream) and FLUX (single stream), rotary positions (0, row, column) for image tokens
and (0, 0, 0) for text, which stands first. The 1024 px layout halves the grid before the blocks and doubles it again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .embeddings import SINUSOID, sinusoid

_EPS = 1e-6
_COUNTS = (
    "num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads", "joint_attention_dim",
    "codebook_size",
)  # fmt: skip
MICRO_CONDITIONS = 5  # width, height, crop top, crop left, aesthetic score


@dataclass(frozen=True)
class MeissonicConfig:
    """Sizes under the names of the released config.json; inner width = heads × head width."""

    num_layers: int = 14
    num_single_layers: int = 28
    attention_head_dim: int = 128
    num_attention_heads: int = 8
    joint_attention_dim: int = 1024
    pooled_projection_dim: int = 1024
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)
    vocab_size: int = 8256
    codebook_size: int = 8192
    downsample: bool = True
    upsample: bool = True
    in_channels: int = 64
    """Stored in the released files, read by nothing."""
    patch_size: int = 1
    guidance_embeds: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes_dims_rope", tuple(self.axes_dims_rope))  # JSON gives a list
        for name in _COUNTS:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
        self._expect("pooled_projection_dim", self.width, "heads * head width")
        self._expect("patch_size", 1)
        self._expect("guidance_embeds", False)
        self._expect("upsample", self.downsample, "downsample")
        if sum(self.axes_dims_rope) != self.attention_head_dim or any(n % 2 for n in self.axes_dims_rope):
            wanted = f"even numbers that sum to attention_head_dim ({self.attention_head_dim})"
            raise ValueError(f"axes_dims_rope: expected {wanted}, got {self.axes_dims_rope}")
        if self.vocab_size <= self.codebook_size:
            wanted = f"more than codebook_size ({self.codebook_size})"
            raise ValueError(f"vocab_size: expected {wanted}, got {self.vocab_size}")

    def _expect(self, name: str, value: object, reason: str = "") -> None:
        if getattr(self, name) != value:
            expected = f"{reason} ({value})" if reason else repr(value)
            raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim


def rotary_table(text_len: int, height: int, width: int, axes: tuple[int, ...], device: torch.device) -> Tensor:
    """Return angles float32 ``[text_len + height·width, sum(axes) / 2]``, computed in float64 as the original does."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1)
    ids = torch.cat([torch.zeros(text_len, 3, dtype=torch.int64), image]).double()
    angles = [ids[:, i, None] / 10_000 ** (torch.arange(0, n, 2).double() / n) for i, n in enumerate(axes)]
    return torch.cat(angles, -1).to(device)


def _rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate neighbouring pairs of channels of ``[B, heads, S, D]``."""
    cos, sin = table
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2).to(x.dtype)


class _RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), _EPS)  # fused for one dtype alone


class _Mlp(nn.Module):
    """Two linear layers with SiLU between, under diffusers' names."""

    def __init__(self, width_in: int, width: int, *, bias: bool = True) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width_in, width, bias)
        self.linear_2 = nn.Linear(width, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class _TimeTextEmbed(nn.Module):
    def __init__(self, width: int, pooled: int) -> None:
        super().__init__()
        self.timestep_embedder = _Mlp(SINUSOID, width)
        self.text_embedder = _Mlp(pooled, width)

    def forward(self, timestep: Tensor, pooled: Tensor) -> Tensor:
        return self.timestep_embedder(sinusoid(timestep).to(pooled.dtype)) + self.text_embedder(pooled)


class _Modulation(nn.Module):
    """Adaptive layer norm: ``chunks`` vectors from the embedding, the first two shift and scale the normed input."""

    def __init__(self, width: int, chunks: int) -> None:
        super().__init__()
        self.chunks = chunks
        self.linear = nn.Linear(width, chunks * width)

    def forward(self, x: Tensor, embedding: Tensor) -> tuple[Tensor, ...]:
        shift, scale, *rest = self.linear(F.silu(embedding))[:, None].chunk(self.chunks, -1)
        return _modulated(x, shift, scale), *rest


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=_EPS) * (1 + scale) + shift


class _GELU(nn.Module):
    def __init__(self, width: int, width_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class _FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(_GELU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class _Attention(nn.Module):
    """Self-attention with RMS-normed queries and keys; ``joint`` adds the text stream's own projections."""

    def __init__(self, config: MeissonicConfig, *, joint: bool) -> None:
        super().__init__()
        width, head = config.width, config.attention_head_dim
        self.heads = config.num_attention_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.norm_q, self.norm_k = _RMSNorm(head), _RMSNorm(head)
        if joint:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(width, width) for _ in range(3))
            self.norm_added_q, self.norm_added_k = _RMSNorm(head), _RMSNorm(head)
            self.to_out = nn.ModuleList([nn.Linear(width, width)])
            self.to_add_out = nn.Linear(width, width)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor], text: Tensor | None = None) -> Tensor:
        """Return ``[B, S, width]`` before the output projection; with ``text`` it stands first."""
        q, k, v = self._split(self.to_q(x)), self._split(self.to_k(x)), self._split(self.to_v(x))
        q, k = self.norm_q(q), self.norm_k(k)
        if text is not None:
            q = torch.cat([self.norm_added_q(self._split(self.add_q_proj(text))), q], 2)
            k = torch.cat([self.norm_added_k(self._split(self.add_k_proj(text))), k], 2)
            v = torch.cat([self._split(self.add_v_proj(text)), v], 2)
        q, k = _rotate(q, table).to(v.dtype), _rotate(k, table).to(v.dtype)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class _DoubleBlock(nn.Module):
    def __init__(self, config: MeissonicConfig) -> None:
        super().__init__()
        self.norm1, self.norm1_context = _Modulation(config.width, 6), _Modulation(config.width, 6)
        self.attn = _Attention(config, joint=True)
        self.ff, self.ff_context = _FeedForward(config.width), _FeedForward(config.width)

    def forward(
        self, image: Tensor, text: Tensor, embedding: Tensor, table: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        normed, gate, *mlp = self.norm1(image, embedding)
        normed_text, gate_text, *mlp_text = self.norm1_context(text, embedding)
        attended = self.attn(normed, table, normed_text)
        image = image + gate * self.attn.to_out[0](attended[:, text.shape[1] :])
        text = text + gate_text * self.attn.to_add_out(attended[:, : text.shape[1]])
        return self._feed_forward(self.ff, image, *mlp), self._feed_forward(self.ff_context, text, *mlp_text)

    @staticmethod
    def _feed_forward(layer: nn.Module, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        return x + gate * layer(_modulated(x, shift, scale))


class _SingleBlock(nn.Module):
    def __init__(self, config: MeissonicConfig) -> None:
        super().__init__()
        width = config.width
        self.norm = _Modulation(width, 3)
        self.proj_mlp = nn.Linear(width, 4 * width)
        self.proj_out = nn.Linear(5 * width, width)
        self.attn = _Attention(config, joint=False)

    def forward(self, x: Tensor, embedding: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        normed, gate = self.norm(x, embedding)
        mlp = F.gelu(self.proj_mlp(normed), approximate="tanh")
        return x + gate * self.proj_out(torch.cat([self.attn(normed, table), mlp], -1))


def _pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1×1 convolution on channels-last ``[B, H, W, C]`` is a matrix product."""
    return F.linear(x, conv.weight.flatten(1))


class _Embed(nn.Module):
    def __init__(self, config: MeissonicConfig) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.width)
        self.layer_norm = _RMSNorm(config.width)
        self.conv = nn.Conv2d(config.width, config.width, 1, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return _pointwise(self.conv, self.layer_norm(self.embeddings(tokens)))


class _Head(nn.Module):
    def __init__(self, config: MeissonicConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(config.width, config.width, 1, bias=False)
        self.layer_norm = _RMSNorm(config.width)
        self.conv2 = nn.Conv2d(config.width, config.codebook_size, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return _pointwise(self.conv2, self.layer_norm(_pointwise(self.conv1, x)))


class _Resample(nn.Module):
    """RMS norm, then a 2×2 convolution of stride 2, down or (transposed) up, on channels-last ``[B, H, W, C]``."""

    def __init__(self, width: int, conv: type[nn.Conv2d] | type[nn.ConvTranspose2d]) -> None:
        super().__init__()
        self.norm = _RMSNorm(width)
        self.conv = conv(width, width, 2, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class MeissonicTransformer(nn.Module):
    """Tokens, text states, pooled text, micro-conditions and a timestep to logits."""

    def __init__(self, config: MeissonicConfig) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.mask_id = config.vocab_size - 1
        self.recompute = False  # the blocks' activations in the backward pass
        self.time_text_embed = _TimeTextEmbed(width, config.pooled_projection_dim)
        self.context_embedder = nn.Linear(config.joint_attention_dim, width)
        self.transformer_blocks = nn.ModuleList(_DoubleBlock(config) for _ in range(config.num_layers))
        self.single_transformer_blocks = nn.ModuleList(_SingleBlock(config) for _ in range(config.num_single_layers))
        self.embed, self.mlm_layer = _Embed(config), _Head(config)
        self.cond_embed = _Mlp(config.pooled_projection_dim + MICRO_CONDITIONS * SINUSOID, width, bias=False)
        self.encoder_proj_layer_norm = _RMSNorm(width)
        self.project_to_hidden_norm, self.project_from_hidden_norm = _RMSNorm(width), _RMSNorm(width)
        self.project_to_hidden = nn.Linear(width, width, bias=False)
        self.project_from_hidden = nn.Linear(width, width, bias=False)
        self.down_block, self.up_block = nn.ModuleDict(), nn.ModuleDict()
        if config.downsample:
            self.down_block["downsample"] = _Resample(width, nn.Conv2d)
            self.up_block["upsample"] = _Resample(width, nn.ConvTranspose2d)

    def forward(
        self,
        tokens_BHW: Tensor,
        text_states: Tensor,
        pooled: Tensor,
        micro_conditions: Tensor,
        timestep: Tensor,
        *,
        perturb: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Return logits ``[B, codebook_size, H, W]``: a view of memory in which the codebook lies together.

        Args:
            tokens_BHW: int64 ``[B, H, W]`` in [0, codebook_size) or ``mask_id`` = vocab_size - 1; H and W are even in
                the 1024 px layout.
            text_states: ``[B, S, joint_attention_dim]``.
            pooled: ``[B, pooled_projection_dim]``.
            micro_conditions: ``[B, 5]``, width, height, crop top, crop left, aesthetic score.
            timestep: ``[B]`` or ``[1]``, multiplied by 1000 inside, as in the original.
            perturb: applied to the token embeddings ``[B, H·W, width]`` before anything mixes positions.
        """
        batch, grid = tokens_BHW.shape[0], tokens_BHW.shape[1:]
        micro = sinusoid(micro_conditions.flatten()).reshape(batch, -1)
        condition = self.cond_embed(torch.cat([pooled, micro.to(pooled.dtype)], -1))
        embedding = self.time_text_embed(timestep.float() * 1000, condition)
        x = self.embed(tokens_BHW)
        x = x if perturb is None else perturb(x.flatten(1, 2)).unflatten(1, grid)
        x = self._down(x)
        text = self.encoder_proj_layer_norm(self.context_embedder(text_states))
        x = self._blocks(self.project_to_hidden(self.project_to_hidden_norm(x)), text, embedding)
        x = self._up(self.project_from_hidden(self.project_from_hidden_norm(x)))
        return self.mlm_layer(x).permute(0, 3, 1, 2)

    def _blocks(self, x: Tensor, text: Tensor, embedding: Tensor) -> Tensor:
        """Run every block on ``[B, h, w, width]``."""
        (height, width), count = x.shape[1:3], text.shape[1]
        angles = rotary_table(count, height, width, self.config.axes_dims_rope, x.device)
        table, x = (angles.cos().float(), angles.sin().float()), x.flatten(1, 2)
        for block in self.transformer_blocks:
            x, text = self._run(block, x, text, embedding, table)
        x = torch.cat([text, x], 1)
        for block in self.single_transformer_blocks:
            x = self._run(block, x, embedding, table)
        return x[:, count:].unflatten(1, (height, width))

    def _run(self, block: nn.Module, *inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)  # a block draws nothing
        return block(*inputs)

    def _down(self, x: Tensor) -> Tensor:
        return self.down_block["downsample"](x) if self.config.downsample else x

    def _up(self, x: Tensor) -> Tensor:
        return self.up_block["upsample"](x) if self.config.upsample else x
