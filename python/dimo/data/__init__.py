"""Data sets: the digits that scikit-learn ships."""

from .digits import DigitsSplit, load_digits_split

__all__ = ["DigitsSplit", "load_digits_split"]
