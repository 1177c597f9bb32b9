"""The state of the step that did best on a validation split, kept beside the newest ones.

Choosing the step on the split that is reported, as some releases do, makes the report too good.
"""

import pathlib
from collections.abc import Mapping

from medvlp_jax.config import UserError, nearest
from medvlp_jax.training.checkpoint import Checkpointer
from medvlp_jax.training.step import TrainState

FOLDER = "selected"


class Selection:
    """Keeps the state with the highest value of one metric in <run>/selected."""

    def __init__(self, workdir: pathlib.Path, metric: str, template: TrainState):
        """Open the folder and read the best value so far.

        Args:
          workdir: run folder.
          metric: key of the validation results; higher is better.
          template: state with the shapes and shardings of the run.
        """
        self.metric = metric
        self.checkpointer = Checkpointer(workdir / FOLDER / "checkpoints", keep=1)
        kept = self.checkpointer.resume(template)
        self.best = kept.position["value"] if kept else float("-inf")

    def offer(
        self, step: int, state: TrainState, values: Mapping[str, float], config: Mapping
    ) -> None:
        """Keep a state that is better than all before it; of equals the first stays.

        Raises:
          UserError: if the metric is not among the values.
        """
        if self.metric not in values:
            raise UserError(
                f"train.select={self.metric} is not among the validation results. "
                f"{nearest(self.metric, list(values))}"
            )
        if values[self.metric] > self.best:
            self.best = values[self.metric]
            # From before the run went back to an older checkpoint; Orbax would keep those.
            self.checkpointer.drop(step)
            self.checkpointer.save(step, state, {"value": self.best, "step": step}, config)
            self.checkpointer.wait()

    def close(self) -> None:
        """Release the folder."""
        self.checkpointer.close()
