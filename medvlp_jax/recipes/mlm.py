"""Masked language modelling: how the demo's small BERT learns the language of the reports.

Devlin et al. 2019, https://arxiv.org/abs/1810.04805, section 3.1: 15 % of the tokens are chosen;
of these 80 % become [MASK], 10 % a random token, 10 % stay. Drawn anew at every step (RoBERTa).

Axis letters: B batch, T text tokens, V vocabulary.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from medvlp_jax.encoders.base import Tokens
from medvlp_jax.recipes import base
from medvlp_jax.schedules import Knots

TERMS = ("mlm",)


class MaskedLanguageModel(nn.Module):
    """A text encoder with its MLM head."""

    text: nn.Module
    weights: Mapping[str, float | Knots]
    vocab_size: int
    mask_id: int
    special_ids: tuple[int, ...]
    rate: float

    inputs = ("report",)
    frozen = ()

    def __call__(self, batch, *, train=False):
        """Run both halves."""
        return self.objective(self.encode(batch, train=train), batch, train=train)

    def encode(self, batch, *, train=False):
        """Return {"logits": [B, T, V], "chosen": [B, T]} for freshly masked reports."""
        tokens = batch["report"]
        key = self.make_rng("draws") if self.has_rng("draws") else jax.random.key(0)
        masked, chosen = mask_tokens(
            key,
            tokens,
            vocab_size=self.vocab_size,
            mask_id=self.mask_id,
            special_ids=self.special_ids,
            rate=self.rate,
        )
        logits = self.text.mlm_logits(masked, train=train)
        return {"logits": logits, "chosen": chosen}

    def objective(self, features, batch, *, train=False):
        """Return {"mlm": mean cross entropy over the chosen tokens of the whole batch}."""
        chosen = features["chosen"]
        log_probability = jax.nn.log_softmax(features["logits"].astype(jnp.float32))
        target = batch["report"].ids[..., None]
        loss = -jnp.take_along_axis(log_probability, target, axis=-1)[..., 0]  # [B, T]
        return {"mlm": jnp.where(chosen, loss, 0.0).sum() / jnp.maximum(chosen.sum(), 1)}


def mask_tokens(
    key, tokens: Tokens, *, vocab_size, mask_id, special_ids, rate
) -> tuple[Tokens, jax.Array]:
    """Corrupt tokens for MLM.

    Args:
      key: randomness of this step.
      tokens: ids and mask [B, T].
      vocab_size: V, the range of random replacements.
      mask_id: id of [MASK].
      special_ids: ids never chosen ([CLS], [SEP], [PAD]).
      rate: share of real tokens chosen.

    Returns:
      The corrupted tokens and the chosen positions [B, T] bool.
    """
    choose, action, replace = jax.random.split(key, 3)
    ordinary = tokens.mask & ~jnp.isin(tokens.ids, jnp.asarray(special_ids))
    chosen = ordinary & jax.random.bernoulli(choose, rate, tokens.ids.shape)
    dice = jax.random.uniform(action, tokens.ids.shape)
    random_ids = jax.random.randint(replace, tokens.ids.shape, 0, vocab_size, tokens.ids.dtype)
    corrupted = jnp.where(dice < 0.8, mask_id, jnp.where(dice < 0.9, random_ids, tokens.ids))
    return Tokens(jnp.where(chosen, corrupted, tokens.ids), tokens.mask), chosen


def make(
    *,
    text: Mapping | nn.Module,
    weights: Mapping[str, float | Knots],
    vocab_size: int,
    mask_id: int,
    special_ids: tuple[int, ...],
    rate: float = 0.15,
) -> MaskedLanguageModel:
    """Build the recipe.

    Args:
      text: encoder spec or module with `mlm_logits`.
      weights: {"mlm": 1.0}.
      vocab_size: V of the tokenizer.
      mask_id: id of [MASK].
      special_ids: ids never masked.
      rate: share of tokens chosen, BERT's 0.15.
    """
    base.check_weights(weights, TERMS)
    return MaskedLanguageModel(base.encoder(text), weights, vocab_size, mask_id, special_ids, rate)
