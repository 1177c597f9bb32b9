"""Checkpoints: what is saved comes back, on any mesh; damage and full disks end in one sentence."""

import errno
import math
import os
import resource
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from medvlp_jax import distributed, sharding
from medvlp_jax.config import UserError
from medvlp_jax.training.checkpoint import Checkpointer
from medvlp_jax.training.selection import Selection
from medvlp_jax.training.step import TrainState

POSITION = {"next_index": 7}
CONFIG = {"recipe": {"name": "imitate", "keep": (0.5, 0.25)}}


SELECTING = {
    "train": {"select": "auroc"},
    "evals": {"corpus": "", "split": "test"},
    "data": {"corpora": ("cxr_phantom",), "folds": {"count": 0}},
}


def offer(chosen, step, value, protocol="5f0c"):
    found = {"auroc": {"value": value, "hash": protocol}}
    chosen.offer(step, state_of(step), found, SELECTING)


def state_of(step=1, width=64, frozen=True):
    params = {"head": {"kernel": jnp.arange(width * 32.0).reshape(width, 32) + step}}
    fixed = {"text": {"kernel": jnp.ones(5)}} if frozen else {}
    stats = {"batch_stats": {"norm": {"mean": jnp.full(3, step * 0.1)}}}
    return TrainState(jnp.int32(step), params, fixed, stats, optax.adamw(1e-3).init(params))


def save(folder, *steps, **fields):
    checkpointer = Checkpointer(folder, **fields)
    for step in steps:
        checkpointer.save(step, state_of(step), POSITION, CONFIG)
    checkpointer.wait()
    return checkpointer


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def truncate(folder):
    """Halve every data file, as a disk that filled up or a broken copy does."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.parent.name == "d"]
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("frozen", [True, False])
def test_state_position_and_config_come_back_bit_identical(tmp_path, frozen):
    checkpointer = Checkpointer(tmp_path / "c")
    checkpointer.save(3, state_of(3, frozen=frozen), POSITION, CONFIG)
    checkpointer.wait()
    restored = checkpointer.restore(3, state_of(0, frozen=frozen))
    assert_same(restored.state, state_of(3, frozen=frozen))
    assert jax.tree.structure(restored.state) == jax.tree.structure(state_of(3, frozen=frozen))
    assert restored.position == POSITION
    assert restored.config == {"recipe": {"name": "imitate", "keep": [0.5, 0.25]}}


def test_the_devices_share_the_saving_of_large_arrays_alone(tmp_path):
    params = {"small": jnp.ones((64, 8)), "large": jnp.ones((2048, 1024))}
    state = TrainState(jnp.int32(1), params, {}, {}, {})
    state = jax.device_put(state, sharding.shardings(state, sharding.make_mesh(), []))
    checkpointer = Checkpointer(tmp_path / "c")
    checkpointer.save(1, state, POSITION, CONFIG)
    checkpointer.wait()
    saved = checkpointer.manager.item_metadata(1)["state"].tree["params"]
    assert saved["small"].storage.chunk_shape == (64, 8)
    assert saved["large"].storage.chunk_shape == (2048 // 8, 1024)  # 1 MiB each
    assert_same(checkpointer.restore(1, state).state, state)


def test_a_checkpoint_of_one_device_restores_onto_eight_and_back(tmp_path):
    checkpointer = save(tmp_path / "c", 3)
    rules = [("head/kernel", ("fsdp", None))]
    mesh = sharding.make_mesh(data=2, fsdp=4)
    template = jax.device_put(state_of(0), sharding.shardings(state_of(0), mesh, rules))
    eight = checkpointer.restore(3, template).state
    assert len(eight.params["head"]["kernel"].sharding.device_set) == 8
    assert_same(eight, state_of(3))
    checkpointer.save(4, eight, POSITION, CONFIG)
    checkpointer.wait()
    assert_same(checkpointer.restore(4, state_of(0)).state, state_of(3))


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    checkpointer = Checkpointer(tmp_path / "c")
    state = state_of(1)
    bump = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    for step in range(1, 5):
        checkpointer.save(step, state, POSITION, CONFIG)
        state = bump(state)
    checkpointer.wait()
    assert_same(
        checkpointer.restore(4, state_of(0)).state.params,
        jax.tree.map(lambda x: x + 3, state_of(1).params),
    )


def test_the_newest_are_kept_and_every_nth_for_good(tmp_path):
    checkpointer = save(tmp_path / "c", *range(1, 8), keep=2, keep_every=3)
    assert sorted(checkpointer.manager.all_steps()) == [3, 6, 7]


def test_a_selection_that_is_ahead_of_the_run_gives_way_to_a_better_state(tmp_path):
    """A run that went back to an older checkpoint may find a better state at an earlier step."""
    chosen = Selection(tmp_path, SELECTING)
    offer(chosen, 60, 0.7)
    chosen.close()
    again = Selection(tmp_path, SELECTING)
    assert again.best == 0.7
    offer(again, 50, 0.6)
    offer(again, 50, 0.8)
    again.close()
    kept = Checkpointer(tmp_path / "selected" / "checkpoints").resume(state_of())
    assert kept.position == {"value": 0.8, "step": 50, "protocol": "5f0c"}
    assert_same(kept.state, state_of(50))


def test_a_selection_by_another_protocol_begins_anew(tmp_path, capsys):
    """The same name may be of another question since: its protocol's hash says so."""
    chosen = Selection(tmp_path, SELECTING)
    offer(chosen, 60, 0.9)
    chosen.close()
    again = Selection(tmp_path, SELECTING)
    offer(again, 80, 0.6, protocol="07fe")
    assert "begins anew: its protocol was another one.\n" in capsys.readouterr().out
    offer(again, 90, 0.5, protocol="07fe")
    again.close()
    kept = Checkpointer(tmp_path / "selected" / "checkpoints").resume(state_of())
    assert kept.position == {"value": 0.6, "step": 80, "protocol": "07fe"}


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("train.select", "r10", "train.select: 'auroc' -> 'r10'"),
        ("evals.corpus", "openi", "evals.corpus: 'cxr_phantom' -> 'openi'"),
        ("data.corpora", ("openi",), "evals.corpus: 'cxr_phantom' -> 'openi'"),
        ("data.folds", {"count": 5}, "data.folds.count: 0 -> 5"),
        ("evals.split", "train", ""),  # of the numbers at the end
        ("data.size", 64, ""),  # a setting the run before did not know
    ],
)
def test_a_selection_of_something_else_begins_anew(tmp_path, capsys, setting, value, said):
    chosen = Selection(tmp_path, SELECTING)
    offer(chosen, 60, 0.7)
    chosen.close()
    section, name = setting.split(".")
    again = Selection(tmp_path, {**SELECTING, section: {**SELECTING[section], name: value}})
    assert again.best == (-math.inf if said else 0.7)
    line = f"begins anew, for step 60 was selected by something else: {said}\n"
    assert (line in capsys.readouterr().out) == bool(said)


