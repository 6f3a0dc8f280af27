"""The VQGAN of taming-transformers, with its parameter names and shapes; LlamaGen's differs in names and look-up alone.

Sources: Esser et al., *Taming transformers for high-resolution image synthesis* (arXiv 2012.09841), github.com/CompVis/
taming-transformers; Sun et al., *Autoregressive model beats diffusion: Llama for scalable image generation* (arXiv
2406.06525), github.com/FoundationVision/LlamaGen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class VQGANConfig:
    """Sizes of a :class:`VQGAN`; every tuple has an entry a resolution, from the image's down to the codes'."""

    codebook_size: int
    embed_dim: int
    z_channels: int
    channels: tuple[int, ...]
    """Channels at each resolution."""
    attention: tuple[bool, ...]
    """Which resolutions attend."""
    blocks: int
    """Residual blocks a resolution in the decoder."""
    image_channels: int = 3
    normalize_codes: bool = False
    """Look codes up L2-normalised (LlamaGen)."""
    encoder_blocks: int = 0
    """Residual blocks a resolution in the encoder; 0 = no encoder."""

    def __post_init__(self) -> None:
        for name in ("channels", "attention"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has lists
        for name in ("codebook_size", "embed_dim", "z_channels", "blocks", "image_channels"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
        if not self.channels or any(not isinstance(c, int) or c < 32 or c % 32 for c in self.channels):
            raise ValueError(f"channels: expected multiples of 32, the groups of a norm, got {self.channels!r}")
        if len(self.attention) != len(self.channels):
            raise ValueError(f"attention: expected {len(self.channels)} entries, as channels, got {self.attention!r}")


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class _ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = _norm(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class _Attention(nn.Module):
    """One head over all positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (part(h).flatten(2).transpose(1, 2)[:, None] for part in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.proj_out(attended)


class _Resample(nn.Module):
    """Half or twice the resolution; halving pads the lower right edge alone."""

    def __init__(self, channels: int, *, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if up else nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0) if self.up else F.pad(x, (0, 1, 0, 1)))


class _Level(nn.Module):
    """The blocks of one resolution, then a change of resolution unless it is the last."""

    def __init__(self, inputs: int, channels: int, blocks: int, attention: bool, resample: str | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(_ResidualBlock(inputs if i == 0 else channels, channels) for i in range(blocks))
        self.attn = nn.ModuleList(_Attention(channels) for _ in range(blocks if attention else 0))
        if resample:
            setattr(self, resample, _Resample(channels, up=resample == "upsample"))
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            x = self.attn[i](x) if self.attn else x
        return getattr(self, self.resample)(x) if self.resample else x


class _Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1, self.attn_1 = _ResidualBlock(channels, channels), _Attention(channels)
        self.block_2 = _ResidualBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class _Decoder(nn.Module):
    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        channels = config.channels
        self.conv_in = nn.Conv2d(config.z_channels, channels[-1], 3, padding=1)
        self.mid = _Middle(channels[-1])
        self.up = nn.ModuleList(
            _Level(
                channels[min(i + 1, len(channels) - 1)],
                channels[i],
                config.blocks,
                config.attention[i],
                "upsample" if i else None,
            )
            for i in range(len(channels))
        )
        self.norm_out = _norm(channels[0])
        self.conv_out = nn.Conv2d(channels[0], config.image_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class _Encoder(nn.Module):
    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        channels, last = config.channels, len(config.channels) - 1
        # Its first convolution has the channels of the unmultiplied width, which are those of the first resolution in
        # every published model.
        self.conv_in = nn.Conv2d(config.image_channels, channels[0], 3, padding=1)
        self.down = nn.ModuleList(
            _Level(
                channels[max(i - 1, 0)],
                channels[i],
                config.encoder_blocks,
                config.attention[i],
                "downsample" if i < last else None,
            )
            for i in range(len(channels))
        )
        self.mid = _Middle(channels[-1])
        self.norm_out = _norm(channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], config.z_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class _Codebook(nn.Module):
    def __init__(self, size: int, width: int, normalize: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, width)
        self.normalize = normalize

    def _unit(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.normalize else vectors

    def forward(self, codes: Tensor) -> Tensor:
        return self._unit(self.embedding(codes))

    def nearest(self, vectors: Tensor) -> Tensor:
        """Ids of the nearest entries: [..., D] → [...]."""
        distances = torch.cdist(self._unit(vectors).flatten(0, -2), self._unit(self.embedding.weight))
        return distances.argmin(-1).view(vectors.shape[:-1])


class VQGAN(nn.Module):
    """Codes int64 ``[B, h, w]`` to images ``[B, C, H, W]``, about [-1, 1] and not clamped, and back."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        if config.encoder_blocks:
            self.encoder = _Encoder(config)
            self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.quantize = _Codebook(config.codebook_size, config.embed_dim, config.normalize_codes)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)
        self.decoder = _Decoder(config)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes ``[B, h, w]`` → images."""
        return self.decoder(self.post_quant_conv(self.quantize(codes).permute(0, 3, 1, 2)))

    def encode(self, images: Tensor) -> Tensor:
        """Images → codes ``[B, h, w]``; needs the encoder."""
        return self.quantize.nearest(self.quant_conv(self.encoder(images)).permute(0, 2, 3, 1))
