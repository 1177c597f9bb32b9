"""Grounding of a run: maps are what the recipe says, boxes lie where they belong."""

import argparse
import dataclasses
import io

import numpy as np
import pytest
from PIL import Image
from tiny_config import get_config

from medvlp_jax import assemble, cases, controls, examples, ground
from medvlp_jax.config import UserError
from medvlp_jax.evaluation import case_tables, grounding, metrics, scoring, zero_shot
from medvlp_jax.evaluator import Evaluator


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory):
    """CLIP as it was initialised, and the generated radiographs of "tiny"."""
    config = get_config().to_dict()
    config["data"]["data_dir"] = str(tmp_path_factory.mktemp("data"))
    config["init"]["text"] = ""
    config["recipe"]["image"]["pooling"] = "mean"
    config["evals"] |= {"protocols": ("grounding",), "limit": 24, "split": "train"}
    config["evals"]["controls"] = ("shuffled_phrases",)
    parts = assemble.parts(config)
    return Evaluator(parts, config["evals"]), assemble.initial_variables(parts)


def test_every_phrase_is_scored_and_so_are_wrong_ones(evaluator):
    found = controls.full(*evaluator)
    entry = found["grounding/cosine/cnr_micro"]
    assert entry["n"] == len(evaluator[0].grounder.pairs) > 5
    assert 0 <= entry["low"] <= entry["value"] <= entry["high"]
    other = found["grounding/cosine (shuffled phrases)/cnr_micro"]
    assert other["n"] == entry["n"]
    assert other["value"] != entry["value"]
    kinds = {key.rsplit("/", 1)[1] for key in found if key.startswith("grounding/cosine/cnr/")}
    assert kinds <= {*evaluator[0].source.tasks["finding"]}


def test_the_pixels_that_are_counted_are_in_the_hash(evaluator):
    one, variables = evaluator
    entry = one.grounder.results(variables, resamples=0)["grounding/cosine/protocol"]
    said = {name: entry["settings"][name] for name in ("size", "crop", "fit")}
    assert said == {name: one.parts.config["data"][name] for name in said}


def test_the_boxes_are_in_the_provenance_and_labels_where_they_are_read(evaluator, monkeypatch):
    one, variables = evaluator
    rows = one.provenance(variables)["rows"]
    assert len(rows["boxes"]) == 16
    assert "labels" not in rows
    settings = {**one.settings, "protocols": ("retrieval",), "controls": ()}
    other = Evaluator(one.parts, settings)
    found = {"image_id": np.arange(3), "patient_id": np.arange(3), "label/finding": np.eye(3)}
    monkeypatch.setattr(other, "features", lambda *_, **__: found)
    monkeypatch.setattr(other, "_retrieval", lambda *_, **__: {})
    other.run(variables)
    rows = other.provenance(variables)["rows"]
    assert rows["labels"].keys() == {"finding"}
    assert "boxes" not in rows


def test_patients_in_two_splits_are_warned_of_and_recorded(evaluator, monkeypatch, capsys):
    one, variables = evaluator
    settings = {**one.settings, "protocols": ("grounding",), "controls": ()}
    assert "torn_patients" not in one.provenance(variables)["rows"]
    # Folds deal them anew, and are asked for here: no patient of theirs is in two.
    torn = {**one.source.metadata, "torn_patients": 3}
    opened = dataclasses.replace(one.source, metadata=torn)
    monkeypatch.setattr(assemble, "open_corpus", lambda *_: opened)
    for count, warned in ((0, True), (3, False)):
        data = {**one.parts.config["data"]}
        data["folds"] = {**data["folds"], "count": count}
        parts = one.parts._replace(config={**one.parts.config, "data": data})
        capsys.readouterr()
        found = Evaluator(parts, settings).provenance(variables)["rows"]
        said = capsys.readouterr().out
        assert ("3 patients of cxr_phantom:tiny are in more than one" in said) == warned
        assert found.get("torn_patients") == (3 if warned else None)


