"""Several processes as one run: how they meet, what they have to agree on, and who writes.

A launcher describes the group in the environment; with one process every function here is the
identity. Process 0 writes the run folder, which all processes have to see.

  JAX_COORDINATOR_ADDRESS   host:port of process 0
  JAX_NUM_PROCESSES         P
  JAX_PROCESS_ID            p, 0 to P - 1
  JAX_LOCAL_DEVICE_IDS      the GPUs of this process; unset takes all of its host
  MEDVLP_CLUSTER=auto       instead of these: let JAX ask the machine (Cloud TPU)
"""

import contextlib
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import medvlp_jax
from medvlp_jax.config import UserError
from medvlp_jax.sharding import Part

GROUP = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def initialize() -> None:
    """Join the other processes, if the environment says there are any; before any array exists.

    Raises:
      UserError: for a description of the group that is incomplete or contradicts itself.
    """
    # JAX's own notice of SIGTERM would take the signal from training.stopping.
    jax.config.update("jax_enable_preemption_service", False)
    if os.environ.get("MEDVLP_CLUSTER"):
        if os.environ["MEDVLP_CLUSTER"] != "auto":
            raise UserError(f"MEDVLP_CLUSTER must be auto, got '{os.environ['MEDVLP_CLUSTER']}'.")
        return jax.distributed.initialize()
    values = {name: os.environ.get(name, "") for name in GROUP}
    if not any(values.values()):
        return None
    if missing := [name for name, value in values.items() if not value]:
        given = ", ".join(f"{k}={v}" for k, v in values.items() if v)
        raise UserError(f"{', '.join(missing)} must be set as well as {given}.")
    address, count, index = values.values()
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
        raise UserError(
            f"JAX_PROCESS_ID={index} is no process of JAX_NUM_PROCESSES={count}; accepted are "
            "whole numbers from 0 to one less than that."
        )
    # JAX would listen on every interface of the host, to processes of this host alone.
    near = address.rpartition(":")[0] in LOOPBACK
    # Nothing is guessed: a scheduler's own variables may describe another step of the job.
    return jax.distributed.initialize(
        address,
        int(count),
        int(index),
        cluster_detection_method="deactivate",
        coordinator_bind_address=address if near else None,
    )


def is_writer() -> bool:
    """Say whether this process writes the run folder."""
    return jax.process_index() == 0


def say(line: str) -> None:
    """Print a line once, not once a process."""
    if is_writer():
        print(line, flush=True)


def barrier(name: str) -> None:
    """Wait until every process has come to the barrier of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def writer_first(name: str) -> Iterator[None]:
    """Let process 0 through the block alone, then the others, which find what it wrote."""
    if not is_writer():
        barrier(name)
    yield
    if is_writer():
        barrier(name)


def gather_bytes(own: bytes) -> list[bytes]:
    """Return what every process gave, in the order of the processes."""
    if jax.process_count() == 1:
        return [own]
    sizes = multihost_utils.process_allgather(np.int32(len(own)))
    padded = np.zeros(max(sizes.max(), 1), np.uint8)
    padded[: len(own)] = np.frombuffer(own, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]


def gather(rows: np.ndarray) -> np.ndarray:
    """Return [P, ...] of every process's array of one shape; strings may differ in width."""
    if jax.process_count() == 1:
        return rows[None]
    if rows.dtype.kind == "U":
        width = max(int(size) for size in gather_bytes(str(rows.dtype.itemsize // 4).encode()))
        rows = rows.astype(f"<U{max(width, 1)}")
    # As bytes: JAX would round what is wider than 32 bits.
    everyone = gather_bytes(np.ascontiguousarray(rows).tobytes())
    return np.stack([np.frombuffer(b, rows.dtype).reshape(rows.shape) for b in everyone])


def gather_parts(rows: np.ndarray, part: Part) -> np.ndarray:
    """Return every part once, [part.count, ...]; processes with the same part hold the same."""
    holders = gather(np.asarray(part.index))
    first = {int(index): process for process, index in reversed([*enumerate(holders)])}
    return gather(rows)[[first[index] for index in range(part.count)]]


def writer_decides(answer: bool) -> bool:
    """Return process 0's answer in every process."""
    return gather_bytes(b"1" if answer else b"")[0] == b"1"


def code_version() -> str:
    """Return the version of this package with a hash of its source files."""
    root = pathlib.Path(medvlp_jax.__path__[0])
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return f"{medvlp_jax.__version__} ({digest.hexdigest()[:12]})"


def check_same(facts: Mapping[str, str]) -> None:
    """Refuse a group whose processes were not started alike.

    Args:
      facts: what has to be equal, by name.

    Raises:
      UserError: in every process alike, naming the first process that differs from process 0, the
        fact, and both values.
    """
    join = lambda pairs: "\x1e".join(f"{name}\x1f{value}" for name, value in pairs)
    everyone = gather_bytes(join(facts.items()).encode())
    first, *others = (
        dict(pair.split("\x1f", 1) for pair in told.decode().split("\x1e")) for told in everyone
    )
    for index, facts_of in enumerate(others, start=1):
        for name in {**first, **facts_of}:
            here, there = first.get(name, "(absent)"), facts_of.get(name, "(absent)")
            if here != there:
                raise UserError(
                    f"Process {index} was started with {name} = {there}, process 0 with {here}; "
                    "all processes of a run need the same code and the same command."
                )


def any_process(flag: Callable[[], bool], mesh: Mesh) -> Callable[[], bool]:
    """Ask all processes a question without waiting for the answer.

    The question travels on the devices in the order of dispatch, so that what is asked before a
    step is answered as soon as the step before has finished.

    Args:
      flag: this process's answer.
      mesh: over the devices of all processes.

    Returns:
      A function that waits for the answers and says whether any of them is yes. With one process
      it is `flag`.
    """
    if jax.process_count() == 1:
        return flag
    sharding = NamedSharding(mesh, P(mesh.axis_names))
    own = np.full(len(mesh.local_devices), flag())
    answers = jax.make_array_from_process_local_data(sharding, own, (mesh.devices.size,))
    answer = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))(answers)
    return lambda: bool(answer)


def fetch(tree):
    """Return the arrays of a tree whole, on every host, wherever their parts lie."""

    def one(leaf):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(one, tree)
