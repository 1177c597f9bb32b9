"""Masked language modelling: how a text encoder learns a language, or PRIMA's risk knowledge.

Devlin et al. 2019, https://arxiv.org/abs/1810.04805, section 3.1: some tokens are chosen (BERT
15 %, ModernBERT 30 %); of these 80 % become [MASK], 10 % a random token, 10 % stay. Drawn anew at
every step (RoBERTa). With low-rank factors on the encoder they alone train, as in PRIMA's stage
"inject" (https://arxiv.org/abs/2602.23297); the head, tied to the word embedding, stays as it is.

Axis letters: B batch, T text tokens, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from medvlp_jax.config import UserError
from medvlp_jax.encoders.base import Tokens
from medvlp_jax.recipes import base
from medvlp_jax.schedules import Knots

TERMS = ("mlm",)
SPECIAL = ("[PAD]", "[CLS]", "[SEP]")


class MaskedLanguageModel(nn.Module):
    """A text encoder with its MLM head; see `make` for the fields."""

    text: nn.Module
    weights: Mapping[str, float | Knots]
    vocab_size: int
    mask_id: int
    special_ids: tuple[int, ...]
    rate: float

    inputs = ("report",)
    draws_by_row = True

    @property
    def spaces(self) -> dict[str, tuple[str, str]]:
        """No text meets an image here."""
        return {}

    @property
    def frozen(self) -> tuple[str, ...]:
        """All but the low-rank factors, where there are any."""
        return ("^(?!.*/lora_[ab]$)",) if getattr(self.text, "lora", None) else ()

    def __call__(self, batch, *, train=False):
        """Run both halves."""
        return self.objective(self.encode(batch, train=train), batch, train=train)

    def encode(self, batch, *, train=False):
        """Return {"loss": [B, T], "chosen": [B, T]} of masked reports: cross entropy where chosen.

        In training the masks are new in every step. In evaluation those of a text are a function of
        its tokens alone, and the features are "masked_loss" [B], the sum, and "masked_count" [B].
        """
        tokens = batch["report"]
        settings = {name: getattr(self, name) for name in ("vocab_size", "mask_id", "special_ids")}
        settings["rate"] = self.rate
        if train:
            masked, chosen = mask_tokens(self.make_rng("draws"), tokens, **settings)
        else:
            masked, chosen = mask_by_content(tokens, **settings)
        logits = self.text.mlm_logits(masked, train=train).astype(jnp.float32)
        target = jnp.take_along_axis(logits, tokens.ids[..., None], axis=-1)[..., 0]
        loss = jnp.where(chosen, jax.nn.logsumexp(logits, axis=-1) - target, 0.0)  # [B, T]
        if train:
            return {"loss": loss, "chosen": chosen}
        return {"masked_loss": loss.sum(-1), "masked_count": chosen.sum(-1).astype(jnp.float32)}

    def objective(self, features, batch, *, train=False):
        """Return {"mlm": mean cross entropy over the chosen tokens of the whole batch}."""
        if "masked_loss" in features:
            total, count = features["masked_loss"].sum(), features["masked_count"].sum()
        else:
            total, count = features["loss"].sum(), features["chosen"].sum()
        return {"mlm": total / jnp.maximum(count, 1)}


def mask_tokens(
    key, tokens: Tokens, *, vocab_size, mask_id, special_ids, rate
) -> tuple[Tokens, jax.Array]:
    """Corrupt tokens for MLM.

    Args:
      key: randomness of this step.
      tokens: ids and mask [..., T].
      vocab_size: V, the range of random replacements.
      mask_id: id of [MASK].
      special_ids: ids never chosen ([CLS], [SEP], [PAD]).
      rate: share of real tokens chosen.

    Returns:
      The corrupted tokens and the chosen positions [..., T] bool.
    """
    choose, action, replace = jax.random.split(key, 3)
    ordinary = tokens.mask & ~jnp.isin(tokens.ids, jnp.asarray(special_ids))
    chosen = ordinary & jax.random.bernoulli(choose, rate, tokens.ids.shape)
    dice = jax.random.uniform(action, tokens.ids.shape)
    random_ids = jax.random.randint(replace, tokens.ids.shape, 0, vocab_size, tokens.ids.dtype)
    corrupted = jnp.where(dice < 0.8, mask_id, jnp.where(dice < 0.9, random_ids, tokens.ids))
    return Tokens(jnp.where(chosen, corrupted, tokens.ids), tokens.mask), chosen


def mask_by_content(tokens: Tokens, **settings: Any) -> tuple[Tokens, jax.Array]:
    """Corrupt tokens [B, T] by draws that a row's own tokens decide: alike wherever it stands."""
    places = 2 * jnp.arange(tokens.ids.shape[-1], dtype=jnp.uint32) + 1
    words = jnp.where(tokens.mask, tokens.ids.astype(jnp.uint32) + 1, 0)
    content = (words * places * jnp.uint32(2654435761)).sum(-1, dtype=jnp.uint32)  # [B]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), content)
    return jax.vmap(lambda key, row: mask_tokens(key, row, **settings))(keys, tokens)


def token_fields(tokenizer) -> dict[str, Any]:
    """Return the fields of `make` that a tokenizer decides.

    Args:
      tokenizer: of the `tokenizers` library; None gives what serves where only shapes count.

    Raises:
      UserError: for one without [PAD], [CLS], [SEP] or [MASK].
    """
    if tokenizer is None:
        return {"vocab_size": 1, "mask_id": 0, "special_ids": (0,)}
    special = [tokenizer.token_to_id(name) for name in SPECIAL]
    mask_id = tokenizer.token_to_id("[MASK]")
    if mask_id is None or None in special:
        raise UserError(
            "Masked language modelling (init.text='mlm', recipe mlm) needs a tokenizer with [PAD], "
            "[CLS], [SEP] and [MASK]."
        )
    return {
        "vocab_size": tokenizer.get_vocab_size(),
        "mask_id": mask_id,
        "special_ids": tuple(special),
    }


def completed(spec: Mapping[str, Any], tokenizer) -> dict[str, Any]:
    """Fill in what a config leaves to the tokenizer, and ask for the encoder's head.

    Args:
      spec: fields of `make` as a config has them.
      tokenizer: see `token_fields`.
    """
    text = {**spec["text"], "mlm_head": True}
    return {**spec, "text": text, **token_fields(tokenizer)}


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
      text: encoder spec or module with `mlm_logits`; with `lora` its factors alone train.
      weights: {"mlm": 1.0}.
      vocab_size: V of the tokenizer; this and the next two are filled in by `completed`.
      mask_id: id of [MASK].
      special_ids: ids never masked.
      rate: share of tokens chosen, in (0, 1]; BERT's is 0.15, ModernBERT's 0.3.

    Raises:
      UserError: for another rate.
    """
    base.check_weights(weights, TERMS)
    if not 0 < rate <= 1:
        raise UserError(f"recipe.rate={rate} must be above 0 and at most 1.")
    return MaskedLanguageModel(base.encoder(text), weights, vocab_size, mask_id, special_ids, rate)
