"""Published figures, to look at beside a run's own: never in one table with them.

published.json holds them as {"version", "about", "marks", "tables": {name: {"protocol", "title",
"unit", "source", "mark", "columns", "rows": {model: [number or null]}, "marks": {model: mark}}}}.
A mark says how a figure came here: [P] read in a paper, [S] in released source, [M] unconfirmed; a
row of `marks` has another than its table. They come from other patients, splits and prompts.
"""

import functools
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from medvlp_jax.config import UserError, nearest
from medvlp_jax.evaluation.layout import Grid

FILE = pathlib.Path(__file__).with_name("published.json")


@functools.cache
def load() -> Mapping[str, Any]:
    """Return the file."""
    return json.loads(FILE.read_text())


def fitting(protocols: Iterable[str]) -> list[str]:
    """Return the tables of some kinds of protocol: "zero_shot", "retrieval", "segment", ..."""
    kinds = {*protocols}
    return [name for name, table in load()["tables"].items() if table["protocol"] in kinds]


def grid(name: str) -> Grid:
    """Lay out one table.

    Raises:
      UserError: for a name that is none.
    """
    tables = load()["tables"]
    if name not in tables:
        raise UserError(f"No published table '{name}'. {nearest(name, list(tables))}")
    table = tables[name]
    marks = table.get("marks", {})
    rows = [
        (f"{model} [{marks.get(model, table['mark'])}]", *map(_written, values))
        for model, values in table["rows"].items()
    ]
    used = sorted({table["mark"], *marks.values()})
    said = "; ".join(f"[{mark}] {load()['marks'][mark]}" for mark in used)
    title = f"Published, not measured here: {table['title']} ({table['unit']})"
    notes = (f"{name}, version {load()['version']}. Source: {table['source']}. {said}.",)
    return Grid(title, ("model", *table["columns"]), rows, notes)


def _written(value: float | None) -> str:
    """Write a figure as it was printed; a dash where there is none."""
    return "-" if value is None else f"{value:g}"
