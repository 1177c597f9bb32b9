"""What a timing depends on besides its settings: code, processor and libraries of the day.

    {"code": {"version": "0.1.0 (8f3c0d1e2a4b)", "commit": "8c3f39c...", "dirty": false},
     "cpu": "AMD EPYC 7763 64-Core Processor",
     "versions": {"python": "3.11.7", "jax": "0.10.2", "torch": "2.13.0+cpu"}}

It stands as "measured" beside each number that was taken at once, since one file may hold those of
many days. "commit" and "dirty" are as in a results.json; nothing here names a machine, a person or
a place.
"""

import importlib.metadata
import pathlib
import platform
import re
from typing import Any

from medvlp_jax.evaluation import provenance

INFO = pathlib.Path("/proc/cpuinfo")


def measured(*libraries: str) -> dict[str, Any]:
    """Return what a number of this process is measured with.

    Args:
      libraries: that it depends on besides JAX.
    """
    versions = {"python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in ("jax", *libraries)}
    return {"code": provenance.code(), "cpu": cpu(), "versions": versions}


def cpu() -> str:
    """Return the model of the processor, never the name of a machine; "unknown" where none says."""
    text = INFO.read_text() if INFO.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or "unknown"
