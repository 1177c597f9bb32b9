"""Neighbour graphs of images or reports: who is near to whom, never N x N.

Nodes are described by their evidence distributions, or by unit vectors, whose cosine then stands
for BC.

  W_ij = exp((BC_ij - 1) / width) where i is among the k nearest of j or j of i,
  BC_ij = sum_k sqrt(Qbar_i(k) Qbar_j(k)),  S = rows of W scaled to sum 1

Rows are worked on in blocks. Given a mesh, its devices, of all processes, share the blocks; what
they found is gathered. A `shard_map` does that: left to itself, `jit` runs such a loop whole on
each device. The form is our choice (docs/lgdea.md).

Axis letters: N nodes (I images, R reports), K prototypes, d edges a node, m entries a row.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from medvlp_jax import sharding

WIDTH = 0.1  # of the kernel; our choice


class Graph(NamedTuple):
    """A symmetric neighbour graph; unused places hold node 0 with weight 0.

    Attributes:
      node: [N, d], the neighbours of each node.
      forward: [N, d], S from each node to its neighbours: rows of S.
      backward: [N, d], S from the neighbours to the node: columns of S.
      dropped: edges beyond `degree`, see `graph`.
    """

    node: Int[Array, "N d"]
    forward: Float[Array, "N d"]
    backward: Float[Array, "N d"]
    dropped: int


class Sparse(NamedTuple):
    """The largest entries of each row; unused places hold column 0 with value 0."""

    column: Int[Array, "N m"]
    value: Float[Array, "N m"]


def nearest(
    q: Float[Array, "N K"],
    others: Float[Array, "M K"] | None = None,
    *,
    k: int,
    directions: bool = False,
    hubs: float = 0.0,
    block: int = 1024,
    mesh: Mesh | None = None,
) -> Sparse:
    """Return the k nearest other nodes by the Bhattacharyya coefficient, and the coefficients.

    Equal texts have equal distributions, and thousands of reports one text: among ties the nodes
    that follow in number come first, round the end, so that no node is everybody's neighbour.

    Across modalities a few nodes are near to all. With `hubs` they lose what they have of that:

      BC_ij - hubs log mean_i exp(BC_ij / hubs)

    as in the inverted softmax (Smith et al. 2017, https://arxiv.org/abs/1702.03859), which is one
    step of Sinkhorn's algorithm.

    Args:
      q: evidence distributions, rows sum to 1; with a mesh the same in all processes.
      others: among which to look; None: among q, where no node is its own neighbour.
      k: at most the number of other nodes.
      directions: the nodes are unit vectors instead, near where their cosine is high.
      hubs: temperature of that correction; 0 is none.
      block: rows at the same time; memory is block * M.
      mesh: whose devices share the blocks; None is one device.
    """
    most = len(q) - 1 if others is None else len(others)
    if not 0 < k <= most:
        raise ValueError(f"k must be in 1 .. {most}, the number of other nodes, got {k}.")
    given = (jnp.asarray(q), jnp.asarray(q if others is None else others))
    given = tuple(x.astype(jnp.float32) for x in given)
    if not directions:  # the coefficient is the inner product of the roots
        given = tuple(jnp.sqrt(x) for x in given)
    settings = {"within": others is None, "block": block}
    liked = (
        on_devices(mesh, _liked, given, hubs=hubs, **settings) if hubs else jnp.zeros(len(given[1]))
    )
    return on_devices(mesh, _nearest, (*given, jnp.asarray(liked)), k=k, **settings)


@functools.partial(jax.jit, static_argnames=("hubs", "within", "block", "mesh"))
def _liked(q, others, *, hubs, within, block, mesh):
    """Return hubs log mean_i exp(BC_ij / hubs) of each of the others [M]."""
    count = len(q)

    def rows(given, start):
        own, other = given
        row = start + jnp.arange(block)
        scaled = _coefficients(own[jnp.minimum(row, count - 1)], other) / hubs
        itself = within & (row[:, None] == jnp.arange(len(other)))
        left_out = itself | (row >= count)[:, None]
        return jax.nn.logsumexp(jnp.where(left_out, -jnp.inf, scaled), axis=0)

    sums = by_blocks(rows, (q, others), jnp.arange(0, count, block), mesh)  # [blocks, M]
    return hubs * (jax.nn.logsumexp(sums, axis=0) - jnp.log(count - within))


def _coefficients(own, others):
    return jnp.einsum("bk,nk->bn", own, others, precision="highest")


@functools.partial(jax.jit, static_argnames=("k", "within", "block", "mesh"))
def _nearest(q, others, liked, *, k, within, block, mesh):
    count, most = len(q), len(others)

    def rows(given, start):
        own, other, liked = given
        row = start + jnp.arange(block)
        coefficient = _coefficients(own[jnp.minimum(row, count - 1)], other) - liked
        after = (jnp.arange(most) - row[:, None]) % most  # within one set 0 is the node itself
        # Far below any difference that means something, above float32's at 1.
        ranked = coefficient - 1e-5 * after / most
        _, column = jax.lax.top_k(jnp.where((after == 0) & within, -jnp.inf, ranked), k)
        return column, jnp.take_along_axis(coefficient, column, 1)

    column, value = by_blocks(rows, (q, others, liked), jnp.arange(0, count, block), mesh)
    return Sparse(column.reshape(-1, k)[:count], value.reshape(-1, k)[:count])


def on_devices(mesh, function, given, **settings):
    """Call a jitted function, its arrays on all devices of a mesh; then on the host again."""
    if mesh is None:
        return function(*given, mesh=None, **settings)
    everywhere = jax.tree.map(lambda _: NamedSharding(mesh, P()), given)
    found = function(*sharding.place(given, everywhere), mesh=mesh, **settings)
    return jax.tree.map(np.asarray, found)


def by_blocks(one, given, starts, mesh):
    """Return one(given, start) of every block, stacked; the devices of a mesh share the blocks."""
    if mesh is None:
        return jax.lax.map(functools.partial(one, given), starts)
    run = lambda given, starts: jax.lax.map(functools.partial(one, given), starts)
    shared = P(mesh.axis_names)
    run = jax.shard_map(run, mesh=mesh, in_specs=(P(), shared), out_specs=shared, check_vma=False)
    # Blocks beyond the last repeat it, and are cut off again.
    found = run(given, jnp.pad(starts, (0, -len(starts) % mesh.size), mode="edge"))
    found = jax.lax.with_sharding_constraint(found, NamedSharding(mesh, P()))
    return jax.tree.map(lambda x: x[: len(starts)], found)


def graph(neighbours: Sparse, *, width: float = WIDTH, degree: int = 64) -> Graph:
    """Symmetrise and normalise a neighbour list; on the host, in memory linear in its edges.

    Args:
      neighbours: from `nearest`.
      width: of the kernel.
      degree: at most this many edges a node: an edge stays if it is among the heaviest of both
        its ends. A node that many others chose may lose some; `dropped` counts them.
    """
    count, k = neighbours.column.shape
    row = np.repeat(np.arange(count, dtype=np.int64), k)
    column = np.asarray(neighbours.column, np.int64).ravel()
    weight = kernel(neighbours.value, width).ravel()
    # Each edge once in both directions: BC is symmetric, but for rounding, of which one is kept.
    low, high = np.minimum(row, column), np.maximum(row, column)
    _, first = np.unique(low * count + high, return_index=True)
    low, high, weight = low[first], high[first], weight[first]
    kept = rank(np.r_[low, high], np.r_[weight, weight], np.r_[high, low]) < degree
    kept = kept[: len(low)] & kept[len(low) :]
    low, high, weight = low[kept], high[kept], weight[kept]
    row, column, weight = np.r_[low, high], np.r_[high, low], np.r_[weight, weight]
    total = np.bincount(row, weight, count)
    place = rank(row, weight, column)
    most = int(place.max(initial=0)) + 1
    node = np.zeros((count, most), np.int32)
    forward, backward = np.zeros((2, count, most), np.float32)
    node[row, place] = column
    forward[row, place] = weight / total[row]
    backward[row, place] = weight / total[column]
    return Graph(node, forward, backward, int((~kept).sum()))


def kernel(coefficient, width: float) -> np.ndarray:
    """Return exp((BC - 1) / width)."""
    return np.exp((np.asarray(coefficient, np.float64) - 1) / width)


def rank(row: np.ndarray, weight: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Return the place of each edge among those of its row: heaviest first, then by column."""
    order = np.lexsort((column, -weight, row))
    start = np.searchsorted(row[order], row[order], side="left")
    place = np.empty(len(row), np.int64)
    place[order] = np.arange(len(row)) - start
    return place
