"""Retrieval as published code measures it, beside the clean flavour of `retrieval`.

Let y be classes and pi_q the gallery by decreasing similarity with query q, ties in its order.

  P@K = mean_q (1/K) sum_{r <= K} 1[y_{pi_q(r)} = y_q]   class precision
  H@K = mean_q 1[some r <= K has y_{pi_q(r)} = y_q]      class hit rate
  R@K = mean_q 1[pair(q) is among the first K]           pair recall; mean_rank of the pair

  gloria    P@5, 10, 100. Every report is a gallery entry, copies too. Each report's similarities
            are standardised over all images of a known class (population deviation), which changes
            what an image ranks first. Huang et al. 2021 average this with a local matrix; no recipe
            here has one.
  benchx    P@K and H@K, K = 1, 5, 10, of cosines; copies are entries. Zhou et al. 2024.
  cxrclip   R@1, 5, 10 and mean_rank of cosines; identical texts are one entry. You et al. 2023
            take the longer of findings and impression for the text; here it is the run's own.

The papers search texts by images; both directions are reported, with the size of the gallery. For
text to image the standardisation is over the texts. The matrix is made in tiles over queries.

Axis letters: Q queries, G gallery entries, E joint width, q a tile of queries.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from medvlp_jax.config import UserError, nearest
from medvlp_jax.evaluation import metrics, retrieval, statistics
from medvlp_jax.evaluation.results import Results, assemble, number
from medvlp_jax.evaluation.retrieval import Side


class Flavour(NamedTuple):
    """What one published protocol measures.

    Attributes:
      metrics: letters of P, H and R.
      ks: the K.
      distinct: identical texts are one gallery entry.
      standardised: each gallery entry's similarities over all queries that are scored.
    """

    metrics: str
    ks: tuple[int, ...]
    distinct: bool = False
    standardised: bool = False


FLAVOURS = {
    "gloria": Flavour("P", (5, 10, 100), standardised=True),
    "benchx": Flavour("PH", (1, 5, 10)),
    "cxrclip": Flavour("R", (1, 5, 10), distinct=True),
}


def find(name: str) -> Flavour:
    """Return a flavour.

    Raises:
      UserError: for an unknown one.
    """
    if name not in FLAVOURS:
        raise UserError(f"No retrieval flavour '{name}'. {nearest(name, ['clean', *FLAVOURS])}")
    return FLAVOURS[name]


def column_moments(queries, gallery) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and population deviation [G] of each gallery entry's similarity over queries.

    From the queries' mean and second moment [E, E], so that no matrix [Q, G] is held.
    """
    queries, gallery = np.asarray(queries, np.float64), np.asarray(gallery, np.float64)
    centre = queries.mean(0)
    spread = (queries - centre).T @ (queries - centre) / len(queries)  # [E, E]
    variance = np.einsum("ge,ef,gf->g", gallery, spread, gallery, optimize=True)
    return gallery @ centre, np.sqrt(np.maximum(variance, 0))


def ranked(similarity, right, ks) -> dict[str, np.ndarray]:
    """Score rows of a similarity matrix in stable order.

    Args:
      similarity: [q, G].
      right: [q, G] bool.
      ks: the K, at most G.

    Returns:
      precision and hit [q, len(ks)], rank [q] of the first right entry, G + 1 where there is none.
    """
    order = np.argsort(-similarity, axis=1, kind="stable")
    found = np.take_along_axis(right, order, axis=1)
    first = np.where(found.any(1), found.argmax(1), found.shape[1])
    ks = np.asarray(ks)
    return {
        "precision": np.cumsum(found, axis=1)[:, ks - 1] / ks,
        "hit": (first[:, None] < ks).astype(float),
        "rank": first + 1.0,
    }


