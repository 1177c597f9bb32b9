"""Folds that lack classes: a clear outcome, by name."""

import itertools
import json

import numpy as np
import pytest
from sklearn import metrics as reference

from medvlp_jax.evaluation import classify, comparison, metrics, page, results

CLASSES = ("a", "b", "c")


def run(truth, scores=None):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(len(truth), 3)) if scores is None else scores
    labels = np.eye(3, dtype=np.int8)[truth]
    return classify.run(
        scores, labels, CLASSES, task="d", multi_label=False, groups=None, resamples=30
    )


def test_a_class_without_a_case_is_named_and_takes_no_part():
    found = run([0, 1, 0, 1, 1, 0])
    assert found["classify/d/protocol"]["skipped"] == ["c"]
    assert "undefined" not in found["classify/d/protocol"]
    assert 0 <= found["classify/d/macro_auroc"]["value"] <= 1
    assert not {f"classify/d/{name}/c" for name in ("recall", "f1", "auroc", "auprc")} & {*found}


def test_where_all_are_of_one_class_what_needs_two_is_listed_and_the_rest_stands():
    found = run([1, 1, 1, 1])
    note = found["classify/d/protocol"]
    assert note["skipped"] == ["a", "c"]
    assert {"macro_auroc", "macro_auprc"} <= {*note["undefined"]}
    assert 0 <= found["classify/d/accuracy"]["value"] <= 1
    assert "classify/d/macro_auroc" not in found
    assert "NaN" not in json.dumps(found, allow_nan=False)
    assert "undefined" in results.results_table(found)


@pytest.mark.parametrize("positive", ["", "b"])
def test_weighted_f1_and_the_auprc_of_decisions_are_scikit_learns(positive):
    rng = np.random.default_rng(1)
    truth = rng.choice(3, 200, p=(0.6, 0.3, 0.1))
    scores = rng.normal(size=(200, 3)) + 1.5 * np.eye(3)[truth]
    answers = scores.argmax(1)
    found = classify.single_label_scores(
        np.eye(3, dtype=np.int8)[truth], scores, CLASSES, positive=positive, resamples=0
    ).numbers
    weighted = reference.f1_score(truth, answers, average="weighted")
    assert found["weighted_f1"]["value"] == pytest.approx(weighted)
    focus = [CLASSES.index(positive)] if positive else range(3)
    hard = [reference.average_precision_score(truth == c, answers == c) for c in focus]
    assert found["hard_auprc"]["value"] == pytest.approx(np.mean(hard))
    assert found["hard_auprc"]["chance"] == pytest.approx(
        np.mean([(truth == c).mean() for c in focus])
    )


def test_chance_of_a_macro_auprc_is_that_of_random_scores_and_not_the_prevalence():
    found = run([0, 0, 0, 1, 2, 2])["classify/d/macro_auprc"]
    each = [metrics.expected_average_precision(positives, 6) for positives in (3, 1, 2)]
    assert found["chance"] == pytest.approx(np.mean(each), rel=1e-12)
    assert found["chance"] > 1 / 3 + 0.1


def test_ranking_is_told_class_by_class_with_the_macro_as_its_mean():
    rng = np.random.default_rng(6)
    truth = rng.choice(3, 80, p=(0.7, 0.3, 0.0))
    found = run(truth, rng.normal(size=(80, 3)) + np.eye(3)[truth])
    for metric, reference_of in (
        ("auroc", lambda share, n: 0.5),
        ("auprc", metrics.expected_average_precision),
    ):
        entries = [found[f"classify/d/{metric}/{name}"] for name in "ab"]
        macro = found[f"classify/d/macro_{metric}"]
        assert macro["value"] == pytest.approx(np.mean([entry["value"] for entry in entries]))
        for c, entry in enumerate(entries):
            chance = reference_of((truth == c).sum(), 80)
            assert entry["chance"] == pytest.approx(chance, rel=1e-12)
            assert entry["low"] <= entry["value"] <= entry["high"]
    assert not [key for key in run([1, 1, 1]) if "/auroc/" in key]


def test_f1_of_each_class_is_scikit_learns_and_its_chance_that_of_a_uniform_guess():
    rng = np.random.default_rng(4)
    truth = rng.choice(3, 300, p=(0.7, 0.3, 0.0))  # nothing is of class c, and some is called so
    scores = rng.normal(size=(300, 3)) + np.eye(3)[truth]
    found = run(truth, scores)
    expected = reference.f1_score(truth, scores.argmax(1), labels=[0, 1, 2], average=None)
    for c, name in enumerate("ab"):
        entry, share = found[f"classify/d/f1/{name}"], (truth == c).mean()
        assert entry["value"] == pytest.approx(expected[c])
        assert entry["chance"] == pytest.approx(2 * share / 3 / (share + 1 / 3))
        assert entry["low"] <= entry["value"] <= entry["high"]
    mean = np.mean([found[f"classify/d/f1/{name}"]["value"] for name in "ab"])
    assert found["classify/d/macro_f1"]["value"] == pytest.approx(mean)


