"""MS-CXR, Open-i and ROCO from folders in the sources' own layouts, and the real texts."""

import collections
import csv
import io
import os
import pathlib
import shutil
import tarfile

import layout_writers as layouts
import numpy as np
import pytest
from conftest import write_image
from PIL import Image

from medvlp_jax.config import UserError
from medvlp_jax.data import corpora
from medvlp_jax.data.datasets.ms_cxr import ms_cxr_dataset_builder as ms_cxr
from medvlp_jax.data.datasets.openi import openi_dataset_builder as openi

REAL = pathlib.Path(os.environ.get("MEDVLP_TEST_DATA", "/nowhere"), "reports")
MS_CXR_HEADER = (
    "dicom_id,category_name,label_text,path,x,y,w,h,image_width,image_height,split"  # v1.1.0
)


def records_of(name, split, folder, tmp_path, config=""):
    source = corpora.open_source(
        name, split, data_dir=tmp_path / "data", manual_dir=folder, builder_config=config
    )
    return [source[i] for i in range(len(source))]


@pytest.fixture
def ms_cxr_folder(tmp_path):
    """Two images: one sentence with two boxes and another one; a patient of the test split."""
    folder = tmp_path / "ms_cxr"
    path = "files/p1{0}/p1{0}000032/s5041426{0}/{1}.jpg"
    first, second = path.format(0, "a-b"), path.format(1, "c-d")
    rows = [
        ("a-b", "Pleural Effusion", "bilateral effusions", first, 5, 10, 20, 30, 80, 60, "train"),
        ("a-b", "Pleural Effusion", "bilateral effusions", first, 50, 10, 20, 30, 80, 60, "train"),
        ("a-b", "Pneumonia", 'opacity, "right" base', first, 5, 40, 20, 20, 80, 60, "train"),
        ("c-d", "Edema", "mild edema", second, 0, 0, 40, 30, 40, 30, "test"),
    ]
    for name, shape in ((first, (60, 80)), (second, (30, 40))):
        write_image(folder / name, 0, shape)
    write_ms_cxr(folder / ms_cxr.TABLE.names[0], MS_CXR_HEADER.split(","), rows)
    return folder


def write_ms_cxr(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *(row[: len(header)] for row in rows)])


def read_csv(path):
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    return header, rows


def test_boxes_of_ms_cxr_are_fractions_with_sentence_and_category(ms_cxr_folder, tmp_path):
    (record,) = records_of("ms_cxr", "train", ms_cxr_folder, tmp_path)
    boxes = record["boxes"]
    assert boxes["phrase"] == ["bilateral effusions"] * 2 + ['opacity, "right" base']
    assert boxes["category"] == ["Pleural Effusion"] * 2 + ["Pneumonia"]
    np.testing.assert_allclose(boxes["bbox"][1], [10 / 60, 50 / 80, 40 / 60, 70 / 80], rtol=1e-6)
    assert (record["image_id"], record["patient_id"]) == ("a-b", "p10000032")
    assert record["study_id"] == "s50414260"
    labels = dict(zip(ms_cxr.CATEGORIES, record["labels"]["finding"], strict=True))
    assert {name for name, value in labels.items() if value == 1} == {*boxes["category"]}
    assert labels["Edema"] == -1  # nobody says that it is absent
    assert len(records_of("ms_cxr", "test", ms_cxr_folder, tmp_path)) == 1


def test_the_first_release_has_no_splits_and_is_all_test(ms_cxr_folder, tmp_path):
    header, rows = read_csv(ms_cxr_folder / ms_cxr.TABLE.names[0])
    (ms_cxr_folder / ms_cxr.TABLE.names[0]).unlink()
    write_ms_cxr(ms_cxr_folder / ms_cxr.TABLE.names[1], header[:-1], rows)
    assert len(records_of("ms_cxr", "test", ms_cxr_folder, tmp_path)) == 2


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("category_name", "Fracture", "accepted are Atelectasis"),
        ("x", "many", "accepted is a number"),
        ("w", "0", "is empty in 80 x 60"),
        ("path", "images/a.jpg", "path of a-b is 'images/a.jpg' here"),
        ("label_text", "", "label_text is empty"),
        ("split", "dev", "accepted are train"),
    ],
)
def test_defects_of_ms_cxr_name_the_row(ms_cxr_folder, column, value, message):
    path = ms_cxr_folder / ms_cxr.TABLE.names[0]
    header, rows = read_csv(path)
    rows[2][header.index(column)] = value
    if column == "split":
        for row in rows:
            row[-1] = value
    write_ms_cxr(path, header, rows)
    with pytest.raises(UserError, match=f"row [24].*{message}"):
        corpora.check("ms_cxr", manual_dir=ms_cxr_folder)


