"""One job a run folder."""

import os
import re
import signal
import subprocess
import sys
import textwrap

import pytest

from medvlp_jax.config import UserError
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
    with pytest.raises(UserError, match=name), lock.held(tmp_path / "run"):
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
