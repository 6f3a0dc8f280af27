"""Teachers by kind, and how to load one."""

from .amused import AmusedTeacher
from .base import Condition, Teacher
from .digits import DigitsTeacher
from .halton import HaltonTeacher
from .maskgit import MaskGITTeacher
from .mdlm import MDLMTeacher
from .meissonic import MeissonicTeacher
from .text_to_image import TextToImageTeacher

_CLASSES = (DigitsTeacher, MaskGITTeacher, HaltonTeacher, MeissonicTeacher, AmusedTeacher, MDLMTeacher)
TEACHERS: dict[str, type[Teacher]] = {cls.kind: cls for cls in _CLASSES}

__all__ = [
    "TEACHERS",
    "AmusedTeacher",
    "Condition",
    "DigitsTeacher",
    "HaltonTeacher",
    "MDLMTeacher",
    "MaskGITTeacher",
    "MeissonicTeacher",
    "Teacher",
    "TextToImageTeacher",
]
