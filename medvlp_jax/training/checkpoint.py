"""Checkpoints: asynchronous, atomic, restored onto any mesh; damage is named, never written over.

A checkpoint holds the train state, the position in the data and the resolved config. Orbax writes
to a temporary folder and renames, so a killed run leaves whole checkpoints only.
"""

import contextlib
import itertools
import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from medvlp_jax import distributed, sharding, writing
from medvlp_jax.config import StorageError, UserError
from medvlp_jax.training.step import TrainState

# From here on the devices that hold an array share the work of saving it. Orbax has them share all
# arrays: of a model's hundreds of small ones that is a copy a device each, while training waits. On
# eight CPU devices 360 arrays of up to 64 kB held it up 1.0 s, the first time 3 s, and 0.2 s so.
SHARED_FROM = 2**20  # bytes a device


class Restored(NamedTuple):
    """What a checkpoint gives back."""

    state: TrainState
    position: Mapping[str, Any]
    config: Mapping[str, Any]


class DamagedError(UserError):
    """A checkpoint is there and cannot be read."""


class Checkpointer:
    """Saves and restores the checkpoints of one run folder."""

    def __init__(self, folder: str | pathlib.Path, *, keep: int = 2, keep_every: int = 0):
        """Open `folder`; keeps the newest `keep`, and every `keep_every`-th step for good."""
        self.folder = pathlib.Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, keep_period=keep_every or None, enable_async_checkpointing=True
        )
        try:
            # Without handlers a fresh process could not read the metadata of what another wrote.
            handlers = {
                "state": _state_handler(),
                "position": ocp.JsonCheckpointHandler(),
                "config": ocp.JsonCheckpointHandler(),
            }
            self.manager = ocp.CheckpointManager(
                self.folder, options=options, item_handlers=handlers
            )
        except OSError as error:
            sentence = f"Cannot keep checkpoints in {self.folder}: {error}."
            raise writing.refusal(sentence, error) from None

    def latest(self) -> int | None:
        """Step of the newest whole checkpoint, or None."""
        return self.manager.latest_step()

    def save(self, step: int, state: TrainState, position: Mapping, config: Mapping) -> None:
        """Start writing in the background; the state may be donated as soon as this returns.

        Raises:
          StorageError: when this or the checkpoint before could not be written.
        """
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),
            position=ocp.args.JsonSave(json.loads(json.dumps(position))),
            config=ocp.args.JsonSave(json.loads(json.dumps(config))),
        )
        with self._failure(f"The checkpoint of step {step}, or the one before,"):
            # A step that exists is one this run has just restored: same bits, nothing to do.
            if step not in self.manager.all_steps():
                self.manager.save(step, args=items)

    def drop(self, step: int) -> None:
        """Remove checkpoints of `step` and later, which a run that begins before them leaves."""
        for later in [kept for kept in self.manager.all_steps() if kept >= step]:
            self.manager.delete(later)

    def wait(self) -> None:
        """Block until what was started is on disk.

        Raises:
          StorageError: when it could not be written.
        """
        with self._failure("A checkpoint"):
            self.manager.wait_until_finished()
            self.manager.check_for_errors()

    def restore(self, step: int, template: TrainState) -> Restored:
        """Read one checkpoint onto the shardings of `template`.

        Args:
          step: an existing step.
          template: shapes, dtypes and shardings of the state (`step.plan_state`), or a state, of
            which nothing else is read.

        Raises:
          DamagedError: when the checkpoint cannot be read.
          UserError: when it is of another architecture.
        """
        abstract = sharding.abstract(template, jax.tree.map(lambda x: x.sharding, template))
        self._check_architecture(step, abstract)
        items = ocp.args.Composite(
            state=_onto(abstract),
            position=ocp.args.JsonRestore(),
            config=ocp.args.JsonRestore(),
        )
        try:
            restored = self.manager.restore(step, args=items)
        except Exception as error:  # whatever Orbax and TensorStore raise: all of it means damage
            raise DamagedError(self._damaged(step, error)) from error
        return Restored(restored["state"], restored["position"], restored["config"])

    def resume(self, template: TrainState) -> Restored | None:
        """Read the newest whole checkpoint; None where there is none yet.

        A damaged one is set aside as long as an older one is left, under the name damaged-STEP, or
        damaged-STEP-2, -3, ... where a checkpoint of that step was damaged before.

        Raises:
          DamagedError: when the only checkpoint left cannot be read.
          UserError: when it is of another architecture.
        """
        while (step := self.latest()) is not None:
            restored = damage = None
            try:
                restored = self.restore(step, template)
            except DamagedError as error:
                damage = error
            # What one process cannot read, none may go on from.
            told = [t.decode() for t in distributed.gather_bytes(str(damage or "").encode())]
            if not any(told):
                return restored
            if min(self.manager.all_steps()) == step:
                raise damage or DamagedError(next(filter(None, told)))
            if distributed.is_writer():
                aside = self._set_aside(step)
                distributed.say(f"{next(filter(None, told))} It is set aside as {aside}.")
            distributed.barrier(f"damaged {step}")
            self.manager.reload()
        return None

    def _set_aside(self, step) -> str:
        """Rename a checkpoint to the first name that is free, and return that."""
        names = itertools.chain(
            [f"damaged-{step}"], (f"damaged-{step}-{count}" for count in itertools.count(2))
        )
        name = next(name for name in names if not (self.folder / name).exists())
        (self.folder / str(step)).rename(self.folder / name)
        return name

    def read(self, step: int) -> Mapping[str, Any]:
        """Read the state of one checkpoint as nested dicts on the host, whatever wrote it.

        Raises:
          DamagedError: when it cannot be read.
        """
        host = lambda _: ocp.RestoreArgs(restore_type=np.ndarray)
        try:
            each = jax.tree.map(host, self._saved(step))
            items = ocp.args.Composite(state=ocp.args.PyTreeRestore(restore_args=each))
            return self.manager.restore(step, args=items)["state"]
        except Exception as error:
            raise DamagedError(self._damaged(step, error)) from error

    def beside(self, step: int) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Read what lies beside the state of one checkpoint: the position and the config.

        Raises:
          DamagedError: when it cannot be read.
        """
        items = ocp.args.Composite(position=ocp.args.JsonRestore(), config=ocp.args.JsonRestore())
        try:
            found = self.manager.restore(step, args=items)
        except Exception as error:
            raise DamagedError(self._damaged(step, error)) from error
        return found["position"], found["config"]

    def close(self) -> None:
        """Wait for what is in flight and release the threads."""
        self.manager.close()

    def _check_architecture(self, step, abstract):
        try:
            saved = _shapes(self._saved(step))
        except Exception as error:
            raise DamagedError(self._damaged(step, error)) from error
        wanted = _shapes(abstract)
        problems = [f"no {name}" for name in sorted(wanted.keys() - saved.keys())]
        problems += [f"{name} is not in the model" for name in sorted(saved.keys() - wanted.keys())]
        problems += [
            f"{name} is {saved[name]}, the model has {wanted[name]}"
            for name in sorted(saved.keys() & wanted.keys())
            if saved[name] != wanted[name]
        ]
        if problems:
            shown = "; ".join(problems[:5]) + (
                f"; and {len(problems) - 5} more" if problems[5:] else ""
            )
            raise UserError(
                f"The checkpoint of step {step} in {self.folder} is of another architecture: "
                f"{shown}. Use another --workdir, or the config the run was started with."
            )

    def _saved(self, step):
        """Return shapes and dtypes of the state of a checkpoint, as nested dicts."""
        saved = self.manager.item_metadata(step)["state"]
        return saved.tree if hasattr(saved, "tree") else saved

    def _damaged(self, step, error):
        older = [s for s in self.manager.all_steps() if s < step]
        advice = (
            f"the last older one is step {max(older)}: move folder {step} away to go on from there"
            if older
            else "there is no older one"
        )
        return (
            f"The checkpoint of step {step} in {self.folder} cannot be read "
            f"({_first_line(error)}); {advice}."
        )

    @contextlib.contextmanager
    def _failure(self, name):
        """Turn whatever a background write raised into one sentence."""
        try:
            yield
        except Exception as error:
            steps = [int(p.name) for p in self.folder.iterdir() if p.name.isdigit()]
            kept = f"the last good one is step {max(steps)}" if steps else "there is none yet"
            raise StorageError(
                f"{name} could not be written to {self.folder} ({_first_line(error)}); {kept}. "
                "Is the disk full?"
            ) from error


def _state_handler():
    """Return what writes and reads a train state, of arrays alone."""
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SHARED_FROM)
    numpy = ocp.type_handlers.NumpyHandler()
    kinds = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays), (np.ndarray, numpy))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=kinds)


def _onto(abstract):
    """Return the arguments that restore onto the shardings of `abstract`."""
    each = ocp.checkpoint_utils.construct_restore_args(abstract)
    return ocp.args.PyTreeRestore(abstract, restore_args=each)


def _first_line(error) -> str:
    """Return what an exception says, without the pages TensorStore adds."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    """Return {path: shape}, the same names for a TrainState and for Orbax's metadata of one."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in leaves
        if hasattr(leaf, "shape")
    }
