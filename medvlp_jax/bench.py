"""Measure your own pipeline: `medvlp bench data --config=configs/imitate.py:demo [--consumes=N]`.

Reads the corpora of a config as a run would, decodes, draws the views, makes batches, and trains
nothing; cached text features, which a run computes before its first step, are zeros here. Printed
are, for each number of threads, examples and images a second, and images a second of processor
time: what one core can do, whatever else the machine is busy with. An image shown in two views
counts once. Of texts that may be packed it says how much is padding and which setting would do.

--consumes says how many examples a second the device takes (`time/pairs_per_second` of a run whose
`time/data` is near 0, or benchmarks/train_step.py): the answer is whether it would starve.
"""

import argparse
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from absl import flags

from medvlp_jax import (
    assemble,
    checks,
    cli,
    clinical,
    examples,
    ranges,
    sharding,
    train,
    unpaired,
)
from medvlp_jax.config import UserError
from medvlp_jax.data import packing, pairing, pipeline
from medvlp_jax.encoders.base import Tokens

SECONDS = 10.0  # of measuring for each number of threads
BATCHES = 8  # whose texts are looked at


class Rate(NamedTuple):
    """What a loader does.

    Attributes:
      threads: that make batches.
      examples: a second.
      images: a second.
      images_per_core: images a second of processor time.
    """

    threads: int
    examples: float
    images: float
    images_per_core: float


def rate_of(
    batches: Callable[[], Mapping], *, threads: int, images: int, ahead: int, seconds: float
) -> Rate:
    """Time batches for some seconds, after as many as may lie ready.

    Args:
      batches: gives the next one.
      threads: that make them, for the record.
      images: in an example.
      ahead: batches that are made ahead.
      seconds: at least one batch is made.
    """
    for _ in range(ahead + 1):
        batches()
    count, wall, processor = 0, time.perf_counter(), time.process_time()
    while not count or time.perf_counter() - wall < seconds:
        count += len(batches()["text_id"])
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return Rate(threads, count / wall, images * count / wall, images * count / processor)


def loader(parts: assemble.Parts, sources: Sequence, *, threads: int) -> Callable[[], Mapping]:
    """Return the function that gives the next batch of a run, its text features all zero."""
    data = {**parts.config["data"], "threads": threads}
    changed = parts._replace(config={**parts.config, "data": data})
    rows, shares = sources, None
    if (pools := unpaired.pools(parts, sources)) is not None:
        rows, shares = unpaired.streams(parts, sources[0], pools, pairing.Related())
    features = _zeros(parts, sources)
    return functools.partial(next, examples.train_batches(changed, rows, features, shares=shares))


def _zeros(parts, sources) -> dict[str, np.ndarray] | None:
    """Return what `examples.cached_text` would, without a text encoder."""
    inputs, data = parts.recipe.inputs, parts.config["data"]
    if not any(key.endswith("_feature") for key in inputs):
        return None
    shape, texts = (parts.recipe.text.width,), pipeline.mlm_texts(sources)
    if "metadata_feature" in inputs:
        shape = (data["text_length"], *shape)
        texts = clinical.texts_of(
            clinical.told_of(data, sources, parts.recipe.task, train=True), sources
        )
    return dict.fromkeys(texts, np.zeros(shape, np.float32))


def images_of(recipe) -> int:
    """Return how many images an example has; a second view of one is none."""
    named = getattr(recipe, "images", None) or ("image",)
    return len([name for name in named if name in recipe.inputs])


def verdict(rates: Sequence[Rate], consumes: float, cores: int) -> str:
    """Say whether a device that takes `consumes` examples a second would starve."""
    best = max(rates, key=lambda rate: rate.examples)
    share = best.examples / consumes
    if share >= 1:
        return (
            f"A device that takes {consumes:,.0f} examples/s is kept busy: {best.threads} threads "
            f"make {share:.1f} times as many."
        )
    per_core = best.examples * best.images_per_core / best.images
    return (
        f"A device that takes {consumes:,.0f} examples/s would starve {1 - share:.0%} of the time: "
        f"{best.threads} threads on {cores} cores make {best.examples:,.0f}. At "
        f"{per_core:,.0f} examples/s a core it takes {math.ceil(consumes / per_core)} cores."
    )


