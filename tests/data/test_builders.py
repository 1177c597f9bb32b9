"""The builders of published corpora, each on a folder in its exact layout; see layout_writers."""

import gzip
import io
import json
import shutil
import tracemalloc
import zipfile

import layout_writers as layouts
import numpy as np
import pytest
from PIL import Image

from medvlp_jax.config import UserError
from medvlp_jax.data import building, corpora, files
from medvlp_jax.data.datasets.mimic_cxr import mimic_cxr_dataset_builder


@pytest.fixture
def records_of(tmp_path):
    """Return a function that writes a corpus' fixture and returns its records by split."""

    def read(name, config="", writer=None, **options):
        folder = tmp_path / "source"
        folder.mkdir(exist_ok=True)
        (writer or layouts.WRITERS[name])(folder, **options)
        where = {"data_dir": tmp_path / "data", "manual_dir": folder, "builder_config": config}
        sources = corpora.open_all(name, **where)
        return {s.split: {s[i]["image_id"]: s[i] for i in range(len(s))} for s in sources}

    return read


def names(records):
    return {split: sorted(found) for split, found in records.items()}


def left_out(tmp_path, name, config):
    return corpora.builder(name, data_dir=tmp_path / "data", builder_config=config).info.metadata[
        "left_out"
    ]


@pytest.mark.parametrize("zipped", [False, True])
def test_mimic_cxr_pairs_frontal_views_with_their_sections(records_of, tmp_path, zipped):
    records = records_of("mimic_cxr", zipped=zipped)
    assert names(records) == {"train": ["a-1"], "validation": ["b-1"], "test": ["d-1"]}
    first = records["train"]["a-1"]
    assert (first["findings"], first["impression"]) == ("The lungs are clear.", "Normal.")
    assert (first["patient_id"], first["study_id"]) == ("p10000032", "s50414267")
    # Atelectasis 1, Cardiomegaly 0, Consolidation -1 in the alphabetical table; CheXpert's order.
    expected = np.zeros(14, int)
    expected[8], expected[6] = 1, -1
    np.testing.assert_array_equal(first["labels"]["finding"], expected)
    np.testing.assert_array_equal(np.flatnonzero(first["labels"]["mentioned"]), [2, 6, 8])
    assert records["validation"]["b-1"]["findings"] == ""
    assert (records["validation"]["b-1"]["labels"]["finding"] == -1).all()
    assert records["test"]["d-1"]["impression"] == "cough"  # the indication, by exception
    assert left_out(tmp_path, "mimic_cxr", "frontal") == {"not frontal (PA, AP)": 2}


def replace_report(folder, name, text, compression):
    """Write another text for one report of MIMIC-CXR's archive, as its last member."""
    path = folder / "mimic-cxr/mimic-cxr-reports.zip"
    with zipfile.ZipFile(path) as archive:
        others = {n: archive.read(n) for n in archive.namelist() if not n.endswith(name)}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for other, content in others.items():
            archive.writestr(other, content)
        archive.writestr(f"mimic-cxr-reports/{name}", text)


@pytest.mark.parametrize(
    ("compression", "size", "message"),
    [
        (zipfile.ZIP_DEFLATED, files.MAX_REPORT + 1, "has 1,048,577 bytes: no report"),
        (zipfile.ZIP_BZIP2, 10, "is neither stored nor deflated"),
        (zipfile.ZIP_LZMA, 10, "is neither stored nor deflated"),
    ],
)
def test_no_report_of_mimic_cxr_is_unpacked_to_any_length(tmp_path, compression, size, message):
    layouts.mimic_cxr(tmp_path, zipped=True)
    name = "files/p10/p10000032/s50414267.txt"
    replace_report(tmp_path, name, "." * size, compression)
    with pytest.raises(UserError, match=f"row 2: {name} in .* {message}"):
        corpora.builder("mimic_cxr", data_dir=tmp_path / "none").kept(tmp_path)


