"""The linear probe: patient-grouped choices, and what it finds on features that hold the answer."""

import json

import numpy as np
import pytest

from medvlp_jax.config import UserError
from medvlp_jax.evaluation import probe


def make(n, rng, signal=2.0):
    """Two findings, one a linear function of the features, one noise; patients of two rows."""
    x = rng.normal(size=(n, 6)) * [1, 10, 0.1, 1, 1, 1]
    y = np.stack([x[:, 0] * signal + rng.normal(size=n) > 0, rng.random(n) > 0.5], 1)
    return x, y.astype(np.int8), np.arange(n) // 2


@pytest.fixture(scope="module")
def found():
    rng = np.random.default_rng(0)
    x, y, groups = make(240, rng)
    x_test, y_test, test_groups = make(200, rng)
    y[:10, 0] = -1
    return probe.run(
        x,
        y,
        x_test,
        y_test,
        classes=("real", "noise"),
        task="finding",
        multi_label=True,
        seed=0,
        train_groups=groups,
        test_groups=test_groups,
        resamples=200,
    )


def test_probe_finds_the_signal_and_only_the_signal(found):
    assert found["probe/finding/auroc/real"]["value"] > 0.9
    noise = found["probe/finding/auroc/noise"]
    assert noise["low"] < 0.5 < noise["high"]


def test_protocol_entry_says_what_was_fitted(found):
    note = found["probe/finding/protocol"]
    assert note["strength"] in probe.STRENGTHS
    assert note["strength_chosen"]
    assert note["train_rows"] == 240
    assert note["converged"] is True
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_single_label_probe_classifies():
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 3, 300)
    x = rng.normal(size=(300, 4)) + 3 * np.eye(4)[truth]
    y = np.eye(3, dtype=np.int8)[truth]
    found = probe.run(
        x[:200],
        y[:200],
        x[200:],
        y[200:],
        classes="abc",
        task="t",
        multi_label=False,
        seed=0,
        resamples=0,
    )
    assert found["probe/t/accuracy"]["value"] > 0.9
    assert found["probe/t/accuracy"]["low"] is None


def test_fraction_takes_whole_patients_and_nests():
    groups = np.repeat(np.arange(50), 3)
    small = probe.take_patients(groups, 0.1, seed=0)
    large = probe.take_patients(groups, 0.5, seed=0)
    assert len(small) == 15
    assert set(small) < set(large)
    assert len(np.unique(groups[small])) == 5
    with pytest.raises(UserError, match=r"10; it must be in \(0, 1\]"):
        probe.take_patients(groups, 10, seed=0)


def test_validation_shares_no_patient():
    groups = np.repeat(np.arange(20), 2)
    fit, held = probe.validation_split(groups, seed=0)
    assert not set(groups[fit]) & set(groups[held])
    assert len(fit) + len(held) == 40


def test_scale_of_the_features_does_not_matter():
    rng = np.random.default_rng(2)
    x, y, _ = make(120, rng)
    scores = [
        next(probe._fit_path(s * x, y, s * x, multi_label=True, strengths=(0.1,)))[0]
        for s in (1.0, 100.0)
    ]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-6)


def test_too_little_data_to_choose_a_strength_is_noted_and_ends_nothing():
    rng = np.random.default_rng(0)
    x, y, groups = make(40, rng)
    y[:, 1] = 0
    y[:, 0] = np.arange(40) == 7  # one patient: never on both sides of the split
    scores, fitted = probe.fit(x, y, x, multi_label=True, seed=0, train_groups=groups)
    assert not fitted["strength_chosen"]
    assert fitted["strength"] == 1.0
    assert scores[7, 0] == scores[:, 0].max()
    assert not scores[:, 1].any()


def test_a_single_patient_leaves_the_strength_unchosen():
    x, y, _ = make(20, np.random.default_rng(0))
    _, fitted = probe.fit(x, y, x, multi_label=True, seed=0, train_groups=np.zeros(20))
    assert (fitted["strength_chosen"], fitted["train_rows"]) == (False, 20)


@pytest.mark.parametrize("multi_label", [True, False])
def test_classes_that_training_rows_do_not_have_are_named(multi_label):
    rng = np.random.default_rng(0)
    y = np.eye(3, dtype=np.int8)[rng.integers(0, 3, 60)]
    few = np.eye(3, dtype=np.int8)[rng.integers(0, 2, 60)]
    options = {"classes": ("a", "b", "rare"), "task": "t", "seed": 0, "resamples": 0}
    found = probe.run(
        *(rng.normal(size=(60, 2)), few, rng.normal(size=(60, 2)), y),
        multi_label=multi_label,
        **options,
    )
    assert found["probe/t/protocol"]["not_fitted"] == ["rare"]
    if multi_label:
        assert found["probe/t/auroc/rare"]["value"] == 0.5