def test_a_map_is_the_cosine_of_patches_and_phrase(evaluator):
    grounder, variables = evaluator[0].grounder, evaluator[1]
    parts = evaluator[0].parts
    patches, phrases = grounder.encode(variables, grounder.pairs)["cosine"]
    pair = grounder.pairs[-1]
    see = examples.record_transform(parts, ("image",), train=False)
    image = see(evaluator[0].source[grounder.rows[pair.row]], None)["image"]
    tokens = grounder.localise(variables, {"image": np.tile(image, (16, 1, 1, 1))})["cosine"]
    np.testing.assert_allclose(patches[pair.row], tokens[0], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(phrases[pair.phrase]), 1, rtol=1e-5)
    # A phrase lies in the space of the reports.
    text = evaluator[0].embed_texts(variables)([pair.phrase], "report")[0]
    np.testing.assert_allclose(phrases[pair.phrase], text, atol=1e-5)


def test_the_truth_as_a_map_scores_all(evaluator):
    grounder = evaluator[0].grounder
    for pair in grounder.pairs:
        inside = grounder.region(pair)
        assert inside.any()
        noise = 1e-3 * np.random.default_rng(0).random(inside.shape)
        seen = grounding.score(inside + noise, inside)
        assert seen.cnr > 100
        assert seen.pointing == 1
        assert seen.miou > 0.99


def test_boxes_lie_over_what_the_mask_of_the_record_shows(evaluator):
    """The phantom outlines most findings in its mask too."""
    grounder, source, checked = evaluator[0].grounder, evaluator[0].source, 0
    side, bits = evaluator[0].parts.config["data"]["size"], source.metadata["mask_bits"]
    for row in range(len(grounder.rows)):
        own = [pair for pair in grounder.pairs if pair.row == row]
        mask = Image.open(io.BytesIO(source[grounder.rows[row]]["mask"]))
        mask = np.asarray(mask.resize((side, side), Image.Resampling.NEAREST))
        for kind in {pair.category for pair in own} & {*bits}:
            shown = (mask >> bits[kind] & 1).astype(bool)
            boxes = np.any([grounder.region(p) for p in own if p.category == kind], axis=0)
            assert (shown & boxes).sum() >= 0.8 * shown.sum() > 0
            checked += 1
    assert checked > 3


def test_the_picture_is_drawn(evaluator, tmp_path):
    out = tmp_path / ground.PICTURE
    evaluator[0].grounder.draw(evaluator[1], out)
    assert min(Image.open(out).size) > 500
    assert [p.name for p in tmp_path.iterdir()] == [ground.PICTURE]


def test_pictures_take_turns_among_the_categories(evaluator):
    pairs = evaluator[0].grounder.pairs
    kinds = {pair.category for pair in pairs}
    shown = ground.picked(pairs, len(kinds))
    assert {pairs[i].category for i in shown} == kinds


@pytest.mark.parametrize(
    ("phrase", "category"),
    [
        ("moderate left effusion", "effusion"),
        ("enlarged cardiac silhouette", "cardiomegaly"),
        ("left lung", "left lung"),
    ],
)
def test_the_category_of_a_phrase_is_its_finding_or_itself(phrase, category):
    tasks = {"finding": ["Effusion", "cardiomegaly"]}
    assert ground.category_of(phrase, tasks).lower() == category


