"""Several runs side by side, with intervals, controls and protocol hashes.

  medvlp table RUN ... [--metrics PATTERN,...] [--published[=NAME,...]] [--format md|latex|csv]

RUN is a run folder or a results.json, NAME=RUN to call it something else. A pattern is a key
without its control, such as 'zero_shot/*/macro_auroc'; without --metrics each task has one number.
Numbers measured with other settings have a column of their own, and a note says which. --published
adds tables of published figures below, by default those of the protocols at hand; never in the
table of what was measured.
"""

import argparse
import csv
import io
import pathlib
import sys
from collections.abc import Sequence

from medvlp_jax import cli
from medvlp_jax.config import UserError
from medvlp_jax.evaluation import comparison, layout, published, results

FORMATS = ("md", "latex", "csv")


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    top = argparse.ArgumentParser(
        "medvlp table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("runs", nargs="+", metavar="RUN", help="run folder, results.json or NAME=RUN")
    top.add_argument("--metrics", default="", help="comma-separated patterns of keys")
    top.add_argument(
        "--published", nargs="?", const="", metavar="NAME,...", help="published figures below"
    )
    top.add_argument("--format", choices=FORMATS, default="md")
    return top


def named(runs: Sequence[str]) -> dict[str, results.Written]:
    """Read runs by their names: as given, or that of the folder.

    Raises:
      UserError: for two runs of one name, or one without results.
    """
    found = {}
    for given in runs:
        name, is_named, path = given.partition("=")
        if not is_named or pathlib.Path(given).exists():
            name, path = "", given
        written = results.read(pathlib.Path(path))
        folder = pathlib.Path(path).absolute()
        name = name or (folder.name if folder.is_dir() else folder.parent.name)
        if name in found:
            raise UserError(f"Two runs are called '{name}'; write OTHER={path} for one of them.")
        found[name] = written
    return found


def text(found: comparison.Table, tables: Sequence[str], kind: str) -> str:
    """Return the table, and published ones below it.

    Args:
      found: what was measured.
      tables: names of published ones.
      kind: one of FORMATS.

    Raises:
      UserError: for published figures in a CSV file, whose lines would mix them with measured ones.
    """
    if kind == "csv":
        if tables:
            raise UserError(
                "--published goes with the formats md and latex: the lines of a CSV file would mix "
                f"published figures with measured ones. They are in {published.FILE}."
            )
        stream = io.StringIO()
        writer = csv.DictWriter(stream, comparison.FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(comparison.records(found))
        return stream.getvalue().rstrip("\n")
    write = {"md": layout.markdown, "latex": layout.latex}[kind]
    grids = [comparison.grid(found), *map(published.grid, tables)]
    return "\n\n".join(map(write, grids))


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table of runs.

    Raises:
      UserError: for bad input.
    """
    options = parser().parse_args(argv)
    patterns = [pattern for pattern in options.metrics.split(",") if pattern]
    found = comparison.compare(named(options.runs), patterns)
    tables = [name for name in (options.published or "").split(",") if name]
    if options.published == "":
        tables = published.fitting(c.protocol.partition("@")[0] for c in found.columns)
    print(text(found, tables, options.format))
    for note in found.notes if options.format == "csv" else ():  # its lines hold no prose
        print(f"medvlp: {note}", file=sys.stderr)


if __name__ == "__main__":
    cli.leave(cli.run(main))
