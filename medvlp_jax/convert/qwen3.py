"""Hugging Face Qwen3Model, Qwen3ForCausalLM <-> medvlp_jax.encoders.qwen3.Qwen3."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from medvlp_jax.config import UserError
from medvlp_jax.convert.files import GENERATION, read_json
from medvlp_jax.convert.table import Field, Rule, Table, linear, norm, rope_base
from medvlp_jax.encoders.base import Tokens
from medvlp_jax.encoders.qwen3 import Qwen3


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    """Read one id, several or none."""
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)


def _as_written(ids: tuple[int, ...]) -> int | list[int] | None:
    """Inverse of `_ids`."""
    return list(ids) if len(ids) > 1 else ids[0] if ids else None


def beside(folder: Path) -> dict[str, tuple[int, ...]]:
    """Read what ends a text off generation_config.json, which `transformers` generates by.

    Raises:
      UserError: if that holds no JSON object.
    """
    file = folder / GENERATION
    said = read_json(file).get("eos_token_id") if file.is_file() else None
    return {} if said is None else {"eos_ids": _ids(said)}


# The keys of the hub's files, which every release of `transformers` reads; see `flatten`.
FIELDS = {
    "vocab_size": Field("vocab_size", 151936),
    "max_position_embeddings": Field("max_length", 32768),
    "hidden_size": Field("width", 4096),
    "num_hidden_layers": Field("depth", 32),
    "num_attention_heads": Field("num_heads", 32),
    "num_key_value_heads": Field("num_kv_heads", 32),
    "head_dim": Field("head_width", 128),
    "intermediate_size": Field("mlp_dim", 22016),
    "rope_theta": Field("rope_base", 10_000.0),
    "tie_word_embeddings": Field("is_tied", False),
    "eos_token_id": Field("eos_ids", None, _ids, _as_written),
    "attention_dropout": Field("attention_dropout", 0.0),
    "rms_norm_eps": Field("epsilon", 1e-6),
}

FIXED = {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False}

HEAD = "lm_head.weight"


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rewrite the nested settings of transformers 5 under the keys of FIELDS.

    Raises:
      UserError: for a rotary type or a kind of layer this implementation does not have.
    """
    flat = dict(config)
    # Where both are given, `transformers` takes the older one.
    older, newer = flat.pop("rope_scaling", None), flat.pop("rope_parameters", None)
    default = flat.get("rope_theta", FIELDS["rope_theta"].default)
    flat["rope_theta"] = rope_base(older or newer, default)
    if flat.get("num_key_value_heads", 0) is None:
        del flat["num_key_value_heads"]
    flat.setdefault("num_key_value_heads", flat.get("num_attention_heads", 32))
    if others := sorted(set(flat.pop("layer_types", None) or ()) - {"full_attention"}):
        raise UserError(
            f"config.json asks for layers of {', '.join(others)}; only full_attention is here."
        )
    return flat


def rules(module: Qwen3) -> list[Rule]:
    """Pair every tensor of Qwen3Model, and of the head this module has, with ours."""
    found = [
        Rule("embed_tokens.weight", "params/word_embedding"),
        *norm("norm", "norm", bias=False),
    ]
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out"}
    for i in range(module.depth):
        theirs, ours = f"layers.{i}", f"stack/block_{i}"
        for their_name, name in names.items():
            linears = f"{theirs}.self_attn.{their_name}", f"{ours}/attention/{name}"
            found += linear(*linears, bias=False)
        for name in ("gate", "up", "down"):
            found += linear(f"{theirs}.mlp.{name}_proj", f"{ours}/mlp/{name}", bias=False)
        found += [
            *norm(f"{theirs}.self_attn.q_norm", f"{ours}/attention/query_norm", bias=False),
            *norm(f"{theirs}.self_attn.k_norm", f"{ours}/attention/key_norm", bias=False),
            *norm(f"{theirs}.input_layernorm", f"{ours}/attention_norm", bias=False),
            *norm(f"{theirs}.post_attention_layernorm", f"{ours}/mlp_norm", bias=False),
        ]
    return [*found, Rule(HEAD, "params/head")] if _has_own_head(module) else found


def _has_own_head(module):
    return module.lm_head and not module.is_tied


TABLE = Table(
    module=Qwen3,
    model_types=("qwen3",),
    prefix="model.",
    fields=FIELDS,
    fixed=FIXED,
    example=lambda module: Tokens(jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)),
    rules=rules,
    beside=beside,
    detect=lambda names: {"lm_head": HEAD in names},
    left_out=lambda module: {} if _has_own_head(module) else {HEAD: "the language-model head"},
    tied=lambda module: {HEAD: "embed_tokens.weight"} if module.is_tied else {},
    untied="is_tied=False",
    architecture=lambda module: (
        ("Qwen3ForCausalLM", "model.") if module.is_tied or module.lm_head else ("Qwen3Model", "")
    ),
    heads=("lm_head.",),
    flatten=flatten,
)
