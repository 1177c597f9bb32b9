"""Patients and their visits: a table, and disease drawn from a log-odds model of that table.

The table is drawn first and disease second, so every coefficient of LOG_ODDS is the true effect of
a column on a finding; oxygen saturation comes last and is a consequence of disease. Values are
hidden (NaN) only after disease has been drawn.
"""

import zlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from medvlp_jax.data.datasets.cxr_phantom.findings import FINDINGS

NO_YES = {"kind": "categorical", "categories": ["no", "yes"]}
TABLE = {  # a schema as data/tabular.py reads it; ranges are those of the draws below
    "age": {"kind": "numeric", "unit": "years", "range": [0, 120]},
    "sex": {"kind": "categorical", "categories": ["female", "male"]},
    "smoking": {"kind": "numeric", "unit": "pack-years", "range": [0, 120]},
    "fever": NO_YES,
    "cough": NO_YES,
    "oxygen_saturation": {"kind": "numeric", "unit": "%", "range": [70, 100]},
    "white_cells": {"kind": "numeric", "unit": "10^9/L", "range": [2, 35]},
    "bnp": {"kind": "numeric", "unit": "pg/mL", "range": [5, 5000]},
}
MISSING = {  # probability that a value was not recorded
    "age": 0.02,
    "sex": 0.0,
    "smoking": 0.15,
    "fever": 0.05,
    "cough": 0.08,
    "oxygen_saturation": 0.10,
    "white_cells": 0.25,
    "bnp": 0.45,
}

# The disease model: logit P(finding) = base + sum of coefficient * covariate, see `covariates`.
# An empty sum is a 60-year-old woman who never smoked, without fever or cough, white cells 8,
# BNP 100.
LOG_ODDS = {
    "consolidation": {"base": -3.25, "fever": 1.6, "cough": 0.8, "white_cells": 0.7},
    "effusion": {"base": -1.80, "age": 0.25, "bnp": 0.45},
    "pneumothorax": {"base": -2.75, "male": 0.7, "age": -0.25, "smoking": 0.2},
    "nodule": {"base": -2.25, "age": 0.20, "smoking": 0.5},
    "mass": {"base": -3.05, "age": 0.30, "smoking": 0.6, "cough": 0.5},
    "cardiomegaly": {"base": -1.85, "age": 0.30, "bnp": 0.5},
    "atelectasis": {"base": -2.25, "age": 0.20, "cough": 0.3, "fever": 0.5},
    "edema": {"base": -2.15, "age": 0.15, "bnp": 0.8},
}
MOST_FINDINGS = 3  # in one study


class Patient(NamedTuple):
    """What stays the same between visits."""

    id: str
    index: int
    male: bool
    age: float  # at the first visit
    smoking: float  # pack-years
    visits: int


class Visit(NamedTuple):
    """One study's table, NaN where a value is missing, and the names of its findings."""

    table: Mapping[str, float]
    findings: tuple[str, ...]


def stream(seed: int, patient: int, study: int, purpose: str) -> np.random.Generator:
    """Random numbers that depend on nothing but the arguments."""
    return np.random.default_rng((seed, patient, study, zlib.crc32(purpose.encode())))


def patient(seed: int, index: int) -> Patient:
    """Draw patient `index` of the phantom population `seed`."""
    rng = stream(seed, index, 0, "patient")
    male = bool(rng.random() < 0.52)
    age = float(np.clip(rng.normal(58, 16), 20, 92))
    smokes = rng.random() < 0.45 + 0.1 * male
    smoking = float(min(rng.gamma(2.0, 0.22 * (age - 15)), 120)) if smokes else 0.0
    visits = int(rng.choice((1, 2, 3, 4), p=(0.48, 0.28, 0.16, 0.08)))
    return Patient(f"p{seed}-{index:06d}", index, male, round(age), round(smoking), visits)


def population(seed: int, num_patients: int) -> Iterator[Patient]:
    """Yield patients 0 .. num_patients - 1."""
    return (patient(seed, index) for index in range(num_patients))


def covariates(table: Mapping[str, float]) -> dict[str, float]:
    """Return the scaled columns that LOG_ODDS multiplies; `table` must have no missing value."""
    return {
        "age": (table["age"] - 60) / 10,  # decades from 60
        "male": table["sex"],
        "smoking": table["smoking"] / 20,  # per 20 pack-years
        "fever": table["fever"],
        "cough": table["cough"],
        "white_cells": (table["white_cells"] - 8) / 4,
        "bnp": float(np.log2(table["bnp"] / 100)),  # per doubling
    }


def log_odds(table: Mapping[str, float]) -> dict[str, float]:
    """Return log P / (1 - P) of each finding for a complete table."""
    z = covariates(table)
    return {
        finding: sum(b if name == "base" else b * z[name] for name, b in terms.items())
        for finding, terms in LOG_ODDS.items()
    }


def visit(seed: int, who: Patient, study: int) -> Visit:
    """Draw one visit of a patient: symptoms, blood tests, disease, then what disease causes."""
    rng = stream(seed, who.index, study, "visit")
    table = _before_disease(rng, who, study)
    names = _draw_disease(rng, table)
    table["oxygen_saturation"] = _saturation(rng, names)
    hidden = rng.random(len(TABLE)) < np.array([MISSING[column] for column in TABLE])
    shown = {
        column: float("nan") if gone else float(table[column])
        for column, gone in zip(TABLE, hidden, strict=True)
    }
    return Visit(shown, names)


def _before_disease(rng: np.random.Generator, who: Patient, study: int) -> dict[str, float]:
    fever = rng.random() < 0.22
    cough = rng.random() < 0.30 + 0.25 * fever + 0.15 * (who.smoking > 10)
    white_cells = np.exp(rng.normal(np.log(7.6 + 3.0 * fever), 0.28))
    bnp = np.exp(rng.normal(np.log(70) + 0.022 * (who.age - 60), 0.95))
    return {
        "age": float(who.age + study // 2),
        "sex": float(who.male),
        "smoking": who.smoking,
        "fever": float(fever),
        "cough": float(cough),
        "white_cells": round(float(np.clip(white_cells, 2, 35)), 1),
        "bnp": float(round(np.clip(bnp, 5, 5000))),
    }


def _draw_disease(rng: np.random.Generator, table: Mapping[str, float]) -> tuple[str, ...]:
    """Independent Bernoulli draws given the table, repeated in the 1 % with too many findings."""
    odds = log_odds(table)
    chance = 1 / (1 + np.exp(-np.array([odds[finding] for finding in FINDINGS])))
    while True:
        present = rng.random(len(FINDINGS)) < chance
        if present.sum() <= MOST_FINDINGS:
            return tuple(f for f, here in zip(FINDINGS, present, strict=True) if here)


def _saturation(rng: np.random.Generator, names: tuple[str, ...]) -> float:
    """Oxygen saturation in %: falls with every finding that takes lung away."""
    cost = {"consolidation": 3.0, "effusion": 1.5, "pneumothorax": 2.5, "edema": 3.5}
    value = 97.3 - sum(cost.get(name, 0.2) * rng.uniform(0.5, 1.5) for name in names)
    return float(round(np.clip(value + rng.normal(0, 1.2), 70, 100)))
