"""Several processes as one: alone everything is the identity; together, real processes on gloo."""

import os
import pathlib
import socket
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from medvlp_jax import distributed, sharding
from medvlp_jax.config import UserError
from medvlp_jax.sharding import Part
from medvlp_jax.training import lock

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"JAX_PROCESS_ID": "1"}, "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES must be set as well"),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "h:1",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "2",
            },
            "JAX_PROCESS_ID=2 is no process of JAX_NUM_PROCESSES=2",
        ),
        ({"MEDVLP_CLUSTER": "slurm"}, "MEDVLP_CLUSTER must be auto, got 'slurm'"),
    ],
)
def test_a_group_that_is_described_badly_is_one_sentence(monkeypatch, settings, message):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        distributed.initialize()


@pytest.mark.parametrize(
    ("address", "bound"),
    [
        ("localhost:29500", "localhost:29500"),
        ("127.0.0.1:29500", "127.0.0.1:29500"),
        ("[::1]:29500", "[::1]:29500"),
        ("node-1:29500", None),
    ],
)
def test_a_coordinator_of_one_host_listens_to_that_host_alone(monkeypatch, address, bound):
    given = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **how: given.update(how))
    for name, value in zip(distributed.GROUP, (address, "2", "0"), strict=True):
        monkeypatch.setenv(name, value)
    distributed.initialize()
    assert given["coordinator_bind_address"] == bound


def test_without_a_description_there_is_one_process():
    distributed.initialize()
    assert not jax.distributed.is_initialized()


def test_one_process_agrees_with_itself():
    rows = np.asarray([["a", "bc"]])
    assert distributed.gather_bytes(b"x") == [b"x"]
    np.testing.assert_array_equal(distributed.gather_parts(rows, Part()), rows[None])
    assert distributed.writer_decides(True)
    distributed.check_same({"config.seed": "0"})
    flag = lambda: True
    assert distributed.any_process(flag, sharding.make_mesh()) is flag


def mesh_of(processes, *shape):
    """Return the shape of a mesh whose devices lie in these processes."""
    devices = np.asarray([SimpleNamespace(process_index=p) for p in processes]).reshape(shape)
    return SimpleNamespace(devices=devices, shape=dict(zip(sharding.AXES, shape, strict=True)))


@pytest.mark.parametrize(
    ("processes", "shape", "part"),
    [
        ([0, 0, 1, 1], (4, 1, 1), Part(0, 2)),
        ([1, 1, 0, 0], (2, 2, 1), Part(1, 2)),
        ([0, 1, 2, 3], (2, 1, 2), Part(0, 2)),  # tensor axis across two processes
        ([0, 0, 1, 1], (1, 2, 2), Part(0, 2)),
        ([0, 1], (1, 1, 2), Part(0, 1)),
    ],
)
def test_a_process_holds_the_rows_of_its_devices(processes, shape, part):
    assert sharding.part_of(mesh_of(processes, *shape)) == part


def test_rows_that_two_processes_share_in_part_are_refused():
    with pytest.raises(ValueError, match="unevenly"):
        sharding.part_of(mesh_of([0, 0, 0, 1, 1, 1], 3, 1, 2))


def together(count, program):
    """Run a program in `count` real processes; return what each of them printed."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    head = """
        import os, jax, numpy as np
        from medvlp_jax import distributed, sharding
        from medvlp_jax.config import UserError
        distributed.initialize()
        p = jax.process_index()
    """
    ranks = []
    for rank in range(count):
        group = {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(rank),
        }
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(program)],
                cwd=ROOT,
                env={**os.environ, **group, "XLA_FLAGS": ""},
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    told = [rank.communicate(timeout=600)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * count
    lines = [out.splitlines(keepends=True) for out in told]
    return ["".join(x for x in out if not x.startswith("[Gloo]")) for out in lines]


@pytest.mark.slow
def test_three_processes_gather_decide_and_ask():
    told = together(
        3,
        """
        assert distributed.gather_bytes(b"x" * p) == [b"", b"x", b"xx"]
        words = np.asarray(["a" * (p + 1)])
        assert distributed.gather(words).tolist() == [["a"], ["aa"], ["aaa"]]
        exact = np.asarray([2**60 + p, -p])  # int64, which JAX would cut
        assert distributed.gather(exact).tolist() == [[2**60 + k, -k] for k in range(3)]
        assert distributed.writer_decides(p == 0) and not distributed.writer_decides(p > 0)
        mesh = sharding.make_mesh()
        assert sharding.part_of(mesh) == (p, 3)
        assert distributed.any_process(lambda: p == 2, mesh)()
        assert not distributed.any_process(lambda: False, mesh)()
        rows = np.full((2, 1), p)
        assert sharding.own_rows(sharding.to_global({"x": rows}, mesh)["x"]).tolist() == [[p], [p]]
        whole = sharding.place(np.arange(6.0), sharding.NamedSharding(mesh, sharding.BATCH))
        assert whole.addressable_shards[0].data.shape == (2,)
        assert distributed.fetch({"w": whole})["w"].tolist() == [0, 1, 2, 3, 4, 5]
        with distributed.writer_first("turn"):
            pass
        distributed.say("once")
        """,
    )
    assert told == ["once\n", "", ""]


@pytest.mark.slow
def test_a_process_with_another_config_or_code_is_refused_by_all_naming_both_values():
    told = together(
        2,
        """
        for name, value in (("config.train.batch_size", ("64", "32")), ("the code", ("a", "b"))):
            try:
                distributed.check_same({"config.seed": "0", name: value[p]})
            except UserError as error:
                print(error)
        """,
    )
    same = "Process 1 was started with {} = {}, process 0 with {}; all processes of a run need the "
    lines = [same.format("config.train.batch_size", "32", "64"), same.format("the code", "b", "a")]
    for out in told:
        assert [line.split("same code")[0] for line in out.splitlines()] == lines


@pytest.mark.slow
def test_a_run_folder_is_held_for_all_and_refused_to_all(tmp_path):
    program = f"""
        from medvlp_jax.training import lock
        try:
            with lock.held({str(tmp_path / "run")!r}):
                distributed.barrier("inside")
                print("held")
        except UserError as error:
            print(error)
    """
    assert together(2, program) == ["held\n", "held\n"]
    with lock.held(tmp_path / "run"):
        for out in together(2, program):
            assert f"is in use by process {os.getpid()} on" in out
