"""What reveal_ancestral and reveal_confident refuse."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch

import dimo_ext as dx
from tests.conftest import BAD_KEYS, META, assert_rejected

LOGITS, TOKENS = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)

BOTH = [
    ("logits", LOGITS.long(), "dtype float32, float16, bfloat16 or float64", "torch.int64"),
    ("logits", [0.0], "tensor", "list"),
    ("logits", torch.zeros(2, 4), "at least 3 dimensions", "[2, 4]"),
    ("logits", torch.zeros(2, 3, 0), "V >= 1", "[2, 3, 0]"),
    ("tokens", [[0]], "a int64 tensor", "list"),
    ("tokens", TOKENS.int(), "dtype int64", "torch.int32"),
    ("tokens", TOKENS[:1], "shape [2, 3]", "[1, 3]"),
    ("tokens", TOKENS.to(META), "a tensor on", "meta"),
    ("mask_id", 1.0, "an integer", "float 1.0"),
    ("mask_id", 2**63, "an integer in", str(2**63)),
    ("temperature", -0.1, "[0, inf]", "-0.1"),
    ("temperature", nan, "finite number", "nan"),
    ("top_k", 5, "[0, 4]", "5"),
    ("top_p", 0.0, "(0, 1]", "0.0"),
    ("min_p", 1.1, "[0, 1]", "1.1"),
    ("guidance_scale", 2.0, "1 without ", "2.0"),
    ("uncond_logits", LOGITS[:1], "shape [2, 3, 4]", "[1, 3, 4]"),
    ("generator", 3, "a torch.Generator or None", "int 3"),
    *(("key", *bad) for bad in BAD_KEYS),
]
ANCESTRAL = [
    ("probability", -0.1, "[0, 1]", "-0.1"),
    ("probability", 1.5, "[0, 1]", "1.5"),
    ("probability", nan, "finite number", "nan"),
    ("probability", torch.ones(3), "shape [2]", "[3]"),
    ("probability", torch.ones(2, dtype=torch.int64), "dtype float32", "torch.int64"),
    ("probability", torch.ones(2, device=META), "a tensor on", "meta"),
]
CONFIDENT = [
    ("count", -1, "an integer in [0, ", "-1"),
    ("count", 1.0, "an integer", "float 1.0"),
    ("count", True, "an integer", "bool True"),
    ("count", torch.ones(2), "dtype int64", "torch.float32"),
    ("count", torch.ones(3, dtype=torch.int64), "shape [2]", "[3]"),
    ("noise_scale", -1.0, "[0, inf]", "-1.0"),
    ("noise_scale", inf, "finite number", "inf"),
    ("temperature", 0.0, "a number > 0", "0.0"),
]


@pytest.mark.parametrize(("name", "value", "expected", "given_"), BOTH + ANCESTRAL)
def test_ancestral(device, name, value, expected, given_):
    arguments = {"logits": LOGITS.to(device), "tokens": TOKENS.to(device), "probability": 0.5, "mask_id": 9}
    assert_rejected(lambda: dx.reveal_ancestral(**arguments | {name: value}), name, expected, given_)


@pytest.mark.parametrize(("name", "value", "expected", "given_"), BOTH + CONFIDENT)
def test_confident(device, name, value, expected, given_):
    arguments = {"logits": LOGITS.to(device), "tokens": TOKENS.to(device), "count": 1, "mask_id": 9}
    assert_rejected(lambda: dx.reveal_confident(**arguments | {name: value}), name, expected, given_)


@pytest.mark.parametrize("reveal", [dx.reveal_ancestral, dx.reveal_confident])
def test_too_many_positions(reveal):
    tokens = torch.zeros(1, 65537, dtype=torch.int64)
    assert_rejected(lambda: reveal(torch.zeros(1, 65537, 1), tokens, 1, 9), "tokens", "at most 65536", "65537")
