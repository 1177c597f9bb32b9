"""What risk factors mean for diseases, written from literature: PRIMA's stage 1a.

PRIMA (https://arxiv.org/abs/2602.23297) publishes what it asks for (a summary of each risk factor
and detailed paragraphs, literature before the instruction, checked by physicians), not the prompt,
the retriever or the merging: those are our choice. One request is one paragraph, on a factor and a
disease or on a factor and all of them, so that a paragraph traces to the very passages its prompt
held. Several writers may write into one folder; their texts stay apart.

A folder holds

    answers-*.jsonl  one file a writer, one line an answer, appended as answers come
    passages.jsonl   every passage a text was written from, in the words it had then
    written.jsonl    every text, as written
    verdicts.jsonl   what physicians said, see `review`
    corpus.jsonl     the texts that stand: as written, approved or edited; what training reads
    review.csv       the texts without a verdict, for physicians
    summary.json     counts, the pairs without a text, and those whose text is an earlier start's
"""

import collections
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from medvlp_jax.config import UserError
from medvlp_jax.data import knowledge
from medvlp_jax.data.knowledge import ALL, Record
from medvlp_jax.evidence import answers, retrieval, review
from medvlp_jax.evidence.protocol import Backend, Request
from medvlp_jax.evidence.risk import Risk

PROMPT_VERSION = 1  # change it with any word of PROMPT or TASKS: answers are cached by it
PROMPT = """\
Literature:

{literature}

You are a medical researcher specialised in {field}. From the literature I provided above, {task}
Say in which direction and how strongly the risk changes, for whom this holds, and where the
literature is uncertain or silent. Invent nothing, and name no authors, studies or identifiers.
Answer with JSON only, in this form:
{{"factor": "{factor}", "disease": "{disease}", "text": "..."}}
"""
TASKS = {
    "summary": (
        "write one paragraph of 80 to 200 words that sums up how the risk factor '{name}' relates "
        "to each of these diagnoses: {diseases}."
    ),
    "detail": (
        "write one paragraph of 80 to 200 words on how the risk factor '{name}' relates to "
        "{disease}."
    ),
}
PASSAGES = 5  # a pair; our choice
WORDS = (15, 400)  # of a text that counts as one
OUTPUT_TOKENS = 300  # of an answer, for the estimate
KEPT_PASSAGES = "passages.jsonl"


class Malformed(ValueError):
    """An answer without the paragraph that was asked for."""


class Task(NamedTuple):
    """One paragraph to be written."""

    factor: str
    disease: str
    kind: str
    source: str
    ids: tuple[str, ...]
    request: Request

    def record(self, text: str) -> Record:
        """Return the record with this text."""
        return Record(self.factor, self.disease, self.kind, self.source, self.ids, text)


class Plan(NamedTuple):
    """What a start would do."""

    tasks: int
    cached: int
    to_do: int
    without_passages: int
    tokens: answers.Estimate


def from_articles(
    risk: Risk,
    passages: Sequence[retrieval.Passage],
    search: retrieval.Search,
    *,
    writer: str,
    count: int = PASSAGES,
) -> tuple[list[Task], list[str]]:
    """Return a task for every pair that passages speak of, and the pairs none does.

    A passage speaks of a pair if it names both, see `retrieval.naming`; a summary needs any of the
    diseases. Other names of the table count as well, but what the query's words do not find comes
    after what they do.

    Args:
      risk: factors and diseases.
      passages: of the articles.
      search: over them.
      writer: name of the backend.
      count: passages a task.
    """
    tasks, silent, naming = [], [], retrieval.naming(passages)
    for factor, disease, kind in _pairs(risk):
        name = risk.factors[factor].name
        about = risk.diseases if disease == ALL else (disease,)
        both = naming(risk.names(name)) & naming(other for d in about for other in risk.names(d))
        ranked = search(" ".join([name, *about]), len(passages))
        rows = [row for row in dict.fromkeys([*ranked, *sorted(both)]) if row in both]
        found = [passages[row] for row in rows[:count]]
        if not found:
            silent.append(f"{factor}/{disease}")
            continue
        words = {"name": name, "disease": disease, "diseases": ", ".join(risk.diseases)}
        prompt = PROMPT.format(
            literature="\n\n".join(f"[{p.id}] {p.title}\n{p.text}".strip() for p in found),
            field=risk.field,
            task=TASKS[kind].format(**words),
            factor=factor,
            disease=disease,
        )
        ids = tuple(p.id for p in found)
        request = Request(_key(prompt), prompt, "")
        tasks.append(Task(factor, disease, kind, writer, ids, request))
    return tasks, silent


