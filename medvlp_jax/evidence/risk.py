"""Risk tables: which factors and diseases a corpus is about and, where known, how strongly they go.

A JSON file, kept with a data set as `risk.json` or brought by the user:

  {"version": "cxr_phantom-v1", "field": "chest radiology", "origin": "where the numbers are from",
   "diseases": ["consolidation", "effusion"], "aliases": {"Bnp": ["natriuretic peptide"]},
   "factors": {
     "fever": {"name": "Fever", "levels": {"no": {}, "yes": {"consolidation": 1.6}}},
     "age": {"name": "Age", "unit": "years", "range": [20, 90], "reference": 60, "per": 10,
             "log_odds": {"effusion": 0.25}},
     "bnp": {"name": "Bnp", "unit": "pg/mL", "range": [10, 2000], "reference": 100, "per": 2,
             "scale": "log", "log_odds": {"effusion": 0.45}}}}

`levels` gives the log odds of each disease at each value against the first; `log_odds` what every
`per` adds beyond the `reference` ("scale": "log": every factor `per`). A disease that is not named
does not change. A factor without either is for language models, which read articles instead:
`aliases` has other names and spellings under which they know a disease or the name of a factor.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from medvlp_jax.config import UserError, nearest
from medvlp_jax.data import datasets
from medvlp_jax.reading import parse_json

FILE = "risk.json"
FIELDS = ("version", "field", "origin", "diseases", "aliases", "factors")
LEVELS = ("name", "levels")
NUMBERS = ("name", "unit", "range", "reference", "per", "scale", "log_odds")
FACTOR_FIELDS = (*LEVELS, *NUMBERS[1:])


class Factor(NamedTuple):
    """One risk factor.

    Attributes:
      key: column of the patient table, or any short name.
      name: in words, with a capital.
      levels: {value: {disease: log odds}}; empty for a number, and where nothing is known.
      unit: of a number.
      range: lowest and highest value worth writing about.
      reference: where a number changes nothing.
      per: step of a number that `log_odds` is for.
      is_log: whether steps multiply.
      log_odds: {disease: log odds a step}.
    """

    key: str
    name: str
    levels: Mapping[str, Mapping[str, float]]
    unit: str
    range: tuple[float, float]
    reference: float
    per: float
    is_log: bool
    log_odds: Mapping[str, float]

    @property
    def is_known(self) -> bool:
        """Whether anything is said on how strongly it acts."""
        return bool(self.levels or self.log_odds)

    def effect(self, value: str | float, disease: str) -> float:
        """Return the log odds that a value adds for a disease."""
        if self.levels:
            return self.levels[value].get(disease, 0.0)
        ratio = value / self.reference if self.is_log else (value - self.reference) / self.per
        steps = math.log(ratio, self.per) if self.is_log else ratio
        return steps * self.log_odds.get(disease, 0.0)

    def sentence(self, value: str | float) -> str:
        """Write a value as a patient's record has it: "Fever: yes." or "Age: 63 years."."""
        said = value if self.levels else f"{value:.2f}".rstrip("0").rstrip(".")
        return f"{self.name}: {said} {self.unit}".rstrip() + "."


class Risk(NamedTuple):
    """What a corpus is about.

    Attributes:
      version: names the table in every record a template writes from it.
      field: of medicine, for the prompt.
      origin: where its numbers are from; "" where there are none.
      diseases: names.
      factors: by key.
      aliases: other names, by disease and by name of a factor; for retrieval alone.
    """

    version: str
    field: str
    origin: str
    diseases: tuple[str, ...]
    factors: Mapping[str, Factor]
    aliases: Mapping[str, Sequence[str]]

    def names(self, name: str) -> tuple[str, ...]:
        """Return a disease or name of a factor, and the other names it has."""
        return (name, *self.aliases.get(name, ()))

    def narrowed(self, factors: Sequence[str], diseases: Sequence[str]) -> "Risk":
        """Keep the named factors and diseases; () keeps all.

        Raises:
          UserError: for a name that is not there.
        """
        for kind, asked, known in (
            ("factor", factors, self.factors),
            ("disease", diseases, self.diseases),
        ):
            for name in asked:
                if name not in known:
                    raise UserError(
                        f"{self.version} has no {kind} '{name}'. {nearest(name, list(known))}"
                    )
        kept = {k: f for k, f in self.factors.items() if not factors or k in factors}
        named = tuple(d for d in self.diseases if not diseases or d in diseases)
        return self._replace(factors=kept, diseases=named)


