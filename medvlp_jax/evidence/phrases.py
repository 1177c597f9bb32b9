"""The phrases of a report that LGDEA encodes: from an extraction, or read by rules on the way."""

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from medvlp_jax.config import UserError
from medvlp_jax.data.reports import Report
from medvlp_jax.evidence import extract

SHOWN = ("present", "uncertain")  # a lesion query cannot find what is absent


def shown(items: Iterable[Mapping]) -> tuple[str, ...]:
    """Return the different phrases of what may be seen on the image, in order."""
    return tuple(dict.fromkeys(i["phrase"] for i in items if i["certainty"] in SHOWN))


def reader(folder: str = "") -> Callable[[Mapping], tuple[str, ...]]:
    """Return the function from a record to its phrases.

    Args:
      folder: of `medvlp evidence extract`; "" reads each report by rules, a thousandth of what its
        image takes.

    Raises:
      UserError: where the folder holds no extraction; when called, for a report it does not hold.
    """
    if not folder:
        by_rules = functools.lru_cache(maxsize=1 << 16)(
            lambda text: shown(json.loads(extract.write_rules(text))["evidence"])
        )
        return lambda record: by_rules(_text(record))
    file = Path(folder).expanduser() / "evidence.jsonl"
    if not file.is_file():
        raise UserError(f"data.evidence.folder={folder} has no evidence.jsonl.")
    with file.open(encoding="utf-8") as lines:
        rows = map(json.loads, lines)
        known = {row["key"]: shown(row["evidence"]) for row in rows}

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


def _text(record: Mapping) -> str:
    return Report("", record["findings"], record["impression"]).text