def test_a_resumed_selection_reads_no_state(tmp_path, monkeypatch):
    chosen = Selection(tmp_path, SELECTING)
    offer(chosen, 60, 0.7)
    chosen.close()
    truncate(tmp_path / "selected" / "checkpoints" / "60" / "state")
    assert Selection(tmp_path, SELECTING).best == 0.7


def test_a_number_that_is_never_defined_selects_no_step_and_says_so(tmp_path, capsys):
    chosen = Selection(tmp_path, SELECTING)
    offer(chosen, 20, math.nan)
    chosen.offer(40, state_of(40), {}, SELECTING)
    assert chosen.checkpointer.latest() is None
    assert "train.select=auroc is not defined at step 40.\n" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"train.select=auroc was defined at no evaluation"):
        chosen.close()
    again = Selection(tmp_path, SELECTING)
    for step, value in ((20, math.nan), (40, 0.6), (60, math.nan)):
        offer(again, step, value)
    again.close()
    assert again.best == 0.6


def test_process_0_decides_for_all_whether_a_state_is_kept(tmp_path, monkeypatch):
    """Saving waits for every process, and their numbers may differ by a rounding."""
    chosen, asked = Selection(tmp_path, SELECTING), []
    monkeypatch.setattr(
        distributed, "writer_decides", lambda own: asked.append(own) or len(asked) == 2
    )
    offer(chosen, 20, 0.7)
    assert chosen.checkpointer.latest() is None
    offer(chosen, 40, -math.inf)
    assert chosen.checkpointer.latest() == 40
    assert asked == [True, False]


def test_another_architecture_is_refused_by_name_and_nothing_changes(tmp_path):
    checkpointer = save(tmp_path / "c", 3)
    with pytest.raises(
        UserError,
        match=r"another architecture: .*head/kernel is \(64, 32\), the model has \(128, 32\)",
    ):
        checkpointer.restore(3, state_of(0, width=128))
    other = state_of(0)._replace(params={"tail": {"kernel": jnp.ones(3)}})
    with pytest.raises(
        UserError, match=r"no params/tail/kernel; .*params/head/kernel is not in the model"
    ):
        checkpointer.restore(3, other)
    assert_same(checkpointer.restore(3, state_of(0)).state, state_of(3))


def test_a_truncated_checkpoint_is_named_with_the_last_good_one(tmp_path):
    checkpointer = save(tmp_path / "c", 3, 6)
    truncate(tmp_path / "c" / "6")
    with pytest.raises(
        UserError, match=r"checkpoint of step 6 in .* cannot be read .* step 3: move folder 6 away"
    ):
        checkpointer.restore(6, state_of(0))
    assert_same(checkpointer.restore(3, state_of(0)).state, state_of(3))


