"""What a training step will take, before any data, weight or accelerator is touched.

  medvlp train --config=... --plan [--devices=8]

The very step of the run is traced and compiled from shapes: nothing is allocated, run or written.
Memory is that of the compiled program, FLOPs those of the traced one (training/flops.py).
"""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from medvlp_jax import assemble, checks, clinical, sharding, tables, weights
from medvlp_jax import config as configs
from medvlp_jax.config import UserError
from medvlp_jax.convert import architectures
from medvlp_jax.convert.checkpoint import read_config
from medvlp_jax.data import packing
from medvlp_jax.data import text as tokenisation
from medvlp_jax.data.prompts import Prompt
from medvlp_jax.encoders.base import Tokens, construct
from medvlp_jax.recipes import base, mlm
from medvlp_jax.training import flops, optim
from medvlp_jax.training import params as paths
from medvlp_jax.training import step as training

SECTIONS = ("findings", "impression", "report")
PROMPT = 60  # tokens of a question with six options, where its tokenizer is not here
# Generating fast machine code takes most of a compilation for the CPU and moves no byte.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
PARTS = ("image encoder", "text encoder", "language model", "heads", "loss", "optimiser")


class Blueprint(NamedTuple):
    """A step in shapes.

    Attributes:
      config: resolved.
      recipe: the method.
      mesh: over the devices planned for.
      state: TrainState of ShapeDtypeStructs that say where they will lie.
      batch: likewise, what the recipe reads.
      step: jitted (state, batch) -> (state, metrics).
      notes: what the shapes were taken from where the run would read a file.
    """

    config: Mapping[str, Any]
    recipe: Any
    mesh: jax.sharding.Mesh
    state: training.TrainState
    batch: Mapping[str, Any]
    step: Any
    notes: tuple[str, ...]


class Plan(NamedTuple):
    """What a step takes.

    Attributes:
      memory: {what: bytes on each device}; the step's own temporary memory holds gradients,
        activations and the loss together.
      loss_memory: temporary bytes on each device of value and gradient of the loss alone.
      flops: {part: FLOPs a step, all devices together}.
      recomputed: FLOPs among them that the backward pass makes again to save memory.
      parameters: (trainable, frozen) numbers of parameters.
    """

    memory: Mapping[str, int]
    loss_memory: int
    flops: Mapping[str, int]
    recomputed: int
    parameters: tuple[int, int]


def emulate(count: int) -> list[jax.Device]:
    """Return `count` devices of the CPU; to be called before anything else asks for devices.

    Raises:
      UserError: for a count below 1, or if this process already has fewer.
    """
    if count < 1:
        raise UserError(f"--devices must be at least 1, got {count}.")
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # JAX has its devices already: in a test, in a notebook
        pass
    found = jax.devices("cpu")
    if len(found) < count:
        raise UserError(f"--devices={count}, but this process already has {len(found)}.")
    return found[:count]


def blueprint(config: Mapping[str, Any], devices: Sequence[jax.Device] | None = None) -> Blueprint:
    """Make the step of a config from shapes alone.

    Args:
      config: resolved.
      devices: to plan for; None takes those there are.

    Raises:
      UserError: for settings that do not fit together.
    """
    try:
        axes = {k: config["mesh"][k] for k in sharding.AXES}
        mesh = sharding.make_mesh(**axes, devices=devices)
    except ValueError as error:
        raise UserError(f"{error}.") from None
    recipe, notes = _recipe(config)
    everything = _batch(recipe, config["data"], 2)
    keys = ("image", "image_2", *getattr(recipe, "images", ()), "tabular", *SECTIONS)
    keys += ("evidence", "evidence_mask", "metadata", "metadata_vector")
    try:
        variables = jax.eval_shape(
            lambda batch: training.init_variables(recipe, batch, 0),
            {key: everything[key] for key in keys if key in everything},
        )
    except ValueError as error:  # an encoder's sentence about sizes that do not fit
        raise UserError(str(error)) from error
    settings = config["train"]
    frozen = (*recipe.frozen, *config["optim"]["freeze"])
    paths.check_patterns(variables["params"], frozen, "optim.freeze")
    fields = {k: v for k, v in config["optim"].items() if k != "freeze"}
    trainable, _ = paths.split(variables["params"], frozen)
    tx, rate = optim.make(trainable, steps=settings["steps"], **fields)
    if base.relates(recipe):
        # Their size is the corpus', which is not read here: a thousand images stand for it.
        variables = {**variables, "relations": jax.eval_shape(lambda: recipe.no_relations(1000))}
    state = jax.eval_shape(lambda v: training.make_state(v, tx, frozen), variables)
    batch = _batch(recipe, config["data"], settings["batch_size"])
    training.check_batch(recipe, batch)
    if shares := checks.packed(config, recipe, mesh):
        pack = packing.Packing(shares, sharding.batch_devices(mesh))
        empty = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), {k: batch[k] for k in shares})
        batch |= jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), pack(empty))
    return Blueprint(
        config,
        recipe,
        mesh,
        _placed(state, sharding.shardings(state, mesh, config["mesh"]["rules"])),
        _placed({key: batch[key] for key in recipe.inputs}, _split(mesh)),
        training.make_train_step(
            recipe,
            tx,
            rate,
            config["seed"],
            chunks=settings["chunks"],
            mesh=mesh,
            rules=config["mesh"]["rules"],
        ),
        notes,
    )