XML = """<?xml version="1.0" encoding="utf-8"?>
<eCitation><uId id="{uid}"/><MedlineCitation><Article><Abstract>
<AbstractText Label="COMPARISON">None.</AbstractText>
<AbstractText Label="INDICATION">Cough.</AbstractText>
<AbstractText Label="FINDINGS">{findings}</AbstractText>
<AbstractText Label="IMPRESSION">{impression}</AbstractText>
</Abstract></Article></MedlineCitation><MeSH><major>{heading}</major></MeSH>
<parentImage id="{uid}_1_IM-0001-3001"><figureId>F1</figureId></parentImage>
<parentImage id="{uid}_1_IM-0001-4001"><figureId>F2</figureId></parentImage></eCitation>"""


@pytest.fixture
def openi_folder(tmp_path):
    """Three reports with two images each, one of them without a text."""
    folder = tmp_path / "openi"
    (folder / openi.REPORTS).mkdir(parents=True)
    texts = [("Clear.", "Normal.", "normal"), ("", "Effusion.", "Pleural Effusion/left"), ("",) * 3]
    for i, (findings, impression, heading) in enumerate(texts):
        uid = f"CXR{i + 1}"
        words = {"findings": findings, "impression": impression, "heading": heading}
        (folder / openi.REPORTS / f"{i + 1}.xml").write_text(XML.format(uid=uid, **words))
        for view in ("3001", "4001"):
            write_image(folder / openi.IMAGES / f"{uid}_1_IM-0001-{view}.png", i)
    rows = ["uid,split,n", "CXR1,train,2", "CXR2,val,2", "CXR3,train,2"]
    (folder / openi.INDEX).write_text("\n".join(rows))
    return folder


def test_openi_gives_one_record_an_image_and_one_patient_a_report(openi_folder, tmp_path):
    found = records_of("openi", "train", openi_folder, tmp_path)
    names = {"CXR1_1_IM-0001-3001", "CXR1_1_IM-0001-4001"}
    assert {record["image_id"] for record in found} == names
    assert {record["patient_id"] for record in found} == {"CXR1"}
    assert (found[0]["findings"], found[0]["impression"]) == ("Clear.", "Normal.")
    assert list(found[0]["labels"]["normal"]) == [1, 0]
    assert Image.open(io.BytesIO(found[0]["image"])).size == (50, 60)
    (other, _) = records_of("openi", "validation", openi_folder, tmp_path)
    assert list(other["labels"]["normal"]) == [0, 1]


def test_openi_reports_need_no_image_and_may_come_as_an_archive(openi_folder, tmp_path):
    shutil.rmtree(openi_folder / openi.IMAGES)
    with tarfile.open(openi_folder / f"{openi.REPORTS}.tgz", "w:gz") as archive:
        archive.add(openi_folder / openi.REPORTS, openi.REPORTS)
    shutil.rmtree(openi_folder / openi.REPORTS)
    (record,) = records_of("openi", "train", openi_folder, tmp_path, "reports")
    assert (record["image_id"], record["findings"]) == ("CXR1", "Clear.")
    assert not np.asarray(Image.open(io.BytesIO(record["image"]))).any()


def test_defects_of_openi_are_named(openi_folder):
    check = lambda: corpora.check("openi", manual_dir=openi_folder)
    (openi_folder / openi.IMAGES / "CXR1_1_IM-0001-4001.png").unlink()
    with pytest.raises(UserError, match=r"4001.png is missing"):
        check()
    (openi_folder / openi.INDEX).write_text("uid,split\nCXR1,train")
    with pytest.raises(UserError, match="no row for report CXR2"):
        check()


@pytest.fixture
def repacked_folder(tmp_path):
    folder = tmp_path / "openi_csv"
    layouts.openi_csv(folder)
    (folder / openi.INDEX).write_text("uid,split\nCXR1,train\nCXR2,train\nCXR3,train\nCXR4,val")
    return folder


def test_the_csv_repack_of_openi_gives_the_ids_of_the_xml_files(repacked_folder, tmp_path):
    found = {r["image_id"]: r for r in records_of("openi", "train", repacked_folder, tmp_path)}
    assert {*found} == {"CXR1_1_IM-0001-4001", "CXR1_1_IM-0001-3001", "CXR2_2_IM-0652-1001"}
    first, last = found["CXR1_1_IM-0001-4001"], found["CXR2_2_IM-0652-1001"]
    assert (first["patient_id"], first["findings"]) == ("CXR1", "Clear, XXXX.")
    assert (last["findings"], last["impression"]) == ("", "Effusion.")
    assert [[*r["labels"]["normal"]] for r in (first, last)] == [[1, 0], [0, 1]]
    info = corpora.builder("openi", data_dir=tmp_path / "data").info
    assert info.metadata["left_out"] == {
        "reports without a text": 1,
        "reports without an image": 1,
    }


def test_texts_of_the_csv_repack_have_no_runs_of_white_space(repacked_folder, tmp_path):
    path = repacked_folder / openi.TABLE.names[0]
    path.write_text(path.read_text().replace("Effusion.", '"Large\n  effusion."'))
    found = {r["study_id"]: r for r in records_of("openi", "train", repacked_folder, tmp_path)}
    assert found["CXR2"]["impression"] == "Large effusion."


