"""Every architecture there is a table for, and config.json read by it."""

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
from medvlp_jax.convert.table import Table

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
      UserError: listing every setting this implementation does not have.
    """
    config = table.flatten(config)
    fixed = {**OFF, **table.former, **table.fixed}
    # A key that is absent has the default of the class in `transformers`.
    wrong = [
        f"{key} {config[key]!r} (only {value!r})"
        for key, value in fixed.items()
        if config.get(key, value) != value
    ]
    if wrong:
        raise UserError(f"{folder}/config.json asks for what is not here: {', '.join(wrong)}.")
    known = {*table.fields, *fixed, *NEUTRAL, *ignore}
    if unknown := [f"{key} {config[key]!r}" for key in config if key not in known]:
        raise UserError(
            f"{folder}/config.json has settings that are not known here: {', '.join(unknown)}; "
            "those that do not change the model are passed over with ignore=(...)."
        )
    return {f.name: f.read(config.get(key, f.default)) for key, f in table.fields.items()}
