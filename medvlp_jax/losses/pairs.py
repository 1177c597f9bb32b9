"""Visit all pairs of a batch, a tile at a time, with memory linear in the batch.

On a mesh each device keeps its rows (images) while the columns (texts) travel once around the ring
of devices, together with the sums made for them so far (Inf-CL, Cheng et al. 2024,
https://arxiv.org/abs/2410.17243). The mesh is the one in context (`jax.set_mesh`, or
training/step.py); its axes "data" and "fsdp" split the batch. Without one the same code runs on a
single device.

Axis letters: B batch, b a device's share of it, t a tile.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from medvlp_jax import sharding


def sweep(visit: Callable, rows, columns, row_sums, column_sums, constants=(), *, tile: int):
    """Show every pair of examples to `visit`, a tile at a time, and return the sums it makes.

    Args:
      visit: (constants, rows, columns, row_sums, column_sums) -> (row_sums, column_sums), all of
        one tile: leaves [t, ...].
      rows: pytree of [B, ...], stays on its device.
      columns: pytree of [B, ...], travels around the ring.
      row_sums: pytree of [B, ...], the sums to begin with.
      column_sums: likewise; travels with the columns.
      constants: pytree of what every tile needs.
      tile: largest t.

    Returns:
      (row_sums, column_sums) over all pairs.

    Raises:
      ValueError: where the devices of the mesh do not divide B, or tile is below 1.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in sharding.BATCH_AXES if axis in mesh.axis_names)
    devices = math.prod(mesh.shape[axis] for axis in axes)
    batch = len(jax.tree.leaves(rows)[0])
    if tile < 1:
        raise ValueError(f"tile must be at least 1, got {tile}")
    if batch % devices:
        raise ValueError(f"a batch of {batch} cannot be split over {devices} devices")
    ring = [(i, (i + 1) % devices) for i in range(devices)]

    def pass_on(tree):
        return jax.tree.map(lambda x: jax.lax.ppermute(x, axes, ring), tree) if axes else tree

    def local(rows, columns, row_sums, column_sums, constants):
        share = batch // devices
        split = lambda tree: jax.tree.map(lambda x: _split(x, tile), tree)
        join = lambda tree: jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:share], tree)

        def hop(_, carry):
            columns, column_sums, row_sums = carry

            def one_row(column_sums, row):
                row, row_sum = row

                def one_tile(row_sum, column):
                    column, column_sum = column
                    return visit(constants, row, column, row_sum, column_sum)

                row_sum, column_sums = jax.lax.scan(one_tile, row_sum, (columns, column_sums))
                return column_sums, row_sum

            column_sums, row_sums = jax.lax.scan(one_row, column_sums, (rows, row_sums))
            return pass_on(columns), pass_on(column_sums), row_sums

        rows, *carry = map(split, (rows, columns, column_sums, row_sums))
        # After as many hops as there are devices every column is home again, with its sums.
        _, column_sums, row_sums = jax.lax.fori_loop(0, devices, hop, tuple(carry))
        return join(row_sums), join(column_sums)

    if axes:
        spec = P(axes)
        specs = {"in_specs": (spec, spec, spec, spec, P()), "out_specs": (spec, spec)}
        local = jax.shard_map(local, **specs, check_vma=False)
    return local(rows, columns, row_sums, column_sums, constants)


def _split(x: Array, tile: int) -> Array:
    """Cut [b, ...] into equal tiles [n, t, ...], t <= tile; zeros fill the last."""
    count = -(-len(x) // tile)
    size = -(-len(x) // count)
    if count * size != len(x):
        x = jnp.pad(x, ((0, count * size - len(x)), *((0, 0),) * (x.ndim - 1)))
    return x.reshape(count, size, *x.shape[1:])
