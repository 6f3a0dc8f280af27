"""Distil masked diffusion models into one-step generators: teachers, trainer, samplers, evaluation, command line."""

from .checkpoint import load_teacher
from .generator import OneStepGenerator, labels_per_class, sample_keys
from .published_samplers import sample_amused, sample_mdlm
from .samplers import sample_ancestral, sample_confident, sample_few_steps, sample_halton, sample_one_step
from .teachers import TEACHERS, Teacher
from .texts import sequence_entropy

__all__ = [
    "TEACHERS",
    "OneStepGenerator",
    "Teacher",
    "labels_per_class",
    "load_teacher",
    "sample_amused",
    "sample_ancestral",
    "sample_confident",
    "sample_few_steps",
    "sample_halton",
    "sample_keys",
    "sample_mdlm",
    "sample_one_step",
    "sequence_entropy",
]
