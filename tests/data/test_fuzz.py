"""Damaged source folders of every kind: a clear error or a correct record, nothing else.

A case is a function of its number. The fast suite runs some hundred, `--slow` more than 10,000.
An error is one UserError with a message; anything else that is raised fails the case, as do a path
outside the folder, a row that is neither a sample nor counted, and a case that takes seconds.
"""

import io
import time
import warnings

import layout_writers as layouts
import numpy as np
import pytest
from PIL import Image
from test_dicom import write_dicom

from medvlp_jax.config import UserError
from medvlp_jax.data import building, corpora, dicom, images, masks

FEW = 12
MANY = {"tables": 500, "masks": 1500, "images": 1500}
SLOWEST = 20.0  # seconds; machines that test are busy

NASTY = (
    "",
    " ",
    "-1",
    "nan",
    "inf",
    "1e309",
    "0x10",
    "../../../etc/passwd",
    "/etc/passwd",
    "~/x",
    "..",
    ".",
    "a\\..\\b",
    "a\0b",
    "A" * 5000,
    "x/" * 3000,
    "٣",
    "²",
    "\u202e",
    "%s%n",
    "[[[[[",
    "['" * 200,
    "__import__('os').getcwd()",
    "{}",
    "1;2;3",
    "2 1 2 3",
    "0 1 2 3 nan",
    "99999999999999999999",
    "1_000",
    "Frontal",
    "train",
)
# One row of the table is one sample or counted: nothing may vanish.
ROW_BY_ROW = ("mimic_cxr", "chexpert", "chexpert_plus", "padchest", "rocov2", "nih_cxr14")


