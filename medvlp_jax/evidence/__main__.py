"""Texts by rules, templates and language models, offline.

medvlp evidence extract --reports PATH --out DIR [--backend NAME]   diagnostic evidence of reports
medvlp evidence corpus --risk NAME --out DIR [--articles PATH]      what risk factors mean
medvlp evidence review --corpus DIR [--review FILE]                 physicians' verdicts on that
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from medvlp_jax import ranges
from medvlp_jax.config import UserError
from medvlp_jax.data import reports
from medvlp_jax.evidence import backends, corpus, extract, retrieval, review, risk, template
from medvlp_jax.evidence.answers import Estimate
from medvlp_jax.reading import parse_json

# Keys come from environment variables alone, see `endpoint.KEYS`.
SETTINGS = ("url", "model", "allow_remote", "in_flight", "timeout", "max_tokens", "extra_body")
EXTRA = '{"chat_template_kwargs": {"enable_thinking": false}}'
NOTHING_DONE = "Nothing was sent and nothing written."


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Raises:
      UserError: for bad input.
    """
    options = _parser().parse_args(argv)
    options.run(options)


def _extract(options: argparse.Namespace) -> None:
    found = list(reports.read_reports(options.reports))
    found = found[: options.limit] if options.limit else found
    backend = _backend(options, {"rules": extract.write_rules}, "reports are patients' data")
    if options.dry_run:
        plan = extract.plan(found, backend, options.out)
        print(
            f"{plan.reports:,} reports, {plan.texts:,} different texts, {plan.empty:,} empty; "
            f"{plan.cached:,} answered before, {plan.to_do:,} to do with {backend.name}."
        )
        print(_cost(plan.tokens, backend, options))
        return
    summary = extract.run(found, backend, options.out)
    counts = ", ".join(f"{count:,} {status}" for status, count in summary["status"].items())
    odd = ", ".join(f"{entry['count']:,} {kind}" for kind, entry in summary["odd"].items())
    print(f"{summary['reports']:,} reports: {counts}.")
    print(f"Odd: {odd or 'none'}. The ids are in {options.out}/summary.json.")


def _corpus(options: argparse.Namespace) -> None:
    table = risk.read(options.risk).narrowed(_names(options.factors), _names(options.diseases))
    out, silent, passages = Path(options.out), [], []
    if options.backend == "template":
        if options.articles:
            raise UserError("The template reads the risk table alone: --articles needs a model.")
        backend = backends.writer("template", template.writer(table))
        tasks = corpus.from_table(table, variants=options.variants)
    else:
        sent = "articles may be licensed to you alone"
        backend = _backend(options, {"template": str}, sent)
        if not options.articles:
            raise UserError(
                f"--backend {options.backend} writes from literature: name a .jsonl or folder of "
                "articles with --articles."
            )
        passages = retrieval.read_articles(options.articles)
        words = options.retriever == "bm25"
        search = (
            retrieval.by_words(passages)
            if words
            else retrieval.by_meaning(passages, options.retriever)
        )
        tasks, silent = corpus.from_articles(
            table, passages, search, writer=backend.name, count=options.passages
        )
    if options.dry_run:
        plan = corpus.plan(tasks, backend, out, silent=len(silent))
        print(
            f"{plan.tasks:,} paragraphs, {plan.cached:,} written before, {plan.to_do:,} to do with "
            f"{backend.name}; {plan.without_passages:,} pairs no passage speaks of."
        )
        print(_cost(plan.tokens, backend, options))
        return
    summary = corpus.run(tasks, backend, out, passages=passages, silent=silent)
    sources = ", ".join(f"{count:,} of {source}" for source, count in summary["sources"].items())
    print(
        f"{summary['texts']:,} texts ({sources}), {summary['vetted']:,} of them vetted; "
        f"{len(summary['failed']):,} failed, {len(silent):,} pairs without a passage: see "
        f"{out / 'summary.json'}."
    )
    if earlier := summary["from_earlier_starts"]:
        print(
            f"{len(earlier):,} of the texts are from earlier starts: this one wrote nothing on "
            "their pairs, see from_earlier_starts there."
        )
    if summary["vetted"] < summary["texts"]:
        print(
            f"For physicians: {out / review.REVIEW}; then `medvlp evidence review --corpus {out}`."
        )


def _review(options: argparse.Namespace) -> None:
    out = Path(options.corpus)
    standing = review.take(out, Path(options.review or out / review.REVIEW))
    vetted = sum(record.vetted for record in standing.values())
    print(f"{len(standing):,} texts stand, {vetted:,} of them vetted; {out / review.REVIEW} has")
    print("the others.")


