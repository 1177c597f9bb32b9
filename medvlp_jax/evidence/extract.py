"""Evidence of many reports: each different text is asked about once, and no answer is lost.

A folder holds

    cache.jsonl      one line per different text, by its hash, appended as answers come, whole
    evidence.jsonl   one line per report, in the order of the reports; written at the end, whole
    summary.json     counts, and the ids of reports that were odd or failed

so that an extraction that was interrupted, however often, ends with the same two files. Failures
are asked about again by the next start, and answers read anew. No file but these holds report text.
"""

import collections
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from medvlp_jax.config import UserError
from medvlp_jax.data.reports import Report
from medvlp_jax.evidence import answers, lexicon, rules, schema, terms
from medvlp_jax.evidence.protocol import Backend, Request

EMPTY, OK, NOTHING = "empty", "ok", "nothing recognised"
CACHE = "cache.jsonl"
LOST = "items dropped"  # reports of which an answer's items do not all stand
LISTED = 200  # ids a kind of oddity in the summary
OUTPUT_TOKENS = 300  # of an answer, for the estimate: five items of sixty tokens


class Plan(NamedTuple):
    """What an extraction would do."""

    reports: int
    texts: int
    empty: int
    cached: int
    to_do: int
    tokens: answers.Estimate


def write_rules(text: str) -> str:
    """Return what the rules find in a text, in the form language models are asked for."""
    if not schema.is_english(text.split()):
        return '{"evidence": []}'
    items = rules.extract(text)
    says_so = _only_denies(items) or (not items and rules.is_normal(text))
    if says_so and not rules.others(text):
        items.append(schema.normal())
    return json.dumps({"evidence": items})


def _only_denies(items: Sequence[Mapping]) -> bool:
    return bool(items) and all(item["certainty"] == "absent" for item in items)


def text_key(text: str) -> str:
    """Return the name of a text in the cache."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def plan(reports: Iterable[Report], backend: Backend, out: str | Path) -> Plan:
    """Count what `run` would do, and write nothing."""
    cached = answers.read_cache(Path(out) / CACHE, _header(backend))
    total = empty = 0
    prompts: dict[str, int] = {}
    for report in reports:
        total += 1
        if schema.notes(report.text) == ("empty",):
            empty += 1
        else:
            prompts[text_key(report.text)] = len(schema.prompt(report.text))
    missing = [key for key in prompts if key not in cached]
    lengths = (prompts[key] for key in missing)
    tokens = answers.estimate(lengths, backend, answer_tokens=OUTPUT_TOKENS)
    return Plan(total, len(prompts), empty, len(prompts) - len(missing), len(missing), tokens)


def run(reports: Iterable[Report], backend: Backend, out: str | Path) -> dict:
    """Extract the evidence of all reports into a folder, or go on where an earlier start stopped.

    Args:
      reports: read once; their texts are kept until the end.
      backend: who answers.
      out: the folder; made if it does not exist.

    Returns:
      The summary.

    Raises:
      UserError: where another process writes there, two reports have one id, or the backend gave
        up; what it answered is kept.
    """
    out = Path(out)
    order, texts = _survey(reports)
    out.mkdir(parents=True, exist_ok=True)
    read = lambda key, answer: _record(answer, texts[key])
    with answers.Cache(out / CACHE, _header(backend)) as cache:
        cache.reread(texts, read)
        missing = {key: text for key, text in texts.items() if key not in cache.records}
        answers.ask(
            (Request(key, schema.prompt(text), text) for key, text in missing.items()),
            backend,
            cache,
            check=schema.load,
            read=read,
            total=len(missing),
            unit="report",
        )
        summary = _write(out, order, cache.records)
    return summary


def _survey(reports: Iterable[Report]) -> tuple[list, dict[str, str]]:
    """Return [(id, key, notes)] of the reports, and the different texts by key.

    Raises:
      UserError: where two reports have one id.
    """
    order, texts, ids = [], {}, set()
    for report in reports:
        if report.id in ids:
            raise UserError(f"Two reports have the id '{report.id}'; each needs its own.")
        ids.add(report.id)
        text = report.text
        key, odd = text_key(text), schema.notes(text)
        order.append((report.id, key, odd))
        if odd != ("empty",):
            texts[key] = text
    return order, texts


def _record(answer: str, text: str) -> dict:
    parsed = schema.parse(answer, text)
    if not parsed.evidence and set(parsed.dropped) - {schema.CUT_OFF} == {"invalid"}:
        raise schema.Malformed("none of its items has the fields asked for.")
    found = list(parsed.evidence)
    if _only_denies(found) and not _lost(parsed.dropped):
        found.append(schema.normal())  # a model may list denials alone, and say nothing else
    return {"status": OK if found else NOTHING, "evidence": found, "dropped": parsed.dropped}


def _lost(dropped: Mapping[str, int]) -> bool:
    """Say whether an answer named more than was kept of it."""
    return bool(set(dropped) - {"repeated"})


def _header(backend: Backend) -> dict:
    header = answers.header_of(backend, schema.PROMPT_VERSION)
    return header if backend.counts_tokens else {**header, "version": _rules_version()}


def _rules_version() -> str:
    """Return what changes with the rules or their words."""
    sources = (Path(module.__file__).read_bytes() for module in (rules, terms, lexicon))
    return hashlib.sha256(b"".join(sources)).hexdigest()[:8]


def _write(out: Path, order: list, records: Mapping[str, dict]) -> dict:
    """Write evidence.jsonl and summary.json; return the summary."""
    counts, dropped, listed = collections.Counter(), collections.Counter(), {}
    items, errors = collections.Counter(), collections.Counter()

    def lines() -> Iterator[str]:
        for name, key, odd in order:
            record = records[key] if odd != ("empty",) else {"status": EMPTY}
            found = record.get("evidence", [])
            counts[record["status"]] += 1
            dropped.update(record.get("dropped", {}))
            items.update(item["certainty"] for item in found)
            kinds = {*odd, *([] if record["status"] == OK else [record["status"]])}
            kinds |= {LOST} if _lost(record.get("dropped", {})) else set()
            for kind in sorted(kinds):
                listed.setdefault(kind, []).append(name)
            row = {"id": name, "key": key, "status": record["status"], "notes": list(odd)}
            row |= {"error": record["error"]} if "error" in record else {}
            errors.update([record["error"]] if "error" in record else [])
            yield answers.dumps({**row, "evidence": found}) + "\n"

    answers.replace(out / "evidence.jsonl", lines())
    summary = {
        "reports": len(order),
        "status": dict(sorted(counts.items())),
        "items": dict(sorted(items.items())),
        "dropped": dict(sorted(dropped.items())),
        "errors": dict(errors.most_common(LISTED)),
        "odd": {kind: {"count": len(n), "ids": n[:LISTED]} for kind, n in sorted(listed.items())},
    }
    answers.replace(out / "summary.json", [json.dumps(summary, indent=2, sort_keys=True) + "\n"])
    return summary
