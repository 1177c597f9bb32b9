"""Hugging Face DINOv3ViTModel <-> medvlp_jax.encoders.dinov3.DinoV3."""

import jax.numpy as jnp
import numpy as np

from medvlp_jax.convert.table import Field, Rule, Table, conv, linear, norm, one_of, square
from medvlp_jax.encoders.dinov3 import DinoV3

# None switches an augmentation of the positions off, in `transformers`; ours have a neutral value.
_unless_one = lambda value: None if value == 1.0 else value

FIELDS = {
    "patch_size": Field("patch_size", 16, square),
    "hidden_size": Field("width", 384),
    "num_hidden_layers": Field("depth", 12),
    "num_attention_heads": Field("num_heads", 6),
    "intermediate_size": Field("mlp_dim", 1536),
    "num_register_tokens": Field("registers", 0),
    "hidden_act": Field("activation", "gelu", one_of("hidden_act", "gelu", "silu")),
    "use_gated_mlp": Field("gated", False),
    "query_bias": Field("query_bias", True),
    "key_bias": Field("key_bias", False),
    "value_bias": Field("value_bias", True),
    "layerscale_value": Field("layer_scale", 1.0),
    "rope_theta": Field("rope_base", 100.0),
    "pos_embed_shift": Field("rope_shift", None, lambda v: v or 0.0, lambda v: v or None),
    "pos_embed_jitter": Field("rope_jitter", None, lambda v: v or 1.0, _unless_one),
    "pos_embed_rescale": Field("rope_rescale", 2.0, lambda v: v or 1.0, _unless_one),
    "attention_dropout": Field("attention_dropout", 0.0),
    "drop_path_rate": Field("drop_path", 0.0),
    "layer_norm_eps": Field("epsilon", 1e-5),
}

FIXED = {"num_channels": 3, "proj_bias": True, "mlp_bias": True}

MASK = "embeddings.mask_token"


def rules(module: DinoV3) -> list[Rule]:
    """Pair every tensor of DINOv3ViTModel with ours."""
    found = [
        Rule("embeddings.cls_token", "params/cls_token"),
        Rule("embeddings.register_tokens", "params/registers"),
        conv("embeddings.patch_embeddings", "patch_embedding"),
        Rule("embeddings.patch_embeddings.bias", "params/patch_embedding/bias"),
        *norm("norm", "norm"),
    ]
    if module.mask_token:
        found.append(Rule(MASK, "params/mask_token"))
    for i in range(module.depth):
        theirs, ours = f"layer.{i}", f"stack/block_{i}"
        for name in ("query", "key", "value"):
            bias = getattr(module, f"{name}_bias")
            found += linear(
                f"{theirs}.attention.{name[0]}_proj", f"{ours}/attention/{name}", bias=bias
            )
        found += linear(f"{theirs}.attention.o_proj", f"{ours}/attention/out")
        for name in ("gate", "up", "down") if module.gated else ("up", "down"):
            found += linear(f"{theirs}.mlp.{name}_proj", f"{ours}/mlp/{name}")
        for number, name in enumerate(("attention", "mlp"), start=1):
            found += norm(f"{theirs}.norm{number}", f"{ours}/{name}_norm")
            scale = f"{theirs}.layer_scale{number}.lambda1"
            found.append(Rule(scale, f"params/{ours}/{name}_scale"))
    return found


TABLE = Table(
    module=DinoV3,
    model_types=("dinov3_vit",),
    prefix="model.",
    fields=FIELDS,
    fixed=FIXED,
    example=lambda module: jnp.zeros((1, module.patch_size, module.patch_size, 3)),
    rules=rules,
    detect=lambda names: {"mask_token": MASK in names},
    left_out=lambda module: {} if module.mask_token else {MASK: "the token of masked patches"},
    added=lambda module: (
        {} if module.mask_token else {MASK: np.zeros((1, 1, module.width), np.float32)}
    ),
    architecture=lambda module: ("DINOv3ViTModel", ""),
)
