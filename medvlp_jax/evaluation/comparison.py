"""Several runs as one table: a row a run and control, a column a number measured in one way.

Numbers with different protocol hashes answer different questions. They never share a column: each
hash has its own, and a note names the settings that differ. Another note says where runs were
evaluated on other rows, or with other labels of the same, which no hash of settings shows. A
published flavour, studies instead of images, and one draw of several have columns of their own,
too.
"""

import fnmatch
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from medvlp_jax.config import UserError, nearest
from medvlp_jax.evaluation import flavours
from medvlp_jax.evaluation.layout import Grid
from medvlp_jax.evaluation.results import Written, digits

# The number of a task that stands for it, the first that it has.
HEADLINES = ("macro_auroc", "P@1", "R@10", "cnr", "dice", "map", "balanced_accuracy", "loss")
FIELDS = ("run", "control", "protocol", "hash", "task", "metric", "value", "low", "high", "n")
FIELDS += ("chance",)
CHANCE = "chance"
ROWS = ("corpus", "split", "rows", "patients", "hash")  # what provenance says of them
# What a task is marked with that is no control: other rows, or a part of the training patients.
STUDIES, DRAW = "by study", re.compile(r"draw \d+")


class Key(NamedTuple):
    """What the key of an entry says.

    Attributes:
      task: protocol/task, with its flavour if it has one: "zero_shot/organ (gloria)".
      part: "by study", "draw 0", or "".
      control: "untrained", or "".
      metric: "macro_auroc", "auroc/lung".
    """

    task: str
    part: str
    control: str
    metric: str


class Column(NamedTuple):
    """One number, measured in one way."""

    task: str  # protocol/task, with flavour and part
    metric: str
    protocol: str
    hash: str


class Table(NamedTuple):
    """Entries by row, a (run, control), and column; what has to be said about them."""

    rows: list[tuple[str, str]]
    columns: list[Column]
    cells: dict[tuple[tuple[str, str], Column], Mapping[str, Any]]
    notes: list[str]


def parted(key: str) -> Key:
    """Part a key: "classify/grade (by study) (untrained)/x" has a part and a control."""
    protocol, task, metric = key.split("/", 2)
    name, marks = re.fullmatch(r"(.*?)((?: \([^()]+\))*)", task).groups()
    kinds: dict[str, list[str]] = {"flavour": [], "part": [], "control": []}
    for mark in re.findall(r"\(([^()]+)\)", marks):
        is_part = mark == STUDIES or DRAW.fullmatch(mark)
        is_flavour = mark in flavours.FLAVOURS.get(protocol, ())
        kinds["flavour" if is_flavour else "part" if is_part else "control"].append(mark)
    name += "".join(f" ({mark})" for mark in kinds["flavour"])
    return Key(f"{protocol}/{name}", ", ".join(kinds["part"]), ", ".join(kinds["control"]), metric)


def compare(runs: Mapping[str, Written], patterns: Sequence[str] = ()) -> Table:
    """Collect the numbers of runs.

    Args:
      runs: by the name they shall have.
      patterns: of keys without their control, such as "zero_shot/*/macro_auroc"; none takes one
        headline a task, and leaves single draws to their mean.

    Raises:
      UserError: for a pattern that no number fits, or a run whose settings or rows cannot be read.
    """
    found = {}
    for run, written in runs.items():
        for key, entry in written.numbers.items():
            said = parted(key)
            if "value" in entry:
                task = f"{said.task} ({said.part})" if said.part else said.task
                column = Column(task, said.metric, entry["protocol"], entry["hash"])
                found[(run, said.control), column] = entry
    names = {f"{column.task}/{column.metric}" for _, column in found}
    wanted = _matching(patterns, names) if patterns else _headlines(names)
    cells = {at: v for at, v in found.items() if f"{at[1].task}/{at[1].metric}" in wanted}
    rows = list(dict.fromkeys(row for row, _ in cells))
    # A task's columns side by side, the hashes of one number next to each other.
    order = {name: i for i, name in enumerate(dict.fromkeys(c[:2] for _, c in cells))}
    columns = sorted(dict.fromkeys(c for _, c in cells), key=lambda c: order[c[:2]])
    notes = _other_settings(runs, columns) + _other_rows(runs) + _other_labels(runs)
    return Table(rows, columns, cells, notes)


def _matching(patterns, names) -> set[str]:
    wanted = set()
    for pattern in patterns:
        fits = fnmatch.filter(names, pattern)
        if not fits:
            raise UserError(f"No run has a number '{pattern}'. {nearest(pattern, sorted(names))}")
        wanted |= {*fits}
    return wanted


def _headlines(names) -> set[str]:
    tasks: dict[str, list[str]] = {}
    for name in sorted(names):
        task, metric = "/".join(name.split("/")[:2]), name.split("/", 2)[2]
        if not DRAW.fullmatch(parted(name).part):
            tasks.setdefault(task, []).append(metric)
    chosen = {
        task: next((m for m in HEADLINES if m in metrics), metrics[0])
        for task, metrics in tasks.items()
    }
    return {f"{task}/{metric}" for task, metric in chosen.items()}


