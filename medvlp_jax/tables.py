"""From a config and a corpus to the rows [T, D] a model sees of a table: numbers, or sentences.

data.table.encoding "vectors" writes each attribute as numbers (data/tabular.py), times
data.table.scale. "sentences" writes
one English sentence an attribute and encodes it with a frozen text encoder, as CFCML does with that
of CLIP ViT-B/32; the features are made once and found again by a hash of all they depend on.
"metablock" is the one row of published PAD-UFES-20 results, "metablock-active" what of it the
released script had switched on; nothing is scaled and what is missing is zero there.
"""

import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from medvlp_jax import config as configs
from medvlp_jax import convert, distributed
from medvlp_jax.config import UserError
from medvlp_jax.convert.architectures import POOLING
from medvlp_jax.convert.checkpoint import read_config
from medvlp_jax.data import corpora, tabular
from medvlp_jax.data import text as tokenisation
from medvlp_jax.training import text as text_stage
from medvlp_jax.writing import replaced

ENCODINGS = ("vectors", "sentences", "metablock", "metablock-active")
LENGTH = 77  # tokens a sentence; CLIP's

Rows = Callable[[Mapping[str, float]], np.ndarray]


def rows_of(data: Mapping[str, Any], sources: Sequence[corpora.Source]) -> Rows | None:
    """Return the function from a record's table to [T, D]; None where the corpora have no table.

    Args:
      data: config.data.
      sources: corpora of one schema; every sentence in them is encoded here.

    Raises:
      UserError: for corpora whose tables differ, columns that do not exist, or a text encoder that
        cannot be read.
    """
    schema = sources[0].metadata["table"]
    if any(source.metadata["table"] != schema for source in sources):
        names = ", ".join(source.name for source in sources)
        raise UserError(f"The tables of {names} differ; accepted are corpora of one schema.")
    if not schema:
        return None
    return _rows(data, schema, (values for source in sources for values in source.tables()))


def seen(data: Mapping[str, Any], schema: tabular.Schema) -> dict[str, Mapping[str, Any]]:
    """Return the columns of a schema that a model sees as numbers, in order; {} as sentences."""
    settings = data["table"]
    if not schema or settings["encoding"] == "sentences":
        return {}
    kept = tabular.columns(schema, exclude=settings["exclude"], leakage=settings["leakage"])
    # Rows of numbers show what nobody knew as missing: no column of its own.
    return {name: {**schema[name], "unknown": False} for name in kept}


def check_labels(data: Mapping[str, Any], sources: Sequence[corpora.Source], task: str) -> None:
    """Refuse a table in which the label stands under another name.

    A column that data.table.leakage asks for may give it away.

    Args:
      data: config.data.
      sources: what is trained on, of one schema.
      task: label task.

    Raises:
      UserError: naming the column, see `tabular.check_labels`.
    """
    schema, asked = sources[0].metadata["table"], data["table"]["leakage"]
    if not schema:
        return
    names = tabular.columns(schema, exclude=data["table"]["exclude"], leakage=asked)
    names = [name for name in names if name not in asked]
    for source in sources:
        if task in source.tasks:
            where = "The table", "input"
            tabular.check_labels(schema, names, source.tables(), source.labels(task), where)


def empty_table(data: Mapping[str, Any]) -> np.ndarray:
    """Return rows [T, D] of missing values, as the first corpus has them.

    Raises:
      UserError: if it has no table.
    """
    name, _, variant = data["corpora"][0].partition(":")
    corpus = corpora.builder(name, data_dir=data["data_dir"], builder_config=variant)
    schema = corpus.info.metadata["table"]
    if not schema:
        raise UserError(f"The recipe reads a table, and corpus {name} has none.")
    missing = dict.fromkeys(schema, np.nan)
    return _rows(data, schema, [missing])(missing)


def _rows(data, schema: tabular.Schema, tables: Iterable[Mapping[str, float]]) -> Rows:
    settings = data["table"]
    names = tabular.columns(schema, exclude=settings["exclude"], leakage=settings["leakage"])
    if settings["encoding"] not in ENCODINGS:
        raise UserError(
            f"data.table.encoding is '{settings['encoding']}'. "
            f"{configs.nearest(settings['encoding'], ENCODINGS)}"
        )
    if settings["encoding"] == "vectors":
        scale = np.float32(settings["scale"])
        return lambda values: scale * tabular.rows(values, schema, names)
    if settings["encoding"] != "sentences":
        return functools.partial(
            tabular.one_hot, schema=schema, columns=_metablock(data["corpora"][0], settings, names)
        )
    write = functools.partial(tabular.sentences, schema=schema, names=names)
    features = sentence_features(data, {said for values in tables for said in write(values)})
    return lambda values: np.stack([features[said] for said in write(values)])


def _metablock(corpus: str, settings: Mapping, names: Sequence[str]) -> dict[str, list[str]]:
    """Return {attribute: values that have a column} of the published encoding of a corpus.

    Raises:
      UserError: for a corpus that has none.
    """
    file = pathlib.Path(tabular.__file__).parent / "datasets" / corpus.partition(":")[0]
    file /= "metablock.json"
    if not file.is_file():
        raise UserError(
            f"data.table.encoding={settings['encoding']} is that of pad_ufes_20; accepted for "
            f"{corpus} are vectors or sentences."
        )
    known = json.loads(file.read_text())
    wanted = known["columns"] if settings["encoding"] == "metablock" else known["active"]
    return {name: known["columns"][name] for name in wanted if name in names}


def sentence_features(data: Mapping[str, Any], sentences: Iterable[str]) -> dict[str, np.ndarray]:
    """Encode sentences with the frozen text encoder data.table.text, or find them encoded.

    Args:
      data: config.data.
      sentences: different ones.

    Returns:
      {sentence: float32 [D]}.

    Raises:
      UserError: without a text encoder, or for one that cannot be read.
    """
    settings = data["table"]
    if not settings["text"]:
        raise UserError(
            "data.table.encoding=sentences needs data.table.text: the folder or hub id of a frozen "
            "text encoder, such as openai/clip-vit-base-patch32."
        )
    source = convert.fetch(settings["text"])
    tokenizer = tokenisation.load_tokenizer(source)
    ordered = sorted(sentences)
    # The weights alone do not tell how a folder pools.
    pooling = settings["pooling"] or read_config(source).get(POOLING, "")
    how = [settings["tower"], pooling, LENGTH]
    name = text_stage.fingerprint(_digest(source), tokenizer.to_str(), how, ordered)
    file = corpora.derived_dir(data["data_dir"]) / "table_features" / f"{name}.npy"
    if distributed.writer_decides(file.is_file()):
        return dict(zip(ordered, np.load(file), strict=True))
    extra = {"pooling": settings["pooling"]} if settings["pooling"] else {}
    module, variables = convert.load(source, tower=settings["tower"], **extra)
    encode = jax.jit(lambda tokens: module.apply(variables, tokens).pooled)
    found = text_stage.cache_features(ordered, encode, tokenizer=tokenizer, length=LENGTH)
    if distributed.is_writer():
        with replaced(file) as scratch, scratch.open("wb") as stream:
            np.save(stream, np.stack([found[said] for said in ordered]))
    distributed.barrier("table features")
    return found


def _digest(folder: pathlib.Path) -> list[str]:
    """Return a hash of each weight file."""
    files = sorted(pathlib.Path(folder).glob("*.safetensors"))
    digests = []
    for file in files:
        with file.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return digests
