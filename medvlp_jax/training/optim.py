"""The optimiser of a run: one optax chain, learning rates and weight decay by parameter path."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import optax

from medvlp_jax import schedules
from medvlp_jax.config import UserError
from medvlp_jax.training import params as paths

Multipliers = Sequence[tuple[str, float]]


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

    Returns:
      The transformation, and the learning-rate schedule for logging.

    Raises:
      UserError: for an unknown name, or a pattern that matches nothing.
    """
    scalers = {
        "adam": lambda: optax.scale_by_adam(b1, b2),
        "adamw": lambda: optax.scale_by_adam(b1, b2),
        "lamb": lambda: optax.scale_by_adam(b1, b2),
        "sgd": lambda: optax.trace(0.9),
    }
    if name not in scalers:
        raise UserError(f"optim.name must be one of {', '.join(scalers)}, got '{name}'.")
    paths.check_patterns(trainable, [p for p, _ in multipliers], "optim.multipliers")
    paths.check_patterns(trainable, no_decay, "optim.no_decay")
    try:
        rate = schedules.learning_rate(lr, steps=steps, warmup=warmup, kind=schedule, floor=floor)
    except ValueError as error:
        raise UserError(f"optim: {error}.") from None
    flat = paths.flatten(trainable)
    decayed = paths.unflatten({p: not paths.matches(p, no_decay) for p in flat})
    parts = [optax.clip_by_global_norm(clip)] if clip else []
    decay = [optax.add_decayed_weights(weight_decay, mask=decayed)]
    parts += [*decay, scalers[name]()] if name == "adam" else [scalers[name](), *decay]
    parts += [optax.scale_by_trust_ratio()] if name == "lamb" else []
    parts += [scale_by_path(multipliers)] if multipliers else []
    return optax.chain(*parts, optax.scale_by_learning_rate(rate)), rate


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
