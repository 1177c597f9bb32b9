"""Sections of MIMIC-CXR reports by the rules its own sectioned table was made with.

The names, phrases and exceptions are those of https://github.com/MIT-LCP/mimic-cxr (MIT licence),
kept in vocab/mimic_sections.json; `headings.split_sections` is for reports of any other kind.

1. A heading is a line break, a space, capitals (or space ( ) / , -), a colon and white space. The
   search for the next one starts at the end of the heading's line, so that "PA AND LATERAL:" on
   the same line opens nothing.
2. Text before the first heading is "preamble"; without any heading all is "full report".
3. Names are lower case and mapped by the list of synonyms; else to impression, findings, history,
   comparison or addendum where one of these words is in it; else to findings where it speaks of a
   view ("chest", "two views"). "ndication" is impression there, and here.
4. Empty impression and findings sections are dropped.
5. Where neither is left and the last section has a blank line, what follows it is "last_paragraph".
6. The last section of each name counts.
7. 54 studies are read by exception: 23 by another section, 31 by a span of characters, 8 of these
   empty. The sectioned table leaves them out, and pipelines built on it lose them.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from medvlp_jax.config import UserError, nearest

_HEADING = re.compile(r"\n ([A-Z ()/,-]+):\s")
_BLANK_LINE = "\n \n"
_MAIN = ("impression", "findings", "history", "comparison", "addendum")
_BY_RANK = ("impression", "findings", "last_paragraph", "comparison")


class Sections(NamedTuple):
    """A row of mimic_cxr_sectioned.csv without its study; "" where there is none."""

    impression: str = ""
    findings: str = ""
    last_paragraph: str = ""
    comparison: str = ""


def parse(text: str) -> list[tuple[str, str]]:
    """Return (name, text) of the sections of a report in order: rules 1 to 5."""
    found = []
    mark = _HEADING.search(text)
    if mark:
        found.append(("preamble", text[: mark.start(1)]))
    else:
        found.append(("full report", text))
    while mark:
        start = mark.end()
        following = _HEADING.search(text, max(start, text.find("\n", start)))
        body = text[start : following.start() if following else len(text)]
        found.append((canonical(mark.group(1)), body))
        mark = following
    found = [(n, body) for n, body in found if body.strip() or n not in ("impression", "findings")]
    if not {"impression", "findings"} & {name for name, _ in found}:
        name, body = found[-1]
        if _BLANK_LINE in body:
            first, rest = body.split(_BLANK_LINE, 1)
            found[-1:] = [(name, first), ("last_paragraph", rest)]
    return found


def split(text: str) -> Sections:
    """Return the sections of a report that MIMIC-CXR's sectioned table holds, stripped: rule 6."""
    last = dict(parse(text))
    return Sections(*(last.get(name, "").strip() for name in Sections._fields))


def is_exception(study: str) -> bool:
    """Tell whether a study ("s50414267") is one of the 54 of rule 7."""
    rules = _rules()
    return study in rules["named_section_of_study"] or study in rules["span_of_study"]


def conclusion(text: str, study: str = "") -> str:
    """Return the one text that MIMIC-CXR's labels were made from, with the exceptions of rule 7.

    The first of impression, findings, last paragraph and comparison that is there; "" for none.
    """
    rules = _rules()
    if study in rules["span_of_study"]:
        start, end = rules["span_of_study"][study]
        return text[start:end]
    last = dict(parse(text))
    if study in rules["named_section_of_study"]:
        return last.get(rules["named_section_of_study"][study], "").strip()
    return next((last[name].strip() for name in _BY_RANK if name in last), "")


def of_study(text: str, study: str, *, legacy: bool = False) -> Sections:
    """Return the sections of a study; an exception has its text as impression.

    Args:
      text: the report.
      study: "s50414267".
      legacy: as in the sectioned table, which has no row for the exceptions.
    """
    if not is_exception(study):
        return split(text)
    return Sections() if legacy else Sections(impression=conclusion(text, study))


def canonical(heading: str) -> str:
    """Return the name of a heading: rule 3."""
    name = heading.lower().strip()
    rules = _rules()
    if name in rules["synonym"]:
        return rules["synonym"][name]
    main = next((word for word in _MAIN if word in name), "")
    return main or ("findings" if is_view(name) else name)


def is_view(heading: str) -> bool:
    """Say whether a heading speaks of a view and of nothing else that rule 3 looks for."""
    name = heading.lower()
    if any(word in name for word in _MAIN):
        return False
    return any(phrase in name for phrase in _rules()["view_phrases"])


@functools.cache
def _rules() -> dict[str, Any]:
    rules = json.loads(
        Path(__file__).with_name("vocab").joinpath("mimic_sections.json").read_text()
    )
    synonyms = {word: name for name, words in rules["synonyms"].items() for word in words}
    return rules | {"synonym": {name: name for name in rules["names"]} | synonyms}


# ----- texts to pretrain on -----------------------------------------------------------------------

Texts = tuple[str, str]
_ITEM = re.compile(r"[0-9]+\.")
_WORD = re.compile(r"\w+")
MGCA_WORDS = 112


def _mgca(findings: str, impression: str) -> Texts:
    """Return MGCA's text: impression, then findings, as bare lower-case words."""
    whole = f"{impression} {findings}".replace("\n", " ").replace("\ufffd\ufffd", " ")
    sentences = [part for item in _ITEM.split(whole) for part in item.split(".")]
    words = [_WORD.findall(sentence.lower()) for sentence in sentences]
    kept = [word for sentence in words if len(sentence) > 1 for word in sentence]
    ascii_only = [word.encode("ascii", "ignore").decode() for word in kept]
    kept = [word for word in ascii_only if word]
    return (" ".join(kept[:MGCA_WORDS]) if len(kept) >= 3 else "", "")


# (findings, impression) -> the same two fields of a record; two empty ones leave the study out. A
# text that changes gets a new version: the old one stays, so that a run can be repeated.
RECIPES: Mapping[str, Callable[[str, str], Texts]] = {
    "impression-v1": lambda findings, impression: ("", _joined(impression)),
    "findings-v1": lambda findings, impression: (_joined(findings), ""),
    "both-v1": lambda findings, impression: (_joined(findings), _joined(impression)),
    "imitate-v1": lambda findings, impression: (
        (_joined(findings), _joined(impression)) if findings and impression else ("", "")
    ),
    "joined-v1": lambda findings, impression: ("", _joined(f"{findings} {impression}")),
    "mgca-v1": _mgca,
}


def recipe(name: str) -> Callable[[str, str], Texts]:
    """Return a recipe by its name; without a version, the newest.

    Raises:
      UserError: for an unknown name.
    """
    versions = [known for known in RECIPES if known == name or known.rpartition("-v")[0] == name]
    if not versions:
        raise UserError(f"No text recipe '{name}'. {nearest(name, list(RECIPES))}")
    return RECIPES[max(versions, key=lambda known: int(known.rpartition("-v")[2]))]


def _joined(text: str) -> str:
    return " ".join(text.split())