def test_a_report_of_mimic_cxr_that_understates_its_length_is_not_unpacked_whole(tmp_path):
    layouts.mimic_cxr(tmp_path, zipped=True)
    path = tmp_path / "mimic-cxr/mimic-cxr-reports.zip"
    name = "files/p10/p10000032/s50414267.txt"
    replace_report(tmp_path, name, "." * (1 << 26), zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\1\2") + 24  # the size that the directory of the archive tells
    content[at : at + 4] = (9).to_bytes(4, "little")
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=f"row 2: {name} in .* cannot be read"):
            corpora.builder("mimic_cxr", data_dir=tmp_path / "none").kept(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 25
    finally:
        tracemalloc.stop()


def test_mimic_cxr_variants_keep_what_they_say(records_of, tmp_path):
    assert sum(map(len, records_of("mimic_cxr", "images").values())) == 5
    assert sum(map(len, records_of("mimic_cxr", "pairs").values())) == 4
    reason = {"neither findings nor impression": 1}
    assert left_out(tmp_path, "mimic_cxr", "pairs") == reason


@pytest.mark.parametrize("zipped", [False, True])
def test_reports_of_mimic_cxr_that_are_elsewhere_are_refused(tmp_path, zipped):
    layouts.mimic_cxr(tmp_path, zipped=zipped)
    reports, there = tmp_path / "mimic-cxr", "files/10000032/s50414267.txt"
    if zipped:
        there = f"reports/{there}"
        with zipfile.ZipFile(reports / "mimic-cxr-reports.zip", "w") as archive:
            archive.writestr("reports/", "")
            archive.writestr(there, "IMPRESSION: Fine.")
    else:
        shutil.rmtree(reports / "files")
        layouts.table(reports / there, "IMPRESSION: Fine.")
    for variant in ("frontal", "images"):
        builder = corpora.builder("mimic_cxr", data_dir=tmp_path / "none", builder_config=variant)
        said = r"no report for 4 of 4 studies: there is no files/p10/p10000032/s50414267\.txt, but"
        with pytest.raises(UserError, match=f"{said} such as {there}; get"):
            builder.kept(tmp_path)
    (reports / "mimic-cxr-reports.zip").write_bytes(b"PK\5\6" + bytes(18))  # holds nothing
    with pytest.raises(UserError, match="no report for 4 of 4 studies"):
        builder.kept(tmp_path)


@pytest.mark.parametrize("zipped", [False, True])
def test_a_study_of_mimic_cxr_without_a_report_file_is_counted_as_such(
    tmp_path, monkeypatch, zipped
):
    layouts.mimic_cxr(tmp_path, zipped=zipped)
    name = "files/p10/p10000764/s57375967.txt"
    if zipped:
        path = tmp_path / "mimic-cxr/mimic-cxr-reports.zip"
        path.write_bytes(path.read_bytes().replace(b"s57375967", b"s00000000"))
    else:
        (tmp_path / "mimic-cxr" / name).unlink()
    open_ = lambda variant: corpora.builder(
        "mimic_cxr", data_dir=tmp_path / "none", builder_config=variant
    )
    with pytest.raises(UserError, match=f"no report for 1 of 4 studies: there is no {name}"):
        open_("pairs").kept(tmp_path)
    monkeypatch.setattr(mimic_cxr_dataset_builder, "MAX_MISSING", 0.25)
    pairs, whole = open_("pairs"), open_("images")
    assert len(pairs.kept(tmp_path)) == 3
    counts = {"no report file": 1, "neither findings nor impression": 1}
    assert pairs.info.metadata["left_out"] == counts
    assert len(whole.kept(tmp_path)) == 5
    assert whole.info.metadata["noted"] == {"with no report file": 1}


def test_chexpert_strips_the_release_and_keeps_blank_apart_from_zero(records_of, tmp_path):
    records = records_of("chexpert")
    first = "train/patient00001/study1/view1_frontal.jpg"
    assert names(records) == {
        "train": [first, "train/patient00002/study2/view1_frontal.jpg"],
        "validation": ["valid/patient64541/study1/view1_frontal.jpg"],
        "test": ["test/patient64741/study1/view1_frontal.jpg"],
    }
    labels = records["train"][first]["labels"]
    assert labels["finding"].tolist() == [1, 0, 0, 0, -1, 0] + [0] * 8
    assert labels["mentioned"].tolist() == [1, 0, 0, 0, 1, 1] + [0] * 8
    assert left_out(tmp_path, "chexpert", "frontal") == {"lateral view": 1}


def test_chexpert_plus_reads_reports_labels_and_png(records_of, tmp_path):
    records = records_of("chexpert_plus")
    first = records["train"]["train/patient42140/study5/view1_frontal.jpg"]
    assert (first["findings"], first["impression"]) == ("Clear lungs, no effusion.", "Normal.")
    finding = dict(zip(layouts.FINDINGS.split(","), first["labels"]["finding"], strict=True))
    assert (finding["Edema"], finding["Fracture"], finding["Pneumonia"]) == (1, -1, 0)
    assert [r["impression"] for r in records["validation"].values()] == ["Edema."]
    assert left_out(tmp_path, "chexpert_plus", "frontal") == {"neither findings nor impression": 1}


def test_labels_of_chexpert_plus_are_found_by_any_suffix_and_must_be_of_its_images(tmp_path):
    layouts.chexpert_plus(tmp_path)
    path = tmp_path / "chexbert_labels/report_fixed.json"
    path.write_text(path.read_text().replace(".jpg", ".png"))
    corpus = corpora.builder("chexpert_plus", data_dir=tmp_path / "none")
    first, second = corpus.kept(tmp_path)
    assert first.labels["mentioned"].sum() == 3
    assert second.labels["mentioned"].sum() == -14
    lack = "without labels in chexbert_labels/report_fixed.json"
    assert corpus.info.metadata["noted"] == {lack: 1}
    path.write_text(path.read_text().replace("patient", "CheXpert/patient"))
    with pytest.raises(UserError, match=r"labels no image of df_chexpert.*paths like train/CheXp"):
        corpus.kept(tmp_path)
    path.unlink()
    assert len(corpus.kept(tmp_path)) == 2
    assert corpus.info.metadata["noted"] == {}


def test_padchest_labels_are_lists_and_known_broken_files_are_counted(records_of, tmp_path):
    records = records_of("padchest")
    found = {name: record for split in records.values() for name, record in split.items()}
    assert sorted(found) == ["one.png", "three.png"]
    classes = corpora.builder("padchest").info.metadata["tasks"]["finding"]
    present = np.flatnonzero(found["one.png"]["labels"]["finding"] == 1)
    assert [classes[k] for k in present] == ["normal", "pleural effusion"]
    assert (found["three.png"]["labels"]["finding"] == -1).all()
    with Image.open(io.BytesIO(found["one.png"]["image"])) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "L", (60, 40))
    assert left_out(tmp_path, "padchest", "frontal") == {
        "not frontal (PA, AP, AP_horizontal)": 1,
        "skip list padchest/skip_list.csv": 1,
    }
    physician = records_of("padchest", "physician")
    assert names(physician) == {"test": ["one.png"]}


