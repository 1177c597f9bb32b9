"""Where the numbers of a run go: metrics.jsonl, the console, and wandb when asked for.

Report text never passes through here: only numbers do.
"""

import json
import math
import pathlib
import secrets
import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

from medvlp_jax.config import UserError
from medvlp_jax.writing import replaced


class Reporter:
    """Writes one JSON line per logged step, and keeps the progress bar."""

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        every: int,
        wandb: Mapping | None = None,
        writes: bool = True,
        alarms: Mapping[str, tuple[float, str]] | None = None,
    ):
        """Open `folder`/metrics.jsonl.

        Args:
          folder: the run folder.
          every: steps between two lines; evaluations are always written.
          wandb: keyword arguments of `wandb.init`, or None for no tracking.
          writes: False only checks that the metrics are finite: all processes but one.
          alarms: by loss term, above which value to say what, see recipes.base.
        """
        self.alarms, self.sounding = alarms or {}, set()
        self.path, self.every, self.writes = pathlib.Path(folder) / "metrics.jsonl", every, writes
        self.tracker = _start_wandb(wandb, folder) if writes and wandb is not None else None
        self.bar = self.file = None
        self.last = 0.0

    def start(self, step: int, steps: int) -> None:
        """Show the bar from `step` on, and drop what comes after its metrics."""
        if not self.writes:
            return
        _keep_until(self.path, step)
        self.file = self.path.open("a")
        self.last = time.perf_counter()
        # On a file (a cluster log) a bar that redraws ten times a second is noise.
        interval = 0.1 if sys.stderr.isatty() else 30.0
        self.bar = tqdm(
            total=steps, initial=step, unit="step", mininterval=interval, dynamic_ncols=True
        )

    def step(self, step: int, metrics: Mapping[str, float], *, pairs: int, waited: float) -> None:
        """Take the metrics of one finished step.

        Args:
          step: its number.
          metrics: scalars on the host.
          pairs: examples in its global batch.
          waited: seconds the loop waited for its data.

        Raises:
          NotFiniteError: when the loss or the gradient norm is not a finite number.
        """
        check_finite(step, metrics)
        if not self.writes:
            return
        self._sound(step, metrics)
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        self.bar.update(1)
        if step % self.every and step != self.bar.total:
            return
        terms = {k.removeprefix("loss/"): f"{v:.3f}" for k, v in metrics.items() if "loss" in k}
        self.bar.set_postfix(terms, refresh=False)
        speed = {
            "time/step": seconds,
            "time/data": waited,
            "time/pairs_per_second": pairs / seconds,
        }
        self.write(step, {**metrics, **speed})

    def _sound(self, step, metrics) -> None:
        """Say on the console what rises above its bound, once each time it does."""
        for name, (most, sentence) in self.alarms.items():
            value = metrics.get(f"loss/{name}", most)
            if value <= most:
                self.sounding.discard(name)
            elif name not in self.sounding:
                self.sounding.add(name)
                tqdm.write(f"WARNING, step {step}: {sentence} ({name} {value:.2f}).", sys.stderr)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line and pass it to the tracker."""
        if not self.writes:
            return
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        if self.tracker:
            self.tracker.log(dict(values), step=step)

    def close(self) -> None:
        """Close file, bar and tracker."""
        if self.file:
            self.file.close()
            self.bar.close()
        if self.tracker:
            self.tracker.finish()


class NotFiniteError(UserError):
    """A step gave a loss or gradient that is not a finite number."""


def check_finite(step: int, metrics: Mapping[str, float]) -> None:
    """Stop at the first step whose metrics are not finite.

    Raises:
      NotFiniteError: naming the step and the metrics.
    """
    bad = [f"{k}={v}" for k, v in metrics.items() if not math.isfinite(v)]
    if bad:
        raise NotFiniteError(
            f"Step {step} gave {', '.join(bad)}: training stops and the checkpoints before it stay."
        )


def _keep_until(path: pathlib.Path, step: int) -> None:
    """Rewrite the file without lines after `step`, and without a half-written last one.

    The evaluation of `step` goes too: it is done again, since the run may have ended before it.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            found = json.loads(line)
            if found["step"] < step or (found["step"] == step and "loss" in found):
                kept.append(line)
        except (ValueError, KeyError):
            break
    with replaced(path) as scratch:
        scratch.write_text("".join(f"{line}\n" for line in kept))


def _start_wandb(settings, folder):
    """Start the tracker; the package is an extra, see checks.settings."""
    import wandb

    # One run of the tracker for all starts of a run folder.
    file = folder / "wandb_id"
    if not file.is_file():
        with replaced(file) as scratch:  # cut short it would be empty, which names no run
            scratch.write_text(secrets.token_hex(4))
    return wandb.init(dir=str(folder), id=file.read_text(), resume="allow", **settings)
