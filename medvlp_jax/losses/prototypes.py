"""Class prototypes and the relations CFCML learns from them.

Liu, Liu, Shang, Yu, Han, Wan, "CFCML: A Coarse-to-Fine Crossmodal Learning Framework For Disease
Diagnosis Using Multimodal Images and Tabular Data", https://arxiv.org/abs/2603.20016, in the form
of the released code (docs/cfcml.md, "What the released code does otherwise, and what is our
choice").

  l(a; P, N) = -log( sum_P e^{cos(a,p)/t} / (sum_P e^{cos(a,p)/t} + sum_N e^{cos(a,n)/t}) + eps )

Everything is over the global batch; a class of which the batch has no sample takes no part.
Axis letters: M modalities, B batch (i anchors, j candidates), K classes, C width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from medvlp_jax.losses.contrastive import at_least_float32

EPSILON = 1e-8  # the released code's: bounds a term by 18.4, and is added to two of the means


class Prototypes(NamedTuple):
    """Unit-norm class means; zero for a class that is not known.

    Attributes:
      unimodal: P [M, K, C], of one modality.
      crossmodal: C [K, C], of all modalities.
      known: [K], whether a sample of the class has been seen.
    """

    unimodal: Float[Array, "M K C"]
    crossmodal: Float[Array, "K C"]
    known: Bool[Array, " K"]


def class_prototypes(
    features: Float[Array, "M B C"],
    label: Int[Array, " B"],
    num_classes: int,
    *,
    memory: Prototypes | None = None,
    decay: float = 0.9,
) -> Prototypes:
    """Return P_mk = norm(mean of the unit z_i^m of class k) and C_k, the same over all m.

    Gradients flow through what comes from the batch. With a memory, for batches in which classes
    are rare (our extension), a prototype is norm(decay * remembered + (1 - decay) * batch); a class
    that the batch lacks keeps the remembered one, and one that was never seen takes the batch's.

    Args:
      features: z, not unit-norm.
      label: in [0, K); -1 is unknown and takes no part.
      num_classes: K.
      memory: the prototypes after the batch before; None uses the batch alone, as released.
      decay: share of the memory, in [0, 1).
    """
    z = _unit(at_least_float32(features))
    member = jax.nn.one_hot(label, num_classes, dtype=z.dtype)  # [B, K], zero where unknown
    total = jnp.einsum("mbc,bk->mkc", z, member, precision="highest")  # direction of the mean
    batch = Prototypes(_unit(total), _unit(total.sum(0)), member.any(0))
    if memory is None:
        return batch
    memory = jax.lax.stop_gradient(memory)

    def mix(old, new):
        mixed = _unit(decay * old + (1 - decay) * new)
        new = jnp.where(memory.known[:, None], mixed, new)
        return jnp.where(batch.known[:, None], new, old)

    return Prototypes(
        mix(memory.unimodal, batch.unimodal),
        mix(memory.crossmodal, batch.crossmodal),
        batch.known | memory.known,
    )


def hierarchical_relations(
    features: Float[Array, "M B C"],
    label: Int[Array, " B"],
    num_classes: int,
    *,
    temperature: float = 0.07,
    held: Prototypes | None = None,
) -> dict[str, Float[Array, ""]]:
    """CFCML's three losses, one for each kind of anchor.

    sample: L_sam = sum_mk 1/n_k sum_{i in k} l(z_i^m; {C_k, P_1k .. P_Mk}, {z_j^m: y_j != k})
    unimodal: L_up = eps + 1/M sum_mk l(P_mk; {C_k}, {P_m'l: all m', l != k})
    crossmodal: L_cp = eps + 1/K sum_k l(C_k; {P_1k .. P_Mk}, {C_l: l != k})

    K counts the classes of the batch. The sums over m and k that are no means are the release's.

    Args:
      features: z, not unit-norm.
      label: in [0, K); -1 is unknown and takes no part.
      num_classes: K.
      temperature: t, above 0.
      held: prototypes to relate to, from `class_prototypes` with a memory; None makes the batch's.

    Returns:
      Scalars, at least float32.
    """
    if held is None:
        held = class_prototypes(features, label, num_classes)
    z = _unit(at_least_float32(features))
    unimodal, crossmodal, known = held
    counts = jax.nn.one_hot(label, num_classes, dtype=z.dtype).sum(0)  # n_k
    present = counts > 0
    cosine = lambda equation, a, b: jnp.einsum(equation, a, b, precision="highest") / temperature

    # Samples. Rows of unknown class are computed as if of class 0 and weigh nothing.
    row = jnp.maximum(label, 0)
    own = cosine("mbc,bc->mb", z, crossmodal[row])[..., None]  # [M, B, 1]
    own = jnp.concatenate([own, cosine("mbc,nbc->mbn", z, unimodal[:, row])], -1)  # [M, B, 1 + M]
    others = cosine("mic,mjc->mij", z, z)  # [M, B, B]
    different = (label[:, None] != label[None, :]) & (label >= 0)[None, :]
    share = jnp.where(label >= 0, 1 / jnp.maximum(counts[row], 1), 0)  # 1 / n_k of i's class
    sample = (_relation(own, others, different) * share).sum()

    # Prototypes of one modality: an anchor for every (m, k), negatives are all (m', l) with l != k.
    modalities = len(z)
    own = cosine("mkc,kc->mk", unimodal, crossmodal)[..., None]  # [M, K, 1]
    others = cosine("mkc,nlc->mknl", unimodal, unimodal)  # [M, K, M, K]
    away = ~jnp.eye(num_classes, dtype=bool) & known  # [K, L]
    others = others.reshape(modalities, num_classes, -1)
    terms = _relation(own, others, jnp.tile(away, (1, modalities)))  # [M, K]
    uni = EPSILON + jnp.where(present, terms, 0).sum() / modalities

    # Prototypes of all modalities.
    own = cosine("kc,mkc->km", crossmodal, unimodal)  # [K, M]
    others = cosine("kc,lc->kl", crossmodal, crossmodal)
    terms = jnp.where(present, _relation(own, others, away), 0)  # [K]
    cross = EPSILON + terms.sum() / jnp.maximum(present.sum(), 1)
    return {"sample": sample, "unimodal": uni, "crossmodal": cross}


def _relation(positives, negatives, is_negative):
    """l(a; P, N) from cosines over the temperature [..., P] and [..., N], the latter masked."""
    negatives = jnp.where(is_negative, negatives, -jnp.inf)
    near = jax.nn.logsumexp(positives, axis=-1)
    everything = jax.nn.logsumexp(jnp.concatenate([positives, negatives], -1), axis=-1)
    return -jnp.log(jnp.exp(near - everything) + EPSILON)


def _unit(x):
    """Scale the last axis to norm 1; a zero vector stays zero and has a gradient."""
    return x * jax.lax.rsqrt(jnp.maximum((x**2).sum(-1, keepdims=True), 1e-24))
