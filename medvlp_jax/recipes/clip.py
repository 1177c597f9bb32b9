"""CLIP and SigLIP: two towers, one embedding each. The control every other method is held against.

  InfoNCE  Radford et al. 2021, https://arxiv.org/abs/2103.00020
  sigmoid  Zhai et al. 2023, https://arxiv.org/abs/2303.15343

Axis letters: B batch, E joint width.
"""

import math
from collections.abc import Mapping

import jax.numpy as jnp
from flax import linen as nn

from medvlp_jax.config import UserError
from medvlp_jax.encoders.base import encode_pixels
from medvlp_jax.layers import Linear
from medvlp_jax.losses import contrastive, tiled
from medvlp_jax.recipes import base
from medvlp_jax.schedules import Knots

TERMS = ("contrastive",)
# Starting log-scale and bias: CLIP section 2.5; SigLIP section 3.2.
INITIAL = {"info_nce": (math.log(1 / 0.07), 0.0), "sigmoid": (math.log(10.0), -10.0)}
MAX_SCALE = 100.0  # CLIP section 2.5: without a ceiling training becomes unstable


# For the model card of an export: the heads in PyTorch, of tensors by parameter path.
HEADS_IN_TORCH = """
def embed(x, side):
    return normalize(x @ heads[f"params/{side}_projection/kernel"], dim=-1)

"""


class Clip(nn.Module):
    """Two encoders, a linear projection each, and a learned scale (and bias)."""

    image: nn.Module
    text: nn.Module
    dim: int
    loss: str
    section: str
    same_text: bool
    train_text: bool
    loss_tile: int
    weights: Mapping[str, float | Knots]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Batch keys read in training."""
        return ("image", self.section, f"{self.section}_valid", f"{self.section}_id")

    @property
    def packs(self) -> tuple[str, ...]:
        """Texts that may share rows."""
        return (self.section,)

    @property
    def frozen(self) -> tuple[str, ...]:
        """Parameter patterns that are never trained."""
        return () if self.train_text else ("^text/",)

    @property
    def spaces(self) -> dict[str, tuple[str, str]]:
        """Every text meets the image in the one joint space."""
        return {self.section: ("image", "text")}

    @property
    def heads_in_torch(self) -> str:
        """PyTorch source of embed(pooled, "image" or "text"), see `export`."""
        return HEADS_IN_TORCH

    def setup(self):
        """Name the projections and the scale."""
        self.image_projection = Linear(self.dim, use_bias=False)
        self.text_projection = Linear(self.dim, use_bias=False)
        log_scale, bias = INITIAL[self.loss]
        self.log_scale = self.param("log_scale", nn.initializers.constant(log_scale), ())
        if self.loss == "sigmoid":
            self.bias = self.param("bias", nn.initializers.constant(bias), ())

    def __call__(self, batch, *, train=False):
        """Run both halves."""
        return self.objective(self.encode(batch, train=train), batch, train=train)

    def encode(self, batch, *, train=False):
        """Return `image` and `text` [B, E] and `image_pooled` of the modalities in the batch."""
        features = {}
        if "image" in batch:
            pooled = encode_pixels(self.image, batch["image"], train=train).pooled
            features["image"] = base.unit(self.image_projection(pooled))
            features["image_pooled"] = pooled
        if self.section in batch:
            pooled = base.pooled_texts(
                self.text, batch[self.section], train=train and self.train_text
            )
            features["text"] = base.unit(self.text_projection(pooled))
        return features

    def localise(self, batch):
        """Return cosine [B, N, E] of the patches of `image`, and [B, E] of `phrase`.

        A patch is projected as the pooled feature is: it is its part where the pooling is a mean.
        """
        found = {}
        if "image" in batch:
            patches = encode_pixels(self.image, batch["image"]).tokens
            found["cosine"] = base.unit(self.image_projection(patches))
        if "phrase" in batch:
            found["cosine"] = base.unit(self.text_projection(self.text(batch["phrase"]).pooled))
        return found

    def scale(self):
        """Return 1 / temperature."""
        return jnp.minimum(jnp.exp(self.log_scale), MAX_SCALE)

    def objective(self, features, batch, *, train=False):
        """Return {"contrastive": scalar} over the global batch."""
        scale = self.scale()
        valid = batch[f"{self.section}_valid"]
        image, text = features["image"], features["text"]
        loss = base.contrastive_loss(self.loss, self.loss_tile)
        if self.loss == "sigmoid":
            return {"contrastive": loss(image, text, scale, self.bias, valid=valid)}
        prior = contrastive.SameId(batch[f"{self.section}_id"]) if self.same_text else None
        return {"contrastive": loss(image, text, scale, prior=prior, valid=valid)}


def make(
    *,
    image: Mapping | nn.Module,
    text: Mapping | nn.Module,
    weights: Mapping[str, float | Knots],
    dim: int = 512,
    loss: str = "info_nce",
    section: str = "report",
    same_text: bool = False,
    train_text: bool = True,
    loss_tile: int = tiled.TILE,
) -> Clip:
    """Build the recipe.

    Args:
      image: encoder spec {"name", "variant", ...} or a module.
      text: likewise.
      weights: {"contrastive": 1.0}.
      dim: joint width E.
      loss: "info_nce" or "sigmoid".
      section: text aligned with the image: "report", "findings" or "impression".
      same_text: equal texts are positives of one another (info_nce only).
      train_text: False freezes the text encoder; its projection still trains.
      loss_tile: side of the tiles the loss is computed in; 0 keeps the whole B x B logits.

    Raises:
      UserError: for a value outside these.
    """
    if loss not in INITIAL:
        raise UserError(f"recipe.loss must be info_nce or sigmoid, got '{loss}'.")
    if section not in ("report", "findings", "impression"):
        raise UserError(f"recipe.section must be report, findings or impression, got '{section}'.")
    if same_text and loss == "sigmoid":
        raise UserError("recipe.same_text works with recipe.loss=info_nce, not with sigmoid.")
    base.check_weights(weights, TERMS)
    base.check_tile(loss_tile)
    settings = {"same_text": same_text, "train_text": train_text, "loss_tile": loss_tile}
    return Clip(
        base.encoder(image), base.encoder(text), dim, loss, section, weights=weights, **settings
    )
