"""PadChest: radiographs of the Hospital San Juan, Alicante, with 193 labels and Spanish reports.

Source folder: `PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv` (or .gz) and the 16-bit PNG
files, all together in `images/` or beside the table, or in folders named by ImageDir as the zip
archives are numbered.

Findings are the reports: stemmed Spanish words without accents or negation marks. 21 images are
known to be unreadable (`skip_list.csv`, from torchxrayvision) and left out. The source has no
split: 80/10/10 by a hash of the patient; the variant `physician` is all test.
"""

import ast
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from medvlp_jax.data import building, cxr_labels, files, layouts, records

WHERE = "https://bimcv.cipf.es/bimcv-projects/padchest (request form, research use)"
TABLE = layouts.Table(
    tuple(
        f"PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv{suffix}" for suffix in ("", ".gz")
    ),
    (
        ",ImageID,ImageDir,StudyDate_DICOM,StudyID,PatientID,PatientBirth,PatientSex_DICOM,"
        "ViewPosition_DICOM,Projection,MethodProjection,Pediatric,Modality_DICOM,"
        "Manufacturer_DICOM,PhotometricInterpretation_DICOM,PixelRepresentation_DICOM,"
        "PixelAspectRatio_DICOM,SpatialResolution_DICOM,BitsStored_DICOM,WindowCenter_DICOM,"
        "WindowWidth_DICOM,Rows_DICOM,Columns_DICOM,XRayTubeCurrent_DICOM,Exposure_DICOM,"
        "ExposureInuAs_DICOM,ExposureTime,RelativeXRayExposure_DICOM,ReportID,Report,MethodLabel,"
        "Labels,Localizations,LabelsLocalizationsBySentence,labelCUIS,LocalizationsCUIS",
    ),
    WHERE,
)
PROJECTIONS = ("PA", "AP", "AP_horizontal", "L", "COSTAL", "EXCLUDE", "UNK")
FRONTAL = ("PA", "AP", "AP_horizontal")
METHODS = ("Physician", "RNN_model")
HERE = Path(__file__)
LABELS = tuple(json.loads(HERE.with_name("labels.json").read_text())["labels"])


class Builder(building.Builder):
    """TFDS builder of `padchest`."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = f"A folder with {TABLE.names[0]} and the images."
    VARIANTS = {
        "frontal": "PA and AP views, standing or lying.",
        "images": "All projections.",
        "physician": "Frontal views that a physician labelled, all in the test split.",
    }
    PUBLISHED = {"images (all)": 160_861, "labelled by a physician": 39_053}

    def tasks(self):
        return {"finding": LABELS}

    def skip_lists(self):
        rows = files.read_rows(HERE.with_name("skip_list.csv"), columns=("image_id", "reason"))
        return {"padchest/skip_list.csv": [row["image_id"] for row in rows]}

    def samples(self, folder: Path) -> Iterator[building.Sample]:
        needed = ("ImageID", "ImageDir", "PatientID", "StudyID")
        for row in TABLE.rows(folder, filled=needed, unique="ImageID"):
            frontal = row.choice("Projection", PROJECTIONS) in FRONTAL
            method = row.choice("MethodLabel", METHODS)
            if self.variant != "images" and not frontal:
                self.left_out("not frontal (PA, AP, AP_horizontal)")
            elif self.variant == "physician" and method != "Physician":
                self.left_out("not labelled by a physician")
            else:
                yield self._sample(folder, row)

    def _sample(self, folder: Path, row: files.Row) -> building.Sample:
        image, patient = row["ImageID"], row["PatientID"]
        return building.Sample(
            row=row,
            path=_path(folder, row),
            split="test" if self.variant == "physician" else files.split_of(patient),
            image_id=image,
            patient_id=patient,
            study_id=row["StudyID"],
            sections=(" ".join(row["Report"].split()), ""),
            labels={"finding": labels_of(row)},
        )


def _path(folder: Path, row: files.Row) -> Path:
    """Return where this source folder keeps an image; "{dir}" stands for its archive's number."""
    number, image = row["ImageDir"], row["ImageID"]
    layout = _found_layout(folder).format(dir=number)
    path = layouts.member(folder, row, f"{layout}/{image}")
    return path if path.is_file() else layouts.member(folder, row, f"{number}/{image}")


@functools.lru_cache(maxsize=8)
def _found_layout(folder: Path) -> str:
    if (folder / "images").is_dir():
        numbered = (folder / "images/0").is_dir() or (folder / "images/1").is_dir()
        return "images/{dir}" if numbered else "images"
    return "{dir}" if (folder / "0").is_dir() or (folder / "1").is_dir() else "."


def labels_of(row: files.Row) -> np.ndarray:
    """Return the vector over LABELS; all unknown where the table has none ("nan").

    Raises:
      UserError: for what is no list of texts, or an unknown label.
    """
    text = row["Labels"]
    if text in ("", "nan"):
        return records.unknown(LABELS)
    try:
        names = [name.strip().lower() for name in ast.literal_eval(text)]
    except (ValueError, SyntaxError, TypeError, AttributeError, MemoryError, RecursionError):
        raise row.error(f"Labels is '{text[:60]}'; a list of texts is needed.") from None
    return cxr_labels.named(row, "Labels", filter(None, names), LABELS, none="")
