"""What conversion must know of one architecture: pairs of names, and how its config is written.

One file an architecture ends in a `TABLE`. Names of tensors are those of the base model in
`transformers`, without the prefix that a model with a head puts before them.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from medvlp_jax.config import UserError


class Rule(NamedTuple):
    """One tensor of a file and one array of ours.

    Attributes:
      tensor: name in the file.
      path: ours, "collection/module/.../leaf"; blocks as in the unrolled layout.
      axes: the transposition from the file's layout to ours; () keeps it.
      part: (i, n): ours is the i-th of n equal parts of the tensor along its first axis, for
        layers that PyTorch keeps as one matrix; all n parts have a rule, in order.
    """

    tensor: str
    path: str
    axes: tuple[int, ...] = ()
    part: tuple[int, int] = (0, 1)


class Field(NamedTuple):
    """One field of a module and how config.json writes it."""

    name: str
    default: Any
    read: Callable[[Any], Any] = lambda value: value
    write: Callable[[Any], Any] = lambda value: value


class Table(NamedTuple):
    """One architecture.

    Attributes:
      module: our class.
      model_types: the `model_type`s of config.json it covers; the first is the one written.
      prefix: of base-model tensors in files saved with a head on top.
      fields: config key -> Field.
      fixed: config key -> the only value this implementation has.
      former: the same for keys of older files that no release of `transformers` writes any more.
      example: module -> the smallest input, for shapes.
      rules: module -> every Rule.
      architecture: module -> (class in `transformers` to name, prefix it puts before tensors).
      heads: beginnings of names that never take a prefix.
      detect: names in a file -> fields that say which optional parameters exist.
      beside: folder -> fields that files beside config.json say better than it does.
      left_out: module -> {name: what it is} of tensors known and not read.
      tied: module -> {name: name} of tensors stored twice, which must be equal.
      untied: the override that reads a file where they are not, such as "mlm_head=False".
      added: module -> tensors PyTorch has and we do not, to write.
      aliases: endings of old names -> today's.
      modules: regular expressions in names of modules in the file -> what `transformers` calls them
        in memory, where that differs; PEFT's adapters and files of `save_model` use these names.
      covers: module -> whether this table writes it, where several tables share a class.
      flatten: config.json of any release -> the keys of `fields` and `fixed`.
    """

    module: type
    model_types: tuple[str, ...]
    prefix: str
    fields: Mapping[str, Field]
    fixed: Mapping[str, Any]
    example: Callable[[Any], Any]
    rules: Callable[[Any], list[Rule]]
    architecture: Callable[[Any], tuple[str, str]]
    former: Mapping[str, Any] = {}
    heads: tuple[str, ...] = ()
    detect: Callable[[Iterable[str]], dict[str, Any]] = lambda names: {}
    beside: Callable[[Path], dict[str, Any]] = lambda folder: {}
    left_out: Callable[[Any], Mapping[str, str]] = lambda module: {}
    tied: Callable[[Any], Mapping[str, str]] = lambda module: {}
    untied: str = ""
    added: Callable[[Any], Mapping[str, np.ndarray]] = lambda module: {}
    aliases: Mapping[str, str] = {}
    modules: Mapping[str, Any] = {}
    covers: Callable[[Any], bool] = lambda module: True
    flatten: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda config: config


def in_memory(table: Table, name: str) -> str:
    """Return what `transformers` calls a module whose tensors a file has under `name`."""
    for pattern, today in table.modules.items():
        name = re.sub(pattern, today, name)
    return name


def linear(tensor: str, path: str, *, bias: bool = True) -> list[Rule]:
    """Rules of a `nn.Linear`, whose weight is [out, in]."""
    return [
        Rule(f"{tensor}.weight", f"params/{path}/kernel", (1, 0)),
        *([Rule(f"{tensor}.bias", f"params/{path}/bias")] if bias else []),
    ]


def fused(tensor: str, paths: Sequence[str], *, bias: bool = True) -> list[Rule]:
    """Rules of one `nn.Linear` that holds several of ours, such as query, key and value."""
    return [
        rule._replace(part=(i, len(paths)))
        for i, path in enumerate(paths)
        for rule in linear(tensor, path, bias=bias)
    ]


def conv(tensor: str, path: str) -> Rule:
    """Rule of a `nn.Conv2d`'s weight: [out, in, height, width] -> [height, width, in, out]."""
    return Rule(f"{tensor}.weight", f"params/{path}/kernel", (2, 3, 1, 0))


def norm(tensor: str, path: str, *, bias: bool = True) -> list[Rule]:
    """Rules of a `nn.LayerNorm`, or of a `nn.BatchNorm2d`'s parameters; RMSNorm has no bias."""
    return [
        Rule(f"{tensor}.weight", f"params/{path}/scale"),
        *([Rule(f"{tensor}.bias", f"params/{path}/bias")] if bias else []),
    ]


def clip_blocks(depth: int) -> list[Rule]:
    """Rules of the blocks of a tower of CLIP or SigLIP, which are written alike."""
    found = []
    for i in range(depth):
        theirs, ours = f"encoder.layers.{i}", f"stack/block_{i}"
        for name in ("query", "key", "value", "out"):
            projection = "out_proj" if name == "out" else f"{name[0]}_proj"
            found += linear(f"{theirs}.self_attn.{projection}", f"{ours}/attention/{name}")
        found += [
            *linear(f"{theirs}.mlp.fc1", f"{ours}/mlp/up"),
            *linear(f"{theirs}.mlp.fc2", f"{ours}/mlp/down"),
            *norm(f"{theirs}.layer_norm1", f"{ours}/attention_norm"),
            *norm(f"{theirs}.layer_norm2", f"{ours}/mlp_norm"),
        ]
    return found


def square(size: Any) -> int:
    """Read a size that config.json writes as one number or as two equal ones.

    Raises:
      UserError: for unequal ones.
    """
    sides = set(size) if isinstance(size, list | tuple) else {size}
    if len(sides) != 1:
        raise UserError(f"config.json has a size of {size}; only squares are supported.")
    return sides.pop()


def one_of(key: str, *known: Any) -> Callable[[Any], Any]:
    """Return what reads the value of a key and refuses, with a UserError, all but the known."""

    def read(value):
        if value not in known:
            choices = ", ".join(map(repr, known))
            raise UserError(f"config.json asks for {key} {value!r}; here are only {choices}.")
        return value

    return read


ROPE_SETTINGS = ("rope_type", "type", "rope_theta")


def rope_base(settings: Mapping[str, Any] | None, default: float) -> float:
    """Read the base of rotary positions from `rope_parameters` or the older `rope_scaling`.

    Raises:
      UserError: for a type other than the plain one, or a setting besides type and base.
    """
    settings = settings or {}
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind != "default":
        raise UserError(f"config.json asks for rope_type {kind!r}; only 'default' is here.")
    others = [f"{key} {settings[key]!r}" for key in settings if key not in ROPE_SETTINGS]
    if others:
        raise UserError(
            f"config.json asks for rotary positions with {', '.join(others)}; here are only "
            f"{', '.join(ROPE_SETTINGS)}."
        )
    return settings.get("rope_theta", default)
