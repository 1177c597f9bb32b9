"""What a folder of one's own says of itself, checked before a row is read.

`corpus.json` is described in csv_folder_dataset_builder.py, `prompts.json` in
evaluation/prompts.py, which reads it from the prepared corpus.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medvlp_jax.config import UserError, nearest
from medvlp_jax.data import building, layouts
from medvlp_jax.reading import parse_json

DEFAULTS = {"classes": [], "labels": {}, "images": {}, "channels": 3, "side": 0}
FIELDS = ("columns", *DEFAULTS)
NEEDED = ("image", "group")
TEXTS = ("findings", "impression", "report")
COLUMNS = (*NEEDED, "label", "study", "id", "split", *TEXTS)
TASK = "label"
SIDES = ("positive", "negative")
# What records are made from, beside the images.
TABLES = ("corpus.json", "table.csv", "table.json", "prompts.json", building.SKIP_LIST)


def digest(folder: Path) -> str:
    """Return 16 digits that change with any of the TABLES in a folder."""
    there = [name for name in TABLES if (folder / name).is_file()]
    return layouts.id_hash([f"{name} {layouts.sha256(folder / name)}" for name in there])


def read(folder: Path) -> dict[str, Any]:
    """Read and check corpus.json.

    Raises:
      UserError: for a file that is missing or no JSON, a field or column that is missing or
        unknown, fewer than two classes beside a label, or a value that cannot be.
    """
    path = folder / "corpus.json"
    if not path.is_file():
        raise UserError(f"{path} is missing; it says what the columns of table.csv are.")
    found = DEFAULTS | _check_fields(path, _read_json(path), FIELDS, needed=("columns",))
    columns = _check_fields(f"{path}: columns", found["columns"], COLUMNS, needed=NEEDED)
    # An empty name says that there is no such column.
    found["columns"] = columns = {key: name for key, name in columns.items() if name}
    for key, name in columns.items():
        if not isinstance(name, str):
            raise UserError(f"{path}: column '{key}' is {name!r}; the name of one is needed.")
    if "report" in columns and {"findings", "impression"} & {*columns}:
        raise UserError(f"{path}: columns name a whole report beside its parts; one is needed.")
    for field in ("labels", "images"):
        if not isinstance(found[field], dict):
            raise UserError(f"{path} has {field} {found[field]!r}; an object by name is needed.")
        for name in found[field]:
            if not name or "/" in name:
                raise UserError(f"{path}: {field} has the name '{name}'; one without / is needed.")
    classes = found["classes"]
    if (TASK in columns) != bool(classes):
        raise UserError(f"{path}: a column for the label and its classes go together.")
    if classes and (not _are_names(classes) or len(classes) < 2):
        raise UserError(f"{path} has classes {classes!r}; two or more different are needed.")
    for task, names in found["labels"].items():
        if not _are_names(names) or task == TASK:
            raise UserError(
                f"{path}: labels '{task}' is {names!r}; a list of columns is needed, all different "
                f"and under another name than '{TASK}'."
            )
    if not (_is_whole(found["channels"]) and found["channels"] in (1, 3)):
        raise UserError(f"{path} has channels {found['channels']!r}; accepted are 1 and 3.")
    side, least, most = found["side"], building.MIN_SIDE, building.MAX_SIDE
    if not (_is_whole(side) and (side == 0 or least <= side <= most)):
        raise UserError(f"{path} has side {side!r}; accepted are 0 and {least} to {most}.")
    for name, column in found["images"].items():
        if name in ("image", "image_2", "tabular"):
            raise UserError(f"{path}: a further image cannot be called '{name}'.")
        if not _are_names([column]):
            raise UserError(
                f"{path}: image '{name}' is {column!r}; the name of a column is needed."
            )
    return found


def check_table(path: Path, schema: Iterable[str], described: Mapping[str, Any]) -> None:
    """Refuse a label among the columns that a model may see.

    Args:
      path: of table.json.
      schema: its columns.
      described: what corpus.json says, see `read`.

    Raises:
      UserError: naming the column.
    """
    labels = {name for names in described["labels"].values() for name in names}
    labels.add(described["columns"].get(TASK))
    for name in schema:
        if name in labels:
            raise UserError(
                f"{path}: column '{name}' is a label in corpus.json, and a model would read the "
                "answer; accepted are columns that are none."
            )


def read_prompts(folder: Path, tasks: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Read and check prompts.json; nothing where there is no such file.

    Args:
      folder: that may hold it.
      tasks: class names of every label task of the corpus.

    Raises:
      UserError: for a file that is no JSON or no prompt set, one for other tasks, or a class
        without prompts.
    """
    path = folder / "prompts.json"
    if not path.is_file():
        return {}
    found = _read_json(path)
    sets = found.get("tasks") if isinstance(found, dict) else None
    if not isinstance(sets, dict) or "version" not in found:
        raise UserError(f'{path} is no prompt set; one has "version" and "tasks", {{task: ...}}.')
    if not {*sets} & {*tasks}:
        raise UserError(
            f"{path} is for {', '.join(sets) or 'no task'}; a task of the corpus is needed: "
            f"{', '.join(tasks) or 'it has none, so leave the file out'}."
        )
    for task, spec in sets.items():
        if defect := _defect(spec, tasks.get(task, ())):
            raise UserError(f"{path}: task '{task}' {defect}.")
    return found


