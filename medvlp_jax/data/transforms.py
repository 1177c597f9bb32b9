"""Images from encoded bytes to training views: uint8 in, uint8 out, [H, W, C] with C = 1 or 3.

Stages 1 and 2 of IMITATE (https://arxiv.org/abs/2310.07355). Pixels are 0..255. Coordinates of the
warps are continuous pixels (x right, y down), pixel (i, j) covering [j, j+1) x [i, i+1).
Our choices: JPEG is decoded at reduced scale, resizing averages where it shrinks, and one
projective resampling does flips, rotation and perspective together (bilinear), so that pixels
rotated out of the crop may come back at a corner where the paper's chain has black.
"""

import io

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from medvlp_jax.config import UserError
from medvlp_jax.data import dicom

FITS = ("squash", "pad")
_MODES = {1: "L", 3: "RGB"}


def decode(
    encoded: bytes,
    *,
    size: int,
    channels: int = 1,
    crop_black_border: bool = True,
    stretch: bool = True,
    legacy_wrap: bool = False,
    fit: str = "squash",
) -> np.ndarray:
    """Decode, crop to the non-zero pixels, stretch to 0..255, resize: IMITATE stage 1.

    Args:
      encoded: JPEG or PNG file contents.
      size: side of the result, pixels.
      channels: 1 (grey) or 3.
      crop_black_border: cut rows and columns off the sides that hold only zeros.
      stretch: map the darkest pixel to 0 and the brightest to 255.
      legacy_wrap: the released code's stretch to 256, where pixels that reach 256 become 0.
      fit: "squash" changes the aspect ratio; "pad" keeps it, with zeros on the short sides
        (without legacy_wrap).

    Returns:
      [size, size, channels] uint8.

    Raises:
      UserError: for another fit.
    """
    if fit not in FITS:
        raise UserError(f"fit is '{fit}'; accepted are {' and '.join(FITS)}.")
    image = _opened(encoded, size, channels)
    if crop_black_border:
        image = image.crop(image.getbbox())
    if legacy_wrap:
        return _wrapped_stretch(image, size)
    if stretch:
        image = _to_pil(stretched(_pixels(image)))
    if fit == "pad":
        image = ImageOps.pad(image, (size, size), Image.Resampling.BILINEAR)
    else:
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(size, size, channels)


def placed(
    boxes: np.ndarray,
    encoded: bytes,
    *,
    size: int,
    channels: int = 1,
    crop_black_border: bool = True,
    fit: str = "squash",
) -> np.ndarray:
    """Return where boxes of the stored image lie in what `decode` makes of it, in its pixels.

    Args:
      boxes: [n, 4], (ymin, xmin, ymax, xmax) as fractions of the stored image.
      encoded: as for `decode`, and so are the rest.
    """
    image = _opened(encoded, size, channels)
    left, top, right, bottom = (0, 0, *image.size)
    if crop_black_border:
        left, top, right, bottom = image.getbbox() or (left, top, right, bottom)
    width, height = right - left, bottom - top
    scale = np.array([size / height, size / width])
    if fit == "pad":
        scale = np.full(2, scale.min())
    # What `ImageOps.pad` leaves free lies evenly on both sides.
    offset = (size - scale * (height, width)) / 2
    corners = boxes.reshape(-1, 2, 2) * (image.height, image.width) - (top, left)
    return (corners * scale + offset).reshape(-1, 4)


def imitate_view(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    size: int,
    flip_horizontal: float = 0.5,
    flip_vertical: float = 0.5,
    rotation: float = 30.0,
    perspective: float = 0.5,
    perspective_probability: float = 0.5,
    autocontrast: float = 0.5,
) -> np.ndarray:
    """Return one random view: IMITATE stage 2, less its random grey, which changes no grey image.

    Args:
      image: [R, R, C] uint8, R >= size.
      rng: source of all randomness of this view.
      size: side of the random crop and of the result, pixels.
      flip_horizontal: probability of a left-right flip.
      flip_vertical: probability of an upside-down flip.
      rotation: largest angle either way, degrees.
      perspective: how far a corner may move, as a fraction of half the side.
      perspective_probability: probability of a perspective change.
      autocontrast: probability of stretching the view to 0..255.

    Returns:
      [size, size, C] uint8, black where the warp looks outside the crop.
    """
    top = rng.integers(image.shape[0] - size + 1)
    left = rng.integers(image.shape[1] - size + 1)
    view = image[top : top + size, left : left + size]
    # The view is the image under flip, then rotation, then perspective; sampling needs the inverse.
    to_source = np.eye(3)
    if rng.random() < flip_horizontal:
        to_source = to_source @ np.array([[-1, 0, size], [0, 1, 0], [0, 0, 1]])
    if rng.random() < flip_vertical:
        to_source = to_source @ np.array([[1, 0, 0], [0, -1, size], [0, 0, 1]])
    if rotation:
        to_source = to_source @ rotation_map(rng.uniform(-rotation, rotation), size)
    if rng.random() < perspective_probability:
        to_source = to_source @ perspective_map(rng, perspective, size)
    view = warp(view, to_source)
    return stretched(view) if rng.random() < autocontrast else view


