"""The embedded teacher: a small MaskGIT on the UCI digits, one token a pixel, weights shipped with the package."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ..data import digits
from ..networks.maskgit import MaskGITConfig, MaskTransformer
from .maskgit import MaskGITTeacher

_FIXED = {"grid_size": digits.GRID_SIZE, "vocab_size": digits.VOCAB_SIZE, "num_classes": digits.NUM_CLASSES}


class DigitsTeacher(MaskGITTeacher):
    """8×8 digits of 17 grey levels: L = 64, V = 17, 10 classes."""

    kind: ClassVar[str] = "digits"
    published: ClassVar[bool] = False

    @classmethod
    def build(cls, network_config: dict[str, Any]) -> DigitsTeacher:
        """Return a freshly initialised model; the sizes that the data fixes are filled in."""
        return cls(MaskTransformer(MaskGITConfig(**{**network_config, **_FIXED})))

    def decode(self, tokens_BL: Tensor) -> Tensor:
        """Return images float ``[B, 1, 8, 8]`` in [0, 1]."""
        return digits.decode(tokens_BL)
