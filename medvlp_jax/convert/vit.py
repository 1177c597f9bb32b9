"""Hugging Face ViTModel <-> medvlp_jax.encoders.vit.ViT."""

import jax.numpy as jnp

from medvlp_jax.convert.table import Field, Rule, Table, conv, linear, norm, square
from medvlp_jax.encoders.vit import ViT

FIELDS = {
    "image_size": Field("image_size", 224, square),
    "patch_size": Field("patch_size", 16, square),
    "hidden_size": Field("width", 768),
    "num_hidden_layers": Field("depth", 12),
    "num_attention_heads": Field("num_heads", 12),
    "intermediate_size": Field("mlp_dim", 3072),
    "hidden_dropout_prob": Field("dropout", 0.0),
    "layer_norm_eps": Field("epsilon", 1e-12),
}

FIXED = {
    "num_channels": 3,
    "hidden_act": "gelu",
    "qkv_bias": True,
    "attention_probs_dropout_prob": 0.0,
    "pooler_act": "tanh",
}

LEFT_OUT = {
    "classifier.weight": "the head of ViTForImageClassification",
    "classifier.bias": "the head of ViTForImageClassification",
    "embeddings.mask_token": "the mask of ViTForMaskedImageModeling",
    "decoder.0.weight": "the head of ViTForMaskedImageModeling",
    "decoder.0.bias": "the head of ViTForMaskedImageModeling",
}

MODULES = {
    r"encoder\.layer\.": "layers.",
    r"attention\.attention\.(query|key|value)$": lambda match: f"attention.{match[1][0]}_proj",
    r"attention\.output\.dense$": "attention.o_proj",
    r"intermediate\.dense$": "mlp.fc1",
    r"output\.dense$": "mlp.fc2",
}

POOLER = ("pooler.dense.weight", "pooler.dense.bias")


def rules(module: ViT) -> list[Rule]:
    """Pair every tensor of ViTModel with ours."""
    patches = "embeddings.patch_embeddings.projection"
    found = [
        Rule("embeddings.cls_token", "params/cls_token"),
        Rule("embeddings.position_embeddings", "params/position_embedding"),
        conv(patches, "patch_embedding"),
        Rule(f"{patches}.bias", "params/patch_embedding/bias"),
        *norm("layernorm", "norm"),
    ]
    for i in range(module.depth):
        theirs, ours = f"encoder.layer.{i}", f"stack/block_{i}"
        for name in ("query", "key", "value"):
            found += linear(f"{theirs}.attention.attention.{name}", f"{ours}/attention/{name}")
        found += [
            *linear(f"{theirs}.attention.output.dense", f"{ours}/attention/out"),
            *linear(f"{theirs}.intermediate.dense", f"{ours}/mlp/up"),
            *linear(f"{theirs}.output.dense", f"{ours}/mlp/down"),
            *norm(f"{theirs}.layernorm_before", f"{ours}/attention_norm"),
            *norm(f"{theirs}.layernorm_after", f"{ours}/mlp_norm"),
        ]
    return [*found, *linear("pooler.dense", "pooler")] if module.pooler else found


def left_out(module: ViT) -> dict[str, str]:
    """Name the tensors that are known and not read."""
    return LEFT_OUT if module.pooler else {**LEFT_OUT, **dict.fromkeys(POOLER, "the pooler")}


TABLE = Table(
    module=ViT,
    model_types=("vit",),
    prefix="vit.",
    fields=FIELDS,
    fixed=FIXED,
    example=lambda module: jnp.zeros((1, module.patch_size, module.patch_size, 3)),
    rules=rules,
    detect=lambda names: {"pooler": POOLER[0] in names},
    left_out=left_out,
    architecture=lambda module: ("ViTModel", ""),
    modules=MODULES,
)