def make(blueprint: Blueprint) -> Plan:
    """Trace and compile the step, and the loss alone."""
    state = blueprint.state
    traced = blueprint.step.trace(state, blueprint.batch)
    found, again = flops.by_part(traced.jaxpr, flops.step_part)
    temporary = _temporary(traced.lower(), blueprint.mesh)
    memory = {
        "parameters": state.params,
        "frozen parameters": state.frozen,
        "other state": state.collections,
        "optimiser": (state.step, state.optimizer),
        "batch": blueprint.batch,
    }
    memory = {name: bytes_on_a_device(tree) for name, tree in memory.items()}
    return Plan(
        memory | {"activations and gradients": temporary},
        _loss_memory(blueprint),
        {part: found[part] for part in PARTS if found[part] or part != "language model"},
        sum(again.values()),
        (paths.count(state.params), paths.count(state.frozen)),
    )


def bytes_on_a_device(tree) -> int:
    """Bytes of the largest shard of every leaf of a tree that says where its leaves lie."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def table(blueprint: Blueprint, plan: Plan) -> str:
    """Lay the plan out to be read."""
    config, mesh = blueprint.config, blueprint.mesh
    settings = config["train"]
    trainable, frozen = plan.parameters
    axes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    kind = mesh.devices.flat[0].device_kind
    total, all_flops = sum(plan.memory.values()), sum(plan.flops.values())
    share = settings["batch_size"] // sharding.batch_devices(mesh)
    lines = [
        f"{config['recipe']['name']}: {trainable / 1e6:.2f} M trainable and {frozen / 1e6:.2f} M "
        f"fixed parameters",
        f"{settings['batch_size']} pairs a step in {settings['chunks']} chunk(s) on {mesh.size} "
        f"{kind} device(s): {axes}; {share} pairs each",
        "",
        f"{'MiB on each device':<40}",
    ]
    lines += [f"  {name:<28}{size / 2**20:>12,.1f}" for name, size in plan.memory.items() if size]
    lines += [
        f"  {'together':<28}{total / 2**20:>12,.1f}",
        f"  {'(the loss alone, temporary)':<28}{plan.loss_memory / 2**20:>12,.1f}",
        "",
        f"{'GFLOP a step':<36}{'share':>6}",
    ]
    lines += [
        f"  {part:<28}{count / 1e9:>12,.2f}{count / all_flops:>8.1%}"
        for part, count in plan.flops.items()
    ]
    per_pair = all_flops / settings["batch_size"] / 1e9
    lines += [
        f"  {'together':<28}{all_flops / 1e9:>12,.2f}  {per_pair:,.2f} a pair",
        f"  {'(of which computed again)':<28}{plan.recomputed / 1e9:>12,.2f}",
        "",
    ]
    if kind == "cpu":
        lines.append(
            "Compiled for the CPU: another backend fuses, lays out and pads differently, so take "
            "activations as an estimate there; parameters, optimiser and FLOPs are exact."
        )
    return "\n".join([*lines, *blueprint.notes])


def _recipe(config) -> tuple[Any, tuple[str, ...]]:
    """Build the recipe from the config and from what lies on this disk, weights unread."""
    spec, data, init = dict(config["recipe"]), config["data"], config["init"]
    name = spec.pop("name")
    notes = []
    if name == "mlm":
        spec = mlm.completed(spec, None)
    if "llm" in spec:
        if data["llm_tokenizer"] or pathlib.Path(init["llm"]).is_dir():
            spec |= assemble.language_model(spec, config)
        else:
            spec["prompt"] = _usual_prompt(spec)
            notes.append(
                f"init.llm={init['llm']} is not here: a prompt of {PROMPT} tokens is taken."
            )
    for side in ("image", "text", "llm"):
        if side not in spec:
            continue
        source, fields = init[side], dict(spec[side])
        if source and pathlib.Path(source).is_dir():
            spec[side] = _described(pathlib.Path(source), fields)
            continue
        if side == "text":
            size, origin = _vocabulary(data, source)
            fields |= {"vocab_size": size} if size else {}
            notes += [] if size else [f"{origin}: vocabulary as recipe.text has it."]
        if source not in ("", "mlm"):
            notes.append(f"init.{side}={source} is not read: sizes are those of recipe.{side}.")
        spec[side] = fields
    return configs.build("medvlp_jax.recipes", name, **spec), tuple(notes)


def _usual_prompt(spec) -> Prompt:
    """Return a prompt of the usual length, for where its tokenizer is not here."""
    marks = ((0,),) * len(spec["prompt"]["delimiters"])
    return Prompt((0,) * PROMPT, (0, 0, 0), tuple(range(spec["num_classes"])), marks)


def _described(folder, fields):
    """Build the encoder a Hugging Face folder describes; the config says how it is run."""
    described = read_config(folder)
    table = architectures.table_of_config(described, folder)
    how = {k: v for k, v in fields.items() if k in (*weights.HOW_IT_RUNS, "dtype")}
    factors = {"lora": base.low_rank(fields["lora"])} if "lora" in fields else {}
    how |= factors | weights.heads_of(folder, fields)
    return construct(table.module, {**architectures.fields_of(table, described, folder), **how})


def _vocabulary(data, source) -> tuple[int, str]:
    """Return how many tokens the run's tokenizer will have, 0 if it is not here, and its origin."""
    if data["tokenizer"] == "train":
        return data["vocab_size"], "data.tokenizer=train"
    if data["tokenizer"]:
        return tokenisation.load_tokenizer(data["tokenizer"]).get_vocab_size(), ""
    return 0, f"the tokenizer of init.text={source or '(empty)'} is not here"


