"""What a run is refused for once its recipe and its corpora are there; settings: test_train.py."""

import itertools
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

from configs import common
from medvlp_jax import checks
from medvlp_jax.config import UserError
from medvlp_jax.data import pairing, pipeline
from medvlp_jax.data.reports import Report
from medvlp_jax.evidence import extract
from medvlp_jax.evidence.backends import writer

CONTRASTS = SimpleNamespace(spaces={"report": ("image", "text")})
CLASSIFIES = SimpleNamespace(spaces={})


@pytest.mark.parametrize(
    ("size", "chunks", "recipe", "variables", "said"),
    [
        (1, 1, CONTRASTS, {}, "train.batch_size=1 leaves nothing to contrast"),
        (1, 1, CLASSIFIES, {"batch_stats": {}}, "BatchNorm needs 2 or more examples in each"),
        (4, 4, CONTRASTS, {"batch_stats": {}}, "train.batch_size=4 in train.chunks=4: BatchNorm"),
        (4, 4, CONTRASTS, {}, ""),  # the contrast is of the whole batch, whatever the chunks
        (4, 2, CONTRASTS, {"batch_stats": {}}, ""),
        (1, 1, CLASSIFIES, {}, ""),
    ],
)
def test_an_example_that_needs_others_is_not_alone(size, chunks, recipe, variables, said):
    config = {"train": {"batch_size": size, "chunks": chunks}}
    if not said:
        checks.several(config, recipe, variables)
        return
    with pytest.raises(UserError, match=said):
        checks.several(config, recipe, variables)


def test_an_extraction_that_lacks_reports_is_refused_before_training(tmp_path):
    texts = [("Clear.", ""), ("Secret.", "Worse."), ("", ""), ("Secret.", "")]
    extract.run([Report("a", "Clear.", "")], writer("rules", extract.write_rules), tmp_path)
    source = SimpleNamespace(name="csv_folder:mine", split="train", texts=lambda: texts)
    reads = SimpleNamespace(inputs=("image", "evidence"))
    config = {"data": {"evidence": {"folder": str(tmp_path)}}}
    said = r"2 of 3 reports of csv_folder:mine \(train\) are not in .*medvlp evidence extract"
    with pytest.raises(UserError, match=said) as refused:
        checks.evidence(config, reads, [source], None)
    assert "Secret" not in str(refused.value)
    checks.evidence(config, SimpleNamespace(inputs=("image", "report")), [source], None)
    checks.evidence({"data": {"evidence": {"folder": ""}}}, reads, [source], None)
    # Of a study that is an image alone no report is read.
    pools = pairing.Pools(np.array([0]), np.array([0, 1, 3]), np.array([0, 2]))
    checks.evidence(config, reads, [source], pools)
    texts[1:] = texts[:1]
    checks.evidence(config, reads, [source], None)


def validator_of(few, whole):
    """Stands for an evaluator whose first rows have other numbers than all of them."""

    def quick(variables, *, limit):
        asked.append(limit)
        if few is None and limit:
            raise UserError("No row has a text.")
        names = few if limit else whole
        entries = {name: {"value": None} for name in names}
        return {
            **entries,
            "retrieval/report/protocol": {},
            "classify/label/f1/mass": {"value": 1.0},
        }

    asked = []
    return SimpleNamespace(batch_size=8, quick=quick), asked


R1, R10 = "retrieval/text_to_image/R@1", "retrieval/text_to_image/R@10"


@pytest.mark.parametrize(
    ("few", "name", "asked"), [((R1,), R1, [8]), ((R1,), R10, [8, 0]), (None, R10, [8, 0])]
)
def test_a_selection_is_known_by_a_batch_or_by_all_rows(few, name, asked):
    validator, limits = validator_of(few, (R1, R10))
    checks.selected(name, validator, {})
    assert limits == asked


@pytest.mark.parametrize(
    "name", ["retrieval/text_to_image/R@20", "retrieval/report/protocol", "classify/label/f1/mass"]
)
def test_a_selection_that_no_evaluation_has_is_answered_with_its_neighbours(name):
    validator, _ = validator_of((R1,), (R1, R10))
    with pytest.raises(
        UserError, match=re.escape(f"train.select={name} is not among the") + r".* \S+/R@10"
    ):
        checks.selected(name, validator, {})


