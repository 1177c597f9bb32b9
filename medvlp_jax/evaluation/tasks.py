"""The three tasks of `medvlp adapt`: from a corpus to examples, a head, results and a picture.

Each has the same few methods, so that one driver runs them; what they compute is in `finetuning`,
`segmentation` and `detection`.

Axis letters: S side of the image, C classes, K regions, M boxes an image has at most.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
import scipy.special

from medvlp_jax.config import UserError, nearest
from medvlp_jax.data import regions, transforms
from medvlp_jax.data.corpora import Source
from medvlp_jax.evaluation import (
    case_tables,
    detection,
    finetuning,
    overlays,
    probe,
    provenance,
    segmentation,
    yolo,
    zero_shot,
)
from medvlp_jax.evaluation.results import Results

MOST_BOXES = 64  # of an image; more are no radiograph's


class Task:
    """What the tasks share.

    Attributes:
      name: as the user types it.
      names: of the classes or regions that the head tells apart.
      frame: how images become squares.
      head: the module to train.
      train_encoder: whether the encoder is trained unless the user says otherwise.
      lr: learning rate unless the user says otherwise, our choice.
      rotation: largest angle of a moved image, degrees; MGCA's.
    """

    name: str
    names: Sequence[str]
    frame: regions.Frame
    head: nn.Module
    train_encoder = False
    lr = 1e-3
    rotation = 10.0

    def has_target(self, record: Mapping) -> bool:
        """Say whether a record can be learnt from and scored."""
        raise NotImplementedError

    def seen(self, records: Sequence[Mapping]) -> dict[str, Any]:
        """Return who the rows are and hashes of what is said of them, see `provenance.rows`.

        Nothing of masks, which would have to be decoded once more.
        """
        return provenance.rows(*_ids(records))

    def prepare(self, record: Mapping) -> regions.Example:
        """Return the example of a record: what stays the same each time it is seen."""
        ids = {name: np.array(record[name]) for name in ("image_id", "patient_id")}
        return {"image": self.frame.image(record), **ids, **self.target(record)}

    def target(self, record: Mapping) -> regions.Example:
        """Return what is to be found in a record."""
        raise NotImplementedError

    def move(self, example: regions.Example, rng: np.random.Generator) -> regions.Example:
        """Return an example moved a little, half of the time; never mirrored: left is not right."""
        if rng.random() < 0.5:
            return example
        to_source = regions.motion(rng, self.frame.size, rotation=self.rotation)
        image = transforms.warp(example["image"], to_source)
        return {**example, "image": image, **self.moved(example, to_source)}

    def moved(self, example: regions.Example, to_source: np.ndarray) -> regions.Example:
        """Return what is to be found, moved."""
        del example, to_source
        return {}

    def value(self, found: Mapping) -> float:
        """Return the validation score; higher is better."""
        raise NotImplementedError

    def results(self, found: Mapping, train: Sequence, test: Sequence, **options: Any) -> Results:
        """Return the numbers of the test split.

        Args:
          found: what the head predicted of it.
          train: examples that were learnt from, for the picture-blind control.
          test: the examples.
          **options: fraction, settings, notes, train_encoder, resamples.
        """
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Return what the numbers that the head gives are of."""
        return {"classes": list(self.names)}

    def write(self, found: Mapping, out: Path) -> None:
        """Write what was predicted of each case, where a table can hold it."""

    def draw(self, examples: Sequence, outputs: Mapping, out_png: Path) -> None:
        """Draw a few test images with what was found in them.

        Args:
          examples: the images.
          outputs: "outputs" of the recipe's `encode`, or what it predicts: {"found": ...}.
          out_png: where the picture goes.
        """
        raise NotImplementedError


