"""Images as PNG files and grids, through Pillow; files are replaced atomically."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from .files import atomic_path

if TYPE_CHECKING:
    from PIL.Image import Image

_GAP = 2  # pixels between the pictures of a grid
_SMALLEST = 48  # pixels a side; smaller pictures are enlarged by a whole factor
_BACKGROUND, _INK = (13, 17, 23), (145, 152, 161)


def to_pil(images: Tensor) -> list[Image]:
    """Return images float ``[B, C, H, W]`` in [0, 1], C = 1 (grey) or 3, as Pillow images of 8 bits.

    Raises:
        ValueError: another shape.
    """
    from PIL import Image

    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images: expected shape [B, 1 or 3, H, W], got {list(images.shape)}")
    pixels = (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array) for array in pixels]


def grid(rows: Sequence[Sequence[Image]], labels: Sequence[str] | None = None) -> Image:
    """Return pictures of equal size as one, a label before each row.

    Raises:
        ValueError: no pictures, rows of different lengths, another number of labels.
    """
    from PIL import Image, ImageDraw

    if not rows or not rows[0] or len({len(row) for row in rows}) > 1:
        raise ValueError(f"rows: expected one or more of equal length, got {[len(row) for row in rows]}")
    if labels is not None and len(labels) != len(rows):
        raise ValueError(f"labels: expected {len(rows)}, one a row, got {len(labels)}")
    scale = max(1, -(-_SMALLEST // min(rows[0][0].size)))
    width, height = (scale * side for side in rows[0][0].size)
    font = _font(height)
    left = max(round(font.getlength(label)) for label in labels) + 4 * _GAP if labels else 0
    size = (left + len(rows[0]) * (width + _GAP) - _GAP, len(rows) * (height + _GAP) - _GAP)
    canvas = Image.new("RGB", size, _BACKGROUND)
    for y, row in enumerate(rows):
        if labels:
            position = (left - 2 * _GAP, y * (height + _GAP) + height // 2)
            ImageDraw.Draw(canvas).text(position, labels[y], _INK, font, anchor="rm")
        for x, picture in enumerate(row):
            enlarged = picture.resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (left + x * (width + _GAP), y * (height + _GAP)))
    return canvas


def save_png(image: Image, path: str | os.PathLike[str], text: dict[str, str] | None = None) -> None:
    """Write one picture; ``text`` goes into its tEXt chunks, which `identify -verbose` and Pillow's ``text`` show."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def _font(height: int):
    from PIL import ImageFont

    return ImageFont.load_default(min(24, max(12, height // 4)))
