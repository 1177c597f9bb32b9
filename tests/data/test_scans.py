"""Two scans of a patient: another of the same lesion where there is one, another modality."""

import types

import numpy as np
import pytest

from medvlp_jax.config import UserError
from medvlp_jax.data import scans
from medvlp_jax.data.corpora import Source


class Fake(Source):
    """A source whose records are plain dictionaries."""

    def __getitem__(self, index):
        return self.serialised[index]


@pytest.fixture
def source():
    rows = [
        {"image_id": f"i{i}", "study_id": f"s{i // 3}", "patient_id": "p", "image": i}
        for i in range(7)
    ]
    info = types.MappingProxyType({"tasks": {}, "table": {}})
    return Fake("made", "train", info, "", rows)


def test_the_second_view_is_another_scan_of_the_lesion_or_the_same_one(source):
    pair = scans.siblings([source], "study_id", decode=lambda encoded: encoded)
    seen = {pair(source[1], np.random.default_rng(k)) for k in range(20)}
    assert seen == {(1, 0), (1, 2)}
    assert pair(source[6], np.random.default_rng(0)) == (6, 6)
    alone = scans.siblings([source], "", decode=lambda encoded: encoded)
    assert alone(source[1], np.random.default_rng(0)) == (1, 1)


def test_of_several_modalities_two_different_ones_are_drawn():
    readers = {name: lambda record, name=name: record[name] for name in "abc"}
    record = {"a": 1, "b": 2, "c": 3}
    pair = scans.modalities(readers)
    seen = {pair(record, np.random.default_rng(k)) for k in range(60)}
    assert seen == {(i, j) for i in (1, 2, 3) for j in (1, 2, 3) if i != j}


def test_scans_share_a_study_or_a_patient(source):
    with pytest.raises(UserError, match=r"data.siblings is 'lesion_id'. Did you mean"):
        scans.siblings([source], "lesion_id", decode=None)
