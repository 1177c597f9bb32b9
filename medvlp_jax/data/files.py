"""Reading what users bring: tables and images, refused with the file, the row and what would do.

Rows are counted as a spreadsheet shows them: the header is row 1.
"""

import csv
import hashlib
import io
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from medvlp_jax.config import UserError
from medvlp_jax.data import dicom

# A cell may hold a long report: csv refuses more than 131,072 characters by itself. What is longer
# than this, a cell or a line, is damaged, and memory is not its to ask.
LONGEST = 1 << 24
csv.field_size_limit(LONGEST)
QUALITY = 95  # of a JPEG that is encoded anew
# The longest report has some 10,000 characters; more bytes are no report.
MAX_REPORT = 1 << 20
_NAME = re.compile(r"\w[\w .()/-]{0,39}")


class Row(NamedTuple):
    """One row of a table, able to say where it stands."""

    path: Path
    number: int
    cells: dict[str, str]

    def __getitem__(self, column: str) -> str:
        return self.cells[column]

    def error(self, problem: str) -> UserError:
        """Return the error "<file> row <n>: <problem>"."""
        return UserError(f"{self.path} row {self.number}: {problem}")

    def choice(self, column: str, accepted: Sequence[str]) -> str:
        """Return a cell that is empty or one of `accepted`; UserError otherwise."""
        value = self[column]
        if value and value not in accepted:
            raise self.error(
                f"{column} is '{value[:40]}'; accepted are {', '.join(accepted)}, or an empty cell."
            )
        return value


def read_rows(
    path: Path, *, columns: Sequence[str], filled: Sequence[str] = (), unique: str = ""
) -> list[Row]:
    """Read a CSV file whose header holds at least `columns`.

    Args:
      path: UTF-8 CSV with a header; white space around cells and names is dropped.
      columns: names the header must hold.
      filled: columns that must not be empty in any row.
      unique: a column whose values must all differ; "" for none.

    Raises:
      UserError: for a file that is missing or not UTF-8 CSV, a missing column or one that is there
        twice, a row that is not as long as the header, an empty cell in `filled`, or a repeated
        key.
    """
    if not path.is_file():
        raise UserError(
            f"{path} is missing; a CSV file with the columns {_list(columns)} is needed."
        )
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            lines = [(number, cells) for number, cells in enumerate(reader, start=2) if cells]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error}); a UTF-8 CSV file is needed.") from error
    if twice := [c for c in dict.fromkeys(header) if c and header.count(c) > 1]:
        called = _list([name for name in twice if name in names(header, columns)])
        raise UserError(
            f"{path} row 1: more than one column is called {called or 'the same'}; every column "
            "needs its own name."
        )
    if missing := [c for c in columns if c not in header]:
        raise UserError(
            f"{path} row 1: no column {_list(missing)}; it has {said(header, columns)}."
        )
    rows = []
    for number, cells in lines:
        rows.append(Row(path, number, dict(zip(header, map(str.strip, cells), strict=False))))
        if len(cells) != len(header):
            raise rows[-1].error(
                f"{len(cells)} cells, and the header has {len(header)}; a cell that holds a comma "
                "needs quotes."
            )
    first: dict[str, int] = {}
    for row in rows:
        for column in filled:
            if not row[column]:
                raise row.error(f"{column} is empty; every row needs a text there.")
        if unique and first.setdefault(row[unique], row.number) != row.number:
            raise row.error(
                f"{unique} '{row[unique][:40]}' is also in row {first[row[unique]]}; "
                "every row needs its own."
            )
    return rows


def read_image(path: Path, row: Row, *, format: str = "JPEG") -> bytes:
    """Return the bytes of an image file after decoding it once, so that a damaged one is refused.

    A picture that its EXIF orientation turns is encoded anew as viewers show it.

    Args:
      path: the image file.
      row: the table row that names it, for the error.
      format: Pillow's name of the format that is accepted, "JPEG" or "PNG".

    Raises:
      UserError: if the file is missing, truncated, no image, in another format, or deeper than 8
        bits, which decoding would cut off at white.
    """
    if not path.is_file():
        raise row.error(f"image {path} is missing; a {format} file is needed there.")
    try:
        with dicom.opened(path) as image:
            shown = dicom.upright(image)
            found, mode = image.format, image.mode
    except Exception as error:
        # Decoders of damaged files raise many types; all of them mean this.
        raise row.error(
            f"image {path} cannot be decoded ({error}); a whole {format} file is needed."
        ) from error
    if found != format:
        raise row.error(f"image {path} is {found}; a {format} file is needed.")
    if is_deep(mode):
        raise row.error(f"image {path} has more than 8 bits a channel; one of 8 bits is needed.")
    if shown is image:
        return path.read_bytes()
    buffer = io.BytesIO()
    shown.save(buffer, format, quality=QUALITY)
    return buffer.getvalue()


def is_deep(mode: str) -> bool:
    """Return whether pixels of one of Pillow's modes have more than 8 bits."""
    return mode.startswith(("I", "F"))


def inside(folder: Path, row: Row, column: str, *, suffix: str = "") -> Path:
    """Return the path in a cell, plus a suffix, which must not lead out of the source folder.

    Links are followed: whoever owns the folder may keep the images elsewhere. A name may not.

    Raises:
      UserError: for an absolute path, one with "..", or one that no file can have.
    """
    if "\0" in row[column]:
        raise row.error(f"{column} {row[column][:80]!r} holds a zero byte, which no path can.")
    if leads_out(row[column]):
        raise row.error(f"{column} '{row[column][:80]}' is outside {folder}.")
    return folder / f"{row[column]}{suffix}"


def leads_out(name: str) -> bool:
    """Return whether a path by its name alone may lie outside the folder it is relative to."""
    parts = PurePosixPath(name).parts
    return name.startswith("/") or ".." in parts or "\\" in name


def check_groups(rows: Sequence[Row], *, group: str, split: str, accepted: Sequence[str]) -> None:
    """Refuse a group (patient, lesion) that stands in two splits, or an unknown split.

    Raises:
      UserError: with both rows.
    """
    seen: dict[str, Row] = {}
    for row in rows:
        row.choice(split, accepted)
        first = seen.setdefault(row[group], row)
        if first[split] != row[split]:
            raise row.error(
                f"{group} {row[group]} is in {row[split]} here and in {first[split]} in row "
                f"{first.number}; all rows of a {group} must be in one split."
            )


def split_of(group: str) -> str:
    """Return "train", "validation" or "test": 80/10/10 by a hash of the group's id."""
    bucket = int(hashlib.sha256(group.encode()).hexdigest(), 16) % 10
    return ("train", "validation", "test")[max(0, bucket - 7)]


def names(header: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return the names of a header that an error may print.

    Row 1 of a table without header is a patient's. So there are none unless one of them is known,
    and but for the known ones none that does not look like a name.
    """
    if {*known}.isdisjoint(header):
        return []
    return [name for name in header if name in known or _NAME.fullmatch(name.strip())]


def said(header: Sequence[str], known: Sequence[str]) -> str:
    """Return "a, b and 2 others" of a header, of which an error may print what `names` returns."""
    printed = names(header, known)
    count = len(header) - len(printed)
    others = [f"{count} other{'s' * (count > 1)}"] if count else []
    return " and ".join(filter(None, [_list(printed), *others])) or "nothing"


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)
