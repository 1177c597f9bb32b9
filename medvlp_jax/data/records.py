"""The record every corpus is stored as: one schema, which recipes and evaluation read alike.

Image and mask stay encoded bytes (JPEG, PNG) from the source file to the training pipeline, which
decodes them grey and at reduced scale. Boxes are (ymin, xmin, ymax, xmax) as fractions of the
image. A missing text section is "". A label is 1 present, 0 absent, -1 unknown. A missing table
value is NaN. A set without masks stores a 1x1 zero PNG and names no mask bits; a text without an
image has a black one. A box may have a category besides its phrase.

A case with several images names the further ones in its metadata, each with what it is:
{} another encoded image, {"slices": S} a volume (see `encode_volume`), or {"channel": c} a channel
of `image`, for which nothing more is stored.
"""

import functools
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

SCHEMA_VERSION = 1

TEXT_KEYS = ("image_id", "patient_id", "study_id", "text_id", "findings", "impression")

PRESENT, ABSENT, UNKNOWN = 1, 0, -1

Images = Mapping[str, Mapping[str, int]]


def stored(images: Images | None) -> list[str]:
    """Return the names of the further images that a record holds as bytes of their own."""
    return [name for name, spec in (images or {}).items() if "channel" not in spec]


def features(
    *,
    tasks: Mapping[str, Sequence[str]],
    table: Iterable[str] | None = None,
    channels: int = 1,
    images: Images | None = None,
    categories: bool = False,
) -> tfds.features.FeaturesDict:
    """Return the features of a corpus.

    Args:
      tasks: class names of every label task; no task leaves the key `labels` out.
      table: column names of the patient table; None or empty leaves the key `table` out.
      channels: of the image, 1 grey or 3.
      images: further images of a case.
      categories: True where boxes have one.
    """
    text = tfds.features.Text
    box = {"bbox": tfds.features.BBoxFeature(), "phrase": text()}
    box |= {"category": text()} if categories else {}
    entries = {
        "image": tfds.features.Image(shape=(None, None, channels), encoding_format="jpeg"),
        "mask": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
        **{key: text() for key in TEXT_KEYS},
        "boxes": tfds.features.Sequence(box),
    }
    if tasks:
        entries["labels"] = {
            task: tfds.features.Tensor(shape=(len(classes),), dtype=np.int8)
            for task, classes in tasks.items()
        }
    if table:
        entries["table"] = {column: tfds.features.Scalar(np.float32) for column in table}
    if names := stored(images):
        # Plain bytes: a volume is a 16-bit PNG, another photograph a JPEG.
        entries["images"] = {name: text() for name in names}
    return tfds.features.FeaturesDict(entries)


def metadata(
    *,
    tasks: Mapping[str, Sequence[str]],
    mask_bits: Mapping[str, int] | None = None,
    table: Mapping[str, Mapping[str, Any]] | None = None,
    images: Images | None = None,
    generated: bool = False,
) -> tfds.core.MetadataDict:
    """Return what a reader has to know beyond the features; TFDS stores it beside the records.

    Args:
      tasks: class names of every label task, in the order of the label vector.
      mask_bits: the bit (0..7) of each named region in the mask's uint8 bit field.
      table: per column {"unit": ...} or {"categories": [...]}.
      images: further images of a case.
      generated: True where the corpus is synthesised, so that no source folder is needed.
    """
    return tfds.core.MetadataDict(
        tasks={task: list(classes) for task, classes in tasks.items()},
        mask_bits=dict(mask_bits or {}),
        table={column: dict(spec) for column, spec in (table or {}).items()},
        images={name: dict(spec) for name, spec in (images or {}).items()},
        generated=generated,
        schema_version=SCHEMA_VERSION,
    )


def text_id(findings: str, impression: str) -> str:
    """Return 16 hex digits that are equal exactly where both texts are equal."""
    # The unit separator keeps ("a b", "") apart from ("a", " b").
    return hashlib.sha256(f"{findings}\x1f{impression}".encode()).hexdigest()[:16]


def one_hot(name: str, classes: Sequence[str]) -> np.ndarray:
    """Return the int8 label vector of a single-label task; all UNKNOWN where `name` is ""."""
    if not name:
        return unknown(classes)
    label = np.zeros(len(classes), np.int8)
    label[classes.index(name)] = PRESENT
    return label


def unknown(classes: Sequence[str]) -> np.ndarray:
    """Return an int8 label vector that says nothing about any class."""
    return np.full(len(classes), UNKNOWN, np.int8)


