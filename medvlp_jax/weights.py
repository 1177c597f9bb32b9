"""Where the weights of a run come from: Hugging Face folders, and runs before it.

A stage of a paper starts from the run of the stage before (`init.params`): what both have is taken,
what only one has must be named by the recipe (`fresh`, `left`), else all of it is listed.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from medvlp_jax import convert, distributed
from medvlp_jax.config import UserError
from medvlp_jax.convert import architectures, beside, lora
from medvlp_jax.convert.checkpoint import read_config
from medvlp_jax.encoders.base import IMAGENET_MEAN, IMAGENET_STD
from medvlp_jax.recipes import base
from medvlp_jax.training import optim, selection
from medvlp_jax.training import params as paths
from medvlp_jax.training.checkpoint import Checkpointer

HOW_IT_RUNS = (
    "pooling",
    "attention",
    "layout",
    "remat",
    "bn_momentum",
    "dropout",
    "attention_dropout",
    "drop_path",
    "kept_patches",
)


def load_encoder(folder: str | pathlib.Path, spec: Mapping[str, Any], seed: int):
    """Read a Hugging Face folder: it says what the architecture is, the config how it is run.

    Args:
      folder: or hub id.
      spec: of the config; `lora` puts fresh low-rank factors on.
      seed: of these.

    Returns:
      (module, variables), without heads of the folder that the config does not ask for.
    """
    folder = convert.fetch(folder)
    how = {k: v for k, v in spec.items() if k in HOW_IT_RUNS}
    how |= heads_of(folder, spec)
    module, variables = convert.load(folder, dtype=spec.get("dtype"), **how)
    factors = base.low_rank(spec["lora"]) if "lora" in spec else None
    if factors is None:
        return module, variables
    return lora.attach(module, variables, factors, jax.random.key(seed))


def say_normalisation(folder: str | pathlib.Path) -> None:
    """Say where images were normalised by other numbers than a run's in the training of weights.

    Args:
      folder: or hub id, of an image encoder.
    """
    _, said = beside.read_preprocessor(convert.fetch(folder))
    mean, std = beside.mean_and_std(said or {})
    is_ours = lambda found, ours: found in (None, ours, [*ours])
    if is_ours(mean, IMAGENET_MEAN) and is_ours(std, IMAGENET_STD):
        return
    distributed.say(
        f"init.image={folder}: the encoder was trained with mean {_listed(mean)}, std "
        f"{_listed(std)}; runs normalise by ImageNet's: mean {_listed(IMAGENET_MEAN)}, std "
        f"{_listed(IMAGENET_STD)}."
    )


def _listed(numbers):
    return ", ".join(map(str, numbers)) if isinstance(numbers, list | tuple) else str(numbers)


def heads_of(folder: pathlib.Path, spec: Mapping[str, Any]) -> dict[str, bool]:
    """Return the fields that switch the heads of what a folder describes off, unless asked for.

    A folder asks for the pooler where it says that its features went through it and the spec leaves
    the pooling to the folder.
    """
    config = read_config(folder)
    table = architectures.table_of_config(config, folder)
    known = {field.name for field in dataclasses.fields(table.module)}
    own = {} if "pooling" in spec else architectures.pooling_of(table, config, folder)
    asked = {"pooler": own.get("pooling") == "pooler", **spec}
    return {name: bool(asked.get(name)) for name in known & {"mlm_head", "pooler"}}


class Trained(NamedTuple):
    """What training came to.

    Attributes:
      variables: {"params": ..., maybe "batch_stats": ...}, averaged if the run averages.
      step: after which they are so.
      is_selected: whether the run selected this step, of all it evaluated.
    """

    variables: dict[str, Any]
    step: int
    is_selected: bool = False


def read(folder: pathlib.Path, template: Mapping) -> Trained:
    """Read parameters (averaged, if the run averages) and collections of a run.

    Those of its newest checkpoint, or of the step it selected.

    Args:
      folder: a run folder.
      template: variables of the wanted shapes.

    Raises:
      UserError: if there is no checkpoint, or it does not fit.
    """
    found = _read(folder)
    variables = {
        kind: _replace(tree, found.variables.get(kind, {}), folder)
        for kind, tree in template.items()
    }
    return found._replace(variables=variables)


def read_variables(folder: pathlib.Path, template: Mapping) -> dict:
    """Return the variables that `read` reads."""
    return read(folder, template).variables


def begin_from(folder: pathlib.Path, template: Mapping, recipe) -> dict:
    """Read what a run has of the parameters of another stage; the rest stays as it is.

    Args:
      folder: a run folder.
      template: initial variables.
      recipe: for its `fresh` and `left`; one without them takes all or fails.

    Raises:
      UserError: if there is no checkpoint, or listing what does not fit.
    """
    found, params = _read(folder).variables, template["params"]
    left = getattr(recipe, "left", ())
    kept = {p: v for p, v in paths.flatten(found["params"]).items() if not paths.matches(p, left)}
    kept = paths.unflatten(kept)
    begun = [name for name in getattr(recipe, "fresh", ()) if name in params and name not in kept]
    taken = {name: tree for name, tree in params.items() if name not in begun}
    distributed.say(
        f"init.params={folder}: takes {', '.join(taken)}; begins {', '.join(begun) or 'nothing'}"
    )
    merged = {"params": _replace(taken, kept, folder) | {name: params[name] for name in begun}}
    others = {kind: tree for kind, tree in template.items() if kind != "params"}
    return merged | {
        kind: _replace(tree, found.get(kind, {}), folder) for kind, tree in others.items()
    }


def _replace(tree, values, folder):
    return paths.replace({"all": tree}, "all", values, str(folder))["all"]


def _read(folder) -> Trained:
    """Return all variables of a run, and of which step they are."""
    folder = pathlib.Path(folder)
    for place in (folder / selection.FOLDER, folder):
        # A selection without a step is of a run that stopped before its first evaluation.
        if not (place / "checkpoints").is_dir():
            continue
        checkpointer = Checkpointer(place / "checkpoints")
        step = checkpointer.latest()
        restored = None if step is None else checkpointer.read(step)
        checkpointer.close()
        if restored is not None:
            break
    else:
        raise UserError(f"{folder} has no checkpoint.")
    average = optim.find_average(restored["optimizer"])
    params = restored["params"] if average is None else average
    variables = {"params": paths.merge(params, restored["frozen"] or {})}
    variables |= restored["collections"] or {}
    return Trained(variables, step, is_selected=place != folder)
