"""Phrases of a record, and the batch keys they become."""

import functools

import numpy as np
import pytest

from medvlp_jax.config import UserError
from medvlp_jax.data import pipeline, text
from medvlp_jax.data.reports import Report
from medvlp_jax.evidence import extract, phrases
from medvlp_jax.evidence.backends import writer

RECORD = {
    "findings": "Small right pleural effusion. No pneumothorax. The heart is enlarged.",
    "impression": "Possible pneumonia.",
    "text_id": "t",
    "patient_id": "p",
    "image_id": "i",
}
EXPECTED = ("Small right pleural effusion", "heart is enlarged", "pneumonia")


def test_what_may_be_seen_is_shown_and_what_is_absent_is_not():
    assert phrases.reader()(RECORD) == EXPECTED
    normal = {"findings": "The lungs are clear.", "impression": ""}
    assert phrases.reader()(normal) == ("no acute cardiopulmonary abnormality",)
    assert phrases.reader()({"findings": "", "impression": ""}) == ()


def test_sentences_and_what_is_absent_are_ablations():
    read = phrases.reader(unit="sentence")
    whole = ("Small right pleural effusion.", "No pneumothorax.", "The heart is enlarged.")
    assert read(RECORD) == (*whole, "Possible pneumonia.")
    read = phrases.reader(negated=True)
    assert read(RECORD) == (EXPECTED[0], "no pneumothorax", *EXPECTED[1:])
    items = [{"phrase": "No focal opacity", "certainty": "absent"}]
    items += [{"phrase": "Effusion", "certainty": kind} for kind in ("absent", "present")]
    assert phrases.shown(items, negated=True) == ("No focal opacity", "no effusion", "Effusion")
    assert phrases.shown(items) == ("Effusion",)
    with pytest.raises(UserError, match="phrase or sentence, got 'word'"):
        phrases.reader(unit="word")
    with pytest.raises(UserError, match=r"neither with data\.evidence\.folder"):
        phrases.reader("somewhere", unit="sentence")


def test_an_extraction_gives_the_phrases_it_holds(tmp_path):
    report = Report("a", RECORD["findings"], RECORD["impression"])
    extract.run([report], writer("rules", extract.write_rules), tmp_path)
    read = phrases.reader(str(tmp_path))
    assert read(RECORD) == EXPECTED
    with pytest.raises(UserError, match="is not in") as refused:
        read({"findings": "Secret text.", "impression": ""})
    assert "Secret" not in str(refused.value)
    with pytest.raises(UserError, match=r"no evidence\.jsonl"):
        phrases.reader(str(tmp_path / "nowhere"))


def test_reports_that_nobody_answered_for_are_counted_aloud(tmp_path, capsys):
    report = Report("a", RECORD["findings"], RECORD["impression"])
    extract.run([report], writer("rules", lambda text: "no list"), tmp_path)
    assert phrases.reader(str(tmp_path))(RECORD) == ()
    assert "1 of 1 reports were never answered" in capsys.readouterr().err


@pytest.mark.parametrize(("count", "shown"), [(5, 3), (2, 2)])
def test_phrases_become_tokens_and_a_mask(count, shown):
    tokenizer = text.load_tokenizer("cxr_phantom")
    transform = pipeline.record_transform(
        inputs=("evidence", "evidence_mask", "paired", "image_row", "report_row"),
        decode=None,
        view=None,
        tokenizer=tokenizer,
        evidence=pipeline.Evidence(phrases.reader(), count, 10),
    )
    made = transform({**RECORD, "paired": True, "image_row": 3, "report_row": 4}, None)
    assert made["evidence_mask"].tolist() == [True] * shown + [False] * (count - shown)
    expected = functools.partial(text.tokenize, tokenizer, length=10)(
        [*EXPECTED[:count], *[""] * (count - shown)]
    )
    np.testing.assert_array_equal(made["evidence"].ids, expected.ids)
    np.testing.assert_array_equal(made["evidence"].mask, expected.mask)
    assert made["evidence"].mask.any(1).all()  # no attention row is empty
    assert (made["paired"], made["image_row"], made["report_row"]) == (True, 3, 4)
    assert made["paired"].dtype == bool
    assert made["image_row"].dtype == np.int32
