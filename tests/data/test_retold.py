"""Text recipes as a setting: what is read, what is left out, what stays."""

import numpy as np
import pytest

from medvlp_jax.config import UserError
from medvlp_jax.data import corpora, records, retold


@pytest.fixture
def source(radiology_folder, edit_table, tmp_path):
    """Eight rows: 2 has no impression, 5 no findings, 7 neither."""
    findings = dict.fromkeys(("modality_group", "modality", "plane", "organ"), "")
    impression = {"abnormality": ""}
    for row, lacks in ((2, impression), (5, findings), (7, findings | impression)):
        edit_table(radiology_folder / "pairs.csv", row=row, **lacks)
    folders = {"data_dir": tmp_path / "data", "manual_dir": radiology_folder}
    return corpora.open_source("radiology_qa", "train", **folders)


FINDINGS = "mr, t2. axial. skull and contents."
# Of each row, as its image is called.
TEXTS = {f"syn{i}": (FINDINGS, f"lesion {max(i, 1)}.") for i in range(8)}
TEXTS |= {"syn2": (FINDINGS, ""), "syn5": ("", "lesion 5."), "syn7": ("", "")}


def test_the_empty_recipe_changes_nothing(source):
    assert retold.retold(source, "") is source


@pytest.mark.parametrize(("name", "kept"), [("impression", 1), ("findings-v1", 0)])
def test_one_section_alone_is_read(source, name, kept):
    told = retold.retold(source, name)
    before = [pair for pair in source.texts() if pair[kept]]
    assert len(told) == len(before) == 6 < len(source)
    for i, pair in enumerate(before):
        record = told[i]
        texts = (record["findings"], record["impression"])
        assert texts[kept] == " ".join(pair[kept].split())
        assert texts[1 - kept] == ""
        assert texts[kept] == TEXTS[record["image_id"]][kept]
        assert record["text_id"] == records.text_id(*texts)
    assert told.texts()[0] == (told[0]["findings"], told[0]["impression"])


def test_the_rest_of_a_record_is_as_it_was(source):
    told = retold.retold(source, "imitate")
    before = {record["image_id"]: record for record in (source[i] for i in range(len(source)))}
    for i in range(len(told)):
        other = told[i]
        one = before[other["image_id"]]
        assert (other["findings"], other["impression"]) == TEXTS[other["image_id"]]
        assert one["image"] == other["image"]
        assert one["labels"].keys() == other["labels"].keys()
        for task, label in one["labels"].items():
            np.testing.assert_array_equal(label, other["labels"][task])


def test_studies_without_the_text_are_left_out(source):
    both = {name for name, texts in TEXTS.items() if all(texts)}
    either = {name for name, texts in TEXTS.items() if any(texts)}
    for recipe, expected, count in (("imitate", both, 5), ("both", either, 7)):
        told = retold.retold(source, recipe)
        assert len(told) == count
        assert {told[i]["image_id"] for i in range(count)} == expected


def test_an_unknown_recipe_names_the_nearest_and_an_empty_one_says_so(source, monkeypatch):
    with pytest.raises(UserError, match="No text recipe 'mgcaa'"):
        retold.retold(source, "mgcaa")
    monkeypatch.setitem(
        retold.sections.RECIPES, "nothing-v1", lambda findings, impression: ("", "")
    )
    with pytest.raises(UserError, match="leaves none of the 8 records"):
        retold.retold(source, "nothing")
