"""Paragraphs on risk written from a risk table: no model, no network, the same words for one seed.

What a paragraph says follows from the table alone; the seed chooses between ways of saying it, the
values it takes as examples and the record it shows, so that different seeds paraphrase one another.
Values stand as a patient's record has them ("Fever: yes."), which is how metadata reaches the text
encoder later.
"""

import json
import math
import zlib
from collections.abc import Callable

import numpy as np

from medvlp_jax.config import UserError
from medvlp_jax.evidence.risk import Factor, Risk

NOTHING = 0.1  # log odds that are not worth a word
FEW, SOME = 0.35, 0.9  # log odds from which a change is "clear", "strong": odds x 1.4, x 2.5
NEAR = 1.0  # log odds the disease of a shown record may lie behind the most likely one
TRIES = 16  # records drawn until one shows the disease
MORE = ("somewhat more likely", "clearly more likely", "far more likely")
LESS = ("somewhat less likely", "clearly less likely", "far less likely")
OPENINGS = (
    "{factor} and {disease}.",
    "How {factor} bears on {disease}.",
    "{disease_} in the light of {factor}.",
    "What {factor} says about {disease}.",
)
CHANGES = (
    "A record with {value} makes {disease} {strength}; the odds change by a factor of {odds}.",
    "With {value} {disease} is {strength}, the odds being {odds} times those of the reference.",
    "{value_} goes with odds of {disease} that are {odds} times as high: it is {strength}.",
    "Where the record says {value}, {disease} becomes {strength} (odds ratio {odds}).",
)
NO_CHANGES = (
    "With {value} {disease} is as likely as without.",
    "{value_} says nothing about {disease}.",
    "A record with {value} leaves the odds of {disease} where they are.",
)
FRIENDS = (
    "{others} point the same way.",
    "The same diagnosis is suggested by {others}.",
    "{disease_} is also to be expected with {others}.",
)
ELSEWHERE = (
    "{disease_} rather goes with {others}.",
    "What raises the odds of {disease} is {others}.",
)
RECORDS = (
    "A record that calls for {disease}: {record}",
    "{disease_} is likely here: {record}",
    "Think of {disease} when a record reads: {record}",
)
LISTS = (
    "{value_} makes {list}.",
    "With {value}: {list}.",
    "In a patient with {value}, {list}.",
)


def writer(risk: Risk) -> Callable[[str], str]:
    """Return the function a backend calls: a task as JSON -> an answer as JSON.

    Raises:
      UserError: for a factor whose effects the risk table does not give.
    """
    for key, factor in risk.factors.items():
        if not factor.is_known:
            raise UserError(
                f"The template writes from log odds, and {risk.version} has none for '{key}': add "
                "levels or log_odds to the risk table, or ask a language model with --articles."
            )

    def write(task: str) -> str:
        asked = json.loads(task)
        factor, disease = risk.factors[asked["factor"]], asked["disease"]
        name = f"{asked['factor']}/{disease}"
        rng = np.random.default_rng((asked["seed"], zlib.crc32(name.encode())))
        text = (
            _summary(risk, factor, rng)
            if disease not in risk.diseases
            else _detail(risk, factor, disease, rng)
        )
        return json.dumps({"factor": asked["factor"], "disease": disease, "text": text})

    return write


def _detail(risk: Risk, factor: Factor, disease: str, rng: np.random.Generator) -> str:
    """Write how a factor bears on one disease."""
    words = {"factor": factor.name.lower(), "disease": disease, "disease_": _capital(disease)}
    said = [_pick(OPENINGS, rng).format(**words)]
    for value in _examples(factor, rng):
        effect, sentence = factor.effect(value, disease), factor.sentence(value)[:-1]
        form = NO_CHANGES if abs(effect) < NOTHING else CHANGES
        said.append(
            _pick(form, rng).format(
                value=sentence[0].lower() + sentence[1:],
                value_=sentence,
                strength=strength(effect),
                odds=f"{math.exp(effect):.1f}",
                **words,
            )
        )
    others = _friends(risk, factor, disease, rng)
    if others:
        form = FRIENDS if _acts(factor, disease) else ELSEWHERE
        said.append(_pick(form, rng).format(others=_and(others), **words))
    if record := _record(risk, disease, rng):
        said.append(_pick(RECORDS, rng).format(record=record, **words))
    return " ".join(map(_capital, said))


