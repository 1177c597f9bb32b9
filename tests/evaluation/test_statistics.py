"""Bootstrap against a loop over patients, DeLong against its oracle, Holm against the textbook."""

import types

import numpy as np
import pytest
import scipy.stats

from medvlp_jax.evaluation import metrics, statistics

Y = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 1, 0])
A = np.array([0.10, 0.40, 0.35, 0.20, 0.15, 0.80, 0.70, 0.35, 0.90, 0.60, 0.55, 0.05])
B = np.array([0.30, 0.45, 0.20, 0.50, 0.10, 0.60, 0.40, 0.40, 0.85, 0.55, 0.35, 0.25])


def mean_of(values):
    return lambda weights: metrics.weighted_mean(values, weights)[:, None]


def auroc_of(labels, scores):
    return lambda weights: metrics.auroc(labels, scores, weights)[:, None]


def test_delong_oracle():
    result = statistics.delong(Y, np.stack([A, B]))
    np.testing.assert_allclose(result.auroc, [0.9, 0.742857], atol=1e-6)
    expected = [[0.00823129, 0.00857143], [0.00857143, 0.02571429]]
    np.testing.assert_allclose(result.covariance, expected, atol=1e-8)
    test = statistics.delong_test(Y, A, B)
    assert test.z == pytest.approx(1.212285, abs=1e-6)
    assert test.p == pytest.approx(0.225403, abs=1e-6)
    interval = statistics.delong_interval(result, scale="linear")
    assert interval.low[0] == pytest.approx(0.7222, abs=1e-4)
    assert interval.high[0] == 1.0  # 1.0778 unclipped


def test_delong_on_the_logit_scale_stays_inside_and_a_perfect_score_has_no_interval():
    found = statistics.delong_interval(statistics.delong(Y, np.stack([A, Y])))
    half = 1.959964 * np.sqrt(0.00823129) / (0.9 * 0.1)
    bounds = [1 / (1 + np.exp(-(np.log(9) + side))) for side in (-half, half)]
    np.testing.assert_allclose([found.low[0], found.high[0]], bounds, atol=1e-6)
    assert found.value[1] == 1.0
    assert np.isnan([found.low[1], found.high[1]]).all()


def test_delong_equals_its_structural_components_in_loops():
    x, y = A[Y == 1], A[Y == 0]
    psi = np.array([[1.0 if a > b else 0.5 if a == b else 0.0 for b in y] for a in x])
    variance = np.var(psi.mean(1), ddof=1) / len(x) + np.var(psi.mean(0), ddof=1) / len(y)
    assert statistics.delong(Y, A).covariance[0, 0] == pytest.approx(variance, rel=1e-12)


def test_delong_of_identical_scores_has_p_one():
    assert statistics.delong_test(Y, A, 2 * A) == (0.0, 0.0, 1.0)


def test_delong_refuses_a_single_positive():
    with pytest.raises(ValueError, match="2 positives"):
        statistics.delong([1, 0, 0], [0.1, 0.2, 0.3])


