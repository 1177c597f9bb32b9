"""Object-CXR: radiographs with foreign objects as boxes, ellipses and polygons.

Source folder: `train.csv`, `dev.csv` (`image_name,annotation`), `test.csv`
(`image_path,annotation`) where it is there, `train/`, `dev/`, `test/`. An annotation holds objects
joined by ";", each "type n n ...": 0 a rectangle and 1 an ellipse, x1 y1 x2 y2; 2 a polygon, x y
pairs; empty for none. CC BY-NC 4.0. The challenge's site no longer serves the files, the torrent
has train and dev only: compare the hashes that `medvlp data check` prints with those of others.
"""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from medvlp_jax.data import building, files, layouts, masks

WHERE = "https://academictorrents.com/details/fdc91f11d7010f7259a05403fc9d00079a09f5d5, or a mirror"
SPLITS = {"train": "train", "dev": "validation", "test": "test"}
COLUMNS = ("image_name", "image_path")
PHRASE = "Foreign object"
RECTANGLE, ELLIPSE, POLYGON = "0", "1", "2"


class Shape(NamedTuple):
    """An object: its type and its points (x, y) in pixels."""

    kind: str
    points: tuple[tuple[float, float], ...]

    @property
    def box(self) -> masks.Box:
        """The box around it."""
        x, y = zip(*self.points, strict=True)
        return min(x), min(y), max(x), max(y)


class Builder(building.Builder):
    """TFDS builder of `object_cxr`."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = "A folder with train.csv, dev.csv, test.csv and their images."
    VARIANTS = {"objects": "All images; dev is the validation split."}
    MASK_BITS = {"object": 0}
    PUBLISHED = {"train": 8_000, "validation": 1_000, "test": 1_000}

    def tasks(self):
        return {"finding": (PHRASE,)}

    def samples(self, folder: Path) -> Iterator[building.Sample]:
        headers = tuple(f"{column},annotation" for column in COLUMNS)
        for part, split in SPLITS.items():
            table = layouts.Table((f"{part}.csv",), headers, WHERE)
            if part == "test" and table.find(folder) is None:
                continue  # never published with the rest
            for row in table.rows(folder):
                yield _sample(folder, row, part, split)


def _sample(folder: Path, row: files.Row, part: str, split: str) -> building.Sample:
    column = next(name for name in COLUMNS if name in row.cells)
    layouts.member(folder, row, row[column])
    name = f"{part}/{PurePosixPath(row[column]).name}"
    shapes = parse(row)
    return building.Sample(
        row=row,
        path=layouts.member(folder, row, name),
        split=split,
        image_id=name,
        patient_id=name,
        study_id=name,
        labels={"finding": np.array([bool(shapes)], np.int8)},
        boxes=[(shape.box, PHRASE) for shape in shapes],
        mask=functools.partial(fill, shapes),
    )


def parse(row: files.Row) -> list[Shape]:
    """Return the objects of an annotation.

    Raises:
      UserError: for an unknown type, or too few numbers or an odd number of them.
    """
    shapes = []
    for text in filter(None, map(str.strip, row["annotation"].split(";"))):
        kind, *words = text.split()
        try:
            numbers = [float(word) for word in words]
        except ValueError:
            numbers = []
        enough = len(numbers) >= 6 if kind == POLYGON else len(numbers) == 4
        if (
            kind not in (RECTANGLE, ELLIPSE, POLYGON)
            or not enough
            or len(numbers) % 2
            or not np.isfinite(numbers).all()
        ):
            raise row.error(
                f"annotation has '{text[:60]}'; accepted are '0 x1 y1 x2 y2', '1 x1 y1 x2 y2' and "
                "'2 x y x y x y ...'."
            )
        points = tuple(zip(numbers[::2], numbers[1::2], strict=True))
        shapes.append(Shape(kind, points))
    return shapes


def fill(shapes: Sequence[Shape], size: masks.Shape) -> np.ndarray:
    """Return the bit field of all objects."""
    mask = np.zeros(size, bool)
    for shape in shapes:
        if shape.kind == RECTANGLE:
            mask |= masks.from_box(shape.box, size)
        elif shape.kind == ELLIPSE:
            mask |= masks.from_ellipse(shape.box, size)
        else:
            mask |= masks.from_polygon(shape.points, size)
    return mask.astype(np.uint8)
