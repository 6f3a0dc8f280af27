"""Divergences' names, and what token_divergence and distribution_matching_loss refuse."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch

import dimo_ext as dx
from tests.calls import pair
from tests.conftest import META, assert_rejected
from tests.oracles import DIVERGENCES


@pytest.mark.parametrize("divergence", [*DIVERGENCES, dx.Jeffreys(1 / 3), dx.Alpha(-1 / 300)], ids=str)
def test_string_form_round_trips(divergence):
    """str() and parse_divergence are inverse, to the last bit of a parameter."""
    assert dx.parse_divergence(str(divergence)) == divergence
    assert dx.parse_divergence(divergence) is divergence


@pytest.mark.parametrize(
    ("text", "divergence"),
    [("jensen_shannon", dx.JensenShannon(0.5)), ("alpha:2", dx.Alpha(2.0)), ("jeffreys:-2e-1", dx.Jeffreys(-0.2))],
)
def test_parsing(text, divergence):
    """Defaults may be left out; any spelling of a number will do."""
    assert dx.parse_divergence(text) == divergence


@pytest.mark.parametrize(
    ("text", "name", "expected", "given_"),
    [
        ("Jeffreys_-0.2", "divergence", "one of forward_kl, reverse_kl, jeffreys", "'Jeffreys_-0.2'"),
        ("", "divergence", "one of", "''"),
        ("jeffreys", "divergence", "the form 'jeffreys:beta'", "'jeffreys'"),
        ("forward_kl:1", "divergence", "the form 'forward_kl'", "'forward_kl:1'"),
        ("alpha:2:3", "divergence", "the form 'alpha:alpha'", "'alpha:2:3'"),
        ("alpha:x", "divergence", "a number after 'alpha'", "'alpha:x'"),
        ("jeffreys:nan", "beta", "a finite number", "nan"),
        ("jensen_shannon:1", "pi", "a number in (0, 1)", "1.0"),
        ("jensen_shannon:0", "pi", "a number in (0, 1)", "0.0"),
        ("alpha:0", "alpha", "other than 0 and 1", "0.0: use ReverseKL()"),
        ("alpha:1", "alpha", "other than 0 and 1", "1.0: use ForwardKL()"),
        ("alpha:inf", "alpha", "a finite number", "inf"),
        (dx.ForwardKL, "divergence", "a Divergence or its string", "type"),
        (None, "divergence", "a Divergence or its string", "NoneType"),
    ],
)
def test_bad_names_are_rejected(text, name, expected, given_):
    """An unknown name lists the valid ones; a bad parameter is named."""
    assert_rejected(lambda: dx.parse_divergence(text), name, expected, given_)


LOGITS = torch.zeros(2, 3, 4)
BAD_ARGUMENTS = [
    ("teacher_logits", [0.0], "tensor", "list"),
    ("teacher_logits", LOGITS.long(), "dtype float32, float16, bfloat16 or float64", "torch.int64"),
    ("teacher_logits", torch.zeros(2, 3, 0), "V >= 1", "[2, 3, 0]"),
    ("auxiliary_logits", LOGITS[..., :3], "shape [2, 3, 4]", "[2, 3, 3]"),
    ("auxiliary_logits", LOGITS.to(torch.complex64), "dtype", "torch.complex64"),
    ("auxiliary_logits", LOGITS.to(META), "a tensor on", "meta"),
    ("teacher_uncond_logits", LOGITS[:1], "shape [2, 3, 4]", "[1, 3, 4]"),
    ("teacher_uncond_logits", LOGITS.to(META), "a tensor on", "meta"),
    ("guidance_scale", 2.0, "1 without ", "2.0"),
    ("guidance_scale", nan, "1 without ", "nan"),
    ("teacher_temperature", 0.0, "finite number in (0, inf]", "0.0"),
    ("teacher_temperature", inf, "finite number", "inf"),
    ("auxiliary_temperature", -1, "finite number in (0, inf]", "-1"),
    ("auxiliary_temperature", nan, "finite number", "nan"),
    ("auxiliary_temperature", "1", "finite number", "str '1'"),
    ("auxiliary_temperature", True, "finite number", "bool True"),
    ("divergence", "kl", "one of forward_kl", "'kl'"),
    ("mask", torch.ones(2, 3), "dtype bool", "torch.float32"),
    ("mask", torch.ones(3, 2, dtype=torch.bool), "shape [2, 3]", "[3, 2]"),
    ("mask", torch.ones(2, 3, dtype=torch.bool, device=META), "a tensor on", "meta"),
    ("mask", [True], "bool tensor", "list"),
]


@pytest.mark.parametrize("operator", ["token_divergence", "distribution_matching_loss", "divergence_gradient_"])
@pytest.mark.parametrize(("name", "value", "expected", "given_"), BAD_ARGUMENTS)
def test_bad_arguments_are_rejected(device, operator, name, value, expected, given_):
    """The error names the argument, what was expected and what was given, before anything runs."""
    arguments = {
        "teacher_logits": LOGITS.to(device),
        "auxiliary_logits": (LOGITS + 1).to(device),
        "divergence": "le_cam",
    }
    if operator == "distribution_matching_loss":
        arguments["student_logits"] = LOGITS.to(device)
    arguments[name] = value
    assert_rejected(lambda: getattr(dx, operator)(**arguments), name, expected, given_)


@pytest.mark.parametrize(
    ("scale", "expected", "given_"),
    [
        (nan, "finite number", "nan"),
        ("2", "finite number", "str '2'"),
        (torch.ones(3), "shape [2]", "[3]"),
        (torch.ones(2, dtype=torch.int64), "dtype float32", "torch.int64"),
        (torch.ones(2, device=META), "a tensor on", "meta"),
    ],
)
def test_bad_guidance_scale_is_rejected(device, scale, expected, given_):
    """With unconditional logits the scale is a finite number or one a sample."""
    logits = LOGITS.to(device)

    def call():
        return dx.token_divergence(logits, logits, "le_cam", teacher_uncond_logits=logits, guidance_scale=scale)

    assert_rejected(call, "guidance_scale", expected, given_)


@pytest.mark.parametrize(
    ("name", "value", "expected", "given_"),
    [
        ("student_logits", LOGITS.int(), "dtype", "torch.int32"),
        ("student_logits", 1.0, "tensor", "float"),
        ("reduction", "average", "one of none, sum, mean, batchmean", "'average'"),
        ("reduction", None, "one of", "None"),
        ("weight", 2.0, "a tensor of shape [2] or [2, 3]", "2.0"),
        ("weight", torch.ones(3), "a tensor of shape [2] or [2, 3]", "[3]"),
        ("weight", torch.ones(2, 1), "a tensor of shape [2] or [2, 3]", "[2, 1]"),
        ("weight", torch.ones(2, dtype=torch.int64), "dtype float32", "torch.int64"),
        ("weight", torch.ones(2, device=META), "a tensor on", "meta"),
    ],
)
def test_bad_loss_arguments_are_rejected(device, name, value, expected, given_):
    """What only the loss takes is checked as well."""
    arguments = {"student_logits": LOGITS.to(device), "teacher_logits": LOGITS.to(device)}
    arguments |= {"auxiliary_logits": LOGITS.to(device), name: value}
    assert_rejected(lambda: dx.distribution_matching_loss(divergence="le_cam", **arguments), name, expected, given_)


def test_batchmean_needs_a_batch_and_a_sequence(device):
    """On [N, V] logits "batchmean" would divide by tokens, silently: it is refused."""
    logits = torch.zeros(6, 4, device=device)

    def call():
        return dx.distribution_matching_loss(logits, logits, logits, "le_cam")

    assert_rejected(call, "reduction", "another than 'batchmean'", "'batchmean'")
    assert dx.distribution_matching_loss(logits, logits, logits, "le_cam", reduction="mean") == 0


@pytest.mark.parametrize("floor", [0.0, 1.0, -inf, float("nan"), "low"])
def test_bad_teacher_log_floor(device, floor):
    teacher, auxiliary = pair(device)
    with pytest.raises((ValueError, TypeError), match="teacher_log_floor"):
        dx.token_divergence(teacher, auxiliary, "reverse_kl", teacher_log_floor=floor)