class Finetune(Task):
    """A classifier on the pooled feature, encoder and all."""

    name, train_encoder = "finetune", True

    def __init__(
        self,
        source: Source,
        frame: regions.Frame,
        *,
        labels: str = "",
        scored: Source | None = None,
        **others: Any,
    ):
        """Choose a label task.

        Args:
          source: training split.
          frame: how images become squares.
          labels: task; "" takes the first.
          scored: the split to score, whose rows may have several classes where those of training
            have one; None looks at training alone.
          **others: not read.
        """
        del others
        if not source.tasks:
            raise UserError(f"{source.name} has no labels; fine-tuning needs a corpus with some.")
        self.task = labels or next(iter(source.tasks))
        self.labels = source.labels(self.task)  # refuses an unknown one
        self.names, self.frame = source.tasks[self.task], frame
        tested = None if scored is None else scored.labels(self.task)
        self.multi_label = finetuning.is_multi_label(self.labels, tested)
        self.head = finetuning.Classifier(self.task, len(self.names), self.multi_label)

    def has_target(self, record):
        """Any class is known."""
        return bool((record["labels"][self.task] >= 0).any())

    def target(self, record):
        """The label vector [C]."""
        return {f"label/{self.task}": np.asarray(record["labels"][self.task], np.int8)}

    def seen(self, records):
        """With the labels of the task."""
        labels = [record["labels"][self.task] for record in records]
        return provenance.rows(*_ids(records), {self.task: labels})

    def value(self, found):
        """Macro AUROC."""
        return finetuning.value(found, task=self.task, multi_label=self.multi_label)

    def results(self, found, train, test, *, train_encoder, notes, **options):
        """See `finetuning`; a frozen encoder is refused before."""
        del test, train_encoder
        kind = {"task": self.task, "classes": self.names, "multi_label": self.multi_label}
        missing = probe.not_fitted(self.labels[train.rows], self.multi_label)
        notes = {**notes, "not_fitted": [self.names[c] for c in missing]}
        return finetuning.run(found, notes=notes, **kind, **options)

    def describe(self):
        """With what the user calls them, and whether an image has several."""
        return super().describe() | {"labels": self.task, "multi_label": self.multi_label}

    def write(self, found, out):
        """Probabilities, which `medvlp compare` reads."""
        labels, chances = found[f"label/{self.task}"], self._chances(found)
        if self.multi_label:
            scored = {self.task: zero_shot.PromptScores(labels, chances, self.names)}
            return case_tables.write_scores(scored, found, out)
        return case_tables.write_chances(found, labels, chances, self.names, out)

    def draw(self, examples, outputs, out_png):
        """Likely classes under each image."""
        labels = [example[f"label/{self.task}"] for example in examples]
        overlays.classes(examples, self._chances(outputs["found"]), labels, self.names, out_png)

    def _chances(self, found) -> np.ndarray:
        """Return probabilities [N, C], of rows or of cells."""
        logits = np.asarray(found["logits"], np.float64)
        return (
            scipy.special.expit(logits)
            if self.multi_label
            else scipy.special.softmax(logits, axis=-1)
        )


class Segment(Task):
    """A decoder for mask regions."""

    name = "segment"

    def __init__(
        self,
        source: Source,
        frame: regions.Frame,
        *,
        names: Sequence[str] = (),
        width: int = 0,
        **others: Any,
    ):
        """Choose regions: names of mask bits, or unions "a+b"; () takes each bit."""
        del others
        bits = source.metadata["mask_bits"]
        self.names = [*names] or [*bits]
        self.bits, self.frame = regions.bits_of(self.names, bits, source.name), frame
        widths = tuple(max(width >> i, 8) for i in range(5)) if width else ()
        self.head = segmentation.Segmenter(len(self.bits), widths)

    def has_target(self, record):
        """It was stored with a mask, be it an empty one."""
        return regions.has_mask(record)

    def target(self, record):
        """The mask [S, S, K]."""
        return {"mask": self.frame.mask(record, self.bits)}

    def moved(self, example, to_source):
        """The mask under the same move."""
        return {"mask": regions.move_mask(example["mask"], to_source)}

    def value(self, found):
        """Dice."""
        return segmentation.value(found)

    def results(self, found, train, test, **options):
        """See `segmentation`."""
        blind = segmentation.blind([example["mask"] for example in train])
        counted = [segmentation.counts(blind[None], example["mask"][None]) for example in test]
        control = {k: np.concatenate([c[k] for c in counted]) for k in counted[0]}
        return segmentation.run(found, control, self.names, **options)

    def draw(self, examples, outputs, out_png):
        """Outlines of both."""
        predicted = np.asarray(outputs["outputs"]) > 0
        overlays.outlines(examples, predicted, self.names, out_png)


