"""Hugging Face CLIPTextModel(WithProjection) <-> medvlp_jax.encoders.clip_text.ClipText."""

import jax.numpy as jnp

from medvlp_jax.config import UserError
from medvlp_jax.convert.table import Field, Rule, Table, clip_blocks, linear, norm, one_of
from medvlp_jax.encoders.base import Tokens
from medvlp_jax.encoders.clip_text import ClipText


def _one_id(value):
    if not isinstance(value, int):
        raise UserError(f"config.json has an eos_token_id of {value!r}; only one id is supported.")
    return value


FIELDS = {
    "vocab_size": Field("vocab_size", 49408),
    "max_position_embeddings": Field("max_length", 77),
    "eos_token_id": Field("eos_id", 49407, _one_id),
    "hidden_size": Field("width", 512),
    "num_hidden_layers": Field("depth", 12),
    "num_attention_heads": Field("num_heads", 8),
    "intermediate_size": Field("mlp_dim", 2048),
    "hidden_act": Field("activation", "quick_gelu", one_of("hidden_act", "quick_gelu", "gelu")),
    "projection_dim": Field("projection_dim", 512),
    "attention_dropout": Field("attention_dropout", 0.0),
    "layer_norm_eps": Field("epsilon", 1e-5),
}

PROJECTION = "text_projection.weight"
LEFT_OUT = {
    "embeddings.position_ids": "a buffer of 0, 1, 2, ...",
    "logit_scale": "the temperature of CLIPModel",
}


def rules(module: ClipText) -> list[Rule]:
    """Pair every tensor of CLIPTextModel, and the projection if there is one, with ours."""
    found = [
        Rule("embeddings.token_embedding.weight", "params/word_embedding"),
        Rule("embeddings.position_embedding.weight", "params/position_embedding"),
        *clip_blocks(module.depth),
        *norm("final_layer_norm", "norm"),
    ]
    projection = linear("text_projection", "projection", bias=False)
    return found + (projection if module.projection else [])


TABLE = Table(
    module=ClipText,
    model_types=("clip_text_model",),
    prefix="text_model.",
    fields=FIELDS,
    fixed={},
    example=lambda module: Tokens(jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)),
    rules=rules,
    detect=lambda names: {"projection": PROJECTION in names},
    left_out=lambda module: (
        LEFT_OUT if module.projection else {**LEFT_OUT, PROJECTION: "the projection"}
    ),
    architecture=lambda module: (
        ("CLIPTextModelWithProjection", "text_model.")
        if module.projection
        else ("CLIPTextModel", "")
    ),
    heads=("text_projection.",),
)