def _summary(risk: Risk, factor: Factor, rng: np.random.Generator) -> str:
    """Write how a factor bears on every disease, from what it raises to what it lowers."""
    said = [f"{factor.name} and the diagnoses of {risk.field}."]
    for value in _examples(factor, rng):
        effects = {d: factor.effect(value, d) for d in risk.diseases}
        ordered = sorted(risk.diseases, key=lambda d: -effects[d])
        changed = [f"{d} {strength(effects[d])}" for d in ordered if abs(effects[d]) >= NOTHING]
        sentence = factor.sentence(value)[:-1]
        listed = _and(changed) if changed else "no diagnosis more or less likely"
        form = _pick(LISTS, rng)
        if not form.startswith("{value_}"):
            listed = " ".join(["expect", listed]) if changed else "nothing changes"
        value = sentence[0].lower() + sentence[1:]
        said.append(form.format(value=value, value_=sentence, list=listed))
    return " ".join(map(_capital, said))


def strength(effect: float) -> str:
    """Put log odds into words."""
    if abs(effect) < NOTHING:
        return "neither more nor less likely"
    return (MORE if effect > 0 else LESS)[(abs(effect) >= FEW) + (abs(effect) >= SOME)]


def _examples(factor: Factor, rng: np.random.Generator) -> list[str | float]:
    """Return values worth a sentence: all of few levels, four of many, three of a number."""
    if factor.levels:
        levels = list(factor.levels)
        if len(levels) > 4:
            levels = [levels[i] for i in sorted(rng.permutation(len(levels))[:4])]
        return levels
    return [_number(factor, share + rng.uniform(0, 0.2), rng) for share in (0.0, 0.4, 0.8)]


def _number(factor: Factor, share: float, rng: np.random.Generator) -> float:
    """Return the value at a share of the range, rounded as records are."""
    low, high = factor.range
    value = low * (high / low) ** share if factor.is_log else low + (high - low) * share
    return round(float(value), 0 if high - low > 30 else 1)


def _friends(risk: Risk, factor: Factor, disease: str, rng: np.random.Generator) -> list[str]:
    """Return up to three values of other factors that make the disease clearly more likely."""
    found = []
    for other in risk.factors.values():
        value = _strongest(other, disease, rng)
        if other.key != factor.key and other.effect(value, disease) >= FEW:
            sentence = other.sentence(value)[:-1]
            found.append(sentence[0].lower() + sentence[1:])
    return [found[i] for i in rng.permutation(len(found))[:3]]


def _record(risk: Risk, disease: str, rng: np.random.Generator) -> str:
    """Return a record in which the disease is among the most likely; "" where none is found."""
    for _ in range(TRIES):
        values = {
            key: _strongest(factor, disease, rng) if _acts(factor, disease) else _any(factor, rng)
            for key, factor in risk.factors.items()
        }
        total = {
            d: sum(f.effect(values[k], d) for k, f in risk.factors.items()) for d in risk.diseases
        }
        if total[disease] >= max(FEW, max(total.values()) - NEAR):
            return " ".join(f.sentence(values[k]) for k, f in risk.factors.items())
    return ""


def _acts(factor: Factor, disease: str) -> bool:
    effects = [factor.effect(value, disease) for value in _ends(factor)]
    return max(effects) - min(effects) >= NOTHING


def _strongest(factor: Factor, disease: str, rng: np.random.Generator) -> str | float:
    """Return a value from the end of the factor where the disease is most likely."""
    low, high = _ends(factor)[0], _ends(factor)[-1]
    if factor.levels:
        return max(factor.levels, key=lambda level: factor.effect(level, disease))
    rises = factor.effect(high, disease) >= factor.effect(low, disease)
    return _number(factor, rng.uniform(0.6, 1.0) if rises else rng.uniform(0.0, 0.4), rng)


def _any(factor: Factor, rng: np.random.Generator) -> str | float:
    if factor.levels:
        return _pick(tuple(factor.levels), rng)
    return _number(factor, rng.uniform(0, 1), rng)


def _ends(factor: Factor) -> tuple:
    return tuple(factor.levels) if factor.levels else factor.range


def _pick(choices, rng):
    return choices[int(rng.integers(len(choices)))]


def _and(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
