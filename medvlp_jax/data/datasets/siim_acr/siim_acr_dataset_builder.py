"""SIIM-ACR Pneumothorax Segmentation: radiographs of NIH ChestX-ray14 with masks.

Source folder: `train-rle.csv` (its second column is named " EncodedPixels" or "EncodedPixels") or
`stage_2_train.csv`, and `dicom-images-train/<study>/<series>/<ImageId>.dcm`; or the PNG re-pack,
`stage_1_train_images.csv`, `stage_1_test_images.csv`, `png_images/` and `png_masks/`.

Masks are relative run lengths, column by column; an image with several rows has the union of them.
The source names no patients. GLoRIA's split cuts rows, so that images are in several parts; variant
`gloria_legacy` repeats that.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from medvlp_jax.config import UserError
from medvlp_jax.data import building, dicom, files, layouts, masks, splits

WHERE = "https://www.kaggle.com/c/siim-acr-pneumothorax-segmentation (competition rules)"
RUNS = layouts.Table(
    ("train-rle.csv", "train-rle.csv.gz", "stage_2_train.csv"),
    ("ImageId, EncodedPixels", "ImageId,EncodedPixels"),
    WHERE,
)
PNG_WHERE = "https://www.kaggle.com/datasets/vbookshelf/pneumothorax-chest-xray-images-and-masks"
PNG = {
    split: layouts.Table(
        (f"stage_1_{split}_images.csv",), ("new_filename,ImageId,has_pneumo",), PNG_WHERE
    )
    for split in ("train", "test")
}
DICOMS = "dicom-images-train"
FINDING = "Pneumothorax"


class Builder(building.Builder):
    """TFDS builder of `siim_acr`."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = f"A folder with {RUNS.names[0]} and {DICOMS}/."
    VARIANTS = {
        "clean": "GLoRIA's shares, seed and order, cut by image: 70/15/15.",
        "gloria_legacy": "GLoRIA's cut by row: images are in several parts.",
        "png": "The PNG re-pack: its train (a tenth by hash is validation) and test files.",
    }
    MASK_BITS = {"pneumothorax": 0}
    PUBLISHED = {"images": 12_047, "rows": 12_954}

    def tasks(self):
        return {"finding": (FINDING,)}

    def samples(self, folder: Path) -> Iterator[building.Sample]:
        if self.variant == "png":
            return self._png(folder)
        return self._runs(folder)

    def _runs(self, folder: Path) -> Iterator[building.Sample]:
        rows = RUNS.rows(folder, filled=("ImageId",))
        cut = splits.siim_legacy if self.variant == "gloria_legacy" else splits.siim_clean
        parts = cut([row["ImageId"] for row in rows])
        by_image: dict[str, list[files.Row]] = {}
        for row in rows:
            by_image.setdefault(row["ImageId"], []).append(row)
        found = dicoms(folder)
        for split, names in parts.items():
            for name in dict.fromkeys(names):
                yield _of_runs(folder, by_image[name], split, found)

    def _png(self, folder: Path) -> Iterator[building.Sample]:
        for part, table in PNG.items():
            for row in table.rows(folder, filled=("new_filename", "ImageId"), unique="ImageId"):
                split = files.split_of(row["ImageId"]) if part == "train" else "test"
                split = "train" if (part, split) == ("train", "test") else split
                yield _of_png(folder, row, split)


def dicoms(folder: Path) -> Mapping[str, Path]:
    """Return the DICOM files of the source by the image they hold."""
    return {path.stem: path for path in sorted((folder / DICOMS).rglob("*.dcm"))}


def _sample(row: files.Row, path: Path, split: str, positive: bool, **fields) -> building.Sample:
    name = row["ImageId"]
    return building.Sample(
        row=row,
        path=path,
        split=split,
        image_id=name,
        patient_id=name,
        study_id=name,
        labels={"finding": np.array([positive], np.int8)},
        **fields,
    )


def _of_runs(folder: Path, rows: Sequence[files.Row], split: str, found) -> building.Sample:
    texts = [row["EncodedPixels"] for row in rows]
    for row, text in zip(rows, texts, strict=True):
        try:
            masks.check_runs(text)
        except UserError as error:
            raise row.error(str(error)) from None
    positive = any(text not in masks.EMPTY for text in texts)
    missing = layouts.member(folder, rows[0], f"{DICOMS}/{rows[0]['ImageId']}.dcm")
    path = found.get(rows[0]["ImageId"], missing)
    return _sample(rows[0], path, split, positive, mask=functools.partial(union, texts))


def union(texts: Sequence[str], shape: masks.Shape) -> np.ndarray:
    """Return the bit field of all rows of an image."""
    return np.any([masks.from_relative_rle(text, shape) for text in texts], axis=0).astype(np.uint8)


def _of_png(folder: Path, row: files.Row, split: str) -> building.Sample:
    if row["has_pneumo"] not in ("0", "1"):
        raise row.error(f"has_pneumo is '{row['has_pneumo'][:20]}'; accepted are 0 and 1.")
    name = row["new_filename"]
    image = layouts.member(folder, row, f"png_images/{name}")
    mask = layouts.member(folder, row, f"png_masks/{name}")
    positive = row["has_pneumo"] == "1"
    return _sample(row, image, split, positive, mask=functools.partial(read_mask, mask))


def read_mask(path: Path, shape: masks.Shape) -> np.ndarray:
    """Return the bit field of a PNG mask, which has the image's size.

    Raises:
      UserError: for a mask that is missing, damaged or of another size.
    """
    mask = dicom.read(path) > 127
    if mask.shape != shape:
        raise UserError(f"mask {path} is {mask.shape}, and its image {shape}.")
    return mask.astype(np.uint8)