def test_a_constant_added_to_the_logits_of_a_row_changes_no_number():
    rng = np.random.default_rng(2)
    truth = rng.integers(0, 3, 90)
    logits = rng.normal(size=(90, 3)) + np.eye(3)[truth]
    one, other = run(truth, logits), run(truth, logits + 5 * rng.normal(size=(90, 1)))
    for key, entry in one.items():
        if "value" in entry and "zscore" not in key:
            assert other[key]["value"] == pytest.approx(entry["value"]), key
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = reference.roc_auc_score(truth, chances, multi_class="ovr")
    assert one["classify/d/macro_auroc"]["value"] == pytest.approx(expected)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_a_constant_model_scores_the_chance_level_in_any_order_of_classes(order):
    truth = np.array([order[i] for i in [0] * 8 + [1] + [2]])
    found = run(truth, np.full((10, 3), 0.25))
    for name in ("accuracy", "accuracy_zscore", "balanced_accuracy", "macro_f1", "weighted_f1"):
        entry = found[f"classify/d/{name}"]
        assert entry["value"] == pytest.approx(entry["chance"], rel=1e-12), name
    for name in ("sensitivity", "specificity", "g_mean", "mcc", "hard_auprc", "recall/b", "f1/c"):
        entry = found[f"classify/d/{name}"]
        assert entry["value"] == pytest.approx(entry["chance"], rel=1e-12, abs=1e-12), name


def test_rows_that_tie_score_the_mean_over_all_ways_to_break_the_ties():
    scores = np.array([[1, 1, 0], [0, 2, 1], [3, 3, 3], [0, 1, 1], [5, 0, 0.0]])
    truth = np.array([1, 1, 2, 0, 0])
    ways = itertools.product((0, 1), (1,), (0, 1, 2), (1, 2), (0,))
    expected = np.mean([reference.accuracy_score(truth, way) for way in ways])
    labels = np.eye(3, dtype=np.int8)[truth]
    found = classify.single_label_scores(labels, scores, CLASSES, resamples=0).numbers
    assert found["accuracy"]["value"] == pytest.approx(expected, rel=1e-12)


def test_a_perfect_score_of_few_patients_has_no_interval_wherever_it_is_written(tmp_path):
    truth = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 2])
    results.write_results(run(truth, 4 * np.eye(3)[truth]), tmp_path, {})
    numbers = results.read(tmp_path).numbers
    entry = numbers["classify/d/macro_auroc"]
    assert (entry["value"], entry["low"], entry["high"]) == (1, None, None)
    found = comparison.compare({"run": results.Written(numbers, {})})
    (column,) = found.columns
    assert comparison.cell(column.metric, found.cells[("run", ""), column]) == "1.000"
    (task,) = page.tasks(numbers)
    for text, bound in ((results.results_table(numbers), "["), (page.table(task), "range")):
        assert "1.000" in text
        assert bound not in text
        assert "nan" not in text.lower()


def test_views_are_part_of_what_makes_numbers_comparable():
    labels, scores = np.eye(3, dtype=np.int8), np.eye(3)
    fields = {"task": "d", "multi_label": False, "resamples": 0}
    one, eight = (classify.run(scores, labels, CLASSES, views=v, **fields) for v in (1, 8))
    assert one["classify/d/protocol"]["hash"] != eight["classify/d/protocol"]["hash"]
    assert one["classify/d/accuracy"]["value"] == eight["classify/d/accuracy"]["value"]


def test_the_fewest_patients_of_a_class_are_of_those_known_for_it():
    """40 of 300 rows known, or a hundred images of one patient: their number is not the rows'."""
    labels = np.full((300, 2), -1)
    labels[:40, 0] = np.arange(40) % 2
    labels[:, 1] = np.arange(300) < 100
    groups = np.where(np.arange(300) < 100, 0, np.arange(300))
    assert classify.fewest_patients(labels) == [20, 100]
    assert classify.fewest_patients(labels, groups) == [1, 1]
    scores = np.random.default_rng(0).random((300, 2))
    found = classify.multi_label_scores(labels, scores, ["a", "b"], groups=groups, resamples=5)
    assert found.notes["fewest_patients"] == {"a": 1, "b": 1}
