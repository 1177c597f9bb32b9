"""The offline extractor, from claims about sentences and from the phantom's true findings."""

import json
import random

import pytest

from medvlp_jax.data.datasets.cxr_phantom import generate, patients
from medvlp_jax.evidence import agreement, extract, rules, schema


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
    ("Pneumothorax: none.", {("pneumothorax", "absent")}),
    ("Pleural effusion: absent.", {("effusion", "absent")}),
    ("Effusion: No.", {("effusion", "absent")}),
    ("Pleura: no effusion.", {("effusion", "absent")}),
    ("Effusion: small left, pneumothorax: none.",
     {("effusion", "present"), ("pneumothorax", "absent")}),
    ("Effusion, right breast absent.", {("effusion", "present")}),
    ("Pneumonia is unlikely.", {("pneumonia", "uncertain")}),
    ("Pneumonia unlikely.", {("pneumonia", "uncertain")}),
    ("Unlikely to represent pneumonia.", {("pneumonia", "uncertain")}),
    ("The mass is unlikely to represent pneumonia.",
     {("mass", "present"), ("pneumonia", "uncertain")}),
    ("Pneumothorax is ruled out.", {("pneumothorax", "absent")}),
    ("Pneumothorax has been excluded.", {("pneumothorax", "absent")}),
    ("Pneumothorax has not been excluded.", {("pneumothorax", "uncertain")}),
    ("Effusion has not resolved.", {("effusion", "present")}),
    ("Incompletely resolved pneumonia.", {("pneumonia", "present")}),
    ("The effusion has nearly resolved.", {("effusion", "present")}),
    ("Near-complete resolution of the effusion.", {("effusion", "present")}),
    ("No pneumothorax, small left effusion.",
     {("pneumothorax", "absent"), ("effusion", "present")}),
    ("No pneumothorax and small left pleural effusion.",
     {("pneumothorax", "absent"), ("effusion", "present")}),
    ("No consolidation or mass, mild cardiomegaly.",
     {("consolidation", "absent"), ("mass", "absent"), ("cardiomegaly", "present")}),
    ("No consolidation, large effusion, or pneumothorax.",
     {("consolidation", "absent"), ("effusion", "absent"), ("pneumothorax", "absent")}),
    ("No acute, mild or severe edema.", {("edema", "absent")}),
    ("Clear lungs without effusion or pneumothorax, cardiomegaly is present.",
     {("effusion", "absent"), ("pneumothorax", "absent"), ("cardiomegaly", "present")}),
    ("No consolidation, effusion or pneumothorax is present.",
     {("consolidation", "absent"), ("effusion", "absent"), ("pneumothorax", "absent")}),
    ("No consolidation or mass, and no effusion is seen.",
     {("consolidation", "absent"), ("mass", "absent"), ("effusion", "absent")}),
    ("Not only effusion but also consolidation.",
     {("effusion", "present"), ("consolidation", "present")}),
    ("Negative for pneumothorax, positive for effusion.",
     {("pneumothorax", "absent"), ("effusion", "present")}),
    ("Not positive for pneumothorax.", {("pneumothorax", "absent")}),
    ("No increase in effusion.", {("effusion", "present")}),
    ("No interval increase in the pleural effusion.", {("effusion", "present")}),
    ("Pulmonary oedema.", {("edema", "present")}),
    ("Pneumothorax is not visualised.", {("pneumothorax", "absent")}),
    ("Left haemothorax.", {("hemothorax", "present")}),
    ("Hemopneumothorax on the left.", {("pneumothorax", "present")}),
    ("Large tumour in the right upper lobe.", {("malignancy", "present")}),
    ("Empyema and a lung abscess.", {("empyema", "present"), ("abscess", "present")}),
    ("Aortic aneurysm without dissection.",
     {("aneurysm", "present"), ("dissection", "absent")}),
    ("Borderline heart size, improved mediastinal widening.",
     {("cardiomegaly", "uncertain"), ("wide mediastinum", "present")}),
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
        ("No increase in effusion.", "change", "stable"),
        ("Effusion has not resolved.", "change", "stable"),
        ("The effusion has nearly resolved.", "change", "better"),
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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Heart size is normal.", True),
        ("Heart size is normal. Ruptured diaphragm.", False),
        ("Heart size is normal. Possible rib cyst.", False),
        ("Heart size is normal. No rupture, or dislocation.", True),
        ("Heart size is normal. Dislocation is not seen. CT to exclude pulmonary embolism.", True),
        ("Heart size is normal. Haemorrhage.", False),
    ],
)
def test_a_report_of_an_abnormality_without_a_name_is_not_a_normal_one(text, expected):
    assert rules.is_normal(text) is expected
    assert (schema.normal() in json.loads(extract.write_rules(text))["evidence"]) is expected


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