def cfcml_view(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    size: int,
    probability: float = 0.5,
    flip: float = 0.5,
    shift: float = 0.0625,
    scale: float = 0.5,
    rotation: float = 45.0,
    moved: float = 0.5,
    quarter_turn: float = 0.5,
    contrast: float = 0.2,
) -> np.ndarray:
    """Return one random view of a skin lesion: CFCML section 2.5.2.

    Flips, move and rotation are one bilinear resampling; what lies outside is mirrored.

    Args:
      image: [R, R, C] uint8, R >= size; the central square of `size` is what is moved.
      rng: source of all randomness of this view.
      size: side of the result, pixels.
      probability: of changing the image at all.
      flip: probability of a flip, for each axis.
      shift: largest move, as a fraction of the side.
      scale: largest change of size, as a fraction.
      rotation: largest angle either way, degrees.
      moved: probability of shift, scale and rotation, together.
      quarter_turn: probability of a turn by a random multiple of 90 degrees.
      contrast: largest change of brightness and contrast, as a fraction; half of the views.

    Returns:
      [size, size, C] uint8.
    """
    view = center_view(image, size=size)
    if rng.random() >= probability:
        return view
    to_source = np.eye(3)
    for axis in range(2):
        if rng.random() < flip:
            mirror = np.eye(3)
            mirror[axis, axis], mirror[axis, 2] = -1, size
            to_source = to_source @ mirror
    if rng.random() < moved:
        zoom = np.diag([1 / rng.uniform(1 - scale, 1 + scale)] * 2 + [1])
        zoom[:2, 2] = size / 2 * (1 - zoom[0, 0]) + rng.uniform(-shift, shift, 2) * size
        to_source = to_source @ zoom @ rotation_map(rng.uniform(-rotation, rotation), size)
    if not np.array_equal(to_source, np.eye(3)):
        view = warp(view, to_source, mirror=True)
    if rng.random() < quarter_turn:
        view = np.ascontiguousarray(np.rot90(view, int(rng.integers(4))))
    if rng.random() < 0.5:
        gain, offset = 1 + rng.uniform(-contrast, contrast), rng.uniform(-contrast, contrast)
        view = _looked_up(view, np.arange(256) * gain + offset * 255)
    return view


def prima_view(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    size: int,
    smallest: float = 0.6,
    flip: float = 0.5,
    rotation: float = 20.0,
    jitter: float = 0.2,
    hue: float = 0.05,
) -> np.ndarray:
    """Return one random view: crop of random size, flips, rotation, colour; our choice for PRIMA.

    Crop, flips and rotation are one bilinear resampling; what lies outside is mirrored.

    Args:
      image: [R, R, C] uint8.
      rng: source of all randomness of this view.
      size: side of the result, pixels.
      smallest: smallest share of the image's area that is kept, at an aspect of 3/4 to 4/3.
      flip: probability of a flip, for each axis.
      rotation: largest angle either way, degrees.
      jitter: largest relative change of brightness, contrast and saturation.
      hue: largest turn of the hue, as a share of the circle; for colour images.

    Returns:
      [size, size, C] uint8.
    """
    side = image.shape[0]
    area, ratio = rng.uniform(smallest, 1), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    box = np.minimum(np.sqrt(area * np.array([ratio, 1 / ratio])), 1) * side  # width, height
    corner = rng.uniform(0, 1, 2) * (side - box)
    sign = np.where(rng.random(2) < flip, -1, 1)
    to_source = np.diag([*(sign * box / size), 1.0])
    to_source[:2, 2] = corner + np.where(sign < 0, box, 0)
    to_source = to_source @ rotation_map(rng.uniform(-rotation, rotation), size)
    return _coloured(warp(image, to_source, mirror=True, size=size), rng, jitter, hue)


def _coloured(image, rng, jitter, hue):
    """Change brightness, contrast and, of colour images, saturation and hue."""
    changed = _to_pil(image)
    kinds = [ImageEnhance.Brightness, ImageEnhance.Contrast]
    kinds += [ImageEnhance.Color] if image.shape[-1] == 3 else []
    for kind in kinds:
        changed = kind(changed).enhance(rng.uniform(1 - jitter, 1 + jitter))
    if image.shape[-1] == 3 and hue:
        bands = np.array(changed.convert("HSV"))
        bands[..., 0] += np.uint8(round(rng.uniform(-hue, hue) * 255) % 256)
        changed = Image.fromarray(bands, "HSV").convert("RGB")
    return _pixels(changed)


