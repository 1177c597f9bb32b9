"""Results of several folds as one table: mean and standard deviation over the runs.

  python -m medvlp_jax.evaluation.folds RUN RUN ... [--out FILE.json]

Reads results.json of each run, which must have been measured in one way: with one protocol hash a
number, in which neither fold nor seed is. A number that a run does not have is left out where that
run says why, as for a class that its fold lacks. The standard deviation is that of a sample
(n - 1), as papers write in parentheses; it is no interval, for folds share most of their training
data.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medvlp_jax.config import UserError
from medvlp_jax.evaluation import results
from medvlp_jax.writing import replaced

Summary = dict[str, dict[str, Any]]


def read(runs: Sequence[Path]) -> list[dict]:
    """Return the results of runs.

    Raises:
      UserError: for a run that has none, has other numbers than the first without saying that they
        could not be computed, or was measured with other settings.
    """
    found = [results.read(run).numbers for run in runs]
    for run, numbers in zip(runs, found, strict=True):
        for key in {**numbers, **found[0]}:
            one, other = found[0].get(key), numbers.get(key)
            if one is None or other is None:
                having, lacking = (run, runs[0]) if one is None else (runs[0], run)
                if not _explained(key, found[0] if one is None else numbers):
                    raise UserError(f"{having} has '{key}', and {lacking} has not.")
            elif one["hash"] != other["hash"]:
                ways = [f"{entry['protocol']} #{entry['hash']}" for entry in (other, one)]
                raise UserError(
                    f"{run} has '{key}' of {ways[0]}, and {runs[0]} of {ways[1]}: numbers "
                    "measured with different settings, which `medvlp table` names, have no mean."
                )
    return found


def _explained(key: str, numbers: Mapping) -> bool:
    """Say whether a run tells why it does not have a number."""
    protocol, task, metric = key.split("/", 2)
    notes = numbers.get(f"{protocol}/{task}/protocol", {})
    listed = [*notes.get("skipped", ()), *notes.get("without_threshold", ())]
    return metric in notes.get("undefined", ()) or metric.partition("/")[2] in listed


def summarise(found: Sequence[Mapping]) -> Summary:
    """Return {key: {"mean", "sd", "values"}} of every number that all runs have.

    One run has no standard deviation: None.
    """
    summary = {}
    for key in found[0]:
        values = [numbers.get(key, {}).get("value") for numbers in found]
        if None not in values:
            sd = statistics.stdev(values) if len(values) > 1 else None
            summary[key] = {"mean": statistics.fmean(values), "sd": sd, "values": values}
    return summary


def table(summary: Summary) -> str:
    """Lay it out, one number a line: 0.735 (0.034)."""
    width = max(map(len, summary), default=0)
    spread = lambda entry: "" if entry["sd"] is None else f" ({entry['sd']:.3f})"
    lines = [f"{k.ljust(width)}  {e['mean']:.3f}{spread(e)}" for k, e in summary.items()]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Raises:
      UserError: for bad input.
    """
    parser = argparse.ArgumentParser(
        "medvlp_jax.evaluation.folds",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, one a fold")
    parser.add_argument("--out", type=Path, help="where the numbers go")
    options = parser.parse_args(argv)
    summary = summarise(read(options.runs))
    print(f"Mean (standard deviation) of {len(options.runs)} runs\n{table(summary)}")
    if options.out:
        with replaced(options.out) as scratch:
            scratch.write_text(json.dumps(summary, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"medvlp: {error}", file=sys.stderr)
        sys.exit(2)
