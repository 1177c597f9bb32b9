"""Radiographs of any bit depth as 8-bit grey: DICOM, 16-bit PNG, other PNG and JPEG.

The one place where MONOCHROME1, the modality and VOI tables and the bit depth are dealt with:

  stored values -> modality rescale or table -> VOI window or table -> 0..255 -> MONOCHROME1 turned

(DICOM PS3.3 C.11.1 and C.11.2, in this order; pydicom does both steps.) What the file says decides
the ends of the grey scale: those of the window or table where it has one; 8-bit values stay as they
are; anything deeper without a window is stretched from its smallest to its largest value, padding
left out. An element without a value is one that is not there, and so is a window that the standard
does not allow.
"""

from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image

from medvlp_jax.config import UserError

MONOCHROME = ("MONOCHROME1", "MONOCHROME2")
SUFFIXES = (".dcm", ".dicom")
FORMATS = ("JPEG", "PNG")  # Pillow's names of what else is read
# How the EXIF orientation of a file turns its picture in viewers; phones write it.
_UPSIDE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
}
_SIDEWAYS = {
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Further than any radiograph: a header that asks for more is damaged, and memory is not its to ask.
MAX_PIXELS = 1 << 28
# Elements that say how pixels are shown; headers have them without a value, too.
OPTIONAL = ("ModalityLUTSequence", "RescaleSlope", "RescaleIntercept", "VOILUTSequence")
OPTIONAL += ("WindowCenter", "WindowWidth", "VOILUTFunction", "PixelPaddingValue")
# Transfer syntaxes by which a header says how many bytes of pixels follow: implicit and explicit
# little endian, big endian; and the bytes between the end of the header and the first pixel.
UNCOMPRESSED = {"1.2.840.10008.1.2": 8, "1.2.840.10008.1.2.1": 12, "1.2.840.10008.1.2.2": 12}
SIZE = ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "NumberOfFrames")


def read(path: Path) -> np.ndarray:
    """Return a radiograph as uint8 [H, W].

    Args:
      path: DICOM by its suffix; any other file is a JPEG or a PNG.

    Raises:
      UserError: with the file's name, for a file that is missing, damaged, no image, in colour or
        of several frames (DICOM), compressed as pydicom cannot read it here, or of pixels that
        differ while all of them would be shown as one grey.
    """
    if not path.is_file():
        raise UserError(f"image {path} is missing.")
    try:
        return _dicom(path) if path.suffix.lower() in SUFFIXES else _picture(path)
    except UserError:
        raise
    except Exception as error:
        # Parsers of damaged files raise nearly every type there is; all of them mean this.
        raise UserError(
            f"image {path} cannot be decoded ({type(error).__name__}: {_short(error)}); a whole "
            "DICOM, JPEG or PNG file is needed."
        ) from error


