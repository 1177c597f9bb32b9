"""From records to batches with Grain: the order and all randomness are a function of (seed, step).

Element g = step * B + i of the training stream (B the global batch) depends on the seed and g
alone. Process p of P takes rows [p * B / P, (p + 1) * B / P) of every global batch, so the
concatenated batch is the same for any P, and the position in the stream is one number, the batches
before: the step, but for a run that was resumed with another B (`checks.position`).

Axis letters: B global batch, b = B / P local batch, H, W pixels, C channels or classes, T tokens,
D feature width.
"""

import copy
import functools
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
import tokenizers
from absl import flags

from medvlp_jax.config import UserError
from medvlp_jax.data import scans, text
from medvlp_jax.data.corpora import Source, open_source
from medvlp_jax.data.metadata import Metadata
from medvlp_jax.encoders.base import Tokens

__all__ = [
    "Example",
    "Source",
    "Transform",
    "eval_batches",
    "mlm_texts",
    "mlm_transform",
    "open_source",
    "record_transform",
    "train_dataset",
]

SECTIONS = ("findings", "impression", "report")  # report: both sections as one text
PAIRING = ("paired", "image_row", "report_row")  # see `pairing`
METADATA = ("metadata", "metadata_feature", "metadata_vector")  # see `metadata`

Example = dict[str, Any]
Transform = Callable[[Any, np.random.Generator | None], Example]


class Evidence(NamedTuple):
    """Phrases [N, T] of a record: the function that names them, N, and T tokens each."""

    read: Callable[[Mapping], Sequence[str]]
    phrases: int
    length: int


def train_dataset(
    sources: Sequence[Sequence],
    *,
    transform: Transform,
    batch_size: int,
    seed: int,
    weights: Sequence[float] | None = None,
    balance: str = "",
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 2,
    prefetch: int = 4,
    pack: Callable[[Example], Example] | None = None,
) -> grain.IterDataset:
    """Return the endless stream of this process's training batches.

    `iter()` of it has `get_state()` and `set_state(state)`; the state is {"next_index": batches
    before}, for any number of processes. Every epoch of a source visits each record once, in a new
    order.

    Args:
      sources: one or several corpora (anything with `len` and random access).
      transform: (record, rng) -> example, a dict of arrays of fixed shapes.
      batch_size: B, over all processes.
      seed: of order and augmentation.
      weights: share of each source in the stream; None shares by size.
      balance: label task whose classes take turns, see `balanced_order`; "" takes records as they
        come.
      process_index: p.
      process_count: P, has to divide B.
      threads: batches made at the same time.
      prefetch: batches kept ready; at least `threads` keeps all threads busy.
      pack: applied to each of this process's batches, see `packing.Packing`.

    Raises:
      UserError: for a batch that P does not divide, an empty source, or weights that do not fit.
    """
    local = _local_batch(batch_size, process_count)
    shares = _shares(sources, weights)
    streams = [_epochs(source, (seed, k), balance) for k, source in enumerate(sources)]
    stream = grain.MapDataset.mix(streams, shares) if len(streams) > 1 else streams[0]
    batches = stream.map_with_index(
        lambda g, record: transform(record, np.random.default_rng((seed, g)))
    ).batch(local, drop_remainder=True, batch_fn=_stack)
    # Batch k of the stream belongs to process k % P at step k // P.
    mine = batches[process_index::process_count]
    return _threaded(mine.map(pack) if pack else mine, threads, prefetch)