def test_holm_steps_down_and_stays_monotone():
    np.testing.assert_allclose(statistics.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(statistics.holm([0.5, 0.9]), [1.0, 1.0])


def test_bootstrap_draws_whole_patients():
    groups = np.repeat(np.arange(6), 3)
    blocks = statistics.resample_blocks(groups, 6, at_most=100, seed=0)
    weights = next(blocks)
    np.testing.assert_array_equal(weights[:, 0::3], weights[:, 2::3])
    np.testing.assert_array_equal(weights.sum(1), 18)


def test_bootstrap_equals_a_loop_over_the_same_draws():
    rng = np.random.default_rng(1)
    values, groups = rng.normal(size=30), rng.integers(0, 9, 30)
    names = np.unique(groups)
    draws = np.random.default_rng(7).integers(len(names), size=(500, len(names)))
    means = [np.concatenate([values[groups == names[g]] for g in row]).mean() for row in draws]
    options = {"groups": groups, "resamples": 500, "seed": 7, "method": "percentile"}
    found = statistics.bootstrap(mean_of(values), 30, **options)
    assert found.value[0] == pytest.approx(values.mean())
    np.testing.assert_allclose(
        [found.low[0], found.high[0]], np.percentile(means, [2.5, 97.5]), rtol=1e-12
    )


def test_bca_equals_scipy_from_the_same_draws():
    rows = np.random.default_rng(3).exponential(size=40)  # skewed: the bounds do move
    skewness = lambda w: ((w @ rows**3) / w.sum(1))[:, None]
    draws = np.random.default_rng(5).integers(40, size=(400, 40))
    same = types.SimpleNamespace(bootstrap_distribution=(rows[draws] ** 3).mean(1))
    expected = scipy.stats.bootstrap(
        (rows,),
        lambda x, axis: (x**3).mean(axis),
        n_resamples=0,
        bootstrap_result=same,
        method="BCa",
    ).confidence_interval
    found = statistics.bootstrap(skewness, 40, resamples=400, seed=5)
    np.testing.assert_allclose([found.low[0], found.high[0]], expected, rtol=1e-9)
    plain = statistics.bootstrap(skewness, 40, resamples=400, seed=5, method="percentile")
    assert found.high[0] > 1.05 * plain.high[0]


def test_acceleration_leaves_out_whole_patients_and_parts_of_many(monkeypatch):
    rng = np.random.default_rng(0)
    values, groups = rng.exponential(size=60), np.repeat(np.arange(20), 3)
    left = np.array([values[groups != g].mean() for g in range(20)])
    d = left.mean() - left
    expected = (d**3).sum() / (6 * (d**2).sum() ** 1.5)
    found = statistics.acceleration(mean_of(values), groups, 20, seed=0)
    np.testing.assert_allclose(found, [expected], rtol=1e-9)
    monkeypatch.setattr(statistics, "JACKKNIFE", 7)
    left_out = []
    statistic = lambda w: (left_out.append(60 - w.sum(1)), w @ values[:, None])[1]
    statistics.acceleration(statistic, groups, 20, seed=0)
    assert sorted(np.concatenate(left_out)) == [6, 9, 9, 9, 9, 9, 9]


def test_block_size_does_not_change_the_draws(monkeypatch):
    whole = statistics.bootstrap(auroc_of(Y, A), 12, resamples=300)
    monkeypatch.setattr(statistics, "BLOCK_ELEMENTS", 12 * 7)
    parts = statistics.bootstrap(auroc_of(Y, A), 12, resamples=300)
    np.testing.assert_allclose(np.array(whole), np.array(parts), rtol=1e-12)


def test_clusters_widen_the_interval():
    values = np.repeat(np.random.default_rng(0).normal(size=40), 10)
    rows = statistics.bootstrap(mean_of(values), 400, resamples=500)
    patients = statistics.bootstrap(
        mean_of(values), 400, groups=np.repeat(np.arange(40), 10), resamples=500
    )
    ratio = (patients.high - patients.low) / (rows.high - rows.low)
    assert 2.5 < ratio[0] < 4.0  # sqrt(10) = 3.2


def test_resamples_without_a_positive_are_drawn_again():
    labels = np.arange(10) == 5
    found = statistics.bootstrap(auroc_of(labels, np.arange(10)), 10, resamples=200)
    assert np.isfinite(found.low[0])


def test_no_interval_from_one_patient_or_no_resamples():
    one = statistics.bootstrap(mean_of(A), 12, groups=np.zeros(12), resamples=50)
    none = statistics.bootstrap(mean_of(A), 12, resamples=0)
    for found in (one, none):
        assert found.value[0] == pytest.approx(A.mean())
        assert np.isnan([found.low[0], found.high[0]]).all()


def test_no_interval_of_what_is_the_same_in_all_resamples():
    perfect = statistics.bootstrap(auroc_of(np.arange(10) > 6, np.arange(10)), 10, resamples=200)
    never = statistics.bootstrap(mean_of(np.zeros(43)), 43, resamples=200)
    third = statistics.bootstrap(mean_of(np.full(43, 1 / 3)), 43, resamples=200)  # but for rounding
    for found, value in ((perfect, 1), (never, 0), (third, 1 / 3)):
        assert found.value[0] == pytest.approx(value)
        assert np.isnan([found.low[0], found.high[0]]).all()
    once = statistics.bootstrap(mean_of(np.arange(43) == 0), 43, resamples=200)
    assert once.low[0] < once.value[0] < once.high[0]


def test_an_undefined_statistic_neither_stops_nor_loops():
    found = statistics.bootstrap(
        lambda w: np.column_stack([np.full(len(w), np.nan), w @ A / w.sum(1)]), 12, resamples=50
    )
    assert np.isnan(found.low[0])
    assert np.isfinite(found.low[1])


def test_paired_comparison_of_equal_models_finds_nothing():
    found = statistics.compare(auroc_of(Y, A), auroc_of(Y, 2 * A), 12, resamples=200)
    assert (found.difference[0], found.low[0], found.high[0], found.p[0]) == (0, 0, 0, 1)


def test_paired_comparison_sees_a_small_consistent_difference():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=200)
    found = statistics.compare(mean_of(noise + 0.1), mean_of(noise), 200, resamples=400)
    assert found.low[0] > 0.09
    assert found.p[0] == pytest.approx(2 / 401)


def test_groups_of_the_wrong_length_are_refused():
    with pytest.raises(ValueError, match="one group for each of 12 rows"):
        statistics.bootstrap(mean_of(A), 12, groups=np.zeros(3))