def encode_mask(mask: np.ndarray) -> bytes:
    """Return a uint8 bit field [H, W] as PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(mask, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def encode_volume(volume: np.ndarray) -> bytes:
    """Return a uint16 volume [H, W, S] as one 16-bit PNG, its slices one below the other."""
    column = np.moveaxis(np.asarray(volume, np.uint16), -1, 0).reshape(-1, volume.shape[1])
    buffer = io.BytesIO()
    Image.fromarray(column).save(buffer, "PNG")
    return buffer.getvalue()


@functools.cache
def empty_mask() -> bytes:
    """Return the 1x1 zero PNG that stands for "no mask"."""
    return encode_mask(np.zeros((1, 1), np.uint8))


@functools.cache
def empty_image() -> bytes:
    """Return the black JPEG that stands for "no image"."""
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def record(
    *,
    image: bytes,
    image_id: str,
    patient_id: str,
    study_id: str,
    findings: str = "",
    impression: str = "",
    labels: Mapping[str, np.ndarray] | None = None,
    boxes: Sequence[tuple[tuple[float, float, float, float], str]] = (),
    categories: Sequence[str] = (),
    mask: bytes = b"",
    table: Mapping[str, float] | None = None,
    images: Mapping[str, bytes] | None = None,
) -> dict[str, Any]:
    """Return one record as a TFDS builder yields it.

    Args:
      image: encoded JPEG.
      image_id: unique within the corpus; also the key of the record.
      patient_id: equal for images that must not be separated by a split.
      study_id: equal for images taken together.
      findings: the report's description, "" where missing.
      impression: the report's conclusion, "" where missing.
      labels: int8 vector per task, see `one_hot`; leave out where the corpus has no task.
      boxes: ((ymin, xmin, ymax, xmax), phrase), fractions of the image in [0, 1].
      categories: of each box; leave out where the corpus has none.
      mask: encoded PNG bit field, see `encode_mask`; empty for none.
      table: float per column, NaN = missing; leave out where the corpus has no table.
      images: encoded further images by name; leave out where the corpus has none.
    """
    entry = {
        # TFDS stores the bytes of a file object as they are and would re-encode an array.
        "image": io.BytesIO(image),
        "mask": io.BytesIO(mask or empty_mask()),
        "image_id": image_id,
        "patient_id": patient_id,
        "study_id": study_id,
        "text_id": text_id(findings, impression),
        "findings": findings,
        "impression": impression,
        "boxes": [
            {"bbox": tfds.features.BBox(*map(float, box)), "phrase": phrase}
            for box, phrase in boxes
        ],
    }
    if categories:
        for box, category in zip(entry["boxes"], categories, strict=True):
            box["category"] = category
    if labels:
        entry["labels"] = dict(labels)
    if table:
        entry["table"] = {column: np.float32(value) for column, value in table.items()}
    if images:
        entry["images"] = dict(images)
    return entry


def parse(serialised: bytes, info: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record in a tf.train.Example as TFDS writes it.

    The same as TFDS's own reader with SkipDecoding, but texts are str and it takes a quarter of the
    time, which counts in a pipeline of threads because it holds the interpreter lock.

    Args:
      serialised: one entry of an array_record file.
      info: what `metadata` stored with the corpus.

    Returns:
      image, mask: bytes; texts: str; boxes: {"bbox": float32 [n, 4], "phrase": n str}, and
      "category" where they have one; labels: {task: int8 [C]}, table: {column: float} and images:
      {name: bytes} where the corpus has them.
    """
    features = tf_example_pb2.Example.FromString(serialised).features.feature
    entry: dict[str, Any] = {key: features[key].bytes_list.value[0] for key in ("image", "mask")}
    for key in TEXT_KEYS:
        entry[key] = features[key].bytes_list.value[0].decode()
    boxes = np.array(features["boxes/bbox"].float_list.value, np.float32).reshape(-1, 4)
    phrases = [phrase.decode() for phrase in features["boxes/phrase"].bytes_list.value]
    entry["boxes"] = {"bbox": boxes, "phrase": phrases}
    if kinds := features["boxes/category"].bytes_list.value:
        entry["boxes"]["category"] = [kind.decode() for kind in kinds]
    if tasks := info["tasks"]:
        entry["labels"] = {
            task: np.array(features[f"labels/{task}"].int64_list.value, np.int8) for task in tasks
        }
    if table := info["table"]:
        entry["table"] = {
            column: features[f"table/{column}"].float_list.value[0] for column in table
        }
    # Corpora that were prepared before there were further images do not say that they have none.
    if names := stored(info.get("images")):
        entry["images"] = {name: features[f"images/{name}"].bytes_list.value[0] for name in names}
    return entry
