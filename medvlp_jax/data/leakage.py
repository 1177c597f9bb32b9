"""What two corpora share: by where their images come from, and by what their records hold.

RSNA, SIIM-ACR and part of COVIDx are NIH's images under other names; MS-CXR is a part of MIMIC-CXR;
CheXpert Plus is CheXpert. A model pretrained on one has seen the other's test images. Ids do not
tell, because the challenges renamed the files; ORIGINS does, and fingerprints of the images do.
"""

import collections
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from medvlp_jax.data import building, corpora, dicom
from medvlp_jax.data.corpora import Source

# Where the images of a corpus come from; one that is not here is its own origin.
ORIGINS: Mapping[str, tuple[str, ...]] = {
    "nih_cxr14": ("NIH ChestX-ray14",),
    "rsna_pneumonia": ("NIH ChestX-ray14",),
    "siim_acr": ("NIH ChestX-ray14",),
    "covidx": ("NIH ChestX-ray14", "covid-chestxray-dataset"),
    "cxr_pairs": ("covid-chestxray-dataset",),
    "mimic_cxr": ("MIMIC-CXR",),
    "ms_cxr": ("MIMIC-CXR",),
    "chexpert": ("CheXpert",),
    "chexpert_plus": ("CheXpert",),
    "vindr_cxr": ("VinDr-CXR",),
    "vinbigdata": ("VinDr-CXR",),
    "ham10000": ("HAM10000",),
    "isic2018": ("HAM10000",),
    "isic2019": ("HAM10000",),
    "roco": ("ROCO",),
    "rocov2": ("ROCO",),
}
# Made so that no patient is in both.
APART = ({"chexpert:train_without_5x200", "chexpert:5x200"},)
SIDE, BANDS = 16, 8
# Of 256 bits; a radiograph and its copy in another size and compression differ in fewer.
MOST_DIFFERENT = 12
OWN = "csv_folder"
DOUBT = " (by name: in two folders of your own the same ones, or chance)"


class Shared(NamedTuple):
    """What two splits share."""

    images: int
    patients: int
    texts: int
    alike: int | None = None


def origins(name: str) -> set[str]:
    """Return where the images of a corpus come from; a variant counts as its corpus.

    But for folders of the user's own, whose variants are names of different ones.
    """
    corpus = name.partition(":")[0]
    if corpus == OWN:
        return {name}
    return {*ORIGINS.get(corpus, (corpus,))}


def warning(trained: Iterable[str], tested: str) -> str:
    """Return a sentence where a corpus to test on has images of one that was trained on; else "".

    The same corpus under the same variant is no leak: its splits are apart.
    """
    found = []
    for name in dict.fromkeys(trained):
        common = origins(name) & origins(tested)
        both = {unsized(name), unsized(tested)}
        if common and len(both) == 2 and both not in APART:
            found.append(f"{name} ({', '.join(sorted(common))})")
    if not found:
        return ""
    return (
        f"leakage: {tested} shares images or patients with what was trained on: "
        f"{'; '.join(found)}. `medvlp data leakage` counts them; a number on it is no held-out one."
    )


def torn_patients(source: Source, *, dealt: Mapping) -> int:
    """Return how many patients are in more than one split of a corpus.

    Args:
      source: one of its splits.
      dealt: arguments of `folds.open_fold`; what is dealt anew has other splits than the corpus.
    """
    return 0 if dealt else int(source.metadata.get("torn_patients", 0))


def torn(name: str, count: int) -> str:
    """Return a sentence where patients of a corpus are in more than one of its splits; else "".

    Args:
      name: of the corpus.
      count: of these patients.
    """
    if not count:
        return ""
    return (
        f"leakage: {count:,} patients of {name} are in more than one of its splits: what learns "
        "from one of them, such as a probe, has no held-out number on another."
    )


def unsized(name: str) -> str:
    """Return corpus and variant, without the size of the images, which moves nothing."""
    corpus, _, variant = name.partition(":")
    kept = variant if corpus == OWN else building.split_size(variant)[0]
    return f"{corpus}:{kept or corpora.default_variant(corpus)}"


