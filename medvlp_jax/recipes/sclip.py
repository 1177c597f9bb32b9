"""S-CLIP: CLIP on few pairs, with images apart that learn from the pairs' reports. A control.

Mo, Kim, Lee, Shin, https://arxiv.org/abs/2305.14095; the terms are losses/pseudo_captions.py's.
The paper takes keywords from a list of its domain; here they are the phrases of evidence in the
reports of the batch (data.evidence), so that it knows what LGDEA knows. Unpaired reports are not
read by any term.

Axis letters: B batch, N keywords, E joint width.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from flax import linen as nn

from medvlp_jax.losses import pseudo_captions, tiled
from medvlp_jax.recipes import base, clip
from medvlp_jax.schedules import Knots

TERMS = (*clip.TERMS, "caption", "keyword")
SECTION = "report"


class SClip(clip.Clip):
    """CLIP with two terms of the rows that are no pairs."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Batch keys read in training."""
        return (*super().inputs, "evidence", "evidence_mask", "paired")

    def encode(self, batch, *, train=False):
        """Return CLIP's features, and `keywords` [B, N, E] unit norm."""
        features = super().encode(batch, train=train)
        if "evidence" in batch:
            pooled = base.pooled_texts(self.text, batch["evidence"], train=train)
            features["keywords"] = base.unit(self.text_projection(pooled))
        return features

    def objective(self, features, batch, *, train=False):
        """Return {"contrastive", "caption", "keyword"} over the global batch."""
        valid = f"{self.section}_valid"
        pairs = batch["paired"] & batch[valid]
        rows = {"pairs": pairs, "apart": ~batch["paired"]}
        image, scale = features["image"], self.scale()
        return {
            **super().objective(features, {**batch, valid: pairs}, train=train),
            "caption": pseudo_captions.caption_loss(image, features["text"], scale, **rows),
            "keyword": pseudo_captions.keyword_loss(
                image,
                features["keywords"],
                jnp.asarray(batch["evidence"].ids),
                scale,
                told=batch["evidence_mask"],
                **rows,
            ),
        }


def make(
    *,
    image: Mapping | nn.Module,
    text: Mapping | nn.Module,
    weights: Mapping[str, float | Knots],
    dim: int = 512,
    loss_tile: int = tiled.TILE,
) -> SClip:
    """Build the recipe.

    Args:
      image: encoder spec {"name", "variant", ...} or a module.
      text: likewise.
      weights: of contrastive, caption and keyword.
      dim: joint width E.
      loss_tile: side of the tiles the contrast of the pairs is computed in; 0 keeps all logits.

    Raises:
      UserError: for a value outside these.
    """
    base.check_weights(weights, TERMS)
    base.check_tile(loss_tile)
    settings = {"same_text": False, "train_text": True, "loss_tile": loss_tile}
    encoders = base.encoder(image), base.encoder(text)
    return SClip(*encoders, dim, "info_nce", SECTION, weights=weights, **settings)
