"""The phrases of a report that LGDEA encodes: from an extraction, or read by rules on the way."""

import functools
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from medvlp_jax.config import UserError
from medvlp_jax.data.reports import Report
from medvlp_jax.evidence import answers, extract

SHOWN = ("present", "uncertain")  # a lesion query cannot find what is absent
UNITS = ("phrase", "sentence")
_DENIES = re.compile(r"(no|not|without|absence|absent|free)\b", re.IGNORECASE)
_SENTENCE = re.compile(r"(?<=[.;?!])\s+|\n")


def shown(items: Iterable[Mapping], *, negated: bool = False) -> tuple[str, ...]:
    """Return the different phrases of what may be seen on the image, in order.

    Args:
      items: of an extraction.
      negated: say what is absent, too, as "no pneumothorax": a phrase itself is of the finding.
    """
    said = (
        _denied(item["phrase"]) if item["certainty"] == "absent" else item["phrase"]
        for item in items
        if negated or item["certainty"] in SHOWN
    )
    return tuple(dict.fromkeys(said))


def _denied(phrase: str) -> str:
    return phrase if _DENIES.match(phrase) else f"no {phrase[:1].lower()}{phrase[1:]}"


def sentences(text: str) -> tuple[str, ...]:
    """Return the different sentences of a report in order: evidence without any extraction."""
    return tuple(dict.fromkeys(part.strip() for part in _SENTENCE.split(text) if part.strip()))


def reader(
    folder: str = "", *, unit: str = "phrase", negated: bool = False
) -> Callable[[Mapping], tuple[str, ...]]:
    """Return the function from a record to its phrases.

    Args:
      folder: of `medvlp evidence extract`; "" reads each report by rules, a thousandth of what its
        image takes.
      unit: "phrase", or "sentence": the report's sentences as they are, an ablation.
      negated: take what is absent, too; an ablation.

    Raises:
      UserError: where the folder holds no extraction, or for settings that do not go together; when
        called, for a report it does not hold.
    """
    if unit not in UNITS:
        raise UserError(f"data.evidence.unit must be {' or '.join(UNITS)}, got '{unit}'.")
    if unit == "sentence":
        if folder or negated:
            raise UserError(
                "data.evidence.unit=sentence takes whole reports: it goes neither with "
                "data.evidence.folder nor with data.evidence.negated."
            )
        return lambda record: sentences(_text(record))
    if not folder:
        by_rules = functools.lru_cache(maxsize=1 << 16)(
            lambda text: shown(json.loads(extract.write_rules(text))["evidence"], negated=negated)
        )
        return lambda record: by_rules(_text(record))
    file, rows = _extraction(folder)
    known = {row["key"]: shown(row["evidence"], negated=negated) for row in rows}
    _say_failed(file, sum(row["status"] == answers.FAILED for row in rows), len(rows))

    def phrases(record):
        text = _text(record)
        key = extract.text_key(text)
        if text and key not in known:
            raise UserError(
                f"A report of {len(text)} characters (key {key}) is not in {file}: extract the "
                "evidence of this corpus and split first."
            )
        return known.get(key, ())

    return phrases


def check(folder: str, corpus: str, texts: Iterable[tuple[str, str]]) -> None:
    """Refuse a corpus of which an extraction lacks reports, before a run stops in its middle.

    Args:
      folder: of `medvlp evidence extract`.
      corpus: its name, for the error.
      texts: (findings, impression) of every record.

    Raises:
      UserError: with how many reports are not there.
    """
    file, rows = _extraction(folder)
    known = {row["key"] for row in rows}
    reports = list(filter(None, (Report("", *pair).text for pair in texts)))
    lacking = sum(extract.text_key(text) not in known for text in reports)
    if lacking:
        raise UserError(
            f"{lacking:,} of {len(reports):,} reports of {corpus} are not in {file}: run `medvlp "
            f"evidence extract --reports PATH --out {folder}`, PATH with all reports of the corpus "
            "as it was prepared."
        )


def _extraction(folder: str) -> tuple[Path, list[dict]]:
    """Return the file of an extraction and what it holds."""
    file = Path(folder).expanduser() / "evidence.jsonl"
    if not file.is_file():
        raise UserError(f"data.evidence.folder={folder} has no evidence.jsonl.")
    return file, _rows(file, file.stat().st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _rows(file: Path, changed: int) -> list[dict]:
    """Read it once for every pass over a corpus, and again if it has changed."""
    del changed
    with file.open(encoding="utf-8") as lines:
        return list(map(json.loads, lines))


@functools.cache
def _say_failed(file: Path, failed: int, total: int) -> None:
    """Say, once, how many reports count as saying nothing because nobody answered."""
    if failed:
        print(
            f"medvlp: {file}: {failed:,} of {total:,} reports were never answered and count as "
            "without a phrase; the same `medvlp evidence extract` asks about them again.",
            file=sys.stderr,
            flush=True,
        )


def in_prompt(text: str, read: Callable[[Mapping], tuple[str, ...]]) -> tuple[str, ...]:
    """Return the phrases that a function from `reader` finds in a prompt."""
    return read({"findings": text, "impression": ""})


def _text(record: Mapping) -> str:
    return Report("", record["findings"], record["impression"]).text
