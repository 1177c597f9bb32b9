"""Reports as text: sections, and the layouts they are stored in.

A report is read from its headings (FINDINGS:, IMPRESSION: ...), from Open-i XML, from JSON lines,
from a CSV table, or from a folder of plain texts (MIMIC-CXR: one file a study, s50414267.txt, of
which the sections are read as its builder reads them).
"""

import csv
import json
import re
import tarfile
import xml.etree.ElementTree as ElementTree
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from medvlp_jax.config import UserError
from medvlp_jax.data import sections

# Headings of American chest reports and the section each opens; what an image cannot show is
# "other".
HEADINGS = {
    "findings": "findings|finding|report|observations",
    "impression": "impression|impressions|conclusion|conclusions|assessment|summary|opinion",
    "other": (
        "indication|history|clinical history|clinical information|clinical indication|"
        "reason for exam|reason for examination|technique|comparison|comparisons|procedure|"
        "examination|exam|recommendation|recommendations|notification|wet read|study|views|"
        "addendum"
    ),
}
_SECTION = {word: name for name, words in HEADINGS.items() for word in words.split("|")}
_HEADING = re.compile(
    rf"(?:^|\n|(?<=[.:]))[ \t]*({'|'.join(sorted(_SECTION, key=len, reverse=True))})[ \t]*:",
    re.IGNORECASE,
)
_MIMIC_STUDY = re.compile(r"s\d{8}")
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


def split_sections(text: str) -> tuple[str, str]:
    """Return (findings, impression) of a whole report.

    Text before the first heading counts as findings only where the report has no heading at all:
    otherwise it is a title, names or dates. History, technique, comparison and recommendations
    are left out.
    """
    marks = list(_HEADING.finditer(text))
    if not marks:
        return _tidy(text), ""
    parts = {"findings": [], "impression": [], "other": []}
    for mark, following in zip(marks, [*marks[1:], None], strict=True):
        body = text[mark.end() : following.start() if following else len(text)]
        parts[_SECTION[mark.group(1).lower()]].append(_tidy(body))
    return tuple(" ".join(filter(None, parts[name])) for name in ("findings", "impression"))


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
        files = sorted((p for p in path.rglob("*") if p.suffix in SUFFIXES), key=str)
        if not files:
            raise UserError(f"{path} holds no {' or '.join(SUFFIXES)} file.")
        return (_document(str(f.relative_to(path)), f.read_bytes()) for f in files)
    if not path.is_file():
        raise UserError(
            f"No reports at '{path}'; accepted are a .jsonl, a .csv, a .tgz or a folder of .xml "
            "or .txt files."
        )
    if path.name.endswith((".tgz", ".tar.gz", ".tar")):
        return _archive(path)
    if path.suffix == ".jsonl":
        return _rows(path, _json_lines(path))
    if path.suffix == ".csv":
        return _rows(path, _table(path))
    raise UserError(f"Cannot read reports from '{path.name}'; accepted are .jsonl, .csv and .tgz.")


def _archive(path: Path) -> Iterator[Report]:
    try:
        with tarfile.open(path) as archive:
            members = [m for m in archive if m.isfile() and m.name.endswith(SUFFIXES)]
            for member in sorted(members, key=lambda m: m.name):
                yield _document(member.name, archive.extractfile(member).read())
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}); a whole archive is needed.") from error


def _document(name: str, content: bytes) -> Report:
    if name.endswith(".xml"):
        return _openi(name, content)
    stem, text = name.removesuffix(".txt"), content.decode("utf-8", errors="replace")
    study = Path(stem).name
    if _MIMIC_STUDY.fullmatch(study):
        found = sections.of_study(text, study)
        return Report(stem, _tidy(found.findings), _tidy(found.impression))
    return Report(stem, *split_sections(text))


def _openi(name: str, content: bytes) -> Report:
    """Read an Open-i file: labelled abstract texts, MeSH "major" headings, parent images."""
    try:
        root = ElementTree.fromstring(content)
    except ElementTree.ParseError as error:
        raise UserError(f"{name} is not XML: {error}.") from None
    parts = {part.get("Label"): _tidy(part.text or "") for part in root.iter("AbstractText")}
    uid = root.find("uId")
    return Report(
        uid.get("id") if uid is not None else name.removesuffix(".xml"),
        parts.get("FINDINGS", ""),
        parts.get("IMPRESSION", ""),
        tuple(heading.text or "" for heading in root.iterfind("MeSH/major")),
        tuple(image.get("id", "") for image in root.iterfind("parentImage")),
    )


def _json_lines(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(_decoded(path, lines), 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError:
                    raise UserError(f"{path.name} line {number} is not JSON.") from None


def _table(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(_decoded(path, file))


def _decoded(path: Path, lines: Iterable[str]) -> Iterator[str]:
    """Yield the lines of a file, which must be UTF-8; spreadsheets write other encodings."""
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); save it as UTF-8.") from None


def _rows(path: Path, rows: Iterator[dict]) -> Iterator[Report]:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not row.get("id"):
            raise UserError(f"{path.name} row {number} has no 'id'.")
        if "text" in row:
            yield Report(str(row["id"]), *split_sections(row["text"] or ""))
        elif "findings" in row or "impression" in row:
            texts = (_tidy(row.get(name) or "") for name in ("findings", "impression"))
            yield Report(str(row["id"]), *texts)
        else:
            raise UserError(
                f"{path.name} row {number} has neither 'text' nor 'findings' and 'impression', "
                f"only {', '.join(map(str, row))}."
            )


def _tidy(text: str) -> str:
    """Join lines and runs of white space."""
    return " ".join(text.split())
