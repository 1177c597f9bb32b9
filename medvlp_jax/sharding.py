"""Where arrays live: the mesh, parameter rules by path, and global batches.

Code elsewhere is written as for one device on global arrays; `jit` splits it by what stands here.
Mesh axes: data and fsdp split the batch, fsdp also splits large parameters, tensor splits widths.
"""

import contextlib
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
BATCH = P(BATCH_AXES)
FSDP_FLOOR = 2**20  # elements; smaller arrays are cheaper replicated than gathered

Rules = Sequence[tuple[str, tuple]]


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """Make the mesh over all devices; one axis may be -1, "what is left".

    Raises:
      ValueError: for another size, or axes that do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [name for name, size in sizes.items() if size == -1]
    for name, size in sizes.items():
        if size < 1 and free != [name]:
            raise ValueError(f"mesh.{name}={size} must be 1 or more, or -1 for one axis alone")
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if free and len(devices) % fixed == 0:
        sizes[free[0]] = len(devices) // fixed
    if int(np.prod(list(sizes.values()))) != len(devices):
        asked = " x ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(f"mesh {asked} does not cover the {len(devices)} devices of this run")
    # jax.make_mesh makes Explicit axes by default; Auto is what lets jit propagate shardings.
    return jax.make_mesh(
        tuple(sizes.values()), AXES, devices=devices, axis_types=(AxisType.Auto,) * len(AXES)
    )


def tracing_on(mesh: Mesh | None):
    """Context that tells code traced inside of it which mesh its arrays are on; None: as it is."""
    if mesh is None:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def batch_devices(mesh: Mesh) -> int:
    """Number of pieces a global batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_apart(x):
    """Return x [B, ...], split over the devices along its batch and along nothing else.

    What the compiler would also find by itself, were weights not split over the same devices: then
    it splits activations as it finds the weights, and sends them around in every layer. Outside of
    `tracing_on` and where the devices do not divide the batch x is left as it is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    named = set(BATCH_AXES) <= set(mesh.axis_names)
    if not named or set(mesh.axis_types) != {AxisType.Auto} or len(x) % batch_devices(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, BATCH)


def whole_batch(mesh: Mesh, size: int) -> int:
    """Return the smallest batch of at least `size` that the devices divide."""
    pieces = batch_devices(mesh)
    return -(-size // pieces) * pieces


class Part(NamedTuple):
    """Which rows of a global batch a process holds: part `index` of `count` equal ones."""

    index: int = 0
    count: int = 1


def part_of(mesh: Mesh) -> Part:
    """Return the rows of this process.

    Processes that share a slice of the batch, as along a tensor axis, have the same part.

    Raises:
      ValueError: where the slices of two processes overlap without being the same.
    """
    rows = np.indices(mesh.devices.shape)
    row = rows[0] * mesh.shape["fsdp"] + rows[1]  # along BATCH_AXES
    held = {}
    for device, index in zip(mesh.devices.flat, row.flat, strict=True):
        held.setdefault(device.process_index, set()).add(int(index))
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    if sum(map(len, parts)) != batch_devices(mesh) or len({*map(len, parts)}) != 1:
        raise ValueError(
            f"mesh {dict(mesh.shape)} lays rows of the batch across the devices of "
            f"{len(held)} processes unevenly; accepted is a tensor axis that divides the devices "
            "of a process, or is a multiple of them"
        )
    return Part(parts.index(tuple(sorted(held[jax.process_index()]))), len(parts))


def parameter_spec(path: str, shape: Sequence[int], rules: Rules, mesh: Mesh) -> P:
    """Return the PartitionSpec of one parameter.

    The first rule whose pattern is found in the path decides; else the largest axis divisible by
    fsdp, for arrays of at least FSDP_FLOOR elements; else replicated.
    """
    for pattern, spec in rules:
        if re.search(pattern, path):
            return P(*spec)
    if mesh.shape["fsdp"] > 1 and np.prod(shape) >= FSDP_FLOOR:
        for axis in np.argsort(shape)[::-1]:
            if shape[axis] % mesh.shape["fsdp"] == 0:
                return P(*[("fsdp" if i == axis else None) for i in range(len(shape))])
    return P()


def shardings(tree, mesh: Mesh, rules: Rules = ()):
    """Map every leaf (array or ShapeDtypeStruct) of a state to its NamedSharding, by path."""

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, parameter_spec(name, leaf.shape, rules, mesh))

    return jax.tree_util.tree_map_with_path(one, tree)


def abstract(tree, shardings):
    """Return the shape and dtype of every leaf, with the sharding it is to have."""
    struct = lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at)
    return jax.tree.map(struct, tree, shardings)


def place(tree, shardings):
    """Put a tree where it belongs; each process holds it whole, or it is on the mesh already."""

    def one(leaf, sharding):
        if jax.process_count() == 1 or not getattr(leaf, "is_fully_addressable", True):
            return jax.device_put(leaf, sharding)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(one, tree, shardings)


def to_global(batch: Mapping, mesh: Mesh):
    """Assemble this process's rows [b, ...] of every key into global arrays [B, ...]."""
    sharding = NamedSharding(mesh, BATCH)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def own_rows(array: jax.Array) -> np.ndarray:
    """Return this process's rows [b, ...] of a global array [B, ...], on the host."""
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])