def from_table(risk: Risk, *, variants: int, writer: str = "template") -> list[Task]:
    """Return tasks for a writer that reads the risk table; variants paraphrase one another."""
    tasks = []
    for seed, (factor, disease, kind) in itertools.product(range(variants), _pairs(risk)):
        task = json.dumps({"factor": factor, "disease": disease, "seed": seed})
        request = Request(_key(f"{risk!r} {task}"), "", task)
        ids = (f"risk:{risk.version}",)
        tasks.append(Task(factor, disease, kind, f"{writer}:{seed}", ids, request))
    return tasks


def plan(tasks: Sequence[Task], backend: Backend, out: str | Path, *, silent: int = 0) -> Plan:
    """Count what `run` would do, and write nothing."""
    cached = answers.read_cache(_cache_file(Path(out), backend), _header(backend))
    prompts = {t.request.key: len(t.request.prompt) for t in tasks}
    to_do = [key for key in prompts if key not in cached]
    lengths = (prompts[key] for key in to_do)
    tokens = answers.estimate(lengths, backend, answer_tokens=OUTPUT_TOKENS)
    return Plan(len(tasks), len(prompts) - len(to_do), len(to_do), silent, tokens)


def run(
    tasks: Sequence[Task],
    backend: Backend,
    out: str | Path,
    *,
    passages: Sequence[retrieval.Passage] = (),
    silent: Sequence[str] = (),
) -> dict[str, Any]:
    """Have every paragraph written into a folder, or go on where an earlier start stopped.

    Texts of other writers, and of pairs this start is not about, stay as they are.

    Args:
      tasks: of one writer.
      backend: who writes.
      out: the folder; made if it does not exist.
      passages: those `ids` of the tasks name.
      silent: pairs no passage speaks of, for the summary.

    Returns:
      The summary.

    Raises:
      UserError: where another process writes there, review.csv holds verdicts that have not been
        read yet or an id names other words than the folder has under it, both also at the end, or
        the backend gave up; what it answered is kept.
    """
    out = Path(out)
    review.check_nothing_unread(out)
    _with_kept(out, passages)  # refused before anything is asked
    out.mkdir(parents=True, exist_ok=True)
    by_key = {task.request.key: task for task in tasks}
    read = lambda key, answer: {"text": _text_for(by_key[key], answer)}
    with answers.Cache(_cache_file(out, backend), _header(backend)) as cache:
        cache.reread(by_key, read)
        missing = [task.request for key, task in by_key.items() if key not in cache.records]
        answers.ask(
            missing,
            backend,
            cache,
            check=read_answer,
            read=read,
            total=len(missing),
            unit="paragraph",
        )
        found = {task: cache.records[task.request.key] for task in tasks}
    written = [task.record(entry["text"]) for task, entry in found.items() if "text" in entry]
    failures = {
        f"{t.factor}/{t.disease}/{t.source}": e["error"] for t, e in found.items() if "error" in e
    }
    with answers.locked(out):
        review.check_nothing_unread(out)  # hours may have passed
        _keep(out, written, passages)
        corpus = review.apply(out)
        sources = collections.Counter(record.source for record in corpus.values())
        unwritten = failures.keys() | {f"{pair}/{backend.name}" for pair in silent}
        stand = {f"{r.factor}/{r.disease}/{r.source}" for r in corpus.values()}
        summary = {
            "texts": len(corpus),
            "vetted": sum(record.vetted for record in corpus.values()),
            "sources": dict(sorted(sources.items())),
            "failed": failures,
            "without_passages": sorted(silent),
            "from_earlier_starts": sorted(unwritten & stand),
        }
        lines = [json.dumps(summary, indent=2, sort_keys=True) + "\n"]
        answers.replace(out / "summary.json", lines)
    return summary


