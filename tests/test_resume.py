"""A killed run, resumed, ends bit-identical to one that was never killed."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from benchmarks import kills
from medvlp_jax.evaluation import results

ROOT = pathlib.Path(__file__).parents[1]
KILLS = 10
ARGUMENTS = (
    "--config=configs/imitate.py:smoke",
    "--config.train.steps=24",
    "--config.train.checkpoint_every=2",
    "--config.train.evaluate_every=0",
    "--config.train.export=False",
    "--config.evals.protocols=('zero_shot',)",
    "--config.evals.controls=()",
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    return {**os.environ, "MEDVLP_DATA_DIR": str(data), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}


def start(folder, environment):
    return subprocess.Popen(
        [sys.executable, "-m", "medvlp_jax.train", *ARGUMENTS, f"--workdir={folder}"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(folder, environment):
    process = start(folder, environment)
    out, _ = process.communicate(timeout=900)
    assert process.returncode == 0, out[-3000:]
    return out


def metrics(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def final_state(folder):
    """Return {path: array} of the last checkpoint, read without the code under test."""
    import orbax.checkpoint as ocp

    tree = ocp.StandardCheckpointer().restore((folder / "checkpoints" / "24" / "state").absolute())
    import jax

    return {
        jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(tree)
    }


def count_lines(folder):
    file = folder / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("processes", [[1], [1, 2]], ids=str)
def test_kills_in_every_phase_lose_nothing_and_repeat_nothing(tmp_path, processes):
    """MEDVLP_KILLS sets their number; benchmarks/kills.py stores what fifty of them did."""
    found = kills.study(processes, int(os.environ.get("MEDVLP_KILLS", "4")), 0, tmp_path)
    assert all(found["started_from_newest_checkpoint"])
    assert found["last_start"] <= found["steps"] - kills.AFTER
    for count, against in found["against_whole"].items():
        assert against["steps_once_each"]
        assert against["parameters_relative"] <= 1e-5
        if processes == [count]:
            assert against["state_bit_identical"]
            assert against["metrics_identical"]


@pytest.mark.slow
def test_ten_kills_at_random_steps_change_no_bit_of_parameters_and_metrics(tmp_path, environment):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(whole, environment)
    rng = random.Random(0)
    for _ in range(KILLS):
        process = start(killed, environment)
        # Die once one to three more steps are logged: between, during or just after a checkpoint.
        target = min(count_lines(killed) + rng.randint(1, 3), 23)
        while count_lines(killed) < target and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert "Resuming" in finish(killed, environment)
    assert metrics(whole) == metrics(killed)
    a, b = final_state(whole), final_state(killed)
    assert a.keys() == b.keys()
    for path, value in a.items():
        np.testing.assert_array_equal(value, b[path], err_msg=path)
    a, b = (results.read(f) for f in (whole, killed))
    assert a.numbers == b.numbers
    assert a.provenance["weights"] == b.provenance["weights"]
