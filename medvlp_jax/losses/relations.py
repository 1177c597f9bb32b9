"""Relations of images and reports that are no pairs: seeds spread over two neighbour graphs.

LGDEA (https://arxiv.org/abs/2602.07540) names seed-edge propagation and higher-order relations; the
forms here are our choice (docs/lgdea.md). With S_I and S_R the graphs of `losses/neighbours.py`:

  A_0 = the pairs, or also what is near;  A_{t+1} = alpha S_I A_t S_R^T + (1 - alpha) A_0

S is row-stochastic and alpha below 1, so that this contracts to one fixed point. Nothing is ever
N x N: graphs keep `degree` edges a node, A the `top` largest entries a row after each product, and
rows are worked on in blocks, which the devices of a mesh share. With `top` and `degree` as large as
the corpus the result is exact.

Axis letters: N nodes (I images, R reports), K prototypes, d edges a node, m entries a row.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from medvlp_jax.losses.neighbours import (
    WIDTH,
    Graph,
    Sparse,
    by_blocks,
    graph,
    kernel,
    nearest,
    on_devices,
    rank,
)

CONFIDENCES = ("evidence", "link")
ROWS = 1024  # images whose related reports are read at a time


class Relations(NamedTuple):
    """What the objective reads.

    Attributes:
      column: [I, m], the related reports of each image.
      weight: [I, m], T: sums to 1 in a row, or is zero where nothing is related.
      confidence: [I], c: 0 where the relation is not to be trusted.
    """

    column: Int[Array, "I m"]
    weight: Float[Array, "I m"]
    confidence: Float[Array, " I"]


def relate(
    seen: Float[Array, "I K"],
    said: Float[Array, "R K"],
    pairs: np.ndarray,
    *,
    holds: np.ndarray,
    met: tuple[Float[Array, "I E"], Float[Array, "R E"]] | None = None,
    near: int = 0,
    width: float = WIDTH,
    neighbours: int = 10,
    alpha: float = 0.8,
    hops: int = 5,
    kept: int = 50,
    related: int = 10,
    least: float = 0.2,
    confidence: str = "evidence",
    mesh: Mesh | None = None,
) -> Relations:
    """Relate images to reports: graphs of both, seeds, hops, the strongest relations.

    Args:
      seen: Qbar_I.
      said: Qbar_R.
      pairs: image and report p are a pair, for each p of these.
      holds: [R], does the report hold a phrase; one without is related to no image: it is as
        uniform as the next, so that all of them would be near one another, and agree.
      met: unit features in which images meet reports, where images start from near reports.
      near: how many of these; see `seeds`.
      width: of their kernel.
      neighbours: of a node of the graphs, before both ways are joined.
      alpha: see `propagate`.
      hops: likewise.
      kept: entries of a row during the hops.
      related: reports an image is related to in the end.
      least: see `relations`.
      confidence: of CONFIDENCES: do the related reports say the same, or is it one report.
      mesh: whose devices share the work; None is one device.
    """
    graphs = [graph(nearest(q, k=neighbours, mesh=mesh)) for q in (seen, said)]
    start = None
    if met is not None:
        row = np.flatnonzero(holds)
        asked = met[0], jnp.asarray(met[1])[row]
        start = nearest(*asked, k=min(near, len(row)), directions=True, hubs=width, mesh=mesh)
        start = start._replace(column=row[np.asarray(start.column)])
    first = seeds(pairs, pairs, images=len(seen), top=kept, near=start, width=width)
    spread = propagate(first, *graphs, reports=len(said), alpha=alpha, hops=hops, mesh=mesh)
    spread = spread._replace(value=jnp.where(jnp.asarray(holds)[spread.column], spread.value, 0))
    told = jnp.asarray(said, jnp.float32) if confidence == "evidence" else None
    return relations(spread, pairs, top=related, least=least, reports=told)


def seeds(
    image: np.ndarray,
    report: np.ndarray,
    *,
    images: int,
    top: int,
    near: Sparse | None = None,
    width: float = WIDTH,
) -> Sparse:
    """Return A_0: 1 for each pair (image[p], report[p]), at most `top` a row.

    Args:
      image: of each pair.
      report: likewise.
      images: I.
      top: entries a row.
      near: reports each image is near to [I, m] and the coefficients, m at most `top`, from
        `nearest`. An image without a pair starts from these, by weight exp((BC - 1) / width) scaled
        to sum 1; None leaves it empty, as in the specification.
      width: of that kernel.

    Raises:
      ValueError: if an image has more pairs than `top`, or more are near.
    """
    image, report = np.asarray(image), np.asarray(report)
    place = rank(image, np.ones(len(image)), report)
    if place.max(initial=0) >= top:
        raise ValueError(
            f"An image has {place.max() + 1} pairs, more than top={top} entries a row."
        )
    column, value = np.zeros((images, top), np.int32), np.zeros((images, top), np.float32)
    column[image, place] = report
    value[image, place] = 1
    if near is not None:
        count = near.column.shape[1]
        if count > top:
            raise ValueError(f"{count} near reports are more than top={top} entries a row.")
        apart = np.setdiff1d(np.arange(images), image)
        weight = kernel(near.value, width)[apart]
        column[apart, :count] = np.asarray(near.column)[apart]
        value[apart, :count] = weight / np.maximum(weight.sum(1, keepdims=True), 1e-30)
    return Sparse(column, value)


def propagate(
    start: Sparse,
    images: Graph,
    reports_graph: Graph,
    *,
    reports: int,
    alpha: float = 0.8,
    hops: int = 5,
    block: int = 256,
    mesh: Mesh | None = None,
) -> Sparse:
    """Return A_hops of A_{t+1} = alpha S_I A_t S_R^T + (1 - alpha) A_0, the largest of each row.

    Args:
      start: A_0, its m entries a row are those that are kept after each product.
      images: graph of the I images.
      reports_graph: graph of the R reports.
      reports: R.
      alpha: in [0, 1).
      hops: T; each reaches one neighbour further on both sides.
      block: rows at the same time; memory is block * R.
      mesh: whose devices share the blocks; None is one device.
    """
    given = jax.tree.map(jnp.asarray, (start, images, reports_graph))
    return on_devices(mesh, _propagate, (*given, alpha, hops), reports=reports, block=block)


@functools.partial(jax.jit, static_argnames=("reports", "block", "mesh"))
def _propagate(start, images, reports_graph, alpha, hops, *, reports, block, mesh):
    count, top = start.column.shape
    starts = jnp.arange(0, count, block)
    # Rows beyond the end repeat the last one and are cut off again.
    rows_of = lambda first: jnp.minimum(first + jnp.arange(block), count - 1)

    def largest(column, value):
        """Add up entries [b, n] that share a column, and keep the largest of each row."""
        rows = jnp.arange(block)[:, None]
        dense = jnp.zeros((block, reports), jnp.float32).at[rows, column].add(value)
        value, column = jax.lax.top_k(dense, min(top, reports))
        room = ((0, 0), (0, top - column.shape[1]))
        column = jnp.where(value > 0, column, 0)
        return jnp.pad(column, room), jnp.pad(value, room)

    def from_left(given, first):
        a, images = given
        row = rows_of(first)
        node, weight = images.node[row], images.forward[row]  # [b, d]
        value = a.value[node] * weight[..., None]  # [b, d, m]
        return largest(a.column[node].reshape(block, -1), value.reshape(block, -1))

    def from_right(given, first):
        b, start, graph, alpha = given
        row = rows_of(first)
        column, value = b.column[row], b.value[row]  # [b, m]
        spread = alpha * value[..., None] * graph.backward[column]  # [b, m, d]
        column = graph.node[column].reshape(block, -1)
        column = jnp.concatenate([column, start.column[row]], 1)
        kept = (1 - alpha) * start.value[row]
        return largest(column, jnp.concatenate([spread.reshape(block, -1), kept], 1))

    def product(one_side, *given):
        column, value = by_blocks(one_side, given, starts, mesh)
        return Sparse(column.reshape(-1, top)[:count], value.reshape(-1, top)[:count])

    def hop(_, a):
        left = product(from_left, a, images)
        return product(from_right, left, start, reports_graph, alpha)

    return jax.lax.fori_loop(0, hops, hop, start)


def relations(
    spread: Sparse,
    paired: np.ndarray,
    *,
    top: int = 10,
    least: float = 0.2,
    reports: Float[Array, "R K"] | None = None,
) -> Relations:
    """Keep the strongest relations of each image, and say how far to trust them.

      T_ir = A_ir / s_i,  s_i = sum_r A_ir over the `top` largest

    Without `reports` the confidence is that of the specification, which asks for one report:

      c_i = min(1, s_i / median of s over the paired) * (1 - H(T_i) / ln top)

    With them it asks whether the related reports, many or few, say the same (docs/lgdea.md):

      c_i = min(1, s_i / median of s over the other images that are reached)
            * sum_r T_ir BC(Qbar_R(r), Qtil_i),   Qtil_i = sum_r T_ir Qbar_R(r)

    Args:
      spread: A, from `propagate`.
      paired: [P], images that have a pair.
      top: m, at least 2.
      least: a confidence below it counts 0.
      reports: Qbar_R [R, K] of all reports, or None.
    """
    if top < 2 or len(paired) == 0:
        raise ValueError(f"relations needs top >= 2 and a paired image, got {top}, {len(paired)}.")
    value, place = jax.lax.top_k(jnp.asarray(spread.value), min(top, spread.value.shape[1]))
    column = jnp.take_along_axis(jnp.asarray(spread.column), place, 1)
    total = value.sum(1)
    weight = jnp.where(total[:, None] > 0, value / jnp.where(total > 0, total, 1)[:, None], 0)
    if reports is None:
        entropy = -(weight * jnp.log(jnp.where(weight > 0, weight, 1))).sum(1)
        usual, trust = jnp.median(total[jnp.asarray(paired)]), 1 - entropy / np.log(top)
    else:
        reached = total.at[jnp.asarray(paired)].set(0) > 0
        usual = jnp.nanmedian(jnp.where(reached, total, jnp.nan))
        told = jnp.asarray(reports)
        agreement = lambda row: _agreement(*row, told)
        trust = jax.lax.map(agreement, (column, weight), batch_size=ROWS)
    # No image but the paired ones may be reached, and then there is nothing to compare with.
    confidence = jnp.nan_to_num(jnp.minimum(1, total / usual)) * trust
    return Relations(column, weight, jnp.where(confidence >= least, confidence, 0))


def pseudo(found: Relations, reports: Float[Array, "R K"]) -> Float[Array, "I K"]:
    """Return Qtil_i = sum_r T_ir Qbar_R(r), what the related reports say; zero without any."""
    told = jnp.asarray(reports)
    mixture = lambda row: _mixture(*row, told)
    return jax.lax.map(mixture, (found.column, found.weight), batch_size=ROWS)


def _mixture(column, weight, reports):
    return jnp.einsum("m,mk->k", weight, reports[column], precision="highest")


def _agreement(column, weight, reports):
    """Return sum_r T_r BC(Qbar_R(r), Qtil) of one image."""
    coefficients = jnp.sqrt(reports[column] * _mixture(column, weight, reports)).sum(-1)
    return (weight * coefficients).sum()


def in_batch(
    column: Int[Array, "B m"], weight: Float[Array, "B m"], report: Int[Array, " R"]
) -> Float[Array, "B R"]:
    """Return T restricted to the reports of a batch.

    Args:
      column: related reports of the batch's images, from Relations.
      weight: likewise.
      report: which report of the corpus each of the batch's is; -1 is none of them.
    """
    same = column[:, :, None] == report  # [B, m, R]
    return jnp.where(same, weight[..., None], 0).sum(1)


def mean_trust(target: Float[Array, "B R"], trust: Float[Array, " B"]) -> Float[Array, " R"]:
    """Return c_r, the mean confidence of a batch's images a report is related to; 0 without any."""
    total = target.sum(0)
    return jnp.where(total > 0, trust @ target / jnp.where(total > 0, total, 1), 0)