def read_answer(answer: str) -> dict[str, str]:
    """Return {"factor", "disease", "text"} of an answer, which may stand in prose or code fences.

    The last one counts, and none of a model's thoughts.

    Raises:
      Malformed: if there is none, or its text is no paragraph.
    """
    decoder = json.JSONDecoder(strict=False)  # models break lines inside strings
    answer, said = answers.without_thoughts(answer), {}
    for match in re.finditer(r"\{", answer):
        try:
            found, _ = decoder.raw_decode(answer, match.start())
        except ValueError:
            continue
        except RecursionError:
            raise Malformed("an answer that is nested too deep") from None
        if isinstance(found, dict) and all(
            isinstance(found.get(name), str) for name in ("factor", "disease", "text")
        ):
            said = {name: " ".join(found[name].split()) for name in ("factor", "disease", "text")}
    if not said:
        raise Malformed("an answer without factor, disease and text")
    words = len(said["text"].split())
    if not WORDS[0] <= words <= WORDS[1]:
        raise Malformed(f"a text of {words} words; {WORDS[0]} to {WORDS[1]} are accepted")
    return said


def _text_for(task: Task, answer: str) -> str:
    """Return the text of an answer that is about what was asked."""
    found = read_answer(answer)
    for kind, asked in (("factor", task.factor), ("disease", task.disease)):
        if found[kind].lower() != asked.lower():
            raise Malformed(f"names the {kind} '{found[kind]}', asked was '{asked}'")
    return found["text"]


def _keep(out, written, passages) -> None:
    """Replace what was written anew in written.jsonl, and add to the passages.

    A pair whose new text failed keeps its old one. The order is the same whatever came first.
    Passages stay when their texts are replaced, as verdicts on those do.
    """
    about = lambda record: (record.source, record.factor, record.disease)
    replaced = set(map(about, written))
    texts = _with_kept(out, passages)
    old = review.read_written(out).values() if (out / review.WRITTEN).is_file() else ()
    records = [record for record in old if about(record) not in replaced] + written
    records.sort(key=about)
    cited = {name for record in records for name in record.ids} | _read_passages(out).keys()
    rows = (answers.dumps(texts[name]) + "\n" for name in sorted(cited & texts.keys()))
    answers.replace(out / KEPT_PASSAGES, rows)
    answers.replace(out / review.WRITTEN, (knowledge.line(r.id, r) for r in records))


def _with_kept(out: Path, passages: Sequence[retrieval.Passage]) -> dict[str, Mapping]:
    """Return the passages by id, and those a folder keeps because texts were written from them.

    Raises:
      UserError: for an id both have with other words. A text cites ids, and has to be reviewed
        against the words it was written from.
    """
    kept = _read_passages(out)
    told = {p.id: p._replace(title=" ".join(p.title.split()))._asdict() for p in passages}
    words = lambda p: json.dumps([p["title"].split(), p["text"].split()])
    for name in sorted(kept.keys() & told.keys()):
        before, now = (_key(words(passages[name]))[:8] for passages in (kept, told))
        if before != now:
            raise UserError(
                f"{out / KEPT_PASSAGES} has passage '{name}' in other words (hash {before}) than "
                f"the articles now (hash {now}), and texts were written from those: give the "
                "article an id of its own, such as its PMID, or its id with '-corrected', so that "
                "every text keeps its source; no answer is lost."
            )
    return told | kept


def _read_passages(out: Path) -> dict[str, Mapping]:
    path = out / KEPT_PASSAGES
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8") as lines:  # which str.splitlines would cut at others, too
        return {row["id"]: row for row in map(json.loads, lines)}


def _pairs(risk: Risk):
    """Yield (factor, disease, kind): each factor's summary, then its details."""
    for factor in risk.factors:
        yield factor, ALL, "summary"
        for disease in risk.diseases:
            yield factor, disease, "detail"


def _key(asked: str) -> str:
    return hashlib.sha256(asked.encode()).hexdigest()[:32]


def _header(backend: Backend) -> dict:
    return answers.header_of(backend, PROMPT_VERSION)


def _cache_file(out: Path, backend: Backend) -> Path:
    """Return the file of a writer: readable, and different for different names."""
    slug = re.sub(r"[^a-z0-9]+", "-", backend.name.lower()).strip("-")[:40]
    return out / f"answers-{slug}-{_key(backend.name)[:8]}.jsonl"
