"""Contrastive losses with memory linear in the batch: value and gradients of their dense twins.

Logits and targets are made tile by tile (pairs.py, targets.py) from what belongs to single examples
and never kept. The sigmoid's gradient is made in the same visit as its value. A softmax must have
seen all candidates first: it keeps a few numbers a row and a column, its running peak and total,
and the tiles are made once more for the gradient.

  tiles and ring     Inf-CL, Cheng et al. 2024, https://arxiv.org/abs/2410.17243
  running softmax    Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867
  losses, targets    see contrastive.py

Axis letters: B batch, t a tile, E joint width, D report-feature width.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from medvlp_jax.losses import contrastive
from medvlp_jax.losses.contrastive import Prior, at_least_float32
from medvlp_jax.losses.pairs import sweep
from medvlp_jax.losses.targets import (
    Links,
    Softmax,
    describe,
    empty_softmax,
    knowing,
    masses_of,
    matmul,
    pairs_of,
    rule_of,
    rule_of_relations,
    target_of,
    totals_of,
)

TILE = 512


def info_nce(
    image: Float[Array, "B E"],
    text: Float[Array, "B E"],
    scale: float | Float[Array, ""],
    *,
    prior: Prior | None = None,
    valid: Bool[Array, " B"] | None = None,
    invalid: Literal["drop", "keep"] = "drop",
    neutral: Int[Array, " B"] | None = None,
    tile: int = TILE,
) -> Float[Array, ""]:
    """contrastive.info_nce in tiles.

    Args:
      image: see contrastive.info_nce, as for all but `tile`.
      text: [B, E].
      scale: multiplies the cosines.
      prior: the targets; computed tile by tile from its per-example features.
      valid: [B].
      invalid: "drop" or "keep".
      neutral: [B].
      tile: largest side of a tile; memory grows with its square, speed hardly above 512.

    Returns:
      Scalar, at least 0; 0 where nothing is valid.

    Raises:
      ValueError: where the devices of the mesh do not divide B, or tile is below 1.
    """
    valid = jnp.ones(len(image), bool) if valid is None else valid
    candidate, denominator = contrastive.anchors(valid, invalid)
    dtype = at_least_float32(image).dtype
    rule, known, constants = rule_of(prior, dtype)
    examples = describe(candidate, valid, neutral, known)
    examples, constants = jax.lax.stop_gradient((examples, constants))
    if rule.within is not None:  # equal ids inside a prior: each row shares its positive mass
        count = masses_of(rule.within, examples, constants, tile).total
        examples = knowing(examples, count=count)
    if rule.normalise:
        masses = masses_of(rule, examples, constants, tile)
        examples = knowing(examples, masses=masses)
    scale = jnp.asarray(scale, dtype)
    return _info_nce(rule, tile, image, text, scale, examples, constants) / (2 * denominator)


def sigmoid(
    image: Float[Array, "B E"],
    text: Float[Array, "B E"],
    scale: float | Float[Array, ""],
    bias: float | Float[Array, ""],
    *,
    valid: Bool[Array, " B"] | None = None,
    neutral: Int[Array, " B"] | None = None,
    tile: int = TILE,
) -> Float[Array, ""]:
    """contrastive.sigmoid in tiles.

    Args:
      image: see contrastive.sigmoid, as for all but `tile`.
      text: [B, E].
      scale: multiplies the cosines.
      bias: added to the logits.
      valid: [B].
      neutral: [B].
      tile: largest side of a tile.

    Returns:
      Scalar, at least 0; 0 where nothing is valid.

    Raises:
      ValueError: where the devices of the mesh do not divide B, or tile is below 1.
    """
    valid = jnp.ones(len(image), bool) if valid is None else valid
    dtype = at_least_float32(image).dtype
    scale, bias = jnp.asarray(scale, dtype), jnp.asarray(bias, dtype)
    examples = describe(valid, valid, neutral, {})
    return _sigmoid(tile, image, text, scale, bias, examples) / jnp.maximum(valid.sum(), 1)


def view_consistency(
    first: Float[Array, "B E"],
    second: Float[Array, "B E"],
    scale: float | Float[Array, ""],
    *,
    symmetric: bool = False,
    tile: int = TILE,
) -> Float[Array, ""]:
    """contrastive.view_consistency in tiles.

    Args:
      first: see contrastive.view_consistency, as for all but `tile`.
      second: [B, E].
      scale: multiplies the cosines.
      symmetric: the mean over both views as anchors.
      tile: largest side of a tile.

    Raises:
      ValueError: where the devices of the mesh do not divide B, or tile is below 1.
    """
    everything = jnp.ones(len(first), bool)
    examples = describe(everything, everything, None, {})
    scale = jnp.asarray(scale, at_least_float32(first).dtype)
    anchored = lambda x, y: _views(tile, x, y, scale, examples) / len(x)
    if not symmetric:
        return anchored(first, second)
    return (anchored(first, second) + anchored(second, first)) / 2


def alignment(
    image: Float[Array, "B E"],
    report: Float[Array, "B E"],
    scale: float | Float[Array, ""],
    *,
    trust: Float[Array, " B"],
    related: Links | None = None,
    told: Bool[Array, " B"] | None = None,
    tile: int = TILE,
) -> Float[Array, ""]:
    """evidence.alignment in tiles, a report trusted as the images it is related to are.

    Args:
      image: a, unit norm.
      report: b, unit norm.
      scale: multiplies the cosines, 1 / temperature.
      trust: c_i in [0, 1] of each image.
      related: the target, made tile by tile; None relates row i to report i where it is trusted.
      told: reports that say something, see evidence.alignment; None means all.
      tile: largest side of a tile.

    Returns:
      Scalar, at least 0; 0 where nothing is related.

    Raises:
      ValueError: where the devices of the mesh do not divide B, or tile is below 1.
    """
    dtype = at_least_float32(image).dtype
    rule, known = rule_of_relations(related, dtype)
    everything = jnp.ones(len(image), bool)
    trust = trust.astype(dtype)
    valid = trust > 0 if related is None else everything
    known |= {"trust": trust} | ({} if told is None else {"told": told})
    examples = jax.lax.stop_gradient(describe(everything, valid, None, known))
    row, column, trusted = totals_of(rule, examples, tile)
    # Targets of a row are scaled to sum 1, and its cross entropy counts by its share of all trust.
    divided = lambda x, total: jnp.where(total > 0, x / jnp.where(total > 0, total, 1), 0)
    shared = lambda trust: divided(trust, jnp.full_like(trust, trust.sum()))
    by_row = divided(shared(jnp.where(row > 0, trust, 0)), row)
    by_column = divided(shared(divided(trusted, column)), column)
    examples = knowing(examples, by_row=by_row, by_column=by_column)
    return _info_nce(rule, tile, image, report, jnp.asarray(scale, dtype), examples, {}) / 2


# The losses, as sums over all pairs ----------------------------------------------------------


class _CrossEntropy(NamedTuple):
    """What the cross entropy of a row (or column) i is made of, summed over j.

    -sum_j Y_ij log softmax_j(l_ij) = (mass peak - hit) + mass log total: with the peak apart, a
    pair that is found with certainty loses no digits to the size of its logit.
    """

    softmax: Softmax  # of l_ij
    mass: Float[Array, " t"]  # Y_ij
    hit: Float[Array, " t"]  # Y_ij l_ij

    def add(self, logits, target, axis):
        hit = jnp.where(target != 0, target * logits, 0.0).sum(axis)
        softmax = self.softmax.add(logits, axis)
        return _CrossEntropy(softmax, self.mass + target.sum(axis), self.hit + hit)

    def value(self):
        peak, total = self.softmax
        log_total = jnp.log(jnp.where(self.mass > 0, total, 1.0))
        return (self.mass * peak - self.hit) + self.mass * log_total

    def gradient(self, logits, axis):
        """sum_j Y_ij times softmax_j(l_ij)."""
        peak, total = self.softmax
        factor = self.mass / jnp.where(self.mass > 0, total, 1.0)
        return jnp.exp(logits - jnp.expand_dims(peak, axis)) * jnp.expand_dims(factor, axis)


def _logits_and_target(rule, constants, scale, rows, columns):
    (x, examples), (y, others) = rows, columns
    pairs = pairs_of(examples, others)
    target = target_of(rule, constants, examples, others, pairs)
    logits = scale * matmul(at_least_float32(x), at_least_float32(y).T)
    candidate = pairs.candidate & others.known.get("told", True)
    return jnp.where(candidate, logits, -jnp.inf), target


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _info_nce(rule, tile, image, text, scale, examples, constants):
    """Cross entropies of all rows and all columns, summed."""
    return _info_nce_forward(rule, tile, image, text, scale, examples, constants)[0]


def _info_nce_forward(rule, tile, image, text, scale, examples, constants):
    def visit(constants, rows, columns, row_sums, column_sums):
        logits, target = _logits_and_target(rule, *constants, rows, columns)
        return row_sums.add(logits, target, axis=1), column_sums.add(logits, target, axis=0)

    zero = jnp.zeros(len(image), rule.dtype)
    empty = _CrossEntropy(empty_softmax(len(image), rule.dtype), zero, zero)
    pairs = (image, examples), (text, examples)
    sums = sweep(visit, *pairs, empty, empty, (constants, scale), tile=tile)
    by_row, by_column = _factors(examples.known, examples.known)
    value = (by_row * sums[0].value()).sum() + (by_column * sums[1].value()).sum()
    return value, (image, text, scale, examples, constants, sums)


def _info_nce_backward(rule, tile, residuals, cotangent):
    image, text, scale, examples, constants, sums = residuals

    def visit(constants, rows, columns, dx, dy):
        (*row, row_sums), (*column, column_sums) = rows, columns
        logits, target = _logits_and_target(rule, *constants, row, column)
        by_row, by_column = _factors(row[1].known, column[1].known, across=True)
        gradient = by_row * row_sums.gradient(logits, axis=1)
        gradient += by_column * column_sums.gradient(logits, axis=0)
        gradient -= (by_row + by_column) * target
        return _through_product(gradient, row[0], column[0], dx, dy)

    pairs = (image, examples, sums[0]), (text, examples, sums[1])
    zero = jnp.zeros(image.shape, rule.dtype)
    dx, dy = sweep(visit, *pairs, zero, zero, (constants, scale), tile=tile)
    return *_embedding_gradients(cotangent, scale, image, text, dx, dy), None, None


_info_nce.defvjp(_info_nce_forward, _info_nce_backward)


def _factors(rows, columns, *, across: bool = False):
    """Return the weight of each row's and each column's cross entropy; 1 where all count alike.

    Args:
      rows: what is known of them.
      columns: likewise.
      across: shaped to multiply a tile.
    """
    if "by_row" not in rows:
        return 1.0, 1.0
    by_row, by_column = rows["by_row"], columns["by_column"]
    return (by_row[:, None], by_column[None, :]) if across else (by_row, by_column)


def _through_product(gradient, x, y, dx, dy):
    """Add to dx and dy what a gradient of x y^T contributes."""
    dx = dx + matmul(gradient, at_least_float32(y))
    return dx, dy + matmul(gradient.T, at_least_float32(x))


def _embedding_gradients(cotangent, scale, image, text, dx, dy):
    """Gradients of image, text and scale, from those at scale 1."""
    d_scale = cotangent * (at_least_float32(image) * dx).sum()
    dx, dy = cotangent * scale * dx, cotangent * scale * dy
    return dx.astype(image.dtype), dy.astype(text.dtype), d_scale


def _signed_logits(constants, rows, columns):
    """Return z_ij and z_ij l_ij; the latter is inf, at no loss, where the pair is left out."""
    scale, bias = constants
    (x, examples), (y, others) = rows, columns
    pairs = pairs_of(examples, others)
    logits = scale * matmul(at_least_float32(x), at_least_float32(y).T) + bias
    sign = jnp.where(pairs.own, 1.0, -1.0).astype(logits.dtype)
    return sign, jnp.where(pairs.candidate, sign * logits, jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sigmoid(tile, image, text, scale, bias, examples):
    """-sum_ij log sigmoid(z_ij (scale <x_i, y_j> + bias))."""
    return _sigmoid_forward(tile, image, text, scale, bias, examples)[0]


def _sigmoid_forward(tile, image, text, scale, bias, examples):
    """Value and gradients in one sweep: no sum over a row must be known before either."""

    def visit(constants, rows, columns, row_sums, dy):
        loss, dx, d_bias = row_sums
        sign, logits = _signed_logits(constants, rows, columns)
        small = jnp.exp(-jnp.abs(logits))  # one exponential for the loss and its derivative
        loss += (jnp.maximum(-logits, 0.0) + jnp.log1p(small)).sum(axis=1)
        gradient = -sign * jnp.where(logits > 0, small, 1.0) / (1.0 + small)
        dx, dy = _through_product(gradient, rows[0], columns[0], dx, dy)
        return (loss, dx, d_bias + gradient.sum(axis=1)), dy

    zero, zeros = jnp.zeros(len(image), scale.dtype), jnp.zeros(image.shape, scale.dtype)
    pairs = (image, examples), (text, examples)
    row_sums, dy = sweep(visit, *pairs, (zero, zeros, zero), zeros, (scale, bias), tile=tile)
    loss, dx, d_bias = row_sums
    return loss.sum(), (image, text, scale, dx, dy, d_bias.sum())


def _sigmoid_backward(tile, residuals, cotangent):
    image, text, scale, dx, dy, d_bias = residuals
    gradients = _embedding_gradients(cotangent, scale, image, text, dx, dy)
    return *gradients, cotangent * d_bias, None


_sigmoid.defvjp(_sigmoid_forward, _sigmoid_backward)


def _view_logits(scale, rows, columns):
    """Return which pairs are own, and the logits with the other and with the same view."""
    (x, examples), (x_others, y, others) = rows, columns
    pairs = pairs_of(examples, others)
    own = pairs.own & pairs.candidate
    x, x_others, y = map(at_least_float32, (x, x_others, y))
    across = jnp.where(pairs.candidate, scale * matmul(x, y.T), -jnp.inf)
    within = jnp.where(pairs.candidate & ~own, scale * matmul(x, x_others.T), -jnp.inf)
    return own, across, within


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _views(tile, x, y, scale, examples):
    """Cross entropies of the anchors x, summed."""
    return _views_forward(tile, x, y, scale, examples)[0]


def _views_forward(tile, x, y, scale, examples):
    def visit(scale, rows, columns, row_sums, _):
        softmax, hit = row_sums
        own, across, within = _view_logits(scale, rows, columns)
        softmax = softmax.add(across, axis=1).add(within, axis=1)
        return (softmax, hit + jnp.where(own, across, 0.0).sum(axis=1)), ()

    empty = empty_softmax(len(x), scale.dtype), jnp.zeros(len(x), scale.dtype)
    (softmax, hit), _ = sweep(visit, (x, examples), (x, y, examples), empty, (), scale, tile=tile)
    value = (softmax.peak + jnp.log(softmax.total) - hit).sum()
    return value, (x, y, scale, examples, softmax)


def _views_backward(tile, residuals, cotangent):
    x, y, scale, examples, softmax = residuals

    def visit(scale, rows, columns, dx, column_sums):
        (x, examples, (peak, total)), (x_others, y, _), (dx_others, dy) = rows, columns, column_sums
        own, across, within = _view_logits(scale, (x, examples), columns)
        total = jnp.where(total > 0, total, 1.0)[:, None]  # the filled tail has seen nothing
        share = lambda logits: jnp.exp(logits - peak[:, None]) / total
        dx, dy = _through_product(share(across) - own, x, y, dx, dy)
        dx, dx_others = _through_product(share(within), x, x_others, dx, dx_others)
        return dx, (dx_others, dy)

    zero = jnp.zeros(x.shape, scale.dtype)
    rows, columns = (x, examples, softmax), (x, y, examples)
    dx, (dx_others, dy) = sweep(visit, rows, columns, zero, (zero, zero), scale, tile=tile)
    d_scale = cotangent * (at_least_float32(x) * dx).sum()
    dx, dy = cotangent * scale * (dx + dx_others), cotangent * scale * dy
    return dx.astype(x.dtype), dy.astype(y.dtype), d_scale, None


_views.defvjp(_views_forward, _views_backward)