def test_a_truncated_only_checkpoint_says_there_is_no_older_one(tmp_path):
    checkpointer = save(tmp_path / "c", 3)
    truncate(tmp_path / "c" / "3")
    with pytest.raises(UserError, match="there is no older one"):
        checkpointer.restore(3, state_of(0))


def test_a_run_goes_on_from_the_newest_whole_checkpoint_and_keeps_the_damaged_one(tmp_path, capsys):
    folder = tmp_path / "c"
    checkpointer = save(folder, 3, 6, 9, keep=3)
    for step in (6, 9):
        truncate(folder / str(step))
    restored = checkpointer.resume(state_of(0))
    assert_same(restored.state, state_of(3))
    out = capsys.readouterr().out
    assert "step 9" in out
    assert "set aside as damaged-6" in out
    assert sorted(p.name for p in folder.iterdir()) == ["3", "damaged-6", "damaged-9"]
    checkpointer.save(6, state_of(6), POSITION, CONFIG)
    checkpointer.close()
    assert_same(Checkpointer(folder).resume(state_of(0)).state, state_of(6))


def test_damage_at_a_step_that_was_damaged_before_is_set_aside_beside_it(tmp_path, capsys):
    folder = tmp_path / "c"
    for aside in ("damaged-6", "damaged-6-2", "damaged-6-3"):
        checkpointer = save(folder, 3, 6)
        truncate(folder / "6")
        assert_same(checkpointer.resume(state_of(0)).state, state_of(3))
        checkpointer.close()
        assert f"set aside as {aside}.\n" in capsys.readouterr().out
        assert [*(folder / aside).iterdir()]


def test_a_damaged_only_checkpoint_is_not_taken_for_a_new_run(tmp_path):
    checkpointer = save(tmp_path / "c", 3)
    truncate(tmp_path / "c" / "3")
    with pytest.raises(UserError, match="there is no older one"):
        checkpointer.resume(state_of(0))
    assert (tmp_path / "c" / "3").is_dir()


def test_a_new_folder_has_nothing_to_resume(tmp_path):
    assert Checkpointer(tmp_path / "c").resume(state_of(0)) is None


def test_what_eight_devices_wrote_is_read_by_a_process_with_one(tmp_path):
    mesh = sharding.make_mesh(data=2, fsdp=4)
    rules = [("head/kernel", ("fsdp", None))]
    state = jax.device_put(state_of(3), sharding.shardings(state_of(3), mesh, rules))
    checkpointer = Checkpointer(tmp_path / "c")
    checkpointer.save(3, state, POSITION, CONFIG)
    checkpointer.close()
    program = f"""
        import jax, numpy as np
        from medvlp_jax.training.checkpoint import Checkpointer
        kernel = Checkpointer({str(tmp_path / "c")!r}).read(3)["params"]["head"]["kernel"]
        assert len(jax.devices()) == 1
        np.testing.assert_array_equal(kernel, np.arange(64 * 32.0).reshape(64, 32) + 3)
    """
    environment = {**os.environ, "XLA_FLAGS": ""}
    program = textwrap.dedent(program)
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


@pytest.mark.parametrize(("number", "code"), [(errno.EDQUOT, 74), (errno.EACCES, 2)])
def test_a_file_system_that_may_come_back_is_no_bad_input(tmp_path, monkeypatch, number, code):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(ocp, "CheckpointManager", refuse)
    with pytest.raises(UserError, match="Cannot keep checkpoints in") as refused:
        Checkpointer(tmp_path / "c")
    assert refused.value.code == code


def test_a_half_written_folder_is_not_taken_for_a_checkpoint(tmp_path):
    save(tmp_path / "c", 3).close()
    (tmp_path / "c" / "9.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    assert Checkpointer(tmp_path / "c").latest() == 3


def test_a_full_disk_is_one_sentence_and_the_last_good_checkpoint_stays(tmp_path):
    """A limit on the size of written files stands in for the full disk: write(2) fails alike."""
    program = f"""
        import resource, signal, sys
        sys.path.insert(0, {str(__file__.rsplit("/", 1)[0])!r})
        import jax.numpy as jnp
        from test_checkpoint import CONFIG, POSITION, state_of
        from medvlp_jax import cli
        from medvlp_jax.training.checkpoint import Checkpointer
        checkpointer = Checkpointer({str(tmp_path / "c")!r})
        checkpointer.save(1, state_of(1), POSITION, CONFIG)
        checkpointer.wait()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (256, 256))
        def main(_):
            checkpointer.save(2, state_of(2), POSITION, CONFIG)
            checkpointer.wait()
        sys.exit(cli.run(main))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 74, done.stderr[-2000:]  # not 2, which no launcher starts again
    assert "could not be written" in done.stderr
    assert "the last good one is step 1. Is the disk full?" in done.stderr
    checkpointer = Checkpointer(tmp_path / "c")
    assert checkpointer.latest() == 1
    assert_same(checkpointer.restore(1, state_of(0)).state, state_of(1))
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
