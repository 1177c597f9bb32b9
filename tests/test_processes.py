"""Whole trainings in one, two and four real processes (gloo), and what ends them."""

import os
import signal
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmarks.kills import Run, last_step, metrics, newest
from medvlp_jax.evaluation import results

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Return a folder whose prepared corpus and compile cache all tests share."""
    return tmp_path_factory.mktemp("home")


def log_of(run):
    return run.log.read_text()


@pytest.fixture(scope="module")
def alone(home):
    run = Run(home / "alone", 1, 50, home)
    assert run.wait() == 0, log_of(run)
    return home / "alone"


@pytest.mark.parametrize("count", [2, 4])
def test_any_number_of_processes_trains_to_the_same_losses_and_results(home, alone, count):
    folder = home / f"together-{count}"
    run = Run(folder, count, 50, home)
    assert run.wait() == 0, log_of(run)
    ours, theirs = metrics(alone), metrics(folder)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for key in a:
            if key.startswith(("loss", "zero_shot")):
                np.testing.assert_allclose(a[key], b[key], rtol=1e-5, err_msg=f"{a['step']} {key}")
    a, b = (results.read(f).numbers for f in (alone, folder))
    assert a.keys() == b.keys()
    for key, entry in a.items():
        if entry.get("value") is not None:
            np.testing.assert_allclose(entry["value"], b[key]["value"], rtol=1e-5, err_msg=key)
    files = lambda f: {p.name for p in f.iterdir() if p.name != "logs"}
    assert files(alone) == files(folder)


DEMO = (
    "--config=configs/imitate.py:demo",
    "--config.train.evaluate_every=0",
    "--config.train.log_every=1",
    "--config.evals.protocols=('retrieval',)",
    "--config.evals.controls=()",
    "--config.evals.limit=64",
)


def test_the_demo_takes_its_first_steps_alike_in_one_two_and_four_processes(home):
    """Until a rounding has grown: a network of ReLUs multiplies it with every step.

    docs/scaling.md, `benchmarks/rounding.py`: one process whose weights were moved by a rounding
    goes as far from itself as two processes go from one.
    """
    losses = {}
    for count in (1, 2, 4):
        run = Run(home / f"demo-{count}", count, 50, home, settings=DEMO)
        assert run.wait() == 0, log_of(run)
        losses[count] = [m["loss"] for m in metrics(run.folder) if "loss" in m]
        assert len(losses[count]) == 50
    for count in (2, 4):
        np.testing.assert_allclose(losses[count][:3], losses[1][:3], rtol=1e-5, err_msg=str(count))


LGDEA = ("--config=configs/lgdea.py:smoke", "--config.train.export=True")


def test_relations_are_the_same_whether_one_process_or_two_look_for_them(home):
    """Each encodes its share of the corpus and works on its share of the graphs' rows."""
    found = {}
    for count in (1, 2):
        run = Run(home / f"lgdea-{count}", count, 8, home, settings=LGDEA)
        assert run.wait() == 0, log_of(run)
        found[count] = [m for m in metrics(run.folder) if "loss/unpaired" in m]
        # Who is related to whom in the corpus stays out of what may be published.
        heads = load_file(run.folder / "export" / "projections.safetensors")
        assert {name.split("/")[0] for name in heads} == {"params"}
    assert any(m["loss/unpaired"] > 0 for m in found[1])
    for a, b in zip(found[1], found[2], strict=True):
        for term in ("loss/unpaired", "loss/relations", "loss/paired"):
            np.testing.assert_allclose(a[term], b[term], rtol=1e-3, err_msg=f"{a['step']} {term}")


def wait_for_step(run, step):
    assert run.until(lambda: last_step(run.folder) >= step), log_of(run)


def test_a_killed_rank_takes_the_run_down_within_seconds_and_names_itself(home):
    run = Run(home / "killed", 2, 10_000, home)
    wait_for_step(run, 3)
    began = time.monotonic()
    os.kill(run.ranks()[1], signal.SIGKILL)
    assert run.wait() == 137
    assert time.monotonic() - began < 60
    assert "rank 1 of 2 ended with code 137" in log_of(run)
    assert "the end of" in log_of(run)


def test_sigterm_saves_in_all_processes_and_another_number_goes_on(home, alone):
    run = Run(home / "stopped", 2, 50, home)
    wait_for_step(run, 10)
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 75, log_of(run)
    saved = newest(run.folder)
    assert saved == last_step(run.folder) > 10
    again = Run(home / "stopped", 1, 50, home)
    assert again.wait() == 0, log_of(again)
    assert f"at step {saved}" in log_of(again)
    steps = lambda folder: {m["step"]: m["loss"] for m in metrics(folder) if "loss" in m}
    ours, theirs = steps(home / "stopped"), steps(alone)
    assert ours.keys() == theirs.keys()
    np.testing.assert_allclose([ours[k] for k in ours], [theirs[k] for k in ours], rtol=1e-5)


def test_a_second_job_in_the_folder_of_a_running_one_is_refused(home):
    first = Run(home / "taken", 2, 10_000, home)
    wait_for_step(first, 1)
    second = Run(home / "taken", 1, 10_000, home, log="second")
    assert second.wait() == 2
    assert f"is in use by process {first.ranks()[0]} on" in log_of(second)
    first.process.send_signal(signal.SIGTERM)
    assert first.wait() == 75, log_of(first)