def eval_batches(
    source: Sequence,
    *,
    transform: Transform,
    batch_size: int,
    limit: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 2,
    prefetch: int = 4,
) -> Iterator[Example]:
    """Yield this process's batches of one pass in order, all of one shape.

    The last batch is filled up with copies of the last record; `valid` [b] is False there.

    Args:
      source: a corpus.
      transform: as in training; gets None for the generator.
      batch_size: B, over all processes.
      limit: only the first records; 0 for all.
      process_index: p.
      process_count: P, has to divide B.
      threads: batches made at the same time.
      prefetch: batches kept ready.

    Raises:
      UserError: for a batch that P does not divide, or an empty source.
    """
    local = _local_batch(batch_size, process_count)
    _shares([source], None)
    count = min(limit or len(source), len(source))

    def example(row: int) -> Example:
        entry = transform(source[min(row, count - 1)], None)
        return {**entry, "valid": np.asarray(row < count)}

    rows = grain.MapDataset.range(-(-count // batch_size) * batch_size)
    batches = rows.map(example).batch(local, batch_fn=_stack)
    return iter(_threaded(batches[process_index::process_count], threads, prefetch))


def record_transform(
    *,
    inputs: Sequence[str],
    decode: Callable[[bytes], np.ndarray],
    view: Callable[[np.ndarray, np.random.Generator | None], np.ndarray],
    tokenizer: tokenizers.Tokenizer | None = None,
    lengths: Mapping[str, int] | None = None,
    features: Mapping[str, np.ndarray] | None = None,
    table: Callable[[Mapping[str, float]], np.ndarray] | None = None,
    evidence: Evidence | None = None,
    images: Mapping[str, Transform] | None = None,
    told: Metadata | None = None,
    pair: scans.Pair | None = None,
    train: bool = True,
) -> Transform:
    """Return the function from a record to the example a recipe reads.

    Args:
      inputs: the batch keys that are wanted: "image", "image_2" (a second view; training only),
        names of further images,
        "findings", "impression" and "report", both as one text (token ids), "<section>_feature"
        (cached features of frozen text encoders), "tabular", "label/<task>", "evidence" (token ids
        of N phrases) with "evidence_mask" (which of them exist), of limited pairing "paired",
        "image_row" and "report_row", and of the table as PRIMA reads it "metadata" (token ids of a
        text), "metadata_feature" (its cached tokens) and "metadata_vector". Keys made anyway:
        "text_id" and, for every section asked for, "<section>_valid" and "<section>_id" (equal for
        equal texts, in evaluation for texts that are `normalised` alike); in evaluation also the
        labels of all tasks, "image_id" and "patient_id".
      decode: encoded bytes -> uint8 [R, R, C], for example a partial of `transforms.decode`; wrap
        it in `functools.lru_cache` to decode a small corpus once.
      view: (image, rng) -> uint8 [H, W, C]; a random view in training.
      tokenizer: for the token keys.
      lengths: T of every section that is tokenised.
      features: feature [D] by text, for the feature keys; a missing section gets that of "" where
        there is one, else zeros.
      table: values by column -> [T, D], for "tabular".
      evidence: where the phrases come from, and how many of which length.
      images: by name, (record, rng) -> view of a further image. All images of a case get the same
        random draws: what is turned in one is turned in the others.
      told: how the table becomes text and vector.
      pair: (record, rng) -> what the two views of a training example show; None is the image twice.
      train: two views where asked for, and no labels beyond `inputs`.

    Raises:
      UserError: where a wanted key cannot be made from what is given.
    """
    lengths, features, images = lengths or {}, features or {}, images or {}
    tokenised = [key for key in SECTIONS if key in inputs]
    looked_up = [key for key in SECTIONS if f"{key}_feature" in inputs]
    _check_inputs(inputs, images, tokenised, tokenizer, lengths, looked_up, features)
    further = [name for name in images if name in inputs]
    if "tabular" in inputs and table is None:
        raise UserError("The recipe reads a table, and the corpus has none.")
    if any(key in inputs for key in METADATA) and told is None:
        raise UserError("The recipe reads metadata, and the corpus has no table.")
    if "evidence" in inputs and (evidence is None or tokenizer is None):
        raise UserError("Evidence phrases need a reader and a tokenizer.")
    tokens = functools.lru_cache(maxsize=1 << 16)(functools.partial(_tokens, tokenizer))

    def transform(record: Mapping[str, Any], rng: np.random.Generator | None) -> Example:
        example: Example = {"text_id": text_hash(record["text_id"])}
        for name in further:
            example[name] = images[name](record, copy.deepcopy(rng))
        if train and "image_2" in inputs:
            first, second = pair(record, rng) if pair else [decode(record["image"])] * 2
            example |= {"image": view(first, rng), "image_2": view(second, rng)}
        elif "image" in inputs:
            example["image"] = view(decode(record["image"]), rng)
        if "tabular" in inputs:
            example["tabular"] = table(record["table"])
        if "evidence" in inputs:
            example |= _phrases(tokens, evidence, record)
        for key in PAIRING:
            if key in inputs:
                example[key] = np.asarray(record[key], bool if key == "paired" else np.int32)
        if told:
            words = told.text(record["table"])
            made = {
                "metadata": lambda: tokens(words, lengths["metadata"]),
                "metadata_feature": lambda: features[words],
                "metadata_vector": lambda: told.vector(record["table"]),
            }
            example |= {key: made[key]() for key in METADATA if key in inputs}
        for key in {*tokenised, *looked_up}:
            words = section_text(record, key)
            if key in tokenised:
                example[key] = tokens(words, lengths[key])
            if key in looked_up:
                example[f"{key}_feature"] = _feature(features, words)
            example[f"{key}_valid"] = np.asarray(bool(words))
            example[f"{key}_id"] = text_hash(words if train else normalised(words))
        if not train:
            for key in ("image_id", "patient_id", "study_id"):
                example[key] = np.asarray(record[key])
        for task, label in record.get("labels", {}).items():
            if not train or f"label/{task}" in inputs:
                example[f"label/{task}"] = np.asarray(label, np.int8)
        return example

    return transform


def mlm_texts(sources: Sequence[Source]) -> list[str]:
    """Return every different non-empty section of the sources, in order of first appearance."""
    sections = (section for source in sources for pair in source.texts() for section in pair)
    return list(dict.fromkeys(filter(None, sections)))


def mlm_transform(
    tokenizer: tokenizers.Tokenizer, *, length: int, key: str = "report"
) -> Transform:
    """Return the function from a plain text to {key: Tokens [T]}; masking is the recipe's."""

    def transform(words: str, rng: np.random.Generator | None) -> Example:
        return {key: _tokens(tokenizer, words, length)}

    return transform


def section_text(record: Mapping[str, Any], section: str) -> str:
    """Return one section of a record; "report" is both, as one text."""
    if section == "report":
        return " ".join(filter(None, (record["findings"], record["impression"])))
    return record[section]


def normalised(text: str) -> str:
    """Return a text by which to tell whether two are the same: lower case, single spaces."""
    return " ".join(text.lower().split())


def text_hash(text_id: str) -> np.ndarray:
    """Return a text id as a non-negative int32, equal for equal ids on every machine."""
    return np.asarray(zlib.crc32(text_id.encode()) & 0x7FFFFFFF, np.int32)


def _check_inputs(inputs, images, tokenised, tokenizer, lengths, looked_up, features) -> None:
    known = ("image", "image_2", *images, "tabular", "text_id", *SECTIONS)
    known = (*known, "evidence", "evidence_mask", *PAIRING, *METADATA)
    made = (*known, *(f"{s}_{kind}" for s in SECTIONS for kind in ("feature", "valid", "id")))
    for key in inputs:
        if key not in made and not key.startswith("label/"):
            raise UserError(
                f"No batch key '{key}' can be made; known: {', '.join(made)}, label/<task>."
            )
    if tokenised and (tokenizer is None or any(key not in lengths for key in tokenised)):
        raise UserError(f"Tokens of {', '.join(tokenised)} need a tokenizer and a length for each.")
    if looked_up and not features:
        raise UserError(f"{looked_up[0]}_feature needs cached text features, and none are given.")


def _tokens(tokenizer: tokenizers.Tokenizer, words: str, length: int) -> Tokens:
    ids, mask = text.tokenize(tokenizer, [words], length)
    return Tokens(ids[0], mask[0])


def _phrases(tokens: Callable, evidence: Evidence, record: Mapping) -> Example:
    """Tokenise the first N phrases of a record; places beyond hold an empty text."""
    found = list(evidence.read(record))[: evidence.phrases]
    rows = [tokens(words, evidence.length) for words in found + [""] * evidence.phrases]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *rows[: evidence.phrases])
    return {"evidence": stacked, "evidence_mask": np.arange(evidence.phrases) < len(found)}


def _feature(features: Mapping[str, np.ndarray], words: str) -> np.ndarray:
    if not words and "" not in features:
        return np.zeros_like(next(iter(features.values())))
    if words not in features:
        # The text itself may be a patient's: it never goes into a message.
        raise UserError(
            f"A text of {len(words)} characters (id {text_hash(words)}) has no cached feature: the "
            "cache was made from another corpus or split."
        )
    return features[words]


def _epochs(source: Sequence, seed: tuple[int, int], balance: str) -> grain.MapDataset:
    """Return the source again and again without end, every epoch in an order of its own."""
    # Grain's shuffle needs 0.1 to 6 ms an element where a corpus has fewer than 500 records.
    row = balanced_order(source.labels(balance), seed) if balance else _shuffle(len(source), seed)
    return grain.MapDataset.range(sys.maxsize).map(lambda k: source[row(k)])


def _shuffle(count: int, seed: tuple[int, ...]) -> Callable[[int], int]:
    """Return k -> row: a new permutation every `count` elements."""

    @functools.lru_cache(maxsize=4)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((*seed, epoch)).permutation(count)

    return lambda k: int(order(k // count)[k % count])


def balanced_order(labels: np.ndarray, seed: tuple[int, ...]) -> Callable[[int], int]:
    """Return k -> row of a stream in which the classes take turns: CFCML section 2.5.1.

    Each record of the largest class comes once an epoch, in a new order; with each of them one
    record of every other class is drawn at random. A batch that is a multiple of the classes holds
    equally many of each. Unknown rows never come, and a class without a record has no turn.

    Args:
      labels: [N, C] int8, one class a row: 1 present, 0 absent, -1 unknown.
      seed: of order and draws.

    Raises:
      UserError: where no record has a known class.
    """
    rows = [np.flatnonzero(labels[:, c] == 1) for c in range(labels.shape[1])]
    rows = sorted((r for r in rows if len(r)), key=len, reverse=True)
    if not rows:
        raise UserError(f"data.balance: none of the {len(labels)} records has a known class.")
    largest = _shuffle(len(rows[0]), seed)

    def row(k: int) -> int:
        turn, c = divmod(k, len(rows))
        if c == 0:
            return int(rows[0][largest(turn)])
        return int(np.random.default_rng((*seed, 1, k)).choice(rows[c]))

    return row


def _local_batch(batch_size: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"A batch of {batch_size} cannot be split over {process_count} processes; "
            f"accepted are multiples of {process_count}."
        )
    return batch_size // process_count


def _shares(sources: Sequence[Sequence], weights: Sequence[float] | None) -> list[float]:
    """Return the share of each source in the stream, after checking both."""
    sizes = [len(source) for source in sources]
    if not sizes or not all(sizes):
        raise UserError(f"The sources have {sizes} records; accepted is one or more in each.")
    if weights is None:
        weights = sizes
    if len(weights) != len(sizes) or min(weights) <= 0:
        raise UserError(
            f"The weights {tuple(weights)} do not fit {len(sizes)} sources; accepted is one "
            "positive number for each."
        )
    return [weight / sum(weights) for weight in weights]


def _stack(examples: Sequence[Example]) -> Example:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *examples)


def _threaded(batches: grain.MapDataset, threads: int, prefetch: int) -> grain.IterDataset:
    """Read ahead with threads: decoding releases the GIL, and worker processes start slowly."""
    if not flags.FLAGS.is_parsed():
        # Grain reads absl flags when it iterates; a program without `app.run` has not parsed them.
        flags.FLAGS.mark_as_parsed()
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(prefetch, threads))
    return batches.to_iter_dataset(options)
