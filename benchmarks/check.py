"""Compare the ratios of a new measurement with those that are kept: the regression gate.

  python -m benchmarks.check NEW.json KEPT.json

Both are files of benchmarks/. A ratio, the faster the larger, is {"median", "quartiles", "noise"}
wherever it stands in them. Its noise is what repeating the same measurement moves the median by,
relative: half the distance of the quartiles over the median, at least FLOOR. A ratio has fallen
where it is lower than the kept one by more than the noise of both together. Ratios that only the
new file has are no fault, those that only the kept file has are named. Times are never compared:
they belong to one machine. Files that differ in one of FACTS (device, threads, recipe, batch,
input, settings, a test's sizes) are not compared, and a measurement noisier than CEILING has to be
taken again, the kept one too: it would let anything pass. What a file does not say of these, and
another processor, is a warning.

Ends with 1 where a ratio has fallen, with 2 where files cannot be compared.
"""

import argparse
import json
import math
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from medvlp_jax.writing import replaced

FLOOR = 0.05  # of the noise: medians of few turns agree by chance, too
CEILING = 0.25
# Facts of a file that have to be those of the other; the first ones every file is to say.
ALWAYS = ("device", "threads")
FACTS = (*ALWAYS, "recipe", "batch_size", "input", "settings", "tiny")
UNKNOWN = "unknown"
FIELDS = {"median", "quartiles", "noise"}


class CheckError(Exception):
    """Files that cannot be compared."""


def entry(ratios: Iterable[float]) -> dict[str, Any]:
    """Return a ratio as it is kept: median, quartiles and noise of paired measurements."""
    low, median, high = np.percentile(list(ratios), (25, 50, 75)).tolist()
    noise = max(FLOOR, (high - low) / 2 / median)
    return {"median": median, "quartiles": [low, high], "noise": noise}


def keep(out: pathlib.Path, found: Mapping[str, Any]) -> None:
    """Write a measurement, whole or not at all."""
    with replaced(out) as scratch:
        scratch.write_text(json.dumps(found, indent=1) + "\n")


def text(ratio: Mapping[str, Any]) -> str:
    """Write a ratio as in the tables."""
    low, high = ratio["quartiles"]
    return f"{ratio['median']:.2f} ({low:.2f}-{high:.2f})"


def read(file: pathlib.Path) -> dict[str, Any]:
    """Return what a measurement's file holds.

    Raises:
      CheckError: where it is no such file.
    """
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise CheckError(f"{file} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckError(f"{file} holds a {type(found).__name__} and no measurement.")
    return found


def entries(found: Any, path: str = "") -> Iterator[tuple[str, Mapping]]:
    """Yield (path, ratio) of every ratio in a file."""
    if isinstance(found, Mapping):
        if found.keys() >= FIELDS:
            yield path, found
            return
        for key, value in found.items():
            yield from entries(value, f"{path}/{key}".lstrip("/"))


def unlike(new: Mapping, kept: Mapping) -> list[str]:
    """Return a line for each fact that one file does not say, and for another processor.

    Raises:
      CheckError: where a fact that both say differs.
    """
    lines = []
    for fact in FACTS:
        missing = False if fact == "tiny" else UNKNOWN
        now, then = new.get(fact, missing), kept.get(fact, missing)
        if UNKNOWN not in (now, then) and now != then:
            raise CheckError(f"{fact} is {now} now and {then} in the kept file.")
        if now != then or (now == UNKNOWN and fact in ALWAYS):
            lines.append(f"{fact} is {now} now and {then} in the kept file.")
    shared = dict(entries(new)).keys() & dict(entries(kept)).keys()
    then = dict(_processors(kept))
    for path, now in _processors(new):
        is_shared = any(ratio.startswith(path) for ratio in shared)
        if is_shared and now != (before := then.get(path, UNKNOWN)):
            where = f" of {path}" if path else ""
            lines.append(f"the processor{where} is {now} now and {before} in the kept file.")
    return lines


def _processors(found: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield (path, model of the processor) of every part of a file that says it."""
    if isinstance(found, Mapping):
        if "cpu" in (measured := found.get("measured") or {}):
            yield path, measured["cpu"]
        for key, value in found.items():
            yield from _processors(value, f"{path}/{key}".lstrip("/"))


def fallen(new: Mapping, kept: Mapping) -> list[str]:
    """Return a line for every kept ratio that has fallen or is gone.

    Raises:
      CheckError: where there is nothing to compare, a measurement is too noisy, or a ratio is no
        number above 0.
    """
    news, olds = dict(entries(new)), dict(entries(kept))
    if not olds.keys() & news.keys():
        raise CheckError("The two files have no ratio in common.")
    lines = []
    for path, old in olds.items():
        if path not in news:
            lines.append(f"{path}: kept {text(old)}, not measured now")
            continue
        now = news[path]
        for ratio in (now, old):
            if not (math.isfinite(ratio["median"]) and ratio["median"] > 0):
                raise CheckError(f"{path} is {ratio['median']}, and no ratio.")
        for ratio, which in ((now, ""), (old, " in the kept file")):
            if not ratio["noise"] <= CEILING:
                raise CheckError(
                    f"{path} has a noise of {ratio['noise']:.0%}{which}, more than {CEILING:.0%}: "
                    "measure again, with more turns or on an idle machine."
                )
        noise = math.hypot(old["noise"], now["noise"])
        if now["median"] < old["median"] * (1 - noise):
            lines.append(f"{path}: {text(now)}, kept {text(old)}, noise {noise:.0%}")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Compare two files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("new", type=pathlib.Path)
    parser.add_argument("kept", type=pathlib.Path)
    options = parser.parse_args(argv)
    try:
        files = [read(file) for file in (options.new, options.kept)]
        warnings, lines = unlike(*files), fallen(*files)
    except (OSError, CheckError) as error:
        print(f"check: {error}", file=sys.stderr)
        return 2
    for warning in warnings:
        print(f"check: WARNING, they may not be comparable: {warning}", file=sys.stderr)
    print("\n".join(lines) or "No ratio has fallen.")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
