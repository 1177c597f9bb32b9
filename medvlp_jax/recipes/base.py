"""The one interface between a method and everything else.

A recipe is a Linen module. `encode` works per example, on any slice of a batch and any subset of
modalities; `objective` sees the whole global batch and returns unweighted named scalars. The
trainer multiplies them by `weights`, differentiates, logs; nobody writes a training loop.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn

from medvlp_jax import config, schedules
from medvlp_jax.encoders.base import Packed, Tokens
from medvlp_jax.layers import Lora
from medvlp_jax.losses import contrastive, tiled
from medvlp_jax.schedules import Knots

Features = dict[str, jax.Array]
Losses = dict[str, jax.Array]


class Recipe(Protocol):
    """What the trainer and the evaluators rely on.

    Attributes:
      inputs: batch keys read in training; a missing one is refused before anything is compiled.
      weights: a number or (step, value) knots for every loss term.
      frozen: patterns of parameter paths this configuration never trains.
      spaces: where a report section meets the image: {section: (image feature, text feature)}; a
        section that is not named is encoded as the first that is.

    A recipe may also have

    * `task` and `num_classes`: it gives `logits` of that label task; `classifies` says False in a
      stage that does not;
    * `images`: batch keys of several images of a case;
    * `copies`, {"image": names}: the parts that begin with the weights of `init.image` where
      several images have an encoder each;
    * `evaluated`: batch keys read in evaluation, where these are not those of training;
    * `fresh` and `left`: parts the run before may lack, and patterns of what it may have besides,
      for stages that start from one another;
    * `prompted`: (image feature, text feature) where prompts meet images elsewhere than reports;
      and `beside`, batch keys that evaluation reads beside the sections;
    * `draws_by_row`, True where the draws of `encode` are of the rows and not of the batch: with
      train.chunks its parts then differ in them;
    * `reads_blank`, True where a missing section is read as a blank text, so that the feature of
      one has to be cached too;
    * `packs`: keys of texts it reads through `pooled_texts`, which may come packed in training;
    * `start`, `no_relations`, `check_sizes` and `refresh`, with `described`, `told` and `told_by`:
      what it learns of the whole corpus between steps, see unpaired.py and recipes/lgdea.py;
      `relates` says True;
    * `watched`, names of terms of `objective` that are no loss: logged, without a weight;
    * `alarms`, {term: (most, sentence)}: what is said once when a term rises above `most`, though
      its weight may be 0;
    * localise(batch), with patch tokens: for "image" {map: [B, N, F]}, one vector a patch, for
      "phrase" {map: [B, F]}; their inner product is a map of where in the image the phrase is. See
      evaluation/grounding.py;
    * `heads_in_torch`: the PyTorch source of embed(pooled, "image" or "text"), what lies between
      the encoders and the joint space, for the model card of an export.
    """

    inputs: tuple[str, ...]
    weights: Mapping[str, float | Knots]
    frozen: tuple[str, ...]
    spaces: Mapping[str, tuple[str, str]]

    def encode(self, batch: Mapping, *, train: bool = False) -> Features:
        """Return features per example: `image`, `text` [B, E] unit norm, and the method's own.

        In evaluation also `image_pooled` [B, D], the image encoder's own, for linear probes.
        """

    def objective(self, features: Features, batch: Mapping, *, train: bool = False) -> Losses:
        """Return unweighted float32 scalars over the whole batch."""


def encoder(spec: Mapping | nn.Module) -> nn.Module:
    """Build an encoder from {"name": ..., **fields}; a module that exists already is returned.

    `lora` is {"rank", "alpha", "dropout", "layers"} there, see layers.Lora; rank 0 is none.
    """
    if isinstance(spec, nn.Module):
        return spec
    fields = dict(spec)
    if "lora" in fields:
        fields["lora"] = low_rank(fields["lora"])
    return config.build("medvlp_jax.encoders", fields.pop("name"), **fields)


def pooled_texts(encoder: nn.Module, texts: Tokens | Packed, *, train: bool = False) -> jax.Array:
    """Return the pooled feature of every text.

    Args:
      encoder: of texts.
      texts: Tokens [B, T], or [B, N, T] where an example has N of them; or the same texts packed,
        see data/packing.py: the features are the same to rounding.
      train: apply dropout.

    Returns:
      [B, D] or [B, N, D]; of a packed phrase that does not exist, values without meaning.
    """
    if isinstance(texts, Tokens):
        flat = Tokens(*(x.reshape(-1, x.shape[-1]) for x in texts))
        return encoder(flat, train=train).pooled.reshape(*texts.ids.shape[:-1], -1)
    ids, mask, segments = (x.reshape(-1, x.shape[-1]) for x in texts[:3])  # [g r, T]
    groups, _, slots = texts.filled.shape
    packing = {"segments": segments, "num_segments": slots}
    pooled = encoder(Tokens(ids, mask), train=train, **packing).pooled  # [g r, G, D]
    pooled = pooled.reshape(groups, -1, pooled.shape[-1])
    found = jnp.take_along_axis(pooled, texts.at.reshape(groups, -1, 1), axis=1)
    return found.reshape(-1, *texts.at.shape[2:], pooled.shape[-1])


def low_rank(spec: Mapping) -> Lora | None:
    """Return what a config says of low-rank factors; None where their rank is 0.

    Raises:
      UserError: for an unknown field or a negative rank.
    """
    for field in spec:
        if field not in Lora._fields:
            raise config.UserError(f"lora has no '{field}'. {config.nearest(field, Lora._fields)}")
    if spec["rank"] < 0:
        raise config.UserError(f"lora.rank={spec['rank']} must be at least 1, or 0 for none.")
    return Lora(**spec) if spec["rank"] else None


def classifies(recipe) -> bool:
    """Say whether a recipe gives `logits` of the classes of its `task`."""
    return getattr(recipe, "classifies", hasattr(recipe, "task"))


def relates(recipe) -> bool:
    """Say whether a recipe relates the images of the corpus to its reports between steps."""
    return hasattr(recipe, "refresh")


def contrastive_loss(name: str, tile: int) -> Callable[..., jax.Array]:
    """Return "info_nce" or "sigmoid" in tiles of side `tile`; 0 gives the dense one, the oracle."""
    if not tile:
        return getattr(contrastive, name)
    return functools.partial(getattr(tiled, name), tile=tile)


def check_positive(**settings: float) -> None:
    """Refuse a setting of the recipe that is not above 0.

    Raises:
      UserError: naming it.
    """
    for name, value in settings.items():
        if not value > 0:
            raise config.UserError(f"recipe.{name}={value} must be above 0.")


def check_tile(tile: int) -> None:
    """Refuse a side that no tile can have.

    Raises:
      UserError: for a negative one.
    """
    if tile < 0:
        raise config.UserError(f"recipe.loss_tile must be at least 1, or 0 for dense, got {tile}.")


def check_weights(weights: Mapping[str, float | Knots], terms: tuple[str, ...]) -> None:
    """Refuse loss-weight names the recipe does not have, terms without a weight, and odd knots.

    Raises:
      UserError: naming the term.
    """
    for name in weights:
        if name not in terms:
            raise config.UserError(f"No loss term '{name}'. {config.nearest(name, terms)}")
    missing = [name for name in terms if name not in weights]
    if missing:
        raise config.UserError(f"recipe.weights lacks {', '.join(missing)}; 0 switches a term off.")
    check_schedules(weights)


def check_schedules(weights: Mapping[str, float | Knots]) -> None:
    """Refuse a loss weight that is neither a number nor knots.

    Raises:
      UserError: naming the term.
    """
    for name, spec in weights.items():
        try:
            schedules.check(f"recipe.weights.{name}", spec)
        except ValueError as error:
            raise config.UserError(f"{error}.") from None


def unit(x: jax.Array) -> jax.Array:
    """Scale the last axis to norm 1, in at least float32; a zero vector stays zero."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x * jax.lax.rsqrt(jnp.maximum((x**2).sum(-1, keepdims=True), 1e-24))