def test_rocov2_captions_are_findings(records_of):
    records = records_of("rocov2")
    assert set(records) == {"train", "validation", "test"}
    (record,) = records["validation"].values()
    assert record["findings"] == "CT, axial: a mass."


def test_rsna_boxes_are_fractions_and_classes_those_of_the_detail_table(records_of):
    records = records_of("rsna_pneumonia")
    assert {split: len(found) for split, found in records.items()} == {
        "train": 8,
        "validation": 2,
        "test": 2,
    }
    found = {name: record for split in records.values() for name, record in split.items()}
    first = found["id00"]
    expected = [[5 / 40, 10 / 60, 15 / 40, 30 / 60], [20 / 40, 40 / 60, 30 / 40, 50 / 60]]
    np.testing.assert_allclose(first["boxes"]["bbox"], expected, rtol=1e-6)
    assert first["boxes"]["phrase"] == ["Pneumonia"] * 2
    assert first["labels"]["finding"].tolist() == [1]
    assert first["labels"]["class"].tolist() == [0, 0, 1]
    assert found["id01"]["labels"]["class"].tolist() == [1, 0, 0]
    assert found["id02"]["labels"]["finding"].tolist() == [0]


def mask_of(record):
    return np.asarray(Image.open(io.BytesIO(record["mask"])))


@pytest.mark.parametrize("space", [True, False])
def test_siim_takes_the_union_of_rows_with_either_header(records_of, space):
    records = records_of("siim_acr", space=space)
    found = {name: record for split in records.values() for name, record in split.items()}
    expected = np.zeros((40, 60), int)
    expected[2:5, 0] = 1
    expected[5:7, 1] = 1
    np.testing.assert_array_equal(mask_of(found["1.2.0"]), expected)
    positive = [name for name, record in found.items() if record["labels"]["finding"][0]]
    assert positive == ["1.2.0"]
    assert len(found) == 12


