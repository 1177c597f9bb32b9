"""Controls go with what they take something away from."""

import types

import pytest

from medvlp_jax import controls
from medvlp_jax.config import UserError
from medvlp_jax.evaluation import shuffle
from medvlp_jax.recipes import clip


def evaluator(protocols, asked, table=(), split="test", reads=("image", "report"), images=None):
    return types.SimpleNamespace(
        settings={"protocols": protocols, "controls": asked, "split": split},
        parts=types.SimpleNamespace(recipe=clip.Clip, config={"recipe": {"name": "clip"}}),
        source=types.SimpleNamespace(
            metadata={"table": {name: {} for name in table}}, images=images or {}
        ),
        corpus="made",
        inputs=lambda: reads,
        images=lambda: tuple({*reads} & {"image", *(images or {})}),
    )


def test_controls_of_protocols_that_do_not_run_are_refused_and_left_out():
    controls.check(evaluator(("zero_shot", "retrieval"), ("untrained", "shuffled_pairs")))
    with pytest.raises(UserError, match=r"shuffled_pairs goes with protocol retrieval"):
        controls.check(evaluator(("zero_shot",), ("shuffled_pairs",)))
    asked = ("untrained", "shuffled_pairs", "shuffled_phrases")
    assert controls.fitting(asked, ("retrieval",)) == ("untrained", "shuffled_pairs")
    assert controls.fitting(asked, ("zero_shot",)) == ("untrained",)


@pytest.mark.parametrize(
    ("control", "protocols", "more", "message"),
    [
        ("shuffled_images", ("grounding",), {}, "shuffled_images goes with protocol zero_shot, re"),
        ("shuffled_metadata", ("zero_shot", "probe"), {}, "goes with protocol classify, classify_"),
        ("shuffled_metadata", ("classify",), {}, "recipe clip reads no table of made"),
        ("shuffled_images", ("classify",), {"reads": ("tabular",)}, "reads no image of made"),
        ("masked_edge", ("classify",), {"reads": ("metadata",)}, "reads no flat image of made"),
        (
            "masked_edge",
            ("classify",),
            {"reads": ("scan",), "images": {"scan": {"slices": 9}}},
            "reads no flat image",
        ),
    ],
)
def test_a_control_that_would_change_nothing_is_refused(control, protocols, more, message):
    with pytest.raises(UserError, match=message):
        controls.check(evaluator(protocols, (control,), **more))


@pytest.mark.parametrize("told", ["tabular", "metadata", "metadata_vector"])
def test_a_control_repeats_the_protocols_it_takes_something_from_and_no_other(told, monkeypatch):
    asked = ("masked_edge", *shuffle.CONTROLS)
    one = evaluator(("classify", "probe", "grounding"), asked, reads=("image", told))
    controls.check(one)
    ran = {}
    one.settings["masked_edge"] = 0.12
    monkeypatch.setattr(shuffle, "shuffled", lambda source, control: control)

    def run(variables, *, mask=None, source=None, only=(), keep=False, progress):
        ran[progress] = only
        return {}

    one.run = run
    controls.full(one, {})
    assert "probe" in ran["shuffled images"]
    assert "grounding" not in ran["shuffled images"]
    assert ran["shuffled metadata"] == ("classify", "classify_studies")
    assert ran["evaluation"] == ran["lower edge masked"] == ()
    kept = controls.fitting(asked, ("grounding",))
    assert kept == ("masked_edge",)


def test_a_missing_mask_needs_a_classifier_and_a_table():
    with pytest.raises(UserError, match=r"missing_mask is for classifiers .* recipe clip on made"):
        controls.check(evaluator(("zero_shot",), ("missing_mask",), table=("age",)))


@pytest.mark.parametrize("control", ["regression", "missing_mask"])
def test_what_learns_from_the_train_split_is_not_scored_on_it(control):
    with pytest.raises(UserError, match=f"{control} learns from the split train"):
        controls.check(evaluator(("zero_shot",), (control,), table=("age",), split="train"))
