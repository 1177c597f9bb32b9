"""The one training step, for every method.

Only this file and evaluation/features.py call `init` and `apply`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.core import DenyList
from jax.sharding import Mesh, NamedSharding

from medvlp_jax import schedules, sharding
from medvlp_jax.config import UserError
from medvlp_jax.training import optim
from medvlp_jax.training import params as paths

RNGS = ("dropout", "draws")


class TrainState(NamedTuple):
    """Everything a run needs to go on, as one pytree.

    Attributes:
      step: optimisation steps taken, int32.
      params: trainable parameters.
      frozen: fixed parameters: no gradient, no optimiser state.
      collections: other Linen state, such as batch_stats.
      optimizer: optax state.
    """

    step: jax.Array
    params: Mapping[str, Any]
    frozen: Mapping[str, Any]
    collections: Mapping[str, Any]
    optimizer: Any

    @property
    def variables(self) -> dict:
        """What Linen's `apply` takes."""
        return {"params": paths.merge(self.params, self.frozen), **self.collections}

    @property
    def evaluated(self) -> dict:
        """The same with the averaged parameters, where the optimiser keeps an average."""
        average = optim.find_average(self.optimizer)
        params = self.params if average is None else average
        return {"params": paths.merge(params, self.frozen), **self.collections}


def check_batch(recipe, batch: Mapping) -> None:
    """Refuse a batch that lacks what the recipe reads.

    Raises:
      UserError: naming the missing keys and what the batch has.
    """
    missing = [key for key in recipe.inputs if key not in batch]
    if missing:
        raise UserError(
            f"{type(recipe).__name__} reads {', '.join(missing)}, "
            f"but the batch has only {', '.join(sorted(batch))}."
        )


def init_variables(recipe, batch: Mapping, seed: int) -> dict:
    """Initialise all parameters and collections.

    Args:
      recipe: its `encode` must touch every parameter when all modalities are there.
      batch: a few examples with every modality, text as tokens; only the shapes count.
      seed: of the initial values.
    """
    keys = jax.random.split(jax.random.key(seed), 1 + len(RNGS))
    rngs = dict(zip(("params", *RNGS), keys, strict=True))
    # One compiled program: op-by-op initialisation of a large model takes minutes.
    init = jax.jit(lambda rngs, batch: recipe.init(rngs, batch, train=True, method="encode"))
    return init(rngs, batch)


def make_state(variables: Mapping, tx, frozen: Sequence[str]) -> TrainState:
    """Assemble the state at step 0 from Linen variables; parameters matching `frozen` are fixed."""
    collections = {k: v for k, v in variables.items() if k != "params"}
    trainable, fixed = paths.split(variables["params"], frozen)
    return TrainState(jnp.int32(0), trainable, fixed, collections, tx.init(trainable))


def plan_state(
    variables: Mapping, tx, frozen: Sequence[str], mesh: Mesh, rules: sharding.Rules = ()
) -> TrainState:
    """Return shapes, dtypes and shardings of the state at step 0; nothing is put on a device."""
    shapes = jax.eval_shape(lambda v: make_state(v, tx, frozen), variables)
    return sharding.abstract(shapes, sharding.shardings(shapes, mesh, rules))


def begin_state(variables: Mapping, tx, frozen: Sequence[str], planned: TrainState) -> TrainState:
    """Assemble the state at step 0, of which each device is given its parts alone.

    Args:
      variables: of Linen, on the host.
      tx: optimiser.
      frozen: patterns of fixed parameters.
      planned: from `plan_state`, of the same.
    """
    collections = {k: v for k, v in variables.items() if k != "params"}
    trainable, fixed = paths.split(variables["params"], frozen)
    where = jax.tree.map(lambda leaf: leaf.sharding, planned)
    held = (np.int32(0), trainable, fixed, collections)
    step, params, fixed, collections = sharding.place(held, tuple(where[:4]))
    # Compiled, moments are made where they are to lie, instead of whole on one device.
    optimizer = jax.jit(tx.init, out_shardings=where.optimizer)(params)
    return TrainState(step, params, fixed, collections, optimizer)


