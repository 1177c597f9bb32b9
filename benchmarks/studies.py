"""What the studies of many trainings share: what is done is kept, and never mixed with others.

A study (methods_cfcml.py, methods_lgdea.py, methods_prima.py, evaluation.py) writes {"settings":
..., and what it has measured} to --out after each training, with a Markdown table beside it, and
goes on from there when the same command is started again.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from medvlp_jax.config import UserError
from medvlp_jax.writing import replaced

PLACES = ("--config.data.data_dir", "--config.data.manual_dir")


def deciding(overrides: Sequence[str]) -> list[str]:
    """Return the overrides without where files lie, which decides nothing and names a machine."""
    return [given for given in overrides if not given.startswith(PLACES)]


def finished(
    out: pathlib.Path, settings: Mapping[str, Any], later: Sequence[str] = ()
) -> dict[str, Any]:
    """Return what a study has written so far; {} where it begins.

    Args:
      out: its file.
      settings: that decide its numbers, `overrides` among them.
      later: names of settings that are not known yet, and are compared later.

    Raises:
      UserError: if it was made with other settings, or is no file of a study.
    """
    if not out.is_file():
        return {}
    try:
        saved = json.loads(out.read_text())
        theirs = dict(saved["settings"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{out} is no file of a study: choose another place.") from None
    theirs["overrides"] = deciding(theirs.get("overrides", ()))  # older files name places
    theirs = {name: value for name, value in theirs.items() if name not in later}
    if theirs != settings:
        raise UserError(
            f"{out} holds numbers of settings {theirs}, not {settings}: choose another place, or "
            "move it away."
        )
    return saved


def keep(out: pathlib.Path, content: Mapping[str, Any], table: str) -> None:
    """Write numbers, and the table beside them, each whole or not at all."""
    for file, text in ((out, json.dumps(content, indent=1)), (out.with_suffix(".md"), table)):
        with replaced(file) as scratch:
            scratch.write_text(text + "\n")