def opened(source: Path | IO[bytes]) -> Image.Image:
    """Open a JPEG or PNG that is to be decoded; Pillow's other formats are not even tried.

    Raises:
      ValueError: for more than MAX_PIXELS; damaged files raise nearly every other type, too.
    """
    image = Image.open(source, formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise ValueError(_too_large(*image.size))
    return image


def upright(image: Image.Image) -> Image.Image:
    """Decode a picture and turn it as its EXIF orientation says; without one return it itself.

    The pixels of `ImageOps.exif_transpose`, which writes all tags anew and fails where those of a
    phone are odd.
    """
    image.load()
    turn = (_UPSIDE | _SIDEWAYS).get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def shown_shape(image: Image.Image) -> tuple[int, int]:
    """Return [H, W] of a picture as `upright` has it."""
    shape = image.height, image.width
    return shape[::-1] if _orientation(image) in _SIDEWAYS else shape


def _orientation(image: Image.Image) -> int | None:
    if image.format != "JPEG":
        image.load()  # tags may follow the pixels; a JPEG is decoded later, maybe at reduced scale
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged tags raise many types, and viewers show the picture as it is
        return None


def grey(image: Image.Image) -> np.ndarray:
    """Return a Pillow image as uint8 [H, W]; more than 8 bits are stretched to their range."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image, np.float64)
        return _to_uint8(values, values.min(), values.max())
    return np.asarray(image.convert("L"))


def _picture(path: Path) -> np.ndarray:
    with opened(path) as image:
        return grey(upright(image))


def _dicom(path: Path) -> np.ndarray:
    import pydicom
    from pydicom import filereader, uid

    syntax = filereader.read_file_meta_info(path).get("TransferSyntaxUID")
    if syntax == uid.DeflatedExplicitVRLittleEndian:
        # pydicom inflates all of the file, to any length, before its size can be looked at.
        raise UserError(
            f"image {path} is stored as {syntax.name}, which is not read; save it in another "
            "transfer syntax, such as Explicit VR Little Endian."
        )
    data = pydicom.dcmread(path)
    kind = str(data.get("PhotometricInterpretation", "missing"))
    frames = int(data.get("NumberOfFrames") or 1)
    if kind not in MONOCHROME or frames != 1:
        raise UserError(
            f"image {path} has {frames} frames and PhotometricInterpretation {kind}; accepted is "
            f"one frame of {' or '.join(MONOCHROME)}."
        )
    width, height = int(data.Columns), int(data.Rows)
    if not 0 < width * height <= MAX_PIXELS:
        raise UserError(f"image {path} says it is {_too_large(width, height)}.")
    try:
        stored = data.pixel_array
    except (NotImplementedError, RuntimeError) as error:
        name = data.file_meta.TransferSyntaxUID.name
        raise UserError(
            f"image {path} cannot be decoded ({name}: {_short(error)}); where a decoder is missing,"
            " `pip install pylibjpeg pylibjpeg-libjpeg` or `python-gdcm` adds it."
        ) from error
    _drop_empty(data)
    result = _to_uint8(*_shown(stored, data))
    if result.min() == result.max() and stored.min() != stored.max():
        raise UserError(
            f"image {path} has pixels that differ, and its header (rescale, window or table) shows "
            "all of them as one grey; a header that goes with the pixels is needed."
        )
    return 255 - result if kind == "MONOCHROME1" else result


def looks_whole(path: Path) -> str:
    """Return what is wrong with a DICOM file by its header and its length; "" for nothing.

    How many bytes compressed pixels have no header says: of them nothing is found.
    """
    import pydicom
    from pydicom import filereader

    try:
        # Before anything else is read: pydicom inflates a deflated file, to any length.
        syntax = filereader.read_file_meta_info(path).get("TransferSyntaxUID")
        if syntax not in UNCOMPRESSED:
            return ""
        with path.open("rb") as file:
            data = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=[*SIZE])
            there = path.stat().st_size - file.tell() - UNCOMPRESSED[syntax]
        frames = int(data.get("NumberOfFrames") or 1)
        samples = data.Rows * data.Columns * data.SamplesPerPixel * frames
        is_whole = there >= samples * data.BitsAllocated / 8
        return "" if is_whole else "cut off: a DICOM, in its pixels"
    except Exception:  # parsers of damaged files raise nearly every type there is
        return "cut off or damaged: a DICOM without a whole header"


def _drop_empty(data) -> None:
    """Take out elements without a value, and a window narrower than the standard allows."""
    for name in OPTIONAL:
        value = data.get(name)
        if name in data and (value is None or (hasattr(value, "__len__") and not len(value))):
            del data[name]
    if "WindowWidth" in data:
        width = float(np.ravel(data.WindowWidth)[0])
        is_linear = str(data.get("VOILUTFunction", "LINEAR")).upper() == "LINEAR"
        if width < 1 if is_linear else width <= 0:  # PS3.3 C.11.2.1.2.1 and C.11.2.1.3
            del data.WindowWidth


def _shown(stored: np.ndarray, data) -> tuple[np.ndarray, float, float]:
    """Return the values that are shown [H, W], and which of them are black and white."""
    from pydicom import pixels

    values = np.asarray(pixels.apply_modality_lut(stored, data), np.float64)
    if "VOILUTSequence" in data:
        shown = pixels.apply_voi(np.asarray(values, np.int64), data).astype(np.float64)
        return shown, 0.0, 2.0 ** data.VOILUTSequence[0].LUTDescriptor[2] - 1
    if not ("WindowCenter" in data and "WindowWidth" in data):
        return values, *_range(stored, values, data)
    # The ends of the window are what it makes of values far outside.
    shown = pixels.apply_windowing(values, data)
    low, high = pixels.apply_windowing(np.array([-1e12, 1e12]), data)
    # pydicom takes them from the range of the stored values: turned round where the rescale falls.
    return (-shown, -low, -high) if low > high else (shown, low, high)


def _range(stored: np.ndarray, values: np.ndarray, data) -> tuple[float, float]:
    """Return the darkest and brightest value of an image without a window."""
    if data.BitsStored <= 8 and np.array_equal(stored, values) and data.PixelRepresentation == 0:
        return 0.0, 2.0**data.BitsStored - 1
    padding = data.get("PixelPaddingValue")
    inside = values if padding is None else values[stored != int(padding)]
    inside = inside if inside.size else values
    return float(inside.min()), float(inside.max())


def _to_uint8(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map low..high to 0..255; all zero where they are equal."""
    if not high > low:
        return np.zeros(values.shape, np.uint8)
    return np.rint(np.clip((values - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def _too_large(width: int, height: int) -> str:
    return f"{width} x {height} pixels; accepted are 1 to {MAX_PIXELS:,}"


def _short(error: Exception) -> str:
    """Return the first line of a message: the rest of pydicom's lists plugins."""
    return (str(error).strip().splitlines() or ["no message"])[0][:200]
