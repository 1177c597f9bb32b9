"""Two-section reports that agree with the image: Findings describes, Impression concludes.

Sides are the patient's: the right lung is on the left of the image. Many normal studies share one
text word for word, as in clinical archives; a subtle finding may be hedged; absent findings are
often denied.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from medvlp_jax.data.datasets.cxr_phantom import phrases
from medvlp_jax.data.datasets.cxr_phantom.anatomy import Anatomy
from medvlp_jax.data.datasets.cxr_phantom.findings import FINDINGS, Finding

NO_FINDINGS, NO_IMPRESSION = 0.10, 0.04  # how often a section is missing; never both
STOCK_NORMAL = 0.65  # how many normal reports repeat a stock text
HEDGED_BELOW = 0.30  # severity


class Report(NamedTuple):
    """Both sections, "" where missing, and one phrase per finding, taken from the report."""

    findings: str
    impression: str
    phrases: tuple[str, ...]


def draw_report(
    rng: np.random.Generator, found: Sequence[Finding], *, anatomy: Anatomy, age: float
) -> Report:
    """Write the report of a study.

    Args:
      rng: chooses among the paraphrases.
      found: what the image shows.
      anatomy: of the patient, for the incidental remarks.
      age: in years.
    """
    impression, concluded = _impression(rng, found)
    if not found and rng.random() < STOCK_NORMAL:
        findings, described = _ranked(rng, phrases.NORMAL_FINDINGS), ()
    else:
        findings, described = _findings(rng, found, _remarks(rng, anatomy, age))
    u = rng.random()
    if u < NO_FINDINGS:
        return Report("", impression, concluded)
    if u < NO_FINDINGS + NO_IMPRESSION:
        return Report(findings, "", described)
    return Report(findings, impression, described)


def _pick(rng: np.random.Generator, options: Sequence):
    return options[int(rng.integers(len(options)))]


def _ranked(rng: np.random.Generator, options: Sequence[str]) -> str:
    """Choose with probability proportional to 1 / rank, as stock texts are used."""
    weights = 1 / np.arange(1, len(options) + 1)
    return options[int(np.searchsorted(np.cumsum(weights / weights.sum()), rng.random()))]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _fields(rng: np.random.Generator, f: Finding) -> Mapping[str, str]:
    degrees = phrases.DEGREES[f.name][min(2, int(3 * f.severity))]
    places = phrases.PLACES.get((f.side, f.zone), ("",))
    return {
        "degree": _pick(rng, degrees),
        "side": f.side,
        "place": _pick(rng, places),
        "cm": f"{f.size:.1f}",
        "mm": f"{10 * f.size:.0f}",
    }


def _key(f: Finding) -> str:
    return f"{f.name} bilateral" if f.name == "effusion" and f.side == "bilateral" else f.name


def _describe(rng: np.random.Generator, f: Finding) -> tuple[str, str]:
    """Return a sentence that describes a finding and the noun phrase in it."""
    if f.name == "cardiomegaly" and rng.random() < 0.6:
        adverb = phrases.ADVERBS[_fields(rng, f)["degree"]]
        sentence = _pick(rng, phrases.ENLARGED).format(adverb=adverb)
        return sentence, sentence.removesuffix(".").removeprefix("The ")
    article, noun = _pick(rng, phrases.DESCRIBE[_key(f)])
    bare = noun.format(**_fields(rng, f))
    sentence = _pick(rng, phrases.PRESENT).format(
        verb="are" if article == "are" else "is",
        phrase=f"{_a(bare)} {bare}" if article == "a" else bare,
        bare=bare,
    )
    sentence = _capital(sentence)
    return sentence, bare if bare in sentence else _capital(bare)


def _a(phrase: str) -> str:
    """Choose between a and an; numbers are read out (an 8, an 18, a 1.8)."""
    number = phrase.split(" ")[0]
    vowel = phrase[0] in "aeio" or number.split(".")[0] in ("8", "11", "18")
    return "an" if vowel else "a"


def _deny(rng: np.random.Generator, absent: Sequence[str]) -> str:
    """Return one sentence that denies several findings."""
    items = [_pick(rng, phrases.NEGATED[name]) for name in absent]
    joined = items[0] if len(items) == 1 else f"{', '.join(items[:-1])} or {items[-1]}"
    return _pick(rng, phrases.DENIALS).format(joined)


def _remarks(rng: np.random.Generator, a: Anatomy, age: float) -> list[str]:
    """Incidental remarks that hold for this patient, and some that hold for every phantom."""
    remarks = [_pick(rng, phrases.BACKGROUND)] if rng.random() < 0.6 else []
    if a.knob > 3.5 and rng.random() < 0.6:
        remarks.append(_pick(rng, phrases.TORTUOUS))
    if age > 65 and rng.random() < 0.3:
        remarks.append(_pick(rng, phrases.DEGENERATIVE))
    return remarks


def _findings(rng: np.random.Generator, found: Sequence[Finding], remarks: list[str]):
    """Compose the Findings section; returns (text, one phrase per finding)."""
    described = [_describe(rng, f) for f in found]
    present = {f.name for f in found}
    absent = [n for n in FINDINGS if n not in present and rng.random() < phrases.MENTIONED[n]]
    cut = int(rng.integers(0, len(absent) + 1)) if rng.random() < 0.5 else 0
    denials = [_deny(rng, part) for part in (absent[:cut], absent[cut:]) if part]
    rest = [*denials, *remarks]
    if "cardiomegaly" not in present and rng.random() < 0.75:
        rest.append(_pick(rng, phrases.NORMAL_HEART))
    if rng.random() < 0.4:
        rest.append(_pick(rng, phrases.OTHERWISE[:2] if found else phrases.CLEAR))
    order = rng.permutation(len(rest))
    sentences = [sentence for sentence, _ in described] + [rest[i] for i in order]
    if not sentences:
        sentences = [_pick(rng, phrases.CLEAR)]
    if rng.random() < 0.25:
        sentences.insert(0, _pick(rng, phrases.OPENINGS))
    return " ".join(sentences), tuple(phrase for _, phrase in described)


def _conclude(rng: np.random.Generator, f: Finding) -> tuple[str, str]:
    """Return a sentence that concludes on a finding and the noun phrase in it."""
    core = _pick(rng, phrases.CONCLUDE[_key(f)]).format(**_fields(rng, f))
    if f.severity < HEDGED_BELOW and not core.startswith("findings") and rng.random() < 0.5:
        sentence = _pick(rng, phrases.HEDGES).format(core)
    else:
        sentence = f"{_capital(core)}."
    phrase = core.split(",")[0]
    return sentence, phrase if phrase in sentence else _capital(phrase)


def _impression(rng: np.random.Generator, found: Sequence[Finding]):
    """Compose the Impression, gravest first; returns (text, one phrase per finding)."""
    if not found:
        return _ranked(rng, phrases.NORMAL_IMPRESSIONS), ()
    concluded = [_conclude(rng, f) for f in found]
    order = sorted(range(len(found)), key=lambda i: -found[i].severity)
    sentences = [concluded[i][0] for i in order]
    present = {f.name for f in found}
    absent = [n for n in ("pneumothorax", "effusion", "consolidation") if n not in present]
    if absent and rng.random() < 0.3:
        sentences.append(_deny(rng, absent[: 1 + int(rng.integers(2))]))
    if len(sentences) > 1 and rng.random() < 0.3:
        sentences = [f"{i}. {s}" for i, s in enumerate(sentences, 1)]
    return " ".join(sentences), tuple(phrase for _, phrase in concluded)
