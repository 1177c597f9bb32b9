"""The optimiser of a run: one optax chain, learning rates and weight decay by parameter path."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from medvlp_jax import schedules
from medvlp_jax.config import UserError
from medvlp_jax.training import params as paths

Multipliers = Sequence[tuple[str, float]]
SCALERS = {
    "adam": optax.scale_by_adam,
    "adamw": optax.scale_by_adam,
    "lamb": optax.scale_by_adam,
    "sgd": lambda b1, b2: optax.trace(0.9),
}


def check(
    *,
    name: str,
    lr: float,
    steps: int,
    warmup: int = 0,
    schedule: str = "cosine",
    floor: float = 0.0,
    average: float = 0.0,
    multipliers: Multipliers = (),
    **others: Any,
) -> optax.Schedule:
    """Return the learning rate of a step; settings that need no parameters are refused here.

    Args as in `make`; `others` are not looked at.

    Raises:
      UserError: for an unknown name, a schedule that does not fit, an average outside [0, 1), or
        multipliers that are no pairs.
    """
    del others
    for pair in multipliers:
        if not (
            isinstance(pair, list | tuple) and [*map(type, pair)] in ([str, float], [str, int])
        ):
            raise UserError(f"optim.multipliers has {pair!r}; accepted is (pattern, factor).")
    if not 0 <= average < 1:
        raise UserError(f"optim.average={average} must be at least 0 and below 1.")
    if name not in SCALERS:
        raise UserError(f"optim.name must be one of {', '.join(SCALERS)}, got '{name}'.")
    try:
        return schedules.learning_rate(lr, steps=steps, warmup=warmup, kind=schedule, floor=floor)
    except ValueError as error:
        raise UserError(f"optim: {error}.") from None


def make(
    trainable: Mapping,
    *,
    name: str,
    lr: float,
    steps: int,
    warmup: int = 0,
    schedule: str = "cosine",
    floor: float = 0.0,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    clip: float = 0.0,
    multipliers: Multipliers = (),
    no_decay: Sequence[str] = (),
    average: float = 0.0,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Build the optimiser for the trainable parameters.

    Args:
      trainable: the tree it will be initialised with; patterns are checked against it.
      name: "adamw", "lamb" or "sgd" (momentum 0.9), all with decoupled decay; or "adam", whose
        decay is added to the gradient, as torch's Adam does.
      lr: peak learning rate.
      steps: total steps, the horizon of the schedule.
      warmup: steps of linear warm-up.
      schedule: "cosine", "constant" or "cfcml", see schedules.learning_rate.
      floor: last learning rate of the cosine.
      weight_decay: decoupled, times the learning rate; for "adam", of the gradient.
      b1: first-moment decay.
      b2: second-moment decay.
      clip: largest global gradient norm; 0 is no clipping.
      multipliers: (pattern, factor) pairs on the learning rate; the first match counts.
      no_decay: patterns of parameters without weight decay.
      average: decay of a moving average of the parameters, which is evaluated, and looks at the
        corpus between steps where a method does; 0 keeps none.

    Returns:
      The transformation, and the learning-rate schedule for logging.

    Raises:
      UserError: for an unknown name, a pattern that matches nothing, or an average outside [0, 1).
    """
    rate = check(
        name=name,
        lr=lr,
        steps=steps,
        warmup=warmup,
        schedule=schedule,
        floor=floor,
        average=average,
    )
    paths.check_patterns(trainable, [p for p, _ in multipliers], "optim.multipliers")
    paths.check_patterns(trainable, no_decay, "optim.no_decay")
    flat = paths.flatten(trainable)
    decayed = paths.unflatten({p: not paths.matches(p, no_decay) for p in flat})
    parts = [optax.clip_by_global_norm(clip)] if clip else []
    decay = [optax.add_decayed_weights(weight_decay, mask=decayed)]
    scaled = SCALERS[name](b1, b2)
    parts += [*decay, scaled] if name == "adam" else [scaled, *decay]
    parts += [optax.scale_by_trust_ratio()] if name == "lamb" else []
    parts += [scale_by_path(multipliers)] if multipliers else []
    parts += [optax.scale_by_learning_rate(rate)]
    parts += [track_average(average)] if average else []
    return optax.chain(*parts), rate


class Averaged(NamedTuple):
    """State of `track_average`: updates seen, and the averaged parameters."""

    seen: jax.Array
    average: Any


def track_average(decay: float) -> optax.GradientTransformation:
    """Keep a moving average of the parameters; last in a chain, changes no update.

    The decay of update t is min(decay, (1 + t) / (10 + t)), so that a short run forgets its initial
    values too.
    """

    def update(updates, state, params):
        kept = jnp.minimum(decay, (1 + state.seen) / (10 + state.seen))
        after = optax.apply_updates(params, updates)
        average = jax.tree.map(
            lambda a, p: (kept * a + (1 - kept) * p).astype(p.dtype), state.average, after
        )
        return updates, Averaged(state.seen + 1, average)

    # A copy: the state is donated, and an array cannot be given away twice.
    return optax.GradientTransformation(
        lambda params: Averaged(jnp.int32(0), jax.tree.map(jnp.array, params)), update
    )


def find_average(optimizer) -> Any | None:
    """Return the averaged parameters in an optimiser state, live or as a checkpoint gives it back.

    None where the run keeps no average.
    """
    if isinstance(optimizer, Mapping) or hasattr(optimizer, "_asdict"):
        fields = optimizer if isinstance(optimizer, Mapping) else optimizer._asdict()
        if {"seen", "average"} == {*fields}:
            return fields["average"]
        optimizer = fields.values()
    elif not isinstance(optimizer, list | tuple):
        return None
    return next((a for a in map(find_average, optimizer) if a is not None), None)


def scale_by_path(multipliers: Multipliers) -> optax.GradientTransformation:
    """Multiply each update by the factor of the first pattern its path matches, else by 1."""

    def factor(path):
        return next((f for pattern, f in multipliers if paths.matches(path, [pattern])), 1.0)

    def update(updates, state, params=None):
        del params
        flat = paths.flatten(updates)
        scaled = {p: u * jnp.asarray(factor(p), u.dtype) for p, u in flat.items()}
        return paths.unflatten(scaled), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
