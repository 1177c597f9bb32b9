"""Two scans of one patient, for the two views of PRIMA: different ones where there are several.

Wang et al. 2026, https://arxiv.org/abs/2602.23297, section "risk-integrated alignment": "two
distinct scans if they exist, else the single scan duplicated", each then augmented on its own.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from medvlp_jax.config import UserError, nearest
from medvlp_jax.data import studies
from medvlp_jax.data.corpora import Source

KEYS = ("", "study_id", "patient_id")

Pair = Callable[[Mapping[str, Any], np.random.Generator], tuple[np.ndarray, np.ndarray]]


def siblings(
    sources: Sequence[Source], key: str, decode: Callable[[bytes], np.ndarray], task: str = ""
) -> Pair:
    """Return (record, rng) -> its image and another image of the same study or patient.

    Args:
      sources: where the others are looked for: those of the training split.
      key: "study_id" or "patient_id", what two scans share; "" takes the same image twice.
      decode: encoded bytes -> image.
      task: whose classes two scans of a study have in common; "" does not ask.

    Raises:
      UserError: for another key, or one by which records of several sources are equal: "1" may be
        another patient in each; or for a study with images of several classes.
    """
    if key not in KEYS:
        raise UserError(f"data.siblings is '{key}'. {nearest(key, KEYS[1:])}")
    places: dict[str, list[tuple[int, int, str]]] = {}
    if key:
        for k, source in enumerate(sources):
            for row in range(len(source)):
                record = source[row]
                places.setdefault(record[key], []).append((k, row, record["image_id"]))
        _check_apart(places, sources, key)
    if key == "study_id":
        for source in (source for source in sources if task in source.tasks):
            ids, labels = zip(*((r[key], r["labels"][task]) for r in source), strict=True)
            where, remedy = f"data.siblings={key}", "data.siblings= (empty)"
            studies.labelled_rows(ids, np.array(labels), where, remedy)

    def pair(record, rng):
        image = decode(record["image"])
        there = places.get(record.get(key, ""), ())
        others = [place for place in there if place[2] != record["image_id"]]
        if not others:
            return image, image
        k, row, _ = others[rng.integers(len(others))]
        return image, decode(sources[k][row]["image"])

    return pair


def _check_apart(places: Mapping[str, list[tuple]], sources: Sequence[Source], key: str) -> None:
    """Refuse a key by which scans of one source would pair with those of another."""
    of = [{k for k, *_ in there} for there in places.values()]
    both = [found for found in of if len(found) > 1]
    if both:
        names = " and ".join(f"{sources[k].name} ({k + 1})" for k in sorted(both[0]))
        raise UserError(
            f"data.siblings={key}: corpora {names} of data.corpora have {len(both)} values of "
            f"{key} in common, which may be different people; accepted are corpora that have none "
            "in common, or data.siblings= (empty)."
        )


def image_of(
    record: Mapping[str, Any],
    name: str,
    spec: Mapping[str, Any],
    decode: Callable[[bytes], np.ndarray],
) -> np.ndarray:
    """Return one image of a record, decoded: "image" itself, a channel of it, or a further one.

    Args:
      record: of a corpus.
      name: batch key.
      spec: what `records.Images` says of it; {} for "image".
      decode: encoded bytes -> image [H, W, C].
    """
    if "channel" in spec:
        return decode(record["image"])[..., spec["channel"] : spec["channel"] + 1]
    return decode(record["image"] if name == "image" else record["images"][name])


def modalities(readers: Mapping[str, Callable[[Mapping[str, Any]], np.ndarray]]) -> Pair:
    """Return (record, rng) -> two different modalities of a record, drawn anew each time.

    Args:
      readers: by name, record -> image; at least two.
    """
    names = list(readers)

    def pair(record, rng):
        first, second = rng.choice(len(names), 2, replace=False)
        return readers[names[first]](record), readers[names[second]](record)

    return pair
