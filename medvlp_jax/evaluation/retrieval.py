"""Image-text retrieval in both directions, clean flavour.

Equal texts are one gallery entry, and every image of a text is a right answer to it. Texts are
equal where all sections that the model reads are, whatever their case and spacing (see
`features.text_ids`). R@K: a right answer is among the first K. With class labels also P@K, the
share of the first K with the query's class, and H@K, any of them has it; where not all of a row's
classes are known it asks no such question and is no right answer. Where most queries are of one
class P@K favours a model that always answers with it; what that would give is noted beside it,
and "P@K/other classes" is of the other queries. Ties are scored by their expectation under random
order, so a collapsed model gets exactly the chance level. The similarity matrix is made in tiles
over queries and never held as a whole.

Axis letters: N pairs, Q queries, G gallery entries, E joint width, q a tile of queries.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import gammaln

from medvlp_jax.config import UserError
from medvlp_jax.evaluation import metrics, statistics
from medvlp_jax.evaluation.features import check_finite
from medvlp_jax.evaluation.results import Results, assemble, number

PROTOCOL = "retrieval@clean-v1"
# Embeddings are float32: cosines that agree to 6 decimals differ by rounding alone, hence are ties.
DECIMALS = 6
ONE_ANSWER, OTHERS = "P@1 of one answer to all", "other classes"
UNKNOWN = "unknown findings, left out of P@K and H@K"


class Side(NamedTuple):
    """Queries or gallery: embeddings [Q, E]; pair, class (-1 unknown) and patient numbers [Q]."""

    features: np.ndarray
    pair: np.ndarray
    kind: np.ndarray
    group: np.ndarray


def _miss(right, wrong, k):
    """P(no right item among k drawn of right + wrong) = C(wrong, k) / C(right + wrong, k)."""
    right, wrong, k = np.broadcast_arrays(right, wrong, np.maximum(k, 0))
    drawn = np.minimum(k, wrong)
    log = gammaln(wrong + 1) - gammaln(wrong - drawn + 1)
    log += gammaln(right + wrong - drawn + 1) - gammaln(right + wrong + 1)
    return np.where(k == 0, 1.0, np.where((k > wrong) & (right > 0), 0.0, np.exp(log)))


def first_right(similarity, right, ks):
    """Expected rank of the best right answer, and whether it is among the first K.

    Args:
      similarity: [q, G].
      right: [q, G] bool.
      ks: the K.

    Returns:
      (rank [q], hit [q, len(ks)]); the rank starts at 1 and is G + 1 where nothing is right.
    """
    best = np.where(right, similarity, -np.inf).max(1, keepdims=True)
    above = (similarity > best).sum(1)  # [q]
    tied = similarity == best
    a = (tied & right).sum(1)
    b = tied.sum(1) - a
    rank = above + (a + b + 1) / (a + 1)
    hit = 1.0 - _miss(a[:, None], b[:, None], np.asarray(ks) - above[:, None])
    return rank, hit


def precision(similarity, right, ks):
    """Expected share of right answers among the first K, [q, len(ks)]; every K <= G."""
    size = similarity.shape[1]
    places = [size - k for k in ks]
    thresholds = np.partition(similarity, places, axis=1)[:, places]  # the K-th largest
    out = np.empty(thresholds.shape)
    for i, k in enumerate(ks):
        above = similarity > thresholds[:, i, None]
        tied = similarity == thresholds[:, i, None]
        share = (tied & right).sum(1) / tied.sum(1)
        out[:, i] = ((above & right).sum(1) + (k - above.sum(1)) * share) / k
    return out


def label_sets(labels) -> np.ndarray:
    """Number the rows [N] by their set of present classes; -1 where some class is unknown.

    Single-label rows are equal when their class is; multi-label rows when all their findings are.
    Of an uncertain finding nobody can say whether two rows share it: taken for absent, it would
    make a likely pneumonia the same as a normal image.
    """
    labels = np.asarray(labels)
    _, index = np.unique(labels == 1, axis=0, return_inverse=True)
    return np.where((labels < 0).any(1), -1, index)


def unknown_notes(query: Side) -> dict[str, int]:
    """Return how many queries have no known set of classes; {} where all have one."""
    count = int((query.kind < 0).sum())
    return {UNKNOWN: count} if count else {}


def _most_frequent(owner, kind, count: int) -> np.ndarray:
    """Return the most frequent known kind among the rows of each owner [count]; -1 if none."""
    out = np.full(count, -1)
    known = kind >= 0
    pairs, times = np.unique(np.stack([owner[known], kind[known]]), axis=1, return_counts=True)
    order = np.argsort(times, kind="stable")  # the last write is the most frequent
    out[pairs[0, order]] = pairs[1, order]
    return out


def with_text(image, text, text_ids, labels, groups) -> tuple:
    """Return the five without the rows that have no text; labels and groups may be None.

    Raises:
      UserError: for features that are not finite, or if no row has a text.
    """
    image, text, text_ids = np.asarray(image), np.asarray(text), np.asarray(text_ids)
    check_finite("image", image)
    check_finite("text", text)
    has_text = np.any(text != 0, axis=1)
    if not has_text.any():
        raise UserError(f"None of {len(text)} examples has a text to retrieve.")
    kept = (None if v is None else np.asarray(v)[has_text] for v in (labels, groups))
    return image[has_text], text[has_text], text_ids[has_text], *kept


def sides(image, text, text_ids, *, labels=None, groups=None) -> tuple[Side, Side]:
    """Return the image side [N] and the text side with one entry a distinct text_id.

    A distinct text takes the embedding and patient of its first row and its rows' most frequent
    label set.
    """
    n = len(image)
    _, first, pair = np.unique(np.asarray(text_ids), return_index=True, return_inverse=True)
    group, _ = statistics.group_index(groups, n)
    kind = np.full(n, -1) if labels is None else label_sets(labels)
    text_kind = _most_frequent(pair, kind, len(first))
    texts = Side(text[first], np.arange(len(first)), text_kind, group[first])
    return Side(image, pair, kind, group), texts


def similarity_tiles(queries, gallery, tile: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield (rows, similarity [q, G]) over the queries, float64 rounded to DECIMALS."""
    gallery = np.asarray(gallery, np.float64).T
    for start in range(0, len(queries), tile):
        rows = slice(start, start + tile)
        yield rows, np.round(np.asarray(queries[rows], np.float64) @ gallery, DECIMALS)


