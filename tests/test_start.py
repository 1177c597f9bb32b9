"""Where the state of a run lies from its first moment on, and what a start leaves and refuses."""

import json

import jax
import numpy as np
import pytest
import tiny_config

from medvlp_jax import sharding, train
from medvlp_jax.config import UserError
from medvlp_jax.evaluation import provenance
from medvlp_jax.training import params as paths
from medvlp_jax.training import starts
from medvlp_jax.training import step as training
from medvlp_jax.training.checkpoint import Checkpointer
from medvlp_jax.training.stopping import Signals

FLOOR = 256  # elements from which on even these small arrays are split over fsdp


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = tiny_config.get_config().to_dict()
    config["data"]["data_dir"] = str(tmp_path_factory.mktemp("data"))
    config["init"]["text"] = ""
    config["mesh"]["fsdp"] = 8
    config["optim"]["average"] = 0.9
    return config


@pytest.fixture(scope="module")
def started(config, tmp_path_factory):
    """A run at its start, saved there as if it had been stopped; and the largest whole arrays."""
    patch = pytest.MonkeyPatch()
    patch.setattr(sharding, "FSDP_FLOOR", FLOOR)
    folder = tmp_path_factory.mktemp("runs") / "run"
    before, largest = {id(array) for array in jax.live_arrays()}, []

    def look(*_):
        whole = [a for a in jax.live_arrays() if id(a) not in before and a.is_fully_replicated]
        largest.append(max((array.size for array in whole), default=0))

    patch.setattr(Checkpointer, "resume", look)  # there is nothing to resume
    job = train._prepare(config, folder, Signals())
    patch.undo()
    look()
    patch.setattr(sharding, "FSDP_FLOOR", FLOOR)
    job.checkpointer.save(1, job.state, job.batches.get_state(), config)
    job.checkpointer.wait()
    yield job, folder, largest
    patch.undo()


def test_at_the_start_every_device_holds_its_parts_alone(started):
    """Parameters, both moments and the average, never whole on one device."""
    job, _, largest = started
    adam = next(s for s in job.state.optimizer if hasattr(s, "mu"))
    average = job.state.optimizer[-1].average
    for tree in (adam.mu, adam.nu, average):
        for path, leaf in paths.flatten(tree).items():
            parameter = paths.flatten(job.state.params)[path]
            assert leaf.sharding.is_equivalent_to(parameter.sharding, leaf.ndim), path
            if leaf.size >= FLOOR:
                assert leaf.addressable_shards[0].data.size == leaf.size // 8, path
    assert max(largest) < FLOOR
    # Each is given to the step, and none can be given twice.
    leaves = jax.tree.leaves((job.state.params, average))
    pointers = {leaf.addressable_shards[0].data.unsafe_buffer_pointer() for leaf in leaves}
    assert len(pointers) == len(leaves)


def test_the_state_at_the_start_is_the_one_made_whole(started):
    job, _, _ = started
    tx = job.state.optimizer
    variables = {"params": paths.merge(job.state.params, job.state.frozen)}
    jax.tree.map(np.testing.assert_array_equal, variables["params"], job.untrained["params"])
    adam = next(s for s in tx if hasattr(s, "mu"))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((adam.mu, adam.nu)))
    jax.tree.map(np.testing.assert_array_equal, tx[-1].average, job.state.params)


def test_a_resumed_run_makes_no_state_beside_the_one_it_reads(config, started, monkeypatch):
    job, folder, _ = started
    resume, before, beside = Checkpointer.resume, {id(a) for a in jax.live_arrays()}, []

    def look(checkpointer, planned):
        beside.extend(a.size for a in jax.live_arrays() if id(a) not in before)
        return resume(checkpointer, planned)

    monkeypatch.setattr(Checkpointer, "resume", look)
    monkeypatch.setattr(training, "begin_state", lambda *_: pytest.fail("made one"))
    again = train._prepare(config, folder, Signals())
    assert max(beside, default=0) < FLOOR
    for a, b in zip(jax.tree.leaves(job.state), jax.tree.leaves(again.state), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_a_start_writes_down_its_code_and_a_later_one_says_what_has_changed(
    tmp_path, monkeypatch, capsys
):
    starts.record(tmp_path, 0)
    starts.record(tmp_path, 40)
    assert capsys.readouterr().out == ""
    known = provenance.code()
    monkeypatch.setattr(provenance, "code", lambda: {**known, "version": "9 (abc)"})
    starts.record(tmp_path, 60)
    line = f"Code changed since step 60: version: {known['version']!r} -> '9 (abc)'\n"
    assert capsys.readouterr().out == line
    written = [json.loads(line) for line in (tmp_path / starts.FILE).read_text().splitlines()]
    assert [entry["step"] for entry in written] == [0, 40, 60]
    assert all(entry["jax"] == jax.__version__ and "commit" in entry for entry in written)
    assert [entry["version"] for entry in written] == [known["version"]] * 2 + ["9 (abc)"]
    (tmp_path / starts.FILE).write_text("broken\n")  # never a reason to refuse
    starts.record(tmp_path, 80)
    assert capsys.readouterr().out == ""


def test_every_start_of_a_run_is_written_down(started):
    lines = (started[1] / starts.FILE).read_text().splitlines()
    assert json.loads(lines[0])["step"] == 0


def test_a_mistyped_selection_is_refused_before_anything_is_written(config, tmp_path):
    train_settings = {**config["train"], "select": "zero_shot/finding/macro_auroq"}
    mistyped = {**config, "train": train_settings, "optim": {**config["optim"], "average": 0.0}}
    with pytest.raises(UserError, match="Did you mean zero_shot/finding/macro_auroc"):
        train.run(mistyped, tmp_path / "run")
    assert not (tmp_path / "run").exists()
