"""Hugging Face CLIPVisionModel(WithProjection) <-> medvlp_jax.encoders.clip_vision.ClipVision."""

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
from medvlp_jax.encoders.clip_vision import ClipVision

FIELDS = {
    "image_size": Field("image_size", 224, square),
    "patch_size": Field("patch_size", 32, square),
    "hidden_size": Field("width", 768),
    "num_hidden_layers": Field("depth", 12),
    "num_attention_heads": Field("num_heads", 12),
    "intermediate_size": Field("mlp_dim", 3072),
    "hidden_act": Field("activation", "quick_gelu", one_of("hidden_act", "quick_gelu", "gelu")),
    "projection_dim": Field("projection_dim", 512),
    "attention_dropout": Field("attention_dropout", 0.0),
    "layer_norm_eps": Field("epsilon", 1e-5),
}

PROJECTION = "visual_projection.weight"
LEFT_OUT = {
    "embeddings.position_ids": "a buffer of 0, 1, 2, ...",
    "logit_scale": "the temperature of CLIPModel",
    "classifier.weight": "the head of CLIPForImageClassification",
    "classifier.bias": "the head of CLIPForImageClassification",
}


def rules(module: ClipVision) -> list[Rule]:
    """Pair every tensor of CLIPVisionModel, and the projection if there is one, with ours."""
    found = [
        Rule("embeddings.class_embedding", "params/cls_token"),
        Rule("embeddings.position_embedding.weight", "params/position_embedding"),
        conv("embeddings.patch_embedding", "patch_embedding"),
        *norm("pre_layrnorm", "pre_norm"),
        *clip_blocks(module.depth),
        *norm("post_layernorm", "norm"),
    ]
    projection = linear("visual_projection", "projection", bias=False)
    return found + (projection if module.projection else [])


TABLE = Table(
    module=ClipVision,
    model_types=("clip_vision_model",),
    prefix="vision_model.",
    fields=FIELDS,
    fixed={"num_channels": 3},
    example=lambda module: jnp.zeros((1, module.patch_size, module.patch_size, 3)),
    rules=rules,
    detect=lambda names: {"projection": PROJECTION in names},
    left_out=lambda module: (
        LEFT_OUT if module.projection else {**LEFT_OUT, PROJECTION: "the projection"}
    ),
    architecture=lambda module: (
        ("CLIPVisionModelWithProjection", "vision_model.")
        if module.projection
        else ("CLIPVisionModel", "")
    ),
    heads=("visual_projection.",),
)