def test_the_png_repack_of_siim_is_read(records_of):
    records = records_of("siim_acr", "png", writer=layouts.siim_png)
    found = {name: record for split in records.values() for name, record in split.items()}
    assert list(records["test"]) == ["1.2.2"]
    assert mask_of(found["1.2.0"]).sum() == 9
    assert mask_of(found["1.2.1"]).sum() == 0


@pytest.mark.parametrize("comma", [False, True])
def test_nih_reads_both_headers_the_lists_and_the_boxes(records_of, comma):
    records = records_of("nih_cxr14", comma=comma)
    assert list(records.pop("test")) == ["00000002_000.png"]
    (rest,) = records.values()  # one patient, in one split
    first = rest["00000001_000.png"]
    classes = corpora.builder("nih_cxr14").info.metadata["tasks"]["finding"]
    present = [classes[k] for k in np.flatnonzero(first["labels"]["finding"])]
    assert present == ["Cardiomegaly", "Infiltration"]
    np.testing.assert_allclose(first["boxes"]["bbox"], [[0.1, 0.1, 0.6, 0.6]], rtol=1e-6)
    assert first["boxes"]["phrase"] == ["Infiltration"]
    assert not rest["00000001_001.png"]["labels"]["finding"].any()


def test_covidx_lists_have_no_header_and_names_may_hold_spaces(records_of):
    records = records_of("covidx")
    assert {split: len(found) for split, found in records.items()} == {
        "train": 4,
        "validation": 1,
        "test": 1,
    }
    found = {name: record for split in records.values() for name, record in split.items()}
    spaced = found["train/a b.png"]
    assert spaced["patient_id"] == "ANON 7"
    assert spaced["labels"]["class"].tolist() == [0, 0, 1]
    binary = records_of("covidx", "cxr4")
    assert binary["validation"]["val/v.jpg"]["labels"]["class"].tolist() == [0, 1]


def test_object_cxr_fills_rectangles_ellipses_and_polygons(records_of):
    records = records_of("object_cxr")
    assert {split: len(found) for split, found in records.items()} == {
        "train": 2,
        "validation": 1,
        "test": 1,
    }
    first = records["train"]["train/00001.jpg"]
    mask = mask_of(first)
    assert mask[5:10, 5:15].all()
    assert mask[20, 30]
    assert not mask[11, 21]  # a corner of the ellipse's box
    assert mask[3, 45]
    assert not mask[7, 32]
    assert len(first["boxes"]["bbox"]) == 3
    assert not mask_of(records["train"]["train/00002.jpg"]).any()


def test_vindr_counts_readers_and_knows_both_names_of_other_diseases(records_of):
    records = records_of("vindr_cxr")
    found = {name: record for split in records.values() for name, record in split.items()}
    any_of, most = ("finding", "finding_majority")
    assert [found[n]["labels"][any_of][0] for n in "abc"] == [1, 1, 0]
    assert [found[n]["labels"][most][0] for n in "abc"] == [0, 1, 0]
    assert [found[n]["labels"][any_of][-1] for n in "abc"] == [1, 1, 1]
    assert records["test"]["t"]["labels"][any_of][26] == 1
    assert records["test"]["t"]["boxes"]["phrase"] == ["Other diseases"]
    np.testing.assert_allclose(found["a"]["boxes"]["bbox"], [[0.1, 0.1, 0.6, 0.6]], rtol=1e-6)
    assert len(found["c"]["boxes"]["bbox"]) == 0


def test_boxes_of_tbx11k_in_another_encoding_are_not_printed(tmp_path):
    layouts.tbx11k(tmp_path)
    path = tmp_path / "annotations/json/TBX11K_train.json"
    path.write_bytes(b'{"name": "Mustermann", "\xff": 1}')
    with pytest.raises(UserError, match=r"\(UnicodeDecodeError: 'utf-8' codec") as raised:
        corpora.builder("tbx11k", data_dir=tmp_path / "none").kept(tmp_path)
    assert "Mustermann" not in str(raised.value)


def test_tbx11k_lists_add_the_images_without_a_box(records_of):
    found = records_of("tbx11k")["train"]
    assert sorted(found) == ["health/h0001.png", "tb/tb0005.png", "tb/tb0007.png"]
    assert [found[name]["labels"]["finding"].sum() for name in sorted(found)] == [0, 1, 1]


