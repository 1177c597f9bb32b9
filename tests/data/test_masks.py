"""Masks against loops over pixels."""

import numpy as np
import pytest

from medvlp_jax.config import UserError
from medvlp_jax.data import masks


def random_mask(seed, shape=(7, 9), share=0.4):
    return np.random.default_rng(seed).random(shape) < share


def test_relative_runs_are_column_major_and_count_from_the_run_before():
    # 2 pixels from pixel 1, then a gap of 3 and 1 pixel: pixels 1, 2 and 6 of columns of 3.
    expected = np.zeros((3, 4), bool)
    expected[1, 0] = expected[2, 0] = expected[0, 2] = True
    np.testing.assert_array_equal(masks.from_relative_rle("1 2 3 1", (3, 4)), expected)
    np.testing.assert_array_equal(masks.from_rle("2 2 7 1", (3, 4)), expected)


@pytest.mark.parametrize("text", ["-1", " -1", "", "  "])
def test_no_region_is_written_in_several_ways(text):
    assert not masks.from_relative_rle(text, (3, 4)).any()


@pytest.mark.parametrize("seed", range(5))
def test_runs_and_outlines_give_the_mask_again(seed):
    mask = random_mask(seed)
    shape = mask.shape
    again = masks.from_relative_rle(masks.to_relative_rle(mask), shape)
    np.testing.assert_array_equal(again, mask)
    np.testing.assert_array_equal(masks.from_rle(masks.to_rle(mask), shape), mask)
    outlines = masks.to_polygons(mask)
    filled = np.zeros(shape, bool)
    for outline in outlines:
        filled ^= masks.from_polygon(outline, shape)
    np.testing.assert_array_equal(filled, mask)


def inside(points, x, y):
    """Even-odd rule, one point."""
    odd = False
    for (x0, y0), (x1, y1) in zip(points, [*points[1:], points[0]], strict=True):
        if (y0 <= y) != (y1 <= y) and x < x0 + (y - y0) * (x1 - x0) / (y1 - y0):
            odd = not odd
    return odd


@pytest.mark.parametrize("seed", range(4))
def test_a_polygon_holds_the_pixels_whose_centre_it_holds(seed):
    points = (np.random.default_rng(seed).random((6, 2)) * (14, 12) - 2).tolist()
    expected = [[inside(points, c + 0.5, r + 0.5) for c in range(10)] for r in range(8)]
    np.testing.assert_array_equal(masks.from_polygon(points, (8, 10)), expected)


def test_boxes_and_ellipses_hold_centres():
    box = (2, 1, 5, 3)
    mask = masks.from_box(box, (4, 6))
    assert mask.sum() == 6
    assert masks.to_boxes(mask) == [box]
    square = [(2, 1), (5, 1), (5, 3), (2, 3)]
    np.testing.assert_array_equal(masks.from_polygon(square, (4, 6)), mask)
    disc = masks.from_ellipse((0, 0, 100, 100), (100, 100))
    assert disc.sum() == pytest.approx(np.pi * 50**2, rel=0.01)
    assert not masks.from_ellipse((3, 3, 3, 9), (20, 20)).any()


def test_parts_that_touch_at_a_corner_are_one():
    mask = np.zeros((6, 6), bool)
    mask[0, 0] = mask[1, 1] = mask[4:, 3:5] = True
    assert masks.to_boxes(mask) == [(0, 0, 2, 2), (3, 4, 5, 6)]


def test_fractions_are_cut_off_at_the_image():
    assert masks.fractions((-5, 10, 20, 30), (40, 40)) == (0.25, 0.0, 0.75, 0.5)
    for box in [(5, 5, 5, 9), (50, 0, 60, 9), (0, 0, float("nan"), 3), (0, 0, float("inf"), 3)]:
        with pytest.raises(UserError, match="is empty in 40 x 40 pixels"):
            masks.fractions(box, (40, 40))


@pytest.mark.parametrize("text", ["1", "a b", "1.5 2", "-1 2", "1 2 3", "²1 1", "1_0 2", "9" * 40])
def test_what_are_no_runs_is_refused(text):
    with pytest.raises(UserError, match="no pairs of whole numbers"):
        masks.from_relative_rle(text, (10, 10))


@pytest.mark.parametrize("text", ["99 2", "0 0", "5 99999999999"])
def test_runs_that_leave_the_image_are_refused(text):
    with pytest.raises(UserError, match="have a run of"):
        masks.from_relative_rle(text, (10, 10))
    with pytest.raises(UserError, match="have a run of 1 from pixel -1"):
        masks.from_rle("0 1", (10, 10))
