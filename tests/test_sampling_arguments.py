"""What sample_categorical refuses."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch

import dimo_ext as dx
from tests.conftest import BAD_KEYS, META, assert_rejected

LOGITS = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("name", "value", "expected", "given_"),
    [
        ("logits", LOGITS.long(), "dtype float32, float16, bfloat16 or float64", "torch.int64"),
        ("logits", [0.0], "tensor", "list"),
        ("logits", torch.zeros(2, 0), "V >= 1", "[2, 0]"),
        ("logits", torch.tensor(1.0), "shape [..., V]", "[]"),
        ("temperature", -0.1, "[0, inf]", "-0.1"),
        ("temperature", nan, "finite number", "nan"),
        ("temperature", inf, "finite number", "inf"),
        ("temperature", "1", "finite number", "str '1'"),
        ("top_k", -1, "[0, 4]", "-1"),
        ("top_k", 5, "[0, 4]", "5"),
        ("top_k", 2.0, "an integer", "float 2.0"),
        ("top_k", True, "an integer", "bool True"),
        ("top_p", 0.0, "(0, 1]", "0.0"),
        ("top_p", 1.1, "(0, 1]", "1.1"),
        ("top_p", nan, "finite number", "nan"),
        ("min_p", -0.1, "[0, 1]", "-0.1"),
        ("min_p", 1.1, "[0, 1]", "1.1"),
        ("guidance_scale", 2.0, "1 without ", "2.0"),
        ("guidance_scale", torch.ones(2), "1 without ", "tensor"),
        ("uncond_logits", LOGITS[:1], "shape [2, 3, 4]", "[1, 3, 4]"),
        ("uncond_logits", LOGITS.to(META), "a tensor on", "meta"),
        ("uncond_logits", LOGITS.int(), "dtype", "torch.int32"),
        ("generator", 3, "a torch.Generator or None", "int 3"),
        *(("key", *bad) for bad in BAD_KEYS),
    ],
)
def test_bad_arguments_are_rejected(device, name, value, expected, given_):
    """The error names the argument, what was expected and what was given."""
    arguments = {"logits": LOGITS.to(device), name: value}
    assert_rejected(lambda: dx.sample_categorical(**arguments), name, expected, given_)


@pytest.mark.parametrize(
    ("scale", "expected", "given_"),
    [(nan, "finite number", "nan"), (torch.ones(3), "shape [2]", "[3]"), (torch.ones(2, device=META), "on", "meta")],
)
def test_bad_guidance_scale_is_rejected(device, scale, expected, given_):
    """With unconditional logits the scale is a finite number or one a sample."""
    logits = LOGITS.to(device)

    def call():
        return dx.sample_categorical(logits, uncond_logits=logits, guidance_scale=scale)

    assert_rejected(call, "guidance_scale", expected, given_)


def test_key_and_generator_together_are_rejected(device):
    """Two sources of randomness are one too many."""

    def call():
        return dx.sample_categorical(
            LOGITS.to(device), key=dx.random_key(0, device=device), generator=torch.Generator(device)
        )

    assert_rejected(call, "generator", "None when a key is given", "both")