def table(rates: Sequence[Rate]) -> str:
    """Lay out rates."""
    lines = ["threads   examples/s     images/s   images/s a core"]
    for rate in rates:
        lines.append(
            f"{rate.threads:>7}{rate.examples:>13,.0f}{rate.images:>13,.0f}"
            f"{rate.images_per_core:>18,.0f}"
        )
    return "\n".join(lines)


def packing_advice(batches: Sequence[Mapping], packs: Sequence[str], groups: int) -> list[str]:
    """Say of each text a recipe may read packed how much of it is padding, and what would do.

    Args:
      batches: not packed.
      packs: keys of the texts.
      groups: devices of this process.
    """
    said = []
    for key in packs:
        rows, words, tokens, examples = [], 0, 0, len(batches[0][key].ids) // groups
        for batch in batches:
            ids, mask = batch[key]
            used = batch.get(f"{key}_mask", np.ones(mask.shape[:-1], bool))
            words, tokens = words + mask[used].sum(), tokens + mask.size
            shape = (groups, -1, mask.shape[-1])
            parts = zip(
                *(x.reshape(shape) for x in (ids, mask)), used.reshape(groups, -1), strict=True
            )
            rows += [packing.fewest_rows(Tokens(i, m), u) for i, m, u in parts]
        setting = "data.evidence.pack" if key == "evidence" else "data.pack"
        said.append(
            f"{key}: {words / tokens:.0%} of the tokens are words. {setting}="
            f"{math.ceil(100 * max(rows) / examples) / 100:g} would hold the texts of these "
            f"{len(batches)} batches; an encoder then computes on "
            f"{max(rows) * ids.shape[-1] * groups * len(batches) / tokens:.0%} of the tokens."
        )
    return said


def data(argv: Sequence[str]) -> list[Rate]:
    """Measure the input of a config.

    Raises:
      UserError: for bad input.
    """
    parser = argparse.ArgumentParser(
        prog="medvlp bench data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1 and one a core")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each of them")
    parser.add_argument("--consumes", type=float, help="examples a second the device takes")
    options, settings = parser.parse_known_args(argv)
    threads = options.threads or sorted({1, cores})
    asked = {"threads": min(threads), "seconds": options.seconds, "consumes": options.consumes}
    for name, value in asked.items():
        if value is not None and value not in ranges.POSITIVE:
            raise UserError(f"--{name}={value} must be {ranges.POSITIVE}.")
    config, _ = train.resolve(settings)
    checks.settings(config)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads absl's own flags
    cached = config["data"]["decode_cache"]
    config["data"]["decode_cache"] = 0  # else the second epoch of a small corpus decodes nothing
    parts = assemble.parts(config, pretrained=False)
    sources = assemble.open_corpora(config["data"], config["data"]["split"])
    ahead = config["data"]["prefetch"]
    rates = [
        rate_of(
            loader(parts, sources, threads=count),
            threads=count,
            images=images_of(parts.recipe),
            ahead=max(ahead, count),
            seconds=options.seconds,
        )
        for count in threads
    ]
    print(f"{sum(map(len, sources)):,} examples, batches of {config['train']['batch_size']}")
    print(table(rates))
    if packs := getattr(parts.recipe, "packs", ()):
        for setting in (config["data"], config["data"]["evidence"]):
            setting["pack"] = 0.0
        batches = loader(parts, sources, threads=1)
        groups = sharding.batch_devices(parts.mesh) // parts.part.count
        for line in packing_advice([batches() for _ in range(BATCHES)], packs, groups):
            print(line)
    if cached:
        print(f"Every image was decoded; data.decode_cache={cached} spares that from then on.")
    if options.consumes:
        print(verdict(rates, options.consumes, cores))
    return rates


def main(argv: Sequence[str] | None = None) -> None:
    """Run `data`, the one thing to measure.

    Raises:
      UserError: for bad input.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: medvlp bench data --config=...\n\n{__doc__}")
        return
    if arguments[0] != "data":
        raise UserError(f"'{arguments[0]}' cannot be measured here; accepted: data.")
    data(arguments[1:])


if __name__ == "__main__":
    cli.leave(cli.run(main))
