import io

import numpy as np
import pytest
from PIL import Image

from medvlp_jax.config import UserError
from medvlp_jax.data import transforms

STILL = {
    "flip_horizontal": 0.0,
    "flip_vertical": 0.0,
    "rotation": 0.0,
    "perspective_probability": 0.0,
    "autocontrast": 0.0,
}


def encode(pixels, format="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def test_a_picture_is_decoded_as_viewers_show_it():
    turned, tags = encode(smooth(40, 60), "JPEG"), Image.Exif()
    tags[0x0112] = 6  # on its left side
    lying = np.rot90(smooth(40, 60))
    tagged = encode(lying, "JPEG", exif=tags)
    differ = lambda a, b: np.abs(a.astype(int) - b).max()
    assert differ(*(transforms.decode(e, size=32) for e in (turned, tagged))) < 12
    boxes = np.array([[0.0, 0.0, 0.5, 0.5]])
    placed = [transforms.placed(boxes, e, size=32, fit="pad") for e in (turned, tagged)]
    np.testing.assert_allclose(*placed)


def smooth(height, width, seed=0):
    """A random image without detail that resampling would lose."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def bilinear(image, x, y):
    """The value at continuous (x, y) in float64, edges repeated."""
    height, width = image.shape
    x, y = x - 0.5, y - 0.5
    j, i = int(np.floor(x)), int(np.floor(y))
    total = 0.0
    for di, wi in ((0, 1 - (y - i)), (1, y - i)):
        for dj, wj in ((0, 1 - (x - j)), (1, x - j)):
            pixel = image[min(max(i + di, 0), height - 1), min(max(j + dj, 0), width - 1)]
            total += wi * wj * float(pixel)
    return total


def reference_warp(image, to_source):
    out = np.zeros(image.shape)
    for i in range(image.shape[0]):
        for j in range(image.shape[1]):
            x, y, w = to_source @ np.array([j + 0.5, i + 0.5, 1.0])
            if 0 <= x / w < image.shape[1] and 0 <= y / w < image.shape[0]:
                out[i, j] = bilinear(image, x / w, y / w)
    return out


def reference_resize(image, size):
    """Bilinear enlarging to [size, size] in float64."""
    height, width = image.shape
    return np.array(
        [
            [
                bilinear(image, (j + 0.5) * width / size, (i + 0.5) * height / size)
                for j in range(size)
            ]
            for i in range(size)
        ]
    )


def reference_decode(image, size):
    rows, columns = np.nonzero(image.any(1))[0], np.nonzero(image.any(0))[0]
    image = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(float)
    image = (image - image.min()) * 255 / (image.max() - image.min())
    return reference_resize(image, size)


def test_decode_equals_plain_crop_stretch_and_resize():
    image = np.zeros((30, 40), np.uint8)
    image[4:25, 7:33] = 20 + smooth(21, 26) // 2
    out = transforms.decode(encode(image), size=48)
    assert out.shape == (48, 48, 1)
    assert out.dtype == np.uint8
    # Half a grey level each: rounding after the stretch, and after both passes of the resize.
    np.testing.assert_allclose(out[..., 0], reference_decode(image, 48), atol=1.5)


def test_decode_without_crop_or_stretch_only_resizes():
    image = 20 + smooth(21, 26) // 2
    out = transforms.decode(encode(image), size=48, crop_black_border=False, stretch=False)
    np.testing.assert_allclose(out[..., 0], reference_resize(image, 48), atol=1.0)


def test_decode_at_reduced_scale_is_close_to_decoding_whole():
    image = smooth(512, 480)
    reduced = transforms.decode(encode(image, "JPEG", quality=95), size=64)
    whole = transforms.decode(encode(image), size=64)
    assert np.abs(reduced.astype(int) - whole.astype(int)).mean() < 1.5


def test_decode_stretches_to_the_full_range_and_keeps_white_white():
    image = np.array([[10, 10, 50], [90, 130, 130], [130, 130, 130]], np.uint8)
    out = transforms.decode(encode(image), size=3)
    assert (out.min(), out.max()) == (0, 255)
    assert out[2, 2, 0] == 255


def test_legacy_wrap_turns_white_black():
    image = np.array([[10, 10, 50], [90, 130, 130], [130, 130, 130]], np.uint8)
    out = transforms.decode(encode(image), size=3, legacy_wrap=True)[..., 0]
    expected = ((image.astype(float) - 10) * 256 / 120).astype(int) % 256
    np.testing.assert_array_equal(out, expected)
    assert out[2, 2] == 0


def test_pad_keeps_the_aspect_ratio():
    out = transforms.decode(encode(np.full((10, 20), 200, np.uint8)), size=40, fit="pad")
    assert not out[:9].any()
    assert not out[31:].any()
    assert (out[11:29] == 200).all()


@pytest.mark.parametrize("value", [0, 77])
def test_flat_images_stay(value):
    out = transforms.decode(encode(np.full((9, 9), value, np.uint8)), size=6)
    assert (out == value).all()


def test_decode_gives_three_channels_where_asked():
    colours = np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    assert transforms.decode(encode(colours), size=8, channels=3).shape == (8, 8, 3)
    assert transforms.decode(encode(colours), size=8).shape == (8, 8, 1)
    grey = transforms.decode(encode(colours[..., 0]), size=8, channels=3)
    np.testing.assert_array_equal(grey[..., 0], grey[..., 2])


@pytest.mark.parametrize("fit", ["squash", "pad"])
def test_boxes_are_placed_where_decode_puts_them(fit):
    """A bright square in a frame of black, which is cropped: its box follows it."""
    image = np.zeros((60, 100), np.uint8)
    image[10:50, 20:90] = 60
    image[20:30, 40:75] = 250
    box = np.array([[20 / 60, 40 / 100, 30 / 60, 75 / 100]])
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, "PNG")
    seen = transforms.decode(encoded.getvalue(), size=140, fit=fit, stretch=False)[..., 0]
    top, left, bottom, right = transforms.placed(box, encoded.getvalue(), size=140, fit=fit)[0]
    rows, columns = np.nonzero(seen > 155)
    found = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
    np.testing.assert_allclose(found, (top, left, bottom, right), atol=1)


def test_unknown_fit_names_the_accepted_ones():
    with pytest.raises(UserError, match="'crop'; accepted are squash and pad"):
        transforms.decode(encode(np.ones((4, 4), np.uint8)), size=4, fit="crop")


def test_warp_equals_a_plain_loop():
    image = smooth(24, 24)
    rng = np.random.default_rng(3)
    to_source = transforms.rotation_map(17, 24) @ transforms.perspective_map(rng, 0.5, 24)
    out = transforms.warp(image[..., None], to_source)[..., 0]
    np.testing.assert_allclose(out, reference_warp(image, to_source), atol=1.0)


def test_rotation_equals_pillow():
    image = smooth(32, 32)
    out = transforms.warp(image[..., None], transforms.rotation_map(20, 32))[..., 0]
    expected = np.asarray(Image.fromarray(image).rotate(20, Image.Resampling.BILINEAR))
    np.testing.assert_allclose(out.astype(int), expected.astype(int), atol=1)


def test_homography_maps_four_points():
    source = np.array([[0, 0], [10, 1], [9, 12], [-1, 8]], float)
    target = np.array([[2, 1], [8, 0], [11, 9], [0, 10]], float)
    mapped = np.c_[source, np.ones(4)] @ transforms.homography(source, target).T
    np.testing.assert_allclose(mapped[:, :2] / mapped[:, 2:], target, rtol=1e-12, atol=1e-12)


def test_perspective_moves_corners_inwards_within_the_limit():
    corners = np.array([[0, 0, 1], [100, 0, 1], [100, 100, 1], [0, 100, 1]], float)
    towards = np.sign(50 - corners[:, :2])
    for seed in range(20):
        to_source = transforms.perspective_map(np.random.default_rng(seed), 0.5, 100)
        moved = corners @ np.linalg.inv(to_source).T
        inwards = towards * (moved[:, :2] / moved[:, 2:] - corners[:, :2])
        assert (inwards >= -1e-9).all()
        assert (inwards <= 25 + 1e-9).all()
        assert inwards.max() > 5  # eight draws up to 25


def test_a_still_view_is_a_crop_of_the_image():
    image = smooth(20, 20)[..., None]
    corners = set()
    for seed in range(200):
        view = transforms.imitate_view(image, np.random.default_rng(seed), size=17, **STILL)
        (match,) = [
            (i, j)
            for i in range(4)
            for j in range(4)
            if np.array_equal(view, image[i : i + 17, j : j + 17])
        ]
        corners.add(match)
    assert len(corners) == 16


@pytest.mark.parametrize(
    ("option", "flipped"), [("flip_horizontal", np.s_[:, ::-1]), ("flip_vertical", np.s_[::-1])]
)
def test_flips_are_exact(option, flipped):
    image = smooth(16, 16)[..., None]
    view = transforms.imitate_view(
        image, np.random.default_rng(0), size=16, **{**STILL, option: 1.0}
    )
    np.testing.assert_array_equal(view, image[flipped])


def test_flip_then_rotation_is_the_order():
    image = smooth(32, 32)
    options = {**STILL, "flip_horizontal": 1.0, "rotation": 30.0}
    view = transforms.imitate_view(image[..., None], np.random.default_rng(1), size=32, **options)
    rng = np.random.default_rng(1)
    rng.integers(1), rng.integers(1), rng.random(), rng.random()
    angle = rng.uniform(-30, 30)
    mirrored = Image.fromarray(image).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    expected = np.asarray(mirrored.rotate(angle, Image.Resampling.BILINEAR)).astype(int)
    np.testing.assert_allclose(view[..., 0].astype(int), expected, atol=1)


def test_autocontrast_stretches():
    image = (80 + smooth(16, 16) // 4)[..., None]
    view = transforms.imitate_view(
        image, np.random.default_rng(0), size=16, **{**STILL, "autocontrast": 1.0}
    )
    assert (view.min(), view.max()) == (0, 255)


def test_views_depend_on_the_generator_alone():
    image = smooth(40, 40)[..., None]
    views = [
        transforms.imitate_view(image, np.random.default_rng(seed), size=32) for seed in (5, 5, 6)
    ]
    np.testing.assert_array_equal(views[0], views[1])
    assert not np.array_equal(views[0], views[2])


def test_views_of_colour_images_keep_their_channels():
    image = np.stack([smooth(40, 40, seed) for seed in range(3)], -1)
    assert transforms.imitate_view(image, np.random.default_rng(0), size=32).shape == (32, 32, 3)


def test_center_view_and_lower_edge():
    image = np.full((10, 10, 1), 9, np.uint8)
    image[2:8, 2:8] = 200
    assert (transforms.center_view(image, size=6) == 200).all()
    masked = transforms.mask_lower_edge(image, 0.3)
    assert not masked[7:].any()
    np.testing.assert_array_equal(masked[:7], image[:7])
    assert image[9, 0, 0] == 9


def test_a_lesion_that_does_not_move_stays_and_a_quarter_turn_is_exact():
    image = np.stack([smooth(30, 30, seed) for seed in range(3)], axis=-1)
    still = dict.fromkeys(("flip", "moved", "quarter_turn", "contrast"), 0.0)
    view = lambda seed, **fields: transforms.cfcml_view(
        image, np.random.default_rng(seed), size=24, **{**still, "probability": 1.0, **fields}
    )
    centre = transforms.center_view(image, size=24)
    np.testing.assert_array_equal(view(0), centre)
    turned = {np.rot90(centre, k).tobytes(): k for k in range(4)}
    seen = {turned[view(seed, quarter_turn=1.0).tobytes()] for seed in range(20)}
    assert seen == {0, 1, 2, 3}
    both = np.ascontiguousarray(centre[::-1, ::-1])
    np.testing.assert_array_equal(view(0, flip=1.0), both)
    np.testing.assert_array_equal(view(0, flip=1.0, probability=0.0), centre)


def test_a_lesion_that_shrinks_is_mirrored_at_the_edges():
    image = np.full((24, 24, 1), 200, np.uint8)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        view = transforms.cfcml_view(image, rng, size=24, probability=1.0, moved=1.0, contrast=0.0)
        assert view.min() == view.max() == 200  # black corners would show


def test_brightness_and_contrast_stay_within_their_limits():
    ramp = np.tile(np.arange(0, 240, 10, dtype=np.uint8)[:, None, None], (1, 24, 1))
    still = dict.fromkeys(("flip", "moved", "quarter_turn"), 0.0)
    for seed in range(50):
        rng = np.random.default_rng(seed)
        view = transforms.cfcml_view(ramp, rng, size=24, probability=1.0, contrast=0.2, **still)
        x, y = ramp[:, 0, 0].astype(float), view[:, 0, 0].astype(float)
        assert (np.diff(y) >= 0).all()
        assert (y <= np.clip(x * 1.2 + 51, 0, 255) + 0.51).all()
        assert (y >= np.clip(x * 0.8 - 51, 0, 255) - 0.51).all()


def test_primas_view_without_change_is_the_image_and_its_flips():
    image = smooth(32, 32)[..., None].repeat(3, 2)
    still = {"smallest": 1.0, "rotation": 0.0, "jitter": 0.0, "hue": 0.0, "size": 32}
    rng = np.random.default_rng(0)
    # The aspect is drawn all the same: at area 1 a side that would be too long is cut.
    plain = [transforms.prima_view(image, rng, flip=0.0, **still) for _ in range(40)]
    nearest = min(np.abs(p.astype(int) - image).mean() for p in plain)
    assert nearest < 6
    flipped = transforms.prima_view(image, np.random.default_rng(1), flip=1.0, **still)
    again = transforms.prima_view(image, np.random.default_rng(1), flip=0.0, **still)
    np.testing.assert_allclose(flipped[::-1, ::-1].astype(int), again, atol=2)


@pytest.mark.parametrize("channels", [1, 3])
def test_primas_view_has_its_size_and_is_a_function_of_the_generator(channels):
    image = smooth(40, 40)[..., None].repeat(channels, 2)
    view = lambda seed: transforms.prima_view(image, np.random.default_rng(seed), size=24)
    assert view(0).shape == (24, 24, channels)
    np.testing.assert_array_equal(view(0), view(0))
    assert (view(0) != view(1)).any()
