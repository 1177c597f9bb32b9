"""The loop: next batch, step, and the metrics of the step before while the device works."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

import jax

from medvlp_jax import distributed, sharding
from medvlp_jax.training.checkpoint import Checkpointer
from medvlp_jax.training.report import Reporter
from medvlp_jax.training.step import TrainState, check_batch
from medvlp_jax.training.stopping import Signals, Stopped


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
    refresh: Callable[[TrainState], TrainState] | None = None,
    refresh_every: int = 0,
    stop: Signals | None = None,
) -> TrainState:
    """Train from `state.step` to `steps`.

    Metrics are fetched one step late, so that the host never waits for the device; a checkpoint is
    saved only once the metrics of its step are known to be finite.

    When it is asked to stop, one process saves the last step it has finished, wherever it is:
    waiting for data and evaluation are broken off. Several processes have to save the same step and
    find it together, at most two steps later.

    Args:
      state: donated to `step_fn`.
      step_fn: from step.make_train_step.
      batches: iterator of this process's rows, with get_state() for checkpoints, and set_state()
        where there is a `refresh`.
      recipe: its `inputs` are what is sent to the device.
      mesh: global batches are split over it.
      steps: last step.
      reporter: takes metrics.
      checkpointer: None saves nothing.
      checkpoint_every: steps between checkpoints; 0 is only the last step.
      config: resolved config, kept in each checkpoint.
      evaluate: (step, state) -> metrics; with several processes it raises Stopped in all or none.
      evaluate_every: steps between evaluations; 0 is never.
      refresh: state -> state, what a method reads from the whole corpus between steps.
      refresh_every: steps between two of these; 0 is never.
      stop: notices signals.

    Returns:
      The state at `steps`.

    Raises:
      Stopped: when asked to stop; the last step is saved.
    """
    stop = stop or Signals()
    # A process that broke off alone would leave the others waiting for it inside a step.
    breakable = stop.at_once if jax.process_count() == 1 else contextlib.nullcontext
    first = done = int(state.step)
    reporter.start(first, steps)
    pending = None

    def is_due(step):
        return evaluate and evaluate_every and step % evaluate_every == 0 and 0 < step < steps

    try:
        # A run may have been killed between a checkpoint and the evaluation of its step.
        if is_due(first):
            with breakable():
                reporter.write(first, evaluate(first, state))
        for step in range(first + 1, steps + 1):
            # Before a step and not after one: a run that saved and stopped in between does it too.
            if refresh and refresh_every and step > 1 and (step - 1) % refresh_every == 0:
                pending = _flush(reporter, pending)
                with breakable():
                    state = refresh(state)
                # Rows that were read ahead may rest on what the last look found.
                batches.set_state(batches.get_state())
            began = time.perf_counter()
            with breakable():
                rows = next(batches)
            waited = time.perf_counter() - began
            if step == first + 1:
                check_batch(recipe, rows)
            batch = sharding.to_global({key: rows[key] for key in recipe.inputs}, mesh)
            asked = distributed.any_process(lambda: stop.asked, mesh)
            state, metrics = step_fn(state, batch)
            stop.expendable = False
            done, position = step, batches.get_state()
            _flush(reporter, pending)
            pending = (step, metrics, waited, _batch_size(batch))
            if asked():
                raise Stopped
            save = step == steps or (checkpoint_every and step % checkpoint_every == 0)
            if save and checkpointer:
                pending = _flush(reporter, pending)
                checkpointer.save(step, state, position, config or {})
            if is_due(step):
                pending = _flush(reporter, pending)
                with breakable():
                    values = evaluate(step, state)
                reporter.write(step, values)
        _flush(reporter, pending)
    except Stopped:
        if checkpointer and done > first:
            _flush(reporter, pending)
            checkpointer.save(done, state, position, config or {})
        raise
    finally:
        # What was saved before a failure is finished, whatever the failure was.
        try:
            reporter.close()
        finally:
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
    return max(len(leaf) for leaf in jax.tree.leaves(batch))  # packed texts have fewer rows
