"""The real training loop beside its bare compiled step: what data, metrics and checkpoints cost.

  python -m benchmarks.loop --config=configs/imitate.py:demo [--blocks 5] [--held] [--out FILE.json]

Takes the settings of `medvlp train`. `loop.fit` trains as a run does, with its loader, reporter and
a checkpoint every 100 steps. Blocks of 100 of its steps, each with a checkpoint in its middle, take
turns with 100 bare steps: the same compiled step, state and all, on a batch that lies on the
device. A ratio is the time of the bare steps over that of the loop's: 0.97 means that the loop adds
3 %. A checkpoint that is still being written when its block ends is waited for, and counts to
neither. On a CPU the loader computes on the cores the step needs; --held gives the loop batches
that lie ready on the host instead, so that the loop alone is measured.
"""

import argparse
import itertools
import json
import os
import pathlib
import statistics
import tempfile
import time

import jax
from absl import flags

from benchmarks import check, origin, studies
from medvlp_jax import assemble, cli, examples, sharding, train
from medvlp_jax.training import loop, optim
from medvlp_jax.training import params as paths
from medvlp_jax.training import step as training
from medvlp_jax.training.checkpoint import Checkpointer
from medvlp_jax.training.report import Reporter

BLOCK = 100  # steps, and between two checkpoints
HELD = 4  # batches that lie ready


class Held:
    """Batches that lie ready, again and again; its position is the step."""

    def __init__(self, batches):
        """Take HELD of them."""
        self.rows, self.step = list(itertools.islice(batches, HELD)), 0

    def __iter__(self):
        return self

    def __next__(self):
        self.step += 1
        return self.rows[self.step % HELD]

    def get_state(self) -> dict[str, int]:
        """Return the position."""
        return {"next_index": self.step}


class Turns:
    """A step function that lets the loop's blocks take turns with bare ones.

    Attributes:
      loop_seconds: of each block of the loop.
      bare_seconds: of the bare block after it.
    """

    def __init__(self, step, batch, checkpointer, block: int):
        """Wrap `step`; `batch` is what bare steps take."""
        self.step, self.batch, self.checkpointer = step, batch, checkpointer
        self.block, self.calls, self.began = block, 0, None
        self.loop_seconds, self.bare_seconds = [], []

    def __call__(self, state, batch):
        """Take a step of the loop; before the first of a block, a block of bare ones."""
        # Blocks begin between two checkpoints, so that a checkpoint's writing lies within one.
        if self.calls % self.block == self.block // 2:
            jax.block_until_ready(state)
            if self.began is not None:
                self.loop_seconds.append(time.perf_counter() - self.began)
                state = self._bare(state)
            self.began = time.perf_counter()
        self.calls += 1
        return self.step(state, batch)

    def _bare(self, state):
        self.checkpointer.wait()
        began = time.perf_counter()
        for _ in range(self.block):
            state, metrics = self.step(state, self.batch)
        jax.block_until_ready((state, metrics))
        self.bare_seconds.append(time.perf_counter() - began)
        return state


def measure(config: dict, *, blocks: int, held: bool, block: int = BLOCK) -> dict:
    """Train blocks + 1 blocks of steps, the first of which warms up.

    Args:
      config: resolved.
      blocks: measured.
      held: batches that lie ready in place of the loader.
      block: steps in one; even.
    """
    parts = assemble.parts(config)
    sources = assemble.open_corpora(config["data"], config["data"]["split"])
    variables = assemble.initial_variables(parts)
    frozen = assemble.frozen_patterns(parts)
    trainable, _ = paths.split(variables["params"], frozen)
    fields = {k: v for k, v in config["optim"].items() if k != "freeze"}
    steps = (blocks + 2) * block
    tx, rate = optim.make(trainable, steps=steps, **fields)
    features = examples.cached_text(parts, variables, sources)
    batches = examples.train_batches(parts, sources, features)
    batches = Held(batches) if held else batches
    state = assemble.place(training.make_state(variables, tx, frozen), parts)
    how = {"mesh": parts.mesh, "rules": config["mesh"]["rules"]}
    step = training.make_train_step(parts.recipe, tx, rate, config["seed"], **how)
    rows = next(batches)
    batch = sharding.to_global({key: rows[key] for key in parts.recipe.inputs}, parts.mesh)
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        checkpointer = Checkpointer(folder / "checkpoints")
        turns = Turns(step, batch, checkpointer, block)
        loop.fit(
            state,
            turns,
            batches,
            recipe=parts.recipe,
            mesh=parts.mesh,
            steps=steps,
            reporter=Reporter(folder, every=config["train"]["log_every"]),
            checkpointer=checkpointer,
            checkpoint_every=block,
            config=config,
        )
        checkpointer.close()
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    ours, bare = turns.loop_seconds[1:], turns.bare_seconds[1:]
    return {
        "recipe": config["recipe"]["name"],
        "device": jax.devices()[0].device_kind,
        "threads": len(os.sched_getaffinity(0)),
        "batch_size": config["train"]["batch_size"],
        "input": "held" if held else "corpora",
        "loop_step_seconds": statistics.median(ours) / block,
        "bare_step_seconds": statistics.median(bare) / block,
        "waits_for_data_seconds": statistics.median(line["time/data"] for line in lines),
        "ratios": {"bare over loop": check.entry(b / a for a, b in zip(ours, bare, strict=True))},
    }


def main(argv: list[str] | None = None) -> dict:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--held", action="store_true")
    parser.add_argument("--block", type=int, default=BLOCK, help="steps in one; even")
    parser.add_argument("--out", type=pathlib.Path)
    options, settings = parser.parse_known_args(argv)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    config, _ = train.resolve(settings)
    found = measure(config, blocks=options.blocks, held=options.held, block=options.block)
    found |= {"settings": studies.deciding(settings), "block": options.block}
    found["measured"] = origin.measured()
    print(
        f"{found['recipe']}, {found['batch_size']} pairs on {found['device']}, "
        f"input {found['input']}: {1e3 * found['loop_step_seconds']:,.1f} ms a step in the loop, "
        f"{1e3 * found['bare_step_seconds']:,.1f} bare, ratio "
        f"{check.text(found['ratios']['bare over loop'])}"
    )
    if options.out:
        check.keep(options.out, found)
    return found


if __name__ == "__main__":
    cli.leave(cli.run(main))
