"""The loop and the reporter: order, lateness by one step, and stopping at what is not finite."""

import json
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medvlp_jax import sharding
from medvlp_jax.training import loop
from medvlp_jax.training.checkpoint import Checkpointer
from medvlp_jax.training.report import NotFiniteError, Reporter
from medvlp_jax.training.step import TrainState


class Recipe:
    """Reads one number a row."""

    inputs = ("x",)


class Batches:
    """Batch k holds the number k in every row."""

    def __init__(self):
        self.next = 0

    def __next__(self):
        self.next += 1
        return {"x": np.full(8, self.next, np.float32)}

    def get_state(self):
        return {"next_index": self.next}

    def set_state(self, state):
        self.next = state["next_index"]


def state_of(step=0):
    params = {"w": jnp.float32(1)}
    return TrainState(jnp.int32(step), params, {}, {}, optax.sgd(0.1).init(params))


def step_fn(bad_step=0):
    @jax.jit
    def step(state, batch):
        loss = jnp.where(state.step + 1 == bad_step, jnp.nan, batch["x"].mean())
        params = {"w": state.params["w"] + loss}
        return state._replace(step=state.step + 1, params=params), {"loss": loss}

    return step


def fit(
    folder, steps, *, state=None, batches=None, bad_step=0, every=1, checkpointer=None, **fields
):
    return loop.fit(
        state if state is not None else state_of(),
        step_fn(bad_step),
        batches or Batches(),
        recipe=Recipe(),
        mesh=sharding.make_mesh(),
        steps=steps,
        reporter=Reporter(folder, every=every),
        checkpointer=checkpointer,
        **fields,
    )


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_step_is_reported_once_with_its_own_metrics(tmp_path):
    state = fit(tmp_path, 5)
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [
        (k, k) for k in range(1, 6)
    ]
    assert state.params["w"] == 1 + sum(range(1, 6))


def test_log_every_thins_the_file_but_keeps_the_last_step(tmp_path):
    fit(tmp_path, 7, every=3)
    assert [line["step"] for line in lines(tmp_path)] == [3, 6, 7]


def test_a_loss_that_is_not_finite_stops_and_names_the_step_and_saves_nothing_after(tmp_path):
    checkpointer = Checkpointer(tmp_path / "c", keep=9)
    with pytest.raises(NotFiniteError, match="Step 4 gave loss=nan"):
        fit(tmp_path, 9, bad_step=4, checkpointer=checkpointer, checkpoint_every=2)
    assert checkpointer.latest() == 2
    restored = checkpointer.restore(2, state_of())
    assert restored.state.params["w"] == 1 + 1 + 2
    assert restored.position == {"next_index": 2}


def test_a_bad_step_without_logging_is_found_too(tmp_path):
    with pytest.raises(NotFiniteError, match="Step 4"):
        fit(tmp_path, 9, bad_step=4, every=100)


def test_resuming_drops_the_lines_of_lost_steps_and_a_half_written_one(tmp_path):
    fit(tmp_path, 6)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    batches = Batches()
    batches.next = 4
    fit(tmp_path, 6, state=state_of(4), batches=batches)
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [
        (k, k) for k in range(1, 7)
    ]


def test_a_tracker_goes_on_with_one_run_also_after_a_disk_that_was_full(
    tmp_path, monkeypatch, full_disk
):
    started = []
    tracker = types.SimpleNamespace(init=lambda **how: started.append(how["id"]))
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    full_disk("wandb_id")
    with pytest.raises(OSError, match="No space left"):
        Reporter(tmp_path, every=1, wandb={})
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    for _ in range(2):
        Reporter(tmp_path, every=1, wandb={})
    assert re.fullmatch("[0-9a-f]{8}", started[0])
    assert started[0] == started[1]


def test_evaluations_stand_beside_their_step(tmp_path):
    fit(
        tmp_path,
        6,
        evaluate=lambda step, state: {"eval/w": float(state.params["w"])},
        evaluate_every=2,
    )
    found = {line["step"]: line["eval/w"] for line in lines(tmp_path) if "eval/w" in line}
    assert found == {2: 4.0, 4: 11.0}  # the end of a run is evaluated in full, elsewhere


def test_a_run_killed_between_a_checkpoint_and_the_evaluation_of_its_step_makes_up_for_it(tmp_path):
    value = lambda step, state: {"eval/w": float(state.params["w"])}
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    for folder in (alone, killed):
        folder.mkdir()
    fit(alone, 6, evaluate=value, evaluate_every=2)

    def dies_in_its_second(step, state):
        if step == 4:
            raise KeyboardInterrupt
        return value(step, state)

    checkpointer = Checkpointer(killed / "c", keep=9)
    with pytest.raises(KeyboardInterrupt):
        fit(
            killed,
            6,
            checkpointer=checkpointer,
            checkpoint_every=2,
            evaluate=dies_in_its_second,
            evaluate_every=2,
        )
    for _ in range(2):  # from a run without the evaluation of step 4, then from one that has it
        saved, batches = checkpointer.restore(4, state_of()), Batches()
        batches.set_state(saved.position)
        state = jax.device_get(saved.state)
        fit(killed, 6, state=state, batches=batches, evaluate=value, evaluate_every=2)
        without_times = [
            [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines(folder)]
            for folder in (alone, killed)
        ]
        assert without_times[0] == without_times[1]


def test_the_corpus_is_looked_at_between_steps_and_again_by_a_run_that_stopped_there(tmp_path):
    seen = []
    for name in "ab":
        (tmp_path / name).mkdir()

    def refresh(state):
        seen.append(int(state.step))
        return state._replace(params={"w": 10 * state.params["w"]})

    whole = fit(tmp_path / "a", 9, refresh=refresh, refresh_every=4)
    assert seen == [4, 8]
    batches, checkpointer = Batches(), Checkpointer(tmp_path / "c", keep=9)
    fit(tmp_path / "b", 4, batches=batches, checkpointer=checkpointer, refresh=refresh)
    assert seen == [4, 8]  # every=0: never
    restored = checkpointer.restore(4, state_of())
    rest = fit(
        tmp_path / "b",
        9,
        state=jax.device_get(restored.state),
        batches=batches,
        refresh=refresh,
        refresh_every=4,
    )
    assert seen == [4, 8, 4, 8]
    assert rest.params["w"] == whole.params["w"]


def test_what_was_read_ahead_of_a_refresh_is_read_again(tmp_path):
    class Ahead(Batches):
        told = 0

        def set_state(self, state):
            super().set_state(state)
            self.told += 1
            assert self.next == 4 * self.told

    batches = Ahead()
    fit(tmp_path, 9, batches=batches, refresh=lambda state: state, refresh_every=4)
    assert batches.told == 2


def test_an_alarm_sounds_once_each_time_a_term_rises_above_its_bound(tmp_path, capsys):
    reporter = Reporter(tmp_path, every=10, alarms={"usage": (0.5, "prototypes collapse")})
    reporter.start(0, 6)
    for step, value in enumerate((0.2, 0.6, 0.7, 0.4, 0.9, 0.1), start=1):
        reporter.step(step, {"loss": 1.0, "loss/usage": value}, pairs=1, waited=0)
    reporter.close()
    said = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    assert [line[line.index("WARNING") :] for line in said] == [
        "WARNING, step 2: prototypes collapse (usage 0.60).",
        "WARNING, step 5: prototypes collapse (usage 0.90).",
    ]
