"""Images of a source folder as what records store: encoded bytes, at full size or pre-resized.

A JPEG or an 8-bit PNG at full size goes in as the bytes it is. Everything else, DICOM, deeper PNG,
what is resized and what its EXIF orientation turns, becomes a JPEG of quality 95, grey unless
colours are asked for, so that the pipeline can decode it at reduced scale.
"""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from medvlp_jax.config import UserError
from medvlp_jax.data import dicom, files

AS_THEY_ARE = {"JPEG": ("L", "RGB"), "PNG": ("L", "RGB")}


class Encoded(NamedTuple):
    """An image as a record holds it, and the size [H, W] of the source as viewers show it.

    Boxes and masks refer to that.
    """

    content: bytes
    shape: tuple[int, int]


def load(path: Path, *, side: int = 0, channels: int = 1) -> Encoded:
    """Read an image, decoding it once so that a damaged one is refused.

    Args:
      path: DICOM, JPEG or PNG.
      side: the shorter side of what is stored, pixels; 0, or more than the image has, keeps it.
      channels: 3 leaves what is not kept as it is its colours; DICOM and deeper PNG have none here.

    Raises:
      UserError: with the file's name, for a file that is missing, damaged or no image.
    """
    if path.suffix.lower() in dicom.SUFFIXES:
        pixels = dicom.read(path)
        return Encoded(_jpeg(Image.fromarray(pixels), side), pixels.shape)
    try:
        content = path.read_bytes()
        with dicom.opened(io.BytesIO(content)) as image:
            shape = dicom.shown_shape(image)
            kept = not 0 < side < min(shape)
            if not kept and image.format == "JPEG":
                # Decoded at 1/2, 1/4 or 1/8 where that is enough.
                image.draft("L" if channels == 1 else "RGB", (side, side))
            shown = dicom.upright(image)
            if kept and shown is image and image.mode in AS_THEY_ARE.get(image.format, ()):
                return Encoded(content, shape)
            if channels == 3 and not files.is_deep(image.mode):
                return Encoded(_jpeg(shown.convert("RGB"), side), shape)
            return Encoded(_jpeg(Image.fromarray(dicom.grey(shown)), side), shape)
    except FileNotFoundError:
        raise UserError(f"image {path} is missing.") from None
    except Exception as error:
        # Decoders of damaged files raise many types; all of them mean this.
        raise UserError(
            f"image {path} cannot be decoded ({type(error).__name__}: {str(error)[:200]}); a whole "
            "JPEG, PNG or DICOM file is needed."
        ) from error


def resize_mask(mask: np.ndarray, side: int) -> np.ndarray:
    """Return a uint8 bit field [H, W] in the size `load` gives an image; nearest pixel."""
    if not 0 < side < min(mask.shape):
        return mask
    size = _size(mask.shape[1], mask.shape[0], side)
    return np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))


def looks_whole(path: Path) -> str:
    """Return what is wrong with an image at a look at its head and its end; "" for nothing.

    Finds missing, empty, cut off and renamed files without decoding them, in about the time of
    opening them.
    """
    try:
        with path.open("rb") as file:
            head = file.read(132)
            file.seek(0, io.SEEK_END)
            file.seek(max(0, file.tell() - 64))
            tail = file.read()
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"unreadable ({error.strerror})"
    if not head:
        return "empty"
    if head[128:] == b"DICM":
        return "" if path.suffix.lower() in dicom.SUFFIXES else "a DICOM file by another name"
    if head.startswith(b"\xff\xd8"):
        # Some writers pad after the end marker.
        return "" if b"\xff\xd9" in tail else "cut off: a JPEG without its end marker"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "" if b"IEND" in tail else "cut off: a PNG without its last chunk"
    return "neither JPEG, PNG nor DICOM"


def _jpeg(image: Image.Image, side: int) -> bytes:
    if 0 < side < min(image.size):
        image = image.resize(_size(*image.size, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=files.QUALITY)
    return buffer.getvalue()


def _size(width: int, height: int, side: int) -> tuple[int, int]:
    """Return (width, height) with the shorter one `side`."""
    scale = side / min(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))
