"""Contrastive losses over the global batch, dense: short, readable, the oracle for the tiled ones.

Embeddings are unit-norm [B, E]; every loss is a float32 scalar (float64 when given float64).
Axis letters: B batch (i anchors, j candidates), E joint width, D report-feature width.

  InfoNCE           van den Oord et al. 2018, https://arxiv.org/abs/1807.03748; CLIP, https://arxiv.org/abs/2103.00020
  sigmoid           SigLIP, Zhai et al. 2023, https://arxiv.org/abs/2303.15343, Eq. 1
  clinical prior    IMITATE, Liu et al. 2023, https://arxiv.org/abs/2310.07355, released code
  row softmax       PRIMA, Wang et al. 2026, https://arxiv.org/abs/2602.23297, Eq. 6
  two views         PRIMA, Eq. 2

Targets are constants: no gradient flows into a prior.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

KERNELS = {
    # S as a function of the clipped correlation; all but "exp" also put mass on the diagonal.
    "exp": lambda rho, strength: 1.0 - jnp.exp(-strength * rho),
    "gaussian": lambda rho, strength: jnp.exp(-(rho**2) / 2.0) / jnp.sqrt(2.0 * jnp.pi),
    "laplacian": lambda rho, strength: 0.5 * jnp.exp(-jnp.abs(rho)),
    "sigmoid": lambda rho, strength: jax.nn.sigmoid(rho),
}


class SameId(NamedTuple):
    """Targets where rows with equal ids share the mass: Y_ij = 1[id_i = id_j] / n_i.

    Attributes:
      ids: [B] integers, for instance a hash of the report text.
    """

    ids: Int[Array, " B"]

    def targets(
        self, valid: Bool[Array, " B"], neutral: Int[Array, " B"] | None = None
    ) -> Float[Array, "B B"]:
        """Return Y [B, B]; zero for invalid rows and columns and for neutral pairs."""
        same = (self.ids[:, None] == self.ids[None, :]) & pairwise(valid, neutral)
        return same / jnp.maximum(same.sum(axis=1, keepdims=True), 1)


class RowSoftmax(NamedTuple):
    """PRIMA's soft target, Eq. 6: Y_ij = softmax_j(<y_i, y_j> / temperature).

    Attributes:
      y: [B, D] descriptions of the examples, for instance one-hot metadata; not unit-norm.
      temperature: divides the inner products, above 0; small makes the target one-hot.
    """

    y: Float[Array, "B D"]
    temperature: float | Float[Array, ""]

    def targets(
        self, valid: Bool[Array, " B"], neutral: Int[Array, " B"] | None = None
    ) -> Float[Array, "B B"]:
        """Return Y [B, B]; zero for invalid rows and columns and for neutral pairs."""
        y = at_least_float32(self.y)
        likeness = jnp.matmul(y, y.T, precision="highest") / self.temperature
        pairs = pairwise(valid, neutral)
        # An invalid row has nothing to sum over: softmax divides by zero, the outer `where` acts.
        return jnp.where(pairs, jax.nn.softmax(likeness, axis=1, where=pairs), 0.0)


class ClinicalPrior(NamedTuple):
    """IMITATE's soft target Y = P + temperature * S, not normalised to sum 1.

    P is the identity, or SameId(ids) where ids are given. S = kernel(max(rho, 0)) with a zero
    diagonal in rho, where rho is the Pearson correlation of the raw report features.

    Attributes:
      features: raw report features [B, D]; no gradient flows into them.
      strength: lambda of the "exp" kernel, the paper's 0.2; the other kernels ignore it.
      kernel: one of KERNELS.
      temperature: that of the logits this prior is used with.
      ids: [B] integers; rows with equal ids are positives of one another. None: only the pair is.
      has_report: [B] bool; where False the row takes part without a prior. None: all have one.
      centre: subtract their mean over the batch, where there is a report, from the features first
        (our extension, IMITATE spec 1.12).
      normalise: scale each row of Y to sum 1 (our extension, spec 1.9 Q1).
    """

    features: Float[Array, "B D"]
    strength: float = 0.2
    kernel: str = "exp"
    temperature: float | Float[Array, ""] = 0.07
    ids: Int[Array, " B"] | None = None
    has_report: Bool[Array, " B"] | None = None
    centre: bool = False
    normalise: bool = False

    def similarity(self) -> Float[Array, "B B"]:
        """Return S [B, B] in [0, 1 - exp(-strength)] for the "exp" kernel."""
        rho = jnp.maximum(pearson(self.compared()), 0.0)
        rho = jnp.where(jnp.eye(len(rho), dtype=bool), 0.0, rho)
        smoothed = self.smooth(rho)
        if self.has_report is not None:
            smoothed = jnp.where(pairwise(self.has_report), smoothed, 0.0)
        return jax.lax.stop_gradient(smoothed)

    def compared(self) -> Float[Array, "B D"]:
        """Return the features that are correlated: less the mean of those that count, or raw."""
        if not self.centre:
            return self.features
        if self.has_report is None:
            return self.features - self.features.mean(axis=0)
        counts = self.has_report[:, None]
        total = jnp.where(counts, self.features, 0).sum(axis=0)
        return self.features - total / jnp.maximum(counts.sum(), 1)

    def smooth(self, rho: Float[Array, "..."]) -> Float[Array, "..."]:
        """Apply the kernel to clipped correlations.

        Raises:
          ValueError: for a kernel that is not one of KERNELS.
        """
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {self.kernel!r}")
        return KERNELS[self.kernel](rho, self.strength)

    def targets(
        self, valid: Bool[Array, " B"], neutral: Int[Array, " B"] | None = None
    ) -> Float[Array, "B B"]:
        """Return Y [B, B]; zero for invalid rows and columns and for neutral pairs."""
        positives = jnp.eye(len(valid))
        if self.ids is not None:
            positives = SameId(self.ids).targets(valid, neutral)
        target = positives + self.temperature * self.similarity()
        target = jnp.where(pairwise(valid, neutral), target, 0.0)
        if self.normalise:
            target = target / jnp.maximum(target.sum(axis=1, keepdims=True), 1e-12)
        return target


Prior = ClinicalPrior | RowSoftmax | SameId


def prior_mass(prior: ClinicalPrior) -> Float[Array, ""]:
    """Return temperature * mean_i sum_j S_ij: what a target's row holds besides its own pair's 1.

    Of the rows that have a report, and before they are normalised. It grows with the batch: S_ij is
    small, but where reports are alike so are all of them (IMITATE spec 1.2.3).
    """
    mass = prior.temperature * prior.similarity().sum(axis=1)  # 0 without a report
    count = len(mass) if prior.has_report is None else jnp.maximum(prior.has_report.sum(), 1)
    return mass.sum() / count


def info_nce(
    image: Float[Array, "B E"],
    text: Float[Array, "B E"],
    scale: float | Float[Array, ""],
    *,
    prior: Prior | None = None,
    valid: Bool[Array, " B"] | None = None,
    invalid: Literal["drop", "keep"] = "drop",
    neutral: Int[Array, " B"] | None = None,
) -> Float[Array, ""]:
    """Mean of the image-to-text and text-to-image cross entropies.

      1/2 [ -1/N sum_ij Y_ij log softmax_j(scale <x_i, y_j>) - 1/N sum_ij Y_ij log softmax_i(...) ]

    IMITATE's C(x, y; tau, S) is twice this with scale = 1 / tau and a ClinicalPrior.

    Args:
      image: unit-norm embeddings [B, E].
      text: unit-norm embeddings [B, E]; row i belongs to image i.
      scale: multiplies the cosines, 1 / temperature.
      prior: the targets Y; None is the identity.
      valid: False where an example has no text (or image). None: all valid.
      invalid: "drop" removes invalid rows as anchors and as negatives and divides by the number
        of valid ones; "keep" leaves them as negatives and divides by B, the closest reading of
        what IMITATE's released code intends.
      neutral: [B] ids of, for instance, the patient: two examples with equal ids are neither
        positive nor negative of one another, whatever the prior; the pair itself stays.

    Returns:
      Scalar, at least 0; 0 where nothing is valid.
    """
    x, y = at_least_float32(image), at_least_float32(text)
    count = len(x)
    valid = jnp.ones(count, bool) if valid is None else valid
    candidate, denominator = anchors(valid, invalid)
    target = jnp.eye(count) * valid if prior is None else prior.targets(valid, neutral)
    target = jax.lax.stop_gradient(target)
    logits = scale * jnp.matmul(x, y.T, precision="highest")  # [B, B]
    logits = jnp.where(pairwise(candidate, neutral), logits, -jnp.inf)
    rows = soft_cross_entropy(logits, target)
    columns = soft_cross_entropy(logits.T, target.T)
    return 0.5 * (rows + columns) / denominator


def sigmoid(
    image: Float[Array, "B E"],
    text: Float[Array, "B E"],
    scale: float | Float[Array, ""],
    bias: float | Float[Array, ""],
    *,
    valid: Bool[Array, " B"] | None = None,
    neutral: Int[Array, " B"] | None = None,
) -> Float[Array, ""]:
    """SigLIP: -1/N sum_ij log sigmoid(z_ij (scale <x_i, y_j> + bias)), z = 1 for pairs, else -1.

    Args:
      image: unit-norm embeddings [B, E].
      text: unit-norm embeddings [B, E].
      scale: multiplies the cosines; learned in SigLIP, starts at 10.
      bias: added to the logits; learned in SigLIP, starts at -10.
      valid: False where an example has no text; such rows and columns are left out.
      neutral: [B] ids; two examples with equal ids are neither positive nor negative, see info_nce.

    Returns:
      Scalar, at least 0; 0 where nothing is valid.
    """
    x, y = at_least_float32(image), at_least_float32(text)
    valid = jnp.ones(len(x), bool) if valid is None else valid
    logits = scale * jnp.matmul(x, y.T, precision="highest") + bias  # [B, B]
    sign = 2.0 * jnp.eye(len(x), dtype=logits.dtype) - 1.0
    loss = jnp.where(pairwise(valid, neutral), -jax.nn.log_sigmoid(sign * logits), 0.0)
    return loss.sum() / jnp.maximum(valid.sum(), 1)


def view_consistency(
    first: Float[Array, "B E"],
    second: Float[Array, "B E"],
    scale: float | Float[Array, ""],
    *,
    symmetric: bool = False,
) -> Float[Array, ""]:
    """PRIMA Eq. 2: the second view of an image among all second views and all other first ones.

      -1/N sum_i log exp(l_ii) / sum_k [exp(l_ik) + 1[k != i] exp(scale <x_i, x_k>)]

    with l_ik = scale <x_i, y_k>: 2 N - 1 terms.

    Args:
      first: unit-norm embeddings x [B, E] of one view of each image.
      second: unit-norm embeddings y [B, E] of the other.
      scale: multiplies the cosines, 1 / temperature.
      symmetric: the mean over both views as anchors (SimCLR's NT-Xent); the paper has the first.

    Returns:
      Scalar, at least 0.
    """
    x, y = at_least_float32(first), at_least_float32(second)
    across = scale * jnp.matmul(x, y.T, precision="highest")  # [B, B]
    within = scale * jnp.matmul(x, x.T, precision="highest")
    within = jnp.where(jnp.eye(len(x), dtype=bool), -jnp.inf, within)
    total = jax.nn.logsumexp(jnp.concatenate([across, within], axis=1), axis=1)
    loss = (total - jnp.diagonal(across)).mean()
    if not symmetric:
        return loss
    return (loss + view_consistency(second, first, scale)) / 2


def soft_semantic(
    image: Float[Array, "B J E"],
    text: Float[Array, "B E"],
    y: Float[Array, "B D"],
    *,
    temperature: float | Float[Array, ""],
    label_temperature: float | Float[Array, ""],
    norm: Literal["mean", "paper"] = "mean",
    loss: Callable[..., Array] = info_nce,
) -> Float[Array, ""]:
    """PRIMA Eq. 6: InfoNCE of every view and the text with RowSoftmax(y) as target, averaged.

    Args:
      image: unit-norm embeddings of J views.
      text: unit-norm embeddings.
      y: [B, D] metadata as numbers, for instance one-hot; not unit-norm.
      temperature: of the cosines.
      label_temperature: of the inner products of y; small makes the target one-hot.
      norm: "mean" divides by N, as Eq. 3 does; "paper" by N^2 as printed, which weighs the loss by
        1 / N although each row of the targets sums to 1.
      loss: this info_nce, or tiled.info_nce.

    Raises:
      ValueError: for another `norm`.
    """
    if norm not in ("mean", "paper"):
        raise ValueError(f"norm must be 'mean' or 'paper', got {norm!r}")
    prior, views = RowSoftmax(y, label_temperature), image.shape[1]
    total = sum(loss(image[:, j], text, 1 / temperature, prior=prior) for j in range(views))
    return total / views / (1 if norm == "mean" else len(text))


def grouped(
    loss: Callable[..., Array], size: int, *, one_by_one: bool = False
) -> Callable[..., Array]:
    """Evaluate `loss` inside groups of `size` consecutive examples and average the groups.

    IMITATE contrasts within the 128 examples of one device; with this the same loss is had on any
    number of devices. size = 0 is one group: the global batch.

    Args:
      loss: function of arrays [B, ...] (or None) to a scalar.
      size: examples a group; must divide B.
      one_by_one: loop over the groups instead of batching them: for groups so large that the loss
        is tiled.

    Raises:
      ValueError: when `size` does not divide the batch.
    """
    if not size:
        return loss

    def averaged(*arrays):
        batch = len(next(a for a in arrays if a is not None))
        if batch % size:
            raise ValueError(f"a batch of {batch} does not split into contrast groups of {size}")
        split = [a if a is None else a.reshape(batch // size, size, *a.shape[1:]) for a in arrays]
        if one_by_one:
            return jax.lax.map(lambda group: loss(*group), split).mean()
        return jax.vmap(loss)(*split).mean()

    return averaged


def pearson(features: Float[Array, "B D"]) -> Float[Array, "B B"]:
    """Pearson correlation between rows, each centred by its own mean; in at least float32."""
    unit = standardise(features)
    return jnp.matmul(unit, unit.T, precision="highest")


def standardise(features: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """Centre each row by its own mean and scale it to norm 1; in at least float32."""
    centred = at_least_float32(features)
    centred = centred - centred.mean(axis=1, keepdims=True)
    norm = jnp.sqrt((centred**2).sum(axis=1, keepdims=True))
    return centred / jnp.maximum(norm, 1e-12)


def soft_cross_entropy(
    logits: Float[Array, "B B"], target: Float[Array, "B B"]
) -> Float[Array, ""]:
    """-sum_ij target_ij log softmax_j(logits_i); entries of zero target may hold -inf."""
    present = target != 0
    peak = jnp.max(logits, axis=1, keepdims=True, where=jnp.isfinite(logits), initial=-1e30)
    shifted = logits - jax.lax.stop_gradient(peak)
    log_total = jnp.log(
        jnp.exp(shifted).sum(axis=1, keepdims=True) + (~present.any(1, keepdims=True))
    )
    return -jnp.where(present, target * (jnp.where(present, shifted, 0.0) - log_total), 0.0).sum()


def anchors(
    valid: Bool[Array, " B"], invalid: str
) -> tuple[Bool[Array, " B"], int | Int[Array, ""]]:
    """Return which examples stand in the logits, and what the sum over anchors is divided by.

    Raises:
      ValueError: for an `invalid` other than "drop" or "keep".
    """
    if invalid == "drop":
        return valid, jnp.maximum(valid.sum(), 1)
    if invalid == "keep":
        return jnp.ones_like(valid), len(valid)
    raise ValueError(f"invalid must be 'drop' or 'keep', got {invalid!r}")


def pairwise(
    valid: Bool[Array, " B"], neutral: Int[Array, " B"] | None = None
) -> Bool[Array, "B B"]:
    """True where both examples are valid and the pair is not neutral."""
    both = valid[:, None] & valid[None, :]
    if neutral is None:
        return both
    same = neutral[:, None] == neutral[None, :]
    return both & (~same | jnp.eye(len(valid), dtype=bool))


def at_least_float32(x: Array) -> Array:
    """Raise bfloat16 and float16 to float32; leave float32 and float64."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