def test_same_seed_same_numbers():
    rng = np.random.default_rng(0)
    x, y, groups = make(80, rng)
    a, b = (probe.choose_strength(x, y, groups, multi_label=True, seed=3) for _ in range(2))
    assert a == b


def test_shares_of_the_patients_are_drawn_several_times_and_averaged():
    rng = np.random.default_rng(0)
    x, y, groups = make(200, rng)
    x_test, y_test, _ = make(80, rng)
    options = {"classes": ("real", "noise"), "task": "t", "multi_label": True, "resamples": 0}
    options |= {"train_groups": groups}
    found = probe.curve(x, y, x_test, y_test, fractions=(0.1, 1.0), draws=3, **options)
    key = "auroc/real"
    draws = [found[f"probe/t_10% (draw {seed})/{key}"]["value"] for seed in range(3)]
    mean = found[f"probe/t_10%/{key}"]
    assert mean["draws"] == draws
    assert len(set(draws)) == 3
    assert mean["value"] == pytest.approx(np.mean(draws), rel=1e-12)
    assert mean["sd"] == pytest.approx(np.std(draws, ddof=1), rel=1e-12)
    assert mean["low"] is None
    assert found["probe/t_10%/protocol"]["train_rows"] == [20, 20, 20]
    one = probe.run(x, y, x_test, y_test, seed=1, fraction=0.1, **options)
    assert found[f"probe/t_10% (draw 1)/{key}"] == one[f"probe/t_10%/{key}"]
    whole = probe.run(x, y, x_test, y_test, seed=0, **options)
    assert found[f"probe/t/{key}"] == whole[f"probe/t/{key}"]  # all patients: once, as ever
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_shares_and_draws_that_cannot_be_are_refused():
    with pytest.raises(UserError, match=r"fractions=\(0.1, 2\)"):
        probe.check_fractions(fractions=(0.1, 2), draws=3)
    with pytest.raises(UserError, match="draws=0"):
        probe.check_fractions(fractions=(0.1,), draws=0)


def test_tasks_of_one_class_a_row_are_told_from_findings():
    one_hot = np.eye(3, dtype=np.int8)
    assert not probe.is_multi_label(np.vstack([one_hot, [-1, -1, -1]]))
    assert probe.is_multi_label(np.vstack([one_hot, [1, 1, 0]]))
    assert probe.is_multi_label(np.vstack([one_hot, [0, 0, 0]]))


def test_a_limit_of_the_training_rows_is_in_the_hash():
    rng = np.random.default_rng(0)
    x, y, groups = make(40, rng)
    options = {"classes": ("real", "noise"), "task": "finding", "multi_label": True}
    options |= {"train_groups": groups, "resamples": 0}
    runs = [probe.curve(x, y, x, y, probe_limit=limit, **options) for limit in (0, 40)]
    all_rows, limited = (run["probe/finding/protocol"] for run in runs)
    assert limited["settings"]["probe_limit"] == 40
    assert all_rows["hash"] != limited["hash"]


def test_one_class_a_row_or_several_and_the_number_of_draws_are_in_the_hash():
    rng = np.random.default_rng(0)
    x, _, groups = make(60, rng)
    y = np.eye(2, dtype=np.int8)[(x[:, 0] > 0).astype(int)]
    options = {"classes": ("a", "b"), "task": "t", "train_groups": groups, "resamples": 0}
    run = lambda **more: probe.curve(x, y, x, y, fractions=(0.5,), **options, **more)
    found = [
        run(multi_label=multi_label, draws=draws)
        for multi_label, draws in ((False, 1), (True, 1), (False, 2))
    ]
    entries = [results["probe/t_50%/protocol"] for results in found]
    assert [entry["settings"]["draws"] for entry in entries] == [1, 1, 2]
    assert [entry["settings"]["multi_label"] for entry in entries] == [False, True, False]
    assert len({entry["hash"] for entry in entries}) == 3
    for results, entry in zip(found, entries, strict=True):
        assert results["probe/t_50%/macro_auroc"]["hash"] == entry["hash"]
    # A single draw is the same number, however many were drawn beside it.
    one, two = (results["probe/t_50% (draw 0)/macro_auroc"] for results in found[::2])
    assert one == two