class Detect(Task):
    """YOLOv3 heads for boxes."""

    name = "detect"
    rotation = 0.0  # the upright box around a turned one is too large

    def __init__(
        self,
        source: Source,
        frame: regions.Frame,
        *,
        names: Sequence[str] = (),
        width: int = 0,
        category: Callable[[str], str] = str,
        annotated_only: bool = False,
        **others: Any,
    ):
        """Choose classes.

        Args:
          source: training split.
          frame: how images become squares.
          names: categories of boxes; () takes all that occur.
          width: of the finest neck; 0 takes yolo's.
          category: of a phrase, where boxes have none of their own.
          annotated_only: leave images without a box out, where nobody looked for any.
          **others: not read.
        """
        del others
        self.category, self.annotated_only, self.frame = category, annotated_only, frame
        records = (source[row] for row in range(len(source)))
        seen = {kind for record in records for kind in self.kinds(record)}
        if not seen:
            raise UserError(f"{source.name} has no boxes; detection needs a corpus with some.")
        for name in names:
            if name not in seen:
                raise UserError(
                    f"{source.name} has no box of '{name}'. {nearest(name, sorted(seen))}"
                )
        self.names = [*names] or sorted(seen)
        self.head = yolo.Detector(len(self.names), width or yolo.Detector.width)
        self.most = MOST_BOXES

    def kinds(self, record) -> list[str]:
        """Return the category of each box of a record."""
        boxes = record["boxes"]
        return boxes.get("category") or [self.category(phrase) for phrase in boxes["phrase"]]

    def seen(self, records):
        """With all boxes, of whatever category."""
        return super().seen(records) | {"boxes": provenance.boxes(records)}

    def has_target(self, record):
        """It has a box, where only such images count."""
        return not self.annotated_only or bool({*self.kinds(record)} & {*self.names})

    def target(self, record):
        """The boxes [M, 4] and their classes [M], -1 where there are fewer."""
        at = {name: k for k, name in enumerate(self.names)}
        kinds = np.array([at.get(kind, -1) for kind in self.kinds(record)], np.int32)
        boxes = self.frame.boxes(record)[kinds >= 0]
        return self._padded(boxes, kinds[kinds >= 0])

    def moved(self, example, to_source):
        """The boxes that can still be seen."""
        real = example["kinds"] >= 0
        boxes = example["boxes"][real].astype(np.float64)
        boxes, seen = regions.move_boxes(boxes, to_source, self.frame.size)
        return self._padded(boxes[seen], example["kinds"][real][seen])

    def _padded(self, boxes, kinds):
        if len(boxes) > self.most:
            raise UserError(f"An image has {len(boxes)} boxes; at most {self.most} are accepted.")
        empty = self.most - len(boxes)
        return {
            "boxes": np.pad(boxes.astype(np.float32), ((0, empty), (0, 0))),
            "kinds": np.pad(kinds.astype(np.int32), (0, empty), constant_values=-1),
        }

    def value(self, found):
        """AP at IoU .5."""
        return detection.value(found)

    def results(self, found, train, test, **options):
        """See `detection`."""
        del test
        stacked = {k: np.stack([example[k] for example in train]) for k in ("boxes", "kinds")}
        true = {f"true_{k}": v for k, v in stacked.items()}
        control = detection.blind(detection.truth(true), len(self.names))
        return detection.run(found, control, self.names, **options)

    def draw(self, examples, outputs, out_png):
        """Boxes of both."""
        found = detection.predictions(outputs["found"])
        true = detection.truth(outputs["found"])
        overlays.boxes(examples, found, true, self.names, out_png)


TASKS: dict[str, Callable[..., Task]] = {t.name: t for t in (Finetune, Segment, Detect)}


def scan(task: Task, source: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of a split that have a target [n], and the patient of each [n]."""
    rows, patients = [], []
    for row in range(len(source)):
        record = source[row]
        if task.has_target(record):
            rows.append(row)
            patients.append(record["patient_id"])
    return np.array(rows, int), np.array(patients)


def shown(examples: Sequence, task: Task, count: int = 8) -> list[int]:
    """Return test images to draw: at random, those with something to find first."""
    order = np.random.default_rng(0).permutation(len(examples))
    is_empty = functools.partial(_is_empty, task)
    return sorted(map(int, order), key=lambda i: is_empty(examples[i]))[:count]


def _ids(records):
    return [[record[key] for record in records] for key in ("image_id", "patient_id")]


def _is_empty(task, example):
    if task.name == "detect":
        return not (example["kinds"] >= 0).any()
    return task.name == "segment" and not example["mask"].any()
