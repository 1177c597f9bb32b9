"""Where the numbers of a results.json come from: code, settings, rows, weights, seeds, date.

    {"date": "2026-11-27T17:05:11+00:00",
     "code": {"version": "0.1.0 (8f3c0d1e2a4b)", "commit": "8c3f39c...", "dirty": false},
     "config": "5f0c...", "evals": {...}, "seeds": {"run": 0, "bootstrap": 0, ...},
     "rows": {"corpus": "cxr_phantom:demo", "split": "test", "rows": 486, "patients": 265,
              "hash": "91ab...", "labels": {"finding": "07fe..."}, "boxes": "55d0..."},
     "weights": "c0ff...", "libraries": {"jax": "0.10.2", ...}, "devices": "8 x cpu"}

Hashes are the first 16 hexadecimal digits of SHA-256. That of the rows is of who they are, those of
labels and boxes also of what is said of them; files from before these were kept, and protocols that
read none, do not have them: then it is not known whether they are the same. Nothing here tells who
a patient is: ids are in the hash alone.
"""

import datetime
import hashlib
import pathlib
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import scipy
import sklearn

import medvlp_jax
from medvlp_jax import config as configs
from medvlp_jax import distributed

DIGITS = 16


def code(package: pathlib.Path | None = None) -> dict[str, Any]:
    """Return version and hash of the source files; of a checkout its commit, and if it changed.

    Args:
      package: folder of the package; None takes the one that runs. In somebody else's checkout, as
        a virtual environment inside one, there is no commit: it would be theirs.
    """
    package = package or pathlib.Path(medvlp_jax.__path__[0])
    root = _git(package, "rev-parse", "--show-toplevel")
    commit = dirty = None
    if root and pathlib.Path(root).resolve() == package.resolve().parent:
        commit = _git(package, "rev-parse", "HEAD") or None
        # New files do not run unless a changed one names them; build outputs are new files.
        dirty = bool(_git(package.parent, "status", "--porcelain", "--untracked-files=no"))
    return {"version": distributed.code_version(), "commit": commit, "dirty": dirty}


def _git(folder: pathlib.Path, *arguments: str) -> str:
    """Return what git says, "" where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def config_hash(config: Mapping[str, Any]) -> str:
    """Return the hash of a resolved config; tuples and JSON's lists are alike."""
    return hashlib.sha256(configs.to_json(config).encode()).hexdigest()[:DIGITS]


def rows(
    images: Sequence[str], patients: Sequence[str], labels: Mapping[str, Iterable] | None = None
) -> dict[str, Any]:
    """Return how many rows and patients, and hashes of who they are, in whatever order.

    Args:
      images: [N] image ids.
      patients: [N] patient ids.
      labels: of each task that is read, [N, C] int8.

    Returns:
      "rows", "patients", "hash", and with labels "labels": {task: hash of the rows with theirs}.
    """
    found = {"rows": len(images), "patients": len({*map(str, patients)})}
    found["hash"] = _digest(patients, images)
    vectors = {
        task: [np.asarray(row).tolist() for row in of] for task, of in (labels or {}).items()
    }
    said = {task: _digest(patients, images, of) for task, of in vectors.items()}
    return found | ({"labels": said} if said else {})


def boxes(records: Iterable[Mapping]) -> str:
    """Return a hash of the boxes of records, with their phrases and categories, in any order."""
    drawn = []
    for record in records:
        own = record["boxes"]
        phrases = own["phrase"]
        kinds = own.get("category") or [""] * len(phrases)
        for phrase, kind, box in zip(phrases, kinds, own["bbox"].tolist(), strict=True):
            drawn.append((record["patient_id"], record["image_id"], phrase, kind, box))
    return _digest(*zip(*drawn, strict=True))


def _digest(*columns: Iterable) -> str:
    """Return the hash of rows, given by their columns, in whatever order."""
    lines = sorted(zip(*(map(str, column) for column in columns), strict=True))
    return hashlib.sha256("\n".join(map("\0".join, lines)).encode()).hexdigest()[:DIGITS]


def weights_hash(variables: Mapping) -> str:
    """Return the hash of all arrays with their paths, one array at a time.

    Args:
      variables: of the recipe, on the host: {"params": ..., maybe "batch_stats": ...}.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):  # sorted by key
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:DIGITS]


def of(
    config: Mapping[str, Any],
    *,
    code: Mapping[str, Any],
    evals: Mapping[str, Any],
    rows: Mapping,
    variables: Mapping,
) -> dict[str, Any]:
    """Return the provenance of an evaluation.

    Args:
      config: of the run, resolved.
      code: what `code` returned when the process began; a checkout may move during a long run.
      evals: settings of this evaluation, which may differ from config.evals.
      rows: what was evaluated: corpus, split and what `rows` returns.
      variables: that were evaluated, on the host.
    """
    libraries = {"jax": jax, "numpy": np, "scipy": scipy, "scikit-learn": sklearn}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "code": code,
        "config": config_hash(config),
        "evals": evals,
        # The seeds of an evaluation are constants: the same rows give the same numbers.
        "seeds": {"run": config["seed"], "bootstrap": 0, "probe": 0, "controls": 0},
        "rows": rows,
        "weights": weights_hash(variables),
        "libraries": {name: module.__version__ for name, module in libraries.items()},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
