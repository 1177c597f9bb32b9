"""The phantom's reports say what the image shows, judged by an independent reading of the text."""

import collections
import json
import re
from importlib import resources

import numpy as np
import pytest

from medvlp_jax.data import text
from medvlp_jax.data.datasets import cxr_phantom
from medvlp_jax.data.datasets.cxr_phantom import findings, generate, patients, reports

# What a reader would take for each finding; written from the words of radiology, not from the
# generator's tables.
WORDS = {
    "consolidation": r"consolidation|pneumonia|airspace",
    "effusion": r"effusion|pleural fluid|costophrenic",
    "pneumothorax": r"pneumothorax",
    "nodule": r"nodul",
    "mass": r"\bmass\b|malignancy|lung cancer",
    "cardiomegaly": r"cardiomegaly|enlarged|enlargement",
    "atelectasis": r"atelectasis",
    "edema": r"edema|vascular congestion|kerley",
}
DENIED = re.compile(
    r"^(no|there is no|there are no|negative for|normal|clear)\b|\bnot\b|\bwithout\b|clear of|"
    r"\bnormal\b|unremarkable"
)


def sentences(section):
    """Split at full stops that are not in a number, without list numbers."""
    parts = re.split(r"(?<=[a-z])\.\s*", re.sub(r"\b\d\. (?=[A-Z])", "", section))
    return [part.strip().lower() for part in parts if part.strip()]


def asserted(section):
    """Findings that a section claims."""
    claims = [s for s in sentences(section) if not DENIED.search(s)]
    return {name for name, words in WORDS.items() if any(re.search(words, s) for s in claims)}


@pytest.fixture(scope="module")
def plans():
    people = patients.population(2, 1200)
    return [generate.plan(2, who, n) for who in people for n in range(who.visits)][:2000]


def test_both_sections_assert_exactly_the_findings_that_are_there(plans):
    for plan in plans:
        names = {f.name for f in plan.found}
        if plan.report.findings:
            assert asserted(plan.report.findings) == names, plan.report.findings
        if plan.report.impression:
            assert asserted(plan.report.impression) == names, plan.report.impression


def test_sides_in_the_text_are_the_sides_of_the_findings(plans):
    for plan in plans:
        for section in plan.report[:2]:
            for f in plan.found:
                if f.name in ("cardiomegaly", "edema") or not section:
                    continue
                mine = [s for s in sentences(section) if re.search(WORDS[f.name], s)]
                mine = [s for s in mine if not DENIED.search(s)]
                spoken = {w for s in mine for w in re.findall(r"right|left|bilateral|both", s)}
                if f.side == "bilateral":
                    assert spoken & {"bilateral", "both"}, (f, section)
                else:
                    assert spoken == {f.side}, (f, section)


def test_sizes_in_the_text_are_the_sizes_in_the_image(plans):
    seen = 0
    for plan in plans:
        single = [f for f in plan.found if f.name in ("nodule", "mass", "pneumothorax")]
        if len(single) != 1:
            continue
        text_ = " ".join(plan.report[:2])
        sizes = {float(n) for n in re.findall(r"(\d+\.\d) cm", text_)}
        sizes |= {float(n) / 10 for n in re.findall(r"(\d+) mm", text_)}
        assert all(abs(size - single[0].size) < 0.06 for size in sizes), text_
        seen += len(sizes)
    assert seen > 100


def test_phrases_are_words_of_the_report_and_name_their_finding(plans):
    for plan in plans:
        assert len(plan.report.phrases) == len(plan.found)
        for f, phrase in zip(plan.found, plan.report.phrases, strict=True):
            assert phrase.lower() in " ".join(plan.report[:2]).lower()
            assert re.search(WORDS[f.name], phrase.lower()), (f, phrase)


def test_sections_are_missing_as_often_as_said_and_never_both(plans):
    empty = np.array([[not p.report.findings, not p.report.impression] for p in plans])
    assert not empty.all(axis=1).any()
    assert abs(empty[:, 0].mean() - reports.NO_FINDINGS) < 0.025
    assert abs(empty[:, 1].mean() - reports.NO_IMPRESSION) < 0.02


def test_normal_reports_repeat_each_other_and_abnormal_ones_hardly(plans):
    counts = {True: collections.Counter(), False: collections.Counter()}
    for plan in plans:
        counts[not plan.found][plan.report[:2]] += 1
    normal, abnormal = counts[True], counts[False]
    assert len(normal) < 0.6 * normal.total()
    assert normal.most_common(1)[0][1] > 20
    assert len(abnormal) > 0.85 * abnormal.total()


def test_some_reports_hedge(plans):
    hedged = sum("ossible" in p.report.impression or "may " in p.report.impression for p in plans)
    assert 0.01 < hedged / len(plans) < 0.2


def load_prompts():
    path = resources.files(cxr_phantom) / "prompts.json"
    return json.loads(path.read_text(encoding="utf-8"))


def test_prompts_cover_every_class_and_their_positives_assert_it():
    prompts = load_prompts()
    assert prompts["version"] == "cxr_phantom-v1"
    task = prompts["tasks"]["finding"]
    assert task["section"] == "impression"
    assert task["multi_label"] is True
    assert tuple(task["classes"]) == generate.CLASSES
    for name in findings.FINDINGS:
        sides = task["classes"][name]
        assert all(name in asserted(p) for p in sides["positive"])
        assert all(name not in asserted(p) for p in sides["negative"])


def test_shipped_vocabulary_knows_every_word_of_reports_and_prompts(plans):
    tokenizer = text.load_tokenizer("cxr_phantom")
    unknown = tokenizer.token_to_id("[UNK]")
    classes = load_prompts()["tasks"]["finding"]["classes"].values()
    spoken = [p for sides in classes for side in sides.values() for p in side]
    said = [" ".join(plan.report[:2]) for plan in plans[:500]]
    encoded = tokenizer.encode_batch([*said, *spoken, "Sagittal MR of the brain, T2-weighted."])
    assert all(unknown not in e.ids for e in encoded)
    assert tokenizer.get_vocab_size() <= 1000
    pieces = [token for e in encoded for token in e.tokens]
    assert sum(token.startswith("##") for token in pieces) < 0.01 * len(pieces)
