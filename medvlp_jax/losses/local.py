"""Losses between parts: words of a text and places of an image, inside each example.

  token-patch alignment   PRIMA, Wang et al. 2026, https://arxiv.org/abs/2602.23297, Eq. 4-5
  direct alignment        its ablation L_loc_dir

Axis letters: B batch, J views, L text tokens, K patches, D width.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from medvlp_jax.losses.contrastive import at_least_float32, info_nce


def token_patch_alignment(
    tokens: Float[Array, "B L D"],
    mask: Bool[Array, "B L"],
    patches: Float[Array, "B J K D"],
    *,
    temperature: float | Float[Array, ""],
    printed: bool = False,
) -> Float[Array, ""]:
    """Contrast each token with what it attends to in its own image; memory B J L (L + K).

      alpha_lk = softmax_k(<q_l, p_k> / sqrt(D)),   v_l = sum_k alpha_lk p_k
      -1/2 mean_l [log exp(c_ll) / sum_m exp(c_lm) + log exp(c_ll) / sum_m exp(c_ml)]

    with c_lm = cos(q_l, v_m) / temperature; the mean is over the tokens of all texts and views.
    Negatives are the other tokens of the same text and view.

    Args:
      tokens: q, as projected, not unit-norm.
      mask: False for padding, which is neither anchor nor negative.
      patches: p, likewise.
      temperature: of the cosines; the attention has none.
      printed: take the second term as the paper prints it, which repeats the first; else its
        transpose, which is what is meant.

    Returns:
      Scalar, at least 0; 0 where no token is valid.
    """
    q, p = at_least_float32(tokens), at_least_float32(patches)
    # Whatever stands in padding, its gradient is zero and not NaN.
    q = jnp.where(mask[..., None], q, 0.0)
    highest = {"precision": "highest"}
    attention = jnp.einsum("bld,bjkd->bjlk", q, p, **highest) / jnp.sqrt(q.shape[-1])
    seen = jnp.einsum("bjlk,bjkd->bjld", jax.nn.softmax(attention), p, **highest)
    cosines = jnp.einsum("bld,bjmd->bjlm", _unit(q, mask[..., None]), _unit(seen), **highest)
    # Padding sees itself alone, so that there is always something to sum over.
    pairs = (mask[:, :, None] & mask[:, None, :])[:, None] | jnp.eye(q.shape[1], dtype=bool)
    logits = cosines / temperature
    own = jnp.diagonal(logits, axis1=-2, axis2=-1)  # [B, J, L]

    log_share = lambda axis: own - jax.nn.logsumexp(logits, axis=axis, where=pairs)
    forth = log_share(-1)
    back = forth if printed else log_share(-2)
    valid = jnp.broadcast_to(mask[:, None], own.shape)
    return -jnp.where(valid, (forth + back) / 2, 0.0).sum() / jnp.maximum(valid.sum(), 1)


def direct_alignment(
    tokens: Float[Array, "B L D"],
    mask: Bool[Array, "B L"],
    patches: Float[Array, "B J K D"],
    *,
    temperature: float | Float[Array, ""],
    loss: Callable[..., Array] = info_nce,
) -> Float[Array, ""]:
    """Contrast mean words with mean patches over the batch, averaged over views: L_loc_dir.

    PRIMA's ablation without the attention; the paper gives no equation, this one is our choice.

    Args:
      tokens: q, as projected, not unit-norm.
      mask: False for padding; a text without a token is no anchor and no negative.
      patches: p, likewise.
      temperature: of the cosines.
      loss: this info_nce, or tiled.info_nce.
    """
    q, p = at_least_float32(tokens), at_least_float32(patches)
    some = mask.any(1)
    mean = jnp.where(mask[..., None], q, 0.0).sum(1) / jnp.maximum(mask.sum(1, keepdims=True), 1)
    words, seen = _unit(mean, some[:, None]), _unit(p.mean(2))
    views = [loss(seen[:, j], words, 1 / temperature, valid=some) for j in range(p.shape[1])]
    return sum(views) / len(views)


def _unit(x, real=True):
    norm = jnp.sqrt(jnp.where(real, (x**2).sum(-1, keepdims=True), 1.0))
    return x / jnp.maximum(norm, 1e-12)
