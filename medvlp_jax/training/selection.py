"""The state of the step that did best on a validation split, kept beside the newest ones.

Choosing the step on the split that is reported, as some releases do, makes the report too good.
"""

import math
import pathlib
from collections.abc import Mapping

from medvlp_jax import config as configs
from medvlp_jax import distributed
from medvlp_jax.config import UserError
from medvlp_jax.evaluation.results import Results
from medvlp_jax.training.checkpoint import Checkpointer
from medvlp_jax.training.step import TrainState

FOLDER = "selected"
# Settings, or sections of them, without which two scores cannot be compared.
DECIDING = (
    "train.select",
    "evals.prompts",
    "evals.class_task",
    "evals.positive",
    "evals.zero_shot.",
    "data.folds.",
    "data.texts",
    "data.mask_lower_edge",
)


class Selection:
    """Keeps the state with the highest value of train.select in <run>/selected."""

    def __init__(self, workdir: pathlib.Path, config: Mapping):
        """Open the folder and read the best value so far, if it was a value of the same thing.

        Args:
          workdir: run folder.
          config: resolved; of train.select higher is better.
        """
        self.metric, self.best, self.protocol = config["train"]["select"], -math.inf, ""
        self.checkpointer = Checkpointer(workdir / FOLDER / "checkpoints", keep=1)
        step = self.checkpointer.latest()
        if step is None:
            return
        position, before = self.checkpointer.beside(step)
        changed = _changed(before, config)
        if changed:
            distributed.say(
                f"train.select begins anew, for step {step} was selected by something else: "
                f"{'; '.join(changed)}"
            )
        else:
            self.best, self.protocol = position["value"], position.get("protocol", "")

    def offer(self, step: int, state: TrainState, found: Results, config: Mapping) -> None:
        """Keep a state that is better than all before it; of equals the first stays.

        One without a value, such as an AUROC where all rows are of one class, is none of these.
        """
        entry = found.get(self.metric, {})
        value = math.nan if entry.get("value") is None else entry["value"]
        if math.isnan(value):
            distributed.say(f"train.select={self.metric} is not defined at step {step}.")
        elif entry["hash"] != self.protocol:
            if self.best > -math.inf:
                distributed.say("train.select begins anew: its protocol was another one.")
            self.best, self.protocol = -math.inf, entry["hash"]
        # Saving is a matter of all processes, whose numbers may differ by a rounding.
        if distributed.writer_decides(value > self.best):
            self.best = value
            # From before the run went back to an older checkpoint; Orbax would keep those.
            self.checkpointer.drop(step)
            position = {"value": self.best, "step": step, "protocol": self.protocol}
            self.checkpointer.save(step, state, position, config)
            self.checkpointer.wait()

    def close(self) -> None:
        """Release the folder.

        Raises:
          UserError: where no state that was offered had a value.
        """
        self.checkpointer.close()
        if self.best == -math.inf:
            raise UserError(
                f"train.select={self.metric} was defined at no evaluation, so there is no best "
                "step; accepted is another number, or train.select= (empty) for the last step."
            )


def _changed(before: Mapping, now: Mapping) -> list[str]:
    """List what decides a score and differs between two configs, as "key: old -> new"."""
    old, new = _deciding(before), _deciding(now)
    # A setting that only one of them knows had its default in the other.
    both = old.keys() & new.keys()
    return configs.differences({k: old[k] for k in both}, {k: new[k] for k in both})


def _deciding(config: Mapping) -> dict:
    flat = {k: v for k, v in configs.flatten(config) if k.startswith(DECIDING)}
    return {**flat, "evals.corpus": config["evals"]["corpus"] or config["data"]["corpora"][0]}
