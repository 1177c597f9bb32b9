"""The one training step, for every method.

Only this file and evaluation/features.py call `init` and `apply`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.core import DenyList

from medvlp_jax import schedules, sharding
from medvlp_jax.config import UserError
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


def make_train_step(
    recipe, tx: optax.GradientTransformation, rate: optax.Schedule, seed: int
) -> Callable[[TrainState, Mapping], tuple[TrainState, dict[str, jax.Array]]]:
    """Return the jitted step (state, global batch) -> (state, metrics); the state is donated.

    Metrics are scalars: `loss`, `loss/<term>` unweighted, `weight/<term>`, `grad_norm`, `lr`.
    The randomness of a step is a function of (seed, step) alone, so a resumed run repeats it.
    """

    def losses(params, state, batch, rngs):
        variables = {"params": paths.merge(params, state.frozen), **state.collections}
        terms, collections = recipe.apply(
            variables, batch, train=True, rngs=rngs, mutable=DenyList("params")
        )
        weights = {k: schedules.at(recipe.weights[k], state.step) for k in terms}
        total = sum(weights[k] * terms[k] for k in terms)
        return total, (terms, weights, collections)

    def step(state, batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        rngs = dict(zip(RNGS, jax.random.split(key, len(RNGS)), strict=True))
        grad = jax.value_and_grad(losses, has_aux=True)
        (total, (terms, weights, collections)), grads = grad(state.params, state, batch, rngs)
        updates, optimizer = tx.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": total, "grad_norm": optax.tree.norm(grads), "lr": rate(state.step)}
        metrics |= {f"loss/{k}": v for k, v in terms.items()}
        metrics |= {f"weight/{k}": v for k, v in weights.items()}
        return TrainState(state.step + 1, params, state.frozen, collections, optimizer), metrics

    return jax.jit(step, donate_argnums=0)


def make_embed(recipe, mesh) -> Callable[[Mapping, Mapping], dict]:
    """Return (variables, batch of host arrays) -> features on the host, in evaluation mode."""
    encode = jax.jit(
        lambda variables, batch: recipe.apply(variables, batch, train=False, method="encode")
    )

    def embed(variables, batch):
        return jax.device_get(encode(variables, sharding.to_global(batch, mesh)))

    return embed
