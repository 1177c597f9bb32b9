"""Numbers that change over training: loss weights and the learning rate."""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

Knots = Sequence[tuple[float, float]]


def at(spec: float | Knots, step: jax.Array | int) -> jax.Array:
    """Return the value at `step`: a number, or linear between (step, value) knots.

    Before the first knot and after the last the value is constant. A jump is two knots one step
    apart.
    """
    if isinstance(spec, int | float):
        return jnp.float32(spec)
    steps, values = zip(*spec, strict=True)
    return jnp.interp(jnp.float32(step), jnp.float32(steps), jnp.float32(values))


def check(name: str, spec: float | Knots) -> None:
    """Refuse a spec that `at` cannot read.

    Raises:
      ValueError: for a spec that is neither a finite number nor knots with increasing steps.
    """
    try:
        knots = [(0, spec)] if _is_number(spec) else [(step, value) for step, value in spec]
    except (TypeError, ValueError):
        knots = []
    steps = [step for step, _ in knots]
    numbers = all(_is_number(x) for knot in knots for x in knot)
    if not knots or not numbers or any(b <= a for a, b in itertools.pairwise(steps)):
        raise ValueError(
            f"{name} must be a finite number or ((step, value), ...) knots with increasing steps, "
            f"got {spec!r}"
        )


def _is_number(x) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def imitate_beta(steps_per_epoch: int) -> tuple[tuple[int, float], ...]:
    """Weight beta of IMITATE's Findings terms (released code): 1 to epoch 30, then down to 0.3.

    beta(e) = 1.3 - (e - 30) / 20 for 30 < e < 50; the jump from 1 to 1.25 at epoch 31 is theirs.
    Between epochs the weight is interpolated instead of held.
    """
    n = steps_per_epoch
    return ((0, 1.0), (31 * n - 1, 1.0), (31 * n, 1.25), (49 * n, 0.35), (50 * n, 0.3))


CFCML_EPOCHS = 50


def cfcml_share(epoch: jax.Array | int) -> jax.Array:
    """Share of CFCML's peak learning rate in an epoch, counted from 1 (released code).

    0 in the first, 0.2, 0.4, 0.6, 0.8 in the next four, 1 in epochs 6 to 11, then 0.8 times as much
    every five epochs, from epoch 12 on.
    """
    epoch = jnp.int32(epoch)
    falling = jnp.float32(0.8) ** jnp.maximum(0, (epoch - 7) // 5)
    return jnp.where(epoch <= 5, (epoch - 1) / 5, falling)


def learning_rate(
    peak: float, *, steps: int, warmup: int, kind: str, floor: float = 0.0
) -> optax.Schedule:
    """Linear warm-up to `peak`, then "cosine" to `floor`, "constant", or "cfcml".

    Args:
      peak: highest rate.
      steps: total optimisation steps, the warm-up included.
      warmup: steps from 0 to `peak`.
      kind: "cosine", "constant", or "cfcml": the published 50 epochs, a fiftieth of `steps` each,
        whose first five are the warm-up.
      floor: last value of the cosine.

    Raises:
      ValueError: for another kind, or a warm-up that is not shorter than the training.
    """
    if not 0 <= warmup < max(steps, 1):
        raise ValueError(f"warmup must be at least 0 and below steps={steps}, got {warmup}")
    if kind == "cosine":
        after = optax.cosine_decay_schedule(
            peak, steps - warmup, alpha=floor / peak if peak else 0.0
        )
    elif kind == "constant":
        after = optax.constant_schedule(peak)
    elif kind == "cfcml":
        if warmup:
            raise ValueError(
                f"schedule 'cfcml' has a warm-up of its own: warmup is 0, got {warmup}"
            )
        epoch = lambda step: 1 + step * CFCML_EPOCHS // max(steps, 1)
        after = lambda step: peak * cfcml_share(epoch(step))
    else:
        raise ValueError(f"schedule must be 'cosine', 'constant' or 'cfcml', got {kind!r}")
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])
