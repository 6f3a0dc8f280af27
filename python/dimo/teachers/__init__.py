"""Teachers by kind, and how to load one."""

from .base import Condition, Teacher
from .digits import DigitsTeacher
from .maskgit import MaskGITTeacher

TEACHERS: dict[str, type[Teacher]] = {cls.kind: cls for cls in (DigitsTeacher, MaskGITTeacher)}

__all__ = ["TEACHERS", "Condition", "DigitsTeacher", "MaskGITTeacher", "Teacher"]
