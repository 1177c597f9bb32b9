"""What measurements of many parts share: what is done is kept, and never mixed with others.

A study (methods*.py, evaluation*.py) writes {"settings": ..., and what it has measured} to --out
after each training, most of them with a Markdown table beside it, and goes on from there when the
same command is started again. Of other settings a file is refused, of the same it is added to: so a
part that is measured alone (--only, --cases, --models) leaves the others where they are.
"""

import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from medvlp_jax.config import UserError
from medvlp_jax.writing import replaced

FACTS = ("device", "threads", "tiny")  # of a file of timings, what its parts share
PLACES = ("--config.data.data_dir", "--config.data.manual_dir")


def deciding(overrides: Sequence[str]) -> list[str]:
    """Return the overrides without where files lie, which decides nothing and names a machine."""
    return [given for given in overrides if not given.startswith(PLACES)]


def fingerprint(settings: Any) -> str:
    """Return a short name of settings, so that nothing of others goes on in their place."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def recipe_of(*configs: Mapping) -> str:
    """Return the fingerprint of what may change in resolved configs under the same name."""
    return fingerprint([[config["recipe"], config["optim"]] for config in configs])


def read(out: pathlib.Path) -> dict[str, Any]:
    """Return what a file of a measurement holds; {} where it begins.

    Raises:
      UserError: where it is no such file.
    """
    if not out.is_file():
        return {}
    try:
        saved = json.loads(out.read_text())
    except ValueError:
        saved = None
    if not isinstance(saved, dict):
        raise UserError(f"{out} is no file of a study: name another --out.")
    return saved


def same(
    out: pathlib.Path, theirs: Mapping[str, Any], ours: Mapping[str, Any], flag: str = "--out"
) -> None:
    """Let pass what may be added to a file.

    Args:
      out: the file.
      theirs: settings it was made with.
      ours: those of now.
      flag: that names the file.

    Raises:
      UserError: where they differ.
    """
    if theirs != ours:
        raise UserError(
            f"{out} holds numbers of settings {dict(theirs)}, not {dict(ours)}: name another "
            f"{flag}, or move it away."
        )


def finished(
    out: pathlib.Path,
    settings: Mapping[str, Any],
    later: Sequence[str] = (),
    since: Sequence[str] = (),
    flag: str = "--out",
) -> dict[str, Any]:
    """Return what a study has written so far; {} where it begins.

    Args:
      out: its file.
      settings: that decide its numbers, `overrides` among them.
      later: names of settings that are not known yet, and are compared later.
      since: names of settings that older files do not have, and that are compared where they do.
      flag: that names the file.

    Raises:
      UserError: if it was made with other settings, or is no file of a study.
    """
    saved = read(out)
    if not saved:
        return {}
    try:
        theirs = dict(saved["settings"])
    except (KeyError, ValueError, TypeError):
        raise UserError(f"{out} is no file of a study: name another --out.") from None
    if "overrides" in theirs:
        theirs["overrides"] = deciding(theirs["overrides"])  # older files name places
    ours = {name: value for name, value in settings.items() if name in theirs or name not in since}
    same(out, {name: value for name, value in theirs.items() if name not in later}, ours, flag)
    # What an older file does not say of its numbers nobody knows now: its settings stay.
    if unknown := [name for name in since if name not in theirs]:
        print(f"{out} does not say its {', '.join(unknown)}; what is added is of today's.")
    return {**saved, "settings": theirs}


def parts(
    out: pathlib.Path, stored: Mapping[str, Any], kind: str, facts: Mapping[str, Any]
) -> dict[str, dict]:
    """Return what a file of timings holds by case or model, each with what it was measured with.

    Args:
      out: the file.
      stored: what it holds.
      kind: the key its parts lie under.
      facts: device, number of threads and, of a test's sizes, "tiny".

    Raises:
      UserError: where the parts are of other ones.
    """
    if stored:
        same(out, {name: stored[name] for name in FACTS if name in stored}, facts)
    # Until November 2026 one word on the versions stood for all parts, and none on the rest.
    older = {"measured": {"versions": stored["versions"]}} if "versions" in stored else {}
    return {name: {**older, **found} for name, found in stored.get(kind, {}).items()}


def keep(out: pathlib.Path, content: Mapping[str, Any], table: str = "") -> None:
    """Write numbers, and the table beside them if there is one, each whole or not at all."""
    files = {out: json.dumps(content, indent=1)} | (
        {out.with_suffix(".md"): table} if table else {}
    )
    for file, text in files.items():
        with replaced(file) as scratch:
            scratch.write_text(text + "\n")
