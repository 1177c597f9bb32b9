"""Published tables: read only with a header that is known, refused with file, row and column.

A table says where to get it, so that whoever holds another file than they think learns so at once.
Rows are counted as a spreadsheet shows them: the header is row 1.
"""

import csv
import gzip
import hashlib
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from medvlp_jax.config import UserError
from medvlp_jax.data import files


class Table(NamedTuple):
    """A CSV table of a published corpus.

    Attributes:
      names: accepted paths in the source folder, the first that exists is read; *.gz is unpacked
        while reading.
      headers: accepted headers, a line each as it stands in the file.
      where: the page to get it from.
      fields: cells of a row where that is not the header's number.
      ordered: False where only the names of the columns are certain, not their order.
    """

    names: tuple[str, ...]
    headers: tuple[str, ...]
    where: str
    fields: int = 0
    ordered: bool = True

    def find(self, folder: Path) -> Path | None:
        """Return the file, None where there is none."""
        return next((folder / name for name in self.names if (folder / name).is_file()), None)

    def rows(
        self, folder: Path, *, filled: Sequence[str] = (), unique: str = ""
    ) -> list[files.Row]:
        """Read the table; its columns are named without white space around them.

        Args:
          folder: the source folder.
          filled: columns that must not be empty in any row.
          unique: a column whose values must all differ; "" for none.

        Raises:
          UserError: for a missing or unreadable file, another header, a row of another length, an
            empty cell in `filled`, or a repeated key.
        """
        path = self.find(folder)
        if path is None:
            raise UserError(
                f"{folder / self.names[0]} is missing; get it from {self.where} (accepted: "
                f"{', '.join(self.names)})."
            )
        return list(self._checked(path, filled, unique))

    def _checked(self, path: Path, filled: Sequence[str], unique: str) -> Iterator[files.Row]:
        lines = enumerate(_csv(path), start=1)
        _, header = next(lines, (1, []))
        columns = self._columns(path, header)
        first: dict[str, int] = {}
        for number, cells in lines:
            if not cells:
                continue  # an empty line, not a row
            if len(cells) != len(columns):
                raise UserError(
                    f"{path} row {number}: {len(cells)} cells, and the table has {len(columns)} "
                    "columns."
                )
            row = files.Row(path, number, dict(zip(columns, map(str.strip, cells), strict=True)))
            for column in filled:
                if not row[column]:
                    raise row.error(f"{column} is empty; every row needs a value there.")
            if unique and first.setdefault(row[unique], number) != number:
                raise row.error(
                    f"{unique} '{row[unique][:40]}' is also in row {first[row[unique]]}; every "
                    "row needs its own."
                )
            yield row

    def _columns(self, path: Path, header: list[str]) -> list[str]:
        """Return the columns' names, after comparing the header with those that are accepted."""
        arrange = tuple if self.ordered else sorted
        accepted = [next(csv.reader([line])) for line in self.headers]
        if arrange(header) not in [arrange(names) for names in accepted]:
            nearest = min(accepted, key=lambda names: len({*names} ^ {*header}))
            missing = [name for name in nearest if name not in header]
            further = [name for name in files.names(header, nearest) if name not in nearest]
            unknown = [repr(name) for name in further[:8]]
            if others := sum(name not in nearest for name in header) - len(further):
                unknown.append(f"{others} of {len(header)} columns")
            raise UserError(
                f"{path} row 1: this is no known header ("
                + (f"no column {', '.join(map(repr, missing))}; " if missing else "")
                + (f"unknown {', '.join(unknown)}; " if unknown else "")
                + ("" if missing or unknown else "other order or number of columns; ")
                + f"accepted is {','.join(nearest)}); get the table from {self.where}."
            )
        return [name.strip() for name in header[: self.fields or len(header)]]


def lines(folder: Path, name: str, where: str) -> list[files.Row]:
    """Read a text file without header; the cell `line` of a row is the stripped line, never empty.

    Raises:
      UserError: for a file that is missing or not UTF-8.
    """
    path = folder / name
    if not path.is_file():
        raise UserError(f"{path} is missing; get it from {where}.")
    return [
        files.Row(path, number, {"line": text.strip()})
        for number, text in enumerate(_text(path), start=1)
        if text.strip()
    ]


def member(folder: Path, row: files.Row, name: str) -> Path:
    """Return the path of a file that a row names by a path relative to the source folder.

    Links are followed: whoever owns the folder may keep the images elsewhere. A name may not.

    Raises:
      UserError: for an absolute path, one with "..", or one that no file can have.
    """
    parts = PurePosixPath(name).parts
    if not parts or files.leads_out(name) or "\0" in name:
        raise row.error(f"'{name[:80]}' is no path inside {folder}.")
    try:
        longest = max(len(part.encode()) for part in parts)
    except UnicodeEncodeError:
        raise row.error(f"{name[:80]!a} is no path: it has half a character in it.") from None
    if len(name) > 1024 or longest > 255:
        raise row.error(f"'{name[:80]}...' is too long for a path.")
    return folder.joinpath(*parts)


def number(row: files.Row, column: str, *, low: float = -math.inf, high: float = math.inf) -> float:
    """Return a cell as a number.

    Raises:
      UserError: for anything but a finite number in low..high.
    """
    try:
        value = float(row[column])
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and low <= value <= high):
        accepted = "a number" if math.isinf(low) else f"{low:g} to {high:g}"
        raise row.error(f"{column} is '{row[column][:40]}'; accepted is {accepted}.")
    return value


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def id_hash(ids: Sequence[str]) -> str:
    """Return 16 digits that name a set of ids: SHA-256 of the sorted ids, a line each."""
    return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()[:16]


def _csv(path: Path) -> Iterator[list[str]]:
    try:
        yield from csv.reader(_text(path, newline=""), strict=True)
    except csv.Error as error:
        raise UserError(f"{path} is no CSV file ({error}).") from error


def _text(path: Path, newline: str | None = None) -> Iterator[str]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline=newline) as file:
            while line := file.readline(files.LONGEST + 1):
                if len(line) > files.LONGEST:
                    raise UserError(
                        f"{path} has a line of more than {files.LONGEST:,} characters, as no whole "
                        "table has."
                    )
                yield line
    except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{path} cannot be read ({error}); whole UTF-8 text is needed, gzip where the name ends"
            " in .gz."
        ) from error
