"""The offline extractor, from claims about sentences and from the phantom's true findings."""

import random

import pytest

from medvlp_jax.data.datasets.cxr_phantom import generate, patients
from medvlp_jax.evidence import agreement, rules


def found(text, *fields):
    """Return {(finding, *fields)} of a text."""
    return {tuple(item[f] for f in ("finding", *fields)) for item in rules.extract(text)}


CERTAINTY = [
    ("There is a right pleural effusion.", {("effusion", "present")}),
    ("No pleural effusion, pneumothorax or focal consolidation.",
     {("effusion", "absent"), ("pneumothorax", "absent"), ("consolidation", "absent")}),
    ("No effusion, but there is consolidation.",
     {("effusion", "absent"), ("consolidation", "present")}),
    ("No pneumothorax. Small effusion.", {("pneumothorax", "absent"), ("effusion", "present")}),
    ("Cardiomegaly without edema.", {("cardiomegaly", "present"), ("edema", "absent")}),
    ("Possible left lower lobe pneumonia.", {("pneumonia", "uncertain")}),
    ("Opacity which may represent pneumonia.",
     {("opacity", "present"), ("pneumonia", "uncertain")}),
    ("Pneumonia cannot be excluded.", {("pneumonia", "uncertain")}),
    ("Left basilar atelectasis or infiltrate.",
     {("atelectasis", "uncertain"), ("infiltrate", "uncertain")}),
    ("Pneumothorax is not seen.", {("pneumothorax", "absent")}),
    ("The effusion has resolved.", {("effusion", "absent")}),
    ("No focal airspace opacity to suggest a pneumonia.",
     {("airspace opacity", "absent"), ("pneumonia", "absent")}),
    ("No change in the small effusion.", {("effusion", "present")}),
    ("The heart is mildly enlarged.", {("cardiomegaly", "present")}),
    ("The heart is not enlarged.", {("cardiomegaly", "absent")}),
    ("Heart size within normal limits.", {("cardiomegaly", "absent")}),
    ("Borderline heart size.", {("cardiomegaly", "uncertain")}),
    ("The heart is normal and the aorta is tortuous.",
     {("cardiomegaly", "absent"), ("tortuous aorta", "present")}),
    ("There is a large mass near the heart.", {("mass", "present")}),
    ("Calcified and tortuous aorta.",
     {("calcification", "present"), ("tortuous aorta", "present")}),
    ("Enlarged heart and tortuous aorta.",
     {("cardiomegaly", "present"), ("tortuous aorta", "present")}),
    ("The right pneumothorax is no longer seen.", {("pneumothorax", "absent")}),
    ("Blunting of the costophrenic angles is not seen.",
     {("blunted costophrenic angle", "absent")}),
    ("Enlargement of the heart cannot be excluded.", {("cardiomegaly", "uncertain")}),
    ("The heart is enlarged and a pneumothorax is not seen.",
     {("cardiomegaly", "present"), ("pneumothorax", "absent")}),
    ("The heart is normal and an effusion is not seen.",
     {("cardiomegaly", "absent"), ("effusion", "absent")}),
    ("No effusion, and pneumonia cannot be excluded.",
     {("effusion", "absent"), ("pneumonia", "uncertain")}),
    ("Small resolved left apical pneumothorax.", {("pneumothorax", "absent")}),
    ("Normal heart size, resolved pleural effusion.",
     {("cardiomegaly", "absent"), ("effusion", "absent")}),
    ("Enlarged heart, not present on the prior.", {("cardiomegaly", "present")}),
    ("CT to exclude pneumonia.", set()),
    ("Bone density is reduced.", set()),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), CERTAINTY, ids=[t for t, _ in CERTAINTY])
def test_negation_and_doubt_reach_as_far_as_they_should(text, expected):
    assert found(text, "certainty") == expected


def test_a_finding_carries_its_place_degree_and_change():
    item = rules.extract("There is a new moderate patchy consolidation in the right lower lobe.")[0]
    assert item == {
        "phrase": "new moderate patchy consolidation in the right lower lobe",
        "finding": "consolidation",
        "location": "right lower lobe",
        "attributes": ["patchy"],
        "severity": "moderate",
        "certainty": "present",
        "change": "new",
    }


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("Pleural effusions on both sides, moderate.", "severity", "moderate"),
        ("The heart is severely enlarged.", "severity", "severe"),
        ("Right effusion is unchanged.", "change", "stable"),
        ("Worsening left effusion.", "change", "worse"),
        ("Interval improvement in the edema.", "change", "better"),
        ("Increased interstitial markings.", "change", None),
    ],
)
def test_degree_and_comparison_are_read_beside_the_finding(text, field, value):
    assert rules.extract(text)[0][field] == value


def test_another_name_of_a_finding_has_its_place():
    places = found("A linear opacity at the left base compatible with atelectasis.", "location")
    assert places == {("opacity", "left base"), ("atelectasis", "left base")}


def test_two_findings_of_a_sentence_keep_their_own_place_and_degree():
    items = found(
        "Small right effusion and severe left upper lobe consolidation.", "location", "severity"
    )
    assert items == {("effusion", "right", "mild"), ("consolidation", "left upper lobe", "severe")}


def plans(seed, count):
    return [
        generate.plan(seed, who, number)
        for who in patients.population(seed, count)
        for number in range(who.visits)
    ]


def test_the_phantoms_findings_are_recovered_exactly_from_each_section():
    for plan in plans(101, 700):
        truth = {f.name for f in plan.found}
        for section in filter(None, plan.report[:2]):
            assert agreement.phantom_findings(rules.extract(section)) == truth, section


def test_the_phantoms_sides_are_recovered_exactly():
    for plan in plans(102, 300):
        for section in filter(None, plan.report[:2]):
            items = rules.extract(section)
            for f in plan.found:
                if f.side in ("right", "left"):
                    names = agreement.PHANTOM[f.name]
                    places = [i["location"] for i in items if i["finding"] in names]
                    assert any(f.side in place for place in places), (f, section)


def test_phrases_are_the_reports_own_words_and_at_most_ten():
    for plan in plans(103, 300):
        text = "\n".join(plan.report[:2])
        for item in rules.extract(text):
            assert item["phrase"] in text
            assert item["phrase"].split(), text
            assert len(item["phrase"].split()) <= rules.MAX_WORDS


def test_the_order_of_sentences_and_capitals_change_nothing_but_the_order():
    sentences = [text for text, _ in CERTAINTY]
    shuffled = random.Random(0).sample(sentences, len(sentences))
    assert found(" ".join(shuffled), "certainty") == found(" ".join(sentences), "certainty")
    assert found(" ".join(sentences).upper(), "certainty") == found(
        " ".join(sentences), "certainty"
    )


def test_decimals_do_not_end_a_sentence():
    phrase = "1.8 cm nodule in the right upper lobe"
    assert rules.extract(f"There is a {phrase}.")[0]["phrase"] == phrase


@pytest.mark.parametrize(
    "text",
    ["", " \n ", "XXXX XXXX.", '{"evidence": [{"x"}]} "quoted" {0} %s', "İİİ effusion", "." * 999],
)
def test_odd_text_is_read_without_an_error(text):
    for item in rules.extract(text):
        assert item["phrase"] in text


def test_ten_thousand_words_give_ten_thousand_words_of_evidence():
    assert len(rules.extract("Small right pleural effusion is seen. " * 1667)) == 1667
