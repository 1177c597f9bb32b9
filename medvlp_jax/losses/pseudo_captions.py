"""S-CLIP: images without a report learn from the reports of those that have one.

Mo, Kim, Lee, Shin, "S-CLIP: Semi-supervised Vision-Language Learning using Few Specialist
Captions", NeurIPS 2023, https://arxiv.org/abs/2305.14095. With u_j the unpaired images of a batch,
x_i, y_i its pairs, k_c the different keywords of their reports, all of unit norm, s the scale:

  captions  q_j = the row of the plan that carries the u to the x at the least cost 1 - u_j . x_i,
            entropy counting 1 / s, scaled to sum 1
            L = -mean_j sum_i q_ji log softmax_i(s u_j . y_i)
  keywords  C_j = the keywords in the report of the x_i nearest to u_j
            q_j = softmax over C_j of s u_j . k_c
            L = -mean_j sum_{c in C_j} q_jc log softmax_c(s u_j . k_c)

No gradient passes through q. That the nearest is the one of the highest cosine, that equal
keywords are one, and that keywords weigh by the same scale is our choice.

Memory is B x B and B x B N: a control, not for the largest batches.

Axis letters: B batch, N keywords of a report, T tokens, E joint width.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from medvlp_jax.losses.contrastive import at_least_float32
from medvlp_jax.losses.targets import FLOOR, matmul

SWEEPS = 100  # of Sinkhorn's algorithm


def transport(
    cost: Float[Array, "I J"],
    rows: Bool[Array, " I"],
    columns: Bool[Array, " J"],
    *,
    entropy: float | Float[Array, ""],
    sweeps: int = SWEEPS,
) -> Float[Array, "I J"]:
    """Return the entropic optimal transport plan between uniform weights, each row scaled to 1.

    Cuturi 2013, https://arxiv.org/abs/1306.0895, in logarithms.

    Args:
      cost: of carrying a row to a column.
      rows: which take part; the others get zeros.
      columns: likewise.
      entropy: what it counts in the objective; the smaller, the sharper, the slower to converge.
      sweeps: over rows and columns.
    """
    there = rows[:, None] & columns[None, :]
    scores = jnp.where(there, -cost / entropy, FLOOR)
    weights = [-jnp.log(jnp.maximum(side.sum(), 1)) for side in (rows, columns)]

    def sweep(_, by_column):
        by_row = jnp.where(rows, weights[0] - jax.nn.logsumexp(scores + by_column, 1), 0)
        taken = jax.nn.logsumexp(scores + by_row[:, None], 0)
        return jnp.where(columns, weights[1] - taken, 0)

    by_column = jax.lax.fori_loop(0, sweeps, sweep, jnp.zeros(cost.shape[1], scores.dtype))
    return jnp.where(there, jax.nn.softmax(scores + by_column, 1), 0)


def caption_loss(
    image: Float[Array, "B E"],
    text: Float[Array, "B E"],
    scale: float | Float[Array, ""],
    *,
    pairs: Bool[Array, " B"],
    apart: Bool[Array, " B"],
) -> Float[Array, ""]:
    """Return the cross entropy of unpaired images with the captions carried to them.

    Args:
      image: unit norm.
      text: unit norm, of the pairs; those of other rows are not read.
      scale: s, 1 / temperature.
      pairs: rows that are an image with its own report.
      apart: rows whose image has none. Zero where there are none, or no pairs.
    """
    image, text = at_least_float32(image), at_least_float32(text)
    scale = jnp.asarray(scale, image.dtype)
    fixed = jax.lax.stop_gradient((image, scale))
    plan = transport(1 - matmul(fixed[0], fixed[0].T), apart, pairs, entropy=1 / fixed[1])
    logits = jnp.where(pairs, scale * matmul(image, text.T), FLOOR)
    return _mean(-(plan * jax.nn.log_softmax(logits, 1)).sum(1), apart & pairs.any())


def keyword_loss(
    image: Float[Array, "B E"],
    keywords: Float[Array, "B N E"],
    ids: Int[Array, "B N T"],
    scale: float | Float[Array, ""],
    *,
    told: Bool[Array, "B N"],
    pairs: Bool[Array, " B"],
    apart: Bool[Array, " B"],
) -> Float[Array, ""]:
    """Return the partial-label loss of unpaired images: one of these keywords, not which.

    Args:
      image: unit norm.
      keywords: of each report, unit norm.
      ids: their tokens; equal ones are one keyword.
      scale: s.
      told: which keywords exist.
      pairs: rows that are an image with its own report.
      apart: rows whose image has none; counted where the nearest pair has a keyword.
    """
    image, keywords = at_least_float32(image), at_least_float32(keywords)
    told = told & pairs[:, None]
    flat, words, there = (x.reshape(-1, *x.shape[2:]) for x in (keywords, ids, told))
    same = (words[:, None] == words[None, :]).all(-1) & there[:, None] & there
    first = there & (jnp.argmax(same, 0) == jnp.arange(len(flat)))  # of equal ones
    holds = same.reshape(*told.shape, -1).any(1)  # [B, B N], a report and a keyword
    cosine = jnp.where(pairs, matmul(image, image.T), FLOOR)
    candidate = holds[jnp.argmax(cosine, 1)]
    logits = jnp.where(first, scale * matmul(image, flat.T), FLOOR)
    share = jax.nn.softmax(jnp.where(candidate, logits, FLOOR), 1)
    share = jax.lax.stop_gradient(jnp.where(candidate, share, 0))
    return _mean(-(share * jax.nn.log_softmax(logits, 1)).sum(1), apart & candidate.any(1))


def _mean(terms, counts):
    return jnp.where(counts, terms, 0).sum() / jnp.maximum(counts.sum(), 1)
