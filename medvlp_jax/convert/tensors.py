"""From tensors named by PyTorch to variables named by us, and back: strict both ways.

Every tensor of a file must be asked for by a rule or be on the architecture's list of what is left
out; every variable must be filled; every shape must agree. All that is wrong is listed at once.

Only safetensors files are read: a pickle can run code.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from medvlp_jax.config import UserError
from medvlp_jax.convert.table import Table

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")

Tensors = Mapping[str, np.ndarray]


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Read model.safetensors, or every shard its index names.

    Raises:
      UserError: if there is neither, or a shard is absent or lacks a tensor.
    """
    if (folder / SINGLE).is_file():
        return load_file(folder / SINGLE)
    if (folder / INDEX).is_file():
        return _read_shards(folder)
    for pickle in PICKLES:
        if (folder / pickle).is_file():
            raise UserError(
                f"{folder} holds {pickle} but no {SINGLE}, and a pickle is never read; convert it "
                'once where PyTorch is installed: python -c "import transformers; '
                f"transformers.AutoModel.from_pretrained('{folder}').save_pretrained('NEW')\"."
            )
    raise UserError(f"{folder} holds neither {SINGLE} nor {INDEX}.")


def _read_shards(folder):
    where = json.loads((folder / INDEX).read_text())["weight_map"]
    tensors = {}
    for shard in sorted(set(where.values())):
        if not (folder / shard).is_file():
            raise UserError(f"{folder} lacks {shard}, which {INDEX} names.")
        tensors |= load_file(folder / shard)
    if absent := sorted(set(where) - set(tensors)):
        raise UserError(f"{folder}: {INDEX} names tensors no shard holds: {', '.join(absent)}.")
    return tensors


def write_tensors(file: Path, tensors: Tensors) -> None:
    """Write a safetensors file under another name and rename it: no half file is ever seen."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    # safetensors writes a buffer as it lies in memory: a transposed view would come out scrambled.
    # (`ascontiguousarray` would turn a scalar into an array of one.)
    contiguous = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    save_file(contiguous, temporary, metadata={"format": "pt"})
    temporary.replace(file)


def base_names(table: Table, tensors: Tensors) -> dict[str, np.ndarray]:
    """Rename to the base model's names of today: no prefix, no aliases.

    Raises:
      UserError: if two tensors come to the same name.
    """
    renamed = {}
    for name, tensor in tensors.items():
        new = name.removeprefix(table.prefix)
        for old, today in table.aliases.items():
            if new.endswith(old):
                new = new.removesuffix(old) + today
        if new in renamed:
            raise UserError(f"Two tensors are called '{new}' once '{table.prefix}' is taken off.")
        renamed[new] = tensor
    return renamed


def to_variables(
    table: Table, module: Any, tensors: Tensors, *, source: str, drop: Iterable[str] = ()
) -> dict[str, Any]:
    """Fill the module's variables.

    Args:
      table: of the module's architecture.
      module: whose variables are wanted.
      tensors: by base-model name.
      source: what to call the file in errors.
      drop: further names to leave out.

    Returns:
      {"params": ..., maybe "batch_stats": ...} of float32 NumPy arrays.

    Raises:
      UserError: listing every missing, unused and mis-shaped tensor, or unequal tied ones.
    """
    shapes = _shapes(table, module)
    rules = _rules(table, module, shapes)
    tied = table.tied(module)
    wanted = {r.tensor: _file_shape(r, shapes[r.path]) for r in rules}
    known = {*table.left_out(module), *tied, *drop}
    problem = _compare({k: v for k, v in tensors.items() if k in wanted or k not in known}, wanted)
    if problem:
        hint = "; unused ones are left out with drop=(...)" if "unused" in problem else ""
        raise UserError(f"{source} does not fit {type(module).__name__}: {problem}{hint}.")
    for copy, original in tied.items():
        if copy in tensors and not np.array_equal(tensors[copy], tensors[original]):
            raise UserError(
                f"{source}: '{copy}' differs from '{original}', and {type(module).__name__} ties "
                "them; leave that head out with mlm_head=False."
            )
    flat = {r.path: _transpose(_part(tensors, r), r.axes).astype(np.float32) for r in rules}
    return unflatten_dict(stacked(flat) if is_scanned(module) else flat, sep="/")


def to_tensors(table: Table, module: Any, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Name and lay out the variables as PyTorch does, under base-model names.

    Inverse of `to_variables`.

    Raises:
      UserError: listing every missing, unused and mis-shaped array.
    """
    flat = {path: np.asarray(array) for path, array in flatten_dict(variables, sep="/").items()}
    flat = unstacked(flat) if is_scanned(module) else flat
    shapes = _shapes(table, module)
    if problem := _compare(flat, shapes):
        raise UserError(f"These are not the variables of this {type(module).__name__}: {problem}.")
    parts = {}
    for r in _rules(table, module, shapes):
        parts.setdefault(r.tensor, []).append(_transpose(flat[r.path], np.argsort(r.axes)))
    return {name: p[0] if len(p) == 1 else np.concatenate(p) for name, p in parts.items()}


