"""Published splits: the logic on made-up tables, the hashes on the real ones where they are given.

MEDVLP_LABELS names a folder with stage_2_train_labels.csv (RSNA), train.csv (CheXpert) and
train-rle.csv (SIIM-ACR).
"""

import hashlib
import os
import pathlib

import numpy as np
import pytest

from medvlp_jax.config import UserError
from medvlp_jax.data import cxr_labels, layouts, splits
from medvlp_jax.data.datasets.chexpert import chexpert_dataset_builder as chexpert
from medvlp_jax.data.datasets.rsna_pneumonia import rsna_pneumonia_dataset_builder as rsna
from medvlp_jax.data.datasets.siim_acr import siim_acr_dataset_builder as siim


@pytest.fixture(scope="module")
def labels():
    folder = os.environ.get("MEDVLP_LABELS", "")
    if not folder:
        pytest.skip("needs label tables: set MEDVLP_LABELS to a folder with train.csv ...")
    return pathlib.Path(folder)


def test_rows_are_drawn_as_pandas_draws_them():
    # pandas.DataFrame(range(10)).sample(4, random_state=0).index, pandas 2.2.
    assert splits.sample(10, 4, 0).tolist() == [2, 8, 4, 9]
    with pytest.raises(UserError, match="5 cannot be drawn from 4"):
        splits.sample(4, 5, 0)


@pytest.mark.parametrize(("flavour", "sizes"), [("gloria", (70, 15, 15)), ("mgca", (60, 20, 20))])
def test_rsna_is_cut_by_patient_whatever_the_order_of_rows(flavour, sizes):
    patients = [f"p{k:03}" for k in range(100)]
    parts = splits.rsna([*patients[::-1], *patients[:30]], flavour)
    assert tuple(map(len, parts.values())) == sizes
    assert sorted(name for part in parts.values() for name in part) == patients
    assert parts == splits.rsna(patients, flavour)


def test_a_legacy_cut_by_row_tears_images_apart_and_the_clean_one_does_not():
    rows = [f"i{k // 2}" for k in range(200)]
    legacy, clean = splits.siim_legacy(rows), splits.siim_clean(rows)
    assert set(legacy["train"]) & set(legacy["test"])
    assert sum(map(len, legacy.values())) == 200
    parts = [set(part) for part in clean.values()]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 100


def finding(**values):
    row = np.zeros(14, np.int8)
    for name, value in values.items():
        row[cxr_labels.CHEXPERT.index(name.replace("_", " "))] = value
    return row


def test_5x200_takes_images_whose_other_findings_are_all_absent():
    rows = [
        finding(Edema=1),
        finding(Edema=1, Fracture=-1),  # uncertain is not absent
        finding(Edema=1, Pneumonia=1),
        finding(Edema=1, No_Finding=1),  # not looked at
        finding(Atelectasis=1),
        finding(Edema=-1),
    ]
    frontal = np.array([True] * 4 + [False, True])
    pools = splits.chexpert_pools(np.stack(rows), frontal)
    assert {name: pool.tolist() for name, pool in pools.items() if len(pool)} == {"Edema": [0, 3]}
    with pytest.raises(UserError, match="Atelectasis alone, and this table has 0"):
        splits.chexpert_5x200(list("abcdef"), np.stack(rows), frontal)


def test_mgca_validation_rows_stay_in_training_and_the_clean_ones_do_not():
    patients = [f"p{k // 3}" for k in range(3_000)]
    drawn = np.arange(3_000) < 60
    legacy = splits.chexpert_mgca(patients, drawn, "legacy")
    assert len(np.intersect1d(legacy["train"], legacy["validation"])) > 100
    clean = splits.chexpert_mgca(patients, drawn, "clean")
    known = {patients[k] for k in clean["train"]}
    assert not known & {patients[k] for k in clean["validation"]}
    assert not known & {patients[k] for k in np.flatnonzero(drawn)}


def test_another_release_is_refused_by_its_hash():
    ids = {"train": ["a"], "validation": ["b"], "test": ["c"]}
    verdict = splits.compare("rsna_pneumonia:gloria", ids)[0]
    assert (verdict.size, verdict.agrees) == (1, False)
    assert verdict.hash == hashlib.sha256(b"a").hexdigest()[:16]
    with pytest.raises(UserError, match=r"train has 1 ids with hash .* published are 18,678"):
        splits.require("rsna_pneumonia:gloria", ids, "labels.csv")
    assert splits.compare("unknown", ids)[0].agrees is None


@pytest.mark.parametrize(
    ("flavour", "positive"), [("gloria", (4162, 928, 922)), ("mgca", (3579, 1182, 1251))]
)
def test_the_real_rsna_splits_have_the_published_hashes(labels, flavour, positive):
    rows = rsna.LABELS.rows(labels)
    parts = splits.rsna([row["patientId"] for row in rows], flavour)
    assert all(v.agrees for v in splits.compare(f"rsna_pneumonia:{flavour}", parts))
    sick = {row["patientId"] for row in rows if row["Target"] == "1"}
    assert tuple(len(sick & set(part)) for part in parts.values()) == positive


def test_the_real_siim_rows_overlap_as_published(labels):
    images = [row["ImageId"] for row in siim.RUNS.rows(labels)]
    parts = splits.siim_legacy(images)
    train, validation, test = (set(part) for part in parts.values())
    assert tuple(map(len, parts.values())) == (9067, 1944, 1943)
    overlaps = (train & validation, train & test, validation & test)
    assert tuple(map(len, overlaps)) == (161, 154, 62)


@pytest.mark.slow
def test_the_real_chexpert_draw_has_the_published_hashes(labels):
    rows = chexpert.TABLES["train"].rows(labels)
    paths = [row["Path"] for row in rows]
    finding = np.stack([cxr_labels.four_valued(row)["finding"] for row in rows])
    frontal = np.array([row["Frontal/Lateral"] == "Frontal" for row in rows])
    pools = splits.chexpert_pools(finding, frontal)
    assert tuple(map(len, pools.values())) == (1087, 1034, 537, 2257, 2425)
    drawn = [p for part in splits.chexpert_5x200(paths, finding, frontal).values() for p in part]
    bare = [path.split("/", 1)[1] for path in drawn]
    assert hashlib.sha256("\n".join(bare).encode()).hexdigest()[:16] == "2af6566129f95665"
    anchor = splits.ANCHORS["chexpert:5x200"]["test"]
    assert (len(bare), layouts.id_hash(bare)) == anchor
    patients = [chexpert.patient_of(row, row["Path"]) for row in rows]
    is_drawn = np.isin(paths, drawn)
    held = {p for p, here in zip(patients, is_drawn, strict=True) if here}
    assert len(held) == 969
    kept = sum(patient not in held for patient in patients)
    assert kept == splits.ANCHORS["chexpert:train_without_5x200"]["train"].size
    legacy = splits.chexpert_mgca(patients, is_drawn, "legacy")
    both = np.intersect1d(legacy["train"], legacy["validation"])
    assert (len(both), frontal[both].sum()) == (4907, 4203)
    assert frontal[legacy["validation"]].sum() == 4284
    assert frontal[legacy["train"]].sum() == 185_771