# ----- what holds for all of them -----------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(layouts.WRITERS))
def test_a_changed_header_names_file_column_and_source(name, tmp_path):
    layouts.WRITERS[name](tmp_path)
    builder = corpora.builder(name, data_dir=tmp_path / "none")
    tables, unread = sorted(tmp_path.rglob("*.csv")), []
    assert bool(tables) == (name not in ("covidx", "mimic_cxr", "padchest", "tbx11k"))
    for path in tables:
        kept = path.read_text()
        header, _, rest = kept.partition("\n")
        first = header.split(",")[1].strip() or header.split(",")[2]
        path.write_text(f"{header.replace(first, 'renamed', 1)}\n{rest}")
        try:
            list(builder.kept(tmp_path))
        except UserError as error:
            message = str(error)
            assert path.name in message
            assert "row 1: this is no known header" in message
            assert "renamed" in message
            assert "get the table from" in message
        else:
            unread.append(path.name)
        path.write_text(kept)
    assert unread == []


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("p17,Clear", r"no column 'image_name', 'annotation'; unknown 2 of 2 columns; accepted"),
        ("image_name,Edema: none", r"no column 'annotation'; unknown 1 of 2 columns; accepted"),
        ("image_name,note", r"no column 'annotation'; unknown 'note'; accepted"),
    ],
)
def test_a_row_that_is_no_header_is_not_printed(tmp_path, header, message):
    layouts.object_cxr(tmp_path)
    (tmp_path / "dev.csv").write_text(f"{header}\n")
    with pytest.raises(UserError, match=message):
        corpora.builder("object_cxr", data_dir=tmp_path / "none").kept(tmp_path)


def test_a_line_without_end_is_refused_before_it_is_whole(tmp_path):
    layouts.mimic_cxr(tmp_path)
    path = tmp_path / "mimic-cxr-jpg/mimic-cxr-2.0.0-metadata.csv.gz"
    with gzip.open(path, "wb") as file:
        for _ in range(20):
            file.write(b"," * (1 << 20))
    with pytest.raises(UserError, match=r"has a line of more than 16,777,216 characters"):
        corpora.builder("mimic_cxr", data_dir=tmp_path / "none").kept(tmp_path)