def center_view(
    image: np.ndarray, rng: np.random.Generator | None = None, *, size: int
) -> np.ndarray:
    """Return the central [size, size, C] of an image; takes `rng` to stand in for a random view."""
    top = (image.shape[0] - size) // 2
    left = (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]


def mask_lower_edge(image: np.ndarray, fraction: float) -> np.ndarray:
    """Return a copy whose lowest `fraction` of rows is black: hides text burned in there."""
    masked = image.copy()
    masked[image.shape[0] - round(fraction * image.shape[0]) :] = 0
    return masked


def rotation_map(degrees: float, size: int) -> np.ndarray:
    """Return the matrix that takes output to source coordinates, turning anticlockwise."""
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    c = size / 2
    return np.array(
        [[cos, -sin, c - cos * c + sin * c], [sin, cos, c - sin * c - cos * c], [0, 0, 1]]
    )


def perspective_map(rng: np.random.Generator, distortion: float, size: int) -> np.ndarray:
    """Return the matrix that takes output to source coordinates when the corners move inwards.

    Each corner moves by up to distortion * size / 2 pixels along each axis, uniform.
    """
    corners = np.array([[0, 0], [size, 0], [size, size], [0, size]], float)
    inwards = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])
    moved = corners + inwards * rng.uniform(0, distortion * size / 2, (4, 2))
    return homography(moved, corners)


def homography(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return the 3x3 matrix H, H[2, 2] = 1, with H (x, y, 1) ~ (u, v, 1) for four point pairs.

    Args:
      source: (x, y) of four points, no three on a line [4, 2].
      target: their images (u, v) [4, 2].
    """
    x, y = source.T
    u, v = target.T
    zero, one = np.zeros(4), np.ones(4)
    rows_u = np.stack([x, y, one, zero, zero, zero, -u * x, -u * y], 1)
    rows_v = np.stack([zero, zero, zero, x, y, one, -v * x, -v * y], 1)
    h = np.linalg.solve(np.concatenate([rows_u, rows_v]), np.concatenate([u, v]))
    return np.append(h, 1.0).reshape(3, 3)


def warp(
    image: np.ndarray, to_source: np.ndarray, *, mirror: bool = False, size: int = 0
) -> np.ndarray:
    """Resample an image bilinearly; outside it is black, or mirrored as far as one side away.

    Args:
      image: [H, W, C] uint8.
      to_source: 3x3 matrix from output to source coordinates (x, y, 1), pixel centres at .5.
      mirror: continue the image beyond its edges.
      size: side of the result; 0 is that of the image.

    Returns:
      [H, W, C] uint8.
    """
    height, width, channels = image.shape
    out = (size, size) if size else (width, height)
    if mirror:
        image = np.pad(image, ((height, height), (width, width), (0, 0)), "symmetric")
        to_source = np.array([[1, 0, width], [0, 1, height], [0, 0, 1]]) @ to_source
    coefficients = (to_source / to_source[2, 2]).ravel()[:8]
    warped = _to_pil(image).transform(
        out,
        Image.Transform.PERSPECTIVE,
        coefficients.tolist(),
        Image.Resampling.BILINEAR,
    )
    return np.asarray(warped).reshape(out[1], out[0], channels)


def stretched(image: np.ndarray) -> np.ndarray:
    """Map the darkest pixel to 0, the brightest to 255, all channels alike; a flat image stays."""
    low, high = int(image.min()), int(image.max())
    if low == high:
        return image
    return _looked_up(image, (np.arange(256) - low) * 255 / (high - low))


def _looked_up(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Replace every value of a uint8 image by what the table [256] has for it, 0..255, rounded."""
    # `take` needs a third of the time of table[image].
    return np.rint(np.clip(table, 0, 255)).astype(np.uint8).take(image)


def _opened(encoded: bytes, size: int, channels: int) -> Image.Image:
    image = Image.open(io.BytesIO(encoded))
    # Pillow decodes at 1/2, 1/4 or 1/8 where that is still at least this large.
    image.draft(_MODES[channels], (size, size))
    return dicom.upright(image).convert(_MODES[channels])


def _to_pil(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).reshape(image.height, image.width, -1)


def _wrapped_stretch(image: Image.Image, size: int) -> np.ndarray:
    """Stretch to 256, squash, and let uint8 wrap 256 to 0, as the released code does."""
    pixels = _pixels(image).astype(np.float32)
    low, high = pixels.min(), pixels.max()
    pixels = (pixels - low) * (256 / max(high - low, 1))
    resized = [
        np.asarray(Image.fromarray(band).resize((size, size), Image.Resampling.BILINEAR))
        for band in np.moveaxis(pixels, -1, 0)
    ]
    return (np.stack(resized, -1).astype(np.int32) % 256).astype(np.uint8)
