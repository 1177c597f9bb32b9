"""What an extraction of a report is: fields, the prompt that asks for it, and the strict reading.

    {"evidence": [{"phrase": "right lower lobe consolidation", "finding": "consolidation",
                   "location": "right lower lobe", "attributes": ["patchy"],
                   "severity": "mild" | "moderate" | "severe" | null,
                   "certainty": "present" | "uncertain" | "absent",
                   "change": "new" | "stable" | "better" | "worse" | null}]}

LGDEA (https://arxiv.org/abs/2602.07540) publishes neither prompt nor schema: both are our choice.
"""

import collections
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from medvlp_jax.evidence import answers
from medvlp_jax.evidence.lexicon import LANGUAGE, NORMAL_PHRASE
from medvlp_jax.reading import parse_json

PROMPT_VERSION = 1  # change it with any word of PROMPT: answers are cached by it
PROMPT = (
    "You are a thoracic radiologist. From the report below list every statement that is direct "
    "diagnostic evidence visible on the image. Copy the report's own words, 2-10 words per "
    "phrase, one concept per phrase; keep anatomical location and degree; mark certainty; ignore "
    "history, technique, comparisons, recommendations and devices unless malpositioned; do not "
    "invent anything. If nothing abnormal is reported return one phrase "
    f"'{NORMAL_PHRASE}'. Answer with JSON only, in this form:\n"
    '{"evidence": [{"phrase": "right lower lobe consolidation", "finding": "consolidation", '
    '"location": "right lower lobe", "attributes": ["patchy"], '
    '"severity": "mild|moderate|severe|null", "certainty": "present|uncertain|absent", '
    '"change": "new|stable|better|worse|null"}]}\n\nReport:\n'
)
CHOICES = {  # where None is among them, any other value is None
    "severity": ("mild", "moderate", "severe", None),
    "certainty": ("present", "uncertain", "absent"),
    "change": ("new", "stable", "better", "worse", None),
}
FIELDS = ("phrase", "finding", "location", "attributes", "severity", "certainty", "change")
OVERLAP = 0.6  # share of a phrase's words that the report has to hold
LONG = 2000  # words; a longer report is noted, and clipped for language models
SIDES = {  # of a phrase, and the words of a report that say so
    "right": frozenset(("right", "rt", "r", "bilateral", "bilaterally", "both")),
    "left": frozenset(("left", "lt", "l", "bilateral", "bilaterally", "both")),
}
CUT_OFF = "cut off"
MASKED = 0.3  # share of XXXX words from which a report is noted as masked
_WORD = re.compile(r"[^\W_]+")
_OPENING = re.compile(r"[{\[]")
_DECODER = json.JSONDecoder()
_LANGUAGE = frozenset(LANGUAGE.split())


class Malformed(ValueError):
    """An answer without the JSON that was asked for."""


class Parsed(NamedTuple):
    """The items of an answer that stand, and why others do not."""

    evidence: tuple[dict, ...]
    dropped: dict[str, int]


def prompt(text: str) -> str:
    """Return what a language model is asked; a text longer than LONG words is clipped."""
    words = text.split(maxsplit=LONG)
    return PROMPT + (text if len(words) <= LONG else " ".join(words[:LONG]))


def parse(answer: str, text: str) -> Parsed:
    """Read an answer, repair what is usually wrong with it, keep what the report supports.

    What `check` drops is counted, and as "cut off" the rest of an answer that is not whole.

    Args:
      answer: of a model.
      text: the report it was asked about.

    Raises:
      Malformed: if there is no list of items in it.
    """
    items, is_whole = _loaded(answer)
    parsed = check(items, text)
    return parsed if is_whole else parsed._replace(dropped={**parsed.dropped, CUT_OFF: 1})


def check(items: Sequence[Any], text: str) -> Parsed:
    """Hold items against the schema and the report.

    Dropped are items that are "invalid" (a missing field, a certainty outside its choices),
    "not in the report" (fewer than OVERLAP of the phrase's words are, in singular or plural, or its
    side is not) or "repeated". A severity or change outside its choices is None.
    """
    spoken = frozenset(map(_singular, _WORD.findall(text.lower())))
    kept, dropped, seen = [], collections.Counter(), set()
    for raw in items:
        item = _valid(raw)
        if item is None:
            dropped["invalid"] += 1
        elif not _supported(item["phrase"], spoken):
            dropped["not in the report"] += 1
        elif (key := (item["phrase"].lower(), item["finding"], item["certainty"])) in seen:
            dropped["repeated"] += 1
        else:
            seen.add(key)
            kept.append(item)
    return Parsed(tuple(kept), dict(dropped))


def load(answer: str) -> list:
    """Return the list of items in an answer, which may stand in prose or code fences.

    Thoughts do not count. Repaired are trailing commas, Python's None, curly quotes around keys,
    and an answer that was cut off: its complete items count.

    Raises:
      Malformed: if there is none, or brackets stand deeper in one another than json reads.
    """
    return _loaded(answer)[0]


