"""A source folder looked through in minutes: tables, counts, hashes, missing and cut off files.

The tables are read as a preparation reads them, and every image is opened at its head and its end
by several threads; decoding all of them takes hours for the large corpora and is asked for
separately. All defects of images are collected, not only the first.
"""

import collections
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tqdm

from medvlp_jax.config import UserError
from medvlp_jax.data import building, dicom, images, layouts, splits

TABLES = (".csv", ".gz", ".txt", ".json")
SUMS = "SHA256SUMS.txt"
CHUNK = 256


class Problem(NamedTuple):
    """One image that cannot be used, and the row that names it."""

    image_id: str
    row: str
    what: str


class Findings(NamedTuple):
    """What a source folder holds.

    Attributes:
      tables: SHA-256 by file, and whether the source's own list says the same (None: no list).
      splits: counts by split; `hash` names the set of image ids, see `layouts.id_hash`.
      left_out: rows that are not in this variant, by reason.
      noted: rows that are in it and lack something.
      published: the numbers the source states.
      torn: patients in more than one split.
      problems: images that cannot be used.
    """

    tables: dict[str, tuple[str, bool | None]]
    splits: dict[str, dict[str, Any]]
    left_out: dict[str, int]
    noted: dict[str, int]
    published: dict[str, int]
    torn: int
    problems: list[Problem]

    def lines(self) -> Iterator[str]:
        """Yield the findings as text, the problems last, at most 20 of them."""
        for name, (digest, listed) in self.tables.items():
            said = {True: ", as listed", False: f", NOT as {SUMS} lists it", None: ""}[listed]
            yield f"{name}: sha256 {digest[:16]}{said}"
        for split, counts in self.splits.items():
            yield f"{split}: " + ", ".join(
                f"{name} {count}" if isinstance(count, str) else f"{count:,} {name}"
                for name, count in counts.items()
            )
        for reason, count in self.left_out.items():
            yield f"left out: {count:,} rows: {reason}"
        yield from building.kept_lines(self.noted)
        if self.published:
            yield "published: " + ", ".join(f"{n:,} {what}" for what, n in self.published.items())
        if self.torn:
            yield building.torn_line(self.torn)
        for problem in self.problems[:20]:
            yield f"{problem.row}: image {problem.image_id} is {problem.what}"
        if len(self.problems) > 20:
            yield f"... and {len(self.problems) - 20:,} more"


def inspect(corpus: building.Builder, folder: Path, *, decode: bool = False) -> Findings:
    """Look through a source folder; nothing is written.

    Args:
      corpus: the builder, its variant says which rows count.
      folder: the source folder.
      decode: decode every image and fill every region, as a preparation does.

    Raises:
      UserError: for the first defect of a table.
    """
    samples = corpus.kept(folder)
    found = collections.defaultdict(list)
    for sample in samples:
        found[sample.split].append(sample)
    return Findings(
        tables={name: _digest(folder, name) for name in _tables(folder)},
        splits={
            split: _count(corpus, found[split]) | _verdict(corpus, split, found[split])
            for split in building.SPLITS
            if found[split]
        },
        left_out=dict(corpus.info.metadata["left_out"]),
        noted=dict(corpus.info.metadata["noted"]),
        published=dict(corpus.PUBLISHED),
        torn=corpus.info.metadata["torn_patients"],
        problems=list(_problems(corpus, samples, decode)),
    )


def _problems(
    corpus: building.Builder, samples: Sequence[building.Sample], decode: bool
) -> Iterator[Problem]:
    size = 1 if decode else CHUNK
    chunks = [samples[k : k + size] for k in range(0, len(samples), size)]
    look = (lambda sample: _decoded(corpus, sample)) if decode else _looked_at
    # The bar shows on a terminal only.
    with tqdm.tqdm(total=len(samples), unit=" images", disable=None, smoothing=0) as bar:
        for problems in building.in_order(lambda chunk: list(map(look, chunk)), chunks):
            bar.update(len(problems))
            yield from filter(None, problems)


def _looked_at(sample: building.Sample) -> Problem | None:
    for path in filter(None, (sample.path, *sample.images.values())):
        what = images.looks_whole(path)
        if not what and path.suffix.lower() in dicom.SUFFIXES:
            what = dicom.looks_whole(path)
        if what:
            return Problem(sample.image_id, _row(sample), f"{what} ({path})")
    return None


def _decoded(corpus: building.Builder, sample: building.Sample) -> Problem | None:
    try:
        corpus.to_record(sample)
    except UserError as error:
        return Problem(sample.image_id, _row(sample), f"unusable: {error}")
    return None


def _row(sample: building.Sample) -> str:
    return f"{sample.row.path.name} row {sample.row.number}"


def _count(corpus: building.Builder, samples: Sequence[building.Sample]) -> dict[str, Any]:
    texts = [s.sections() if callable(s.sections) else s.sections for s in samples]
    counts = {
        "images": sum(s.path is not None for s in samples),
        "studies": len({s.study_id for s in samples}),
        "patients": len({s.patient_id for s in samples}),
        "findings": sum(bool(findings) for findings, _ in texts),
        "impressions": sum(bool(impression) for _, impression in texts),
        "boxes": sum(len(s.boxes) for s in samples),
    }
    return {name: count for name, count in counts.items() if count or name in corpus.texts()}


def _verdict(
    corpus: building.Builder, split: str, samples: Sequence[building.Sample]
) -> dict[str, str]:
    """Return the hash of a split's ids, and whether it is the published one where that is known."""
    protocol = f"{corpus.name}:{corpus.variant}"
    (verdict,) = splits.compare(protocol, {split: [s.image_id for s in samples]})
    if verdict.published is None:
        return {"hash": verdict.hash}
    what = f"{verdict.published.size:,} images" + (verdict.published.hash and " with this hash")
    said = "as published" if verdict.agrees else f"NOT the published {verdict.published.size:,}"
    said = f"{said} ({what})" if verdict.agrees else f"{said} {verdict.published.hash}".strip()
    return {"hash": f"{verdict.hash}, {said}"}


def _tables(folder: Path) -> list[str]:
    """Return the tables of a source folder, at most two folders deep, images left out."""
    found = itertools.chain(folder.glob("*"), folder.glob("*/*"))
    tables = (path for path in found if path.suffix in TABLES and path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in tables if path.name != SUMS)


def _digest(folder: Path, name: str) -> tuple[str, bool | None]:
    path = folder / name
    digest = layouts.sha256(path)
    listed = _listed(path.parent).get(path.name)
    return digest, None if listed is None else listed == digest


def _listed(folder: Path) -> dict[str, str]:
    """Return the hashes in PhysioNet's list of a folder: "<sha256>  <path>" lines."""
    path = folder / SUMS
    if not path.is_file():
        return {}
    found = {}
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            digest, _, name = line.strip().partition(" ")
            if "/" not in name:  # tables lie beside the list; the images' lines are many
                found[name.strip(" *")] = digest
    return found


def as_json(findings: Findings) -> str:
    """Return the findings as JSON, with all problems."""
    entry = findings._asdict() | {"problems": [p._asdict() for p in findings.problems]}
    return json.dumps(entry, indent=1)
