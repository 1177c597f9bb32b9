"""What the builders of published image and report corpora share.

A builder says in `samples` which image each row of its tables names, with its labels, texts and
regions. What happens then is the same for all: named skip lists are taken off and counted, images
are read, resized and encoded by several threads in a fixed order, pixels become fractions.

Any variant can be had pre-resized: `frontal-512` holds the images of `frontal` with a shorter side
of 512 pixels.
"""

import collections
import csv
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from medvlp_jax.config import UserError
from medvlp_jax.data import beam, files, images, masks, records
from medvlp_jax.writing import replaced

SPLITS = ("train", "validation", "test")
# The user's own skip list in a source folder; `medvlp data check --write-skip-list` makes one.
SKIP_LIST = "skip_list.csv"
MIN_SIDE, MAX_SIDE = 32, 4096
OWN_NAME = re.compile(r"\w[\w.-]{0,59}")
NO_IMAGE = images.Encoded(records.empty_image(), (16, 16))


class Sample(NamedTuple):
    """One record to be, before its image is read.

    Attributes:
      row: the table row it comes from, for errors.
      path: of the image; None for a text alone.
      split: "train", "validation" or "test".
      image_id, patient_id, study_id: as in `records.record`.
      sections: (findings, impression), or a function that reads them.
      labels: int8 vector per task.
      boxes: ((xmin, ymin, xmax, ymax) in pixels of the source, phrase).
      categories: of each box, where the corpus has CATEGORIES.
      mask: (height, width) -> uint8 bit field of the source's size.
      images: path of each further image of a case.
      table: float per column, NaN = missing.
    """

    row: files.Row
    path: Path | None
    split: str
    image_id: str
    patient_id: str
    study_id: str
    sections: tuple[str, str] | Callable[[], tuple[str, str]] = ("", "")
    labels: Mapping[str, np.ndarray] = {}
    boxes: Sequence[tuple[masks.Box, str]] = ()
    categories: Sequence[str] = ()
    mask: Callable[[masks.Shape], np.ndarray] | None = None
    images: Mapping[str, Path] = {}
    table: Mapping[str, float] = {}


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Base of the builders; a corpus says what is below and `samples`.

    Attributes:
      VARIANTS: description by name, the default first.
      MASK_BITS: see `records.metadata`.
      CATEGORIES: whether boxes have a category beside their phrase.
      PUBLISHED: number of images by name of what is counted, as the source states it.
      channels: of the images, 1 grey or 3.
      on_beam: whether Apache Beam reads the images.
    """

    VERSION = tfds.core.Version("1.0.0")
    RESIZABLE = True
    VARIANTS: Mapping[str, str] = {}
    MASK_BITS: Mapping[str, int] = {}
    CATEGORIES = False
    PUBLISHED: Mapping[str, int] = {}
    channels = 1
    on_beam = False

    def __init_subclass__(cls, **options: Any):
        cls.BUILDER_CONFIGS = [
            tfds.core.BuilderConfig(name=name, description=text)
            for name, text in cls.VARIANTS.items()
        ]
        super().__init_subclass__(**options)

    @property
    def variant(self) -> str:
        """The variant without the size."""
        return split_size(self.builder_config.name)[0]

    @property
    def side(self) -> int:
        """The shorter side of the images in pixels; 0 for those of the source."""
        return split_size(self.builder_config.name)[1]

    def tasks(self) -> Mapping[str, Sequence[str]]:
        """Return the class names of every label task of this variant."""
        return {}

    def texts(self) -> Sequence[str]:
        """Return which of "findings" and "impressions" a check counts even where there are none."""
        return ()

    def samples(self, folder: Path) -> Iterable[Sample]:
        """Read the tables of a source folder; no image is opened.

        Rows that the variant leaves out are counted by `left_out`, those that lack something by
        `noted`.

        Raises:
          UserError: for the first defect of a table.
        """
        raise NotImplementedError

    def left_out(self, reason: str, count: int = 1) -> None:
        """Count rows that are not in this variant; the counts are stored with the records."""
        counts = self.info.metadata.setdefault("left_out", {})
        counts[reason] = counts.get(reason, 0) + count

    def noted(self, what: str) -> None:
        """Count a row that is kept and lacks something, such as "without a text"; stored, too."""
        counts = self.info.metadata.setdefault("noted", {})
        counts[what] = counts.get(what, 0) + 1

    def skip_lists(self) -> Mapping[str, Sequence[str]]:
        """Return image ids known to be unusable, by the name of the list."""
        return {}

    def kept(self, folder: Path) -> list[Sample]:
        """Return the samples that are on no skip list.

        How many patients are in more than one split is stored as `torn_patients`.

        Raises:
          UserError: as `samples`, for an image id that stands twice in a split, or a skip list that
            names unknown images.
        """
        self.info.metadata["left_out"], self.info.metadata["noted"] = {}, {}
        lists = dict(self.skip_lists()) | read_skip_list(folder)
        skipped = {name: {*ids} for name, ids in lists.items()}
        kept, seen = [], {}
        for sample in self.samples(folder):
            first = seen.setdefault((sample.split, sample.image_id), sample.row)
            if first is not sample.row:
                raise sample.row.error(
                    f"image {sample.image_id} is also in {first.path.name} row {first.number}; "
                    "an image is one record."
                )
            name = next((n for n, ids in skipped.items() if sample.image_id in ids), "")
            if name:
                self.left_out(f"skip list {name}")
            else:
                kept.append(sample)
        if unknown := {*lists.get(SKIP_LIST, ())} - {image for _, image in seen}:
            raise UserError(
                f"{folder / SKIP_LIST} names {len(unknown)} images that {self.name} "
                f"({self.variant}) does not have, such as {min(unknown)}."
            )
        if not kept:
            raise UserError(f"{folder} holds nothing for {self.name} ({self.variant}).")
        self.info.metadata["torn_patients"] = count_torn(kept)
        return kept

    def to_record(self, sample: Sample) -> dict[str, Any]:
        """Read the image of a sample and return the record.

        Raises:
          UserError: with file and row, for an image that is missing or damaged, or a region that
            does not fit it.
        """
        load = lambda path: images.load(path, side=self.side, channels=self.channels)
        try:
            image = NO_IMAGE if sample.path is None else load(sample.path)
            further = {name: load(path).content for name, path in sample.images.items()}
            boxes = [(masks.fractions(b, image.shape), words) for b, words in sample.boxes]
            mask = b""
            if sample.mask is not None:
                field = images.resize_mask(sample.mask(image.shape), self.side)
                mask = records.encode_mask(field)
        except UserError as error:
            raise sample.row.error(str(error)) from error
        sections = sample.sections
        findings, impression = sections() if callable(sections) else sections
        return records.record(
            image=image.content,
            image_id=sample.image_id,
            patient_id=sample.patient_id,
            study_id=sample.study_id,
            findings=findings,
            impression=impression,
            labels=sample.labels,
            boxes=boxes,
            categories=sample.categories,
            mask=mask,
            images=further,
            table=sample.table,
        )

    def _info(self) -> tfds.core.DatasetInfo:
        tasks = self.tasks()
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=records.features(tasks=tasks, categories=self.CATEGORIES),
            metadata=records.metadata(tasks=tasks, mask_bits=self.MASK_BITS),
        )

    def _split_generators(self, dl_manager):
        folder = Path(dl_manager.manual_dir)
        found = collections.defaultdict(list)
        for sample in self.kept(folder):
            found[sample.split].append(sample)
        if self.on_beam:
            counts = {split: len(found[split]) for split in SPLITS if found[split]}
            return {split: beam.examples(self, folder, split, n) for split, n in counts.items()}
        return {split: self._generate_examples(found[split]) for split in SPLITS if found[split]}

    def _generate_examples(self, samples: list[Sample]) -> Iterator:
        made = in_order(self.to_record, samples)
        for sample, record in zip(samples, made, strict=True):
            yield sample.image_id, record


def count_torn(samples: Iterable[Sample]) -> int:
    """Return how many patients are in more than one split, as some published splits have them."""
    splits = collections.defaultdict(set)
    for sample in samples:
        splits[sample.patient_id].add(sample.split)
    return sum(len(found) > 1 for found in splits.values())


def kept_lines(noted: Mapping[str, int]) -> Iterator[str]:
    """Yield a line on each lack that `Builder.noted` counted."""
    yield from (f"kept: {count:,} rows {what}" for what, count in noted.items())


def torn_line(count: int) -> str:
    """Return a sentence on patients in more than one split; "" for none."""
    return f"WARNING: {count:,} patients are in more than one split." if count else ""


def split_size(name: str) -> tuple[str, int]:
    """Return (variant, side) of "frontal-512"; side 0 where the name has none.

    Raises:
      UserError: for a side that nobody can mean.
    """
    variant, dash, side = name.rpartition("-")
    if not (dash and side.isascii() and side.isdecimal()):
        return name, 0
    if not (len(side) < 5 and MIN_SIDE <= int(side) <= MAX_SIDE):
        raise UserError(
            f"'{name}' asks for images of {side} pixels; accepted are {MIN_SIDE} to {MAX_SIDE}."
        )
    return variant, int(side)


def check_own_name(name: str) -> None:
    """Refuse a name of a corpus of the user's own that is none of a folder.

    Raises:
      UserError: saying what is accepted.
    """
    if not OWN_NAME.fullmatch(name):
        raise UserError(
            f"'{name[:80]}' cannot name a corpus; accepted are up to 60 letters, digits, _, . and "
            "-, of which the first is a letter, a digit or _."
        )


def threads() -> int:
    """Return how many threads read images: $MEDVLP_DATA_THREADS, or one a core and one to wait."""
    return int(os.environ.get("MEDVLP_DATA_THREADS") or (os.cpu_count() or 1) + 1)


def in_order(function: Callable, items: Iterable, *, count: int = 0) -> Iterator:
    """Yield function(item) of every item in order, made by `count` threads a little ahead.

    What the function raises is raised here, and what has not begun by then never does.
    """
    count = count or threads()
    source = iter(items)
    pending: collections.deque = collections.deque()
    with ThreadPoolExecutor(count, thread_name_prefix="medvlp-data") as pool:
        try:
            for item in itertools.islice(source, 4 * count):
                pending.append(pool.submit(function, item))
            while pending:
                result = pending.popleft().result()
                for item in itertools.islice(source, 1):
                    pending.append(pool.submit(function, item))
                yield result
        finally:
            for future in pending:
                future.cancel()


def read_skip_list(folder: Path) -> dict[str, list[str]]:
    """Return the user's skip list of a source folder by its name; nothing where there is none.

    Raises:
      UserError: for a list that is no CSV with image_id and reason, or an image without a reason.
    """
    path = folder / SKIP_LIST
    if not path.is_file():
        return {}
    columns = ("image_id", "reason")
    rows = files.read_rows(path, columns=columns, filled=columns, unique="image_id")
    return {SKIP_LIST: [row["image_id"] for row in rows]}


def write_skip_list(path: Path, entries: Iterable[tuple[str, str]]) -> None:
    """Write (image_id, reason) as a skip list, whole or not at all."""
    with replaced(path) as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("image_id", "reason"))
        writer.writerows(entries)


def first_found(folder: Path, candidates: Sequence[str]) -> str:
    """Return the first of several paths that exists in the folder, or the first of all."""
    return next((name for name in candidates if (folder / name).exists()), candidates[0])