def _other_settings(runs, columns) -> list[str]:
    """Name the settings in which the columns of one number differ."""
    told: dict[str, Mapping] = {}
    for run, written in runs.items():
        for key, entry in written.numbers.items():
            if "settings" in entry:
                if not isinstance(entry["settings"], Mapping):
                    raise UserError(
                        f"The results of {run} are damaged: the settings of '{key}' are "
                        f"{entry['settings']!r}; an object is needed."
                    )
                told.setdefault(entry["hash"], {"protocol": entry["protocol"], **entry["settings"]})
    hashes: dict[tuple[str, str], list[str]] = {}
    for column in columns:
        hashes.setdefault(column[:2], []).append(column.hash)
    grouped: dict[tuple[str, ...], list[str]] = {}
    for name, several in hashes.items():
        if len(several) > 1:
            grouped.setdefault(tuple(several), []).append("/".join(name))
    return [
        f"{', '.join(names)}: measured in {len(several)} ways, "
        f"{', '.join(f'#{h}' for h in several)}, which are not comparable and have a column each. "
        f"They differ in {_differences([told.get(h, {}) for h in several])}."
        for several, names in grouped.items()
    ]


def _differences(settings: Sequence[Mapping]) -> str:
    """Return "resamples (20, 2000)"; long values only by their name."""
    keys = dict.fromkeys(key for one in settings for key in one)
    said = []
    for key in keys:
        values = [json.dumps(one.get(key), sort_keys=True) for one in settings]
        if len({*values}) > 1:
            brief = max(map(len, values)) <= 24
            said.append(f"{key} ({', '.join(values)})" if brief else key)
    return ", ".join(said) or "settings that the files do not hold"


def rows_of(run: str, written: Written) -> Mapping[str, Any]:
    """Return on which rows a run was evaluated, see provenance.py; empty where it is not recorded.

    Raises:
      UserError: if what is recorded is no such object.
    """
    rows = written.provenance.get("rows", {})
    if not isinstance(rows, Mapping) or not _are_hashes(rows):
        raise UserError(
            f"The results of {run} are damaged: their provenance.rows is {rows!r}; an object with "
            f"{', '.join(ROWS)} is needed."
        )
    return rows


def _are_hashes(rows: Mapping) -> bool:
    labels = rows.get("labels", {})
    if not isinstance(labels, Mapping):
        return False
    hashes = rows.get("hash", ""), rows.get("boxes", ""), *labels.values()
    return all(isinstance(one, str) for one in hashes)


def _other_labels(runs: Mapping[str, Written]) -> list[str]:
    """Name labels and boxes in which runs on the same rows differ; of some it is not known."""
    seen: dict[tuple[str, str], dict[str, str]] = {}
    for run, written in runs.items():
        rows = rows_of(run, written)
        said = {f"labels of {task}": one for task, one in rows.get("labels", {}).items()}
        said |= {"boxes": rows["boxes"]} if "boxes" in rows else {}
        for what, one in said.items():
            seen.setdefault((rows.get("hash", ""), what), {})[run] = one
    return [
        f"The {what} are not the same in {', '.join(of)}, though the rows are."
        for (_, what), of in seen.items()
        if len({*of.values()}) > 1
    ]


def _other_rows(runs: Mapping[str, Written]) -> list[str]:
    seen = {run: rows_of(run, written) for run, written in runs.items()}
    hashes = {rows.get("hash") for rows in seen.values()}
    if len(hashes) < 2 and None not in hashes:
        return []
    say = lambda rows: (
        f"{rows['rows']} rows of {rows['patients']} patients of {rows['corpus']} {rows['split']}"
        if rows.keys() >= {*ROWS}
        else "not recorded"
    )
    listed = "; ".join(f"{run}: {say(rows)}" for run, rows in seen.items())
    if hashes == {None}:
        return [f"On which rows these were measured is not recorded ({', '.join(seen)})."]
    return [f"Not all were measured on the same rows. {listed}."]


def cell(metric: str, entry: Mapping | None) -> str:
    """Return "0.856 [0.841, 0.872]"."""
    if entry is None:
        return ""
    value, low, high = (digits(metric, entry[key]) for key in ("value", "low", "high"))
    return value if low == "-" else f"{value} [{low}, {high}]"


def grid(table: Table) -> Grid:
    """Lay the table out, with the level of guessing below where all runs agree on it."""
    header = ["run"]
    header += [f"{c.task}/{c.metric}\n{c.protocol} #{c.hash}" for c in table.columns]
    rows = [
        [
            f"{run} ({control})" if control else run,
            *(cell(c.metric, table.cells.get(((run, control), c))) for c in table.columns),
        ]
        for run, control in table.rows
    ]
    rows.append([CHANCE, *(_chance(table, c) for c in table.columns)])
    notes = ("Values with 95 % intervals over patients.", *table.notes)
    return Grid("Measured", header, rows, notes)


def _chance(table: Table, column: Column) -> str:
    levels = {
        digits(column.metric, e["chance"]) for (_, at), e in table.cells.items() if at == column
    }
    return levels.pop() if len(levels) == 1 else "differs"


def records(table: Table) -> list[dict[str, Any]]:
    """Return one dictionary of FIELDS a number."""
    return [
        {"run": run, "control": control, "protocol": c.protocol, "hash": c.hash}
        | {"task": c.task, "metric": c.metric}
        | {key: entry[key] for key in ("value", "low", "high", "n", "chance")}
        for ((run, control), c), entry in table.cells.items()
    ]
