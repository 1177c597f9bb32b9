"""Contrastive losses with memory linear in the batch: value and gradients of their dense twins.

Logits and targets are made tile by tile (pairs.py) from what belongs to single examples and never
kept. The sigmoid's gradient is made in the same visit as its value. A softmax must have seen all
candidates first: it keeps a few numbers a row and a column, its running peak and total, and the
tiles are made once more for the gradient.

  tiles and ring     Inf-CL, Cheng et al. 2024, https://arxiv.org/abs/2410.17243
  running softmax    Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867
  losses, targets    see contrastive.py

Axis letters: B batch, t a tile, E joint width, D report-feature width.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from medvlp_jax.losses import contrastive
from medvlp_jax.losses.contrastive import ClinicalPrior, Prior, RowSoftmax, SameId, at_least_float32
from medvlp_jax.losses.pairs import sweep

TILE = 512
FLOOR = -1e30  # peak of a softmax over nothing; finite, so that no inf - inf arises


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
    rule, known, constants = _rule(prior, dtype)
    examples = _examples(candidate, valid, neutral, known)
    examples, constants = jax.lax.stop_gradient((examples, constants))
    if rule.within is not None:  # equal ids inside a prior: each row shares its positive mass
        count = _masses(rule.within, examples, constants, tile).total
        examples = _knowing(examples, count=count)
    if rule.normalise:
        masses = _masses(rule, examples, constants, tile)
        examples = _knowing(examples, masses=masses)
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
    examples = _examples(valid, valid, neutral, {})
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
    examples = _examples(everything, everything, None, {})
    scale = jnp.asarray(scale, at_least_float32(first).dtype)
    anchored = lambda x, y: _views(tile, x, y, scale, examples) / len(x)
    if not symmetric:
        return anchored(first, second)
    return (anchored(first, second) + anchored(second, first)) / 2


# What is known of examples and pairs ---------------------------------------------------------


class _Examples(NamedTuple):
    """What a tile must know of its rows or columns besides their embeddings; all [B, ...]."""

    index: Int[Array, " B"]
    candidate: Bool[Array, " B"]  # stands in the logits; False also in the filled tail of a tile
    valid: Bool[Array, " B"]
    neutral: Int[Array, " B"] | None
    known: Mapping[str, Any]  # features the targets are computed from


def _examples(candidate, valid, neutral, known) -> _Examples:
    return _Examples(jnp.arange(len(valid)), candidate, valid, neutral, known)


def _knowing(examples: _Examples, **known) -> _Examples:
    return examples._replace(known={**examples.known, **known})


class _Pairs(NamedTuple):
    """Which pairs of a tile [t, t] are what."""

    own: Bool[Array, "t t"]
    candidate: Bool[Array, "t t"]
    valid: Bool[Array, "t t"]


def _pairs(rows: _Examples, columns: _Examples) -> _Pairs:
    own = _equal(rows.index, columns.index)
    candidate = rows.candidate[:, None] & columns.candidate[None, :]
    valid = rows.valid[:, None] & columns.valid[None, :]
    if rows.neutral is not None:
        taken = ~_equal(rows.neutral, columns.neutral) | own
        candidate, valid = candidate & taken, valid & taken
    return _Pairs(own, candidate, valid)


def _equal(a, b):
    return a[:, None] == b[None, :]


def _matmul(a, b):
    return jnp.matmul(a, b, precision="highest")


# Targets -------------------------------------------------------------------------------------


class _Rule(NamedTuple):
    """How a tile of the targets comes about.

    Attributes:
      mass: (constants, rows, columns, pairs) -> [t, t], not normalised.
      normalise: "" as it is, "sum" divided by the sum of the row, "softmax" over the row.
      within: rule whose row sums `mass` needs, as `count`.
      dtype: of the targets.
    """

    mass: Callable
    normalise: str
    within: Any
    dtype: Any


def _rule(prior: Prior | None, dtype) -> tuple[_Rule, dict, dict]:
    """Return the rule of a prior, the [B, ...] arrays and the constants it works on."""
    if prior is None:
        return _Rule(_own_mass, "", None, dtype), {}, {}
    if isinstance(prior, SameId):
        return _Rule(_same_mass, "sum", None, dtype), {"ids": prior.ids}, {}
    if isinstance(prior, RowSoftmax):
        known = {"y": at_least_float32(prior.y)}
        return _Rule(_likeness, "softmax", None, dtype), known, {"softness": prior.temperature}
    features = prior.features
    if prior.centre:
        features = features - features.mean(axis=0)
    known = {"features": contrastive.standardise(features)}
    within = None
    if prior.has_report is not None:
        known["has_report"] = prior.has_report
    if prior.ids is not None:
        known["ids"] = prior.ids
        within = _Rule(_same_mass, "sum", None, dtype)
    kernel = ClinicalPrior(None, kernel=prior.kernel)  # without its arrays: rules are static
    mass = lambda *tile: _clinical_mass(kernel, *tile)
    rule = _Rule(mass, "sum" if prior.normalise else "", within, dtype)
    return rule, known, {"strength": prior.strength, "temperature": prior.temperature}


def _own_mass(constants, rows, columns, pairs):
    return pairs.own & pairs.valid


def _same_mass(constants, rows, columns, pairs):
    return _equal(rows.known["ids"], columns.known["ids"]) & pairs.valid


def _clinical_mass(kernel, constants, rows, columns, pairs):
    """ClinicalPrior.targets before the normalisation."""
    rho = _matmul(rows.known["features"], columns.known["features"].T)
    rho = jnp.where(pairs.own, 0.0, jnp.maximum(rho, 0.0))
    similarity = kernel._replace(strength=constants["strength"]).smooth(rho)
    if "has_report" in rows.known:
        both = rows.known["has_report"][:, None] & columns.known["has_report"][None, :]
        similarity = jnp.where(both, similarity, 0.0)
    positives = pairs.own
    if "ids" in rows.known:
        same = _same_mass(constants, rows, columns, pairs)
        positives = same / jnp.maximum(rows.known["count"], 1)[:, None]
    return jnp.where(pairs.valid, positives + constants["temperature"] * similarity, 0.0)


def _likeness(constants, rows, columns, pairs):
    """RowSoftmax.targets before the softmax."""
    likeness = _matmul(rows.known["y"], columns.known["y"].T) / constants["softness"]
    return jnp.where(pairs.valid, likeness, -jnp.inf)


class _Softmax(NamedTuple):
    """Running log-sum-exp: the largest number so far, and the sum of exp(number - peak)."""

    peak: Float[Array, " t"]
    total: Float[Array, " t"]

    def add(self, logits, axis):
        peak = jnp.maximum(self.peak, logits.max(axis))
        new = jnp.exp(logits - jnp.expand_dims(peak, axis)).sum(axis)
        return _Softmax(peak, self.total * jnp.exp(self.peak - peak) + new)


def _empty_softmax(batch: int, dtype) -> _Softmax:
    return _Softmax(jnp.full(batch, FLOOR, dtype), jnp.zeros(batch, dtype))


def _masses(rule: _Rule, examples: _Examples, constants, tile: int) -> _Softmax:
    """Sum what each row is to be divided by, over all columns."""

    def visit(constants, rows, columns, masses, _):
        mass = rule.mass(constants, rows, columns, _pairs(rows, columns))
        if rule.normalise == "softmax":
            return masses.add(mass, axis=1), ()
        return masses._replace(total=masses.total + mass.astype(rule.dtype).sum(axis=1)), ()

    empty = _empty_softmax(len(examples.valid), rule.dtype)
    return sweep(visit, examples, examples, empty, (), constants, tile=tile)[0]


def _target(rule: _Rule, constants, rows, columns, pairs) -> Float[Array, "t t"]:
    """Return a tile of Y; zero for pairs that are not valid."""
    mass = rule.mass(constants, rows, columns, pairs).astype(rule.dtype)
    if not rule.normalise:
        return mass
    masses = rows.known["masses"]
    if rule.normalise == "softmax":
        mass = jnp.exp(mass - masses.peak[:, None])
    return mass / jnp.maximum(masses.total, 1e-12)[:, None]


# The losses, as sums over all pairs ----------------------------------------------------------


class _CrossEntropy(NamedTuple):
    """What the cross entropy of a row (or column) i is made of, summed over j.

    -sum_j Y_ij log softmax_j(l_ij) = (mass peak - hit) + mass log total: with the peak apart, a
    pair that is found with certainty loses no digits to the size of its logit.
    """

    softmax: _Softmax  # of l_ij
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
    pairs = _pairs(examples, others)
    target = _target(rule, constants, examples, others, pairs)
    logits = scale * _matmul(at_least_float32(x), at_least_float32(y).T)
    return jnp.where(pairs.candidate, logits, -jnp.inf), target


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _info_nce(rule, tile, image, text, scale, examples, constants):
    """Cross entropies of all rows and all columns, summed."""
    return _info_nce_forward(rule, tile, image, text, scale, examples, constants)[0]


def _info_nce_forward(rule, tile, image, text, scale, examples, constants):
    def visit(constants, rows, columns, row_sums, column_sums):
        logits, target = _logits_and_target(rule, *constants, rows, columns)
        return row_sums.add(logits, target, axis=1), column_sums.add(logits, target, axis=0)

    zero = jnp.zeros(len(image), rule.dtype)
    empty = _CrossEntropy(_empty_softmax(len(image), rule.dtype), zero, zero)
    pairs = (image, examples), (text, examples)
    sums = sweep(visit, *pairs, empty, empty, (constants, scale), tile=tile)
    value = sums[0].value().sum() + sums[1].value().sum()
    return value, (image, text, scale, examples, constants, sums)


def _info_nce_backward(rule, tile, residuals, cotangent):
    image, text, scale, examples, constants, sums = residuals

    def visit(constants, rows, columns, dx, dy):
        (*row, row_sums), (*column, column_sums) = rows, columns
        logits, target = _logits_and_target(rule, *constants, row, column)
        gradient = row_sums.gradient(logits, axis=1) + column_sums.gradient(logits, axis=0)
        return _through_product(gradient - 2 * target, row[0], column[0], dx, dy)

    pairs = (image, examples, sums[0]), (text, examples, sums[1])
    zero = jnp.zeros(image.shape, rule.dtype)
    dx, dy = sweep(visit, *pairs, zero, zero, (constants, scale), tile=tile)
    return *_embedding_gradients(cotangent, scale, image, text, dx, dy), None, None


_info_nce.defvjp(_info_nce_forward, _info_nce_backward)


def _through_product(gradient, x, y, dx, dy):
    """Add to dx and dy what a gradient of x y^T contributes."""
    dx = dx + _matmul(gradient, at_least_float32(y))
    return dx, dy + _matmul(gradient.T, at_least_float32(x))


def _embedding_gradients(cotangent, scale, image, text, dx, dy):
    """Gradients of image, text and scale, from those at scale 1."""
    d_scale = cotangent * (at_least_float32(image) * dx).sum()
    dx, dy = cotangent * scale * dx, cotangent * scale * dy
    return dx.astype(image.dtype), dy.astype(text.dtype), d_scale


def _signed_logits(constants, rows, columns):
    """Return z_ij and z_ij l_ij; the latter is inf, at no loss, where the pair is left out."""
    scale, bias = constants
    (x, examples), (y, others) = rows, columns
    pairs = _pairs(examples, others)
    logits = scale * _matmul(at_least_float32(x), at_least_float32(y).T) + bias
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
    pairs = _pairs(examples, others)
    own = pairs.own & pairs.candidate
    x, x_others, y = map(at_least_float32, (x, x_others, y))
    across = jnp.where(pairs.candidate, scale * _matmul(x, y.T), -jnp.inf)
    within = jnp.where(pairs.candidate & ~own, scale * _matmul(x, x_others.T), -jnp.inf)
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

    empty = _empty_softmax(len(x), scale.dtype), jnp.zeros(len(x), scale.dtype)
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
