"""Text recipes as a setting: what is read, what is left out, what stays."""

import pytest

from medvlp_jax.config import UserError
from medvlp_jax.data import records, retold


@pytest.fixture
def source(radiology_source):
    return radiology_source


def test_the_empty_recipe_changes_nothing(source):
    assert retold.retold(source, "") is source


@pytest.mark.parametrize(("name", "kept"), [("impression", 1), ("findings-v1", 0)])
def test_one_section_alone_is_read(source, name, kept):
    told = retold.retold(source, name)
    before = [pair for pair in source.texts() if pair[kept]]
    assert len(told) == len(before) > 0
    for i, pair in enumerate(before):
        record = told[i]
        texts = (record["findings"], record["impression"])
        assert texts[kept] == " ".join(pair[kept].split())
        assert texts[1 - kept] == ""
        assert record["text_id"] == records.text_id(*texts)
    assert told.texts()[0] == (told[0]["findings"], told[0]["impression"])


def test_the_rest_of_a_record_is_as_it_was(source):
    told = retold.retold(source, "both")
    for i in range(len(source)):
        one, other = source[i], told[i]
        assert one["image"] == other["image"]
        assert one["image_id"] == other["image_id"]
        assert one["labels"].keys() == other["labels"].keys()


def test_studies_without_the_text_are_left_out(source):
    lengths = [len(retold.retold(source, name)) for name in ("imitate", "both")]
    both = sum(bool(f and i) for f, i in source.texts())
    assert lengths[0] == both
    assert lengths[1] == sum(bool(f or i) for f, i in source.texts())


def test_an_unknown_recipe_names_the_nearest_and_an_empty_one_says_so(source, monkeypatch):
    with pytest.raises(UserError, match="No text recipe 'mgcaa'"):
        retold.retold(source, "mgcaa")
    monkeypatch.setitem(
        retold.sections.RECIPES, "nothing-v1", lambda findings, impression: ("", "")
    )
    with pytest.raises(UserError, match="leaves none of the 8 records"):
        retold.retold(source, "nothing")
