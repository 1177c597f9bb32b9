"""From tensors named by PyTorch to variables named by us, and back: strict both ways.

Every tensor of a file must be asked for by a rule or be on the architecture's list of what is left
out; every variable must be filled; every shape must agree. All that is wrong is listed at once.

Tensors are read and made one at a time, of sharded arrays only the parts that a process holds.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils

from medvlp_jax.config import UserError
from medvlp_jax.convert.files import Pending, Stored
from medvlp_jax.convert.table import Rule, Table, in_memory

# Arrays, or tensors in files: both have a shape and give parts of themselves.
Tensors = Mapping[str, np.ndarray | Stored]
# (path, shape) of one of our arrays -> where it goes.
Place = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


def base_names(table: Table, tensors: Tensors) -> dict[str, np.ndarray | Stored]:
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
    table: Table,
    module: Any,
    tensors: Tensors,
    *,
    source: str,
    drop: Iterable[str] = (),
    place: Place | None = None,
) -> dict[str, Any]:
    """Fill the module's variables.

    Args:
      table: of the module's architecture.
      module: whose variables are wanted.
      tensors: by base-model name.
      source: what to call the file in errors.
      drop: further names to leave out.
      place: where each array goes; None leaves all on the host.

    Returns:
      {"params": ..., maybe "batch_stats": ...} of float32 arrays: NumPy's, or global ones where
      `place` puts them.

    Raises:
      UserError: listing every missing, unused, mis-shaped and mis-typed tensor, or for names in
        `drop` that are not there, unequal tied tensors, NaN and infinite numbers, or a module that
        cannot be built.
    """
    kind = type(module).__name__
    try:
        shapes = _shapes(table, module)
    except ValueError as error:  # of the encoder, such as heads that do not divide its width
        raise UserError(f"{source} describes no {kind} that can be built: {error}") from error
    rules = _rules(table, module, shapes)
    tensors = _as_saved(table, module, tensors)
    tied = table.tied(module)
    wanted = {r.tensor: _file_shape(r, shapes[r.path]) for r in rules}
    drop, known = [*drop], {*table.left_out(module), *tied}
    if absent := [name for name in drop if name not in tensors]:
        unused = [name for name in tensors if name not in wanted and name not in known]
        raise UserError(
            f"{source} has no tensor {', '.join(absent)} to drop; those that a {kind} does not use "
            f"are {', '.join(unused) or 'none'}."
        )
    known |= {*drop}
    found = {k: t.shape for k, t in tensors.items() if k in wanted or k not in known}
    other = [f"{k} {tensors[k].dtype}" for k in wanted if k in found and not _is_float(tensors[k])]
    typed = f"mis-typed {', '.join(other)} where floats are needed" if other else ""
    if problem := "; ".join(filter(None, (_compare(found, wanted), typed))):
        hint = "; unused ones are left out with drop=[NAME, ...], on the command line --drop NAME"
        hint = hint if "unused" in problem else ""
        raise UserError(f"{source} does not fit {kind}: {problem}{hint}.")
    for copy, original in tied.items():
        if copy in tensors and not np.array_equal(tensors[copy][()], tensors[original][()]):
            raise UserError(
                f"{source}: '{copy}' differs from '{original}', and this {kind} ties them; "
                f"{table.untied} reads the file without doing so."
            )
    arrays = {}
    for path, group in _groups(rules, is_scanned(module)).items():
        shape = shapes[group[0].path]
        if path != group[0].path:
            shape = (len(group), *shape)
            read = functools.partial(_read_stacked, source, tensors, group)
        else:
            read = functools.partial(_read, source, tensors, group[0])
        if place is None:
            arrays[path] = read(tuple(slice(0, size) for size in shape))
        else:
            arrays[path] = jax.make_array_from_callback(shape, place(path, shape), read)
    return unflatten_dict(arrays, sep="/")


def _as_saved(table, module, tensors):
    """Return tensors by the names that `save_pretrained` gives them.

    `save_model` of safetensors keeps those a model has in memory, and of two tied tensors the one
    whose name comes first, which may be that of a head this module does not have.
    """
    found = dict(tensors)
    for rule in table.rules(module):
        layer, dot, leaf = rule.tensor.rpartition(".")
        name = f"{in_memory(table, layer)}{dot}{leaf}"
        if rule.tensor not in found and name in found:
            found[rule.tensor] = found.pop(name)
    whole = module.clone(mlm_head=True) if hasattr(module, "mlm_head") else module
    for copy, original in table.tied(whole).items():
        if original not in found and copy in found:
            found[original] = found[copy]
    return found


def _is_float(tensor: np.ndarray | Stored) -> bool:
    return str(tensor.dtype).lower().startswith(("f", "bf"))  # "F32", "BF16", "float32"


def _groups(rules, scanned) -> dict[str, list[Rule]]:
    """Gather the rules that fill one array: those of all blocks, in order, where it stacks them."""
    groups = {}
    for r in rules:
        groups.setdefault(_stacked_path(r.path) if scanned else r.path, []).append(r)
    number = lambda r: int(match[1]) if (match := BLOCK.search(r.path)) else 0
    return {path: sorted(group, key=number) for path, group in groups.items()}


def _read_stacked(source, tensors, group, index):
    """Read array[index], float32, of an array that has a row for each rule."""
    return np.stack([_read(source, tensors, r, index[1:]) for r in group[index[0]]])


def _read(source, tensors, rule, index):
    """Read array[index], float32 and finite, of the array that one rule fills."""
    tensor, (i, n) = tensors[rule.tensor], rule.part
    theirs = [slice(None)] * len(index)
    for axis, part in zip(rule.axes or range(len(index)), index, strict=True):
        pieces, skipped = (n, i) if axis == 0 else (1, 0)
        size = tensor.shape[axis] // pieces
        begin, end, _ = part.indices(size)
        theirs[axis] = slice(skipped * size + begin, skipped * size + end)
    read = _transpose(tensor[tuple(theirs)], rule.axes).astype(np.float32)
    # Both ends tell, NaN among them, without a copy as `isfinite` of the whole makes one.
    if not np.isfinite([read.min(initial=0), read.max(initial=0)]).all():
        raise UserError(f"{source}: '{rule.tensor}' holds NaN or infinite numbers.")
    return read


def to_tensors(table: Table, module: Any, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Name and lay out the variables as PyTorch does, under base-model names.

    Inverse of `to_variables`.

    Raises:
      UserError: listing every missing, unused and mis-shaped array.
    """
    return {name: p.make() for name, p in pending_tensors(table, module, variables).items()}


