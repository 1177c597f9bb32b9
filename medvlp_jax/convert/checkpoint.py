"""Hugging Face folders: config.json + *.safetensors -> module and variables, and back."""

import functools
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from medvlp_jax.config import UserError
from medvlp_jax.convert.architectures import (
    fields_of,
    model_types,
    pooling_of,
    table_of_config,
    table_of_module,
    written_pooling,
)
from medvlp_jax.convert.beside import PREPROCESSOR, save_tokenizer
from medvlp_jax.convert.files import (
    MAX_SHARD_SIZE,
    Pending,
    read_folder,
    read_json,
    write_folder,
    write_json,
)
from medvlp_jax.convert.hub import fetch
from medvlp_jax.convert.tensors import Tensors, base_names, pending_tensors, to_variables
from medvlp_jax.encoders.base import construct
from medvlp_jax.sharding import Rules, parameter_spec
from medvlp_jax.writing import replaced

# What the tensors of each encoder begin with, in a model of two (CLIPModel, SiglipModel).
TOWERS = {
    "text": ("text_model.", "text_projection."),
    "vision": ("vision_model.", "visual_projection."),
}

# What a checkpoint may disagree on with the module it is read into: these change training only.
TRAINING_FIELDS = (
    "dropout",
    "attention_dropout",
    "drop_path",
    "layer_scale",
    "mask_token",
    "rope_shift",
    "rope_jitter",
    "rope_rescale",
)

logger = logging.getLogger(__name__)


def load(
    path: str | Path,
    *,
    tower: Literal["", "text", "vision"] = "",
    dtype: Any = None,
    drop: Iterable[str] = (),
    ignore: Iterable[str] = (),
    mesh: Mesh | None = None,
    rules: Rules = (),
    **overrides: Any,
):
    """Read a Hugging Face checkpoint.

    Optional parameters (pooler, masked-language-model head) exist where the file has them, unless
    overridden. Tensors of heads this project does not have are left out by name, and logged.
    Features are pooled as they were when `save` wrote the folder; of other folders, as the
    architecture does by default.

    Args:
      path: a folder with config.json and safetensors, or the id of a model on the hub.
      tower: which encoder to read of a model that has two, such as CLIPModel.
      dtype: of the matrix products; the parameters are float32 in any case.
      drop: names of further tensors to leave out.
      ignore: names of settings in config.json to pass over.
      mesh: to read straight into arrays that are split over it: one at a time, of each a process
        reads the parts its devices hold. None reads NumPy arrays, on the host.
      rules: (path pattern, spec) of arrays on the mesh, see sharding.parameter_spec.
      **overrides: fields of the module, such as pooling="mean", mlm_head=False, layout="scan".

    Returns:
      (module, variables): a Linen module and {"params": ..., maybe "batch_stats": ...}, float32.

    Raises:
      UserError: naming what is wrong with the folder, its config or its tensors, all of it at once.
    """
    folder = fetch(path)
    config = config_of_tower(read_config(folder), tower, folder)
    table = table_of_config(config, folder)
    tensors = base_names(table, tensors_of_tower(read_folder(folder), tower))
    said = {**fields_of(table, config, folder, ignore), **table.beside(folder)}
    said |= pooling_of(table, config, folder)
    fields = {**said, **table.detect(tensors), **overrides}
    if dtype is not None:
        fields["dtype"] = dtype
    module = construct(table.module, fields)
    return module, _variables(table, module, tensors, folder, drop, mesh, rules)


def load_into(
    module: Any,
    path: str | Path,
    *,
    tower: Literal["", "text", "vision"] = "",
    drop: Iterable[str] = (),
    ignore: Iterable[str] = (),
    mesh: Mesh | None = None,
    rules: Rules = (),
) -> dict[str, Any]:
    """Read a Hugging Face checkpoint into a module that is already built.

    Args:
      module: one of our encoders.
      path: a folder with config.json and safetensors, or the id of a model on the hub.
      tower: which encoder to read of a model that has two, such as CLIPModel.
      drop: names of further tensors to leave out.
      ignore: names of settings in config.json to pass over.
      mesh: to read straight into split arrays, with `rules`, as `load` does.
      rules: see `load`.

    Returns:
      Its variables, as `load` does.

    Raises:
      UserError: if the config is of another architecture or size, or the tensors do not fit.
    """
    folder = fetch(path)
    config = config_of_tower(read_config(folder), tower, folder)
    table = table_of_config(config, folder)
    if not isinstance(module, table.module):
        raise UserError(
            f"{folder} holds a {config['model_type']!r}, which is not a {type(module).__name__}."
        )
    said = {**fields_of(table, config, folder, ignore), **table.beside(folder)}
    different = [
        f"{name} is {value!r} there and {getattr(module, name)!r} here"
        for name, value in said.items()
        if name not in TRAINING_FIELDS and value != getattr(module, name)
    ]
    if different:
        raise UserError(f"{folder} does not fit {type(module).__name__}: {'; '.join(different)}.")
    tensors = base_names(table, tensors_of_tower(read_folder(folder), tower))
    return _variables(table, module, tensors, folder, drop, mesh, rules)


def _variables(table, module, tensors, folder, drop, mesh, rules):
    left_out = [name for name in table.left_out(module) if name in tensors]
    if left_out:
        logger.info("%s: left out %s", folder, ", ".join(left_out))
    place = None
    if mesh is not None:
        place = functools.partial(_place, mesh, rules)
    return to_variables(table, module, tensors, source=str(folder), drop=drop, place=place)


