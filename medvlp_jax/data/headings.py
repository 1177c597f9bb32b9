"""Whole reports of any hospital split at their headings; MIMIC-CXR's own have `sections`.

A heading is a name with a colon that begins a line or follows a full stop or a colon, or a name
alone on its line, with or without Markdown (**FINDINGS:**, ## Findings). The names are those of
HEADINGS, several of them joined ("Findings and impression"), and, of capitals with a colon at the
start of a line, whatever MIMIC-CXR's rules map to a section.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from medvlp_jax.data import sections

# Headings of American chest reports and the section each opens; what an image cannot show is
# "other".
HEADINGS = {
    "findings": "findings|finding|report|observations",
    "impression": (
        "impression|impressions|conclusion|conclusions|assessment|summary|opinion|addendum"
    ),
    "other": (
        "indication|history|clinical history|clinical information|clinical indication|"
        "reason for exam|reason for examination|technique|comparison|comparisons|procedure|"
        "examination|exam|recommendation|recommendations|notification|wet read|study|views"
    ),
}
TOLD = ("impression", "findings")  # the sections that are kept; of two in one name, the first
# Names of MIMIC-CXR's rules that open "other"; a "comment" goes on with the section it stands in.
OTHERS = ("comparison", "indication", "examination", "technique", "history", "notification")
OTHERS += ("date", "recommendations", "wet read")
NO_BODY = ("recommendation", "notification", "wet read")  # of "other", what no body stands below

_SECTION = {word: name for name, words in HEADINGS.items() for word in words.split("|")}
_JOINABLE = {**_SECTION, "plan": "other"}
_JOINT = re.compile(r" ?[/&] ?| and ")
_HEADING = re.compile(
    r"(?:^|\n)[ \t]*(?:#+[ \t]*)?[*_]*"
    r"(?P<name>[A-Z][A-Z /,&()-]{0,60}?)[ \t]*(?:[*_]+[ \t]*)?(?::[*_]*|(?P<bare>(?=\n|$)))"
    rf"|(?<=[.:])[ \t]*[*_]*(?P<inside>{'|'.join(sorted(_SECTION, key=len, reverse=True))})"
    r"(?:\(s\))?[ \t]*(?:[*_]+[ \t]*)?:[*_]*",
    re.IGNORECASE,
)
_BLANK_LINE = re.compile(r"\n[ \t]*\n")
_SIGNATURE = re.compile(
    r"(?:^|\n|(?<=[.:]))[ \t]*(?:electronically|digitally)[ \t]+(?:signed|approved|verified)\b"
    r"|(?:^|\n)[ \t]*(?:signed|dictated|transcribed|interpreted|reported|approved|verified|read)"
    r"[ \t]+by[ \t]*(?::|dr\b)",
    re.IGNORECASE,
)


class _Mark(NamedTuple):
    """A heading, or a signature, which opens "other".

    Attributes:
      start, end: of the heading in the text.
      section: of HEADINGS.
      name: as the text has it.
      kind: how sure it is: "known" of HEADINGS with a colon, "joined" several of them, "bare"
        without a colon, "like" by MIMIC-CXR's rules, "view" of them, as "PA AND LATERAL CHEST".
      inside: whether it follows other words on its line.
    """

    start: int
    end: int
    section: str
    name: str = ""
    kind: str = "known"
    inside: bool = False


def split_sections(text: str) -> tuple[str, str]:
    """Return (findings, impression) of a whole report, runs of white space as one space.

    Text before the first heading counts as findings only where the report has no heading at all:
    otherwise it is a title, names or dates. History, technique, comparison and recommendations
    are left out, and what follows a signature. Where no heading opens findings, a blank line ends
    what stands before the impression, and findings follow. An addendum is impression.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    signatures = [_Mark(m.start(), m.end(), "other") for m in _SIGNATURE.finditer(text)]
    headings = list(_first_lines_whole(text, _trusted(list(_found(text)))))
    if not headings:
        unsigned = text[: signatures[0].start] if signatures else text
        return tidy(unsigned) or tidy(text), ""
    marks = sorted((*headings, *signatures))
    parts = {name: [] for name in HEADINGS}
    is_headless = not any(map(_tells_findings, marks))
    for mark, following in zip(marks, [*marks[1:], None], strict=True):
        body = text[mark.end : following.start if following else len(text)]
        is_headless = is_headless and not _tells(mark)
        if is_headless and mark.section == "other" and not _ends(mark):
            body, *rest = _BLANK_LINE.split(body.strip(), maxsplit=1)
            parts["findings"] += map(tidy, rest)
        parts[mark.section].append(tidy(body))
    return tuple(" ".join(filter(None, parts[name])) for name in ("findings", "impression"))