def pending_tensors(table: Table, module: Any, variables: Mapping[str, Any]) -> dict[str, Pending]:
    """Return what `to_tensors` does, each tensor to be made on its own.

    Making one of a sharded array gathers it on every host: all processes must do so, in order.

    Raises:
      UserError: listing every missing, unused and mis-shaped array.
    """
    found = {}  # path as in the unrolled layout -> (array, its row there; None is all of it)
    for path, array in flatten_dict(variables, sep="/").items():
        if is_scanned(module) and BLOCKS in path:
            rows = range(array.shape[0])
            found |= {path.replace(BLOCKS, f"/block_{i}/"): (array, i) for i in rows}
        else:
            found[path] = array, None
    shapes = _shapes(table, module)
    held = {p: np.shape(a)[0 if row is None else 1 :] for p, (a, row) in found.items()}
    if problem := _compare(held, shapes):
        raise UserError(f"These are not the variables of this {type(module).__name__}: {problem}.")
    groups = {}
    for r in _rules(table, module, shapes):
        groups.setdefault(r.tensor, []).append(r)

    def make(group):
        parts = [_transpose(_on_host(*found[r.path]), np.argsort(r.axes)) for r in group]
        # Laid out here, so that what it is a view of goes before the next tensor comes.
        return np.asarray(parts[0] if len(parts) == 1 else np.concatenate(parts), order="C")

    return {
        name: Pending(
            _file_shape(group[0], shapes[group[0].path]),
            found[group[0].path][0].dtype,
            functools.partial(make, group),
        )
        for name, group in groups.items()
    }


def _on_host(array, row):
    """Gather an array, or one row of it, as a NumPy array."""
    if not isinstance(array, jax.Array):
        return np.asarray(array if row is None else array[row])
    # An array keeps NumPy's copy of itself; a copy on the device takes it along when it goes.
    part = jnp.copy(array) if row is None else array[row]
    if part.is_fully_addressable:
        return np.asarray(part)
    return multihost_utils.process_allgather(part, tiled=True)


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
    """Say all that is wrong with the shapes `found` against those `wanted`, or ""."""
    problems = {
        "missing": [name for name in wanted if name not in found],
        "unused": [name for name in found if name not in wanted],
        "mis-shaped": [
            f"{name} {list(found[name])} where {list(shape)} is needed"
            for name, shape in wanted.items()
            if name in found and tuple(found[name]) != tuple(shape)
        ],
    }
    return "; ".join(f"{kind} {', '.join(names)}" for kind, names in problems.items() if names)


def _file_shape(rule, shape):
    """Return the shape of the rule's whole tensor in the file."""
    shape = tuple(shape[axis] for axis in np.argsort(rule.axes)) if rule.axes else shape
    return (shape[0] * rule.part[1], *shape[1:]) if rule.part[1] > 1 else shape


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


BLOCK, BLOCKS = re.compile(r"/block_(\d+)/"), "/blocks/"


def _stacked_path(path):
    return BLOCK.sub(BLOCKS, path, count=1)


def stacked(flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Gather .../block_0/... to .../block_{L-1}/... into .../blocks/... with a leading axis L."""
    out, blocks = {}, {}
    for path, array in flat.items():
        if match := BLOCK.search(path):
            blocks.setdefault(_stacked_path(path), {})[int(match[1])] = array
        else:
            out[path] = array
    return out | {path: np.stack([rows[i] for i in sorted(rows)]) for path, rows in blocks.items()}


def unstacked(flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inverse of `stacked`."""
    out = {}
    for path, array in flat.items():
        if BLOCKS in path:
            out |= {path.replace(BLOCKS, f"/block_{i}/"): row for i, row in enumerate(array)}
        else:
            out[path] = array
    return out
