"""Exchanged inputs: never one's own, each taken once, everything else as it was."""

import types

import numpy as np
import pytest

from medvlp_jax.config import UserError
from medvlp_jax.data.corpora import Source
from medvlp_jax.evaluation import classify, shuffle


def test_every_row_gets_what_is_another_patients_and_each_is_taken_once():
    rng = np.random.default_rng(0)
    patients = [f"p{k}" for k in rng.integers(0, 12, 60)]
    found = shuffle.partners(patients, seed=1)
    assert sorted(found) == list(range(60))
    assert all(patients[i] != patients[j] for i, j in enumerate(found))
    assert (found != shuffle.partners(patients, seed=2)).any()
    with pytest.raises(UserError, match="One patient has 3 of 5 rows"):
        shuffle.partners(["a", "a", "a", "b", "c"], seed=0)


def test_only_what_is_named_moves(monkeypatch):
    rows = [
        {"image": i, "table": {"age": i}, "labels": i, "image_id": str(i), "patient_id": str(i)}
        for i in range(6)
    ]
    info = types.MappingProxyType({"tasks": {}, "table": {"age": {}}})
    source = Source("made", "test", info, "", rows)
    monkeypatch.setattr(Source, "__getitem__", lambda self, i: self.serialised[int(i)])
    images = shuffle.shuffled(source, "shuffled_images")
    told = shuffle.shuffled(source, "shuffled_metadata")
    for i in range(6):
        assert images[i]["image"] != i
        assert (images[i]["table"]["age"], images[i]["labels"]) == (i, i)
        assert told[i]["table"]["age"] != i
        assert (told[i]["image"], told[i]["patient_id"]) == (i, str(i))
    assert told.tables() == [told[i]["table"] for i in range(6)]


def test_a_study_is_judged_by_the_mean_probability_of_its_images():
    chances = np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6]])
    found = {
        "logits": np.log(chances) + np.array([[5.0], [-3.0], [0.0]]),  # logits have no zero
        "study_id": np.array(["b", "b", "a"]),
        "patient_id": np.array(["q", "q", "p"]),
        "label/d": np.array([[1, 0], [1, 0], [0, 1]]),
    }
    rows = classify.by_study(found, "d")
    np.testing.assert_allclose(np.exp(rows["logits"]), [[0.4, 0.6], [0.55, 0.45]])
    assert rows["patient_id"].tolist() == ["p", "q"]
    assert rows["label/d"].tolist() == [[0, 1], [1, 0]]