def _defect(spec: Any, classes: Sequence[str]) -> str:
    """Return what is wrong with the prompts of a task of these classes; "" for nothing."""
    spec = spec if isinstance(spec, dict) else {}
    if not isinstance(spec.get("section"), str):
        return 'needs a "section", such as "findings"'
    if not isinstance(spec.get("multi_label"), bool):
        return 'needs "multi_label", true or false'
    texts = spec.get("classes") or dict.fromkeys(classes or ("template",), spec.get("template"))
    if not isinstance(texts, dict):
        return f'has classes {texts!r:.60}; {{class: {{"positive", "negative"}}}} is needed'
    is_paired = spec["multi_label"] and not spec.get("positive_only")
    needed = SIDES if is_paired else SIDES[:1]
    for name, sides in texts.items():
        if not isinstance(sides, dict):
            return f'has {sides!r:.60} for \'{name}\'; {{"positive", "negative"}} is needed'
        for side in SIDES:
            value = sides.get(side, [])
            if not _is_side(value) or (side in needed and name in classes and not value):
                return (
                    f"has {value!r:.60} as the {side} side of '{name}'; a list of texts or "
                    '{"slots": lists of texts} is needed'
                )
    missing = [] if spec.get("partial") else [name for name in classes if name not in texts]
    return f"has no prompts for {', '.join(missing)}" if missing else ""


def _is_side(side: Any) -> bool:
    """As evaluation/prompts.py has it: a text alone would be read as a list of its letters."""
    lists = side.get("slots") if isinstance(side, dict) else [side]
    is_texts = lambda texts: isinstance(texts, list) and all(isinstance(t, str) for t in texts)
    return isinstance(lists, list) and bool(lists) and all(map(is_texts, lists))


def _read_json(path: Path) -> Any:
    try:
        found = parse_json(path.read_text(encoding="utf-8-sig"))
        json.dumps(found, ensure_ascii=False).encode()  # half a character can be spelled in JSON
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.") from None
    return found


def _check_fields(where, given, known, *, needed) -> dict:
    if not isinstance(given, dict):
        raise UserError(f"{where} must be an object with {', '.join(needed)}.")
    for field in given:
        if field not in known:
            raise UserError(f"{where} has no field '{field}'. {nearest(field, known)}")
    if missing := [field for field in needed if not given.get(field)]:
        raise UserError(f"{where} lacks {', '.join(missing)}.")
    return given


def _are_names(names: Any) -> bool:
    """Say whether this is a list of different texts, none of them empty, and at least one."""
    return (
        isinstance(names, list)
        and bool(names)
        and all(isinstance(name, str) and name for name in names)
        and len({*names}) == len(names)
    )


def _is_whole(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)
