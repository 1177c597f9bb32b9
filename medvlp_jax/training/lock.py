"""One job a run folder: a second one is refused by the name of the first.

The lock is the kernel's (flock), so it goes with the process that holds it, however that ends. It
reaches across hosts where the file system's locks do: NFS and Lustre, not gcsfuse.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import pathlib
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping

from medvlp_jax import distributed, writing
from medvlp_jax.config import StorageError, UserError

NAME = "lock"
# Seconds. An NFS server forgets the locks of a client that is gone after some 90 of them, and its
# clients what they remember of a folder after some 30.
FORGETS, TURN = 120, 5
SHOWS, GLANCE = 30, 1
LOCKLESS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextlib.contextmanager
def held(folder: pathlib.Path, sleep: Callable[[float], None] = time.sleep) -> Iterator[None]:
    """Make the folder and keep other jobs out of it; leave no trace if nothing is written.

    A job whose process is not known to be alive may have ended with its host: it is given two
    minutes to lose the lock.

    Args:
      folder: of the run.
      sleep: waits so many seconds.

    Raises:
      UserError: in all processes, when another job has the folder, there are no locks, or some
        process does not see what process 0 writes there.
      StorageError: in all processes, when the file system fails.
    """
    folder = pathlib.Path(folder)
    file, refusal, mark = None, None, secrets.token_hex(8)
    if distributed.is_writer():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = _lock(folder / NAME, mark, sleep)
        except UserError as error:
            refusal = error
        except OSError as error:
            refusal = writing.refusal(f"Cannot write to {folder}: {error}.", error)
    told = json.dumps([str(refusal or ""), isinstance(refusal, StorageError), mark])
    sentence, passes, mark = json.loads(distributed.gather_bytes(told.encode())[0])
    if sentence:
        raise (StorageError if passes else UserError)(sentence)
    seen = distributed.gather_bytes(b"1" if _sees(folder / NAME, mark, sleep) else b"")
    blind = [k for k, sees in enumerate(seen) if not sees]
    if blind:
        if file:
            file.close()
        raise UserError(
            f"Process {blind[0]} does not see what process 0 writes to {folder}: --workdir must be "
            "a folder that all hosts share."
        )
    try:
        yield
    finally:
        if file:
            (folder / NAME).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it holds a run
                folder.rmdir()
            file.close()


def _lock(path, mark, sleep):
    """Return the open, locked file, with who holds it and the mark on disk."""
    waited = 0
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            holder = _holder(path)
            if waited >= FORGETS or _is_alive(holder):
                raise UserError(_occupied(path, holder)) from None
            if not waited:
                distributed.say(f"{_occupied(path, holder)} Waiting {FORGETS} s for it to end.")
            sleep(TURN)
            waited += TURN
            continue
        except OSError as error:
            file.close()
            if error.errno not in LOCKLESS:
                raise
            raise UserError(
                f"The file system of {path.parent} has no locks ({error.strerror}): mount it with "
                "flock, or choose another --workdir."
            ) from None
        # Its last holder may have removed it between our opening and our locking.
        if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            break
        file.close()
    file.truncate(0)
    now = datetime.datetime.now().isoformat(" ", "seconds")
    holder = {"process": os.getpid(), "host": socket.gethostname(), "since": now, "mark": mark}
    file.write(json.dumps({**holder, "started": _start_of(os.getpid())}) + "\n")
    file.flush()
    os.fsync(file.fileno())  # else NFS shows it to other hosts once the file is closed
    return file


def _sees(path, mark, sleep):
    """Say whether what process 0 wrote comes into sight here."""
    for _ in range(SHOWS // GLANCE):
        with contextlib.suppress(OSError):
            if mark in path.read_text():
                return True
        sleep(GLANCE)
    return False


def _holder(path) -> Mapping:
    """Return what the holder of the lock wrote; nothing if it has not yet."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text())
        if isinstance(found, dict) and {"process", "host", "since"} <= found.keys():
            return found
    return {}


def _is_alive(holder):
    """Say whether this is certain: its host is this one, and its process is there."""
    if holder.get("host") != socket.gethostname() or not holder.get("started"):
        return False
    # By its number alone a container that was started again would take itself for the one before.
    return _start_of(holder["process"]) == holder["started"]


def _start_of(process: int) -> str:
    """Return when a process of this host was started, "" where that cannot be known."""
    with contextlib.suppress(OSError):
        return pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


def _occupied(path, holder):
    name = "another process"
    if holder:
        name = f"process {holder['process']} on {holder['host']} since {holder['since']}"
    return (
        f"{path.parent} is in use by {name}: wait for that job or stop it, or choose another "
        "--workdir."
    )