def _rules(table, module, shapes):
    """Return the rules, of which every array of the module must have one."""
    rules = table.rules(module)
    if unnamed := sorted(set(shapes) - {r.path for r in rules}):
        raise UserError(
            f"A checkpoint has no tensor for {', '.join(unnamed)}; for low-rank factors there is "
            "convert.lora: attach or load_adapter after reading, merge or save_adapter to write."
        )
    return rules


def _compare(found, wanted):
    """Say all that is wrong with `found` arrays against `wanted` shapes, or ""."""
    problems = {
        "missing": [name for name in wanted if name not in found],
        "unused": [name for name in found if name not in wanted],
        "mis-shaped": [
            f"{name} {list(found[name].shape)} where {list(shape)} is needed"
            for name, shape in wanted.items()
            if name in found and found[name].shape != shape
        ],
    }
    return "; ".join(f"{kind} {', '.join(names)}" for kind, names in problems.items() if names)


def _file_shape(rule, shape):
    """Return the shape of the rule's whole tensor in the file."""
    shape = tuple(shape[axis] for axis in np.argsort(rule.axes)) if rule.axes else shape
    return (shape[0] * rule.part[1], *shape[1:]) if rule.part[1] > 1 else shape


def _part(tensors, rule):
    """Return the rule's part of its tensor."""
    i, n = rule.part
    tensor = tensors[rule.tensor]
    rows = len(tensor) // n if n > 1 else 0
    return tensor[i * rows : (i + 1) * rows] if n > 1 else tensor


def _transpose(array, axes):
    return array.transpose(axes) if len(axes) else array


def is_scanned(module: Any) -> bool:
    """Say whether the module keeps its blocks as one, with a leading axis L."""
    return getattr(module, "layout", "unrolled") == "scan"


def _shapes(table, module):
    """Return {path: shape} of the module's variables, blocks unrolled."""
    module = module.clone(layout="unrolled") if is_scanned(module) else module
    tree = jax.eval_shape(module.init, jax.random.key(0), table.example(module))
    return {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}


def stacked(flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Gather .../block_0/... to .../block_{L-1}/... into .../blocks/... with a leading axis L."""
    out, blocks = {}, {}
    for path, array in flat.items():
        if match := re.search(r"/block_(\d+)/", path):
            blocks.setdefault(path.replace(match[0], "/blocks/"), {})[int(match[1])] = array
        else:
            out[path] = array
    return out | {path: np.stack([rows[i] for i in sorted(rows)]) for path, rows in blocks.items()}


def unstacked(flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inverse of `stacked`."""
    out = {}
    for path, array in flat.items():
        if "/blocks/" in path:
            out |= {path.replace("/blocks/", f"/block_{i}/"): row for i, row in enumerate(array)}
        else:
            out[path] = array
    return out
