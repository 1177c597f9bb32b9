"""Files that are there whole or not at all, and what a file system that fails is answered with."""

import contextlib
import errno
import os
import pathlib
import secrets
from collections.abc import Iterator

from medvlp_jax.config import StorageError, UserError

# A disk may be emptied and a server come back; a name that cannot be stays one.
PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def replaced(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """Give a name beside `path` to write to; the file takes its place when the block ends.

    A reader sees the old content or the new, also after a power cut. Where the block raises, what
    was written is removed and `path` stays as it is. Makes the folder.

    Args:
      path: of a file.

    Raises:
      IsADirectoryError: where it is a folder.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the process' number: in a container every job has the same.
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield scratch
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def refusal(sentence: str, error: OSError) -> UserError:
    """Return what to raise for an error of the file system: StorageError if it may pass."""
    return (StorageError if error.errno in PASSING else UserError)(sentence)