def test_the_csv_repack_tells_frontal_images_and_the_xml_files_do_not(
    repacked_folder, openi_folder, tmp_path
):
    found = records_of("openi", "train", repacked_folder, tmp_path, "frontal")
    assert {r["image_id"] for r in found} == {"CXR1_1_IM-0001-4001", "CXR2_2_IM-0652-1001"}
    found = records_of("openi", "train", repacked_folder, tmp_path, "reports")
    assert {r["image_id"] for r in found} == {"CXR1", "CXR2", "CXR3"}
    with pytest.raises(UserError, match="only the CSV re-pack"):
        corpora.check("openi", manual_dir=openi_folder, builder_config="frontal")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("2,2_IM", "9,9_IM", "row 4: uid 9 is no report of indiana_reports.csv"),
        ("2,2_IM", "2,../2_IM", r"row 4: filename '../2_IM-0652-1001.dcm.png' is not like 2_IM"),
        ("Lateral", "Side", "row 3: projection is 'Side'"),
        ("filename", "file", "row 1: this is no known header"),
        ("1_IM-0001-3001", "1_IM-0001-4001", "row 3: filename .* is also in row 2"),
    ],
)
def test_defects_of_the_csv_repack_name_the_row(repacked_folder, old, new, message):
    path = repacked_folder / openi.PROJECTIONS.names[0]
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        corpora.check("openi", manual_dir=repacked_folder)


@pytest.mark.parametrize("heading", ["", "No Indexing"])
def test_what_nobody_indexed_has_no_label(heading):
    assert set(openi.label_of((heading,) if heading else ())) == {-1}


def write_roco(folder, split, kind, rows, images=()):
    part = folder / "data" / split / kind
    part.mkdir(parents=True)
    text = lambda lines: "".join(f"{line}\n" for line in lines)
    (part / "captions.txt").write_text(text(f"{i}\t {caption}" for i, caption, _ in rows))
    (part / "licences.txt").write_text(
        text(["ROCO_ID,PMC_ID,CC", *(f"{i},{article},CC BY" for i, _, article in rows)])
    )
    links = (f"{i}\twget -r ftp://x/{article}.tar.gz\t{article}_g1.jpg" for i, _, article in rows)
    (part / "dlinks.txt").write_text(text(links))
    for article in images:
        write_image(part / "images" / f"{article}_g1.jpg", 0)


@pytest.fixture
def roco_folder(tmp_path):
    folder = tmp_path / "roco"
    rows = [("ROCO_00001", "A chest radiograph.", "PMC1"), ("ROCO_00002", "CT, axial.", "PMC2")]
    write_roco(folder, "train", "radiology", rows, images=["PMC2"])
    write_roco(folder, "train", "non-radiology", [("ROCO_00003", "A chart.", "PMC3")])
    write_roco(folder, "test", "radiology", [("ROCO_00004", "MR.", "PMC4")])
    return folder


def test_roco_keeps_the_captions_whose_image_is_there(roco_folder, tmp_path):
    (record,) = records_of("roco", "train", roco_folder, tmp_path)
    assert (record["image_id"], record["patient_id"]) == ("ROCO_00002", "PMC2")
    assert (record["findings"], record["impression"]) == ("CT, axial.", "")
    assert list(record["labels"]["kind"]) == [1, 0]


def test_roco_captions_are_all_there_without_images(roco_folder, tmp_path):
    found = records_of("roco", "train", roco_folder, tmp_path, "captions")
    assert {r["findings"] for r in found} == {"A chest radiograph.", "CT, axial.", "A chart."}
    assert len(records_of("roco", "test", roco_folder, tmp_path, "captions")) == 1


def test_defects_of_roco_are_named(roco_folder):
    check = lambda: corpora.check("roco", manual_dir=roco_folder)
    captions = roco_folder / "data/test/radiology/captions.txt"
    captions.write_text("ROCO_00001\t again\n")
    with pytest.raises(UserError, match=r"row 1: ROCO_00001 is also in .*train"):
        check()
    captions.write_text("ROCO_00004\n")
    with pytest.raises(UserError, match="has no caption"):
        check()
    shutil.rmtree(roco_folder / "data/train/radiology/images")
    captions.write_text("ROCO_00004\t MR.\n")
    with pytest.raises(UserError, match="the variant captions"):
        check()


@pytest.mark.skipif(not REAL.is_dir(), reason="MEDVLP_TEST_DATA is not set")
@pytest.mark.parametrize(
    ("name", "config", "table", "words"),
    [
        ("openi", "reports", "openi/index.csv", ("w_findings", "w_impression")),
        ("roco", "captions", "roco_ccby/captions.csv", ()),
    ],
)
def test_the_real_texts_are_read_whole(name, config, table, words):
    with (REAL / table).open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows = [row for row in rows if not words or any(int(row[column]) for column in words)]
    counts = collections.Counter({"val": "validation"}.get(r["split"], r["split"]) for r in rows)
    found = corpora.check(name, manual_dir=(REAL / table).parent, builder_config=config)
    assert {split: entry["records"] for split, entry in found.items()} == counts
