"""Hugging Face Dinov2(WithRegisters)Model <-> medvlp_jax.encoders.dinov2.DinoV2."""

import jax.numpy as jnp
import numpy as np

from medvlp_jax.config import UserError
from medvlp_jax.convert.table import Field, Rule, Table, conv, fused, linear, norm, one_of, square
from medvlp_jax.encoders.dinov2 import DinoV2

SHARED = {
    "image_size": Field("image_size", 224, square),
    "hidden_size": Field("width", 768),
    "num_hidden_layers": Field("depth", 12),
    "num_attention_heads": Field("num_heads", 12),
    "mlp_ratio": Field("mlp_ratio", 4),
    "hidden_act": Field("activation", "gelu", one_of("hidden_act", "gelu")),
    "use_swiglu_ffn": Field("gated", False),
    "qkv_bias": Field("qkv_bias", True),
    "layerscale_value": Field("layer_scale", 1.0),
    "hidden_dropout_prob": Field("dropout", 0.0),
    "attention_probs_dropout_prob": Field("attention_dropout", 0.0),
    "drop_path_rate": Field("drop_path", 0.0),
    "layer_norm_eps": Field("epsilon", 1e-6),
}


def _some(registers):
    if registers < 1:
        raise UserError(f"config.json asks for num_register_tokens {registers}; at least 1 is due.")
    return registers


FIELDS = {
    **SHARED,
    "patch_size": Field("patch_size", 14, square),
    "use_mask_token": Field("mask_token", True),
}
WITH_REGISTERS = {
    **SHARED,
    "patch_size": Field("patch_size", 16, square),
    "num_register_tokens": Field("registers", 4, _some),
}

MASK = "embeddings.mask_token"
LEFT_OUT = {
    "classifier.weight": "the head of Dinov2ForImageClassification",
    "classifier.bias": "the head of Dinov2ForImageClassification",
}


MODULES = {
    r"attention\.attention\.(query|key|value)$": lambda match: f"attention.{match[1][0]}_proj",
    r"attention\.output\.dense$": "attention.o_proj",
}


def rules(module: DinoV2) -> list[Rule]:
    """Pair every tensor of Dinov2Model with ours."""
    patches = "embeddings.patch_embeddings.projection"
    found = [
        Rule("embeddings.cls_token", "params/cls_token"),
        Rule("embeddings.position_embeddings", "params/position_embedding"),
        conv(patches, "patch_embedding"),
        Rule(f"{patches}.bias", "params/patch_embedding/bias"),
        *norm("layernorm", "norm"),
    ]
    if module.mask_token:
        found.append(Rule(MASK, "params/mask_token"))
    if module.registers:
        found.append(Rule("embeddings.register_tokens", "params/registers"))
    for i in range(module.depth):
        theirs, ours = f"encoder.layer.{i}", f"stack/block_{i}"
        for name in ("query", "key", "value"):
            tensor = f"{theirs}.attention.attention.{name}"
            found += linear(tensor, f"{ours}/attention/{name}", bias=module.qkv_bias)
        found += linear(f"{theirs}.attention.output.dense", f"{ours}/attention/out")
        if module.gated:
            found += fused(f"{theirs}.mlp.weights_in", [f"{ours}/mlp/gate", f"{ours}/mlp/up"])
            found += linear(f"{theirs}.mlp.weights_out", f"{ours}/mlp/down")
        else:
            found += linear(f"{theirs}.mlp.fc1", f"{ours}/mlp/up")
            found += linear(f"{theirs}.mlp.fc2", f"{ours}/mlp/down")
        for number, name in enumerate(("attention", "mlp"), start=1):
            found += norm(f"{theirs}.norm{number}", f"{ours}/{name}_norm")
            scale = f"{theirs}.layer_scale{number}.lambda1"
            found.append(Rule(scale, f"params/{ours}/{name}_scale"))
    return found


def left_out(module: DinoV2) -> dict[str, str]:
    """Name the tensors that are known and not read."""
    return LEFT_OUT if module.mask_token else {**LEFT_OUT, MASK: "the token of masked patches"}


TABLE = Table(
    module=DinoV2,
    model_types=("dinov2",),
    prefix="dinov2.",
    fields=FIELDS,
    fixed={"num_channels": 3},
    example=lambda module: jnp.zeros((1, module.patch_size, module.patch_size, 3)),
    rules=rules,
    modules=MODULES,
    detect=lambda names: {"mask_token": MASK in names},
    left_out=left_out,
    architecture=lambda module: ("Dinov2Model", ""),
    covers=lambda module: not module.registers,
)

TABLE_WITH_REGISTERS = TABLE._replace(
    model_types=("dinov2_with_registers",),
    prefix="dinov2_with_registers.",
    fields=WITH_REGISTERS,
    former={"interpolate_antialias": True, "interpolate_offset": 0.0},
    added=lambda module: (
        {} if module.mask_token else {MASK: np.zeros((1, module.width), np.float32)}
    ),
    architecture=lambda module: ("Dinov2WithRegistersModel", ""),
    covers=lambda module: module.registers > 0,
)
