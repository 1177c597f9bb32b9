"""Low-rank factors: put on a model, folded into its kernels and taken out again, PEFT files.

* `merge` keeps the kernels it replaces, so that `unmerge` gives them back bit for bit: subtracting
  the product again would leave the rounding of both sums.
* A PEFT adapter is named after modules in PyTorch's memory. Where `transformers` 5 has renamed
  these since the checkpoint was written (ViT, Swin, DINOv2), adapters are written under the new
  names and read under either.
* Where PyTorch has one Linear for several of ours (ModernBERT's Wqkv), PEFT has one pair of
  factors. Read: each of ours gets the same A and its own rows of B. Written: all of ours must still
  have that same A, as with `Lora.fused` they share one, or the module is refused by name.

Layout: our A is [in, rank] and our B [rank, out], PEFT's are the transposes.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from medvlp_jax.config import UserError
from medvlp_jax.convert.architectures import table_of_module
from medvlp_jax.convert.files import read_file, read_json, write_json, write_tensors
from medvlp_jax.convert.table import Rule, Table, in_memory
from medvlp_jax.convert.tensors import is_scanned, stacked, unstacked
from medvlp_jax.layers import Lora, torch_uniform

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
ROOT = "base_model.model."  # what PEFT puts before every name

# Settings of LoraConfig that would change the arithmetic, and the values that do not.
FIXED = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # Others (pissa, olora, corda, loftq) take something off the kernels that the factors are for.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "use_dora": (False,),
    "use_rslora": (False,),
    "use_qalora": (False,),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "alora_invocation_tokens": (None,),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
}


def attach(module: Any, variables: Mapping[str, Any], lora: Lora, key: jax.Array):
    """Put fresh factors on a model, which then computes what it did before.

    Args:
      module: an encoder with a `lora` field.
      variables: its variables, without factors.
      lora: rank, scale, and which layers.
      key: of the random A; B is zero.

    Returns:
      (module, variables) with factors.

    Raises:
      UserError: if the module has no such field, or `lora.layers` matches none of its layers.
    """
    flat = flatten_dict(variables, sep="/")
    adapted = _adapted(module, lora)
    shapes = _factor_shapes(adapted, module)
    for i, (path, shape) in enumerate(sorted(shapes.items())):
        if path.endswith("lora_a"):
            draw = torch_uniform(shape[-2])
            flat[path] = np.asarray(draw(jax.random.fold_in(key, i), shape))
        else:
            flat[path] = np.zeros(shape, np.float32)
    return adapted, unflatten_dict(flat, sep="/")


def _adapted(module, lora):
    if not hasattr(module, "lora"):
        raise UserError(f"{type(module).__name__} takes no low-rank factors: it has no field lora.")
    return module.clone(lora=lora)


def _factor_shapes(adapted, module):
    """Return {path: shape} of the factors of a module."""
    example = table_of_module(module).example(module)
    tree = jax.eval_shape(adapted.init, jax.random.key(0), example)
    flat = {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}
    shapes = {path: shape for path, shape in flat.items() if _is_factor(path)}
    if not shapes:
        raise UserError(
            f"lora.layers '{adapted.lora.layers}' matches no layer of {type(module).__name__}."
        )
    return shapes


def _layers_of(flat):
    """Return the paths of all layers with factors."""
    return [path.removesuffix("/lora_b") for path in flat if path.endswith("/lora_b")]


def _a_of(flat, layer):
    """Return the path of a layer's A: its own, or one it shares with its neighbours."""
    own = f"{layer}/lora_a"
    return own if own in flat else f"{layer.rsplit('/', 1)[0]}/lora_a"


def _is_factor(path):
    return path.endswith(("/lora_a", "/lora_b"))


class Merged(NamedTuple):
    """A model with its factors folded in.

    Attributes:
      variables: those of the module without `lora`.
      kept: {path: array} of the kernels as they were and of the factors.
      scale: of the factors' product.
    """

    variables: dict[str, Any]
    kept: dict[str, np.ndarray]
    scale: float


