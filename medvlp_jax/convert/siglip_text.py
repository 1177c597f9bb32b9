"""Hugging Face SiglipTextModel <-> medvlp_jax.encoders.siglip_text.SiglipText."""

from pathlib import Path

import jax.numpy as jnp

from medvlp_jax.convert.table import Field, Rule, Table, clip_blocks, linear, norm, one_of
from medvlp_jax.data import text
from medvlp_jax.encoders.base import Tokens
from medvlp_jax.encoders.siglip_text import SiglipText

FIELDS = {
    "vocab_size": Field("vocab_size", 32000),
    "max_position_embeddings": Field("max_length", 64),
    "pad_token_id": Field("pad_id", 1),
    "hidden_size": Field("width", 768),
    "num_hidden_layers": Field("depth", 12),
    "num_attention_heads": Field("num_heads", 12),
    "intermediate_size": Field("mlp_dim", 3072),
    "hidden_act": Field(
        "activation", "gelu_pytorch_tanh", one_of("hidden_act", "gelu_pytorch_tanh", "gelu")
    ),
    "projection_size": Field("projection_dim", 768),
    "attention_dropout": Field("attention_dropout", 0.0),
    "layer_norm_eps": Field("epsilon", 1e-6),
}

LEFT_OUT = {
    "embeddings.position_ids": "a buffer of 0, 1, 2, ...",
    "logit_scale": "the scale of SiglipModel",
    "logit_bias": "the bias of SiglipModel",
}


def flatten(config):
    """Say the width of the head where a config leaves it to that of the tower."""
    if config.get("projection_size") is not None:
        return config
    return {**config, "projection_size": config.get("hidden_size", FIELDS["hidden_size"].default)}


def beside(folder: Path) -> dict[str, int]:
    """Read what fills a row off the tokenizer.

    SigLIP 2 fills it with 0 and leaves the 1 of SigLIP's class in the config.
    """
    if not (folder / "tokenizer.json").is_file():
        return {}
    return {"pad_id": text.pad_id(text.load_tokenizer(folder))}


def rules(module: SiglipText) -> list[Rule]:
    """Pair every tensor of SiglipTextModel with ours."""
    return [
        Rule("embeddings.token_embedding.weight", "params/word_embedding"),
        Rule("embeddings.position_embedding.weight", "params/position_embedding"),
        *clip_blocks(module.depth),
        *norm("final_layer_norm", "norm"),
        *linear("head", "head"),
    ]


TABLE = Table(
    module=SiglipText,
    model_types=("siglip_text_model",),
    prefix="text_model.",
    fields=FIELDS,
    fixed={},
    example=lambda module: Tokens(jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)),
    rules=rules,
    beside=beside,
    left_out=lambda module: LEFT_OUT,
    architecture=lambda module: ("SiglipTextModel", ""),
    flatten=flatten,
)