def read(source: str | Path) -> Risk:
    """Read and check a risk table.

    Args:
      source: a file, or the name of a corpus that ships one.

    Raises:
      UserError: for a file that is missing or no JSON, and for the first entry that says something
        else than it may.
    """
    shipped = Path(datasets.__path__[0]) / str(source) / FILE
    path = shipped if shipped.is_file() else Path(source).expanduser()
    if not path.is_file():
        ours = sorted(p.parent.name for p in Path(datasets.__path__[0]).glob(f"*/{FILE}"))
        raise UserError(
            f"No risk table at '{source}'; accepted are a JSON file, see evidence/risk.py, or the "
            f"name of a corpus that ships one ({', '.join(ours)})."
        )
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.") from None
    _check_fields(str(path), found, FIELDS, needed=("version", "field", "diseases", "factors"))
    diseases = found["diseases"]
    if not _are_names(diseases):
        raise UserError(f"{path} has diseases {diseases!r}; a list of different names is needed.")
    if not isinstance(found["factors"], dict) or not found["factors"]:
        raise UserError(f"{path} must name factors: {{column: {{name, ...}}}}.")
    factors = {
        key: _factor(f"{path}: factor '{key}'", key, entry, diseases)
        for key, entry in found["factors"].items()
    }
    aliases = found.get("aliases", {})
    _check_aliases(str(path), aliases, [*diseases, *(f.name for f in factors.values())])
    origin = found.get("origin", "")
    return Risk(found["version"], found["field"], origin, tuple(diseases), factors, aliases)


def _factor(where: str, key: str, entry: Any, diseases: Sequence[str]) -> Factor:
    _check_fields(where, entry, FACTOR_FIELDS, needed=("name",))
    if "levels" in entry and "log_odds" in entry:
        raise UserError(f"{where} has both levels and log_odds; one of them is meant.")
    if "levels" in entry:
        _check_fields(where, entry, LEVELS)
        if not isinstance(entry["levels"], dict) or len(entry["levels"]) < 2:
            raise UserError(f"{where} has levels {entry['levels']!r}; two or more are needed.")
        for level, odds in entry["levels"].items():
            _check_odds(f"{where}, level '{level}'", odds, diseases)
    if "log_odds" in entry:
        _check_fields(where, entry, NUMBERS, needed=("range", "reference", "per"))
        _check_odds(where, entry["log_odds"], diseases)
        _check_number(where, entry)
    low, high = entry.get("range", (0.0, 0.0))
    return Factor(
        key,
        entry["name"],
        entry.get("levels", {}),
        entry.get("unit", ""),
        (low, high),
        entry.get("reference", 0.0),
        entry.get("per", 1.0),
        entry.get("scale", "linear") == "log",
        entry.get("log_odds", {}),
    )


def _check_fields(where: str, found: Any, known: Sequence[str], needed: Sequence[str] = ()):
    if not isinstance(found, dict):
        raise UserError(f"{where} must be an object with {', '.join(known)}.")
    for name in found:
        if name not in known:
            raise UserError(f"{where} has no field '{name}'. {nearest(name, known)}")
    if missing := [name for name in needed if name not in found]:
        raise UserError(f"{where} lacks {', '.join(missing)}.")


def _are_names(found: Any) -> bool:
    return (
        isinstance(found, list)
        and bool(found)
        and all(isinstance(name, str) and name for name in found)
        and len(set(found)) == len(found)
    )


def _check_aliases(where: str, aliases: Any, known: Sequence[str]) -> None:
    if not isinstance(aliases, dict):
        raise UserError(f"{where} has aliases {aliases!r}; {{name: [other names]}} is needed.")
    for name, others in aliases.items():
        if name not in known:
            raise UserError(
                f"{where} has aliases of '{name}', which is no disease and no name of a factor. "
                f"{nearest(name, known)}"
            )
        if not _are_names(others):
            raise UserError(
                f"{where}: aliases of '{name}' are {others!r}; a list of different names is needed."
            )


def _check_odds(where: str, odds: Any, diseases: Sequence[str]) -> None:
    if not isinstance(odds, dict):
        raise UserError(f"{where} is {odds!r}; {{disease: log odds}} is needed.")
    for name, value in odds.items():
        if name not in diseases:
            raise UserError(f"{where}: no disease '{name}'. {nearest(name, diseases)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 10:
            raise UserError(f"{where}: log odds of '{name}' are {value!r}; accepted are -10 to 10.")


def _check_number(where: str, entry: Mapping[str, Any]) -> None:
    scale = entry.get("scale", "linear")
    if scale not in ("linear", "log"):
        raise UserError(f"{where} has scale {scale!r}; accepted are linear, log.")
    numbers = [*_pair(where, entry["range"]), entry["reference"], entry["per"]]
    for value in numbers:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{where}: {value!r} is no number.")
    low, high, reference, per = numbers
    if not low < high:
        raise UserError(f"{where} has range {[low, high]}; the first must be the smaller.")
    if scale == "log" and not (low > 0 and reference > 0 and per > 1):
        raise UserError(f"{where}: scale log needs a range and reference above 0, per above 1.")
    if scale == "linear" and not per > 0:
        raise UserError(f"{where} has per {per}; it must be above 0.")


def _pair(where: str, value: Any) -> Sequence[float]:
    if not isinstance(value, list) or len(value) != 2:
        raise UserError(f"{where} has range {value!r}; [lowest, highest] is needed.")
    return value
