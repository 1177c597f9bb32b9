"""Exchanged inputs: never one's own, each taken once, everything else as it was."""

import types

import numpy as np
import pytest

from medvlp_jax.config import UserError
from medvlp_jax.data.corpora import Source
from medvlp_jax.evaluation import classify, retrieval, shuffle
from medvlp_jax.evaluator import Evaluator


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


def test_shuffled_pairs_leave_chance_of_a_perfect_retrieval(monkeypatch):
    rng = np.random.default_rng(0)
    unit = rng.normal(size=(120, 32))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    found = {"image": unit, "text": unit, "text_id": np.arange(120)}
    found |= {"report_valid": np.ones(120, bool), "patient_id": np.arange(120) // 2}

    class Perfect(Evaluator):
        def __init__(self):
            self.parts = types.SimpleNamespace(
                recipe=types.SimpleNamespace(spaces={"report": ("image", "text")})
            )
            self.settings = {"limit": 0, "resamples": 100}
            self.source = None

        def features(self, *_, **__):
            return dict(found)

        def _retrieval(self, variables, found, *, mask, **options):
            image, text = self.joint(found)
            return retrieval.run(
                image, text, found["text_id"], groups=found["patient_id"], **options
            )

    monkeypatch.setattr("medvlp_jax.assemble.place", lambda tree, parts: tree)
    right = Perfect()._retrieval({}, found, mask=None)["retrieval/image_to_text/R@1"]
    assert right["value"] == 1
    moved = Perfect().shuffled_pairs({})
    assert all("(shuffled pairs)" in key for key in moved)
    for direction in ("image_to_text", "text_to_image"):
        assert moved[f"retrieval/{direction} (shuffled pairs)/R@1"]["value"] == 0
        left = moved[f"retrieval/{direction} (shuffled pairs)/R@10"]
        assert left["low"] < left["chance"] < left["high"]


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


def test_a_study_has_the_class_of_its_images_or_none():
    found = {
        "logits": np.zeros((7, 2)),
        "study_id": np.array(["b", "a", "b", "c", "a", "c", "d"]),
        "patient_id": np.array(["q", "p", "q", "r", "p", "r", "s"]),
        "label/d": np.array([[-1, -1], [0, 1], [1, 0], [-1, -1], [0, 1], [-1, -1], [0, 1]]),
    }
    rows = classify.by_study(found, "d")
    assert rows["study_id"].tolist() == ["a", "b", "c", "d"]
    assert rows["label/d"].tolist() == [[0, 1], [1, 0], [-1, -1], [0, 1]]
    assert rows["patient_id"].tolist() == ["p", "q", "r", "s"]
    found["label/d"][0] = 0, 1
    message = "classify_studies: study 'b' has images of more than one class; accepted are studies"
    with pytest.raises(UserError, match=message):
        classify.by_study(found, "d")
