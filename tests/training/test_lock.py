"""One job a run folder."""

import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import textwrap

import pytest

from medvlp_jax import distributed
from medvlp_jax.config import StorageError, UserError
from medvlp_jax.training import lock


@pytest.fixture
def other(tmp_path):
    """Return a process that holds tmp_path/run."""
    program = f"""
        import signal
        from medvlp_jax.training import lock
        with lock.held({str(tmp_path / "run")!r}):
            print("held", flush=True)
            signal.pause()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_job_is_refused_by_process_and_host_of_the_first(tmp_path, other):
    name = rf"run is in use by process {other.pid} on {re.escape(os.uname().nodename)} since 20"
    with pytest.raises(UserError, match=name), lock.held(tmp_path / "run", sleep=pytest.fail):
        raise AssertionError("two jobs in one folder")
    assert other.poll() is None


def test_a_killed_job_leaves_no_lock(tmp_path, other):
    other.send_signal(signal.SIGKILL)
    other.wait()
    with lock.held(tmp_path / "run"):
        assert str(os.getpid()) in (tmp_path / "run" / lock.NAME).read_text()


def test_a_job_that_fails_before_it_writes_leaves_no_folder(tmp_path):
    with pytest.raises(RuntimeError), lock.held(tmp_path / "a" / "run"):
        raise RuntimeError
    assert not (tmp_path / "a" / "run").exists()


def test_what_a_run_wrote_stays_and_the_lock_goes(tmp_path):
    with lock.held(tmp_path / "run"):
        (tmp_path / "run" / "config.json").write_text("{}")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["config.json"]
    with lock.held(tmp_path / "run"):
        pass


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write to"), lock.held(tmp_path / "file" / "run"):
        raise AssertionError("made")


@pytest.fixture
def lost(tmp_path):
    """Return a file whose lock an earlier job on another host seems to hold."""
    (tmp_path / "run").mkdir()
    file = (tmp_path / "run" / lock.NAME).open("w+")
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write(json.dumps({"process": os.getpid(), "host": "gone", "since": "2030-01-01"}))
    file.flush()
    yield file
    file.close()


def test_a_lock_of_another_host_is_waited_for_and_the_wait_is_said_once(tmp_path, lost, capsys):
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            lost.close()

    with lock.held(tmp_path / "run", sleep):
        assert len(waits) == 3
    (line,) = capsys.readouterr().out.splitlines()
    assert f"in use by process {os.getpid()} on gone since 2030" in line
    assert line.endswith("Waiting 120 s for it to end.")


@pytest.mark.usefixtures("lost")
def test_a_lock_that_stays_is_refused_after_two_minutes(tmp_path):
    waits = []
    with (
        pytest.raises(UserError, match="in use by process") as refused,
        lock.held(tmp_path / "run", waits.append),
    ):
        raise AssertionError("two jobs in one folder")
    assert refused.value.code == 2
    assert sum(waits) == 120


@pytest.mark.parametrize("said", ["12", '{"mark": "x"}', "", "{"])
def test_a_holder_that_says_nothing_of_itself_is_another_process(tmp_path, said):
    (tmp_path / lock.NAME).write_text(said)
    with (tmp_path / lock.NAME).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with (
            pytest.raises(UserError, match="is in use by another process"),
            lock.held(tmp_path, lambda _: None),
        ):
            raise AssertionError("two jobs in one folder")


def test_a_process_with_the_number_of_the_holder_is_not_taken_for_it(tmp_path, lost):
    """As in a container that was started again: the same host, the same numbers."""
    holder = {"process": os.getpid(), "host": os.uname().nodename, "since": "2030", "started": "1"}
    lost.truncate(0)
    lost.seek(0)
    lost.write(json.dumps(holder))
    lost.flush()
    with lock.held(tmp_path / "run", lambda _: lost.close()):
        assert lost.closed


def test_the_mark_is_on_disk_before_the_other_processes_look_for_it(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    with lock.held(tmp_path / "run"):
        assert synced == [(tmp_path / "run" / lock.NAME).stat().st_size]


@pytest.mark.parametrize("looks", [3, None])
def test_a_process_looks_again_for_what_process_0_wrote(tmp_path, monkeypatch, looks):
    """This is process 1, to whom the file shows itself at the third look, or never."""
    monkeypatch.setattr(distributed, "is_writer", lambda: False)
    own = lambda told: [json.dumps(["", False, "mark"]).encode() if told[:1] == b"[" else told]
    monkeypatch.setattr(distributed, "gather_bytes", own)
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == looks:
            (tmp_path / lock.NAME).write_text("mark")

    if looks:
        with lock.held(tmp_path, sleep):
            assert len(waits) == looks
    else:
        with pytest.raises(UserError, match="does not see"), lock.held(tmp_path, sleep):
            raise AssertionError("went on blind")
        assert sum(waits) == 30


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.ENOSYS, UserError, r"run has no locks \(.*\): mount it with flock, or choose"),
        (errno.ENOLCK, UserError, r"run has no locks \(.*\): mount it with flock, or choose"),
        (errno.ESTALE, StorageError, "Cannot write to .*run: .*"),
        (errno.EROFS, UserError, "Cannot write to .*run: .*"),
    ],
)
def test_what_the_file_system_says_to_a_lock_is_one_sentence(
    tmp_path, monkeypatch, number, kind, message
):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=message) as refused, lock.held(tmp_path / "run"):
        raise AssertionError("locked")
    assert type(refused.value) is kind
