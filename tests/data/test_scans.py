"""Two scans of a patient: another of the same lesion where there is one, another modality."""

import dataclasses
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


def test_two_views_of_a_lesion_are_of_one_diagnosis(source):
    labels = np.eye(2, dtype=np.int8)[[0, 0, 0, 1, 1, 1, 0]]
    labels[1] = -1  # unknown
    rows = [
        {**row, "labels": {"dx": label}}
        for row, label in zip(source.serialised, labels, strict=True)
    ]
    told = types.MappingProxyType({"tasks": {"dx": ["no", "yes"]}, "table": {}})
    labelled = dataclasses.replace(source, serialised=rows, metadata=told)
    scans.siblings([labelled], "study_id", lambda encoded: encoded, "dx")
    labels[5] = 1, 0
    with pytest.raises(UserError, match=r"data\.siblings=study_id: study 's1' has images of more"):
        scans.siblings([labelled], "study_id", lambda encoded: encoded, "dx")
    for key, task in (("study_id", ""), ("study_id", "other"), ("patient_id", "dx"), ("", "dx")):
        scans.siblings([labelled], key, lambda encoded: encoded, task)


def test_equal_ids_of_two_corpora_pair_no_scans(source):
    """Patient "p" of one is not patient "p" of the other."""
    for key, count in (("study_id", 3), ("patient_id", 1)):
        message = rf"data.siblings={key}: corpora made \(1\) and made \(2\) .* have {count} values"
        with pytest.raises(UserError, match=message):
            scans.siblings([source, source], key, decode=None)
    rows = [{**row, "patient_id": "q"} for row in source.serialised]
    other = dataclasses.replace(source, serialised=rows)
    pair = scans.siblings([source, other], "patient_id", decode=lambda encoded: encoded)
    assert pair(other[1], np.random.default_rng(0))[0] == 1
    scans.siblings([source, source], "", decode=None)


def test_of_several_modalities_two_different_ones_are_drawn():
    readers = {name: lambda record, name=name: record[name] for name in "abc"}
    record = {"a": 1, "b": 2, "c": 3}
    pair = scans.modalities(readers)
    seen = {pair(record, np.random.default_rng(k)) for k in range(60)}
    assert seen == {(i, j) for i in (1, 2, 3) for j in (1, 2, 3) if i != j}


def test_scans_share_a_study_or_a_patient(source):
    with pytest.raises(UserError, match=r"data.siblings is 'lesion_id'. Did you mean"):
        scans.siblings([source], "lesion_id", decode=None)
