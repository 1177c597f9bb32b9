"""Frontal chest radiographs with clinical notes, labels, lung boxes and lung masks.

Source folder: `pairs.csv` (one row an image), `images/`, `lung_boxes.json` (COCO, pixels)
and `lung_masks/<image_id>.png` (0 or 255) where a row says it has one.

Sections: where the source separates them, Findings are its imaging notes and Impression its
discussion; otherwise the whole note is Findings and Impression is missing. Labels are paths such
as "Pneumonia/Viral/COVID-19", several joined by ";". A path implies its ancestors; the
descendants of a path that stops early are unknown; every other class is absent.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from medvlp_jax.config import UserError
from medvlp_jax.data import files, records

# The paths with enough images to score; rarer ones count through their ancestors.
FINDINGS = (
    "No Finding",
    "ARDS",
    "Pneumonia",
    "Pneumonia/Bacterial",
    "Pneumonia/Fungal",
    "Pneumonia/Viral",
    "Pneumonia/Viral/COVID-19",
)
TASKS = {"finding": FINDINGS}
MASK_BITS = {"lung": 0}
SPLITS = {"train": "train", "val": "validation", "test": "test"}
Boxes = Mapping[str, list[tuple[tuple[float, float, float, float], str]]]


class Builder(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of `cxr_pairs`."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "A folder with pairs.csv, images/, lung_boxes.json, lung_masks/."
    BUILDER_CONFIGS = (
        tfds.core.BuilderConfig(name="pairs", description="Only the images that have a text."),
        tfds.core.BuilderConfig(name="images", description="All images; a text may be missing."),
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=records.features(tasks=TASKS),
            metadata=records.metadata(tasks=TASKS, mask_bits=MASK_BITS),
        )

    def _split_generators(self, dl_manager):
        folder = Path(dl_manager.manual_dir)
        needed = ("image_id", "file", "split", "patient_id")
        texts = ("label", "text", "findings", "discussion", "offset_days", "has_lung_mask")
        rows = files.read_rows(
            folder / "pairs.csv", columns=(*needed, *texts), filled=needed, unique="image_id"
        )
        files.check_groups(rows, group="patient_id", split="split", accepted=tuple(SPLITS))
        boxes = read_boxes(folder / "lung_boxes.json")
        if self.builder_config.name == "pairs":
            rows = [row for row in rows if row["text"]]
        found = {row["split"] for row in rows}
        return {
            SPLITS[split]: self._generate_examples(
                folder, [row for row in rows if row["split"] == split], boxes
            )
            for split in SPLITS
            if split in found
        }

    def _generate_examples(self, folder: Path, rows: list[files.Row], boxes: Boxes) -> Iterator:
        for row in rows:
            yield row["image_id"], to_record(folder, row, boxes)


def to_record(folder: Path, row: files.Row, boxes: Boxes) -> dict:
    """Return the record of one row of pairs.csv."""
    findings, impression = sections(row)
    return records.record(
        image=files.read_image(files.inside(folder, row, "file"), row),
        image_id=row["image_id"],
        patient_id=row["patient_id"],
        study_id=f"{row['patient_id']}/{row['offset_days']}",
        findings=findings,
        impression=impression,
        labels={"finding": finding_labels(row["label"])},
        boxes=boxes.get(row["image_id"], ()),
        mask=lung_mask(folder, row) if row["has_lung_mask"] == "1" else b"",
    )


def sections(row: files.Row) -> tuple[str, str]:
    """Return (findings, impression) of a row; the whole note is findings where it has no parts."""
    if row["findings"] or row["discussion"]:
        return row["findings"], row["discussion"]
    return row["text"], ""


def finding_labels(label: str) -> np.ndarray:
    """Return the label vector over FINDINGS of a path or several joined by ";"."""
    paths = [f"{path.strip()}/" for path in label.split(";") if path.strip()]
    if not paths:
        return records.unknown(FINDINGS)
    vector = np.full(len(FINDINGS), records.ABSENT, np.int8)
    for i, name in enumerate(FINDINGS):
        if any(path.startswith(f"{name}/") for path in paths):
            vector[i] = records.PRESENT
        elif any(f"{name}/".startswith(path) for path in paths):
            vector[i] = records.UNKNOWN
    return vector


def lung_mask(folder: Path, row: files.Row) -> bytes:
    """Return the lung mask of a row as a PNG bit field."""
    path = files.inside(folder / "lung_masks", row, "image_id", suffix=".png")
    files.read_image(path, row, format="PNG")
    with Image.open(path) as mask:
        return records.encode_mask((np.asarray(mask.convert("L")) > 127) << MASK_BITS["lung"])


def read_boxes(path: Path) -> Boxes:
    """Return per image_id ((ymin, xmin, ymax, xmax) as fractions, phrase) from a COCO file.

    Raises:
      UserError: if the file is missing, no JSON, or lacks a COCO key.
    """
    try:
        coco = json.loads(path.read_text(encoding="utf-8"))
        phrases = {c["id"]: c["name"] for c in coco["categories"]}
        images = {i["id"]: i for i in coco["images"]}
        boxes: dict[str, list] = {}
        for annotation in coco["annotations"]:
            image = images[annotation["image_id"]]
            x, y, width, height = annotation["bbox"]
            corners = np.array([y, x, y + height, x + width], float)
            corners /= (image["height"], image["width"]) * 2
            box = tuple(np.clip(corners, 0, 1).tolist())
            boxes.setdefault(image["image_id"], []).append(
                (box, phrases[annotation["category_id"]])
            )
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; a COCO file with the lung boxes is needed.") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {str(error)[:80]}); accepted is COCO "
            "JSON with categories, images (id, image_id, width, height) and annotations (image_id, "
            "category_id, bbox)."
        ) from error
    return boxes
