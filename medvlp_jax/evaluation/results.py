"""What every protocol returns: a flat, JSON-able dictionary of numbers with their uncertainty.

    {"zero_shot/finding/macro_auroc": {"value": .81, "low": .78, "high": .84, "n": 512,
       "chance": .5, "protocol": "zero_shot@clean-v1", "hash": "1f0c9a52"},
     ...,
     "zero_shot/finding/protocol": {"protocol": "zero_shot@clean-v1", "hash": "1f0c9a52",
       "settings": {...}, "patients": 480, "skipped": ["hernia"], ...}}

Keys are protocol/task/metric, with /class for one class. The hash is over the settings (prompts,
K, resamples, kind of interval, ...): numbers with different hashes are not comparable.

The file results.json holds these entries and one more, "provenance": code, config, rows, weights,
seeds and date, see provenance.py. It is in the file alone: the numbers of a run that is repeated
are equal, its date is not. `read` parts them again.
"""

import hashlib
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from medvlp_jax.config import UserError
from medvlp_jax.evaluation import statistics
from medvlp_jax.reading import parse_json
from medvlp_jax.writing import replaced

Results = dict[str, dict[str, Any]]
FILE, PROVENANCE = "results.json", "provenance"
NUMBERS = ("value", "low", "high", "n", "chance")  # of an entry, see `number`


class Written(NamedTuple):
    """What a results.json holds; `provenance` is empty in files from before there was any."""

    numbers: Results
    provenance: dict[str, Any]


def _plain(value):
    """Turn NumPy values into what json.dumps(allow_nan=False) takes; not finite becomes None."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(value, low=math.nan, high=math.nan, *, n: int, chance=math.nan) -> dict[str, Any]:
    """Return one entry: a value, its interval, its number of rows and what guessing would give."""
    return {"value": value, "low": low, "high": high, "n": n, "chance": chance}


def assemble(
    protocol: str, task: str, numbers: Mapping[str, Mapping], *, settings: Mapping, notes: Mapping
) -> Results:
    """Name the numbers protocol/task/metric and stamp each with the protocol's id and hash.

    Args:
      protocol: id and version, "zero_shot@clean-v1"; the part before @ starts the keys.
      task: middle part of the keys.
      numbers: metric name -> `number(...)`.
      settings: what decides comparability; hashed.
      notes: what the reader must know (patients, skipped classes, rows left out).
    """
    settings = {"interval": statistics.METHOD, **settings}
    stamp = stamped(protocol, settings)
    prefix = f"{protocol.split('@')[0]}/{task}"
    entries = {f"{prefix}/{name}": {**entry, **stamp} for name, entry in numbers.items()}
    entries[f"{prefix}/protocol"] = {**stamp, "settings": settings, **notes}
    return _plain(entries)


def stamped(protocol: str, settings: Mapping) -> dict[str, str]:
    """Return the protocol's id and the hash of what decides comparability, as entries hold them."""
    text = json.dumps(_plain({"protocol": protocol, **settings}), sort_keys=True)
    return {"protocol": protocol, "hash": hashlib.sha256(text.encode()).hexdigest()[:8]}


def task_name(name: str, fraction: float) -> str:
    """Return the middle part of the keys: "lung", or "lung_10%" of a tenth of the patients."""
    return name if fraction == 1 else f"{name}_{100 * fraction:g}%"


def renamed(results: Results, variant: str) -> Results:
    """Mark the task of every key: "zero_shot/organ/x" -> "zero_shot/organ (variant)/x"."""
    split = [(*key.split("/", 2), entry) for key, entry in results.items()]
    return {f"{a}/{task} ({variant})/{c}": entry for a, task, c, entry in split}


def digits(name: str, value: float | None) -> str:
    """One decimal for ranks, three for rates; a dash where there is no value."""
    if value is None:
        return "-"
    if 0 < abs(value) < 0.0005:  # a chance level of a large gallery
        return f"{value:.0e}"
    return f"{value:.1f}" if name.endswith("rank") else f"{value:.3f}"


def _row(name: str, entry: Mapping[str, Any]) -> tuple[str, ...]:
    value, low, high, chance = (
        digits(name, entry[key]) for key in ("value", "low", "high", "chance")
    )
    return name, value, "" if low == "-" else f"[{low}, {high}]", chance, str(entry["n"])