def bytes_changed(content, rng):
    """Return a file with bytes flipped, cut out, doubled or put in."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 6)):
        if not content:
            break
        at = int(rng.integers(len(content)))
        kind = rng.integers(5)
        if kind == 0:
            content[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            content[at : at + int(rng.integers(1, 64))] = b""
        elif kind == 2:
            content[at:at] = content[at : at + int(rng.integers(1, 64))]
        elif kind == 3:
            content[at:at] = rng.bytes(int(rng.integers(1, 16)))
        else:
            del content[at:]
    return bytes(content)


def cell_changed(content, rng):
    """Return a table with one cell replaced by something nasty, and whether it was in a row."""
    lines = content.decode().splitlines()
    at = int(rng.integers(len(lines)))
    cells = lines[at].split(",")
    word = NASTY[rng.integers(len(NASTY))].replace("\n", " ")
    cells[rng.integers(len(cells))] = word
    lines[at] = ",".join(cells)
    return ("\n".join(lines) + "\n").encode(errors="surrogatepass"), at > 0


def settled(action):
    """Return what an action returns, or None after a UserError with a message."""
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom and Pillow warn of what they then read
            return action()
    except UserError as error:
        if not str(error).strip():
            pytest.fail("an error without a message")
        return None
    finally:
        if time.perf_counter() - start > SLOWEST:
            pytest.fail(f"a case took more than {SLOWEST} seconds")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a function that gives a corpus' source folder, its builder and its tables."""
    made = {}

    def folder_of(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            options = {"zipped": True} if name == "mimic_cxr" else {}
            layouts.WRITERS[name](folder, **options)
            suffixes = (".csv", ".gz", ".txt", ".json", ".zip")
            tables = {p: p.read_bytes() for p in folder.rglob("*") if p.suffix in suffixes}
            builder = corpora.builder(name, data_dir=folder / "none")
            count = len(builder.kept(folder)) + sum(builder.info.metadata["left_out"].values())
            made[name] = folder, builder, dict(sorted(tables.items())), count
        return made[name]

    return folder_of


def damaged_table(folders, name, number):
    """Damage one table of a corpus and read the folder."""
    folder, builder, tables, count = folders(name)
    rng = np.random.default_rng((1, number))
    path = list(tables)[number % len(tables)]
    whole = tables[path]
    is_row = False
    if path.suffix == ".csv" and rng.random() < 0.7:
        content, is_row = cell_changed(whole, rng)
    else:
        content = bytes_changed(whole, rng)
    path.write_bytes(content)
    try:
        samples = settled(lambda: builder.kept(folder))
    finally:
        path.write_bytes(whole)
    if samples is None:
        return
    for sample in samples:
        assert sample.path.is_relative_to(folder)
        assert ".." not in sample.path.parts
        assert sample.split in building.SPLITS
        assert all(label.dtype == np.int8 for label in sample.labels.values())
    record = settled(lambda: builder.to_record(samples[number % len(samples)]))
    assert record is None or record["image"].getvalue()
    if is_row and name in ROW_BY_ROW:
        assert len(samples) + sum(builder.info.metadata["left_out"].values()) == count


def region(number):
    """Read generated run lengths, polygons and boxes."""
    rng = np.random.default_rng((2, number))
    words = [*map(str, rng.integers(-3, 90, int(rng.integers(0, 9))))]
    if rng.random() < 0.3:
        words.insert(0, NASTY[rng.integers(len(NASTY))])
    shape = tuple(map(int, rng.integers(1, 12, 2)))
    for read in (masks.from_relative_rle, masks.from_rle):
        mask = settled(lambda read=read: read(" ".join(words), shape))
        assert mask is None or (mask.shape == shape and mask.dtype == bool)
    points = rng.normal(5, 10, (int(rng.integers(0, 7)), 2))
    points[rng.random(points.shape) < 0.02] = rng.choice([np.nan, np.inf, 1e300])
    filled = settled(lambda: masks.from_polygon(points, shape))
    assert filled is None or filled.shape == shape
    found = settled(lambda: masks.fractions(tuple(rng.normal(5, 9, 4)), shape))
    assert found is None or all(0 <= edge <= 1 for edge in found)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return whole files to damage: DICOM of three kinds, JPEG, PNG of 8 and 16 bits."""
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (24, 31)).astype(np.uint8)
    write_dicom(folder / "a.dcm", pixels, bits=8)
    window = {"WindowCenter": 900, "WindowWidth": 800, "RescaleSlope": 2, "RescaleIntercept": -9}
    write_dicom(folder / "b.dcm", pixels * 16, bits=12, kind="MONOCHROME1", **window)
    write_dicom(folder / "c.dcm", pixels, bits=8, jpeg=True)
    Image.fromarray(pixels).save(folder / "a.jpg")
    Image.fromarray(pixels).save(folder / "a.png")
    Image.fromarray(pixels.astype(np.uint16) * 200).save(folder / "b.png")
    return {path: path.read_bytes() for path in sorted(folder.iterdir())}


def damaged_image(whole, number):
    """Damage an image and read it, at full size and resized."""
    rng = np.random.default_rng((3, number))
    path = list(whole)[number % len(whole)]
    damaged = path.with_name(f"damaged{path.suffix}")
    damaged.write_bytes(bytes_changed(whole[path], rng))
    pixels = settled(lambda: dicom.read(damaged))
    assert pixels is None or (pixels.dtype == np.uint8 and pixels.ndim == 2 and pixels.size)
    stored = settled(lambda: images.load(damaged, side=int(rng.integers(0, 20))))
    if stored is not None:
        with Image.open(io.BytesIO(stored.content)) as image:
            assert image.format in ("JPEG", "PNG")
        assert min(stored.shape) > 0
    assert isinstance(images.looks_whole(damaged), str)


@pytest.mark.parametrize("name", sorted(layouts.WRITERS))
def test_damaged_tables_are_refused_or_read(folders, name):
    for number in range(FEW):
        damaged_table(folders, name, number)


def test_generated_regions_are_refused_or_filled():
    for number in range(10 * FEW):
        region(number)


def test_damaged_images_are_refused_or_decoded(whole):
    for number in range(10 * FEW):
        damaged_image(whole, number)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(layouts.WRITERS))
def test_many_damaged_tables(folders, name):
    for number in range(FEW, FEW + MANY["tables"]):
        damaged_table(folders, name, number)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(2))
def test_many_regions_and_images(whole, part):
    for number in range(part * MANY["masks"], (part + 1) * MANY["masks"]):
        region(10 * FEW + number)
        damaged_image(whole, 10 * FEW + number)
