"""MIMIC-CXR's section rules on made-up reports, one rule a test."""

import pytest

from medvlp_jax.config import UserError
from medvlp_jax.data import sections
from medvlp_jax.data.sections import Sections

WHOLE = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)
 
 INDICATION:  ___ year old woman with cough  // pneumonia?
 
 COMPARISON:  ___
 
 FINDINGS: 
 
 The lungs are clear.
 No effusion.
 
 IMPRESSION: 
 
 No acute process.
"""


def test_a_plain_report_is_split_and_keeps_inner_line_breaks():
    assert sections.split(WHOLE) == Sections(
        impression="No acute process.",
        findings="The lungs are clear.\n No effusion.",
        comparison="___",
    )
    assert [name for name, _ in sections.parse(WHOLE)] == [
        "preamble",
        "examination",
        "indication",
        "comparison",
        "findings",
        "impression",
    ]
    assert sections.conclusion(WHOLE) == "No acute process."


def test_a_heading_needs_a_line_break_and_a_space():
    text = "\n IMPRESSION: One. FINDINGS: same line\nFINDINGS: no space\n Findings: small\n"
    assert [name for name, _ in sections.parse(text)] == ["preamble", "impression"]


def test_a_second_heading_on_the_line_of_a_heading_opens_nothing():
    text = "x\n CHEST, TWO VIEWS: \n PA AND LATERAL: clear.\n"
    # The line ends right after the first heading: the break belongs to its white space.
    assert dict(sections.parse("x\n IMPRESSION:\n FINDINGS: clear\n"))["impression"]
    assert dict(sections.parse(text))["findings"].strip().endswith("clear.")


@pytest.mark.parametrize(
    ("heading", "name"),
    [
        ("CONCLUSION", "impression"),
        ("FINDINGS AND IMPRESSION", "impression"),
        ("NDICATION", "impression"),
        ("IMPRESSOIN", "impression"),
        ("PRELIMINARY IMPRESSION", "impression"),
        ("REFERENCE EXAM", "comparison"),
        ("PFI", "history"),
        ("REASON FOR EXAM", "indication"),
        ("PORTABLE AP CHEST", "findings"),
        ("FRONTAL AND LATERAL VIEWS", "findings"),
        ("LEFT RIBS", "findings"),
        ("COMPARISON STUDIES", "comparison"),
        ("DOSE", "dose"),
    ],
)
def test_names_are_mapped(heading, name):
    assert sections.parse(f"x\n {heading}: text\n")[1][0] == name


def test_empty_findings_are_dropped_and_an_earlier_one_counts():
    text = "x\n FINDINGS: first\n IMPRESSION: a\n FINDINGS:  \n \n IMPRESSION: b\n"
    assert sections.split(text) == Sections(impression="b", findings="first")


def test_without_either_the_last_paragraph_is_what_follows_the_blank_line():
    text = "x\n TECHNIQUE: AP view.\n \n Lungs are clear.\n \n Heart is normal.\n"
    assert sections.split(text).last_paragraph == "Lungs are clear.\n \n Heart is normal."
    assert sections.conclusion(text).startswith("Lungs are clear.")
    assert dict(sections.parse(text))["technique"] == "AP view."


def test_a_report_without_headings_is_one_section():
    assert sections.parse("Clear lungs.") == [("full report", "Clear lungs.")]
    assert sections.split("Clear lungs.") == Sections()
    assert sections.split("Chest.\n \n Clear lungs.").last_paragraph == "Clear lungs."


def test_comparison_is_the_last_resort():
    assert sections.conclusion("x\n COMPARISON: clear since ___.\n") == "clear since ___."
    assert sections.conclusion("x\n DOSE: 1\n") == ""


def test_54_studies_are_exceptions_that_the_sectioned_table_lacks():
    rules = sections._rules()
    named, spans = rules["named_section_of_study"], rules["span_of_study"]
    assert (len(named), len(spans), len(named | spans)) == (23, 31, 54)
    assert sum(span == [0, 0] for span in spans.values()) == 8
    text = "x\n INDICATION: Clear lungs.\n IMPRESSION: see above\n" + "a" * 900
    assert named["s50058765"] == "indication"
    assert sections.conclusion(text, "s50058765") == "Clear lungs."
    assert sections.of_study(text, "s50058765") == Sections(impression="Clear lungs.")
    assert sections.of_study(text, "s50058765", legacy=True) == Sections()
    assert sections.conclusion(text, "s50525523") == text[201:349]
    assert sections.conclusion(text, "s58235663") == ""
    assert sections.of_study(text, "s1").impression.startswith("see above")


FINDINGS = "1. The lungs are clear.\n2. Heart normal. OK. No effusion"


def test_recipes_are_versioned_and_found_without_a_version():
    assert sections.recipe("impression")("a\n b", "c \n d") == ("", "c d")
    assert sections.recipe("findings-v1")("a\n b", "c") == ("a b", "")
    assert sections.recipe("both")("a\n b", "c \n d") == ("a b", "c d")
    assert sections.recipe("joined")("a\n b", "c") == ("", "a b c")
    assert sections.recipe("joined")("", "c") == ("", "c")
    assert sections.recipe("imitate")("a", "b") == ("a", "b")
    assert sections.recipe("imitate")("a", "") == ("", "")
    with pytest.raises(UserError, match=r"No text recipe 'impresion'\. Did you mean impression-v1"):
        sections.recipe("impresion")


def test_mgca_takes_the_impression_first_and_keeps_words():
    mgca = sections.recipe("mgca")
    expected = "no acute process the lungs are clear heart normal no effusion"
    assert mgca(FINDINGS, "No acute process.") == (expected, "")
    assert mgca("Yes. Clear lungs.", "") == ("", "")  # two words: left out
    assert mgca("a b " * 200, "")[0].split() == ["a", "b"] * 56
