"""Source folders in the real layouts, a few rows of noise images each."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from medvlp_jax.data import corpora


def write_table(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_image(path, seed, shape=(60, 50)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def radiology_folder(tmp_path):
    """Twelve rows: eight train, four val; rows 0 and 1 share a text."""
    folder = tmp_path / "radiology_qa"
    rows = []
    for i in range(12):
        rows.append(
            {
                "image_id": f"syn{i}",
                "file": f"images/syn{i}.jpg",
                "split": "train" if i < 8 else "val",
                "group_id": f"g{i // 2}",
                "source": "vqamed2019",
                "modality_group": "mr",
                "modality": "t2",
                "plane": "axial",
                "organ": "skull and contents#spine and contents",
                "abnormality": f"lesion ({max(i, 1)})#tumour",
                "text_composed": "t2. axial.",
            }
        )
        write_image(folder / f"images/syn{i}.jpg", i)
    write_table(folder / "pairs.csv", rows)
    return folder


@pytest.fixture
def cxr_folder(tmp_path):
    """Three rows: sections and mask; a whole note; no text."""
    folder = tmp_path / "cxr_pairs"
    common = {"split": "train", "offset_days": "3", "has_lung_mask": "0"}
    empty = {"text": "", "findings": "", "discussion": ""}
    parts = {"text": "all", "findings": "Clear lungs.", "discussion": "Normal."}
    rows = [
        {"patient_id": "p0", **common, **parts, "label": "No Finding", "has_lung_mask": "1"},
        {"patient_id": "p1", **common, **empty, "text": "A note.", "label": "Pneumonia;ARDS"},
        {"patient_id": "p2", **common, **empty, "label": ""},
    ]
    rows = [
        {"image_id": f"cxr{i}", "file": f"images/cxr{i}.jpg", **row} for i, row in enumerate(rows)
    ]
    for i in range(3):
        write_image(folder / f"images/cxr{i}.jpg", i, (40, 80))
    write_table(folder / "pairs.csv", rows)
    (folder / "lung_masks").mkdir()
    mask = np.zeros((40, 80), np.uint8)
    mask[10:20, 5:30] = 255
    Image.fromarray(mask).save(folder / "lung_masks/cxr0.png")
    coco = {
        "categories": [{"id": 1, "name": "right lung"}, {"id": 2, "name": "left lung"}],
        "images": [{"id": 7, "image_id": "cxr0", "width": 80, "height": 40}],
        "annotations": [
            {"image_id": 7, "category_id": 1, "bbox": [5, 10, 25, 10]},
            {"image_id": 7, "category_id": 2, "bbox": [40, 0, 40, 40]},
        ],
    }
    (folder / "lung_boxes.json").write_text(json.dumps(coco))
    return folder


@pytest.fixture
def radiology_source(radiology_folder, tmp_path):
    return corpora.open_source(
        "radiology_qa", "train", data_dir=tmp_path / "data", manual_dir=radiology_folder
    )


@pytest.fixture
def edit_table():
    """Return a function that changes one cell, or drops a column, of a CSV file."""

    def edit(path, *, row=0, drop="", **cells):
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        rows[row].update(cells)
        write_table(path, [{k: v for k, v in r.items() if k != drop} for r in rows])

    return edit
