"""Hugging Face BertModel, BertForMaskedLM, BertForPreTraining <-> medvlp_jax.encoders.bert.Bert."""

import jax.numpy as jnp

from medvlp_jax.convert.table import Field, Rule, Table, linear, norm
from medvlp_jax.encoders.base import Tokens
from medvlp_jax.encoders.bert import Bert

FIELDS = {
    "vocab_size": Field("vocab_size", 30522),
    "max_position_embeddings": Field("max_length", 512),
    "type_vocab_size": Field("num_types", 2),
    "hidden_size": Field("width", 768),
    "num_hidden_layers": Field("depth", 12),
    "num_attention_heads": Field("num_heads", 12),
    "intermediate_size": Field("mlp_dim", 3072),
    "hidden_dropout_prob": Field("dropout", 0.1),
    "attention_probs_dropout_prob": Field("attention_dropout", 0.1),
    "layer_norm_eps": Field("epsilon", 1e-12),
}

FIXED = {
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
}

# Google's TensorFlow names, kept in the oldest checkpoints (bert-base-uncased among them).
ALIASES = {".LayerNorm.gamma": ".LayerNorm.weight", ".LayerNorm.beta": ".LayerNorm.bias"}

NEXT_SENTENCE = "the next-sentence head of BertForPreTraining"
CXR_PROJECTION = "the joint projection of CXR-BERT"
LEFT_OUT = {
    "embeddings.position_ids": "a buffer of 0, 1, 2, ...",
    "cls.seq_relationship.weight": NEXT_SENTENCE,
    "cls.seq_relationship.bias": NEXT_SENTENCE,
    "cls_projection_head.dense_to_hidden.weight": CXR_PROJECTION,
    "cls_projection_head.dense_to_hidden.bias": CXR_PROJECTION,
    "cls_projection_head.LayerNorm.weight": CXR_PROJECTION,
    "cls_projection_head.LayerNorm.bias": CXR_PROJECTION,
    "cls_projection_head.dense_to_output.weight": CXR_PROJECTION,
    "cls_projection_head.dense_to_output.bias": CXR_PROJECTION,
}

POOLER = linear("pooler.dense", "pooler_dense")
MLM_HEAD = [
    *linear("cls.predictions.transform.dense", "mlm_dense"),
    *norm("cls.predictions.transform.LayerNorm", "mlm_norm"),
    Rule("cls.predictions.bias", "params/mlm_bias"),
]
TIED = {
    "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}


def rules(module: Bert) -> list[Rule]:
    """Pair every tensor of BertModel, and of the heads this module has, with ours."""
    found = [
        Rule("embeddings.word_embeddings.weight", "params/word_embedding"),
        Rule("embeddings.position_embeddings.weight", "params/position_embedding"),
        Rule("embeddings.token_type_embeddings.weight", "params/type_embedding"),
        *norm("embeddings.LayerNorm", "embedding_norm"),
    ]
    for i in range(module.depth):
        theirs, ours = f"encoder.layer.{i}", f"stack/block_{i}"
        for name in ("query", "key", "value"):
            found += linear(f"{theirs}.attention.self.{name}", f"{ours}/attention/{name}")
        found += [
            *linear(f"{theirs}.attention.output.dense", f"{ours}/attention/out"),
            *norm(f"{theirs}.attention.output.LayerNorm", f"{ours}/attention_norm"),
            *linear(f"{theirs}.intermediate.dense", f"{ours}/mlp/up"),
            *linear(f"{theirs}.output.dense", f"{ours}/mlp/down"),
            *norm(f"{theirs}.output.LayerNorm", f"{ours}/mlp_norm"),
        ]
    return found + (POOLER if module.pooler else []) + (MLM_HEAD if module.mlm_head else [])


def left_out(module: Bert) -> dict[str, str]:
    """Name the tensors that are known and not read."""
    names = dict(LEFT_OUT)
    if not module.pooler:
        names |= {rule.tensor: "the pooler" for rule in POOLER}
    if not module.mlm_head:
        head = [*(rule.tensor for rule in MLM_HEAD), *TIED]
        names |= dict.fromkeys(head, "the masked-language-model head")
    return names


TABLE = Table(
    module=Bert,
    model_types=("bert", "cxr-bert"),
    prefix="bert.",
    fields=FIELDS,
    fixed=FIXED,
    example=lambda module: Tokens(jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)),
    rules=rules,
    detect=lambda names: {
        "pooler": POOLER[0].tensor in names,
        "mlm_head": MLM_HEAD[0].tensor in names,
    },
    left_out=left_out,
    tied=lambda module: TIED if module.mlm_head else {},
    untied="mlm_head=False",
    architecture=lambda module: (
        ("BertForMaskedLM", "bert.") if module.mlm_head else ("BertModel", "")
    ),
    heads=("cls.",),
    aliases=ALIASES,
)
