"""Evidence of many reports: each different text is asked about once, and no answer is lost.

A folder holds

    cache.jsonl      one line per different text, by its hash, appended as answers come
    evidence.jsonl   one line per report, in the order of the reports; written at the end, whole
    summary.json     counts, and the ids of reports that were odd or failed

so that an extraction that was interrupted, however often, ends with the same two files. Failures
are asked about again by the next start. No file but these holds report text.
"""

import collections
import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from medvlp_jax.config import UserError
from medvlp_jax.data.reports import Report
from medvlp_jax.evidence import rules, schema
from medvlp_jax.evidence.backends import dumps
from medvlp_jax.evidence.protocol import Backend, Request

FAILED, EMPTY, OK, NOTHING = "failed", "empty", "ok", "nothing recognised"
LISTED = 200  # ids a kind of oddity in the summary
OUTPUT_TOKENS = 300  # of an answer, for the estimate: five items of sixty tokens
CHARACTERS_PER_TOKEN = 4.0


class Plan(NamedTuple):
    """What an extraction would do."""

    reports: int
    texts: int
    empty: int
    cached: int
    to_do: int
    prompt_tokens: int
    answer_tokens: int

    def cost(self, price_in: float, price_out: float) -> float:
        """Return the price, from prices per million tokens."""
        return (self.prompt_tokens * price_in + self.answer_tokens * price_out) / 1e6


def write_rules(text: str) -> str:
    """Return what the rules find in a text, in the form language models are asked for."""
    if not schema.is_english(text.split()):
        return '{"evidence": []}'
    items = rules.extract(text)
    if all(item["certainty"] == "absent" for item in items) and (items or rules.is_normal(text)):
        items.append(schema.normal())
    return json.dumps({"evidence": items})


def text_key(text: str) -> str:
    """Return the name of a text in the cache."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def plan(reports: Iterable[Report], backend: Backend, out: str | Path) -> Plan:
    """Count what `run` would do, and write nothing."""
    cached = _Cache.read(Path(out), backend.name)[0]
    total = empty = 0
    prompts: dict[str, int] = {}
    for report in reports:
        total += 1
        if schema.notes(report.text) == ("empty",):
            empty += 1
        else:
            prompts[text_key(report.text)] = len(schema.prompt(report.text))
    missing = [key for key in prompts if key not in cached]
    characters = sum(prompts[key] for key in missing)
    tokens = (int(characters / CHARACTERS_PER_TOKEN), OUTPUT_TOKENS * len(missing))
    tokens = tokens if backend.counts_tokens else (0, 0)
    done = len(prompts) - len(missing)
    return Plan(total, len(prompts), empty, done, len(missing), *tokens)


def run(reports: Iterable[Report], backend: Backend, out: str | Path) -> dict:
    """Extract the evidence of all reports into a folder, or go on where an earlier start stopped.

    Args:
      reports: read once; their texts are kept until they are answered.
      backend: who answers.
      out: the folder; made if it does not exist.

    Returns:
      The summary.

    Raises:
      UserError: where another process writes there, two reports have one id, or the backend gave
        up; what it answered is kept.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with _Cache(out, backend.name) as cache:
        order, texts = _survey(reports, cache.records)
        _answer(texts, backend, cache)
        summary = _write(out, order, cache.records)
    return summary


def _survey(reports: Iterable[Report], cached: Mapping) -> tuple[list, dict[str, str]]:
    """Return [(id, key, notes)] of the reports, and the texts that have no record yet by key."""
    order, texts, ids = [], {}, set()
    for report in reports:
        if report.id in ids:
            raise UserError(f"Two reports have the id '{report.id}'; each needs its own.")
        ids.add(report.id)
        text = report.text
        key, odd = text_key(text), schema.notes(text)
        order.append((report.id, key, odd))
        if odd != ("empty",) and key not in cached:
            texts[key] = text
    return order, texts