def _loaded(answer: str) -> tuple[list, bool]:
    """Return what `load` does, and whether the list was whole."""
    try:
        return _load(answers.without_thoughts(answer))
    except RecursionError:
        raise Malformed(f"An answer of {len(answer)} characters is nested too deep.") from None


def _load(answer: str) -> tuple[list, bool]:
    for candidate in (answer, _repaired(answer)):
        found = _last(candidate)
        if found is not None:
            return found, True
    items = [item for item in _objects(_repaired(answer)) if "phrase" in item]
    if items:
        return items, False
    raise Malformed(f"An answer of {len(answer)} characters holds no evidence list.")


def notes(text: str) -> tuple[str, ...]:
    """Say what is odd about a report: "empty", "not English", "long", "masked"."""
    words = text.split()
    if not any(map(str.isalnum, text)):
        return ("empty",)
    odd = ["long"] if len(words) > LONG else []
    odd += ["masked"] if sum("XXXX" in word for word in words) > MASKED * len(words) else []
    return (*odd, *(() if is_english(words) else ("not English",)))


def is_english(words: Sequence[str]) -> bool:
    """Say whether a tenth of the words are common ones of English reports; short texts may be."""
    words = words[:500]
    spoken = common = 0
    for word in words:
        word = word.strip(".,;:()").lower()
        if word in _LANGUAGE:
            common += 1
            if 10 * common >= len(words):  # whatever the others are
                return True
        spoken += word.isalpha() and word != "xxxx"
    return spoken < 6 or 10 * common >= spoken


def normal() -> dict:
    """Return the one item of a report that says that nothing is wrong."""
    item = dict.fromkeys(FIELDS)
    item |= {"phrase": NORMAL_PHRASE, "finding": "normal", "location": "", "attributes": []}
    return item | {"certainty": "present"}


def _valid(raw: Any) -> dict | None:
    if not isinstance(raw, dict | Mapping):
        return None
    item = {name: raw.get(name) for name in FIELDS}
    for name, choices in CHOICES.items():
        value = item[name].lower() if isinstance(item[name], str) else None
        item[name] = value if value in choices else None
        if item[name] not in choices:
            return None
    item["location"] = item["location"] or ""
    item["attributes"] = item["attributes"] or []
    texts = (item["phrase"], item["finding"], item["location"])
    if not all(isinstance(value, str) for value in texts) or not all(map(str.strip, texts[:2])):
        return None
    if not isinstance(item["attributes"], list):
        return None
    if not all(isinstance(value, str) for value in item["attributes"]):
        return None
    return item


def _supported(phrase: str, spoken: frozenset[str]) -> bool:
    words = _WORD.findall(phrase.lower())
    if any(word in SIDES and spoken.isdisjoint(SIDES[word]) for word in words):
        return False
    held = len([word for word in words if _singular(word) in spoken])
    return (held > 0 and held >= OVERLAP * len(words)) or " ".join(words) == NORMAL_PHRASE


@functools.lru_cache(maxsize=1 << 14)
def _singular(word: str) -> str:
    """Return a form that a word's singular and plural share: "opacity", "mass", "pneumothorax"."""
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith("thoraces"):
        return word[:-3] + "x"
    if word.endswith(("sses", "xes", "ches", "shes")):
        return word[:-2]
    return word if word.endswith(("ss", "us", "is")) else word.removesuffix("s")


def _last(answer: str) -> list | None:
    """Return the last evidence list that holds something, else an empty one, else None.

    Lists are what json reads whole, from any { or [ on.
    """
    found, match = None, _OPENING.search(answer)
    while match:
        end = match.end()
        try:
            value, past = _DECODER.raw_decode(answer, match.start())
        except ValueError:
            value = None
        if isinstance(value, dict) and "phrase" in value and not found:
            return None  # inside a list that is broken
        items = value.get("evidence") if isinstance(value, dict) else value
        if isinstance(items, list) and (items is not value or _has_phrases(items)):
            found, end = items or found or [], past
        match = _OPENING.search(answer, end)
    return found


def _has_phrases(items: Sequence[Any]) -> bool:
    return any(isinstance(item, dict) and "phrase" in item for item in items)


def _objects(answer: str) -> list[dict]:
    """Return the innermost objects that json reads whole."""
    found = []
    for match in re.finditer(r"\{[^{}]*\}", answer):
        try:
            found.append(parse_json(match.group()))
        except ValueError:
            continue
    return found


def _repaired(answer: str) -> str:
    answer = answer.translate({0x201C: '"', 0x201D: '"'})
    answer = re.sub(r":\s*None\b", ": null", answer)
    return re.sub(r",(\s*[}\]])", r"\1", answer)