def comparable(first: str, second: str) -> bool:
    """Say whether equal ids of two corpora mean anything: "1" is a patient in many of them.

    They do where the images have an origin in common, and may in two folders of the user's own.
    """
    return _both_own(first, second) or bool(origins(first) & origins(second))


def _both_own(first: str, second: str) -> bool:
    return all(name.partition(":")[0] == OWN for name in (first, second))


def _named(source: Source) -> str:
    """Return the name of a prepared corpus, with its variant where it has any."""
    variant = source.folder.parent  # or the corpus itself, which lies in the data folder
    return source.name if variant.name == source.name else f"{source.name}:{variant.name}"


def measure(first: Source, second: Source, *, look: bool = False) -> Shared:
    """Count the records of `second` that share something with `first`.

    Patients and ids are compared only where they are `comparable`.

    Args:
      first: what is trained on.
      second: what is tested on.
      look: compare the pictures, too.
    """
    related = comparable(_named(first), _named(second))
    keys = ("image_id", "patient_id", "text_id")
    known = {key: {entry[key] for entry in _entries(first)} for key in keys}
    count = collections.Counter()
    for entry in _entries(second):
        has_text = bool(entry["findings"] or entry["impression"])
        count["texts"] += has_text and entry["text_id"] in known["text_id"]
        count["images"] += related and entry["image_id"] in known["image_id"]
        count["patients"] += related and entry["patient_id"] in known["patient_id"]
    alike = count_alike(first, second) if look else None
    return Shared(count["images"], count["patients"], count["texts"], alike)


def count_alike(first: Source, second: Source) -> int:
    """Count the images of `second` that look like one of `first`: fingerprints nearly equal."""
    known, seen = (np.stack(list(_fingerprints(source))) for source in (first, second))
    # Two prints with at most MOST_DIFFERENT bits apart need not share a band, but copies do.
    bands: dict[tuple[int, bytes], list[int]] = {}
    for k, row in enumerate(known):
        for band, part in enumerate(np.split(row, BANDS)):
            bands.setdefault((band, part.tobytes()), []).append(k)
    count = 0
    for row in seen:
        candidates = {
            k
            for band, part in enumerate(np.split(row, BANDS))
            for k in bands.get((band, part.tobytes()), ())
        }
        different = np.bitwise_count(known[sorted(candidates)] ^ row).sum(-1)
        count += bool((different <= MOST_DIFFERENT).any())
    return count


def fingerprint(encoded: bytes) -> np.ndarray:
    """Return 256 bits as uint8 [32]: whether each of 16 x 16 places is brighter than the next."""
    with Image.open(io.BytesIO(encoded)) as image:
        image.draft("L", (4 * SIDE, 4 * SIDE))
        small = dicom.upright(image).convert("L").resize((SIDE + 1, SIDE), Image.Resampling.BOX)
    pixels = np.asarray(small, np.int16)
    return np.packbits(pixels[:, 1:] > pixels[:, :-1])


def _entries(source: Source) -> Iterable[Mapping]:
    return (source[k] for k in range(len(source)))


def _fingerprints(source: Source) -> Iterable[np.ndarray]:
    return building.in_order(lambda k: fingerprint(source[k]["image"]), range(len(source)))


def table(first: Sequence[Source], second: Sequence[Source], *, look: bool = False) -> list[str]:
    """Return a line for every pair of splits that shares something."""
    lines = []
    for a in first:
        for b in second:
            if a.name == b.name and a.split == b.split and a.folder == b.folder:
                continue
            shared = measure(a, b, look=look)
            counts = ", ".join(f"{n:,} {what}" for what, n in shared._asdict().items() if n)
            if counts:
                doubt = _both_own(_named(a), _named(b)) and a.folder != b.folder
                lines.append(
                    f"{_named(b)} {b.split} ({len(b):,} records) shares with {_named(a)} {a.split}:"
                    f" {counts}" + DOUBT * (doubt and bool(shared.images or shared.patients))
                )
    return lines