def _remarks(entry: Mapping[str, Any]) -> list[str]:
    """What stands below a task's rows: the protocol, and what was skipped."""
    known = {"protocol", "hash", "settings", "skipped", "left_out", "patients", "prevalence"}
    known |= {"fewest_patients"}
    patients = f", {entry['patients']} patients" if "patients" in entry else ""
    remarks = [f"{entry['protocol']} #{entry['hash']}{patients}"]
    if entry.get("left_out"):
        remarks.append(f"{entry['left_out']} rows left out (unknown label or no text)")
    if entry.get("skipped"):
        remarks.append(f"skipped: {', '.join(map(str, entry['skipped']))}")
    other = {k: v for k, v in entry.items() if k not in known and v not in ({}, [])}
    return remarks + [
        f"{k}: {digits(k, v) if isinstance(v, float) else v}" for k, v in other.items()
    ]


HEADER = ("metric", "value", "95 % interval", "chance", "n")


def _lines(rows, *, markdown: bool) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    between, edge = (" | ", "| ") if markdown else ("  ", "")
    lines = []
    for row in rows:
        cells = [
            row[0].ljust(widths[0]),
            *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append(f"{edge}{between.join(cells)}{edge[::-1]}")
    rule = ["-" * w for w in widths]
    if markdown:
        rule[1:] = [f"{dashes[:-1]}:" for dashes in rule[1:]]
    lines.insert(1, f"{edge}{between.join(rule)}{edge[::-1]}")
    return lines


def results_table(results: Results, *, markdown: bool = False, per_class: bool = True) -> str:
    """Lay out results as one aligned text table, tasks one below the other.

    Args:
      results: what one or several protocols returned, merged.
      markdown: pipes around the cells, for a README.
      per_class: False keeps the headline numbers and controls only.

    Returns:
      Text without a final newline.
    """
    rows, remarks, previous = [HEADER], [], None
    for key, entry in results.items():
        protocol, task, metric = key.split("/", 2)
        if "value" not in entry:
            remarks += [f"{protocol}/{task}: {'; '.join(_remarks(entry))}"]
            continue
        if "/" in metric and not per_class:
            continue
        name = f"{protocol}/{task}/{metric}" if markdown else f"  {metric}"
        if not markdown and (protocol, task) != previous:
            rows.append((f"{protocol}/{task}", "", "", "", ""))
            previous = (protocol, task)
        rows.append(_row(name, entry))
    foot = [f"* {r}" for r in remarks] if markdown else remarks
    return "\n".join([*_lines(rows, markdown=markdown), "", *foot]).rstrip()


def write_results(results: Results, folder: pathlib.Path, provenance: Mapping) -> None:
    """Write results.json, whole or not at all."""
    entries = _plain({PROVENANCE: provenance, **results})
    with replaced(pathlib.Path(folder) / FILE) as scratch:
        scratch.write_text(json.dumps(entries, indent=1, allow_nan=False))


def read(path: pathlib.Path) -> Written:
    """Read the results of a run folder, or of a file.

    Raises:
      UserError: where there are none, or the file is no results.json.
    """
    path = pathlib.Path(path)
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{path} has no {FILE}: it has not been evaluated yet.")
    try:
        entries = parse_json(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}.") from None
    whole = isinstance(entries, dict) and all(isinstance(v, dict) for v in entries.values())
    numbers = {k: v for k, v in entries.items() if k != PROVENANCE} if whole else {}
    for key, entry in numbers.items():
        if key.count("/") < 2 or "protocol" not in entry or "hash" not in entry:
            raise UserError(
                f"{file}: '{key}' is no protocol/task/metric with a protocol and its hash."
            )
        if "value" in entry and not all(_is_number(entry.get(name, "")) for name in NUMBERS):
            raise UserError(f"{file}: '{key}' needs {', '.join(NUMBERS)}, each a number or null.")
    if not numbers:
        raise UserError(f"{file} holds no results of the form {{protocol/task/metric: entry}}.")
    return Written(numbers, entries.get(PROVENANCE, {}))


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and math.isfinite(value))


def headlines(results: Results) -> list[str]:
    """Return the names of all numbers but those of a class."""
    return [key for key, entry in results.items() if "value" in entry and key.count("/") == 2]


def scalars(results: Results) -> dict[str, float]:
    """Return the numbers worth a line in metrics.jsonl: no per-class rows, no intervals."""
    values = {key: results[key]["value"] for key in headlines(results)}
    return {key: value for key, value in values.items() if value is not None}
