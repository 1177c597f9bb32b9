"""Prompt sets: counts, spaces, typos and draws of the published lists."""

import json
import random

import numpy as np
import pytest

from medvlp_jax.config import UserError
from medvlp_jax.data import cxr_labels
from medvlp_jax.evaluation import prompts, zero_shot

FIVE = cxr_labels.CHEXPERT_5


def texts_of(name, task="class", classes=FIVE, **options):
    found = prompts.resolve(prompts.read(name), {task: classes}, **options)
    return {c: sides["positive"] for c, sides in found["tasks"][task]["classes"].items()}


def test_gloria_has_the_published_number_of_prompts():
    found = texts_of("gloria-v1")
    assert {c: len(texts) for c, texts in found.items()} == dict(
        zip(FIVE, (210, 15, 192, 18, 54), strict=True)
    )
    assert len(set(found["Pleural Effusion"])) == 36  # one of the three phrases stands twice


def test_slots_run_as_nested_loops_and_an_empty_one_leaves_its_space():
    found = texts_of("gloria-v1")
    assert found["Atelectasis"][0] == " subsegmental atelectasis at the mid lung zone"
    assert found["Atelectasis"][1] == " subsegmental atelectasis at the upper lung zone"
    assert found["Cardiomegaly"][1] == " cardiomegaly which is unchanged "
    assert found["Edema"][3] == "mild pulmonary edema "
    assert found["Pleural Effusion"][3] == " right bilateral pleural effusion"
    bare = texts_of("gloria-v1", strip=True)
    for name, texts in found.items():
        assert [text.strip() for text in texts] == bare[name]
    assert (
        "round  at the mid lung zone"
        in texts_of("medclip-rsna-v1", "finding", ("Pneumonia",))["Pneumonia"]
    )  # two spaces in the middle: what stripping leaves


def test_the_typos_are_published_and_the_corrected_set_has_none():
    typos = ("apperance", "uppper", "presistent")
    wrong = " ".join(t for texts in texts_of("gloria-v1").values() for t in texts)
    right = " ".join(t for texts in texts_of("gloria-v1-typofix").values() for t in texts)
    assert all(typo in wrong for typo in typos)
    assert not any(typo in right for typo in typos)
    assert len(right.split()) == len(wrong.split())


def test_a_draw_is_glorias_right_after_its_import_and_a_seed_repeats_it():
    rng, whole = random.Random(6), texts_of("gloria-v1")
    expected = {name: rng.sample(texts, 5) for name, texts in whole.items()}
    assert texts_of("gloria-v1", draw=5) == expected
    assert texts_of("gloria-v1", draw=5, seed=7) != expected
    assert texts_of("gloria-v1", draw=300) == whole  # as many as there are


def test_the_drawn_strings_stand_in_the_settings_of_the_result():
    found = prompts.resolve(prompts.read("gloria-v1"), {"class": FIVE}, draw=5)
    texts = zero_shot.prompt_texts(found, "class", FIVE)
    embed = lambda texts, section: np.random.default_rng(0).normal(size=(len(texts), 4))
    embedded = zero_shot.embed_prompts(texts, embed)
    result = zero_shot.run(
        embedded.positive, np.eye(5, dtype=np.int8), embedded, task="class", resamples=0
    )
    written = result["zero_shot/class/protocol"]["settings"]["positive"]
    assert written == list(texts_of("gloria-v1", draw=5).values())
    assert sum(map(len, written)) == 25


def test_prompts_are_read_by_the_rules_if_asked():
    sides = {"positive": ["Evidence of small left effusion", "zebra"], "negative": ["No effusion."]}
    given = {"version": "x", "tasks": {"finding": {"classes": {"effusion": sides}}}}
    found = prompts.resolve(given, {"finding": ("effusion",)}, by_rules=True)
    assert found["tasks"]["finding"]["classes"]["effusion"] == {
        "positive": ["Small left effusion.", "zebra"],
        "negative": ["No acute cardiopulmonary abnormality."],
    }


