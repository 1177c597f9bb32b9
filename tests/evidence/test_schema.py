"""Answers of language models: strict where it matters, forgiving about commas."""

import json

import pytest

from medvlp_jax.evidence import schema

TEXT = "Patchy right lower lobe consolidation. No pneumothorax."
ITEM = {
    "phrase": "right lower lobe consolidation",
    "finding": "consolidation",
    "location": "right lower lobe",
    "attributes": ["patchy"],
    "severity": None,
    "certainty": "present",
    "change": None,
}
WHOLE = json.dumps({"evidence": [ITEM]})


@pytest.mark.parametrize(
    "answer",
    [
        WHOLE,
        json.dumps([ITEM]),
        f"Sure! Here is the JSON:\n```json\n{WHOLE}\n```\nAnything else?",
        WHOLE.replace("]}", ",]}"),
        WHOLE.replace("null", "None"),
        WHOLE.replace("null", '"null"'),
        WHOLE.replace('"', "\u201d"),
        json.dumps({"evidence": [ITEM, ITEM]})[:-60],  # cut off inside the second item
    ],
    ids=["whole", "bare list", "prose", "comma", "None", "null", "curly quotes", "cut off"],
)
def test_an_answer_is_read_however_it_is_wrapped(answer):
    assert schema.parse(answer, TEXT).evidence == (ITEM,)


@pytest.mark.parametrize(
    "answer",
    [
        f'<think>The form is {{"evidence": []}}.</think>{WHOLE}',
        f"<think>First {json.dumps({'evidence': [{**ITEM, 'finding': 'mass'}]})}.</think>{WHOLE}",
        f"No form given.\n</think>\n{WHOLE}",
        f'The form is {{"evidence": []}}, so: {WHOLE}',
        f"{json.dumps({'evidence': [{**ITEM, 'finding': 'mass'}]})} Better: {WHOLE}",
        f'{WHOLE} Another report would have {{"evidence": []}} [{{"page": 3}}].',
        f'The form is {{"evidence": []}}. {WHOLE[:-1]}',
    ],
    ids=["form", "draft", "opened before", "form aloud", "draft aloud", "empty", "cut off"],
)
def test_what_a_model_thinks_first_is_not_its_answer(answer):
    assert schema.parse(answer, TEXT).evidence == (ITEM,)


def test_thoughts_that_are_cut_off_are_no_answer():
    with pytest.raises(schema.Malformed):
        schema.parse(f"<think>Perhaps {WHOLE}? Let me see.", TEXT)


@pytest.mark.parametrize(
    "answer",
    ["", "I cannot help with that.", "{", "[]", '{"findings": []}', '{"evidence": "none"}', "null",
     "[" * 100_000, '{"evidence": ' * 100_000, f'{{"phrase": "x", "y": {"[" * 100_000}'],
    ids=lambda answer: answer[:20],
)  # fmt: skip
def test_an_answer_without_a_list_is_malformed(answer):
    with pytest.raises(schema.Malformed):
        schema.parse(answer, TEXT)


def test_an_empty_list_of_evidence_is_an_answer():
    assert schema.parse('{"evidence": []}', TEXT) == schema.Parsed((), {})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("certainty", "certain"),
        ("phrase", ""),
        ("phrase", 3),
        ("finding", None),
        ("attributes", "patchy"),
        ("attributes", [1]),
        ("location", 5),
        ("certainty", None),
    ],
)
def test_an_item_outside_the_schema_is_dropped_and_counted(field, value):
    parsed = schema.check([{**ITEM, field: value}, ITEM], TEXT)
    assert parsed == schema.Parsed((ITEM,), {"invalid": 1})


@pytest.mark.parametrize(
    ("field", "value"), [("severity", "huge"), ("change", ["new"]), ("change", 3)]
)
def test_a_degree_or_change_of_other_words_is_none(field, value):
    assert schema.check([{**ITEM, field: value}], TEXT) == schema.Parsed((ITEM,), {})


@pytest.mark.parametrize(
    ("phrase", "text"),
    [
        ("pleural effusion", "Small pleural effusions."),
        ("opacities", "An opacity."),
        ("masses", "A mass."),
        ("pneumothorax", "Bilateral pneumothoraces."),
    ],
)
def test_a_phrase_may_have_the_other_number(phrase, text):
    assert schema.check([{**ITEM, "phrase": phrase}], text).dropped == {}


@pytest.mark.parametrize(
    ("text", "dropped"),
    [
        ("Large left pleural effusion.", {"not in the report": 1}),
        ("Large pleural effusion.", {"not in the report": 1}),
        ("Large right pleural effusion.", {}),
        ("Large pleural effusion, RT.", {}),
        ("Large bilateral pleural effusions.", {}),
    ],
)
def test_a_phrase_of_a_side_the_report_does_not_name_is_dropped(text, dropped):
    item = {**ITEM, "phrase": "large right pleural effusion"}
    assert schema.check([item], text).dropped == dropped


def test_the_rest_of_an_answer_that_was_cut_off_counts_as_dropped():
    answer = json.dumps({"evidence": [ITEM, ITEM]})
    assert schema.parse(answer, TEXT).dropped == {"repeated": 1}
    assert schema.parse(answer[:-60], TEXT).dropped == {"cut off": 1}


def test_a_phrase_the_report_does_not_hold_is_dropped():
    # 3 of 5 words are the 60 % that are needed, 2 of 4 are not.
    kept = {**ITEM, "phrase": "dense right lower lung consolidation"}
    lost = {**ITEM, "phrase": "massive left pneumothorax seen"}
    half = {**ITEM, "phrase": "large pneumothorax right apical"}
    parsed = schema.check([kept, lost, half], TEXT)
    assert parsed == schema.Parsed((kept,), {"not in the report": 2})


def test_a_repeated_phrase_counts_once():
    assert schema.check([ITEM, ITEM], TEXT).dropped == {"repeated": 1}


def test_the_normal_phrase_stands_without_being_in_the_report():
    assert schema.check([schema.normal()], "Clear lungs.").evidence == (schema.normal(),)


def test_a_report_with_braces_and_quotes_reaches_the_prompt_as_it_is():
    text = 'size {0} "in quotes" {"evidence": []} %s'
    assert schema.prompt(text).endswith(text)


def test_a_long_report_is_clipped_in_the_prompt_and_noted():
    text = "effusion " * 10_000
    assert schema.prompt(text).count("effusion") == schema.LONG
    assert "long" in schema.notes(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ("empty",)),
        (" .\n", ("empty",)),
        ("The lungs are clear.", ()),
        ("Kein Pneumothorax, kein Erguss, Herz normal gross, Lunge frei.", ("not English",)),
        ("Pas d'epanchement pleural ni de pneumothorax visible ce jour.", ("not English",)),
        ("Sin derrame pleural. Silueta cardiaca normal. No se observa neumonia.", ("not English",)),
        ("Hart is niet vergroot, geen infiltraat, geen pleuravocht.", ("not English",)),
        ("Increasing cardiomegaly. No effusions. Minimal interstitial edema.", ()),
        ("XXXX XXXX XXXX is clear", ("masked",)),
    ],
)
def test_odd_reports_are_noted(text, expected):
    assert schema.notes(text) == expected