def corpora(*classes):
    """Return a config of several corpora that are trained on by their classes, and those."""
    names = tuple(f"csv_folder:{k}" for k in range(len(classes)))
    data = {"corpora": names, "shares": (), "balance": ""}
    opened = [SimpleNamespace(tasks={"dx": c} if c else {}, name="csv_folder") for c in classes]
    return {"recipe": {}, "data": data}, opened


@pytest.mark.parametrize("setting", ["task", "label"])
@pytest.mark.parametrize(
    ("second", "differs"),
    [
        (["malignant", "benign"], "class 0 is 'benign' in csv_folder:0 and 'malignant' in"),
        (["benign", "malignant", "other"], "class 2 is none in csv_folder:0 and 'other' in"),
        (["benign"], "class 1 is 'malignant' in csv_folder:0 and none in"),
        ([], "class 0 is 'benign' in csv_folder:0 and none in"),
    ],
)
def test_label_vectors_of_other_classes_are_not_mixed(setting, second, differs):
    reads, first = {"recipe": {setting: "dx"}}, ["benign", "malignant"]
    config, opened = corpora(first, first)
    checks.sources(config | reads, opened)
    config, opened = corpora(first, second)
    checks.sources(config, opened)  # of a recipe that reads no labels
    with pytest.raises(UserError, match=f"task 'dx' differ: {differs} csv_folder:1; accepted"):
        checks.sources(config | reads, opened)


def saved(batch_size, batches, **data):
    """Return a checkpoint's position and config, as JSON gives them back."""
    config = {"recipe": {"name": "clip"}, "seed": 0, "data": common.data(**data).to_dict()}
    config["train"] = common.train(batch_size=batch_size).to_dict()
    position = {"next_index": batches}
    return SimpleNamespace(position=position, config=json.loads(json.dumps(config)))


def resumed(batch_size, restored, **data):
    return checks.position(saved(batch_size, 0, **data).config, restored)


@pytest.mark.parametrize(
    ("sizes", "batches", "starts", "again"),
    [((4, 8), 3, 8, 4), ((4, 8), 4, 16, 0), ((8, 4), 3, 24, 0), ((6, 4), 3, 16, 2)],
)
@pytest.mark.parametrize("processes", [1, 2])
def test_other_batches_go_on_at_the_same_record(sizes, batches, starts, again, processes, capsys):
    number = lambda record, rng: {"record": np.asarray(record), "noise": np.asarray(rng.random())}
    sources = [range(50), range(100, 120)]

    def stream(size, state):
        parts = []
        for index in range(processes):
            of = {"process_index": index, "process_count": processes, "transform": number}
            parts.append(iter(pipeline.train_dataset(sources, batch_size=size, seed=0, **of)))
            parts[-1].set_state(state)
        while True:
            rows = [next(part) for part in parts]
            yield from np.concatenate([[r["record"], r["noise"]] for r in rows], axis=1).T

    old, new = sizes
    whole = list(itertools.islice(stream(old, {"next_index": 0}), 48))
    assert batches * old - starts == again < new
    rest = stream(new, resumed(new, saved(old, batches)))
    np.testing.assert_array_equal(list(itertools.islice(rest, 48 - starts)), whole[starts:])
    said = capsys.readouterr().out
    assert (
        f"after {batches * old} records with the batch that holds the next one, {again} of" in said
    )
    # Once more: the position counts batches of the size that it was saved with.
    second = saved(new, starts // new + 1)
    assert resumed(new, second) == second.position
    assert resumed(old, second)["next_index"] == (starts + new) // old


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"corpora": ("padchest",)}, "data.corpora: "),
        ({"shares": (1.0,)}, "data.shares: "),
        ({"texts": "impression"}, "data.texts: "),
        ({"pairing": {"ratio": 0.1}}, "data.pairing.ratio: 1.0 -> 0.1"),
        ({"pairing": {"passes": 9}}, "data.pairing.passes: 0 -> 9"),
        ({"threads": 7}, ""),
    ],
)
def test_a_place_that_means_nothing_is_said(changes, said, capsys):
    assert resumed(4, saved(4, 3), **changes) == {"next_index": 3}
    out = capsys.readouterr().out
    assert said in out
    assert ("the place in the data means nothing now" in out) == bool(said)


def test_pairs_whose_passes_are_counted_come_otherwise_in_other_batches(capsys):
    resumed(8, saved(4, 3, pairing={"passes": 9}), pairing={"passes": 9})
    assert "for data.pairing.passes: [4000, 8000]" in capsys.readouterr().out