def test_bad_settings_are_refused(evaluator):
    parts, settings = evaluator[0].parts, evaluator[0].settings
    for changes, message in (
        ({"grounding": {"interpolation": "cubic", "smoothing": 0.0}}, "bilinear, nearest"),
        ({"protocols": ("retrieval",)}, "shuffled_phrases goes with protocol grounding"),
    ):
        with pytest.raises(UserError, match=message):
            Evaluator(parts, {**settings, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocols": ("probe",)}, "probe learns from the split train"),
        ({"class_task": "findings"}, "no task 'findings'. Did you mean finding"),
        ({"limit": -1}, "evals.limit=-1 must be 0 or more"),
        ({"batch_size": 0}, "evals.batch_size=0 must be 1 or more"),
        ({"masked_edge": 1.5}, "evals.masked_edge=1.5 must be above 0 and below 1"),
        ({"views": 3}, "evals.views=3 must be one of"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_embedded(
    evaluator, changes, message
):
    settings = {**evaluator[0].settings, "protocols": ("zero_shot",), "controls": ()}
    with pytest.raises(UserError, match=message):
        Evaluator(evaluator[0].parts, {**settings, **changes})


def test_thresholds_need_a_validation_split_from_the_start(evaluator, monkeypatch):
    one = evaluator[0]
    chosen = {**one.settings["zero_shot"], "threshold": "maxf1-on-val"}
    settings = {**one.settings, "protocols": ("zero_shot",), "controls": (), "zero_shot": chosen}
    assert Evaluator(one.parts, settings).validation.split == "validation"
    assert Evaluator(one.parts, {**settings, "split": "validation"}).validation is None

    def opened(name, data, split):
        if split == "validation":
            raise UserError("no split 'validation'")
        return one.source

    monkeypatch.setattr(assemble, "open_corpus", opened)
    with pytest.raises(UserError, match="no split 'validation'"):
        Evaluator(one.parts, settings)


def test_a_threshold_is_chosen_without_intervals_too_and_left_out_of_a_quick_look(
    evaluator, monkeypatch
):
    one, variables = evaluator
    chosen = {**one.settings["zero_shot"], "threshold": "maxf1-on-test"}
    settings = {**one.settings, "protocols": ("zero_shot",), "controls": (), "zero_shot": chosen}
    other = Evaluator(one.parts, {**settings, "resamples": 0})
    rng = np.random.default_rng(0)
    unit = lambda *shape: scoring.unit(rng.normal(size=shape))
    found = {"image": unit(24, 8), "patient_id": np.arange(24), "image_id": np.arange(24)}
    found["label/finding"] = rng.integers(0, 2, (24, 9)).astype(np.int8)
    monkeypatch.setattr(other, "features", lambda *_, **__: found)
    monkeypatch.setattr(other, "embed_texts", lambda _: lambda texts, _: unit(len(texts), 8))
    decided = "zero_shot/finding/macro_f1_at_threshold"
    assert 0 <= other.run(variables)[decided]["value"] <= 1
    assert other.run(variables, only=("retrieval",)) == {}
    quick = other.quick(variables, limit=24)
    assert decided not in quick
    assert "zero_shot/finding/macro_auroc" in quick


def test_cases_are_shown_by_the_features_that_were_scored(evaluator, monkeypatch):
    one, variables = evaluator
    other = Evaluator(one.parts, {**one.settings, "protocols": ("retrieval",), "controls": ()})
    embedded = []
    found = {"image_id": np.arange(3), "patient_id": np.arange(3)}
    monkeypatch.setattr(other, "features", lambda *given, **_: embedded.append(given) or found)
    monkeypatch.setattr(other, "_retrieval", lambda *_, **__: {})
    controls.full(other, variables)
    assert other.found(variables) is found
    assert len(embedded) == 1  # no second time
    other.found(dict(variables))  # those of other variables are not kept
    assert len(embedded) == 2


@pytest.mark.parametrize(
    ("protocols", "task"),
    [
        (("retrieval", "zero_shot@gloria", "zero_shot"), "view (gloria)"),
        (("zero_shot@benchx",), "view (benchx)"),
        (("zero_shot", "zero_shot@gloria"), "view"),
    ],
)
def test_the_scores_that_are_kept_are_those_the_first_flavour_was_scored_by(
    evaluator, monkeypatch, protocols, task
):
    """One class an image, some near to all texts, which the clean flavour does not rank by."""
    one, variables = evaluator
    here = Evaluator(one.parts, one.settings)
    here.settings = {**one.settings, "protocols": protocols, "batch_size": 7}
    rng = np.random.default_rng(0)
    texts = tuple(scoring.unit(rng.normal(size=(2, 6)) + np.eye(6)[5]) for _ in "abc")
    prompts = zero_shot.Prompts("toy-v1", "", False, tuple("abc"), (("1", "2"),) * 3, ())
    embeddings = zero_shot.ClassEmbeddings(prompts, texts, ())
    monkeypatch.setattr(here, "_prompted", lambda _: [("view", "image", [0, 1, 2], embeddings)])
    found = {"image": rng.normal(size=(40, 6)), "patient_id": np.arange(40)}
    found["label/view"] = np.eye(3, dtype=np.int8)[rng.integers(0, 3, 40)]
    results = {}
    for name in (name for name in protocols if name != "retrieval"):
        results |= here._one(name)(variables, found, mask=None, resamples=0)
    ((written, kept),) = here.prompt_scores(variables, found).items()
    assert written == task
    for c, name in enumerate("abc"):
        area = metrics.auroc(kept.labels[:, c] == 1, kept.scores[:, c])
        assert area == pytest.approx(results[f"zero_shot/{task}/auroc/{name}"]["value"], rel=1e-12)


def test_a_published_flavour_is_named_in_the_table_of_scores(evaluator, tmp_path):
    one, variables = evaluator
    settings = {**one.settings, "protocols": ("zero_shot@cxrclip",), "controls": ()}
    here = Evaluator(one.parts, {**settings, "limit": 16, "resamples": 0})
    results = here.run(variables, keep=True)
    cases.show(here, variables, tmp_path)
    (task,) = case_tables.read_scores(tmp_path / cases.SCORES)
    assert f"zero_shot/{task}/protocol" in results
    assert task == "finding (cxrclip)"


def test_a_corpus_without_labels_has_pairs_to_retrieve(evaluator, monkeypatch):
    one, variables = evaluator
    settings = {**one.settings, "protocols": ("retrieval",), "controls": (), "limit": 16}
    other = Evaluator(one.parts, settings)
    bare = type(one.source)
    monkeypatch.setattr(bare, "tasks", property(lambda source: {}))
    found = other._retrieval(
        variables,
        {
            k: v
            for k, v in other.features(variables, one.source, limit=16).items()
            if "label" not in k
        },
        mask=None,
        resamples=0,
    )
    assert "retrieval/image_to_text/R@1" in found
    assert "retrieval/image_to_text/P@1" not in found


def test_reports_that_are_spelt_alike_are_one_entry_of_the_gallery(evaluator, monkeypatch):
    one = evaluator[0]
    other = Evaluator(one.parts, {**one.settings, "protocols": ("retrieval",), "controls": ()})
    found = {"image": np.eye(4), "text": np.eye(4)[[0, 0, 2, 3]], "patient_id": np.arange(4)}
    found |= {"text_id": np.arange(4), "report_id": np.array([5, 5, 6, 7])}
    found["report_valid"] = np.ones(4, bool)
    for flavour, mark in (("clean", ""), ("cxrclip", " (cxrclip)")):
        numbers = other._retrieval({}, found, mask=None, flavour=flavour, resamples=0)
        entry = numbers[f"retrieval/image_to_text{mark}/protocol"]
        assert entry["gallery"] == 3
        assert (entry["settings"]["sections"], entry["settings"]["texts"]) == (["report"], "")


def test_a_split_without_boxes_is_refused(evaluator):
    one = evaluator[0]
    rows = [i for i in range(len(one.source)) if not one.source[i]["boxes"]["phrase"]]
    bare = argparse.Namespace(
        parts=one.parts, settings=one.settings, corpus="c", source=[one.source[rows[0]]]
    )
    with pytest.raises(UserError, match="c has none in train"):
        ground.Grounder(bare)


def test_features_keep_what_protocols_read_and_nothing_a_patch(evaluator, monkeypatch):
    """A vector a patch of 25,596 images would be gigabytes."""
    one, variables = evaluator
    patches = {"image": np.zeros((16, 4)), "lesions": np.zeros((16, 9, 4))}
    monkeypatch.setattr(one, "embed", lambda variables, batch: patches)
    found = one.features(variables, one.source, inputs=("image",), limit=20)
    assert found["image"].shape == (20, 4)
    assert "lesions" not in found
    assert all(values.ndim <= 2 for values in found.values())


def test_flavours_go_with_the_tasks_of_the_prompts(evaluator):
    one, variables = evaluator
    settings = {**one.settings, "controls": (), "limit": 16, "resamples": 5}
    settings["protocols"] = ("zero_shot@clean", "zero_shot@cxrclip", "retrieval@cxrclip")
    found = Evaluator(one.parts, settings).run(variables)
    assert found["zero_shot/finding/macro_auroc"]["protocol"] == "zero_shot@clean-v1"
    assert found["zero_shot/finding (cxrclip)/macro_auroc"]["hash"]
    assert found["retrieval/image_to_text (cxrclip)/protocol"]["gallery"] > 1
    for changes, message in (
        ({"protocols": ("zero_shot@gloria",)}, "has prompts of the absence"),
        ({"protocols": ("retrieval@gloria-v1",)}, "Did you mean retrieval@gloria"),
        ({"prompts": "gloria-v1", "protocols": ("zero_shot",)}, "gloria-v1 is for class"),
        ({"zero_shot": {**settings["zero_shot"], "threshold": "max"}}, "No threshold rule 'max'"),
        ({"probe": {"fractions": (0.0,), "draws": 3}}, r"fractions=\(0.0,\)"),
    ):
        with pytest.raises(UserError, match=message):
            Evaluator(one.parts, {**settings, **changes})
