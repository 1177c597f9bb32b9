"""Names of protocols: "zero_shot", or "zero_shot@gloria" for a published flavour of it."""

from collections.abc import Sequence

from medvlp_jax.config import UserError, nearest
from medvlp_jax.evaluation import retrieval_legacy, scoring

CLEAN = "clean"
# What trains on the targets has a command of its own, by these names of its tasks.
ADAPTED = {"finetune": "finetune", "segmentation": "segment", "detection": "detect"}
ADAPTED |= {task: task for task in ADAPTED.values()}
FLAVOURS = {"zero_shot": tuple(scoring.FLAVOURS), "retrieval": (CLEAN, *retrieval_legacy.FLAVOURS)}


def names(protocols: Sequence[str]) -> list[str]:
    """Return every name there is: the protocols, and their flavours other than clean."""
    extra = [f"{p}@{f}" for p in protocols for f in FLAVOURS.get(p, ()) if f != CLEAN]
    return [*protocols, *extra]


def normalise(given: Sequence[str], protocols: Sequence[str]) -> tuple[str, ...]:
    """Return the names without "@clean", each once.

    Args:
      given: by the user.
      protocols: those there are.

    Raises:
      UserError: for an unknown one, naming the nearest, or the command that has it.
    """
    known = names(protocols)
    plain = dict.fromkeys(name.removesuffix(f"@{CLEAN}") for name in given)
    for name in plain:
        if name in ADAPTED:
            raise UserError(
                f"Protocol '{name}' trains on the targets: `medvlp adapt --task {ADAPTED[name]}` "
                f"does; accepted here are {', '.join(known)}."
            )
        if name not in known:
            raise UserError(f"No protocol '{name}'. {nearest(name, known)}")
    return tuple(plain)


def named(task: str, flavour: str) -> str:
    """Return the middle part of the keys: "view", or "view (gloria)" of a published flavour."""
    return task if flavour == CLEAN else f"{task} ({flavour})"


def split(name: str) -> tuple[str, str]:
    """Return protocol and flavour."""
    protocol, _, flavour = name.partition("@")
    return protocol, flavour or CLEAN
