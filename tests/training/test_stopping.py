"""Signals: remembered, raised where the code allows it, and in every phase of the loop saved."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medvlp_jax import sharding
from medvlp_jax.training import loop, stopping
from medvlp_jax.training.checkpoint import Checkpointer
from medvlp_jax.training.report import Reporter
from medvlp_jax.training.step import TrainState
from medvlp_jax.training.stopping import Signals, Stopped


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


class Recipe:
    inputs = ("x",)


class Batches:
    """Batch k holds k; calls `at[k]` while the loop waits for it."""

    def __init__(self, at=None):
        self.count, self.at = 0, at or {}

    def __next__(self):
        self.at.get(self.count + 1, lambda: None)()
        self.count += 1
        return {"x": np.full(8, self.count, np.float32)}

    def get_state(self):
        return {"next_index": self.count}


def state_of():
    params = {"w": jnp.float32(0)}
    return TrainState(jnp.int32(0), params, {}, {}, optax.sgd(0.1).init(params))


def fit(folder, batches, stop, *, step_fn=None, **fields):
    def add(state, batch):
        params = {"w": state.params["w"] + batch["x"].mean()}
        return state._replace(step=state.step + 1, params=params), {"loss": params["w"]}

    checkpointer = Checkpointer(folder / "checkpoints", keep=9)
    fields = {"steps": 9, "checkpoint_every": 100, **fields}
    try:
        loop.fit(
            state_of(),
            step_fn or add,
            batches,
            recipe=Recipe(),
            mesh=sharding.make_mesh(),
            reporter=Reporter(folder, every=1),
            checkpointer=checkpointer,
            stop=stop,
            **fields,
        )
    finally:
        checkpointer.close()


def check_saved(folder, step):
    saved = Checkpointer(folder / "checkpoints").resume(state_of())
    assert int(saved.state.step) == step
    assert saved.state.params["w"] == sum(range(step + 1))
    assert saved.position == {"next_index": step}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_a_step_saves_that_step(tmp_path, number):
    def add(state, batch):
        if int(state.step) + 1 == 4:
            send(number)
        params = {"w": state.params["w"] + batch["x"].mean()}
        return state._replace(step=state.step + 1, params=params), {"loss": params["w"]}

    with Signals() as stop, pytest.raises(Stopped):
        fit(tmp_path, Batches(), stop, step_fn=add)
    check_saved(tmp_path, 4)


def test_a_signal_while_waiting_for_data_breaks_the_wait_off_and_saves_the_step_before(tmp_path):
    def hang():
        send()
        time.sleep(600)

    with Signals() as stop, pytest.raises(Stopped):
        fit(tmp_path, Batches({5: hang}), stop)
    check_saved(tmp_path, 4)


def test_a_signal_during_evaluation_breaks_it_off_and_saves(tmp_path):
    def evaluate(step, state):
        send()
        time.sleep(600)

    with Signals() as stop, pytest.raises(Stopped):
        fit(tmp_path, Batches(), stop, evaluate=evaluate, evaluate_every=3)
    check_saved(tmp_path, 3)


def test_a_signal_during_a_refresh_breaks_it_off_and_saves_the_step_before(tmp_path):
    def refresh(state):
        send()
        time.sleep(600)

    with Signals() as stop, pytest.raises(Stopped):
        fit(tmp_path, Batches(), stop, refresh=refresh, refresh_every=3)
    check_saved(tmp_path, 3)


def test_a_signal_while_a_checkpoint_is_read_is_not_taken_for_damage(tmp_path, monkeypatch):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, state_of(), {}, {})
    checkpointer.wait()
    monkeypatch.setattr(checkpointer.manager, "restore", lambda *_, **__: send())
    with Signals() as stop, pytest.raises(Stopped), stop.at_once():
        checkpointer.resume(state_of())
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["1"]


def test_a_signal_while_a_checkpoint_is_written_is_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    checkpointer = Checkpointer(tmp_path)
    monkeypatch.setattr(checkpointer.manager, "save", lambda *_, **__: send())
    with Signals() as stop, pytest.raises(Stopped), stop.at_once():
        checkpointer.save(1, state_of(), {}, {})


def test_a_signal_while_a_checkpoint_is_written_leaves_it_whole(tmp_path):
    class Slow(Batches):
        def get_state(self):
            if self.count == 5:  # saving of step 4 was started and is still in the background
                send()
            return super().get_state()

    with Signals() as stop, pytest.raises(Stopped):
        fit(tmp_path, Slow(), stop, checkpoint_every=4)
    check_saved(tmp_path, 5)


def test_stopped_before_the_first_step_there_is_nothing_to_save(tmp_path):
    with Signals() as stop, pytest.raises(Stopped):
        fit(tmp_path, Batches({1: send}), stop)
    assert Checkpointer(tmp_path / "checkpoints").latest() is None


def test_the_second_ctrl_c_does_not_wait():
    with Signals():
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_work_that_may_be_lost_is_not_begun_once_asked():
    with Signals() as stop:
        send()
        assert stop.asked
        with pytest.raises(Stopped), stop.at_once():
            raise AssertionError("begun")


def test_handlers_are_given_back():
    before = [signal.getsignal(n) for n in stopping.ASKING]
    with Signals():
        assert [signal.getsignal(n) for n in stopping.ASKING] != before
    assert [signal.getsignal(n) for n in stopping.ASKING] == before


def test_a_busy_main_thread_with_nothing_to_save_does_not_keep_the_process():
    program = """
        import threading
        from medvlp_jax.training.stopping import Signals
        class Deaf(Signals):  # stands for a main thread inside the compiler
            def _notice(self, number, frame):
                pass
        with Deaf():
            print("ready", flush=True)
            threading.Event().wait(600)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == stopping.EXIT_CODE
