"""Where an encoder comes from: the run it lies in, and the splits that run has not seen."""

import json
import types

import pytest

from configs import common
from medvlp_jax import origins
from medvlp_jax.config import UserError
from medvlp_jax.data.corpora import Source


class Fake(Source):
    """A source whose records are plain dictionaries."""

    def __getitem__(self, index):
        return self.serialised[index]


def rows(count, first):
    return [
        {"image_id": f"i{i}", "patient_id": f"p{i // 2}", "study_id": f"p{i // 2}"}
        for i in range(first, first + count)
    ]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run trained on one of four folds, with an export, and a corpus with splits of its own."""
    folds = {**common.data().to_dict()["folds"], "count": 4, "index": 1}
    data = {"corpora": ["made:small"], "folds": folds, "stretch": True}
    folder = tmp_path / "run"
    (folder / "export/image").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"recipe": {"name": "clip"}, "data": data}))
    for model in ("export/image", "export"):
        (folder / model / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    made = (("train", 60, 0), ("validation", 10, 60), ("test", 10, 70))
    sources = [Fake("made", s, {"tasks": {}}, tmp_path, rows(n, at)) for s, n, at in made]
    monkeypatch.setattr(origins.corpora, "open_all", lambda name, **where: sources)
    return folder


def test_an_export_in_the_folder_of_a_run_is_of_that_run(run, tmp_path, monkeypatch):
    named = origins.find(run, None)
    around = origins.find(None, str(run / "export/image"))
    assert named == around
    assert around.run == run
    assert (around.corpora, around.data["stretch"]) == (("made:small",), True)
    monkeypatch.chdir(run / "export")
    assert origins.find(None, "image").run == run
    assert origins.find(None, "google/vit-base-patch16-224-in21k") == origins.Origin()
    assert origins.find(None, str(tmp_path)) == origins.Origin()
    assert origins.Origin().fold_of("made:small") == {}
    with pytest.raises(UserError, match="is not a run folder"):
        origins.find(tmp_path, None)


def test_splits_are_those_of_the_fold_that_the_run_was_trained_on(run):
    origin = origins.find(run, None)
    ids = lambda source: {row["image_id"] for row in source.serialised}
    own = [ids(source) for source in origins.open_splits("made", "", origins.Origin())]
    assert [len(part) for part in own] == [60, 10]
    train, test = origins.open_splits("made:small", "", origin)
    config = types.MappingProxyType({**origin.data, "corpora": ("made:small",)})
    for source in (train, test):
        same = origins.assemble.open_corpus("made:small", config, source.split)
        assert ids(source) == ids(same)
    assert ids(test) & own[0]  # which the corpus' own splits would have called unseen training
    assert not {r["patient_id"] for r in train.serialised} & {
        r["patient_id"] for r in test.serialised
    }
    assert origins.open_splits("made:small", "validation", origin)[1].split == "validation"
    # Another corpus has splits of its own.
    assert [ids(source) for source in origins.open_splits("made:large", "", origin)] == own
    with pytest.raises(UserError, match="--split train is what is learnt from"):
        origins.open_splits("made:small", "train", origin)


def test_what_is_known_and_what_is_not_is_said(run):
    origin = origins.find(run, None)
    (line,) = origins.said(origins.Origin(), "ham10000", "google/vit")
    assert "what google/vit was trained on is not known here" in line
    assert origins.said(origins.Origin(), "ham10000", "") == []  # random weights have seen nothing
    (line,) = origins.said(origin, "made:small", "RUN")
    assert f"{run} was trained on fold 1 of 4 of made:small" in line
    assert origins.said(origin, "made:small", "") == [line]
    assert origins.said(origin, "another", "RUN") == []
    trained = origin._replace(corpora=("rsna_pneumonia",))
    (line,) = origins.said(trained, "siim_acr", "RUN")
    assert "leakage: siim_acr shares images or patients" in line
    assert not origins.said(trained, "siim_acr", "")
