"""The runs that a run began from (init.params), one from another, and what these had seen.

A stage that starts from another takes along what that was trained on. Where the folder of a run is
not here any more, nothing is known of it and of those before it.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from medvlp_jax import assemble
from medvlp_jax.config import UserError
from medvlp_jax.data import knowledge, leakage

OWN = "the corpus' own splits"


def start_of(config: Mapping[str, Any]) -> str:
    """Return the folder of the run that a run began from; "" where it began from none."""
    return config.get("init", {}).get("params", "")


def earlier(config: Mapping[str, Any]) -> list[tuple[str, dict]]:
    """Return folder and config of every run before this one, the nearest first.

    Raises:
      UserError: for a config that cannot be read.
    """
    found: dict[str, dict] = {}
    while (folder := start_of(config)) and folder not in found:
        if not (pathlib.Path(folder) / assemble.CONFIG).is_file():
            break
        found[folder] = config = assemble.read_config(folder)
    return [*found.items()]


def unknown(config: Mapping[str, Any]) -> str:
    """Return the folder of a run before this one that is not here; "" where all are."""
    found = earlier(config)
    last = start_of(found[-1][1] if found else config)
    return "" if last in dict(found) else last


def corpora(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the corpora that a run and those before it were trained on."""
    runs = [config, *(before for _, before in earlier(config))]
    return tuple(dict.fromkeys(name for run in runs for name in run["data"]["corpora"]))


def check(config: Mapping[str, Any], corpus: str, split: str) -> None:
    """Refuse an earlier run whose training rows may be among those tested on here.

    Args:
      config: of the run.
      corpus: that is tested on; another one, of the same origin, is what `leakage.warning` is for.
      split: of it.

    Raises:
      UserError: naming that run, and its splits and those here.
    """
    own, data = "", config["data"]
    if _has(data, corpus):
        own = data["split"]  # that this very run has seen it is said elsewhere
    for folder, before in earlier(config):
        told = before["data"]
        if corpus == knowledge.NAME or not _has(told, corpus):
            continue
        dealt = [assemble.fold_of(corpus, each) for each in (told, data)]
        there, here = _said(dealt, ("inner",) if split == "test" else ())
        if there != here:
            raise UserError(
                f"init.params={folder} was trained on {corpus} by {there}, and here it is tested "
                f"on by {here}: rows it has seen may be among them; accepted is a run with the "
                "same data.folds."
            )
        if told["split"] == split != own:
            raise UserError(
                f"init.params={folder} was trained on the split {split} of {corpus}, which is "
                "tested on here; accepted is another evals.split, or a run that has not seen it."
            )


def _has(data: Mapping[str, Any], corpus: str) -> bool:
    return leakage.unsized(corpus) in map(leakage.unsized, data["corpora"])


def _said(dealt: Sequence[Mapping[str, Any]], idle: Sequence[str]) -> list[str]:
    """Write how a corpus is dealt in two runs, as far as they differ in what is not idle."""
    keys = ("count",)  # alone, where one of them does not deal
    if all(dealt):
        keys = [k for k, value in dealt[0].items() if value != dealt[1][k] and k not in idle]
    said = lambda fold: ", ".join(f"data.folds.{key}={fold[key]}" for key in keys)
    return [said(fold) if fold else OWN for fold in dealt]
