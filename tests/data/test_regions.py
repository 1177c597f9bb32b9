"""Masks and boxes lie over the same pixels of the square as what they outline in the image."""

import io

import numpy as np
import pytest
from PIL import Image

from medvlp_jax.config import UserError
from medvlp_jax.data import masks, records, regions, transforms


def record_of(height=40, width=60, border=6):
    """A white rectangle on grey within a black border; outlined by mask bit 1 and a box."""
    image = np.zeros((height, width), np.uint8)
    image[border:-border, border:-border] = 90
    image[12:24, 20:45] = 255
    field = (image == 255).astype(np.uint8) << 1
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    box = masks.fractions((20, 12, 45, 24), image.shape)
    boxes = {"bbox": np.array([box], np.float32), "phrase": ["white"]}
    return {"image": buffer.getvalue(), "mask": records.encode_mask(field), "boxes": boxes}


@pytest.mark.parametrize("fit", ["squash", "pad"])
@pytest.mark.parametrize("crop", [False, True])
def test_mask_and_box_outline_what_the_image_shows(fit, crop):
    frame, record = regions.Frame(120, fit=fit, crop_black_border=crop), record_of()
    white = frame.image(record)[..., 0] > 172
    mask = frame.mask(record, [0b10, 0b01])
    assert not mask[..., 1].any()
    both = (mask[..., 0] & white).sum() / (mask[..., 0] | white).sum()
    assert both > 0.93  # one pixel along the edge, where resizing blurs
    top, left, bottom, right = frame.boxes(record)[0]
    box = masks.from_box((left, top, right, bottom), (120, 120))
    assert (box & mask[..., 0]).sum() / (box | mask[..., 0]).sum() > 0.97


def test_a_mask_smaller_than_its_image_covers_the_same_part():
    record = record_of()
    whole = regions.Frame(120).mask(record, [2])
    small = np.asarray(Image.open(io.BytesIO(record["mask"])))[::2, ::2]
    found = regions.Frame(120).mask({**record, "mask": records.encode_mask(small)}, [2])
    assert (whole & found).sum() / (whole | found).sum() > 0.9


def test_moved_masks_and_boxes_stay_over_the_moved_image():
    frame, record = regions.Frame(96), record_of()
    image, mask = frame.image(record), frame.mask(record, [2])
    for seed in range(8):
        to_source = regions.motion(np.random.default_rng(seed), 96, rotation=0)
        white = transforms.warp(image, to_source)[..., 0] > 172
        moved = regions.move_mask(mask, to_source)[..., 0]
        assert (moved & white).sum() / (moved | white).sum() > 0.88
        boxes, seen = regions.move_boxes(frame.boxes(record), to_source, 96)
        assert seen.tolist() == [True]
        top, left, bottom, right = boxes[0]
        box = masks.from_box((left, top, right, bottom), (96, 96))
        assert (box & moved).sum() / (box | moved).sum() > 0.93


def test_a_box_that_leaves_the_image_is_not_seen():
    away = np.array([[1, 0, 60.0], [0, 1, 0], [0, 0, 1]])  # the output looks 60 pixels to the right
    boxes, seen = regions.move_boxes(np.array([[10.0, 10, 20, 40], [10, 50, 20, 90]]), away, 96)
    assert seen.tolist() == [False, True]
    np.testing.assert_allclose(boxes[1], [10, 0, 20, 30])


def test_regions_by_name_and_unions():
    bits = {"left": 0, "right": 1, "heart": 2}
    assert regions.bits_of(["left", "left+right", "heart"], bits, "x") == [1, 3, 4]
    with pytest.raises(UserError, match=r"no region 'hart'. Did you mean heart"):
        regions.bits_of(["left+hart"], bits, "x")
    with pytest.raises(UserError, match="no masks"):
        regions.bits_of(["left"], {}, "x")


def test_no_mask_and_an_empty_mask_differ():
    assert not regions.has_mask({"mask": records.empty_mask()})
    assert regions.has_mask({"mask": records.encode_mask(np.zeros((4, 4), np.uint8))})


def test_prepared_rows_are_decoded_once_within_the_budget():
    seen = []

    def prepare(record):
        seen.append(record)
        return {"image": np.full(100, record, np.uint8)}

    rows = regions.Prepared([10, 11, 12, 13], np.array([3, 0, 1]), prepare, budget=250)
    for _ in range(2):
        assert [int(example["image"][0]) for example in rows] == [13, 10, 11]
    assert seen == [13, 10, 11, 11]


def test_one_image_with_colours_among_grey_ones_keeps_them():
    def record(mode):
        buffer = io.BytesIO()
        Image.new(mode, (4, 4)).save(buffer, "PNG")
        return {"image": buffer.getvalue()}

    assert regions.channels_of([record("L"), record("L")]) == 1
    assert regions.channels_of(map(record, ("L", "L", "RGB"))) == 3
    assert regions.channels_of(map(record, ("RGB", "L"))) == 3
