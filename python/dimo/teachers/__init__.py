"""Teachers by kind, and how to load one."""

from .base import Condition, Teacher
from .digits import DigitsTeacher
from .halton import HaltonTeacher
from .maskgit import MaskGITTeacher

TEACHERS: dict[str, type[Teacher]] = {cls.kind: cls for cls in (DigitsTeacher, MaskGITTeacher, HaltonTeacher)}

__all__ = ["TEACHERS", "Condition", "DigitsTeacher", "HaltonTeacher", "MaskGITTeacher", "Teacher"]
