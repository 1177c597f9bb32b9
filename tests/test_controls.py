"""Controls go with what they take something away from."""

import types

import pytest

from medvlp_jax import controls
from medvlp_jax.config import UserError
from medvlp_jax.recipes import clip


def evaluator(protocols, asked, table=(), split="test"):
    return types.SimpleNamespace(
        settings={"protocols": protocols, "controls": asked, "split": split},
        parts=types.SimpleNamespace(recipe=clip.Clip, config={"recipe": {"name": "clip"}}),
        source=types.SimpleNamespace(metadata={"table": {name: {} for name in table}}),
        corpus="made",
    )


def test_controls_of_protocols_that_do_not_run_are_refused_and_left_out():
    controls.check(evaluator(("zero_shot", "retrieval"), ("untrained", "shuffled_pairs")))
    with pytest.raises(UserError, match=r"shuffled_pairs goes with protocol retrieval"):
        controls.check(evaluator(("zero_shot",), ("shuffled_pairs",)))
    asked = ("untrained", "shuffled_pairs", "shuffled_phrases")
    assert controls.fitting(asked, ("retrieval",)) == ("untrained", "shuffled_pairs")
    assert controls.fitting(asked, ("zero_shot",)) == ("untrained",)


def test_a_missing_mask_needs_a_classifier_and_a_table():
    with pytest.raises(UserError, match=r"missing_mask is for classifiers .* recipe clip on made"):
        controls.check(evaluator(("zero_shot",), ("missing_mask",), table=("age",)))


@pytest.mark.parametrize("control", ["regression", "missing_mask"])
def test_what_learns_from_the_train_split_is_not_scored_on_it(control):
    with pytest.raises(UserError, match=f"{control} learns from the split train"):
        controls.check(evaluator(("zero_shot",), (control,), table=("age",), split="train"))
