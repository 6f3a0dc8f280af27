"""Distil masked diffusion models into one-step generators: teachers, trainer, samplers, evaluation, command line."""

from .checkpoint import load_teacher
from .generator import OneStepGenerator, labels_per_class, sample_keys
from .samplers import sample_ancestral, sample_confident, sample_few_steps, sample_halton, sample_one_step
from .teachers import TEACHERS, Teacher

__all__ = [
    "TEACHERS",
    "OneStepGenerator",
    "Teacher",
    "labels_per_class",
    "load_teacher",
    "sample_ancestral",
    "sample_confident",
    "sample_few_steps",
    "sample_halton",
    "sample_keys",
    "sample_one_step",
]
