"""Prompt sets: the texts of zero-shot tasks as versioned data, the published ones beside the code.

A file is {"version", "tasks": {task: {"section", "multi_label", "classes": {class: {"positive":
side, "negative": side}}}}}. A side is a list of texts, or {"slots": [[...], ...]}, of which every
combination is a prompt: the slots in their order, the last fastest, joined by single spaces, as
GLoRIA makes them (Huang et al. 2021, gloria/gloria.py). An empty slot leaves its space: at an end
`strip` takes it away, as CXR-CLIP does; in the middle it stays.

A task may also have

  template       {"positive": ["{c}"], "negative": ["no {c}"]} instead of classes: for any class
  positive_only  there is no text for the absence of a class (MedCLIP's RSNA and COVID lists)
  partial        the set names some classes of the corpus; the others are left out, and listed

What is shipped is in `prompt_sets/`; where each comes from is its "source".
"""

import itertools
import pathlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

from medvlp_jax.config import UserError, nearest
from medvlp_jax.evidence import phrases
from medvlp_jax.reading import parse_json

FOLDER = pathlib.Path(__file__).with_name("prompt_sets")
SIDES = ("positive", "negative")


def shipped() -> list[str]:
    """Return the names of the sets beside the code."""
    return sorted(file.stem for file in FOLDER.glob("*.json"))


def find(name_or_path: str | pathlib.Path) -> pathlib.Path:
    """Return the file of a shipped set, or the path itself.

    Raises:
      UserError: if it is neither.
    """
    name = str(name_or_path)
    if name in shipped():
        return FOLDER / f"{name}.json"
    if pathlib.Path(name).is_file():
        return pathlib.Path(name)
    raise UserError(
        f"evals.prompts={name} is neither a file nor a prompt set. {nearest(name, shipped())}"
    )


def combinations(slots: Sequence[Sequence[str]], *, strip: bool = False) -> list[str]:
    """Return every combination of the slots, joined by single spaces.

    Args:
      slots: in order; the last varies fastest. Duplicates stay: GLoRIA's effusions have them.
      strip: take the spaces that an empty slot leaves at either end away.
    """
    texts = [" ".join(parts) for parts in itertools.product(*slots)]
    return [text.strip() for text in texts] if strip else texts


def resolve(
    prompts_json: Mapping[str, Any],
    tasks: Mapping[str, Sequence[str]],
    *,
    strip: bool = False,
    draw: int = 0,
    seed: int = 6,
    by_rules: bool = False,
) -> dict[str, Any]:
    """Turn a parsed file into one of plain texts, for the tasks a corpus has.

    Args:
      prompts_json: the parsed file.
      tasks: class names by task.
      strip: see `combinations`.
      draw: prompts of each side, without replacement; 0 takes all. A side with fewer keeps them.
      seed: of one `random.Random` for all draws of a task, classes in the order of the file. GLoRIA
        seeds with 6 when it is imported, so that its draw depends on everything drawn before; this
        is its draw where nothing was.
      by_rules: see `as_read`.

    Raises:
      UserError: for a negative draw, or a set with no task of the corpus.
    """
    if draw < 0:
        raise UserError(f"evals.zero_shot.draw={draw} must be 0, for all prompts, or more.")
    shared = {task: spec for task, spec in prompts_json["tasks"].items() if task in tasks}
    if not shared:
        raise UserError(
            f"Prompt set {prompts_json['version']} is for {', '.join(prompts_json['tasks'])}; "
            f"the corpus has {', '.join(tasks)}."
        )
    resolved = {}
    for task, spec in shared.items():
        rng = random.Random(seed)
        classes = spec.get("classes") or dict.fromkeys(tasks[task], spec.get("template", {}))
        texts = {}
        for name, sides in classes.items():
            drawn = {
                side: _drawn(_texts(sides[side], name, strip), draw, rng)
                for side in SIDES
                if side in sides
            }
            read = as_read if by_rules else str
            texts[name] = {side: [read(t) for t in drawn[side]] for side in drawn}
        resolved[task] = {k: v for k, v in spec.items() if k != "template"} | {"classes": texts}
    return {**prompts_json, "tasks": resolved}


def as_read(text: str) -> str:
    """Return the evidence the rules find in a text, each phrase a sentence.

    A denied finding becomes that nothing is wrong; a text that tells the rules nothing stays. So a
    text encoder of reports meets how reports put it, as LGDEA's evidence space does of itself.
    """
    told = phrases.in_prompt(text, phrases.reader())
    return " ".join(f"{phrase[:1].upper()}{phrase[1:]}." for phrase in told) or text


def _texts(side: Sequence[str] | Mapping, name: str, strip: bool) -> list[str]:
    texts = combinations(side["slots"], strip=strip) if isinstance(side, Mapping) else side
    return [text.replace("{c}", name) for text in texts]


def _drawn(texts: list[str], draw: int, rng: random.Random) -> list[str]:
    return rng.sample(texts, draw) if 0 < draw < len(texts) else texts


def read(name_or_path: str | pathlib.Path) -> dict[str, Any]:
    """Parse a shipped set or a file.

    Raises:
      UserError: if there is no such set, or it is no JSON of tasks as above.
    """
    file = find(name_or_path)
    try:
        parsed = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}.") from None
    return check(parsed, str(file))


def check(parsed: Any, where: str) -> dict[str, Any]:
    """Return a parsed prompt set.

    Raises:
      UserError: if it is none of tasks as above.
    """
    if not isinstance(parsed, dict) or not {"version", "tasks"} <= parsed.keys():
        raise UserError(f'{where} is no prompt set; one has "version" and "tasks".')
    if defect := _defect(parsed["tasks"]):
        raise UserError(f"{where}: {defect}.")
    return parsed


def _defect(tasks: Any) -> str:
    """Return what is wrong with the tasks of a file; "" if nothing is."""
    if not isinstance(tasks, dict):
        return '"tasks" must be {task: {"section", "multi_label", "classes"}}'
    for task, spec in tasks.items():
        fields = spec if isinstance(spec, dict) else {}
        if not isinstance(fields.get("section"), str):
            return f'task \'{task}\' needs a "section", such as "findings"'
        if not isinstance(fields.get("multi_label"), bool):
            return f"task '{task}' needs \"multi_label\", true or false"
        classes = fields.get("classes") or {"template": fields.get("template")}
        if not isinstance(classes, dict):
            return f'"classes" of task \'{task}\' must be {{class: {{"positive", "negative"}}}}'
        for name, sides in classes.items():
            if not isinstance(sides, dict):
                return (
                    f"'{name}' of task '{task}' must be {{\"positive\": side, \"negative\": side}}"
                )
            for side in {*SIDES} & {*sides}:
                if not _is_side(sides[side]):
                    return (
                        f"the {side} side of '{name}' of task '{task}' must be a list of texts or "
                        '{"slots": lists of texts}'
                    )
    return ""


def _is_side(side: Any) -> bool:
    """A text alone is refused: read as a list, each of its letters would be a prompt."""
    lists = side.get("slots") if isinstance(side, dict) else [side]
    is_texts = lambda texts: isinstance(texts, list) and all(isinstance(t, str) for t in texts)
    return isinstance(lists, list) and bool(lists) and all(map(is_texts, lists))
