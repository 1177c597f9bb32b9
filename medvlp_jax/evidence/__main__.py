"""Evidence from reports: `medvlp evidence extract --reports PATH --out DIR [--backend NAME]`."""

import argparse
import sys
from collections.abc import Sequence

from medvlp_jax.data import reports
from medvlp_jax.evidence import backends, extract


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
    settings = ("url", "model", "allow_remote", "in_flight", "timeout")
    backend = backends.make(
        options.backend,
        write=extract.write_rules,
        **{name: getattr(options, name) for name in settings},
    )
    if options.dry_run:
        print(_estimate(extract.plan(found, backend, options.out), backend, options))
        return
    summary = extract.run(found, backend, options.out)
    counts = ", ".join(f"{count:,} {status}" for status, count in summary["status"].items())
    odd = ", ".join(f"{entry['count']:,} {kind}" for kind, entry in summary["odd"].items())
    print(f"{summary['reports']:,} reports: {counts}.")
    print(f"Odd: {odd or 'none'}. The ids are in {options.out}/summary.json.")


def _estimate(plan: extract.Plan, backend: backends.Backend, options) -> str:
    lines = [
        f"{plan.reports:,} reports, {plan.texts:,} different texts, {plan.empty:,} empty; "
        f"{plan.cached:,} answered before, {plan.to_do:,} to do with {backend.name}.",
    ]
    if backend.counts_tokens:
        cost = plan.cost(options.price_in, options.price_out)
        lines.append(
            f"About {plan.prompt_tokens:,} tokens to read and {plan.answer_tokens:,} to write: "
            f"{cost:,.2f} at {options.price_in} and {options.price_out} per million."
        )
    return "\n".join([*lines, "Nothing was sent and nothing written."])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="medvlp evidence", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="extract")
    command = commands.add_parser("extract", help="list the diagnostic evidence of each report")
    command.set_defaults(run=_extract)
    command.add_argument(
        "--reports", required=True, help=".jsonl, .csv, .tgz or a folder of .xml or .txt files"
    )
    command.add_argument("--out", required=True, help="folder of the answers; resumes if it exists")
    command.add_argument("--backend", default="rules", help=f"{', '.join(backends.NAMES)}")
    command.add_argument("--model", default="", help="its name at the endpoint, or a folder")
    command.add_argument(
        "--url", default="http://localhost:8000/v1", help="of the endpoint; keys: see the docs"
    )
    command.add_argument(
        "--allow-remote", action="store_true", help="send report text to another machine"
    )
    command.add_argument("--in-flight", type=int, default=16, help="requests at the same time")
    command.add_argument("--timeout", type=float, default=120.0, help="seconds, of a request")
    command.add_argument("--limit", type=int, default=0, help="only the first reports")
    command.add_argument("--dry-run", action="store_true", help="count and estimate; send nothing")
    command.add_argument("--price-in", type=float, default=0.0, help="per million tokens read")
    command.add_argument("--price-out", type=float, default=0.0, help="per million tokens written")
    return parser


if __name__ == "__main__":
    from medvlp_jax import cli

    sys.exit(cli.run(main))
