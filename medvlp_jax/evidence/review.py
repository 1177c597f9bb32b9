"""Physicians check what was written: a table out, their verdicts in.

review.csv has a row a text: approve it, edit it (the new wording stands in `edited`), or reject it.
A verdict belongs to the exact text, writer and passages its id stands for; a text that is written
anew has to be checked anew. Rows may be left out and checked another time, not left empty.
"""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from medvlp_jax.config import UserError
from medvlp_jax.data import files, knowledge
from medvlp_jax.evidence import answers
from medvlp_jax.writing import replaced

VERDICTS = ("approve", "edit", "reject")
REVIEW, KEPT, WRITTEN = "review.csv", "verdicts.jsonl", "written.jsonl"
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what spreadsheets take for the start of one
COLUMNS = (
    "id",
    "factor",
    "disease",
    "kind",
    "source",
    "passages",
    "text",
    "verdict",
    "edited",
    "reviewer",
)


class Verdict(NamedTuple):
    """What a physician said of a text; `edited` is the new wording, "" unless edited."""

    verdict: str
    edited: str
    reviewer: str


def read(path: Path, written: Mapping[str, knowledge.Record]) -> dict[str, Verdict]:
    """Read a table of verdicts by id.

    Args:
      path: the table.
      written: the texts there are, by id.

    Raises:
      UserError: with file and row: an unknown or repeated id, a verdict that is missing or none, an
        edit without a new wording or with one of its own, or no reviewer.
    """
    found = {}
    columns = ("id", "verdict", "edited", "reviewer")
    for row in files.read_rows(path, columns=columns, unique="id"):
        if row["id"] not in written:
            raise row.error(
                f"no text has the id '{row['id']}': it was written anew since, or the file belongs "
                f"to another corpus; review the rows of today's {REVIEW}."
            )
        if not row["verdict"]:
            raise row.error(
                f"verdict is empty; accepted are {', '.join(VERDICTS)}; leave out rows that are to "
                "be reviewed another time."
            )
        verdict = row["verdict"].lower()
        if verdict not in VERDICTS:
            raise row.error(f"verdict is '{row['verdict']}'; accepted are {', '.join(VERDICTS)}.")
        edited = " ".join(row["edited"].split())
        if (verdict == "edit") != bool(edited):
            raise row.error(
                f"verdict is '{verdict}' and 'edited' is {'filled' if edited else 'empty'}; the "
                "new wording goes with 'edit', and with nothing else."
            )
        if not row["reviewer"]:
            raise row.error("reviewer is empty; who checked the text is part of the verdict.")
        found[row["id"]] = Verdict(verdict, edited, row["reviewer"])
    if not found:
        raise UserError(f"{path} holds no verdict.")
    return found


def take(out: Path, path: Path) -> dict[str, knowledge.Record]:
    """Take the verdicts of a table into a corpus folder; later ones replace earlier ones.

    Returns:
      The corpus as it stands now, by id.

    Raises:
      UserError: see `read`, for a damaged file of earlier verdicts, and where another table is read
        while the folder's own holds verdicts; nothing is changed then.
    """
    with answers.locked(out):
        if path.resolve() != (out / REVIEW).resolve():
            check_nothing_unread(out)
        kept = _kept(out) | read(path, read_written(out))
        rows = (answers.dumps({"id": name, **v._asdict()}) + "\n" for name, v in kept.items())
        answers.replace(out / KEPT, rows)
        return apply(out)


def apply(out: Path) -> dict[str, knowledge.Record]:
    """Write corpus.jsonl and review.csv from the texts and verdicts of a folder; return the former.

    A rejected text is left out; the others are unvetted until somebody approved or edited them.
    The folder has to be locked, see `answers.locked`.
    """
    verdicts = _kept(out)
    corpus, open_ = {}, {}
    for name, record in read_written(out).items():
        verdict = verdicts.get(name)
        if verdict is None:
            corpus[name] = open_[name] = record
        elif verdict.verdict != "reject":
            text = verdict.edited or record.text
            corpus[name] = record._replace(text=text, vetted=True)
    lines = (knowledge.line(name, record) for name, record in corpus.items())
    answers.replace(out / knowledge.FILE, lines)
    _write_review(out / REVIEW, open_)
    return corpus


def check_nothing_unread(out: Path) -> None:
    """Refuse to replace a review.csv in which somebody has written.

    Raises:
      UserError: naming the row.
    """
    if not (out / REVIEW).is_file():
        return
    for row in files.read_rows(out / REVIEW, columns=COLUMNS):
        if row["verdict"] or row["edited"]:
            raise row.error(
                "a verdict stands here that was not read yet, and this command writes the file "
                f"anew: run `medvlp evidence review --corpus {out}` first, then this again; no "
                "answer is lost."
            )


def read_written(out: Path) -> dict[str, knowledge.Record]:
    """Return every text of a corpus folder as it was written, by id."""
    return knowledge.read(out / WRITTEN)


def _kept(out: Path) -> dict[str, Verdict]:
    """Return the verdicts taken in so far, by id.

    Raises:
      UserError: for a line that is none.
    """
    path = out / KEPT
    lines = path.read_bytes().splitlines() if path.is_file() else []
    found = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            name = row.pop("id")
            found[name] = Verdict(**row)
            VERDICTS.index(row["verdict"])
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(
                f"{path} line {number} is damaged; a verdict with id, {', '.join(Verdict._fields)} "
                "is needed: take the line out, and review its text anew."
            ) from None
    return found


def _write_review(path: Path, records: Mapping[str, knowledge.Record]) -> None:
    # The mark at the start tells spreadsheets that this is UTF-8.
    with (
        replaced(path) as scratch,
        scratch.open("w", encoding="utf-8-sig", newline="") as file,
    ):
        rows = csv.DictWriter(file, COLUMNS)
        rows.writeheader()
        for name, record in records.items():
            row = {"id": name, **record._asdict()}
            row |= {"passages": _as_text(" ".join(record.ids)), "text": _as_text(record.text)}
            empty = dict.fromkeys(("verdict", "edited", "reviewer"), "")
            rows.writerow({key: {**row, **empty}[key] for key in COLUMNS})


def _as_text(cell: str) -> str:
    """Keep spreadsheets from computing what a model or an article wrote; never read back."""
    return f"'{cell}" if cell.startswith(FORMULA) else cell
