"""DICOM and deep PNG against the formulas of the standard, written out."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from medvlp_jax.config import UserError
from medvlp_jax.data import dicom, files, images

pydicom = pytest.importorskip("pydicom")


def write_dicom(path, pixels, *, bits=16, kind="MONOCHROME2", jpeg=False, **tags):
    """Write a one-frame DICOM file; `tags` are set as they are."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import ExplicitVRLittleEndian, JPEGBaseline8Bit

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    meta.TransferSyntaxUID = JPEGBaseline8Bit if jpeg else ExplicitVRLittleEndian
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, kind
    data.BitsAllocated = 8 if bits <= 8 else 16
    data.BitsStored, data.HighBit, data.PixelRepresentation = bits, bits - 1, 0
    for name, value in tags.items():
        setattr(data, name, value)
    if jpeg:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
        data.PixelData = encapsulate([buffer.getvalue()])
    else:
        data.PixelData = pixels.astype(np.uint8 if bits <= 8 else np.uint16).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)


def ramp(high, shape=(4, 6)):
    return np.linspace(0, high, shape[0] * shape[1]).round().astype(np.uint16).reshape(shape)


def test_eight_bits_without_a_window_stay_as_they_are(tmp_path):
    pixels = ramp(200).astype(np.uint8)
    write_dicom(tmp_path / "a.dcm", pixels, bits=8)
    np.testing.assert_array_equal(dicom.read(tmp_path / "a.dcm"), pixels)


def test_monochrome1_is_inverted_last(tmp_path):
    pixels = ramp(200).astype(np.uint8)
    write_dicom(tmp_path / "a.dcm", pixels, bits=8, kind="MONOCHROME1")
    np.testing.assert_array_equal(dicom.read(tmp_path / "a.dcm"), 255 - pixels)


def test_a_window_follows_the_standard(tmp_path):
    pixels, center, width, slope, intercept = ramp(4095), 1000.0, 800.0, 2.0, -100.0
    write_dicom(
        tmp_path / "a.dcm",
        pixels,
        bits=12,
        WindowCenter=center,
        WindowWidth=width,
        RescaleSlope=slope,
        RescaleIntercept=intercept,
    )
    expected = np.zeros(pixels.shape, np.uint8)
    for where, stored in np.ndenumerate(pixels):  # PS3.3 C.11.2.1.2.1
        x = float(stored) * slope + intercept
        if x <= center - 0.5 - (width - 1) / 2:
            y = 0.0
        elif x > center - 0.5 + (width - 1) / 2:
            y = 255.0
        else:
            y = ((x - (center - 0.5)) / (width - 1) + 0.5) * 255
        expected[where] = round(y)
    np.testing.assert_array_equal(dicom.read(tmp_path / "a.dcm"), expected)


@pytest.mark.parametrize("kind", dicom.MONOCHROME)
def test_a_window_after_a_falling_rescale_is_no_black_image(tmp_path, kind):
    pixels = ramp(4095)
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    falling = {**window, "RescaleSlope": -1, "RescaleIntercept": 4095}
    write_dicom(tmp_path / "a.dcm", pixels, bits=12, kind=kind, **falling)
    expected = np.rint((4095 - pixels.astype(float)) / 4095 * 255)
    expected = expected if kind == "MONOCHROME2" else 255 - expected
    np.testing.assert_array_equal(dicom.read(tmp_path / "a.dcm"), expected)


@pytest.mark.parametrize(
    "tags",
    [
        {"WindowCenter": None, "WindowWidth": None},
        {"WindowCenter": [], "WindowWidth": 800},
        {"WindowCenter": 1000, "WindowWidth": 0},
        {"WindowCenter": 1000, "WindowWidth": [0.5, 400]},
        {"WindowCenter": 1000, "WindowWidth": 0, "VOILUTFunction": "SIGMOID"},
        {"RescaleSlope": None, "RescaleIntercept": 7},
        {"RescaleSlope": None, "RescaleIntercept": None},
        {"VOILUTSequence": []},
        {"ModalityLUTSequence": []},
        {"PixelPaddingValue": None},
    ],
)
def test_an_element_without_a_value_is_not_there(tmp_path, tags):
    pixels = ramp(3000)
    write_dicom(tmp_path / "a.dcm", pixels, bits=12, **tags)
    write_dicom(tmp_path / "b.dcm", pixels, bits=12)
    np.testing.assert_array_equal(
        dicom.read(tmp_path / "a.dcm"), dicom.read(tmp_path / "b.dcm"), strict=True
    )


