"""Folds: every case is tested once, no patient is torn apart, classes are shared out."""

import types

import numpy as np
import pytest

from configs import common
from medvlp_jax import assemble
from medvlp_jax.config import UserError
from medvlp_jax.data import folds
from medvlp_jax.data.corpora import Source


def make_labels(n=200):
    """Three classes, the last one rare; patients of one to three cases."""
    rng = np.random.default_rng(0)
    groups = [f"p{i}" for i in np.sort(rng.integers(0, 100, n))]
    return groups, rng.choice(3, n, p=(0.6, 0.3, 0.1))


def test_patients_stay_together_and_classes_are_shared_out():
    groups, labels = make_labels()
    fold = folds.deal(groups, labels, count=5, seed=0)
    for patient in set(groups):
        assert len(set(fold[np.array(groups) == patient])) == 1
    for k in range(5):
        assert 25 < (fold == k).sum() < 55
        share = np.bincount(labels[fold == k], minlength=3) / (fold == k).sum()
        np.testing.assert_allclose(share, np.bincount(labels) / 200, atol=0.08)
    np.testing.assert_array_equal(fold, folds.deal(groups, labels, count=5, seed=0))
    assert (fold != folds.deal(groups, labels, count=5, seed=1)).any()


class Fake(Source):
    """A source whose records are plain dictionaries."""

    def __getitem__(self, index):
        return self.serialised[index]


def make_sources():
    groups, labels = make_labels()
    one_hot = np.eye(3, dtype=np.int8)[labels]
    rows = [
        {"image_id": f"i{i}", "patient_id": groups[i], "study_id": f"{groups[i]}/{i % 2}"}
        | {"labels": {"d": one_hot[i]}}
        for i in range(200)
    ]
    info = types.MappingProxyType({"tasks": {"d": ["a", "b", "c"]}, "table": {}})
    return [
        Fake("made", s, info, "", part) for s, part in (("train", rows[:150]), ("test", rows[150:]))
    ]


def test_the_test_splits_of_all_folds_are_the_corpus_and_the_three_of_a_fold_are_disjoint():
    sources, tested = make_sources(), []
    for index in range(4):
        fields = {"count": 4, "index": index, "task": "d", "seed": 0}
        found = {s: folds.open_fold(sources, s, **fields) for s in folds.SPLITS}
        ids = {s: [row["image_id"] for row in f.serialised] for s, f in found.items()}
        assert sum(map(len, ids.values())) == 200
        patients = {s: {row["patient_id"] for row in f.serialised} for s, f in found.items()}
        assert not patients["train"] & patients["test"]
        assert not patients["train"] & patients["validation"]
        assert not patients["validation"] & patients["test"]
        tested += ids["test"]
    assert sorted(tested) == sorted(f"i{i}" for i in range(200))


def test_dealing_by_study_parts_patients_and_validation_may_be_an_inner_share():
    fields = {"count": 5, "index": 1, "task": "d", "seed": 0, "group": "study_id", "inner": 10}
    found = {s: folds.open_fold(make_sources(), s, **fields).serialised for s in folds.SPLITS}
    assert sum(map(len, found.values())) == 200
    assert len(found["validation"]) == pytest.approx(0.1 * 160, abs=4)
    studies = {s: {row["study_id"] for row in rows} for s, rows in found.items()}
    assert not studies["train"] & studies["test"]
    assert not studies["train"] & studies["validation"]
    patients = {s: {row["patient_id"] for row in rows} for s, rows in found.items()}
    assert patients["train"] & patients["test"]
    # The test fold is the same with and without an inner share.
    plain = folds.open_fold(make_sources(), "test", **{**fields, "inner": 0}).serialised
    ids = lambda rows: [row["image_id"] for row in rows]
    assert ids(plain) == ids(found["test"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"count": 2}, "data.folds.count=2 must be 0, or at least 3"),
        ({"count": 900}, "count=900, but there are only"),
        ({"index": 4}, "data.folds.index=4 must be at least 0 and below count=4"),
        ({"task": "e"}, "made has no task 'e'"),
        ({"split": "val"}, "Folds have no split 'val'"),
        ({"group": "lesion_id"}, "data.folds.group is 'lesion_id'. Did you mean"),
        ({"inner": 2}, "data.folds.inner=2 must be 0, or at least 3"),
    ],
)
def test_a_fold_that_cannot_be_dealt_is_one_sentence(fields, message):
    given = {"split": "train", "count": 4, "index": 0, "task": "d", "seed": 0, **fields}
    with pytest.raises(UserError, match=message):
        folds.open_fold(make_sources(), given.pop("split"), **given)


def test_the_index_of_a_fold_where_there_are_none_is_refused():
    config = {"balance": "", "folds": {"count": 0, "index": 0, "task": "", "seed": 0}}
    assert folds.settings(config) == {}
    config["folds"]["index"] = 2
    with pytest.raises(UserError, match=r"index=2 of data\.folds\.count=0"):
        folds.settings(config)


def test_folds_are_dealt_of_what_a_run_was_trained_on_and_of_no_other_corpus(monkeypatch):
    """Whatever the size of its images; else rows of training would be scored as test rows."""
    opened = []
    monkeypatch.setattr(assemble.corpora, "open_all", lambda *_, **__: opened.append("fold"))
    monkeypatch.setattr(assemble.corpora, "open_source", lambda *_, **__: opened.append("own"))
    monkeypatch.setattr(assemble.folds, "open_fold", lambda *_, **__: None)
    monkeypatch.setattr(assemble.retold, "retold", lambda source, _: source)
    data = common.data(corpora=("nih_cxr14:official-512",), balance="finding").to_dict()
    data["folds"] |= {"count": 5, "index": 1}
    for name in ("nih_cxr14:official-512", "nih_cxr14:official", "rsna_pneumonia:mgca"):
        assemble.open_corpus(name, data, "test")
    assert opened == ["fold", "fold", "own"]
