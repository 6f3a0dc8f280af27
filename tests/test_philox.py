"""Philox4x32-10 in the compiled module against the known answers of Random123's test suite."""

import pytest

core = pytest.importorskip("dimo_ext._core")


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    assert core.philox4x32(_words(counter), _words(key)) == _words(expected)


def test_words_outside_32_bits_are_refused() -> None:
    with pytest.raises(TypeError):
        core.philox4x32([1 << 32, 0, 0, 0], [0, 0])


def _words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]
