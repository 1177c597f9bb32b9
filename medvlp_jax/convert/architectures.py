"""Every architecture there is a table for, and config.json read by it."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from medvlp_jax.config import UserError
from medvlp_jax.convert import (
    bert,
    clip_text,
    clip_vision,
    dinov2,
    dinov3,
    modernbert,
    qwen3,
    resnet,
    siglip,
    siglip_text,
    swin,
    vit,
)
from medvlp_jax.convert.neutral import NEUTRAL, OFF
from medvlp_jax.convert.table import Table, square

TABLES = (
    resnet.TABLE,
    vit.TABLE,
    swin.TABLE,
    dinov2.TABLE,
    dinov2.TABLE_WITH_REGISTERS,
    dinov3.TABLE,
    clip_vision.TABLE,
    siglip.TABLE,
    bert.TABLE,
    clip_text.TABLE,
    siglip_text.TABLE,
    modernbert.TABLE,
    qwen3.TABLE,
)


def model_types() -> list[str]:
    """Return every `model_type` that can be read."""
    return [name for table in TABLES for name in table.model_types]


def table_of_config(config: Mapping[str, Any], folder: Path) -> Table:
    """Return the table for a config's model_type.

    Raises:
      UserError: if there is none.
    """
    for table in TABLES:
        if config["model_type"] in table.model_types:
            return table
    known = ", ".join(model_types())
    raise UserError(f"{folder} is a {config['model_type']!r}; this project reads {known}.")


def table_of_module(module: Any) -> Table:
    """Return the table for one of our encoders.

    Raises:
      UserError: if there is none.
    """
    for table in TABLES:
        if isinstance(module, table.module) and table.covers(module):
            return table
    known = ", ".join(dict.fromkeys(table.module.__name__ for table in TABLES))
    raise UserError(f"No Hugging Face form of {type(module).__name__}; there is one of {known}.")


# What config.json says of ours beside what `transformers` knows; it keeps the key and ignores it.
POOLING = "medvlp_pooling"


def pooling_of(table: Table, config: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Return the field that says how features are pooled; {} where a folder does not tell.

    `transformers` returns all tokens, and tensors are the same however they are pooled: of a folder
    that `save` wrote only this tells what was trained.

    Args:
      table: of the architecture.
      config: what config.json says.
      folder: where it lies, for errors.

    Raises:
      UserError: for what is no name.
    """
    if POOLING not in config or not _pools(table):
        return {}
    if not isinstance(config[POOLING], str):
        raise UserError(
            f"{folder}/config.json has {POOLING} {config[POOLING]!r}; a name is needed, such as "
            f"{table.module.pooling!r}."
        )
    return {"pooling": config[POOLING]}


def written_pooling(module: Any) -> dict[str, str]:
    """Return what config.json says of how an encoder pools; {} where there is but one way."""
    return {POOLING: module.pooling} if hasattr(module, "pooling") else {}


def _pools(table: Table) -> bool:
    return hasattr(table.module, "pooling")


def fields_of(
    table: Table, config: Mapping[str, Any], folder: Path, ignore: Iterable[str] = ()
) -> dict[str, Any]:
    """Translate config.json into fields of our module.

    Args:
      table: of the architecture.
      config: what config.json says.
      folder: where it lies, for errors.
      ignore: settings that are not known here and said to change nothing.

    Raises:
      UserError: listing every setting this implementation does not have, every size that is none,
        or what is ignored and not there.
    """
    written = config
    config = table.flatten(written)
    fixed = {**OFF, **table.former, **table.fixed}
    # A key that is absent has the default of the class in `transformers`.
    wrong = [
        f"{key} {config[key]!r} (only {value!r})"
        for key, value in fixed.items()
        if config.get(key, value) != value
    ]
    if wrong:
        raise UserError(f"{folder}/config.json asks for what is not here: {', '.join(wrong)}.")
    ignore, known = [*ignore], {*table.fields, *fixed, *NEUTRAL}
    known |= {POOLING} if _pools(table) else set()
    unknown = {key: value for key, value in config.items() if key not in known}
    if absent := [key for key in ignore if key not in config and key not in written]:
        raise UserError(
            f"{folder}/config.json has no setting {', '.join(absent)} to ignore; those that are "
            f"not known here are {', '.join(unknown) or 'none'}."
        )
    if left := [f"{key} {value!r}" for key, value in unknown.items() if key not in ignore]:
        raise UserError(
            f"{folder}/config.json has settings that are not known here: {', '.join(left)}; those "
            "that do not change the model are passed over with ignore=[NAME, ...], on the command "
            "line --ignore NAME."
        )
    _check_sizes(table, config, folder)
    _check_kinds(table, config, folder)
    return {f.name: f.read(config.get(key, f.default)) for key, f in table.fields.items()}


def _check_kinds(table: Table, config: Mapping[str, Any], folder: Path) -> None:
    """Refuse what is no number where one is needed, and no switch where one is."""
    for key, field in table.fields.items():
        value = config.get(key, field.default)
        number = field.read(value)  # null is one where the field says which
        if type(field.default) is float and not (
            type(number) in (int, float) and math.isfinite(number)
        ):
            needed = "a number"
        elif type(field.default) is bool and type(value) is not bool:
            needed = "true or false"
        else:
            continue
        raise UserError(f"{folder}/config.json has {key} {value!r}; {needed} is needed.")


# Whole numbers that are no sizes, and a size that may be broken.
NO_SIZES = ("_token_id", "mlp_ratio")


def _check_sizes(table: Table, config: Mapping[str, Any], folder: Path) -> None:
    """Refuse sizes that are not whole numbers from 1 on, and lists of stages of unequal lengths."""
    sizes = {
        key: (field, config.get(key, field.default))
        for key, field in table.fields.items()
        if type(field.default) in (int, tuple) and not key.endswith(NO_SIZES)
    }
    for key, (field, value) in sizes.items():
        is_list, is_stages = isinstance(value, list | tuple), isinstance(field.default, tuple)
        least = 1 if is_stages else min(1, field.default)
        one = [*value] if is_list else [value]
        is_shaped = is_list == is_stages or field.read is square
        if not (one and is_shaped and all(type(v) is int and v >= least for v in one)):
            needed = "list of whole numbers" if is_stages else "whole number"
            raise UserError(
                f"{folder}/config.json has {key} {value!r}; a {needed} from {least} on is needed."
            )
    stages = {key: len(value) for key, (f, value) in sizes.items() if isinstance(f.default, tuple)}
    if len({*stages.values()}) > 1:
        counts = " and ".join(f"{key} {sizes[key][1]!r}" for key in stages)
        raise UserError(f"{folder}/config.json has {counts}; they need one number a stage.")
