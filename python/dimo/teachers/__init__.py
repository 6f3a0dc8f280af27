"""Teachers by kind, and how to load one."""

from .amused import AmusedTeacher
from .base import Condition, Teacher
from .digits import DigitsTeacher
from .maskgit import MaskGITTeacher
from .mdlm import MDLMTeacher
from .meissonic import MeissonicTeacher
from .text_to_image import TextToImageTeacher

TEACHERS: dict[str, type[Teacher]] = {
    cls.kind: cls for cls in (DigitsTeacher, MaskGITTeacher, MeissonicTeacher, AmusedTeacher, MDLMTeacher)
}

__all__ = [
    "TEACHERS",
    "AmusedTeacher",
    "Condition",
    "DigitsTeacher",
    "MDLMTeacher",
    "MaskGITTeacher",
    "MeissonicTeacher",
    "Teacher",
    "TextToImageTeacher",
]
