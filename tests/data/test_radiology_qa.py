import collections
import json
import pathlib

import numpy as np
import pytest

from medvlp_jax.data import corpora, files
from medvlp_jax.data.datasets.radiology_qa import radiology_qa_dataset_builder as radiology_qa


def row(**cells):
    columns = ("source", "modality_group", "modality", "plane", "organ", "text_composed")
    return files.Row(pathlib.Path("pairs.csv"), 2, {**dict.fromkeys(columns, ""), **cells})


def test_findings_join_modality_plane_and_organ():
    cells = row(modality_group="xray", modality="xr - plain film", plane="ap", organ="breast")
    assert radiology_qa.findings(cells) == "x-ray, xr - plain film. ap. breast."


def test_findings_of_nothing_are_missing():
    assert radiology_qa.findings(row()) == ""
    assert radiology_qa.sentence("") == ""


def test_findings_of_vqa_rad_keep_its_questions():
    cells = row(
        source="vqarad", modality_group="ct", text_composed="ct. Is it large? No. Where? Left."
    )
    assert radiology_qa.findings(cells) == "ct. Is it large? No. Where? Left."


def test_first_alternative_counts_and_optional_words_stay():
    first = radiology_qa.first_alternative
    assert first("colloid (mucinous)carcinoma") == "colloid mucinous carcinoma"
    assert first("a (b), c#d") == "a b, c"


def test_records_carry_labels_texts_and_groups(radiology_source):
    entries = {entry["image_id"]: entry for entry in map(radiology_source.__getitem__, range(8))}
    entry = entries["syn3"]
    assert entry["findings"] == "mr, t2. axial. skull and contents."
    assert entry["impression"] == "lesion 3."
    assert entry["patient_id"] == entry["study_id"] == "g1"
    for task, name in [("organ", "skull and contents"), ("plane", "axial"), ("modality", "mr")]:
        names = radiology_source.tasks[task]
        np.testing.assert_array_equal(entry["labels"][task], [n == name for n in names])
    assert entries["syn0"]["text_id"] == entries["syn1"]["text_id"] != entries["syn2"]["text_id"]


def test_unknown_labels_are_all_minus_one(radiology_folder, tmp_path, edit_table):
    edit_table(radiology_folder / "pairs.csv", row=8, organ="", modality_group="")
    source = corpora.open_source(
        "radiology_qa", "validation", data_dir=tmp_path / "d", manual_dir=radiology_folder
    )
    entry = next(e for e in map(source.__getitem__, range(4)) if e["image_id"] == "syn8")
    assert set(entry["labels"]["organ"]) == set(entry["labels"]["modality"]) == {-1}
    assert set(entry["labels"]["plane"]) == {0, 1}


def test_prompts_cover_every_class_of_every_task():
    for name in ("radiology_qa", "cxr_pairs"):
        folder = pathlib.Path(corpora.datasets.__path__[0]) / name
        prompts = json.loads((folder / "prompts.json").read_text())
        tasks = corpora.builder(name).info.metadata["tasks"]
        assert prompts["tasks"].keys() == tasks.keys()
        for task, spec in prompts["tasks"].items():
            assert list(spec["classes"]) == list(tasks[task])
            assert spec["section"] in ("findings", "impression")
            for texts in spec["classes"].values():
                assert texts["positive"]
                assert bool(texts.get("negative")) == spec["multi_label"]


def test_real_data_has_the_published_counts_and_splits(test_data, tmp_path):
    folder = test_data / "radiology_qa"
    sources = {
        split: corpora.open_source("radiology_qa", split, data_dir=tmp_path, manual_dir=folder)
        for split in ("train", "validation")
    }
    assert {split: len(source) for split, source in sources.items()} == {
        "train": 2942,
        "validation": 410,
    }
    ids, groups = {}, {}
    for split, source in sources.items():
        entries = [source[i] for i in range(len(source))]
        ids[split] = {entry["image_id"] for entry in entries}
        groups[split] = {entry["patient_id"] for entry in entries}
        by_id = collections.defaultdict(set)
        for entry in entries:
            by_id[entry["text_id"]].add((entry["findings"], entry["impression"]))
        assert all(len(texts) == 1 for texts in by_id.values())
        assert len(by_id) == len(set(source.texts()))
    assert not ids["train"] & ids["validation"]
    assert not groups["train"] & groups["validation"]
    assert len(ids["train"] | ids["validation"]) == 3352


def test_real_data_holds_the_classes_of_the_source(test_data):
    rows = files.read_rows(test_data / "radiology_qa/pairs.csv", columns=("organ", "plane"))
    first = radiology_qa.first_alternative
    assert {first(r["organ"]) for r in rows} - {""} == set(radiology_qa.ORGANS)
    assert {r["plane"] for r in rows} - {""} == set(radiology_qa.PLANES)
    assert {r["modality_group"] for r in rows} - {""} == set(radiology_qa.MODALITIES)


@pytest.mark.parametrize("column", ["organ", "plane", "modality_group", "split"])
def test_a_value_outside_the_list_names_what_is_accepted(radiology_folder, edit_table, column):
    edit_table(radiology_folder / "pairs.csv", row=2, **{column: "knee"})
    with pytest.raises(corpora.UserError, match=f"row 4: {column} is 'knee'; accepted are"):
        corpora.check("radiology_qa", manual_dir=radiology_folder)


def test_a_path_out_of_the_folder_is_refused(radiology_folder, edit_table):
    edit_table(radiology_folder / "pairs.csv", row=2, file="../elsewhere.jpg")
    with pytest.raises(corpora.UserError, match=r"row 4: file '\.\./elsewhere.jpg' is outside"):
        corpora.check("radiology_qa", manual_dir=radiology_folder)
