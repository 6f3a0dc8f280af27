"""Philox4x32-10, compiled and in plain PyTorch: Random123's known answers, and a third implementation in numpy."""

from __future__ import annotations

import importlib
import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dimo_ext as dx
from dimo_ext.philox import Tag, philox, random_words
from tests import oracles

Words = list[int]


def pytorch(counter: Words, key: Words) -> Words:
    """The reference takes the two upper counter words as one number, as it takes the key."""
    offset, seed = (dx.random_key(low | high << 32)[0] for low, high in (counter[2:], key))
    return [int(word) for word in philox(torch.tensor(counter[0]), torch.tensor(counter[1]), offset, seed)]


def compiled(counter: Words, key: Words) -> Words:
    return importlib.import_module("dimo_ext._core").philox4x32(counter, key)


needs_core = pytest.mark.skipif(importlib.util.find_spec("dimo_ext._core") is None, reason="no compiled module")
both = pytest.mark.parametrize("implementation", [pytorch, pytest.param(compiled, marks=needs_core)])
words = st.integers(0, 2**32 - 1)


@both
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(implementation, counter: str, key: str, expected: str) -> None:
    counter, key, expected = ([int(word, 16) for word in text.split()] for text in (counter, key, expected))
    assert implementation(counter, key) == expected
    assert oracles.philox(np.array(counter, np.uint64)[:, None], tuple(key))[:, 0].tolist() == expected


@both
@given(counter=st.lists(words, min_size=4, max_size=4), key=st.lists(words, min_size=2, max_size=2))
def test_any_counter_and_key(implementation, counter: Words, key: Words) -> None:
    expected = oracles.philox(np.array(counter, np.uint64)[:, None], tuple(key))[:, 0]
    assert implementation(counter, key) == expected.tolist()


@given(seed=st.integers(-(2**63), 2**64 - 1), offset=st.integers(-(2**63), 2**64 - 1), tag=st.sampled_from(Tag))
def test_words_of_a_row(device, seed: int, offset: int, tag: Tag) -> None:
    """Counter words [block | tag << 24, row, offset low, offset high], the seed as Philox key."""
    drawn = random_words(dx.random_key(seed, offset, device=device), 3, 1, 9, tag)
    expected = [oracles.row_words(seed, offset, row, 9, int(tag)) for row in range(3)]
    assert drawn.tolist() == np.stack(expected).tolist()


@needs_core
def test_words_outside_32_bits_are_refused() -> None:
    with pytest.raises(TypeError):
        compiled([1 << 32, 0, 0, 0], [0, 0])