def _backend(options: argparse.Namespace, writers, sent: str) -> backends.Backend:
    settings = {name: getattr(options, name) for name in SETTINGS}
    return backends.make(options.backend, writers=writers, sent=sent, **settings)


def _cost(tokens: Estimate, backend: backends.Backend, options: argparse.Namespace) -> str:
    lines = [NOTHING_DONE]
    if backend.counts_tokens:
        cost = tokens.cost(options.price_in, options.price_out)
        lines.insert(
            0,
            f"About {tokens.prompt_tokens:,} tokens to read and {tokens.answer_tokens:,} to write: "
            f"{cost:,.2f} at {options.price_in} and {options.price_out} per million.",
        )
    return "\n".join(lines)


def _names(listed: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in listed.split(",") if name.strip())


def _count(least: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and int(text) >= least):
            raise argparse.ArgumentTypeError(f"'{text}' is no whole number from {least} on")
        return int(text)

    return count


def _number(accepted: ranges.Range) -> Callable[[str], float]:
    """Return the type of a number of this range."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if value not in accepted:
            raise argparse.ArgumentTypeError(f"'{text}' must be a number, {accepted}")
        return value

    return number


def _object(text: str) -> dict:
    try:
        value = parse_json(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"'{text}' is no JSON object, such as {EXTRA}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="medvlp evidence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="extract | corpus | review")
    command = commands.add_parser("extract", help="list the diagnostic evidence of each report")
    command.set_defaults(run=_extract)
    command.add_argument(
        "--reports", required=True, help=".jsonl, .csv, .tgz or a folder of .xml or .txt files"
    )
    command.add_argument("--limit", type=_count(0), default=0, help="only the first reports")
    _add_backend(command, "rules", "send report text to another machine")
    command = commands.add_parser("corpus", help="write what risk factors mean for diseases")
    command.set_defaults(run=_corpus)
    command.add_argument(
        "--risk", required=True, help="factors and diseases: a corpus that ships them, or a file"
    )
    command.add_argument("--articles", default="", help=".jsonl, or a folder of .txt and .md files")
    command.add_argument("--factors", default="", help="only these, with commas")
    command.add_argument("--diseases", default="", help="only these, with commas")
    command.add_argument(
        "--retriever", default="bm25", help="bm25, or the folder of a text encoder"
    )
    command.add_argument(
        "--passages", type=_count(1), default=corpus.PASSAGES, help="for a paragraph"
    )
    command.add_argument(
        "--variants", type=_count(1), default=4, help="paraphrases, of the template"
    )
    _add_backend(command, "template", "send passages of articles to another machine")
    command = commands.add_parser("review", help="take in what physicians said of a corpus")
    command.set_defaults(run=_review)
    command.add_argument("--corpus", required=True, help="folder of `medvlp evidence corpus`")
    command.add_argument("--review", default="", help="the table; default: the folder's review.csv")
    return parser


def _add_backend(command: argparse.ArgumentParser, writer: str, remote: str) -> None:
    """Add what every command that asks somebody takes."""
    names = (writer, *backends.MODELS)
    command.add_argument("--out", required=True, help="folder of the answers; resumes if it exists")
    command.add_argument("--backend", default=writer, help=f"{', '.join(names)}")
    command.add_argument("--model", default="", help="its name at the endpoint, or a folder")
    command.add_argument(
        "--url", default="http://localhost:8000/v1", help="of the endpoint; keys: see the docs"
    )
    command.add_argument("--allow-remote", action="store_true", help=remote)
    command.add_argument(
        "--in-flight", type=_count(1), default=16, help="requests at the same time"
    )
    command.add_argument(
        "--timeout", type=_number(ranges.POSITIVE), default=120.0, help="seconds, of a request"
    )
    command.add_argument(
        "--max-tokens", type=_count(1), default=1024, help="of an answer, thoughts included"
    )
    command.add_argument(
        "--extra-body",
        type=_object,
        default={},
        metavar="JSON",
        help=f"more fields of an endpoint's requests, such as {EXTRA}; null takes one out",
    )
    command.add_argument("--dry-run", action="store_true", help="count and estimate; send nothing")
    price = {"type": _number(ranges.ANY), "default": 0.0}
    command.add_argument("--price-in", **price, help="per million tokens read")
    command.add_argument("--price-out", **price, help="per million tokens written")


if __name__ == "__main__":
    from medvlp_jax import cli

    sys.exit(cli.run(main))
