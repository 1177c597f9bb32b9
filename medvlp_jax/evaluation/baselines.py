"""What a regression on the raw input scores: the floor that a trained classifier has to beat.

Logistic regression as in `probe`, on the table, on the pixels (a histogram of each channel and a
thumbnail), and on both. Deep networks on a thousand images often do not reach the third. On which
cells of the table are empty, what is written in none: where doctors ask more of whom they suspect,
that alone tells classes apart, and a classifier may have learned no more.

Axis letters: N rows, b rows of a batch, H, W pixels, C channels, S slices, T attributes, D numbers.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from medvlp_jax.data import tabular
from medvlp_jax.data.corpora import Source
from medvlp_jax.evaluation import classify, probe
from medvlp_jax.evaluation.results import Results, assemble

PROTOCOL = "regression@clean-v1"
BINS, SIDE, LAYERS = 16, 8, 4
TABLE, PIXELS, BOTH, MISSING = "table", "pixels", "table and pixels", "missing mask"
SPREAD = 4.0  # standard deviations either side that a volume's histogram covers


class Scores(NamedTuple):
    """Class scores [n, C] of the test rows, and what was fitted for them."""

    scores: np.ndarray
    fitted: dict


def raw_features(batch: Mapping, images: Sequence[str]) -> dict[str, np.ndarray]:
    """Return what the regressions see of a batch: `pixels` [b, D] and `table` [b, T * D].

    Args:
      batch: images uint8 [b, H, W, C] or float volumes [b, H, W, S], `tabular` [b, T, D].
      images: which keys are images.
    """
    found = {}
    if images:
        found[PIXELS] = np.concatenate([_pixels(np.asarray(batch[key])) for key in images], axis=1)
    if "tabular" in batch:
        found[TABLE] = np.asarray(batch["tabular"]).reshape(len(batch["tabular"]), -1)
    return found


def missing(source: Source, names: Sequence[str], *, task: str, limit: int = 0) -> dict:
    """Return which cells are empty or unknown, [N, T] as `missing mask`, with labels and patients.

    Args:
      source: with a table.
      names: T columns.
      task: label task.
      limit: only the first rows; 0 takes all.
    """
    schema, found = source.metadata["table"], {}
    for i in range(min(limit or len(source), len(source))):
        record = source[i]
        table, row = record["table"], {"patient_id": record["patient_id"]}
        row[MISSING] = np.array([tabular.is_unknown(table[name], schema[name]) for name in names])
        row[f"label/{task}"] = record["labels"][task]
        for key, value in row.items():
            found.setdefault(key, []).append(value)
    return {key: np.stack(values) for key, values in found.items()}


def _pixels(image: np.ndarray) -> np.ndarray:
    """Histogram of each channel, as fractions, and block means; a volume is one channel."""
    if image.dtype == np.uint8:
        channels = np.moveaxis(image, -1, 1)  # [b, C, H, W]
        bins, grid = channels.astype(int) * BINS // 256, (SIDE, SIDE)
    else:
        channels = np.moveaxis(image, -1, 1)[:, None]  # [b, 1, S, H, W]
        scaled = (channels + SPREAD) / (2 * SPREAD) * BINS
        bins, grid = np.clip(scaled, 0, BINS - 1).astype(int), (LAYERS, SIDE, SIDE)
    flat = bins.reshape(-1, bins[0, 0].size)  # [b * C, pixels]
    counts = np.stack([np.bincount(row, minlength=BINS) for row in flat]) / flat.shape[1]
    blocks = channels.astype(np.float32)
    for axis, parts in zip(range(-len(grid), 0), grid, strict=True):
        edges = np.linspace(0, blocks.shape[axis], parts, endpoint=False).astype(int)
        sizes = np.diff([*edges, blocks.shape[axis]])
        shape = [-1 if a == len(grid) + axis else 1 for a in range(len(grid))]
        blocks = np.add.reduceat(blocks, edges, axis=axis) / sizes.reshape(shape)
    return np.concatenate([counts.reshape(len(image), -1), blocks.reshape(len(image), -1)], axis=1)


def scores(train: Mapping, test: Mapping, *, task: str, seed: int = 0) -> dict[str, Scores]:
    """Fit every regression there is input for.

    Args:
      train: what `raw_features` returns, of all rows, with `label/<task>` [N, C] and `patient_id`.
      test: likewise.
      task: label task.
      seed: of the split that chooses the regularisation.

    Returns:
      By name: "table", "pixels", "table and pixels"; or "missing mask".

    Raises:
      UserError: for features that are not finite.
    """
    kinds = {name: (name,) for name in (TABLE, PIXELS, MISSING) if name in train}
    if {TABLE, PIXELS} <= {*kinds}:
        kinds[BOTH] = (TABLE, PIXELS)
    side_by_side = lambda found, names: np.concatenate([found[name] for name in names], axis=1)
    return {
        kind: Scores(
            *probe.fit(
                side_by_side(train, names),
                train[f"label/{task}"],
                side_by_side(test, names),
                multi_label=False,
                seed=seed,
                train_groups=train["patient_id"],
            )
        )
        for kind, names in kinds.items()
    }


def results(
    found: Mapping[str, Scores],
    test: Mapping,
    *,
    task: str,
    classes: Sequence[str],
    probe_limit: int = 0,
    **bootstrap,
) -> Results:
    """Score what `scores` returned; keys are regression/<task> (<input>)/<metric>.

    Args:
      found: by name.
      test: the rows they belong to, see `scores`.
      task: label task.
      classes: C names.
      probe_limit: they were fitted on the first so many rows, 0 on all; a setting that the hash
        covers.
      **bootstrap: resamples, seed, level.
    """
    numbers: Results = {}
    for kind, (logits, fitted) in found.items():
        scored = classify.single_label_scores(
            test[f"label/{task}"], logits, classes, groups=test["patient_id"], **bootstrap
        )
        settings = {"classes": list(classes), "input": kind}
        settings |= {} if kind == MISSING else {"bins": BINS, "side": SIDE}
        settings |= {"probe_limit": probe_limit} if probe_limit else {}
        numbers |= assemble(
            PROTOCOL,
            f"{task} ({kind})",
            scored.numbers,
            settings=settings | bootstrap,
            notes=scored.notes | probe.named(fitted, classes),
        )
    return numbers
