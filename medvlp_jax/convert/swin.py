"""Hugging Face SwinModel <-> medvlp_jax.encoders.swin.Swin."""

import jax.numpy as jnp

from medvlp_jax.convert.table import Field, Rule, Table, conv, linear, norm, square
from medvlp_jax.encoders.swin import Swin

FIELDS = {
    "patch_size": Field("patch_size", 4, square),
    "embed_dim": Field("embed_dim", 96),
    "depths": Field("depths", (2, 2, 6, 2), tuple, list),
    "num_heads": Field("num_heads", (3, 6, 12, 24), tuple, list),
    "window_size": Field("window_size", 7),
    "mlp_ratio": Field("mlp_ratio", 4.0),
    "qkv_bias": Field("qkv_bias", True),
    "hidden_dropout_prob": Field("dropout", 0.0),
    "drop_path_rate": Field("drop_path", 0.1),
    "layer_norm_eps": Field("epsilon", 1e-5),
}

FIXED = {
    "num_channels": 3,
    "hidden_act": "gelu",
    "attention_probs_dropout_prob": 0.0,
    "use_absolute_embeddings": False,
}

LEFT_OUT = {
    "classifier.weight": "the head of SwinForImageClassification",
    "classifier.bias": "the head of SwinForImageClassification",
    "embeddings.mask_token": "the mask of SwinForMaskedImageModeling",
    "decoder.0.weight": "the head of SwinForMaskedImageModeling",
    "decoder.0.bias": "the head of SwinForMaskedImageModeling",
}

MODULES = {
    r"attention\.self\.(query|key|value)$": lambda match: f"attention.{match[1][0]}_proj",
    r"attention\.self$": "attention.relative_position_bias",
    r"attention\.output\.dense$": "attention.o_proj",
    r"intermediate\.dense$": "mlp.fc1",
    r"output\.dense$": "mlp.fc2",
}


def _blocks(module):
    """Yield (name in the file, our path) of every block."""
    for stage, depth in enumerate(module.depths):
        for i in range(depth):
            yield f"encoder.layers.{stage}.blocks.{i}", f"stage_{stage}/block_{i}"


def rules(module: Swin) -> list[Rule]:
    """Pair every tensor of SwinModel with ours."""
    patches = "embeddings.patch_embeddings.projection"
    found = [
        conv(patches, "patch_embedding"),
        Rule(f"{patches}.bias", "params/patch_embedding/bias"),
        *norm("embeddings.norm", "embedding_norm"),
        *norm("layernorm", "norm"),
    ]
    for theirs, ours in _blocks(module):
        attention = f"{theirs}.attention.self"
        for name in ("query", "key", "value"):
            ours_linear = f"{ours}/attention/{name}"
            found += linear(f"{attention}.{name}", ours_linear, bias=module.qkv_bias)
        found += [
            Rule(
                f"{attention}.relative_position_bias_table",
                f"params/{ours}/attention/relative_position",
            ),
            *linear(f"{theirs}.attention.output.dense", f"{ours}/attention/out"),
            *linear(f"{theirs}.intermediate.dense", f"{ours}/mlp/up"),
            *linear(f"{theirs}.output.dense", f"{ours}/mlp/down"),
            *norm(f"{theirs}.layernorm_before", f"{ours}/attention_norm"),
            *norm(f"{theirs}.layernorm_after", f"{ours}/mlp_norm"),
        ]
    for i in range(1, len(module.depths)):
        theirs, ours = f"encoder.layers.{i - 1}.downsample", f"merging_{i}"
        found += linear(f"{theirs}.reduction", f"{ours}/reduction", bias=False)
        found += norm(f"{theirs}.norm", f"{ours}/norm")
    return found


def left_out(module: Swin) -> dict[str, str]:
    """Name the tensors that are known and not read."""
    indices = [f"{block}.attention.self.relative_position_index" for block, _ in _blocks(module)]
    return {**LEFT_OUT, **dict.fromkeys(indices, "a buffer that follows from the window size")}


def _example(module):
    """Make an image whose last map is one window."""
    side = module.patch_size * module.window_size * 2 ** (len(module.depths) - 1)
    return jnp.zeros((1, side, side, 3))


TABLE = Table(
    module=Swin,
    model_types=("swin",),
    prefix="swin.",
    fields=FIELDS,
    fixed=FIXED,
    former={"path_norm": True},
    example=_example,
    rules=rules,
    left_out=left_out,
    architecture=lambda module: ("SwinModel", ""),
    modules=MODULES,
)
