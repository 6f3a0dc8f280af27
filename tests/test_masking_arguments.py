"""What mask_tokens and init_tokens refuse."""

from __future__ import annotations

from math import nan

import pytest
import torch

import dimo_ext as dx
from tests.conftest import BAD_KEYS, META, assert_rejected

TOKENS = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("name", "value", "expected", "given_"),
    [
        ("tokens", [[0]], "int64 tensor [B, L]", "list"),
        ("tokens", TOKENS.int(), "dtype int64", "torch.int32"),
        ("tokens", TOKENS[None], "shape [B, L] or [L]", "[1, 2, 3]"),
        ("tokens", TOKENS[0, 0], "shape [B, L] or [L]", "[]"),
        ("tokens", torch.zeros(1, 65537, dtype=torch.int64), "at most 65536", "65537"),
        ("mask_ratio", 1.5, "[0, 1]", "1.5"),
        ("mask_ratio", -0.1, "[0, 1]", "-0.1"),
        ("mask_ratio", nan, "finite number", "nan"),
        ("mask_ratio", "0.5", "finite number", "str '0.5'"),
        ("mask_ratio", torch.tensor(0.5), "shape [2]", "[]"),
        ("mask_ratio", torch.ones(3), "shape [2]", "[3]"),
        ("mask_ratio", torch.ones(2, dtype=torch.int64), "dtype float32", "torch.int64"),
        ("mask_ratio", torch.ones(2, device=META), "a tensor on", "meta"),
        ("mask_id", 1.0, "an integer", "float 1.0"),
        ("mask_id", 2**63, "an integer in", str(2**63)),
        ("mask_id", True, "an integer", "bool True"),
        ("schedule", "sine", "one of linear, square, cosine, arccos, mage", "'sine'"),
        ("schedule", None, "one of linear", "None"),
        ("mode", "random", "one of exact, bernoulli", "'random'"),
        ("mode", None, "one of exact, bernoulli", "None"),
        ("min_masked", -1, "an integer in [0, ", "-1"),
        ("min_masked", 0.5, "an integer", "float 0.5"),
        ("min_masked", 2**63, "an integer", str(2**63)),
        ("generator", 3, "a torch.Generator or None", "int 3"),
        *(("key", *bad) for bad in BAD_KEYS),
    ],
)
def test_bad_arguments_are_rejected(device, name, value, expected, given_):
    """The error names the argument, what was expected and what was given."""
    arguments = {"tokens": TOKENS.to(device), "mask_ratio": 0.5, "mask_id": 9, name: value}
    assert_rejected(lambda: dx.mask_tokens(**arguments), name, expected, given_)


@pytest.mark.parametrize(
    ("name", "value", "expected", "given_"),
    [
        ("batch_size", -1, ">= 0", "-1"),
        ("batch_size", 2.0, "an integer", "float 2.0"),
        ("seq_len", -1, "[0, 65536]", "-1"),
        ("seq_len", 65537, "[0, 65536]", "65537"),
        ("vocab_size", 0, "[1, 16777216]", "0"),
        ("vocab_size", 2**24 + 1, "[1, 16777216]", "16777217"),
        ("mask_id", 1.5, "an integer", "float 1.5"),
        ("mask_id", -(2**63) - 1, "an integer in", str(-(2**63) - 1)),
        ("r_init", 1.01, "[0, 1]", "1.01"),
        ("r_init", nan, "finite number", "nan"),
        ("r_init", torch.tensor(0.5), "finite number", "Tensor"),
        ("device", "gpu", "a torch device or its name", "'gpu'"),
        ("generator", 3, "a torch.Generator or None", "int 3"),
        *(("key", *bad) for bad in BAD_KEYS),
    ],
)
def test_bad_init_arguments_are_rejected(device, name, value, expected, given_):
    """The error names the argument, what was expected and what was given."""
    arguments = {"batch_size": 2, "seq_len": 3, "vocab_size": 5, "mask_id": 5, "r_init": 0.5, "device": device}
    arguments[name] = value
    assert_rejected(lambda: dx.init_tokens(**arguments), name, expected, given_)


def test_key_and_generator_together_are_rejected(device):
    """Two sources of randomness are one too many."""
    both = {"key": dx.random_key(0, device=device), "generator": torch.Generator(device)}
    calls = [
        lambda: dx.mask_tokens(TOKENS.to(device), 0.5, 9, **both),
        lambda: dx.init_tokens(2, 3, vocab_size=5, mask_id=5, r_init=0.5, **both),
    ]
    for call in calls:
        assert_rejected(call, "generator", "None when a key is given", "both")