def make_train_step(
    recipe,
    tx: optax.GradientTransformation,
    rate: optax.Schedule,
    seed: int,
    *,
    chunks: int = 1,
    mesh: Mesh | None = None,
    rules: sharding.Rules = (),
) -> Callable[[TrainState, Mapping], tuple[TrainState, dict[str, jax.Array]]]:
    """Return the jitted step (state, global batch) -> (state, metrics); the state is donated.

    Metrics are scalars: `loss`, `loss/<term>` unweighted, `weight/<term>`, `grad_norm`, `lr`.
    The randomness of a step is a function of (seed, step, chunks) alone, so a resumed run repeats
    it.

    Args:
      recipe: the method.
      tx: optimiser.
      rate: learning rate by step, for the metrics.
      seed: of the randomness.
      chunks: parts the batch is encoded in, see `encode_in_chunks`.
      mesh: where the state lies and what the tiled losses travel around; None: no constraint on
        the one, and the mesh in context, if any, for the others.
      rules: where the state lies on the mesh, see sharding.shardings.
    """

    def losses(params, state, batch, rngs):
        variables = {"params": paths.merge(params, state.frozen), **state.collections}
        if chunks == 1:
            features, collections = encode(recipe, variables, batch, rngs)
            variables = {**variables, **collections}
        else:
            features = encode_in_chunks(recipe, variables, batch, rngs, chunks)
        return objective(recipe, variables, features, batch, rngs, state.step)

    def step(state, batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        rngs = dict(zip(RNGS, jax.random.split(key, len(RNGS)), strict=True))
        grad = jax.value_and_grad(losses, has_aux=True)
        with sharding.tracing_on(mesh):
            (total, (terms, weights, collections)), grads = grad(state.params, state, batch, rngs)
        updates, optimizer = tx.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": total, "grad_norm": optax.tree.norm(grads), "lr": rate(state.step)}
        metrics |= {f"loss/{k}": v for k, v in terms.items()}
        metrics |= {f"weight/{k}": v for k, v in weights.items()}
        state = TrainState(state.step + 1, params, state.frozen, collections, optimizer)
        if mesh is not None:
            # Left to itself the compiler may split a leaf otherwise than it came: not donated, and
            # the next step is another program.
            where = sharding.shardings(state, mesh, rules)
            state = jax.lax.with_sharding_constraint(state, where)
        return state, metrics

    return jax.jit(step, donate_argnums=0)


def encode(recipe, variables: Mapping, batch: Mapping, rngs: Mapping):
    """Return (features, collections as training leaves them) of a batch."""
    return recipe.apply(
        variables, batch, train=True, rngs=rngs, mutable=DenyList("params"), method="encode"
    )


def objective(recipe, variables: Mapping, features: Mapping, batch: Mapping, rngs: Mapping, step):
    """Return the weighted sum of a recipe's terms, and (terms, weights, collections)."""
    terms, collections = recipe.apply(
        variables,
        features,
        batch,
        train=True,
        rngs=rngs,
        mutable=DenyList("params"),
        method="objective",
    )
    losses = [k for k in terms if k not in getattr(recipe, "watched", ())]
    weights = {k: schedules.at(recipe.weights[k], step) for k in losses}
    return sum(weights[k] * terms[k] for k in losses), (terms, weights, collections)


def encode_in_chunks(
    recipe, variables: Mapping, batch: Mapping, rngs: Mapping, chunks: int
) -> Mapping:
    """Encode a batch for training part by part: an exact gradient cache.

    The forward pass keeps the features and no graph. Once the loss over the whole batch has given
    their gradients, each part is encoded again and differentiated with its share of them. That is
    rematerialisation of a loop: the second pass repeats the first, dropout included, because its
    random keys are inputs. Gradient cache: Gao et al. 2021, https://arxiv.org/abs/2101.06983

    Part c is every chunks-th example from c on, so that each device finds its share of every part
    among its own rows. The dropout key is folded with c, since parts must not share masks: for
    dropout, `chunks` is part of the seed. Draws made once for a batch stay the same in all parts;
    those a recipe makes for each row (`draws_by_row`) are folded as dropout is.

    Args:
      recipe: the method.
      variables: what `apply` takes.
      batch: leaves [B, ...].
      rngs: keys by name.
      chunks: number of parts; must divide B.

    Returns:
      Features [B, ...] in the order of the batch.

    Raises:
      UserError: where chunks do not divide B, or where encode normalises with statistics of the
        batch, which a part would change.
    """
    size = len(jax.tree.leaves(batch)[0])
    if size % chunks:
        raise UserError(f"train.chunks={chunks} does not divide a batch of {size}.")
    moving = moving_state(recipe, variables, batch, rngs)
    if moving:
        raise UserError(
            f"train.chunks={chunks} would change the result: training updates {moving[0]} and "
            f"{len(moving) - 1} more arrays from the statistics of the whole batch; accepted are "
            "chunks=1 or encoders and heads without BatchNorm."
        )

    def split(x):  # [B, ...] -> [chunks, B / chunks, ...]
        return jnp.moveaxis(x.reshape(size // chunks, chunks, *x.shape[1:]), 1, 0)

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(size, *x.shape[2:])

    apart = RNGS if getattr(recipe, "draws_by_row", False) else ("dropout",)

    def one(part):
        index, rows = part
        keys = {**rngs, **{name: jax.random.fold_in(rngs[name], index) for name in apart}}
        return recipe.apply(variables, rows, train=True, rngs=keys, method="encode")

    parts = jnp.arange(chunks), jax.tree.map(split, batch)
    return jax.tree.map(join, jax.lax.map(jax.checkpoint(one, prevent_cse=False), parts))


def moving_state(recipe, variables: Mapping, batch: Mapping, rngs: Mapping) -> list[str]:
    """List the paths of what `encode` changes in training besides the parameters."""
    moving = []

    def compare(variables):
        _, after = encode(recipe, variables, batch, rngs)
        before = {id(leaf) for leaf in jax.tree.leaves(variables)}
        moving.extend(p for p, leaf in paths.flatten(after).items() if id(leaf) not in before)

    jax.eval_shape(compare, variables)
    return moving


def make_embed(recipe, mesh, method: str = "encode") -> Callable[[Mapping, Mapping], dict]:
    """Return (variables, this process's rows) -> features of these rows, in evaluation mode.

    Args:
      recipe: the method.
      mesh: batches are split over it.
      method: "encode", or another of the recipe that takes a batch alone.
    """
    mode = {"train": False} if method == "encode" else {}
    encode = jax.jit(
        lambda variables, batch: recipe.apply(variables, batch, **mode, method=method),
        out_shardings=NamedSharding(mesh, sharding.BATCH),
    )

    def embed(variables, batch):
        features = encode(variables, sharding.to_global(batch, mesh))
        return jax.tree.map(sharding.own_rows, features)

    return embed