def _answer(texts: dict[str, str], backend: Backend, cache: "_Cache") -> None:
    """Ask about all texts; a record is on the disk before the next answer is taken."""
    requests = (Request(key, schema.prompt(text), text) for key, text in texts.items())
    # On a file (a cluster log) a bar that redraws ten times a second is noise.
    interval = 0.1 if sys.stderr.isatty() else 30.0
    failures = 0
    with tqdm(total=len(texts), unit="report", mininterval=interval, dynamic_ncols=True) as bar:
        for reply in backend.complete(requests, schema.load):
            if reply.error:
                failures += 1
                bar.set_postfix(failed=failures, refresh=False)
                cache.fail(reply.key, reply.error)
            else:
                cache.add(reply.key, schema.parse(reply.answer, texts[reply.key]))
            bar.update(1)


class _Cache:
    """The open, locked cache file and its records by key; failures are kept in memory only."""

    def __init__(self, folder: Path, backend: str):
        self.path, self.header = folder / "cache.jsonl", _header(backend)
        self.file = self.path.open("a+b")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            raise UserError(f"Another process is writing to {folder}; wait for it.") from None
        self.records, end = self.read(folder, backend)
        self.file.truncate(end)  # a line that a kill cut in two
        if not end:
            self._append(self.header)

    @staticmethod
    def read(folder: Path, backend: str) -> tuple[dict[str, dict], int]:
        """Return the records of a folder, and where its last whole line ends.

        Raises:
          UserError: if they are the answers of another backend or prompt.
        """
        path = folder / "cache.jsonl"
        if not path.exists():
            return {}, 0
        records, end = {}, 0
        with path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    record = json.loads(line)
                except ValueError:
                    break
                if end == 0:
                    _check_header(record, _header(backend), path)
                else:
                    records[record.pop("key")] = record
                end += len(line)
        return records, end

    def add(self, key: str, parsed: schema.Parsed) -> None:
        record = {"status": OK if parsed.evidence else NOTHING}
        record |= {"evidence": list(parsed.evidence), "dropped": parsed.dropped}
        self.records[key] = record
        self._append({"key": key, **record})

    def fail(self, key: str, error: str) -> None:
        self.records[key] = {"status": FAILED, "error": error, "evidence": [], "dropped": {}}

    def _append(self, record: dict) -> None:
        self.file.write(dumps(record).encode() + b"\n")
        self.file.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def _header(backend: str) -> dict:
    return {"backend": backend, "prompt": schema.PROMPT_VERSION}


def _check_header(found: dict, wanted: dict, path: Path) -> None:
    if found != wanted:
        raise UserError(
            f"{path} holds answers of {found.get('backend')} to prompt {found.get('prompt')}, not "
            f"of {wanted['backend']} to prompt {wanted['prompt']}: choose another --out."
        )


def _write(out: Path, order: list, records: Mapping[str, dict]) -> dict:
    """Write evidence.jsonl and summary.json; return the summary."""
    counts, dropped, listed = collections.Counter(), collections.Counter(), {}
    items = collections.Counter()

    def lines() -> Iterator[str]:
        for name, key, odd in order:
            record = records[key] if odd != ("empty",) else {"status": EMPTY, "evidence": []}
            counts[record["status"]] += 1
            dropped.update(record.get("dropped", {}))
            items.update(item["certainty"] for item in record["evidence"])
            kinds = {*odd, *([] if record["status"] == OK else [record["status"]])}
            for kind in sorted(kinds):
                listed.setdefault(kind, []).append(name)
            row = {"id": name, "key": key, "status": record["status"], "notes": list(odd)}
            row |= {"error": record["error"]} if "error" in record else {}
            yield dumps({**row, "evidence": record["evidence"]}) + "\n"

    _replace(out / "evidence.jsonl", lines())
    summary = {
        "reports": len(order),
        "status": dict(sorted(counts.items())),
        "items": dict(sorted(items.items())),
        "dropped": dict(sorted(dropped.items())),
        "odd": {kind: {"count": len(n), "ids": n[:LISTED]} for kind, n in sorted(listed.items())},
    }
    _replace(out / "summary.json", [json.dumps(summary, indent=2, sort_keys=True) + "\n"])
    return summary


def _replace(path: Path, lines: Iterable[str]) -> None:
    """Write a file under another name first, so that it is there whole or not at all."""
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
