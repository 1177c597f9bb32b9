"""What PRIMA reads of a corpus besides images: metadata texts, scans of one patient, the prompt.

Glue between a config and data/metadata.py, data/scans.py and data/prompts.py, for train, evaluate
and plan alike.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from medvlp_jax.config import UserError
from medvlp_jax.data import corpora, metadata, prompts, scans
from medvlp_jax.data import text as tokenisation

KEYS = ("metadata", "metadata_feature", "metadata_vector")


def reads_metadata(recipe) -> bool:
    """Say whether a recipe reads the table as text or as the vector of Eq. 6."""
    return any(key in recipe.inputs for key in KEYS)


def told_of(
    data: Mapping[str, Any], sources: Sequence[corpora.Source], label: str, *, train: bool
) -> metadata.Metadata:
    """Return how the tables of some sources are told, those of training held against their labels.

    Args:
      data: config.data.
      sources: of one schema.
      label: task whose classes must not be told.
      train: whether these are what is trained on; of a few test rows anything may look like a leak.

    Raises:
      UserError: for sources without a table or with different ones, for settings that do not fit
        it, and for a label that leaks.
    """
    schema = sources[0].metadata["table"]
    if any(source.metadata["table"] != schema for source in sources):
        names = ", ".join(source.name for source in sources)
        raise UserError(f"The tables of {names} differ; accepted are corpora of one schema.")
    told = _told(data, schema, sources[0].name, sources[0].tasks.get(label, ()))
    for source in sources:
        if train and label in source.tasks:
            metadata.check_labels(told, source.tables(), source.labels(label))
    return told


def described(data: Mapping[str, Any]) -> metadata.Metadata:
    """Return the same for the first corpus as it describes itself, no record read."""
    return _told(data, schema_of(data), data["corpora"][0].partition(":")[0], ())


def _told(data, schema, name, classes):
    if not schema:
        raise UserError(f"The recipe reads a table as text, and corpus {name} has none.")
    return metadata.read(
        schema, exclude=data["table"]["exclude"], classes=classes, **data["metadata"]
    )


def texts_of(told: metadata.Metadata, sources: Sequence[corpora.Source]) -> list[str]:
    """Return every different metadata text of the sources."""
    texts = (told.text(values) for source in sources for values in source.tables())
    return list(dict.fromkeys(texts))


def empty_metadata(data: Mapping[str, Any], tokenizer, size: int) -> dict[str, Any]:
    """Return metadata of `size` patients of whom nothing is known."""
    tokens = tokenisation.tokenize(tokenizer, [""] * size, data["text_length"])
    return {
        "metadata": tokens,
        "metadata_vector": np.zeros((size, described(data).width), np.float32),
    }


def prompt_of(data: Mapping[str, Any], spec: Mapping[str, Any], tokenizer) -> prompts.Prompt:
    """Return the prompt of a recipe over the classes of the first corpus.

    Raises:
      UserError: for a label task the corpus does not have.
    """
    tasks = tasks_of(data)
    if spec["label"] not in tasks:
        raise UserError(
            f"{data['corpora'][0]} has no task '{spec['label']}'; accepted: {', '.join(tasks)}."
        )
    return prompts.tokenise(tokenizer, spec["prompt"], tasks[spec["label"]])


def tasks_of(data: Mapping[str, Any]) -> Mapping[str, Sequence[str]]:
    """Return the label tasks of the first corpus as it describes itself, no record read.

    A folder of the user's own that is not prepared here says nothing: {}.
    """
    return _builder(data).info.metadata["tasks"]


def schema_of(data: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """Return the table's schema likewise; {} without a table."""
    return _builder(data).info.metadata["table"]


def pair_of(
    data: Mapping[str, Any],
    sources: Sequence[corpora.Source],
    images: Sequence[str],
    decode: Callable[[bytes], np.ndarray],
    label: str,
) -> scans.Pair:
    """Return (record, rng) -> two images of a patient: modalities, siblings, or the same twice.

    Raises:
      UserError: for an image the corpus does not have, a volume, or siblings of two classes of the
        task `label`.
    """
    if len(images) < 2:
        return scans.siblings(sources, data["siblings"], decode, label)
    known = {"image": {}, **sources[0].images}
    for name in images:
        if name not in known or "slices" in known[name]:
            flat = [other for other, spec in known.items() if "slices" not in spec]
            raise UserError(f"'{name}' is no image to align; accepted: {', '.join(flat)}.")
    read = lambda name: lambda record: scans.image_of(record, name, known[name], decode)
    readers = {name: read(name) for name in images}
    return scans.modalities(readers)


def _builder(data):
    name, _, variant = data["corpora"][0].partition(":")
    return corpora.builder(name, data_dir=data["data_dir"], builder_config=variant)
