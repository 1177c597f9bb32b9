"""Tables as model inputs: one row of numbers, or one sentence, an attribute.

A schema says what a column holds. It is a JSON object {column: entry}, kept with a corpus as
`table.json` and stored with its records:

  {"age": {"kind": "numeric", "unit": "years", "range": [0, 120], "sentence": "Age: {value}."},
   "sex": {"kind": "categorical", "categories": ["female", "male"]},
   "grade": {"kind": "ordinal", "categories": ["low", "medium", "high"]},
   "management": {"kind": "categorical", "categories": [...], "leakage": "decided knowing ..."}}

`leakage` names why a column gives the answer away; such a column is left out unless asked for.
`censored` of a number says that "-inf" and "inf" stand for values beyond what can be measured; they
become the ends of its range. `missing` of any column lists what else than an empty cell says that
nothing was recorded, `unknown` of a category what says that somebody was asked and did not know.
`same` maps spellings of a category to the one that is listed, and `other` names the category that
takes whatever is not.
Records store a number as it is and a category by its index; a missing value is NaN, one that is
unknown UNKNOWN. Rows of numbers show both as missing; PRIMA's sentences tell them apart.

Axis letters: T attributes, D numbers of a row.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medvlp_jax.config import UserError, nearest
from medvlp_jax.data.files import Row
from medvlp_jax.reading import parse_json

KINDS = ("numeric", "categorical", "ordinal")
FIELDS = ("kind", "unit", "range", "categories", "missing", "sentence", "leakage", "censored")
FIELDS += ("unknown", "same", "other")
TEXTS = ("unit", "sentence", "leakage", "other")
LISTS = ("missing", "unknown", "categories")
UNKNOWN = -1.0  # a category: somebody was asked, and did not know
FEWEST = 20  # rows below which a column that goes with the class may do so by chance

Schema = Mapping[str, Mapping[str, Any]]


def read_schema(path: Path) -> dict[str, dict[str, Any]]:
    """Read and check a schema file.

    Raises:
      UserError: for a file that is missing or no JSON, and for the first entry that says something
        else than it may.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; a JSON file {{column: {{kind, ...}}}} is needed.")
    try:
        schema = parse_json(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.") from None
    if not isinstance(schema, dict) or not schema:
        raise UserError(f"{path} must hold an object {{column: {{kind, ...}}}} with columns.")
    for column, entry in schema.items():
        _check_entry(f"{path}: column '{column}'", entry)
    return schema


def _check_entry(where: str, entry: Any) -> None:
    if not isinstance(entry, dict):
        raise UserError(f"{where} is {entry!r}; an object with 'kind' is needed.")
    for field in entry:
        if field not in FIELDS:
            raise UserError(f"{where} has no field '{field}'. {nearest(field, FIELDS)}")
    for field, value in entry.items():
        if field in TEXTS and not isinstance(value, str):
            raise UserError(f"{where} has {field} {value!r}; a text is needed.")
        if field in LISTS and not (isinstance(value, list) and _are_texts(value)):
            raise UserError(f"{where} has {field} {value!r}; a list of texts is needed.")
        if field == "same" and not (isinstance(value, dict) and _are_texts(value.values())):
            raise UserError(f"{where} has same {value!r}; {{spelling: category}} is needed.")
    kind = entry.get("kind")
    if kind not in KINDS:
        raise UserError(f"{where} has kind {kind!r}; accepted are {', '.join(KINDS)}.")
    if kind == "numeric":
        low, high = _pair(where, entry.get("range"))
        if not low < high:
            raise UserError(f"{where} has range {[low, high]}; the first must be the smaller.")
    else:
        names = entry.get("categories", [])
        if len(names) < 2 or len({*names, ""}) != len(names) + 1:
            raise UserError(f"{where} has categories {names!r}; two or more different are needed.")
        listed = [*entry.get("same", {}).values(), *([entry["other"]] if "other" in entry else [])]
        for name in listed:
            if name not in names:
                raise UserError(f"{where} has no category '{name}'. {nearest(name, names)}")
    if "{value}" not in entry.get("sentence", "{value}"):
        raise UserError(f"{where}: the sentence {entry['sentence']!r} has no place for {{value}}.")


def _are_texts(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _pair(where: str, value: Any) -> tuple[float, float]:
    if not (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(v, int | float) and math.isfinite(v) for v in value)
    ):
        raise UserError(f"{where} has range {value!r}; [lowest, highest] is needed.")
    return value[0], value[1]


def parse_row(row: Row, schema: Schema) -> dict[str, float]:
    """Return what records store of a table row: numbers, category indices, NaN where missing.

    An empty cell is missing, and so is any of the entry's `missing` values.

    Raises:
      UserError: with file, row, column and value: an unknown category, no number, or one out of
        range.
    """
    return {column: _parse_cell(row, column, entry) for column, entry in schema.items()}


def _parse_cell(row: Row, column: str, entry: Mapping[str, Any]) -> float:
    text = row[column]
    if text in ("", *entry.get("missing", ())):
        return math.nan
    if entry["kind"] != "numeric":
        if text in entry.get("unknown", ()):
            return UNKNOWN
        text = entry.get("same", {}).get(text, text)
        if text not in entry["categories"] and "other" in entry:
            text = entry["other"]
        if text not in entry["categories"]:
            raise row.error(
                f"{column} is '{text[:40]}'; accepted are {', '.join(entry['categories'])}, "
                "or an empty cell."
            )
        return float(entry["categories"].index(text))
    low, high = entry["range"]
    if "censored" in entry and text in ("-inf", "inf"):
        return float(low if text == "-inf" else high)
    try:
        number = float(text)
    except ValueError:
        raise row.error(
            f"{column} is '{text[:40]}'; a number or an empty cell is needed."
        ) from None
    if not low <= number <= high:  # NaN and infinity too
        raise row.error(f"{column} is {text[:40]}; accepted are {low} to {high}, or an empty cell.")
    return number


def columns(schema: Schema, *, exclude: Sequence[str] = (), leakage: Sequence[str] = ()) -> tuple:
    """Return the columns a model may see.

    Args:
      schema: of the corpus.
      exclude: columns to leave out.
      leakage: columns to take although the schema says that they give the answer away.

    Raises:
      UserError: for a name that is no column, a `leakage` that is none, or if nothing is left.
    """
    for name in (*exclude, *leakage):
        if name not in schema:
            raise UserError(f"The table has no column '{name}'. {nearest(name, list(schema))}")
    for name in leakage:
        if "leakage" not in schema[name]:
            raise UserError(f"Column '{name}' is not marked as leakage: it is taken anyway.")
    kept = tuple(
        name
        for name, entry in schema.items()
        if name not in exclude and ("leakage" not in entry or name in leakage)
    )
    if not kept:
        raise UserError("No column of the table is left for the model to see.")
    return kept


def difference(first: Schema, second: Schema, here: str, there: str) -> str:
    """Say which column is the first that two tables do not encode alike; "" where none is.

    Args:
      first: what a model sees of one table, in the order of its rows.
      second: likewise of the other.
      here: name of the one corpus.
      there: name of the other.
    """
    for k, (a, b) in enumerate(itertools.zip_longest(first.items(), second.items())):
        if _encoded(a) != _encoded(b):
            return f"column {k} is {_encoded(a)} in {here} and {_encoded(b)} in {there}"
    return ""


def _encoded(column: tuple[str, Mapping[str, Any]] | None) -> str:
    """Write what decides the numbers of a column; "none" where there is no such column."""
    if column is None:
        return "none"
    name, entry = column
    holds = entry.get("categories") or map(float, entry["range"])
    unit, unknown = entry.get("unit", ""), " or unknown" * bool(entry.get("unknown"))
    return f"'{name}' ({entry['kind']}, {[*holds]}{' ' * bool(unit)}{unit}{unknown})"


def check_labels(
    schema: Schema,
    names: Iterable[str],
    tables: Sequence[Mapping[str, float]],
    labels: np.ndarray,
    where: tuple[str, str],
) -> None:
    """Refuse a column whose every value goes with one class: it is the label under another name.

    Numbers are not looked at.

    Args:
      schema: of the corpus.
      names: the columns a model sees.
      tables: values of the training rows.
      labels: [N, C] int8 of these rows, 1 present.
      where: the setting and the input, for messages.

    Raises:
      UserError: naming the column.
    """
    known = np.flatnonzero((labels == 1).any(1))
    truth = labels[known].argmax(1)
    if len(known) < FEWEST or len(set(truth)) < 2:
        return
    for column in names:
        if schema[column]["kind"] == "numeric":
            continue
        values = np.array([tables[row][column] for row in known])
        seen = [truth[values == value] for value in set(values[~np.isnan(values)])]
        rows, pure = sum(map(len, seen)), all(len(set(classes)) == 1 for classes in seen)
        if rows >= FEWEST and len(seen) > 1 and pure:
            raise UserError(
                f"{where[0]} has '{column}', and each of its values goes with one class: the label "
                f"leaks into the {where[1]}. Leave that column out with data.table.exclude."
            )


def sentences(values: Mapping[str, float], schema: Schema, names: Sequence[str]) -> list[str]:
    """Write one sentence an attribute; a missing value is said to be unknown.

    Numbers are rounded to two decimals, whole ones without any (CFCML section 2.8, C10).
    """
    return [_sentence(name, values[name], schema[name]) for name in names]


def _sentence(name: str, value: float, entry: Mapping[str, Any]) -> str:
    said = say(value, entry)
    unit = f" {entry['unit']}" if "unit" in entry and said != "unknown" else ""
    plain = f"{name.replace('_', ' ').capitalize()}: {{value}}{unit}."
    return entry.get("sentence", plain).replace("{value}", said)


def say(value: float, entry: Mapping[str, Any]) -> str:
    """Write a value: at most two decimals, a category by its name, "unknown" where it is."""
    if is_unknown(value, entry):
        return "unknown"
    if entry["kind"] == "numeric":
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return entry["categories"][int(value)]


def is_unknown(value: float, entry: Mapping[str, Any]) -> bool:
    """Say whether a value is missing, or a category that nobody knew."""
    return math.isnan(value) or (entry["kind"] != "numeric" and value == UNKNOWN)


def rows(values: Mapping[str, float], schema: Schema, names: Sequence[str]) -> np.ndarray:
    """Return float32 [T, D]: every attribute in columns of its own, zero elsewhere.

    A category is one-hot, a number runs from 0 to 1 over its range, a rank from 0 to 1 over its
    order; the last column of an attribute is 1 where the value is missing, and the others are 0
    then. Columns of its own let one Linear treat attributes differently.
    """
    blocks = [_block(values[name], schema[name]) for name in names]
    table = np.zeros((len(blocks), sum(map(len, blocks))), np.float32)
    start = 0
    for row, block in zip(table, blocks, strict=True):
        row[start : start + len(block)] = block
        start += len(block)
    return table


def one_hot(
    values: Mapping[str, float], schema: Schema, columns: Mapping[str, Sequence[str]]
) -> np.ndarray:
    """Return float32 [1, D] as MetaBlock's released script: a column a value, numbers as they are.

    Where nothing was recorded an attribute is zero; "UNK", somebody was asked, is a value. That a
    number is missing cannot be told from 0 (Pacheco and Krohling 2021).

    Args:
      values: of a record.
      schema: of the corpus.
      columns: {attribute: its values that have a column}; none for a number.
    """
    row = []
    for name, listed in columns.items():
        value, entry = values[name], schema[name]
        if entry["kind"] == "numeric":
            row.append(0.0 if math.isnan(value) else value)
            continue
        said = "" if math.isnan(value) else "UNK" if value == UNKNOWN else say(value, entry)
        row += [float(said == other) for other in listed]
    return np.array([row], np.float32)


def _block(value: float, entry: Mapping[str, Any]) -> np.ndarray:
    size = len(entry["categories"]) if entry["kind"] == "categorical" else 1
    block = np.zeros(size + 1, np.float32)
    if is_unknown(value, entry):
        block[-1] = 1
    elif entry["kind"] == "categorical":
        block[int(value)] = 1
    elif entry["kind"] == "ordinal":
        block[0] = value / (len(entry["categories"]) - 1)
    else:
        low, high = entry["range"]
        block[0] = (value - low) / (high - low)
    return block