def search(query: Side, gallery: Side, flavour: Flavour, ks, *, tile=256) -> dict[str, np.ndarray]:
    """Return each query's numbers by metric name, [Q]."""
    parts: dict[str, list] = {}
    mean, spread = 0.0, 1.0
    if flavour.standardised:
        mean, spread = column_moments(query.features, gallery.features)
        # But for rounding, as in scoring.standardised: of equal queries every entry is tied.
        spread = np.where(spread > 1e-9 * np.abs(mean), spread, np.inf)
    entries = np.asarray(gallery.features, np.float64).T
    for start in range(0, len(query.features), tile):
        rows = slice(start, start + tile)
        similarity = np.asarray(query.features[rows], np.float64) @ entries
        similarity = (similarity - mean) / spread
        if flavour.metrics != "R":
            same = query.kind[rows, None] == gallery.kind
            scored = ranked(similarity, same, ks)
            for letter, name in (("P", "precision"), ("H", "hit")):
                for i, k in enumerate(ks):
                    if letter in flavour.metrics:
                        parts.setdefault(f"{letter}@{k}", []).append(scored[name][:, i])
            continue
        scored = ranked(similarity, query.pair[rows, None] == gallery.pair, ks)
        for i, k in enumerate(ks):
            parts.setdefault(f"R@{k}", []).append(scored["hit"][:, i])
        parts.setdefault("mean_rank", []).append(scored["rank"])
    return {name: np.concatenate(values) for name, values in parts.items()}


def run(
    image,
    text,
    text_ids,
    *,
    flavour: str,
    labels=None,
    class_task="",
    groups=None,
    tile=256,
    reads: Mapping[str, Any] | None = None,
    **bootstrap,
) -> Results:
    """Retrieve texts by images and images by texts as a published protocol does.

    Args:
      image: [N, E] unit norm.
      text: [N, E], row i belongs to image i; a zero row (no text) is left out with its image.
      text_ids: [N], equal for equal texts.
      flavour: a key of FLAVOURS.
      labels: [N, C] int8, -1 = unknown; "same class" is an identical set of present classes (see
        `retrieval.label_sets`).
      class_task: whose labels they are; a setting that the hash covers, where classes count.
      groups: [N] patient of each row.
      tile: queries scored at a time.
      reads: which texts they are, such as the sections; settings that the hash covers.
      **bootstrap: resamples (2,000), seed, level; by patients, as for the clean flavour.

    Returns:
      The flavour's numbers by "image_to_text (flavour)" and "text_to_image (flavour)".

    Raises:
      UserError: for an unknown flavour, one of classes without labels, or as `retrieval.run`.
    """
    spec = find(flavour)
    image, text, text_ids, labels, groups = retrieval.with_text(
        image, text, text_ids, labels, groups
    )
    if spec.metrics != "R" and labels is None:
        raise UserError(f"retrieval@{flavour} counts classes, and the corpus has no labels.")
    if not spec.distinct:
        text_ids = np.arange(len(text))
    images, texts = retrieval.sides(image, text, text_ids, labels=labels, groups=groups)
    settings = {**spec._asdict(), "ties": "stable", **bootstrap, **(reads or {})}
    counts_classes = spec.metrics != "R"
    settings |= {"class_task": class_task, "unknown": "left out"} if counts_classes else {}
    results: Results = {}
    for task, query, gallery in (
        ("image_to_text", images, texts),
        ("text_to_image", texts, images),
    ):
        entries = _direction(query, gallery, spec, tile, bootstrap)
        notes = {"patients": len(np.unique(query.group)), "gallery": len(gallery.pair)}
        notes |= retrieval.unknown_notes(query) if counts_classes else {}
        name, protocol = f"{task} ({flavour})", f"retrieval@{flavour}-v1"
        results |= assemble(protocol, name, entries, settings=settings, notes=notes)
    return results


def _direction(query: Side, gallery: Side, spec: Flavour, tile: int, options) -> dict:
    """Search one direction; numbers by metric name. Queries of an unknown class do not count."""
    ks: Sequence[int] = [k for k in spec.ks if k <= len(gallery.pair)]
    if spec.metrics != "R":
        known = query.kind >= 0
        query = Side(*(column[known] for column in query))
    if not len(query.pair) or not ks:
        return {}
    chance = retrieval.chance_levels(query, gallery, ks=ks, class_ks=ks)
    columns = search(query, gallery, spec, ks, tile=tile)
    values = np.column_stack(list(columns.values()))
    statistic = lambda weights: metrics.weighted_mean(values, weights)
    found = statistics.bootstrap(statistic, len(values), groups=query.group, **options)
    rows = dict(zip(columns, zip(*found, strict=True), strict=True))
    return {k: number(*v, n=len(values), chance=chance[k]) for k, v in rows.items()}
