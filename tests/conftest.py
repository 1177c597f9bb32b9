"""Eight emulated CPU devices, and the folder with small real data."""

import errno
import importlib.metadata
import os
import pathlib
import shutil

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Most of a test's time is compilation; the arithmetic is the same.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# Without optimisations XLA's newer emitters take most of the rest: IMITATE's step in small compiles
# in 18 s of a core with them, in 7 s with the older ones. XLA stops at flags it does not know.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import pytest
from absl import flags

# Grain reads absl flags when it starts its threads.
flags.FLAGS.mark_as_parsed()


@pytest.fixture
def full_disk(monkeypatch):
    """Return a function after which the disk is full in the middle of the text file of a name."""
    write, copy = pathlib.Path.write_text, shutil.copyfile

    def fill(name):
        def write_text(path, text, **how):
            if name not in path.name:
                return write(path, text, **how)
            write(path, text[: len(text) // 2], **how)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def copyfile(source, path):
            if name not in path.name:
                return copy(source, path)
            return write_text(path, source.read_text())

        monkeypatch.setattr(pathlib.Path, "write_text", write_text)
        monkeypatch.setattr(shutil, "copyfile", copyfile)

    return fill


@pytest.fixture(scope="session")
def test_data() -> pathlib.Path:
    """Return the folder with small real data, or skip where it is not given."""
    folder = os.environ.get("MEDVLP_TEST_DATA", "")
    if not folder:
        pytest.skip(
            "needs real data: set MEDVLP_TEST_DATA to the folder that holds radiology_qa/ ..."
        )
    return pathlib.Path(folder).resolve()
