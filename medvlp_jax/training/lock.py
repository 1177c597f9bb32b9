"""One job a run folder: a second one is refused by the name of the first.

The lock is the kernel's (flock), so it goes with the process that holds it, however that ends. It
reaches across hosts where the file system's locks do: NFS and Lustre, not gcsfuse.
"""

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import secrets
import socket
from collections.abc import Iterator

from medvlp_jax import distributed
from medvlp_jax.config import UserError

NAME = "lock"


@contextlib.contextmanager
def held(folder: pathlib.Path) -> Iterator[None]:
    """Make the folder and keep other jobs out of it; leave no trace if nothing is written.

    Raises:
      UserError: in all processes, when another job has the folder, or some process does not see
        what process 0 writes there.
    """
    folder = pathlib.Path(folder)
    file, refusal, mark = None, "", secrets.token_hex(8)
    if distributed.is_writer():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file, refusal = _lock(folder / NAME, mark)
        except OSError as error:
            refusal = f"Cannot write to {folder}: {error}."
    refusal, mark = distributed.gather_bytes(f"{refusal}\n{mark}".encode())[0].decode().split("\n")
    seen = (folder / NAME).is_file() and mark in (folder / NAME).read_text()
    blind = [
        k for k, sees in enumerate(distributed.gather_bytes(b"1" if seen else b"")) if not sees
    ]
    if blind and not refusal:
        refusal = (
            f"Process {blind[0]} does not see what process 0 writes to {folder}: --workdir must be "
            "a folder that all hosts share."
        )
    if refusal:
        if file:
            file.close()
        raise UserError(refusal)
    try:
        yield
    finally:
        if file:
            (folder / NAME).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it holds a run
                folder.rmdir()
            file.close()


def _lock(path, mark):
    """Return the open, locked file and "", or None and why another job has it."""
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None, _occupied(path)
        # Its last holder may have removed it between our opening and our locking.
        if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            break
        file.close()
    file.truncate(0)
    now = datetime.datetime.now().isoformat(" ", "seconds")
    holder = {"process": os.getpid(), "host": socket.gethostname(), "since": now, "mark": mark}
    file.write(json.dumps(holder) + "\n")
    file.flush()
    return file, ""


def _occupied(path):
    try:
        holder = json.loads(path.read_text())
        name = f"process {holder['process']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError):
        name = "another process"
    return (
        f"{path.parent} is in use by {name}: wait for that job or stop it, or choose another "
        "--workdir."
    )