def _batch(recipe, data, size: int) -> dict[str, Any]:
    """Return all a recipe may read of `size` examples, as data/pipeline.py makes it, in shapes."""
    shape = jax.ShapeDtypeStruct
    image = shape((size, data["crop"], data["crop"], data["channels"]), np.uint8)
    tokens = (size, data["text_length"])
    batch: dict[str, Any] = {"image": image, "image_2": image}
    for name, (one, dtype) in assemble.image_shapes(data, getattr(recipe, "images", ())).items():
        batch[name] = shape((size, *one), dtype)
    if "tabular" in recipe.inputs:
        rows = tables.empty_table(data)
        batch["tabular"] = shape((size, *rows.shape), rows.dtype)
    if hasattr(recipe, "task"):
        batch[f"label/{recipe.task}"] = shape((size, recipe.num_classes), np.int8)
    if not hasattr(recipe, "text"):
        return batch
    for section in SECTIONS:
        batch[section] = Tokens(shape(tokens, np.int32), shape(tokens, np.bool_))
        batch[f"{section}_valid"] = shape((size,), np.bool_)
        batch[f"{section}_id"] = shape((size,), np.int32)
        batch[f"{section}_feature"] = shape((size, recipe.text.width), np.float32)
    if hasattr(recipe, "evaluated"):
        length, width = data["text_length"], recipe.text.width
        batch["metadata"] = Tokens(shape(tokens, np.int32), shape(tokens, np.bool_))
        batch["metadata_feature"] = shape((size, length, width), np.float32)
        batch["metadata_vector"] = shape((size, clinical.described(data).width), np.float32)
    if "evidence" in recipe.inputs:
        phrases = (size, data["evidence"]["phrases"])
        words = (*phrases, data["evidence"]["length"])
        batch["evidence"] = Tokens(shape(words, np.int32), shape(words, np.bool_))
        batch["evidence_mask"] = shape(phrases, np.bool_)
    if "paired" in recipe.inputs:
        batch["paired"] = shape((size,), np.bool_)
        batch["image_row"] = batch["report_row"] = shape((size,), np.int32)
    return batch


def _split(mesh):
    return jax.sharding.NamedSharding(mesh, sharding.BATCH)


def _placed(tree, where):
    """Say of every shape where it will lie."""
    if isinstance(where, jax.sharding.Sharding):
        where = jax.tree.map(lambda _: where, tree)
    return sharding.abstract(tree, where)


def _loss_memory(blueprint) -> int:
    """Compile value and gradient of the objective at given features."""
    recipe, mesh = blueprint.recipe, blueprint.mesh
    rngs = dict.fromkeys(training.RNGS, jax.random.key(0))
    variables = blueprint.state.variables

    def encode(variables, batch):
        features, _ = training.encode(recipe, variables, batch, rngs)
        return features

    features = jax.eval_shape(encode, variables, blueprint.batch)
    features = _placed(features, _split(mesh))
    moving = {k: v for k, v in features.items() if jnp.issubdtype(v.dtype, jnp.floating)}

    def loss(moving, variables, features, batch):
        step = jnp.int32(0)
        total, _ = training.objective(recipe, variables, {**features, **moving}, batch, rngs, step)
        return total

    with sharding.tracing_on(mesh):
        lowered = jax.jit(jax.value_and_grad(loss)).lower(
            moving, variables, features, blueprint.batch
        )
    return _temporary(lowered, mesh)


def _temporary(lowered, mesh) -> int:
    """Compile, and return the temporary bytes on each device."""
    options = QUICK if mesh.devices.flat[0].platform == "cpu" else None
    return lowered.compile(options).memory_analysis().temp_size_in_bytes
