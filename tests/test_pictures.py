"""Pictures: pixel values, where a grid puts what, what a PNG file says about itself."""

import numpy as np
import pytest
import torch
from PIL import Image

from dimo.pictures import grid, save_png, to_pil


def flat(value: int, side: int = 50) -> Image.Image:
    return Image.new("L", (side, side), value)


def test_pixels_are_rounded_and_clamped():
    values = torch.tensor([-1.0, 0.0, 0.4, 0.5, 1.0, 7.0])
    (grey,) = to_pil(values.view(1, 1, 2, 3))
    assert grey.mode == "L"
    assert np.asarray(grey).tolist() == [[0, 0, 102], [128, 255, 255]]
    images = torch.rand(2, 3, 4, 5)
    first, second = to_pil(images)
    assert (first.mode, first.size) == ("RGB", (5, 4))
    np.testing.assert_array_equal(np.asarray(second), (images[1] * 255).round().byte().permute(1, 2, 0).numpy())


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 2, 4, 4)])
def test_shapes_that_are_no_images(shape):
    with pytest.raises(ValueError, match=r"images: expected shape \[B, 1 or 3, H, W\], got"):
        to_pil(torch.zeros(shape))


def test_a_grid_holds_every_picture_in_its_place():
    rows = [[flat(10), flat(20), flat(30)], [flat(40), flat(50), flat(60)]]
    pixels = np.asarray(grid(rows))
    assert pixels.shape == (2 * 52 - 2, 3 * 52 - 2, 3)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            cell = pixels[y * 52 : y * 52 + 50, x * 52 : x * 52 + 50]
            assert (cell == picture.getpixel((0, 0))).all()


def test_labels_stand_before_the_rows():
    plain, labelled = (np.asarray(grid([[flat(9)]] * 2, labels)) for labels in (None, ["cat", "a longer label"]))
    left = labelled.shape[1] - plain.shape[1]
    assert left > 20
    np.testing.assert_array_equal(labelled[:, left:], plain)
    for rows in (slice(0, 50), slice(52, 102)):  # each label has its ink
        assert (labelled[rows, :left] != labelled[51, 0]).any()


def test_small_pictures_are_enlarged_by_a_whole_factor():
    (digit,) = to_pil(torch.rand(1, 1, 8, 8))
    pixels = np.asarray(grid([[digit]]))[..., 0]
    np.testing.assert_array_equal(pixels, np.asarray(digit).repeat(6, 0).repeat(6, 1))


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        ([], None, "rows: expected one or more of equal length"),
        ([[]], None, "rows: expected one or more of equal length"),
        ([[flat(0)], [flat(0), flat(0)]], None, r"rows: expected one or more of equal length, got \[1, 2\]"),
        ([[flat(0)]], ["a", "b"], "labels: expected 1, one a row, got 2"),
    ],
)
def test_grids_that_cannot_be(rows, labels, message):
    with pytest.raises(ValueError, match=message):
        grid(rows, labels)


def test_a_png_file_says_where_it_comes_from(tmp_path):
    save_png(flat(7), tmp_path / "new" / "a.png", {"dimo": "größer"})
    with Image.open(tmp_path / "new" / "a.png") as picture:
        assert picture.text == {"dimo": "größer"}
        assert picture.getpixel((0, 0)) == 7
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]