@pytest.mark.parametrize("name", sorted(layouts.WRITERS))
def test_a_missing_image_is_an_error_until_a_skip_list_names_it(name, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    layouts.WRITERS[name](folder)
    builder = corpora.builder(name, data_dir=tmp_path / "none")
    sample = builder.kept(folder)[-1]
    sample.path.unlink()
    where = {"data_dir": tmp_path / "data", "manual_dir": folder}
    with pytest.raises(UserError, match=rf"row .*image .*{sample.path.stem}\.\w+ is missing"):
        corpora.prepare(name, **where)
    assert not list((tmp_path / "data").rglob("*.array_record*"))
    building.write_skip_list(folder / "skip_list.csv", [(sample.image_id, "missing")])
    corpora.prepare(name, **where)
    counted = corpora.builder(name, data_dir=tmp_path / "data").info.metadata["left_out"]
    assert counted["skip list skip_list.csv"] == 1
    building.write_skip_list(folder / "skip_list.csv", [("nobody", "missing")])
    with pytest.raises(UserError, match=r"names 1 images .* such as nobody"):
        builder.kept(folder)


def test_a_size_is_part_of_the_variant(records_of, tmp_path):
    records = records_of("object_cxr", "objects-32")
    record = records["train"]["train/00001.jpg"]
    for encoded in (record["image"], record["mask"]):
        assert Image.open(io.BytesIO(encoded)).size == (48, 32)
    whole = tmp_path / "source/train/00001.jpg"
    large = records_of("object_cxr", "objects-512")["train"]["train/00001.jpg"]
    assert large["image"] == whole.read_bytes()  # never enlarged
    for config, message in [
        ("objects-9", "images of 9 pixels; accepted are 32 to 4096"),
        ("object-64", r"no builder config 'object-64'\. Did you mean objects"),
    ]:
        with pytest.raises(UserError, match=message):
            corpora.builder("object_cxr", builder_config=config)


@pytest.mark.parametrize("cell", ["../../etc/passwd", "/etc/passwd", "a\\..\\b"])
def test_no_cell_leads_out_of_the_folder(tmp_path, cell):
    layouts.object_cxr(tmp_path)
    layouts.table(tmp_path / "dev.csv", "image_name,annotation", f"{cell},")
    builder = corpora.builder("object_cxr", data_dir=tmp_path / "none")
    with pytest.raises(UserError, match=r"dev\.csv row 2: .* is no path inside"):
        builder.kept(tmp_path)


def test_an_image_that_stands_twice_is_refused(tmp_path):
    layouts.covidx(tmp_path)
    (tmp_path / "test_COVIDx9A.txt").write_text("9 t.png pneumonia a\n8 t.png normal b\n")
    with pytest.raises(UserError, match=r"row 2: image test/t\.png is also in .* row 1"):
        corpora.builder("covidx", data_dir=tmp_path / "none").kept(tmp_path)


def test_work_in_order_stops_at_the_first_error():
    begun = []

    def work(k):
        begun.append(k)
        if k == 5:
            raise UserError("five")
        return k * k

    made = building.in_order(work, range(1000), count=2)
    assert [next(made) for _ in range(5)] == [0, 1, 4, 9, 16]
    with pytest.raises(UserError, match="five"):
        next(made)
    assert len(begun) < 30
    assert list(building.in_order(lambda k: -k, range(100), count=3)) == [-k for k in range(100)]


def test_an_interrupted_preparation_leaves_no_part_of_a_dataset(tmp_path, monkeypatch):
    folder = tmp_path / "source"
    layouts.rsna_pneumonia(folder)
    seen = []

    def stop(self, sample):
        seen.append(sample)
        if len(seen) > 9:  # in the second split
            raise KeyboardInterrupt
        return whole(self, sample)

    whole = building.Builder.to_record
    with monkeypatch.context() as patch:
        patch.setattr(building.Builder, "to_record", stop)
        with pytest.raises(KeyboardInterrupt):
            corpora.prepare("rsna_pneumonia", data_dir=tmp_path / "data", manual_dir=folder)
    left = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    # TFDS notes which variants there are when a builder is made.
    assert [p for p in left if p.suffix != ".lock" and p.parent.name != ".config"] == []
    corpora.prepare("rsna_pneumonia", data_dir=tmp_path / "data", manual_dir=folder)


# ----- the real mini-sets -------------------------------------------------------------------------


def test_the_real_rows_of_nih_are_read(test_data, tmp_path):
    real, folder = test_data / "grounding_extra/nih_cxr14_mini", tmp_path / "source"
    shutil.copytree(real / "images", folder / "images")
    shutil.copy(real / "Data_Entry_2017_v2020_rows.csv", folder / "Data_Entry_2017_v2020.csv")
    shutil.copy(real / "BBox_List_2017.csv", folder)
    where = {"data_dir": tmp_path / "data", "manual_dir": folder}
    sources = corpora.open_all("nih_cxr14", builder_config="by_patient", **where)
    found = {s[i]["image_id"]: s[i] for s in sources for i in range(len(s))}
    assert sorted(found) == ["00000001_000.png", "00027426_000.png"]
    assert found["00000001_000.png"]["labels"]["finding"].sum() == 1
    assert found["00000001_000.png"]["image"] == (folder / "images/00000001_000.png").read_bytes()


def test_the_real_boxes_of_tbx11k_are_read(test_data, tmp_path):
    where = {"manual_dir": test_data / "grounding_extra/tbx11k_mini"}
    source = corpora.open_source("tbx11k", "train", data_dir=tmp_path, **where)
    found = {source[i]["image_id"]: source[i] for i in range(len(source))}
    assert sorted(found) == ["health/h0001.png", "tb/tb0005.png", "tb/tb0007.png"]
    assert not found["health/h0001.png"]["labels"]["finding"].any()
    coco = json.loads((where["manual_dir"] / "annotations/json/TBX11K_train.json").read_text())
    x, y, w, h = coco["annotations"][0]["bbox"]
    expected = np.array([[y, x, y + h, x + w]]) / 512
    np.testing.assert_allclose(found["tb/tb0005.png"]["boxes"]["bbox"], expected, rtol=1e-6)
    assert found["tb/tb0005.png"]["labels"]["finding"].tolist() == [1, 0, 0]
