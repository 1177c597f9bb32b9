"""Which words of a sentence the lexicon knows, and what they can be; `rules` reads them."""

import re
from typing import NamedTuple

from medvlp_jax.evidence import lexicon


class Span(NamedTuple):
    """Words [start, end) of a sentence that the lexicon knows, and what they can be."""

    start: int
    end: int
    roles: dict[str, str]


def _table() -> dict[str, tuple[dict[str, list], dict[str, str] | None]]:
    """Index the lexicon by first word: longer phrases by their second word, and the word alone.

    Longer phrases are [(words, roles)], longest first.
    """
    entries: dict[tuple[str, ...], dict[str, str]] = {}

    def add(role, value, phrases, plural=False):
        for phrase in phrases.split("|"):
            forms = {phrase, phrase + "s"} if plural and not phrase.endswith("s") else {phrase}
            for form in forms | set(map(_british, forms)):
                words = tuple(re.findall(r"[^\s,]+|,", form))
                entries.setdefault(words, {})[role] = value

    for name, phrases in lexicon.FINDINGS.items():
        add("finding", name, phrases, plural=True)
    for name, phrases in lexicon.SUBJECTS.items():
        add("subject", name, phrases)
    for name, phrases in lexicon.STATES.items():
        add("state", name, phrases)
    for name, phrases in lexicon.SEVERITY.items():
        add("severity", name, phrases)
    for name, phrases in lexicon.CHANGES.items():
        add("change", name, phrases)
    for role, phrases in (
        ("place", f"{lexicon.SIDES}|{lexicon.ANATOMY}"),
        ("attribute", lexicon.ATTRIBUTES),
        ("link", lexicon.LINKS),
        ("deny", lexicon.DENIES),
        ("deny_before", lexicon.DENIES_BEFORE),
        ("doubt", lexicon.DOUBTS),
        ("doubt_before", lexicon.DOUBTS_BEFORE),
        ("alternative", lexicon.ALTERNATIVES),
        ("ignore", lexicon.IGNORES),
        ("stop", lexicon.STOPS),
        ("skip", lexicon.NOT_FINDINGS),
        ("same", lexicon.SAME),
        ("affirm", lexicon.AFFIRMS),
        ("skip", lexicon.NOT_DENIALS),
        ("other", lexicon.OTHER_FINDINGS),
    ):
        add(role, role, phrases)
    add("last", "absent", lexicon.DENIES_LAST)
    add("last", "uncertain", lexicon.DOUBTS_LAST)
    table = {words[0]: ({}, entries.get(words[:1])) for words in entries}
    for words, roles in sorted(entries.items(), key=lambda entry: -len(entry[0])):
        if len(words) > 1:
            table[words[0]][0].setdefault(words[1], []).append((list(words), roles))
    return table


def _british(phrase: str) -> str:
    for american, british in lexicon.BRITISH.items():
        phrase = phrase.replace(american, british)
    return phrase


_TABLE = _table()
_UNKNOWN = ({}, None)
_NUMBER = re.compile(r"[0-9.]+(?:cm|mm)?")


def match(texts: list[str]) -> list[Span]:
    """Return the longest phrases of the lexicon from left to right, without overlap."""
    spans, i, count = [], 0, len(texts)
    while i < count:
        text = texts[i]
        longer, alone = _TABLE.get(text, _UNKNOWN)
        if longer and i + 1 < count:
            for phrase, roles in longer.get(texts[i + 1], ()):
                end = i + len(phrase)
                if texts[i:end] == phrase:
                    spans.append(Span(i, end, roles))
                    break
            else:
                end = i
            if end > i:
                i = end
                continue
        if alone is not None:
            spans.append(Span(i, i + 1, alone))
        elif text[0].isdigit() and _NUMBER.fullmatch(text):
            spans.append(Span(i, i + 1, {"link": "size"}))
        i += 1
    return spans