def _place(mesh, rules, path, shape):
    """Return the sharding of one array.

    Raises:
      UserError: if a rule splits an axis that is not there or does not divide.
    """
    spec = parameter_spec(path, shape, rules, mesh)
    found = NamedSharding(mesh, spec)
    try:
        found.check_compatible_aval(shape)  # not more axes than the array's
        found.shard_shape(shape)
    except ValueError as error:
        raise UserError(
            f"A rule splits {path} {list(shape)} as {spec}, which the mesh {dict(mesh.shape)} "
            "does not allow."
        ) from error
    return found


def save(
    module: Any,
    variables: Mapping[str, Any],
    out_dir: str | Path,
    *,
    tokenizer: Any = None,
    preprocessor: Mapping[str, Any] | None = None,
    card: str | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> None:
    """Write a folder that `transformers.AutoModel.from_pretrained` loads.

    How the module pools stands in config.json, for `load`; `transformers` passes over it.

    A module without a pooler is written without one. `transformers` then makes a random pooler,
    unless told not to: `AutoModel.from_pretrained(out_dir, add_pooling_layer=False)`.

    Arrays may be split over any devices: a file's tensors are gathered, written and let go before
    the next file's. Of several processes all must call this; the first one writes.

    Args:
      module: one of our encoders.
      variables: {"params": ..., maybe "batch_stats": ...}, on the host or on any devices.
      out_dir: made if absent.
      tokenizer: a folder whose tokenizer files to carry along (`out_dir` if they lie there
        already), or an object with `save_pretrained`.
      preprocessor: contents of preprocessor_config.json, see `image_processor`.
      card: text of README.md.
      max_shard_size: bytes of weights in a file, beyond which there are several and an index.

    Raises:
      UserError: if the module is not one we can write, or the variables are not all its own.
    """
    tensors = tensors_of(module, variables)
    write(
        Path(out_dir),
        {**config_of(module), **written_pooling(module), "dtype": dtype_of(tensors)},
        tensors,
        tokenizer=tokenizer,
        preprocessor=preprocessor,
        card=card,
        max_shard_size=max_shard_size,
    )


def config_of(module: Any) -> dict[str, Any]:
    """Return what config.json says of an encoder, but for the type of its weights."""
    table = table_of_module(module)
    return {
        "architectures": [table.architecture(module)[0]],
        "model_type": table.model_types[0],
        **table.fixed,
        **{key: f.write(getattr(module, f.name)) for key, f in table.fields.items()},
    }


def dtype_of(tensors: Mapping[str, Pending]) -> str:
    """Return the type that holds every weight exactly, by the name config.json has for it."""
    types = {
        tensor.dtype for tensor in tensors.values() if jnp.issubdtype(tensor.dtype, jnp.floating)
    }
    return functools.reduce(jnp.promote_types, types).name


def tensors_of(module: Any, variables: Mapping[str, Any]) -> dict[str, Pending]:
    """Return every tensor of an encoder under its name in a file.

    Raises:
      UserError: if the variables are not all its own.
    """
    table = table_of_module(module)
    _, prefix = table.architecture(module)
    tensors = pending_tensors(table, module, variables)
    tensors |= {name: Pending.of(tensor) for name, tensor in table.added(module).items()}
    return {
        name if name.startswith(table.heads) else f"{prefix}{name}": tensor
        for name, tensor in tensors.items()
    }


def write(
    out_dir: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Pending],
    *,
    tokenizer: Any = None,
    preprocessor: Mapping[str, Any] | None = None,
    card: str | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> None:
    """Write a folder; the arguments are those of `save`."""
    out_dir.mkdir(parents=True, exist_ok=True)
    write_folder(out_dir, tensors, max_shard_size)
    if jax.process_index() != 0:
        return
    write_json(out_dir / "config.json", config)
    if tokenizer is not None:
        save_tokenizer(tokenizer, out_dir)
    if preprocessor is not None:
        write_json(out_dir / PREPROCESSOR, preprocessor)
    if card is not None:
        with replaced(out_dir / "README.md") as scratch:
            scratch.write_text(card)


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json.

    Raises:
      UserError: if there is none, or it names no model_type.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder} holds no config.json.")
    config = read_json(file)
    if "model_type" not in config:
        raise UserError(f"{file} names no model_type, such as {', '.join(model_types())}.")
    return config


def config_of_tower(config: Mapping[str, Any], tower: str, folder: Path) -> Mapping[str, Any]:
    """Return the config of one encoder of a model of two, or all of it where there is one.

    Raises:
      UserError: if there are two and `tower` names neither, or it names one and there is one.
    """
    towers = [name for name in TOWERS if f"{name}_config" in config]
    if tower not in (towers or [""]):
        there = " and ".join(f"tower='{name}'" for name in towers) or "no towers"
        asked = f"tower='{tower}'" if tower else "none"
        raise UserError(
            f"{folder} is a {config['model_type']!r}: {there} can be asked for, and {asked} was."
        )
    if not tower:
        return config
    # Early files hold what was meant in *_config_dict, and defaults in *_config.
    own = config.get(f"{tower}_config_dict") or config[f"{tower}_config"]
    joint = {key: config[key] for key in ("projection_dim",) if key in config}
    return {"model_type": f"{config['model_type']}_{tower}_model", **own, **joint}


def tensors_of_tower(tensors: Tensors, tower: str) -> Tensors:
    """Leave out the tensors of the other encoder; `tower` is as for `config_of_tower`."""
    others = tuple(start for name in TOWERS if name != tower for start in TOWERS[name])
    keep = lambda name: not tower or not name.startswith(others)
    return {name: tensor for name, tensor in tensors.items() if keep(name)}