def merge(variables: Mapping[str, Any], lora: Lora) -> Merged:
    """Fold the factors into the kernels: W + (alpha / rank) A B, summed in float64.

    Args:
      variables: of a module, or of a tree of modules, with `lora`.
      lora: for its scale.

    Raises:
      UserError: if there are no factors.
    """
    flat = flatten_dict(variables, sep="/")
    layers = _layers_of(flat)
    if not layers:
        raise UserError("There are no low-rank factors to merge: no array is called lora_b.")
    kernels = [f"{layer}/kernel" for layer in layers]
    kept = {path: flat.pop(path) for path in [*kernels, *filter(_is_factor, [*flat])]}
    flat |= {f"{layer}/kernel": _folded(kept, layer, lora.scale) for layer in layers}
    return Merged(unflatten_dict(flat, sep="/"), kept, lora.scale)


def _folded(kept, layer, scale):
    """Return one kernel with its factors, [in, out] or, of a scanned stack, [L, in, out]."""
    paths = (f"{layer}/kernel", _a_of(kept, layer), f"{layer}/lora_b")
    kernel, a, b = (np.asarray(kept[path], np.float64) for path in paths)
    return (kernel + scale * (a @ b)).astype(kept[f"{layer}/kernel"].dtype)


def unmerge(merged: Merged) -> dict[str, Any]:
    """Inverse of `merge`, bit for bit; other arrays of `merged.variables` stay as they now are.

    Raises:
      UserError: listing merged kernels that have changed since, which no factors stand for.
    """
    flat = flatten_dict(merged.variables, sep="/")
    layers = _layers_of(merged.kept)
    changed = [
        layer
        for layer in layers
        if not np.array_equal(flat[f"{layer}/kernel"], _folded(merged.kept, layer, merged.scale))
    ]
    if changed:
        raise UserError(f"These kernels have changed since merging: {', '.join(changed)}.")
    return unflatten_dict({**flat, **merged.kept}, sep="/")


def save_adapter(
    module: Any, variables: Mapping[str, Any], out_dir: str | Path, *, base: str = ""
) -> None:
    """Write the factors as a folder that `peft.PeftModel.from_pretrained` loads.

    Args:
      module: an encoder with `lora`.
      variables: its variables; only the factors are written.
      out_dir: made if absent.
      base: id or folder of the model the adapter is for.

    Raises:
      UserError: if there are no factors, or some that PEFT's modules cannot hold, all of them by
        name.
    """
    table, lora = table_of_module(module), module.lora
    if lora is None:
        raise UserError(f"This {type(module).__name__} has no low-rank factors to write.")
    flat = {k: np.asarray(v) for k, v in flatten_dict(variables, sep="/").items() if _is_factor(k)}
    flat = unstacked(flat) if is_scanned(module) else flat
    prefix = table.architecture(module)[1]
    tensors, refused, written = {}, [], set()
    for name, rules in _modules(table, module).items():
        layers = [_layer(rule) for rule in rules]
        covered = [layer for layer in layers if f"{layer}/lora_b" in flat]
        if not covered:
            continue
        written |= {f"{layer}/lora_b" for layer in covered}
        written |= {_a_of(flat, layer) for layer in covered}
        a, *others = (flat[_a_of(flat, layer)] for layer in covered)
        if covered != layers or not all(np.array_equal(a, other) for other in others):
            refused.append(f"{name} (one A for all of {', '.join(layers)})")
            continue
        name = name if name.startswith(table.heads) else f"{prefix}{name}"
        rows = [flat[f"{layer}/lora_b"].T for layer in layers]
        tensors[f"{ROOT}{in_memory(table, name)}.lora_A.weight"] = a.T
        tensors[f"{ROOT}{in_memory(table, name)}.lora_B.weight"] = np.concatenate(rows)
    refused += sorted(set(flat) - written)
    if refused or not tensors:
        raise UserError(f"PEFT has no module for these factors: {'; '.join(refused) or 'none'}.")
    names = {name.removeprefix(ROOT).rsplit(".", 2)[0] for name in tensors}
    config = {
        **{key: values[0] for key, values in FIXED.items()},
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "r": lora.rank,
        "target_modules": sorted(names),
        "task_type": None,
    }
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    write_tensors(out_dir / WEIGHTS, tensors)
    write_json(out_dir / CONFIG, config)