def test_a_narrow_window_counts_where_the_standard_allows_it(tmp_path):
    pixels = ramp(4)
    window = {"WindowCenter": 2, "WindowWidth": 0.5, "VOILUTFunction": "LINEAR_EXACT"}
    write_dicom(tmp_path / "a.dcm", pixels, bits=12, **window)
    expected = np.array([0, 0, 128, 255, 255], np.uint8)[pixels]
    np.testing.assert_array_equal(dicom.read(tmp_path / "a.dcm"), expected)


def test_a_flat_image_stays_flat(tmp_path):
    write_dicom(tmp_path / "a.dcm", np.full((4, 6), 90), bits=12, WindowCenter=5, WindowWidth=9)
    assert (dicom.read(tmp_path / "a.dcm") == 255).all()


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1"])
@pytest.mark.parametrize("bits", [8, 12])
def test_a_dicom_that_ends_in_its_pixels_or_its_header_is_cut_off(tmp_path, syntax, bits):
    path = tmp_path / "a.dcm"
    write_dicom(path, ramp(200), bits=bits)
    data = pydicom.dcmread(path)
    data.file_meta.TransferSyntaxUID = syntax
    data.save_as(path, implicit_vr=syntax.endswith("1.2"), little_endian=True)
    whole = path.read_bytes()
    assert dicom.looks_whole(path) == ""
    for length, where in ((len(whole) - 1, "in its pixels"), (300, "a whole header")):
        path.write_bytes(whole[:length])
        assert where in dicom.looks_whole(path)
    write_dicom(path, ramp(200).astype(np.uint8), bits=8, jpeg=True)
    path.write_bytes(path.read_bytes()[:-40])
    assert dicom.looks_whole(path) == ""  # no header says how long it should be


def test_a_voi_table_is_looked_up(tmp_path):
    from pydicom.dataset import Dataset

    table = Dataset()
    table.add_new("LUTDescriptor", "US", [4, 10, 16])
    table.add_new("LUTData", "US", [0, 20000, 40000, 65535])
    pixels = np.array([[0, 10, 11], [12, 13, 500]], np.uint16)
    write_dicom(tmp_path / "a.dcm", pixels, bits=12, VOILUTSequence=[table])
    levels = [round(v / 65535 * 255) for v in (0, 0, 20000, 40000, 65535, 65535)]
    np.testing.assert_array_equal(dicom.read(tmp_path / "a.dcm").ravel(), levels)


def test_depth_without_a_window_is_stretched_and_padding_left_out(tmp_path):
    pixels = np.array([[5000, 100, 300], [500, 100, 100]], np.uint16)
    write_dicom(tmp_path / "a.dcm", pixels, bits=14, PixelPaddingValue=5000)
    found = dicom.read(tmp_path / "a.dcm")
    np.testing.assert_array_equal(found, [[255, 0, 128], [255, 0, 0]])


def test_a_deep_png_is_stretched_and_a_flat_one_black(tmp_path):
    Image.fromarray(np.array([[1000, 2000], [3000, 1000]], np.uint16)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(dicom.read(tmp_path / "a.png"), [[0, 128], [255, 0]])
    Image.fromarray(np.full((2, 2), 700, np.uint16)).save(tmp_path / "b.png")
    assert not dicom.read(tmp_path / "b.png").any()


def test_jpeg_inside_dicom_is_decoded(tmp_path):
    pixels = np.full((16, 16), 90, np.uint8)
    write_dicom(tmp_path / "a.dcm", pixels, bits=8, jpeg=True)
    assert abs(dicom.read(tmp_path / "a.dcm").astype(int) - 90).max() <= 2


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"PhotometricInterpretation": "RGB"}, "PhotometricInterpretation RGB; accepted is one"),
        ({"NumberOfFrames": 3}, "has 3 frames"),
        ({"Rows": 60000, "Columns": 60000}, "60000 x 60000 pixels; accepted are 1 to"),
        ({"WindowCenter": 5000, "WindowWidth": 9}, "has pixels that differ, and its header"),
        ({"RescaleSlope": 0, "RescaleIntercept": 9}, "shows all of them as one grey"),
        ({"WindowCenter": 5, "WindowWidth": 0.5, "VOILUTFunction": "CURVE"}, "cannot be decoded"),
        ({"Rows": 400}, "cannot be decoded"),
    ],
)
def test_what_is_no_radiograph_is_refused_by_name(tmp_path, tags, message):
    write_dicom(tmp_path / "a.dcm", ramp(100), bits=12)
    data = pydicom.dcmread(tmp_path / "a.dcm")
    for name, value in tags.items():
        setattr(data, name, value)
    data.save_as(tmp_path / "a.dcm")
    with pytest.raises(UserError, match=rf"image .*a\.dcm .*{message}"):
        dicom.read(tmp_path / "a.dcm")


