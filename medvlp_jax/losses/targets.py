"""What a tile of the tiled losses knows of its pairs: who they are, and their targets.

Targets are computed from what belongs to single examples (the priors of contrastive.py), a tile at
a time; where a row must be normalised, its sum is made in a sweep of its own first.

Axis letters: B batch, t a tile.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from medvlp_jax.losses import contrastive
from medvlp_jax.losses.contrastive import ClinicalPrior, Prior, RowSoftmax, SameId, at_least_float32
from medvlp_jax.losses.pairs import sweep

FLOOR = -1e30  # peak of a softmax over nothing; finite, so that no inf - inf arises


class Examples(NamedTuple):
    """What a tile must know of its rows or columns besides their embeddings; all [B, ...]."""

    index: Int[Array, " B"]
    candidate: Bool[Array, " B"]  # stands in the logits; False also in the filled tail of a tile
    valid: Bool[Array, " B"]
    neutral: Int[Array, " B"] | None
    known: Mapping[str, Any]  # features the targets are computed from


def describe(candidate, valid, neutral, known) -> Examples:
    """Number the examples of a batch."""
    return Examples(jnp.arange(len(valid)), candidate, valid, neutral, known)


def knowing(examples: Examples, **known) -> Examples:
    """Add what was found out about each example."""
    return examples._replace(known={**examples.known, **known})


class Pairs(NamedTuple):
    """Which pairs of a tile [t, t] are what."""

    own: Bool[Array, "t t"]
    candidate: Bool[Array, "t t"]
    valid: Bool[Array, "t t"]


def pairs_of(rows: Examples, columns: Examples) -> Pairs:
    """Say which pairs of a tile are what."""
    own = _equal(rows.index, columns.index)
    candidate = rows.candidate[:, None] & columns.candidate[None, :]
    valid = rows.valid[:, None] & columns.valid[None, :]
    if rows.neutral is not None:
        taken = ~_equal(rows.neutral, columns.neutral) | own
        candidate, valid = candidate & taken, valid & taken
    return Pairs(own, candidate, valid)


def _equal(a, b):
    return a[:, None] == b[None, :]


def matmul(a, b):
    """Multiply in full precision, whatever the default of the backend."""
    return jnp.matmul(a, b, precision="highest")


class Links(NamedTuple):
    """Which reports each image of a batch is related to; the same as `relations.in_batch` makes.

    Attributes:
      column: numbers of the related reports.
      weight: T of each, at least 0.
      report: the number of the report in each row; -1 is related to nothing.
    """

    column: Int[Array, "B m"]
    weight: Float[Array, "B m"]
    report: Int[Array, " B"]


class Rule(NamedTuple):
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


def rule_of(prior: Prior | None, dtype) -> tuple[Rule, dict, dict]:
    """Return the rule of a prior, the [B, ...] arrays and the constants it works on."""
    if prior is None:
        return Rule(_own_mass, "", None, dtype), {}, {}
    if isinstance(prior, SameId):
        return Rule(_same_mass, "sum", None, dtype), {"ids": prior.ids}, {}
    if isinstance(prior, RowSoftmax):
        known = {"y": at_least_float32(prior.y)}
        return Rule(_likeness, "softmax", None, dtype), known, {"softness": prior.temperature}
    known = {"features": contrastive.standardise(prior.compared())}
    within = None
    if prior.has_report is not None:
        known["has_report"] = prior.has_report
    if prior.ids is not None:
        known["ids"] = prior.ids
        within = Rule(_same_mass, "sum", None, dtype)
    kernel = ClinicalPrior(None, kernel=prior.kernel)  # without its arrays: rules are static
    mass = lambda *tile: _clinical_mass(kernel, *tile)
    rule = Rule(mass, "sum" if prior.normalise else "", within, dtype)
    return rule, known, {"strength": prior.strength, "temperature": prior.temperature}


def rule_of_relations(related: Links | None, dtype) -> tuple[Rule, dict]:
    """Return the rule of relations, and the [B, ...] arrays it works on; None relates pairs."""
    if related is None:
        return Rule(_own_mass, "", None, dtype), {}
    return Rule(_related_mass, "", None, dtype), dict(related._asdict())


def _related_mass(constants, rows, columns, pairs):
    same = rows.known["column"][:, :, None] == columns.known["report"]  # [t, m, t]
    mass = jnp.where(same, rows.known["weight"][..., None], 0).sum(1)
    return jnp.where(pairs.valid, mass, 0)


def _own_mass(constants, rows, columns, pairs):
    return pairs.own & pairs.valid


def _same_mass(constants, rows, columns, pairs):
    return _equal(rows.known["ids"], columns.known["ids"]) & pairs.valid


def _similarity(kernel, constants, rows, columns, pairs):
    """ClinicalPrior.similarity of the pairs that are valid."""
    rho = matmul(rows.known["features"], columns.known["features"].T)
    rho = jnp.where(pairs.own, 0.0, jnp.maximum(rho, 0.0))
    similarity = kernel._replace(strength=constants["strength"]).smooth(rho)
    valid = pairs.valid
    if "has_report" in rows.known:
        both = rows.known["has_report"][:, None] & columns.known["has_report"][None, :]
        valid = valid & both
    return jnp.where(valid, similarity, 0.0)


def _clinical_mass(kernel, constants, rows, columns, pairs):
    """ClinicalPrior.targets before the normalisation."""
    similarity = _similarity(kernel, constants, rows, columns, pairs)
    positives = pairs.own
    if "ids" in rows.known:
        same = _same_mass(constants, rows, columns, pairs)
        positives = same / jnp.maximum(rows.known["count"], 1)[:, None]
    return jnp.where(pairs.valid, positives + constants["temperature"] * similarity, 0.0)


def _likeness(constants, rows, columns, pairs):
    """RowSoftmax.targets before the softmax."""
    likeness = matmul(rows.known["y"], columns.known["y"].T) / constants["softness"]
    return jnp.where(pairs.valid, likeness, -jnp.inf)


class Softmax(NamedTuple):
    """Running log-sum-exp: the largest number so far, and the sum of exp(number - peak)."""

    peak: Float[Array, " t"]
    total: Float[Array, " t"]

    def add(self, logits, axis):
        """Take in a tile of logits."""
        peak = jnp.maximum(self.peak, logits.max(axis))
        new = jnp.exp(logits - jnp.expand_dims(peak, axis)).sum(axis)
        return Softmax(peak, self.total * jnp.exp(self.peak - peak) + new)


def empty_softmax(batch: int, dtype) -> Softmax:
    """Return what has seen no number yet."""
    return Softmax(jnp.full(batch, FLOOR, dtype), jnp.zeros(batch, dtype))


def masses_of(rule: Rule, examples: Examples, constants, tile: int) -> Softmax:
    """Sum what each row is to be divided by, over all columns."""

    def visit(constants, rows, columns, masses, _):
        mass = rule.mass(constants, rows, columns, pairs_of(rows, columns))
        if rule.normalise == "softmax":
            return masses.add(mass, axis=1), ()
        return masses._replace(total=masses.total + mass.astype(rule.dtype).sum(axis=1)), ()

    empty = empty_softmax(len(examples.valid), rule.dtype)
    return sweep(visit, examples, examples, empty, (), constants, tile=tile)[0]


def prior_mass(prior: ClinicalPrior, *, tile: int) -> Float[Array, ""]:
    """contrastive.prior_mass in tiles: one sweep over the targets, without logits and gradient."""
    dtype = at_least_float32(prior.features).dtype
    _, known, constants = rule_of(prior._replace(ids=None), dtype)
    valid = known.get("has_report", jnp.ones(len(prior.features), bool))
    examples = describe(valid, valid, None, known)
    examples, constants = jax.lax.stop_gradient((examples, constants))
    kernel = ClinicalPrior(None, kernel=prior.kernel)
    # Without the own pair's 1, beside which a small S would lose digits.
    rule = Rule(lambda *tile: _similarity(kernel, *tile), "", None, dtype)
    total = masses_of(rule, examples, constants, tile).total.sum()
    return constants["temperature"] * total / jnp.maximum(valid.sum(), 1)


def totals_of(rule: Rule, examples: Examples, tile: int) -> tuple[Array, Array, Array]:
    """Sum a target over its rows and columns, and the trust of the images over its columns.

    Args:
      rule: of the target Y.
      examples: who know the `trust` c of their images.
      tile: largest side of a tile.

    Returns:
      sum_r Y_ir [B], sum_i Y_ir [B], sum_i c_i Y_ir [B].
    """

    def visit(_, rows, columns, row_total, column_totals):
        total, trusted = column_totals
        mass = target_of(rule, {}, rows, columns, pairs_of(rows, columns))
        trusted = trusted + matmul(rows.known["trust"], mass)
        return row_total + mass.sum(1), (total + mass.sum(0), trusted)

    zero = jnp.zeros(len(examples.valid), rule.dtype)
    row, (column, trusted) = sweep(visit, examples, examples, zero, (zero, zero), tile=tile)
    return row, column, trusted


def target_of(rule: Rule, constants, rows, columns, pairs) -> Float[Array, "t t"]:
    """Return a tile of Y; zero for pairs that are not valid."""
    mass = rule.mass(constants, rows, columns, pairs).astype(rule.dtype)
    if not rule.normalise:
        return mass
    masses = rows.known["masses"]
    if rule.normalise == "softmax":
        mass = jnp.exp(mass - masses.peak[:, None])
    return mass / jnp.maximum(masses.total, 1e-12)[:, None]
