"""Reports as text: sections, and the layouts they are stored in.

A report is read from its headings (FINDINGS:, IMPRESSION: ...), from Open-i XML, from JSON lines,
from a CSV table, or from a folder of plain texts (MIMIC-CXR: one file a study, s50414267.txt, of
which the sections are read as its builder reads them).
"""

import re
import tarfile
import xml.etree.ElementTree as ElementTree
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from medvlp_jax.config import UserError
from medvlp_jax.data import files, headings, sections
from medvlp_jax.data.headings import tidy
from medvlp_jax.reading import parse_json

_MIMIC_STUDY = re.compile(r"s\d{8}")
# What spreadsheets and databases write into a cell without a text.
PLACEHOLDERS = ("nan", "null", "none", "n/a", "na", ".", "-")
SUFFIXES = (".xml", ".txt")


class Report(NamedTuple):
    """One report: what an image can show, an annotator's headings, and its images' names."""

    id: str
    findings: str
    impression: str
    headings: tuple[str, ...] = ()
    images: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """Both sections as one text."""
        return "\n".join(filter(None, (self.findings, self.impression)))


def read_reports(path: str | Path) -> Iterator[Report]:
    """Yield the reports of a file or folder in a fixed order, one at a time.

    Args:
      path: *.jsonl with "id" and "text", or "findings" and "impression"; *.csv with such columns;
        *.tgz, *.tar.gz or a folder of Open-i XML or plain text files (the id is the file's name).

    Raises:
      UserError: where there is nothing to read, a row has no id or text, or a file is damaged or
        not UTF-8.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        found = (p for p in path.rglob("*") if _is_document(p.name) and not p.is_dir())
        documents = sorted(found, key=str)
        if not documents:
            raise UserError(f"{path} holds no {' or '.join(SUFFIXES)} file.")
        return (_document(str(d.relative_to(path)), _content(d)) for d in documents)
    if not path.is_file():
        raise UserError(
            f"No reports at '{path}'; accepted are a .jsonl, a .csv, a .tgz or a folder of .xml "
            "or .txt files."
        )
    name = path.name.lower()
    if name.endswith((".tgz", ".tar.gz", ".tar")):
        return _some(path, _archive(path))
    if name.endswith(".jsonl"):
        return _some(path, _json_lines(path))
    if name.endswith(".csv"):
        return _some(path, _table(path))
    raise UserError(f"Cannot read reports from '{path.name}'; accepted are .jsonl, .csv and .tgz.")


def _some(path: Path, reports: Iterator[Report]) -> Iterator[Report]:
    """Yield the reports of a file, which must hold one at least."""
    is_empty = True
    for report in reports:
        yield report
        is_empty = False
    if is_empty:
        raise UserError(f"{path} holds no report; one a row or file is needed.")


def _is_document(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None


class _Entry(tarfile.TarInfo):
    """An entry of an archive, of which tarfile reads long names and attributes whole."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        entry = super().frombuf(buf, encoding, errors)
        if not entry.isfile() and entry.size > files.MAX_REPORT:
            raise tarfile.ReadError(f"a header of {entry.size:,} bytes")
        return entry


def _archive(path: Path) -> Iterator[Report]:
    try:
        with tarfile.open(path, tarinfo=_Entry) as archive:
            members = [m for m in archive if m.isfile() and _is_document(m.name)]
            for member in sorted(members, key=lambda m: m.name):
                if member.issparse() or member.size > files.MAX_REPORT:
                    raise UserError(
                        f"{member.name[:80]!a} in {path} is sparse or has more than "
                        f"{files.MAX_REPORT:,} bytes: no report."
                    )
                yield _document(member.name, archive.extractfile(member).read())
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}); a whole archive is needed.") from error


def _document(name: str, content: bytes) -> Report:
    if not _is_unicode(name):
        raise UserError(f"{name!a} is no file name in UTF-8, and a report's is its id: rename it.")
    stem = name[: -len(".txt")]  # .TXT and .xml are as long
    if name.lower().endswith(".xml"):
        return _openi(name, stem, content)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text ({error}); save it as UTF-8.") from None
    study = Path(stem).name
    if _MIMIC_STUDY.fullmatch(study):
        found = sections.of_study(text, study)
        return Report(stem, tidy(found.findings), tidy(found.impression))
    return Report(stem, *headings.split_sections(text))


def _openi(name: str, stem: str, content: bytes) -> Report:
    """Read an Open-i file: labelled abstract texts, MeSH "major" headings, parent images."""
    try:
        root = ElementTree.fromstring(content)
    except ElementTree.ParseError as error:
        raise UserError(f"{name} is not XML: {error}.") from None
    parts = {part.get("Label"): tidy(part.text or "") for part in root.iter("AbstractText")}
    uid = root.find("uId")
    return Report(
        uid.get("id") if uid is not None else stem,
        parts.get("FINDINGS", ""),
        parts.get("IMPRESSION", ""),
        tuple(heading.text or "" for heading in root.iterfind("MeSH/major")),
        tuple(image.get("id", "") for image in root.iterfind("parentImage")),
    )


def text_of(cell: str) -> str:
    """Return the text of a cell, "" for one of PLACEHOLDERS."""
    return "" if cell.strip().lower() in PLACEHOLDERS else cell


def _json_lines(path: Path) -> Iterator[Report]:
    with path.open(encoding="utf-8-sig") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _row(f"{path.name} line {number}", _parsed(path, number, line))
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text ({error}); save it as UTF-8.") from None


def _parsed(path: Path, number: int, line: str) -> Any:
    try:
        return parse_json(line)
    except ValueError:
        raise UserError(f"{path.name} line {number} is not JSON.") from None


def _table(path: Path) -> Iterator[Report]:
    for row in files.read_rows(path, columns=("id",)):
        yield _row(f"{path.name} row {row.number}", row.cells)


def _row(where: str, row: Any) -> Report:
    """Return the report of a JSON line or table row.

    Raises:
      UserError: naming `where`, for an id or text that is missing or no text.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where} is no object with 'id' and 'text'.")
    has = files.said([*row], ("id", "text", "findings", "impression"))
    if "id" not in row:
        raise UserError(f"{where} has no 'id', only {has}.")
    if row["id"] in (None, ""):
        raise UserError(f"{where}: 'id' is empty; every report needs its own.")
    if not isinstance(row["id"], str | int | float) or not _is_unicode(str(row["id"])):
        raise UserError(f"{where}: 'id' holds {_kind(row['id'])}; a text or a number is needed.")
    name = str(row["id"])
    if "text" in row:
        return Report(name, *headings.split_sections(_text(where, row, "text")))
    if "findings" in row or "impression" in row:
        return Report(name, *(tidy(_text(where, row, key)) for key in ("findings", "impression")))
    raise UserError(f"{where} has neither 'text' nor 'findings' and 'impression', only {has}.")


def _text(where: str, row: Mapping[str, Any], key: str) -> str:
    text = "" if row.get(key) is None else row[key]
    if not isinstance(text, str) or not _is_unicode(text):
        # Its kind alone: what a report says does not belong into a log.
        what = "half a character (a lone surrogate)" if isinstance(text, str) else _kind(text)
        raise UserError(f"{where}: '{key}' holds {what}; a text is needed.")
    return text_of(text)


def _kind(value: Any) -> str:
    return {list: "a list", dict: "an object", str: "half a character"}.get(type(value), "a number")


def _is_unicode(text: str) -> bool:
    """Say whether a text can be written; JSON may spell half a character, and no file holds one."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
