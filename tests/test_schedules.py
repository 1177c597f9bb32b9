"""Numbers that change over training."""

import numpy as np
import pytest

from medvlp_jax import schedules
from medvlp_jax.config import UserError
from medvlp_jax.recipes.base import check_weights


def test_a_number_stays_and_knots_interpolate():
    assert schedules.at(0.5, 100) == 0.5
    knots = ((10, 1.0), (20, 3.0))
    for step, value in ((0, 1.0), (10, 1.0), (15, 2.0), (20, 3.0), (99, 3.0)):
        assert schedules.at(knots, step) == value


def test_imitate_beta_equals_the_released_schedule_at_epoch_starts():
    beta = schedules.imitate_beta(100)
    for epoch in range(60):
        expected = 1.0 if epoch <= 30 else 0.3 if epoch >= 50 else 1.3 - (epoch - 30) / 20
        np.testing.assert_allclose(schedules.at(beta, epoch * 100), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "spec",
    [((0, 1.0), (0, 2.0)), "half", (), 5.0j, True, float("nan"), ((0, float("inf")),), ((0, "a"),)],
)
def test_unreadable_knots_are_refused(spec):
    with pytest.raises(ValueError, match=r"weight must be a finite number or \(\(step, value\)"):
        schedules.check("weight", spec)


def test_learning_rate_warms_up_then_falls_to_the_floor():
    rate = schedules.learning_rate(1e-3, steps=100, warmup=10, kind="cosine", floor=1e-5)
    np.testing.assert_allclose([rate(0), rate(5), rate(10)], [0, 5e-4, 1e-3], rtol=1e-6)
    half = 1e-5 + (1e-3 - 1e-5) * 0.5
    np.testing.assert_allclose([rate(55), rate(100)], [half, 1e-5], rtol=1e-4)


@pytest.mark.parametrize(
    "fields", [{"kind": "linear", "warmup": 0}, {"kind": "cosine", "warmup": 9}]
)
def test_wrong_schedules_are_refused(fields):
    with pytest.raises(ValueError, match=r"linear|warmup must be"):
        schedules.learning_rate(1.0, steps=9, **fields)


def test_cfcml_equals_the_published_rate_in_all_fifty_epochs():
    """Section 2.4 of the specification: peak 5e-4, 36 steps an epoch."""
    rate = schedules.learning_rate(5e-4, steps=50 * 36, warmup=0, kind="cfcml")
    shares = [0, 0.2, 0.4, 0.6, 0.8] + [1.0] * 6
    for turn in range(1, 9):
        shares += [0.8**turn] * 5
    shares = shares[:50]
    for epoch, share in enumerate(shares, start=1):
        first, last = (epoch - 1) * 36, epoch * 36 - 1
        np.testing.assert_allclose([rate(first), rate(last)], 5e-4 * share, rtol=1e-5)
    np.testing.assert_allclose(rate(50 * 36 - 1), 8.39e-5, rtol=1e-3)
    with pytest.raises(ValueError, match="warm-up of its own"):
        schedules.learning_rate(5e-4, steps=50, warmup=3, kind="cfcml")


def test_the_knots_of_a_loss_weight_are_checked_where_it_is_named():
    with pytest.raises(UserError, match=r"recipe\.weights\.a must be .* with increasing steps"):
        check_weights({"a": ((100, 1.0), (50, 0.0))}, ("a",))
