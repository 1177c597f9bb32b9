"""The numbers a setting can have. That those of all configs can be is in test_config.py."""

import math

import pytest

from configs import common, lgdea
from medvlp_jax import config as configs
from medvlp_jax import ranges
from medvlp_jax.config import UserError


@pytest.mark.parametrize(
    ("accepted", "inside", "outside", "said"),
    [
        (ranges.Range(1), (1, 1e9), (0, -1, 0.999), "1 or more"),
        (ranges.Range(0, low_open=True), (1e-300,), (0, -1), "above 0"),
        (ranges.Range(0, 1), (0, 0.5, 1), (-0.1, 1.1), "at least 0 and at most 1"),
        (ranges.Range(0, 1, high_open=True), (0, 0.99), (1,), "at least 0 and below 1"),
        (ranges.Range(0, 1, low_open=True), (1, 0.01), (0,), "above 0 and at most 1"),
    ],
)
def test_a_range_holds_its_ends_as_it_says(accepted, inside, outside, said):
    assert all(value in accepted for value in inside)
    assert not any(value in accepted for value in (*outside, math.nan, math.inf, -math.inf))
    assert str(accepted) == said


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("optim.lr", -1.0, "optim.lr=-1.0 must be above 0."),
        ("optim.lr", math.nan, "optim.lr=nan must be above 0."),
        ("optim.b1", 1.5, "optim.b1=1.5 must be at least 0 and below 1."),
        ("train.batch_size", 0, "train.batch_size=0 must be 1 or more."),
        ("data.pairing.ratio", 5.0, "data.pairing.ratio=5.0 must be above 0 and at most 1."),
        ("data.shares", (0.5, -1.0), "data.shares=(0.5, -1.0) must be above 0."),
        ("data.view.flip_horizontal", 2.0, "must be at least 0 and at most 1."),
        ("recipe.lesions", 0, "recipe.lesions=0 must be 1 or more."),
    ],
)
def test_a_number_outside_is_refused_by_name(setting, value, said):
    config = lgdea.get_config("smoke").to_dict()
    ranges.check(config)
    section = config
    *sections, leaf = setting.split(".")
    for name in sections:
        section = section[name]
    section[leaf] = value
    with pytest.raises(UserError) as error:
        ranges.check(config)
    assert str(error.value).endswith(said)


def test_a_schedule_and_another_section_are_left_alone():
    ranges.check({"optim": {"lr": ((0, 0.0), (10, 1.0))}, "other": {"lr": -1.0}})


def test_a_section_by_itself_is_looked_at_under_its_name():
    with pytest.raises(UserError, match=r"evals.limit=-1 must be 0 or more"):
        ranges.check(common.evals(limit=-1).to_dict(), "evals.")


def test_every_range_is_of_a_setting_there_is():
    """A misspelled name would be a range of nothing."""
    known = set()
    for name in ("cfcml", "clip", "imitate", "lgdea", "prima"):
        module = __import__(f"configs.{name}", fromlist=["get_config"])
        for variant in module.VARIANTS:
            known |= {key for key, _ in configs.flatten(module.get_config(variant))}
    assert {*ranges.RANGES} <= known
