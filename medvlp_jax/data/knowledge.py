"""The knowledge corpus: what risk factors mean for diseases, one paragraph a record.

PRIMA (https://arxiv.org/abs/2602.23297), stage 1. `corpus.jsonl` of a folder written by
`medvlp evidence corpus` has a line

  {"id": "9f2c...", "factor": "age", "disease": "melanoma" or "ALL", "kind": "detail" or "summary",
   "source": "endpoint:NAME", "ids": ["PMID", ...], "text": "...", "vetted": false}

a record. Texts no physician has approved are refused unless they are asked for. Different sources
write about the same pairs, so the texts of one that is held out paraphrase those trained on.
"""

import dataclasses
import hashlib
import json
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from medvlp_jax.config import UserError, nearest
from medvlp_jax.reading import parse_json

NAME = "knowledge"  # as data.corpora names it
FILE = "corpus.jsonl"
ALL = "ALL"
KINDS = ("summary", "detail")
SPLITS = ("train", "validation", "test")


class Record(NamedTuple):
    """One paragraph and where it is from.

    Attributes:
      factor: key of the risk factor.
      disease: name, or ALL.
      kind: "summary" of a factor, or "detail" on a factor and a disease.
      source: who wrote it.
      ids: passages it was written from, or the risk table.
      text: the paragraph.
      vetted: whether a physician has approved or edited it.
    """

    factor: str
    disease: str
    kind: str
    source: str
    ids: tuple[str, ...]
    text: str
    vetted: bool = False

    @property
    def id(self) -> str:
        """Say which text was written about what, from what: changes with any of it."""
        parts = [*self._replace(vetted=False)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def read(path: Path) -> dict[str, Record]:
    """Return the records of a file by id.

    Raises:
      UserError: for a file that is missing, and for the first line that is no record.
    """
    if not path.is_file():
        raise UserError(
            f"{path} is missing; `medvlp evidence corpus --out {path.parent}` writes it."
        )
    found = {}
    with path.open(encoding="utf-8") as file:  # which str.splitlines would cut at others, too
        lines = [*file]
    for number, line in enumerate(lines, 1):
        where = f"{path} line {number}"
        try:
            row = parse_json(line)
        except ValueError:
            raise UserError(f"{where} is not JSON.") from None
        if not isinstance(row, dict) or set(row) != {"id", *Record._fields}:
            raise UserError(f"{where} must hold exactly id, {', '.join(Record._fields)}.")
        if row["kind"] not in KINDS:
            raise UserError(f"{where}: kind is {row['kind']!r}; accepted are {', '.join(KINDS)}.")
        if row["id"] in found:
            raise UserError(f"{where}: id '{row['id']}' is there twice.")
        name = row.pop("id")
        found[name] = Record(**{**row, "ids": tuple(row["ids"])})
    return found


def line(name: str, record: Record) -> str:
    """Return the line of a record in a file."""
    row = {"id": name, **record._asdict(), "ids": list(record.ids)}
    return json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n"


@dataclasses.dataclass(frozen=True)
class Texts:
    """Paragraphs as the records of a corpus: what reads sections reads them as findings.

    Attributes:
      split: "train", "validation" or "test".
      records: (id, record) in the order of the file.
      folder: they were read from.
    """

    split: str
    records: Sequence[tuple[str, Record]] = dataclasses.field(repr=False)
    folder: Path
    name: str = NAME
    tasks = images = types.MappingProxyType({})
    metadata = types.MappingProxyType({"tasks": {}, "table": {}, "images": {}, "generated": False})

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name, record = self.records[int(index)]
        pair = f"{record.factor}/{record.disease}"
        text = {"text_id": name, "findings": record.text, "impression": ""}
        return {"image_id": name, "patient_id": pair, "study_id": pair, **text}

    def texts(self) -> list[tuple[str, str]]:
        """Return (findings, impression) of every record in order."""
        return [(record.text, "") for _, record in self.records]


def open_texts(
    folder: str | Path, split: str, *, held_out: Sequence[str] = (), allow_unvetted: bool = False
) -> Texts:
    """Open one split of a corpus; validation and test are the texts of the sources held out.

    Args:
      folder: that `medvlp evidence corpus` wrote.
      split: "train", "validation" or "test".
      held_out: sources whose texts are not trained on; what another source wrote word for word is
        left out of them.
      allow_unvetted: whether texts may be used that no physician has approved.

    Raises:
      UserError: for a folder without records, texts that are not vetted, an unknown source, or a
        split without texts, but where no source is held out: validation and test are empty then.
    """
    if not folder:
        raise UserError(
            "data.knowledge.folder is empty: name a folder of `medvlp evidence corpus`."
        )
    folder = Path(folder).expanduser()
    records = read(folder / FILE)
    unvetted = sum(not record.vetted for record in records.values())
    if unvetted and not allow_unvetted:
        raise UserError(
            f"{unvetted} of {len(records)} texts in {folder} were not approved by a physician: "
            f"have {folder / 'review.csv'} filled in and run `medvlp evidence review --corpus "
            f"{folder}`, or set data.knowledge.allow_unvetted=True to use them all the same."
        )
    sources = sorted({record.source for record in records.values()})
    for source in held_out:
        if source not in sources:
            raise UserError(f"data.knowledge.held_out: no '{source}'. {nearest(source, sources)}")
    parts = {True: [], False: []}
    for name, record in records.items():
        parts[record.source in held_out].append((name, record))
    trained = {record.text for _, record in parts[False]}
    fresh = [entry for entry in parts[True] if entry[1].text not in trained]
    kept = parts[False] if split == "train" else fresh
    if split not in SPLITS or (not kept and (held_out or split == "train")):
        raise UserError(
            f"{folder} has no texts for split '{split}'; those of data.knowledge.held_out, now "
            f"{', '.join(held_out) or 'empty'}, are for validation and test, the others for train; "
            f"sources are {', '.join(sources)}."
        )
    return Texts(split, kept, folder)
