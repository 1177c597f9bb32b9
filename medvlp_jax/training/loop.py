"""The loop: next batch, step, and the metrics of the step before while the device works."""

import time
from collections.abc import Callable, Iterator, Mapping

import jax

from medvlp_jax import sharding
from medvlp_jax.training.checkpoint import Checkpointer
from medvlp_jax.training.report import Reporter
from medvlp_jax.training.step import TrainState, check_batch


def fit(
    state: TrainState,
    step_fn: Callable,
    batches: Iterator,
    *,
    recipe,
    mesh,
    steps: int,
    reporter: Reporter,
    checkpointer: Checkpointer | None = None,
    checkpoint_every: int = 0,
    config: Mapping | None = None,
    evaluate: Callable[[int, TrainState], Mapping[str, float]] | None = None,
    evaluate_every: int = 0,
) -> TrainState:
    """Train from `state.step` to `steps`.

    Metrics are fetched one step late, so that the host never waits for the device; a checkpoint is
    saved only once the metrics of its step are known to be finite.

    Args:
      state: donated to `step_fn`.
      step_fn: from step.make_train_step.
      batches: iterator of this process's rows, with get_state() for checkpoints.
      recipe: its `inputs` are what is sent to the device.
      mesh: global batches are split over it.
      steps: last step.
      reporter: takes metrics.
      checkpointer: None saves nothing.
      checkpoint_every: steps between checkpoints; 0 is only the last step.
      config: resolved config, kept in each checkpoint.
      evaluate: (step, state) -> metrics.
      evaluate_every: steps between evaluations; 0 is never.

    Returns:
      The state at `steps`.
    """
    first = int(state.step)
    reporter.start(first, steps)
    pending = None
    try:
        for step in range(first + 1, steps + 1):
            began = time.perf_counter()
            rows = next(batches)
            waited = time.perf_counter() - began
            if step == first + 1:
                check_batch(recipe, rows)
            batch = sharding.to_global({key: rows[key] for key in recipe.inputs}, mesh)
            state, metrics = step_fn(state, batch)
            _flush(reporter, pending)
            pending = (step, metrics, waited, _batch_size(batch))
            save = step == steps or (checkpoint_every and step % checkpoint_every == 0)
            if save and checkpointer:
                pending = _flush(reporter, pending)
                checkpointer.save(step, state, batches.get_state(), config or {})
            if evaluate and evaluate_every and step % evaluate_every == 0 and step < steps:
                pending = _flush(reporter, pending)
                reporter.write(step, evaluate(step, state))
        _flush(reporter, pending)
    finally:
        # What was saved before a failure is finished, whatever the failure was.
        reporter.close()
        if checkpointer:
            checkpointer.wait()
    return state


def _flush(reporter, pending):
    """Fetch and report the metrics of the step before; this is where the host waits."""
    if pending is not None:
        step, metrics, waited, size = pending
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        reporter.step(step, values, pairs=size, waited=waited)


def _batch_size(batch):
    return jax.tree.leaves(batch)[0].shape[0]
