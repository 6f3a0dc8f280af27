"""The embedded digits: the split is fixed, stratified and disjoint, and tokens decode to the images."""

import sys

import numpy as np
import pytest
import torch

from dimo.data import digits

pytest.importorskip("sklearn")

SIZES = {"train": 1258, "validation": 180, "test": 359}
CHECKSUMS = {
    "train": "9d415fac578b83766fc7e6fdf3558f1100f1ce823bd90179713378d52d409527",
    "validation": "9201156183adcacdc6427798311c5813938af044a8fd55633cc11ed526402674",
    "test": "e1166cba743e3067841446debe6239ff93903efe5660192cb87bc3ad0b4406ec",
}


@pytest.mark.parametrize("name", digits.SPLITS)
def test_split_is_the_published_one(name):
    split = digits.load_digits_split(name)
    assert len(split) == SIZES[name]
    assert split.tokens.shape == (SIZES[name], digits.SEQ_LEN)
    assert split.tokens.dtype == torch.int64
    assert split.labels.shape == (SIZES[name],)
    assert split.labels.dtype == torch.int64
    assert split.tokens.min() == 0
    assert split.tokens.max() == digits.VOCAB_SIZE - 1
    assert split.checksum() == CHECKSUMS[name]


def test_splits_are_disjoint_and_complete():
    from sklearn.datasets import load_digits

    labels = load_digits().target
    parts = digits.split_indices(labels)
    assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(len(labels)))


def test_splits_are_stratified():
    counts = {name: digits.load_digits_split(name).labels.bincount(minlength=10) for name in digits.SPLITS}
    total = sum(counts.values())
    for name, count in counts.items():
        # largest remainder: within one image of the exact share; train takes what the other two rounded away
        assert (count - total * SIZES[name] / total.sum()).abs().max() < (2 if name == "train" else 1)


def test_no_image_of_test_or_validation_is_in_train():
    train = {tuple(row) for row in digits.load_digits_split("train").tokens.tolist()}
    for name in ("validation", "test"):
        assert not any(tuple(row) in train for row in digits.load_digits_split(name).tokens.tolist())


def test_largest_remainder():
    assert digits._apportion(10, np.array([1, 1, 1])).tolist() == [4, 3, 3]
    assert digits._apportion(5, np.array([50, 30, 20])).tolist() == [3, 1, 1]


def test_callers_cannot_change_the_split():
    digits.load_digits_split("test").tokens.zero_()
    assert digits.load_digits_split("test").checksum() == CHECKSUMS["test"]


def test_unknown_split_lists_the_valid_ones():
    with pytest.raises(ValueError, match=r"'valid'.*train, validation, test"):
        digits.load_digits_split("valid")


def test_decode():
    tokens = torch.zeros(2, 64, dtype=torch.int64)
    tokens[1, 8 + 3] = 16  # second row, fourth column
    images = digits.decode(tokens)
    assert images.shape == (2, 1, 8, 8)
    assert images.dtype == torch.float32
    assert images[1, 0, 1, 3] == 1
    assert images.sum() == 1
    assert digits.decode(tokens[:0]).shape == (0, 1, 8, 8)


@pytest.mark.parametrize(
    "tokens",
    [torch.zeros(2, 63, dtype=torch.int64), torch.zeros(64, dtype=torch.int64), torch.zeros(2, 64)],
    ids=["width", "one row", "float"],
)
def test_decode_rejects_shapes_and_types(tokens):
    with pytest.raises(ValueError, match=r"tokens must be integers of shape \[N, 64\]"):
        digits.decode(tokens)


@pytest.mark.parametrize("value", [-1, 17])
def test_decode_rejects_mask_tokens(value):
    with pytest.raises(ValueError, match=r"tokens must lie in 0\.\.16"):
        digits.decode(torch.full((1, 64), value))


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"dimo-ext\[train\]"):
        digits.load_digits_split("train")