def load_adapter(module: Any, variables: Mapping[str, Any], folder: str | Path):
    """Read a PEFT adapter onto a model.

    Args:
      module: an encoder with a `lora` field; what that says is replaced by what the adapter says.
      variables: its variables, without factors.
      folder: with adapter_config.json and adapter_model.safetensors.

    Returns:
      (module, variables) with factors.

    Raises:
      UserError: naming the settings that are not implemented, or listing every tensor that is
        missing, unused or mis-shaped.
    """
    folder, table = Path(folder), table_of_module(module)
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise UserError(f"{folder} holds no {file}.")
    config = read_json(folder / CONFIG)
    wrong = [
        f"{key} {config[key]!r}"
        for key, values in FIXED.items()
        if config.get(key, values[0]) not in values
    ]
    if wrong:
        raise UserError(f"{folder}/{CONFIG} asks for what is not here: {', '.join(wrong)}.")
    factors, unused = _read_factors(table, module, read_file(folder / WEIGHTS))
    factors = stacked(factors) if is_scanned(module) else factors
    layers = sorted({path.rsplit("/", 1)[0].removeprefix("params/") for path in factors})
    pattern = f"(^|/)({'|'.join(map(re.escape, layers))})$"
    lora = Lora(config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0), pattern)
    adapted = _adapted(module, lora)
    shapes = _factor_shapes(adapted, module) if layers else {}
    problems = {
        "missing": sorted(shapes.keys() - factors.keys()),
        "unused": unused,
        "mis-shaped": [
            f"{path} {list(factors[path].shape)} where {list(shape)} is needed"
            for path, shape in sorted(shapes.items())
            if path in factors and factors[path].shape != shape
        ],
    }
    said = "; ".join(f"{kind} {', '.join(names)}" for kind, names in problems.items() if names)
    if said:
        raise UserError(f"{folder} does not fit {type(module).__name__}: {said}.")
    flat = {**flatten_dict(variables, sep="/"), **factors}
    return adapted, unflatten_dict(flat, sep="/")


def _read_factors(table, module, tensors):
    """Return {our path: factor}, blocks unrolled, and the names nothing of ours is called."""
    known = {}
    for name, rules in _modules(table, module).items():
        known |= {name: rules, in_memory(table, name): rules}
    factors, unused = {}, []
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.*)\.lora_([AB])\.weight", name.removeprefix(ROOT))
        rules = known.get(match[1].removeprefix(table.prefix)) if match else None
        if rules is None:
            unused.append(name)
            continue
        whole = tensor[()].astype(np.float32).T  # [in, rank] or [rank, out]
        parts = [whole] * len(rules) if match[2] == "A" else np.split(whole, len(rules), axis=1)
        leaf = f"lora_{match[2].lower()}"
        factors |= {f"{_layer(rule)}/{leaf}": p for rule, p in zip(rules, parts, strict=True)}
    return factors, unused


def _modules(table: Table, module: Any) -> dict[str, list[Rule]]:
    """Return {name of a nn.Linear in the file: the rules of its parts}."""
    found = {}
    for rule in table.rules(module):
        if rule.path.endswith("/kernel") and rule.axes == (1, 0):
            found.setdefault(rule.tensor.removesuffix(".weight"), []).append(rule)
    return found


def _layer(rule):
    return rule.path.removesuffix("/kernel")
