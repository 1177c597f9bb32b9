"""Hugging Face ModernBertModel, ModernBertForMaskedLM <-> encoders.modernbert.ModernBert."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from medvlp_jax.config import UserError
from medvlp_jax.convert.table import Field, Rule, Table, fused, linear, norm, rope_base
from medvlp_jax.encoders.base import Tokens
from medvlp_jax.encoders.modernbert import ModernBert

# The keys of the hub's files, which every release of `transformers` reads; see `flatten`.
FIELDS = {
    "vocab_size": Field("vocab_size", 50368),
    "max_position_embeddings": Field("max_length", 8192),
    "hidden_size": Field("width", 768),
    "num_hidden_layers": Field("depth", 22),
    "num_attention_heads": Field("num_heads", 12),
    "intermediate_size": Field("mlp_dim", 1152),
    "local_attention": Field("window", 128),
    "global_attn_every_n_layers": Field("global_every", 3),
    "global_rope_theta": Field("global_base", 160_000.0),
    "local_rope_theta": Field("local_base", 10_000.0),
    "pad_token_id": Field("pad_id", 50283),
    "attention_dropout": Field("attention_dropout", 0.0),
    "norm_eps": Field("epsilon", 1e-5),
}

FIXED = {
    "hidden_activation": "gelu",
    "classifier_activation": "gelu",
    "norm_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "classifier_bias": False,
    "decoder_bias": True,
    "embedding_dropout": 0.0,
    "mlp_dropout": 0.0,
    "tie_word_embeddings": True,
}

CLASSIFIER = "the head of ModernBertForSequenceClassification"
LEFT_OUT = {"classifier.weight": CLASSIFIER, "classifier.bias": CLASSIFIER}

MLM_HEAD = [
    *linear("head.dense", "mlm_dense", bias=False),
    *norm("head.norm", "mlm_norm", bias=False),
    Rule("decoder.bias", "params/mlm_bias"),
]
TIED = {"decoder.weight": "embeddings.tok_embeddings.weight"}


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rewrite the nested settings of transformers 5 under the keys of FIELDS.

    Raises:
      UserError: for a rotary type or an order of layers this implementation does not have.
    """
    flat = dict(config)
    ropes = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}
    nested = flat.pop("rope_parameters", None) or {}
    scaling = flat.pop("rope_scaling", None) or {}
    if others := sorted(set(nested) - set(ropes)):
        raise UserError(
            f"config.json has rope_parameters for {', '.join(others)}; here they are for "
            f"{' and '.join(ropes)}."
        )
    for kind, key in ropes.items():
        default = flat.get(key, FIELDS[key].default)
        flat[key] = rope_base({**(nested.get(kind) or {}), **scaling}, default)
    if half := flat.pop("sliding_window", None):  # another name of the same
        flat["local_attention"] = 2 * half
    if layers := flat.pop("layer_types", None):
        if others := sorted(set(layers) - set(ropes)):
            raise UserError(
                f"config.json asks for layers of {', '.join(others)}; only {' and '.join(ropes)} "
                "are here."
            )
        whole = [i for i, kind in enumerate(layers) if kind == "full_attention"]
        every = whole[1] if len(whole) > 1 else len(layers)
        if whole != list(range(0, len(layers), every)):
            raise UserError(
                f"config.json asks for full attention in layers {whole}, and ModernBert has it in "
                "layers 0, n, 2n, ... alone."
            )
        flat["global_attn_every_n_layers"] = every
    return flat


def rules(module: ModernBert) -> list[Rule]:
    """Pair every tensor of ModernBertModel, and of the head this module has, with ours."""
    found = [
        Rule("embeddings.tok_embeddings.weight", "params/word_embedding"),
        *norm("embeddings.norm", "embedding_norm", bias=False),
        *norm("final_norm", "norm", bias=False),
    ]
    for i in range(module.depth):
        theirs, ours = f"layers.{i}", f"stack/block_{i - 1}" if i else "first/block_0"
        heads = [f"{ours}/attention/{name}" for name in ("query", "key", "value")]
        found += [
            *fused(f"{theirs}.attn.Wqkv", heads, bias=False),
            *linear(f"{theirs}.attn.Wo", f"{ours}/attention/out", bias=False),
            *norm(f"{theirs}.mlp_norm", f"{ours}/mlp_norm", bias=False),
            *fused(f"{theirs}.mlp.Wi", [f"{ours}/mlp/gate", f"{ours}/mlp/up"], bias=False),
            *linear(f"{theirs}.mlp.Wo", f"{ours}/mlp/down", bias=False),
        ]
        if i:
            found += norm(f"{theirs}.attn_norm", f"{ours}/attention_norm", bias=False)
    return found + (MLM_HEAD if module.mlm_head else [])


def left_out(module: ModernBert) -> dict[str, str]:
    """Name the tensors that are known and not read."""
    if module.mlm_head:
        return LEFT_OUT
    head = [*(rule.tensor for rule in MLM_HEAD), *TIED]
    return LEFT_OUT | dict.fromkeys(head, "the masked-language-model head")


TABLE = Table(
    module=ModernBert,
    model_types=("modernbert",),
    prefix="model.",
    fields=FIELDS,
    fixed=FIXED,
    former={"layer_norm_eps": 1e-5, "position_embedding_type": "absolute"},
    example=lambda module: Tokens(jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)),
    rules=rules,
    detect=lambda names: {"mlm_head": "decoder.bias" in names},
    left_out=left_out,
    tied=lambda module: TIED if module.mlm_head else {},
    untied="mlm_head=False",
    architecture=lambda module: (
        ("ModernBertForMaskedLM", "model.") if module.mlm_head else ("ModernBertModel", "")
    ),
    heads=("head.", "decoder."),
    flatten=flatten,
)
