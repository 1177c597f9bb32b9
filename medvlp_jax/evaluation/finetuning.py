"""Fine-tuning: the whole encoder and a linear head, on 1, 10 or 100 % of the training patients.

LayerNorm and a Linear drawn from a truncated normal, the encoder at a tenth of the learning rate:
the three tricks that move BenchX's numbers most ("LN", "TNI", "DLR";
https://arxiv.org/abs/2410.21969). The share of the patients holds all labels that are looked at: a
fifth of them is held out for early stopping. A frozen encoder is what `probe` is for.

Axis letters: B, N images, D width, C classes.
"""

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
import scipy.special

from medvlp_jax.config import UserError
from medvlp_jax.evaluation import classify, metrics, probe
from medvlp_jax.evaluation.features import check_finite
from medvlp_jax.evaluation.results import Results, assemble, task_name
from medvlp_jax.layers import LayerNorm, Linear

PROTOCOL = "finetune@clean-v1"
SCATTER = 1e-6  # of the validation loss in the score: decides between equal AUROCs


class Classifier(nn.Module):
    """LayerNorm and Linear on the pooled feature, and their loss; see `adaptation`."""

    task: str
    classes: int
    multi_label: bool
    weights = {"label": 1.0}  # noqa: RUF012 (read, never written)

    @property
    def targets(self) -> tuple[str, ...]:
        """The label task."""
        return (f"label/{self.task}",)

    @nn.compact
    def __call__(self, encoded, size, *, train=False):
        """Return logits [B, C]."""
        x = LayerNorm(name="norm")(encoded.pooled)
        init = nn.initializers.truncated_normal(0.02)
        return Linear(self.classes, kernel_init=init, name="linear")(x, train=train)

    def losses(self, outputs, batch):
        """Return {"label"}, the mean over what is known."""
        of = multi_label_loss if self.multi_label else single_label_loss
        return {"label": of(outputs, batch[f"label/{self.task}"])}

    def predict(self, outputs, batch):
        """Return {"logits"} [B, C]."""
        return {"logits": outputs.astype(jnp.float32)}


def multi_label_loss(logits, labels):
    """Return the mean binary cross-entropy of the known cells of labels [B, C], -1 = unknown."""
    known = labels >= 0
    loss = optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), labels == 1)
    return (loss * known).sum() / jnp.maximum(known.sum(), 1)


def single_label_loss(logits, labels):
    """Return the mean cross-entropy of the rows of labels [B, C] in which a class is present."""
    known = (labels == 1).any(-1)
    loss = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), (labels == 1).argmax(-1)
    )
    return (loss * known).sum() / jnp.maximum(known.sum(), 1)


def is_multi_label(labels: np.ndarray, scored: np.ndarray | None = None) -> bool:
    """Say whether labels are yes/no questions: a row has several, or surely none.

    Args:
      labels: [N, C] of the training split.
      scored: [n, C] of the split to score, whose rows may be others; None looks at training alone.

    Raises:
      UserError: where nothing is known of any training row.
    """
    if not (labels >= 0).any():
        raise UserError("No training row has a known label of this task; another task is needed.")
    rows = labels if scored is None else np.concatenate([labels, scored])
    return labels.shape[1] == 1 or probe.is_multi_label(rows)


def value(found: Mapping, *, task: str, multi_label: bool) -> float:
    """Return the validation score: macro AUROC, and of equal ones the one of smaller loss.

    Where no class has both outcomes among the held-out patients, the loss decides alone.
    """
    labels, logits = found[f"label/{task}"], np.asarray(found["logits"], np.float64)
    of = multi_label_loss if multi_label else single_label_loss
    loss = float(of(logits, labels))
    if not multi_label:
        logits = scipy.special.log_softmax(logits, axis=1)
        truth = classify.class_index(labels)
        logits, truth = logits[truth >= 0], truth[truth >= 0]
        labels = (truth[:, None] == np.arange(labels.shape[1])).astype(np.int8)
    each = classify.ranking(labels, logits, np.ones((1, len(labels))))[0, 0]
    auroc = metrics.over_present(each)
    return -SCATTER * loss + (float(auroc) if np.isfinite(auroc) else 0.0)


def run(
    found: Mapping,
    *,
    task: str,
    classes: Sequence[str],
    multi_label: bool,
    fraction: float,
    settings: Mapping,
    notes: Mapping,
    **bootstrap,
) -> Results:
    """Score the logits of the test images.

    Args:
      found: `logits`, `label/<task>` and `patient_id`.
      task: label task; a fraction below 1 is appended to the keys ("finding_10%").
      classes: C names.
      multi_label: one yes/no question a class, or one class a row.
      fraction: share of the training patients.
      settings: what else decides what the numbers mean.
      notes: what the reader must know.
      **bootstrap: resamples, seed, level.
    """
    score = classify.multi_label_scores if multi_label else classify.single_label_scores
    logits = found["logits"]
    check_finite("logits", logits)
    if not multi_label:  # a constant added to a row's logits changes no answer, see `classify`
        logits = scipy.special.log_softmax(np.asarray(logits, np.float64), axis=1)
    groups = found["patient_id"]
    scored = score(found[f"label/{task}"], logits, classes, groups=groups, **bootstrap)
    settings = {"classes": list(classes), "fraction": fraction, **settings, **bootstrap}
    return assemble(
        PROTOCOL,
        task_name(task, fraction),
        scored.numbers,
        settings=settings,
        notes=scored.notes | dict(notes),
    )
