"""The phantom as a TFDS corpus: splits, the round trip through array_record, the command line."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medvlp_jax.config import UserError
from medvlp_jax.data import corpora
from medvlp_jax.data.datasets.cxr_phantom import cxr_phantom_dataset_builder as phantom
from medvlp_jax.data.datasets.cxr_phantom import findings, generate, patients
from medvlp_jax.data.datasets.cxr_phantom.contact_sheet import contact_sheet


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    corpora.prepare("cxr_phantom", data_dir=folder, builder_config="tiny")
    return {
        split: corpora.open_source("cxr_phantom", split, data_dir=folder, builder_config="tiny")
        for split in phantom.SPLITS
    }


def test_tiny_has_about_200_images_in_three_splits(prepared):
    sizes = {split: len(source) for split, source in prepared.items()}
    assert 180 < sum(sizes.values()) < 220
    assert sizes["train"] > 0.7 * sum(sizes.values())
    assert min(sizes.values()) >= 10


def test_clinic_has_studies_of_one_diagnosis_which_is_the_one_that_was_drawn(tmp_path):
    where = {"data_dir": tmp_path, "builder_config": "clinic_tiny"}
    source = corpora.open_source("cxr_phantom", "test", **where)
    assert source.tasks == {"diagnosis": list(phantom.DIAGNOSES)}
    for i in range(len(source)):
        entry = source[i]
        who, number = int(entry["patient_id"].split("-")[1]), int(entry["image_id"].split("-")[-1])
        visit = patients.visit(3, patients.patient(3, who), number)
        expected = visit.findings or ("normal",)
        assert len(expected) == 1
        named = phantom.DIAGNOSES[entry["labels"]["diagnosis"].argmax()]
        assert (entry["labels"]["diagnosis"].sum(), named) == (1, expected[0])


def test_no_patient_is_in_two_splits(prepared):
    people = [{source[i]["patient_id"] for i in range(len(source))} for source in prepared.values()]
    assert sum(map(len, people)) == len(set.union(*people))
    assert set.union(*people) == {who.id for who in patients.population(0, 110)}


def test_splits_are_80_10_10_and_do_not_depend_on_the_population_size():
    names = [phantom.split_of(f"p0-{i:06d}") for i in range(5000)]
    shares = {split: names.count(split) / 5000 for split in phantom.SPLITS}
    np.testing.assert_allclose(list(shares.values()), [0.8, 0.1, 0.1], atol=0.02)


def test_records_survive_the_round_trip(prepared):
    source = prepared["train"]
    made = {study.id: study for study in generate.studies(0, 110, 128)}
    for i in range(0, len(source), 7):
        record = source[i]
        study = made[record["image_id"]]
        assert record["image"] == generate.encode_jpeg(study.image)
        mask = np.asarray(Image.open(io.BytesIO(record["mask"])))
        np.testing.assert_array_equal(mask, study.mask)
        assert record["findings"] == study.report.findings
        assert record["impression"] == study.report.impression
        np.testing.assert_array_equal(record["labels"]["finding"], study.labels)
        for column, value in study.table.items():
            np.testing.assert_equal(np.float32(record["table"][column]), np.float32(value))


def test_metadata_says_that_the_data_are_generated(prepared):
    metadata = prepared["train"].metadata
    assert metadata["generated"] is True
    assert metadata["tasks"] == {"finding": list(generate.CLASSES)}
    assert metadata["mask_bits"] == findings.MASK_BITS
    assert list(metadata["table"]) == list(patients.TABLE)


def test_equal_texts_have_equal_text_ids(prepared):
    source = prepared["train"]
    ids, texts = {}, source.texts()
    for i, both in enumerate(texts):
        assert ids.setdefault(both, source[i]["text_id"]) == source[i]["text_id"]
    assert len(set(ids.values())) == len(ids) < len(texts)


def test_any_population_has_a_config_and_out_of_range_ones_are_refused(tmp_path):
    config = phantom.make_config(3, seed=8, size=64)
    builder = phantom.Builder(data_dir=tmp_path, config=config, file_format="array_record")
    assert builder.info.full_name == "cxr_phantom/n3_seed8_64px/1.0.0"
    examples = [e for split in phantom.SPLITS for e in builder._generate_examples(split)]
    assert len(examples) == sum(who.visits for who in patients.population(8, 3))
    where = {"data_dir": tmp_path, "builder_config": "n3_seed8_64px"}
    assert vars(corpora.builder("cxr_phantom", **where).builder_config) == vars(config)
    with pytest.raises(UserError, match=r"'dmeo'. Did you mean demo.* n2400_seed7_256px"):
        corpora.builder("cxr_phantom", data_dir=tmp_path, builder_config="dmeo")
    with pytest.raises(UserError, match="size 2000"):
        phantom.make_config(10, size=2000)
    with pytest.raises(UserError, match="0 patients"):
        phantom.make_config(0)


def test_contact_sheet_is_written_by_the_command_line(tmp_path):
    out = tmp_path / "sheet.png"
    module = "medvlp_jax.data.datasets.cxr_phantom"
    command = [sys.executable, "-m", module, "--out", str(out), "--n", "2", "--size", "64"]
    subprocess.run(command, check=True, capture_output=True)
    assert Image.open(out).size[0] == 128


def test_a_contact_sheet_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    def cut_short(image, file, *_):
        Path(file).write_bytes(b"half")
        raise OSError("No space left")

    (tmp_path / "sheet.png").write_bytes(b"old")
    monkeypatch.setattr(Image.Image, "save", cut_short)
    with pytest.raises(OSError, match="No space left"):
        contact_sheet(tmp_path / "sheet.png", 1, size=64)
    assert (tmp_path / "sheet.png").read_bytes() == b"old"