def search(query: Side, gallery: Side, *, pair_ks, class_ks=(), tile=256) -> dict[str, np.ndarray]:
    """Return each query's scores: rank [Q], R [Q, K] and, with class_ks, P and H [Q, K']."""
    parts: dict[str, list] = {"rank": [], "R": [], "P": [], "H": []}
    for rows, similarity in similarity_tiles(query.features, gallery.features, tile):
        rank, hit = first_right(similarity, query.pair[rows, None] == gallery.pair, pair_ks)
        parts["rank"].append(rank)
        parts["R"].append(hit)
        if class_ks:
            same = query.kind[rows, None] == gallery.kind
            parts["P"].append(precision(similarity, same, class_ks))
            parts["H"].append(first_right(similarity, same, class_ks)[1])
    return {name: np.concatenate(values) for name, values in parts.items() if values}


def top_texts(image, text, text_ids, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of the K best distinct texts for each image [q, K], and their scores [q, K].

    Args:
      image: [q, E], a few images to look at.
      text: [N, E] and text_ids [N]: the gallery, as in `run`.
      text_ids: equal for equal texts; a text is named by its first row.
      k: at most the number of distinct texts; more gives them all.
    """
    _, first = np.unique(np.asarray(text_ids), return_index=True)
    first = np.sort(first[np.any(np.asarray(text)[first] != 0, axis=1)])
    similarity = np.asarray(image, np.float64) @ np.asarray(text, np.float64)[first].T
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return first[order], np.take_along_axis(similarity, order, axis=1)


def _count_same(query_ids, gallery_ids) -> np.ndarray:
    """Return how many gallery entries have each query's id, [Q]."""
    ids, counts = np.unique(gallery_ids, return_counts=True)
    at = np.minimum(np.searchsorted(ids, query_ids), len(ids) - 1)
    return np.where(ids[at] == query_ids, counts[at], 0)


def chance_levels(query: Side, gallery: Side, *, ks, class_ks=()) -> dict[str, float]:
    """Return the exact expectation of every number under a random order of the gallery."""
    size = len(gallery.pair)
    right = _count_same(query.pair, gallery.pair)
    levels = {f"R@{k}": float(np.mean(1 - _miss(right, size - right, k))) for k in ks}
    counts, times = np.unique(right, return_counts=True)
    within = 1 - _miss(counts[:, None], size - counts[:, None], np.arange(1, size + 1))
    reached = times @ within / len(right)  # share of queries answered by rank r
    levels["median_rank"] = float(np.argmax(reached >= 0.5) + 1)
    levels["mean_rank"] = float(np.mean((size + 1) / (right + 1)))
    same = _count_same(query.kind, gallery.kind)[query.kind >= 0]
    for k in class_ks:
        levels[f"P@{k}"] = float(np.mean(same / size))
        levels[f"H@{k}"] = float(np.mean(1 - _miss(same, size - same, k)))
    return levels


def _usual(query: Side, gallery: Side) -> np.ndarray:
    """Say which queries are of the class that one answer to all would best be of, [Q]."""
    kinds, times = np.unique(query.kind[query.kind >= 0], return_counts=True)
    times = np.where(np.isin(kinds, gallery.kind), times, 0)
    return query.kind == kinds[times.argmax()] if times.any() else np.zeros(len(query.kind), bool)


def _intervals(values, rank, groups, options):
    """Bootstrap the means of `values` [Q, K] and, if given, the median of `rank` [Q]."""

    def statistic(weights):
        means = metrics.weighted_mean(values, weights)
        if rank is None:
            return means
        return np.column_stack([means, metrics.weighted_median(rank, weights)])

    found = statistics.bootstrap(statistic, len(values), groups=groups, **options)
    return list(zip(*found, strict=True))


def _direction(query: Side, gallery: Side, ks: Sequence[int], tile: int, options) -> dict:
    """Search one direction; numbers by metric name."""
    ks = [k for k in ks if k <= len(gallery.pair)]
    known = query.kind >= 0
    class_ks = ks if known.any() and (gallery.kind >= 0).any() else []
    found = search(query, gallery, pair_ks=ks, class_ks=class_ks, tile=tile)
    chance = chance_levels(query, gallery, ks=ks, class_ks=class_ks)
    columns = np.column_stack([found["R"], found["rank"]])
    names = [*(f"R@{k}" for k in ks), "mean_rank", "median_rank"]
    rows = dict(zip(names, _intervals(columns, found["rank"], query.group, options), strict=True))
    entries = {k: number(*v, n=len(query.pair), chance=chance[k]) for k, v in rows.items()}
    if class_ks:
        columns = np.column_stack([found["P"], found["H"]])[known]
        names = [f"{letter}@{k}" for letter in "PH" for k in class_ks]
        rows = zip(names, _intervals(columns, None, query.group[known], options), strict=True)
        entries |= {k: number(*v, n=int(known.sum()), chance=chance[k]) for k, v in rows}
        other = known & ~_usual(query, gallery)
        if other.any():
            rows = _intervals(found["P"][other], None, query.group[other], options)
            level = float(np.mean(_count_same(query.kind[other], gallery.kind) / len(gallery.pair)))
            how = {"n": int(other.sum()), "chance": level}
            names = (f"P@{k}/{OTHERS}" for k in class_ks)
            entries |= {k: number(*v, **how) for k, v in zip(names, rows, strict=True)}
    return entries


def run(
    image,
    text,
    text_ids,
    *,
    labels=None,
    class_task="",
    groups=None,
    ks=(1, 5, 10),
    tile=256,
    reads: Mapping[str, Any] | None = None,
    **bootstrap,
) -> Results:
    """Retrieve texts by images and images by texts.

    The intervals resample queries by patient and hold the gallery fixed: drawing gallery entries
    twice would change the difficulty. A text shared by patients belongs to the first.

    Args:
      image: [N, E] unit norm, or from `features.joint`.
      text: [N, E], row i belongs to image i; a zero row (no text) is left out with its image.
      text_ids: [N], equal for equal texts.
      labels: [N, C] int8 for P@K and H@K, -1 = unknown; "same class" is an identical set of present
        classes (see `label_sets`). None = pairs only.
      class_task: whose labels they are; a setting that the hash covers.
      groups: [N] patient of each row.
      ks: the K; those above the gallery size are dropped.
      tile: queries scored at a time; memory is about 40 tile G bytes.
      reads: which texts they are, such as the sections; settings that the hash covers.
      **bootstrap: resamples (2,000), seed, level.

    Raises:
      UserError: for features that are not finite, or if no row has a text.
    """
    total = len(image)
    image, text, text_ids, labels, groups = with_text(image, text, text_ids, labels, groups)
    images, texts = sides(image, text, text_ids, labels=labels, groups=groups)
    settings = {"ks": list(ks), "ties": "expected", "decimals": DECIMALS, **bootstrap}
    settings |= reads or {}
    settings |= {"class_task": class_task, "unknown": "left out"} if labels is not None else {}
    results: Results = {}
    for task, query, gallery in (
        ("image_to_text", images, texts),
        ("text_to_image", texts, images),
    ):
        notes = {
            "patients": len(np.unique(query.group)),
            "gallery": len(gallery.pair),
            "left_out": total - len(image),
        }
        notes |= unknown_notes(query) if labels is not None else {}
        known = query.kind >= 0
        if known.any():
            notes[ONE_ANSWER] = float(_usual(query, gallery)[known].mean())
        entries = _direction(query, gallery, ks, tile, bootstrap)
        results |= assemble(PROTOCOL, task, entries, settings=settings, notes=notes)
    return results