def test_a_file_that_would_be_inflated_whole_is_refused_unread(tmp_path, monkeypatch):
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    write_dicom(tmp_path / "a.dcm", ramp(100), bits=12)
    data = pydicom.dcmread(tmp_path / "a.dcm")
    data.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    data.save_as(tmp_path / "a.dcm")
    monkeypatch.setattr(pydicom, "dcmread", None)
    with pytest.raises(UserError, match=r"a\.dcm is stored as Deflated Explicit VR Little Endian"):
        dicom.read(tmp_path / "a.dcm")


@pytest.mark.parametrize("format", ["TIFF", "GIF", "EPS"])
def test_no_other_format_of_pillow_is_tried(tmp_path, format):
    Image.fromarray(ramp(200).astype(np.uint8)).save(tmp_path / "a.png", format)
    with pytest.raises(UserError, match=r"a\.png cannot be decoded \(UnidentifiedImageError"):
        dicom.read(tmp_path / "a.png")


def test_an_image_of_too_many_pixels_is_one_sentence(tmp_path, monkeypatch):
    Image.fromarray(ramp(200).astype(np.uint8)).save(tmp_path / "a.png")
    monkeypatch.setattr(dicom, "MAX_PIXELS", 23)
    for read in (dicom.read, images.load):
        with pytest.raises(UserError, match=r"a\.png .*6 x 4 pixels; accepted are 1 to 23"):
            read(tmp_path / "a.png")


def pictures(folder, suffix, mode):
    """Write a picture with every orientation tag, 0 without and 9 unknown; yield what is shown."""
    grey = np.add.outer(6 * np.arange(24), 2 * np.arange(40)).astype(np.uint8)
    pixels = grey if mode == "L" else np.stack([grey, grey // 2, 255 - grey], -1)
    for tag in range(10):
        tags = Image.Exif()
        if tag:
            tags[0x0112] = tag
        path = folder / f"{tag}{suffix}"
        Image.fromarray(pixels).save(path, exif=tags)
        with Image.open(path) as image:
            yield tag, path, ImageOps.exif_transpose(image)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_photograph_is_stored_as_viewers_show_it(tmp_path, suffix, mode):
    channels = len(mode)
    row = files.Row(tmp_path, 2, {})
    format = {".jpg": "JPEG", ".png": "PNG"}[suffix]
    for tag, path, shown in pictures(tmp_path, suffix, mode):
        found = images.load(path, channels=channels)
        read = files.read_image(path, row, format=format)
        assert found.shape == (shown.height, shown.width)
        if tag in (0, 1, 9):
            assert found.content == read == path.read_bytes()
            continue
        for content in (found.content, read):
            with Image.open(io.BytesIO(content)) as image:
                assert image.getexif().get(0x0112) is None
                assert (image.mode, image.size) == (mode, shown.size)
                assert np.abs(np.asarray(image, int) - np.asarray(shown)).max() < 16
        expected = np.asarray(shown.convert("L"))
        np.testing.assert_array_equal(dicom.read(path), expected)
        small = images.load(path, side=12, channels=channels)
        assert small.shape == (shown.height, shown.width)
        with Image.open(io.BytesIO(small.content)) as image:
            assert image.size == ((12, 20) if tag > 4 else (20, 12))


def test_damaged_tags_turn_nothing(tmp_path):
    path = tmp_path / "a.jpg"
    Image.new("L", (40, 24)).save(path, exif=b"Exif\0\0nonsense")
    assert images.load(path) == (path.read_bytes(), (24, 40))


def test_a_missing_or_broken_file_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"image .*none\.dcm is missing"):
        dicom.read(tmp_path / "none.dcm")
    for name in ("a.dcm", "a.png", "a.jpg"):
        (tmp_path / name).write_bytes(b"no image at all")
        with pytest.raises(UserError, match=rf"image .*{name} cannot be decoded"):
            dicom.read(tmp_path / name)