@pytest.mark.parametrize(
    ("name", "task", "classes", "counts"),
    [
        ("chexzero-v1", "finding", cxr_labels.NIH, (14, 14)),
        ("cxrclip-vindr-v1", "finding", cxr_labels.VINDR, (28, 28)),
        ("cxrclip-rsna-v1", "finding", ("Pneumonia",), (1, 1)),
        ("cxrclip-siim-v1", "finding", ("Pneumothorax",), (1, 1)),
        ("biovil-rsna-v1", "finding", ("Pneumonia",), (4, 4)),
        ("medclip-rsna-v1", "finding", ("Pneumonia",), (312, 0)),
        ("medclip-covid-v1", "class", ("COVID-19",), (12, 0)),
    ],
)
def test_shipped_sets_fit_the_corpora_they_are_for(name, task, classes, counts):
    found = prompts.resolve(prompts.read(name), {task: classes})
    texts = zero_shot.prompt_texts(found, task, classes)
    sides = texts.positive, texts.negative
    assert tuple(sum(map(len, side)) for side in sides) == counts
    assert texts.version == name


def test_templates_name_the_class_and_one_full_stop_is_there():
    found = prompts.resolve(prompts.read("chexzero-v1"), {"finding": ("Edema",)})
    assert found["tasks"]["finding"]["classes"]["Edema"] == {
        "positive": ["Edema"],
        "negative": ["no Edema"],
    }
    rsna = prompts.read("cxrclip-rsna-v1")["tasks"]["finding"]["classes"]["Pneumonia"]
    assert (rsna["positive"][0][-1], rsna["negative"][0][-1]) == (".", "a")
    said = texts_of("medclip-rsna-v1", "finding", ("Pneumonia",))["Pneumonia"]
    assert not any("pneumonia" in text for text in said)


def test_every_shipped_set_says_where_it_comes_from():
    assert len(prompts.shipped()) == 9
    for name in prompts.shipped():
        parsed = prompts.read(name)
        assert parsed["version"] == name
        assert parsed["source"]


def test_what_is_no_prompt_set_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"gloria-v2 is neither.*gloria-v1"):
        prompts.read("gloria-v2")
    for content in ("{", "[" * 5000):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(UserError, match="is not JSON"):
            prompts.read(tmp_path / "a.json")
    (tmp_path / "b.json").write_text(json.dumps([1]))
    with pytest.raises(UserError, match="is no prompt set"):
        prompts.read(tmp_path / "b.json")
    with pytest.raises(UserError, match=r"gloria-v1 is for class; the corpus has finding"):
        texts_of("gloria-v1", "finding")
    with pytest.raises(UserError, match="draw=-1 must be 0"):
        texts_of("gloria-v1", draw=-1)


SET = {"section": "report", "multi_label": True, "classes": {"A": {"positive": ["a"]}}}


@pytest.mark.parametrize(
    ("tasks", "sentence"),
    [
        (["finding"], '"tasks" must be'),
        ({"finding": "A"}, "'finding' needs a \"section\""),
        ({"finding": {**SET, "section": None}}, "'finding' needs a \"section\""),
        ({"finding": {**SET, "multi_label": 1}}, "'finding' needs \"multi_label\", true or false"),
        ({"finding": {**SET, "classes": ["A"]}}, "\"classes\" of task 'finding' must be"),
        ({"finding": {**SET, "classes": {"A": ["a"]}}}, "'A' of task 'finding' must be"),
        ({"finding": {**SET, "classes": {}}}, "'template' of task 'finding' must be"),
        *(
            ({"finding": {**SET, "classes": {"A": {"positive": side}}}}, "positive side of 'A'")
            for side in (
                "a text",
                [1],
                None,
                {"slots": []},
                {"slots": ["a", "b"]},
                {"slot": [["a"]]},
            )
        ),
    ],
)
def test_a_file_of_another_form_is_refused_and_no_letter_becomes_a_prompt(
    tmp_path, tasks, sentence
):
    file = tmp_path / "set.json"
    file.write_text(json.dumps({"version": "1", "tasks": tasks}))
    with pytest.raises(UserError, match=sentence) as error:
        prompts.read(file)
    assert str(file) in str(error.value)
    file.write_text(json.dumps({"version": "1", "tasks": {"finding": SET}}))
    assert prompts.read(file)["tasks"]["finding"] == SET
