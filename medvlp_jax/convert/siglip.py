"""Hugging Face SiglipVisionModel <-> medvlp_jax.encoders.siglip.Siglip."""

import jax.numpy as jnp

from medvlp_jax.convert.table import (
    Field,
    Rule,
    Table,
    clip_blocks,
    conv,
    linear,
    norm,
    one_of,
    square,
)
from medvlp_jax.encoders.siglip import Siglip

FIELDS = {
    "image_size": Field("image_size", 224, square),
    "patch_size": Field("patch_size", 16, square),
    "hidden_size": Field("width", 768),
    "num_hidden_layers": Field("depth", 12),
    "num_attention_heads": Field("num_heads", 12),
    "intermediate_size": Field("mlp_dim", 3072),
    "hidden_act": Field(
        "activation", "gelu_pytorch_tanh", one_of("hidden_act", "gelu_pytorch_tanh", "gelu")
    ),
    "vision_use_head": Field("head", True),
    "attention_dropout": Field("attention_dropout", 0.0),
    "layer_norm_eps": Field("epsilon", 1e-6),
}

LEFT_OUT = {
    "embeddings.position_ids": "a buffer of 0, 1, 2, ...",
    "logit_scale": "the scale of SiglipModel",
    "logit_bias": "the bias of SiglipModel",
    "classifier.weight": "the head of SiglipForImageClassification",
    "classifier.bias": "the head of SiglipForImageClassification",
}


def _head() -> list[Rule]:
    theirs, ours = "head.attention", "head_pooling/attention"
    projections = ("query", "key", "value")  # a torch.nn.MultiheadAttention keeps them in one
    return [
        Rule("head.probe", "params/head_pooling/probe"),
        *(
            Rule(f"{theirs}.in_proj_weight", f"params/{ours}/{name}/kernel", (1, 0), (i, 3))
            for i, name in enumerate(projections)
        ),
        *(
            Rule(f"{theirs}.in_proj_bias", f"params/{ours}/{name}/bias", part=(i, 3))
            for i, name in enumerate(projections)
        ),
        *linear(f"{theirs}.out_proj", f"{ours}/out"),
        *norm("head.layernorm", "head_pooling/norm"),
        *linear("head.mlp.fc1", "head_pooling/mlp/up"),
        *linear("head.mlp.fc2", "head_pooling/mlp/down"),
    ]


def rules(module: Siglip) -> list[Rule]:
    """Pair every tensor of SiglipVisionModel with ours."""
    found = [
        Rule("embeddings.position_embedding.weight", "params/position_embedding"),
        conv("embeddings.patch_embedding", "patch_embedding"),
        Rule("embeddings.patch_embedding.bias", "params/patch_embedding/bias"),
        *clip_blocks(module.depth),
        *norm("post_layernorm", "norm"),
    ]
    return found + (_head() if module.head else [])


def left_out(module: Siglip) -> dict[str, str]:
    """Name the tensors that are known and not read."""
    head = {} if module.head else {rule.tensor: "the attention pooling" for rule in _head()}
    return LEFT_OUT | head


TABLE = Table(
    module=Siglip,
    model_types=("siglip_vision_model",),
    prefix="vision_model.",
    fields=FIELDS,
    fixed={"num_channels": 3},
    example=lambda module: jnp.zeros((1, module.patch_size, module.patch_size, 3)),
    rules=rules,
    detect=lambda names: {} if "head.probe" in names else {"head": False, "pooling": "mean"},
    left_out=left_out,
    architecture=lambda module: ("SiglipVisionModel", ""),
)
