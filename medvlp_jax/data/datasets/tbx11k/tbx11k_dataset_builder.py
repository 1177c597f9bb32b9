"""TBX11K: radiographs with boxes of tuberculosis (Liu et al. 2020).

Source folder: `annotations/json/TBX11K_train.json`, `TBX11K_val.json` (COCO) and `imgs/`. Images
that a file does not list, healthy or sick without tuberculosis, come from `lists/TBX11K_train.txt`
and `lists/TBX11K_val.txt` where these are there. The labels of the test images are not published.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from medvlp_jax.config import UserError
from medvlp_jax.data import building, files, layouts

WHERE = "https://mmcheng.net/tb/ (TBX11K)"
CLASSES = ("ActiveTuberculosis", "ObsoletePulmonaryTuberculosis", "PulmonaryTuberculosis")
SPLITS = {"train": "train", "val": "validation"}


class Builder(building.Builder):
    """TFDS builder of `tbx11k`."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = "A folder with annotations/json/, imgs/ and lists/ of TBX11K."
    VARIANTS = {"boxes": "The training and the validation images."}
    PUBLISHED = {"train + validation": 8_400}

    def tasks(self):
        return {"finding": CLASSES}

    def samples(self, folder: Path) -> Iterator[building.Sample]:
        found = [part for part in SPLITS if (folder / coco_of(part)).is_file()]
        for part in found or ["train"]:
            boxes = read_coco(folder, coco_of(part))
            names = dict.fromkeys(boxes)
            if (folder / f"lists/TBX11K_{part}.txt").is_file():
                listed = layouts.lines(folder, f"lists/TBX11K_{part}.txt", WHERE)
                names |= dict.fromkeys(row["line"] for row in listed)
            for name in names:
                row = files.Row(folder / coco_of(part), 1, {"file_name": name})
                kinds = {kind for _, kind in boxes.get(name, ())}
                yield building.Sample(
                    row=row,
                    path=layouts.member(folder, row, f"imgs/{name}"),
                    split=SPLITS[part],
                    image_id=name,
                    patient_id=name,
                    study_id=name,
                    labels={"finding": np.array([kind in kinds for kind in CLASSES], np.int8)},
                    boxes=boxes.get(name, ()),
                )


def coco_of(part: str) -> str:
    """Return the annotations of a part."""
    return f"annotations/json/TBX11K_{part}.json"


def read_coco(folder: Path, name: str) -> dict[str, list]:
    """Return ((xmin, ymin, xmax, ymax), class) by file name.

    Raises:
      UserError: for a file that is missing or no COCO JSON, or an unknown class.
    """
    path = folder / name
    if not path.is_file():
        raise UserError(f"{path} is missing; get it from {WHERE}.")
    try:
        coco = json.loads(path.read_text(encoding="utf-8"))
        kinds = {entry["id"]: entry["name"] for entry in coco["categories"]}
        names = {entry["id"]: str(entry["file_name"]) for entry in coco["images"]}
        found: dict[str, list] = {name: [] for name in names.values()}
        for entry in coco["annotations"]:
            x, y, width, height = map(float, entry["bbox"])
            box = (x, y, x + width, y + height)
            found[names[entry["image_id"]]].append((box, kinds[entry["category_id"]]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {str(error)[:80]}); accepted is COCO "
            "JSON with categories, images (id, file_name) and annotations (image_id, category_id, "
            "bbox)."
        ) from error
    if unknown := {kind for boxes in found.values() for _, kind in boxes} - {*CLASSES}:
        raise UserError(f"{path} has the class {min(unknown)!r}; known: {', '.join(CLASSES)}.")
    return found
