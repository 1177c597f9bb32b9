import csv
import io
import math

import numpy as np
import pytest
from PIL import Image

from medvlp_jax.config import UserError
from medvlp_jax.data import corpora, files
from medvlp_jax.data.datasets.ham10000 import ham10000_dataset_builder as ham10000

HEADER = ("lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization")
DX = ("nv", "mel", "bkl", "nv", "vasc", "df", "bcc", "akiec")


def jpeg(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (45, 60, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def rows(count=8):
    """One lesion has two images; some cells are missing in either way."""
    for i in range(count):
        yield {
            "lesion_id": f"HAM_{max(i, 1):04}",
            "image_id": f"ISIC_{i:04}",
            "dx": DX[i],
            "dx_type": "histo",
            "age": "" if i == 3 else f"{40 + i}.0",
            "sex": "unknown" if i == 4 else "male",
            "localization": "back",
        }


def write(path, entries):
    entries = list(entries)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, entries[0].keys())
        writer.writeheader()
        writer.writerows(entries)


@pytest.fixture
def official(tmp_path):
    folder = tmp_path / "official"
    for part in (1, 2):
        (folder / f"HAM10000_images_part_{part}").mkdir(parents=True)
    for i, row in enumerate(rows()):
        part = folder / f"HAM10000_images_part_{1 + i % 2}"
        (part / f"{row['image_id']}.jpg").write_bytes(jpeg(i))
    write(folder / "HAM10000_metadata", rows())
    return folder


@pytest.fixture
def sample(tmp_path):
    folder = tmp_path / "sample"
    (folder / "images").mkdir(parents=True)
    entries = []
    for i, row in enumerate(rows()):
        file = f"images/{row['image_id']}.jpg"
        (folder / file).write_bytes(jpeg(i))
        entries.append({**row, "file": file, "split": "val" if i > 5 else "train"})
    write(folder / "tabular.csv", entries)
    return folder, entries


def test_official_layout_splits_by_lesion(official, tmp_path):
    counts = corpora.check("ham10000", manual_dir=official)
    assert sum(split["records"] for split in counts.values()) == 8
    split = {r["image_id"]: r["split"] for r in ham10000.read_table(official)}
    assert split["ISIC_0000"] == split["ISIC_0001"]
    shares = [files.split_of(f"HAM_{i:07}") for i in range(5000)]
    assert 0.78 < shares.count("train") / 5000 < 0.82
    assert 0.09 < shares.count("test") / 5000 < 0.11


def test_records_hold_label_table_and_lesion(sample, tmp_path):
    folder, _ = sample
    source = corpora.open_source("ham10000", "train", data_dir=tmp_path / "d", manual_dir=folder)
    entries = {e["image_id"]: e for e in map(source.__getitem__, range(len(source)))}
    assert len(entries) == 6
    first = entries["ISIC_0001"]
    assert first["patient_id"] == "HAM_0001"
    names = source.tasks["diagnosis"]
    assert names[int(first["labels"]["diagnosis"].argmax())] == "melanoma"
    assert first["image"] == jpeg(1)
    assert first["table"] == {"age": 41.0, "sex": 1.0, "localization": 2.0, "dx_type": 3.0}
    assert math.isnan(entries["ISIC_0003"]["table"]["age"])
    assert math.isnan(entries["ISIC_0004"]["table"]["sex"])
    assert source.metadata["table"]["dx_type"]["leakage"]


@pytest.mark.parametrize(
    ("row", "cells", "message"),
    [
        (2, {"dx": "scc"}, "row 4: dx is 'scc'; accepted are akiec, bcc"),
        (2, {"age": "200"}, "row 4: age is 200; accepted are 0 to 120"),
        (2, {"localization": "moon"}, "row 4: localization is 'moon'; accepted are abdomen"),
        (1, {"split": "val"}, "row 3: lesion_id HAM_0001 is in val here and in train in row 2"),
        (2, {"file": "../elsewhere.jpg"}, "row 4: file '../elsewhere.jpg' is outside"),
        (2, {"file": "images/none.jpg"}, r"row 4: image .*none.jpg is missing"),
    ],
)
def test_a_defect_is_named_by_file_and_row(sample, tmp_path, row, cells, message):
    folder, entries = sample
    entries[row].update(cells)
    write(folder / "tabular.csv", entries)
    with pytest.raises(UserError, match=f"tabular.csv {message}"):
        corpora.prepare("ham10000", data_dir=tmp_path / "d", manual_dir=folder)


def test_the_real_sample_is_read_whole(test_data):
    folder = test_data / "derm_tabular"
    assert {k: v["records"] for k, v in corpora.check("ham10000", manual_dir=folder).items()} == {
        "train": 756,
        "validation": 189,
    }
