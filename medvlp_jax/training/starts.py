"""Which code took which steps of a run: one line a start in <run>/starts.jsonl.

{"step": 120, "date": "2026-11-27T17:05:11+00:00", "version": "0.1.0 (8f3c0d1e2a4b)",
 "commit": "8c3f39c...", "dirty": false, "jax": "0.10.2"}
"""

import datetime
import json
import pathlib

import jax

from medvlp_jax import distributed
from medvlp_jax.config import differences
from medvlp_jax.evaluation import provenance
from medvlp_jax.reading import parse_json
from medvlp_jax.writing import replaced

FILE = "starts.jsonl"


def record(workdir: pathlib.Path, step: int) -> None:
    """Write down the code of a start, and say how it differs from that of the start before.

    Other code is not refused: a run may go on because it was mended.

    Args:
      workdir: run folder; process 0 alone reads and writes it.
      step: that the run has reached.
    """
    if not distributed.is_writer():
        return
    file = workdir / FILE
    lines = file.read_text().splitlines() if file.is_file() else []
    code = {**provenance.code(), "jax": jax.__version__}
    before = _read(lines[-1]) if lines else {}
    changed = differences({name: before.get(name) for name in code}, code) if before else []
    if changed:
        distributed.say(f"Code changed since step {step}: {'; '.join(changed)}")
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    lines.append(json.dumps({"step": step, "date": date, **code}))
    with replaced(file) as scratch:
        scratch.write_text("".join(f"{line}\n" for line in lines))


def _read(line: str) -> dict:
    """Return what a line says; nothing where somebody has broken it."""
    try:
        found = parse_json(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
