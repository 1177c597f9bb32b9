"""LGDEA's evidence space: prototypes shared by report phrases and image lesions.

Yan, Bai, Yang, Chen, "LLM-Guided Diagnostic Evidence Alignment for Medical Vision-Language
Pretraining under Limited Pairing", https://arxiv.org/abs/2602.07540. No code is public: equations
4-9 are the authors', as quoted by a third party; the other forms here are our choice and say so
(docs/lgdea.md). What happens between images and reports that are no pairs is in `relations`.

Axis letters: B batch, N phrases of a report or lesions of an image, E evidence width, K prototypes.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from medvlp_jax.losses.contrastive import at_least_float32
from medvlp_jax.losses.targets import FLOOR

_TINY = 1e-30  # below any share a softmax gives; a logarithm of zero would not be finite


def assignments(
    z: Float[Array, "*rest E"], prototypes: Float[Array, "K E"], *, temperature: float
) -> Float[Array, "*rest K"]:
    """Return p(k | z) = softmax_k(z . mu_k / temperature): Eq. 4 (phrases) and 6 (lesions)."""
    z, prototypes = at_least_float32(z), at_least_float32(prototypes)
    logits = jnp.einsum("...e,ke->...k", z, prototypes, precision="highest")
    return jax.nn.softmax(logits / temperature, axis=-1)


def distribution(
    shares: Float[Array, "B N K"], mask: Bool[Array, "B N"] | None = None
) -> Float[Array, "B K"]:
    """Return the mean over lesions (Eq. 7) or real phrases (Eq. 8); uniform where there is none."""
    if mask is None:
        return shares.mean(1)
    count = mask.sum(1)[:, None]
    mean = jnp.where(mask[..., None], shares, 0).sum(1) / jnp.maximum(count, 1)
    return jnp.where(count > 0, mean, 1 / shares.shape[-1])


def reconstruction(
    z: Float[Array, "*rest E"],
    mask: Bool[Array, "*rest"],
    prototypes: Float[Array, "K E"],
    *,
    temperature: float,
    shrinkage: float,
) -> Float[Array, ""]:
    """Return the mean of || z_n - sum_k p(k|z_n) mu_k ||^2 + shrinkage * sum_k || mu_k ||^2: Eq. 5.

    Gradients flow into the phrases and the prototypes.

    Args:
      z: phrases, unit norm.
      mask: True = real; the mean is over these, and zero without any.
      prototypes: mu, of any norm.
      temperature: tau_t of Eq. 4, above 0.
      shrinkage: lambda_mu, at least 0.
    """
    z, prototypes = at_least_float32(z), at_least_float32(prototypes)
    shares = assignments(z, prototypes, temperature=temperature)
    rebuilt = jnp.einsum("...k,ke->...e", shares, prototypes, precision="highest")
    errors = jnp.where(mask, ((z - rebuilt) ** 2).sum(-1), 0)
    return errors.sum() / jnp.maximum(mask.sum(), 1) + shrinkage * (prototypes**2).sum()


def divergence(
    target: Float[Array, "B K"], found: Float[Array, "B K"], *, fixed: bool = True
) -> Float[Array, " B"]:
    """Return KL(target || found) of each row, zero shares count 0.

    Args:
      target: the teacher's.
      found: the one's that is taught.
      fixed: no gradient into the target.
    """
    target, found = at_least_float32(target), at_least_float32(found)
    target = jax.lax.stop_gradient(target) if fixed else target
    ratio = jnp.log(jnp.maximum(target, _TINY)) - jnp.log(jnp.maximum(found, _TINY))
    return (target * ratio).sum(-1)


def paired_divergence(
    report_distribution: Float[Array, "B K"],
    image_distribution: Float[Array, "B K"],
    *,
    valid: Bool[Array, " B"] | None = None,
    fixed: bool = True,
) -> Float[Array, ""]:
    """Return L_evid^p, the mean over pairs of KL(Qbar_R || Qbar_I): Eq. 9.

    Args:
      report_distribution: the teacher, Eq. 8.
      image_distribution: Eq. 7.
      valid: which rows are pairs; None means all.
      fixed: no gradient into the report's, as a third party reads the paper.
    """
    terms = divergence(report_distribution, image_distribution, fixed=fixed)
    weight = jnp.ones(len(terms), terms.dtype) if valid is None else valid.astype(terms.dtype)
    return _weighted_mean(terms, weight)


def unpaired_divergence(
    pseudo_distribution: Float[Array, "B K"],
    image_distribution: Float[Array, "B K"],
    confidence: Float[Array, " B"],
) -> Float[Array, ""]:
    """Return L_evid^u = sum_i c_i KL(Qtil_i || Qbar_I,i) / sum_i c_i; zero where no c_i is above 0.

    The name is the paper's, the form our choice.

    Args:
      pseudo_distribution: Qtil, what the reports related to an image say, see `relations.pseudo`.
      image_distribution: Qbar_I, Eq. 7.
      confidence: c in [0, 1]; 0 leaves an image out.
    """
    return _weighted_mean(divergence(pseudo_distribution, image_distribution), confidence)


def alignment(
    image: Float[Array, "I E"],
    report: Float[Array, "R E"],
    target: Float[Array, "I R"],
    *,
    image_confidence: Float[Array, " I"],
    report_confidence: Float[Array, " R"],
    temperature: float,
    told: Bool[Array, " R"] | None = None,
) -> Float[Array, ""]:
    """Return L_evi-align: contrast in evidence space, with soft positives from relations.

      s_ir = a_i . b_r / temperature
      L = -1/2 [ sum_i c_i sum_r That_ir log softmax_r s_ir / sum_i c_i
               + sum_r c_r sum_i That'_ri log softmax_i s_ir / sum_r c_r ]

    That and That' are the rows and columns of the target, each scaled to sum 1; a row or column
    of zeros has no positive and counts nowhere. Zero where nothing has one. The name is the
    paper's, the form our choice: the specification's divides by all rows instead of their trust,
    so that each positive counts the less, the fewer rows of a batch have one.

    Args:
      image: a, unit norm: the direction of the mean lesion.
      report: b, unit norm: the direction of the mean phrase.
      target: relation of each image and report, at least 0; 1 for a pair. No gradient.
      image_confidence: c_i in [0, 1].
      report_confidence: c_r in [0, 1].
      temperature: tau_a, above 0.
      told: reports that say something; the others, of which no image is related to any, are no
        negatives either. None means all.
    """
    image, report = at_least_float32(image), at_least_float32(report)
    target = jax.lax.stop_gradient(at_least_float32(target))
    logits = jnp.einsum("ie,re->ir", image, report, precision="highest") / temperature
    if told is not None:
        logits = jnp.where(told, logits, FLOOR)

    def direction(logits, target, confidence):
        total = target.sum(-1, keepdims=True)
        share = jnp.where(total > 0, target / jnp.where(total > 0, total, 1), 0)
        terms = (share * jax.nn.log_softmax(logits, axis=-1)).sum(-1)
        return _weighted_mean(terms, jnp.where(total[:, 0] > 0, confidence, 0))

    to_report = direction(logits, target, image_confidence)
    return -(to_report + direction(logits.T, target.T, report_confidence)) / 2


def mean_direction(
    z: Float[Array, "B N E"], mask: Bool[Array, "B N"] | None = None
) -> Float[Array, "B E"]:
    """Return the unit vector of the mean over lesions or real phrases; zero where there is none."""
    z = at_least_float32(z)
    total = (z if mask is None else jnp.where(mask[..., None], z, 0)).sum(1)
    return total * jax.lax.rsqrt(jnp.maximum((total**2).sum(-1, keepdims=True), 1e-24))


def usage_entropy(distributions: Float[Array, "B K"]) -> Float[Array, ""]:
    """Return the entropy of the mean assignment over ln K: 1 all prototypes alike, 0 one alone."""
    share = at_least_float32(distributions).mean(0)
    return -(share * jnp.log(jnp.maximum(share, _TINY))).sum() / math.log(len(share))


def spherical_kmeans(
    z: Float[Array, "N E"], count: int, *, key: jax.Array, steps: int = 20
) -> tuple[Float[Array, "K E"], Int[Array, " N"]]:
    """Return unit-norm centres and the centre of each vector: where the prototypes start.

    Starts are drawn as in greedy k-means++ (the best of 2 + ln K draws), with 1 - cosine as the
    squared distance; a centre that loses all its vectors stays where it is.

    Args:
      z: unit norm; at least `count` rows.
      count: K.
      key: of the starts.
      steps: of Lloyd's algorithm.
    """
    z = at_least_float32(jnp.asarray(z))
    cosine = lambda centre: jnp.einsum("ne,...e->...n", z, centre, precision="highest")
    keys, tries = jax.random.split(key, count), 2 + int(math.log(count))
    centres = jnp.zeros((count, z.shape[1]), z.dtype)
    centres = centres.at[0].set(z[jax.random.randint(keys[0], (), 0, len(z))])

    def start(k, carry):
        centres, distance = carry
        rows = jax.random.categorical(keys[k], jnp.log(distance + 1e-12), shape=(tries,))
        left = jnp.minimum(distance, jnp.maximum(1 - cosine(z[rows]), 0))  # [tries, N]
        best = left.sum(1).argmin()
        return centres.at[k].set(z[rows[best]]), left[best]

    first = jnp.maximum(1 - cosine(centres[0]), 0)
    centres, _ = jax.lax.fori_loop(1, count, start, (centres, first))

    def move(_, centres):
        nearest = cosine(centres).argmax(0)  # [N]
        total = jax.ops.segment_sum(z, nearest, count)
        norm = jnp.linalg.norm(total, axis=-1, keepdims=True)
        return jnp.where(norm > 0, total / jnp.where(norm > 0, norm, 1), centres)

    centres = jax.lax.fori_loop(0, steps, move, centres)
    return centres, cosine(centres).argmax(0)


def _weighted_mean(terms, weight):
    total = weight.sum()
    return (weight * terms).sum() / jnp.where(total > 0, total, 1)