def _tells(mark: _Mark) -> bool:
    """Say whether a heading opens what a radiologist saw; an addendum adds to it."""
    return mark.section in TOLD and "addendum" not in mark.name.lower()


def _tells_findings(mark: _Mark) -> bool:
    return mark.section == "findings" or "finding" in mark.name.lower()


def _ends(mark: _Mark) -> bool:
    """Say whether no report's body stands below a heading; the name of a signature is ""."""
    return not mark.name or mark.name.lower().startswith(NO_BODY)


def tidy(text: str) -> str:
    """Join lines and runs of white space."""
    return " ".join(text.split())


def _found(text: str) -> Iterator[_Mark]:
    """Yield what looks like a heading."""
    for match in _HEADING.finditer(text):
        if name := match["inside"]:
            yield _Mark(*match.span(), _SECTION[name.lower()], name, inside=True)
            continue
        name, is_bare = match["name"], match["bare"] is not None
        section, kind = _opens(name, is_bare)
        if section and not (is_bare and _goes_on(text, match.start(), name)):
            yield _Mark(*match.span(), section, name, kind)


def _opens(name: str, is_bare: bool) -> tuple[str, str]:
    """Return the section and kind of a name at the start of a line; "" for no heading."""
    plain = tidy(name.lower().replace("(s)", ""))
    parts = [_JOINABLE.get(part, "") for part in _JOINT.split(plain)]
    if all(parts) and plain != "plan":
        section = next((told for told in TOLD if told in parts), "other")
        if is_bare:
            # In small letters it is the last word of a sentence, on a line of its own.
            is_heading = name.isupper() or (section in TOLD and name[0].isupper())
            return (section, "bare") if is_heading else ("", "")
        return section, "known" if plain in _SECTION else "joined"
    if is_bare or not name.isupper():
        return "", ""
    section = sections.canonical(plain)
    if section == "addendum":
        return "impression", "like"
    if section in OTHERS or plain.startswith("clinical "):  # a "clinical impression" is a question
        return "other", "like"
    return (section, "view" if sections.is_view(plain) else "like") if section in TOLD else ("", "")


def _goes_on(text: str, start: int, name: str) -> bool:
    """Say whether a line with a name alone ends a sentence of capitals begun above."""
    if "finding" in name.lower() or "impression" in name.lower():
        return False
    before = text[max(0, start - 80) : start]
    words = before.rstrip()
    has_blank_line = "\n" in before[len(words) :]
    return not has_blank_line and bool(words) and words[-1] not in ".:;?!*"


def _trusted(marks: Sequence[_Mark]) -> list[_Mark]:
    """Leave out what is less sure than a known name with a colon, where nothing bears it out.

    A report of a layout that is not understood is better read whole than not at all.
    """
    sure = [mark for mark in marks if mark.kind in ("known", "joined", "bare")]
    if any(map(_tells, sure)):
        marks = [mark for mark in marks if mark.kind != "view"]
        first, *others = marks
        is_title = first.kind == "bare" and first.name.lower() == "report"
        return others if is_title and any(m.section == "findings" for m in others) else marks
    if not any(mark.kind == "known" for mark in sure):
        return []
    return [mark for mark in marks if mark.kind not in ("joined", "bare")]


def _first_lines_whole(text: str, marks: Sequence[_Mark]) -> Iterator[_Mark]:
    """Leave out "other" headings inside the first line of findings or impression.

    "FINDINGS: Views: PA and lateral. Large effusion." goes on. Where a report has all headings on
    one line, those that are written alike, in capitals or not, end the section nevertheless.
    """
    last = None
    for mark in marks:
        if mark.inside and mark.section == "other" and last and last.section in TOLD:
            between = text[last.end : mark.start]
            runs_on = last.inside or "\n" not in text
            ends = between.strip() and runs_on and mark.name.isupper() == last.name.isupper()
            if "\n" not in between and not ends:
                continue
        last = mark
        yield mark
