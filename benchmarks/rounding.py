"""How far a rounding carries: a run on several devices beside one whose weights were moved by one.

  python benchmarks/rounding.py [--config=configs/imitate.py:demo] [--steps 50] [--devices 2 4]
      [--float64] [--out FILE.json] [--config.KEY=VALUE ...]

Devices add up a batch in another order, so their sums differ in the last digit. Printed is how far
losses and gradient norms of the same run, from the same weights and batches, are then apart, step
by step; "moved" is one device whose weights were each moved to the next number up or down, at
random. Where the two grow alike, the order of summation explains all of it.

--float64 computes everything in double precision: what did not shrink would be an error.
"""

import argparse
import json
import os
import pathlib
import platform
import sys

DOUBLE = "--float64" in sys.argv
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_X64"] = str(int(DOUBLE))
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax.numpy as jnp

if DOUBLE:  # the package says float32 where a paper would; this script reads it as float64
    jnp.float32 = jnp.float64

import jax
import numpy as np
from absl import flags

from medvlp_jax import assemble, cli, examples, sharding, train
from medvlp_jax.training import optim
from medvlp_jax.training import params as paths
from medvlp_jax.training import step as training
from medvlp_jax.writing import replaced

DTYPE = np.float64 if DOUBLE else np.float32
SHOWN = (1, 2, 3, 4, 5, 6, 8, 10, 20, 30, 40, 50)


def in_double(config):
    """Name float64 wherever a config names float32."""
    if isinstance(config, dict):
        return {key: in_double(value) for key, value in config.items()}
    return "float64" if config == "float32" else config


def moved(params, seed: int = 0):
    """Return the parameters, each moved to the next number up or down at random."""
    rng = np.random.default_rng(seed)
    towards = lambda x: np.where(rng.random(x.shape) < 0.5, np.inf, -np.inf).astype(x.dtype)
    return jax.tree.map(lambda x: np.nextafter(x, towards(x)), params)


class Study:
    """One config, its first weights and its batches."""

    def __init__(self, config: dict):
        """Build everything but the step."""
        self.config = config
        self.parts = assemble.parts(config)
        self.sources = assemble.open_corpora(config["data"], config["data"]["split"])
        variables = assemble.initial_variables(self.parts)
        self.frozen = assemble.frozen_patterns(self.parts)
        self.features = examples.cached_text(self.parts, variables, self.sources)
        self.variables = jax.device_get(variables)

    def run(self, devices: int, steps: int, *, move: bool = False) -> np.ndarray:
        """Return loss and gradient norm [steps, 2]."""
        config, variables = self.config, dict(self.variables)
        if move:
            variables["params"] = moved(variables["params"])
        fields = {k: v for k, v in config["optim"].items() if k != "freeze"}
        trainable, _ = paths.split(variables["params"], self.frozen)
        tx, rate = optim.make(trainable, steps=config["train"]["steps"], **fields)
        mesh = sharding.make_mesh(devices=jax.devices()[:devices])
        state = training.make_state(variables, tx, self.frozen)
        state = sharding.place(state, sharding.shardings(state, mesh, config["mesh"]["rules"]))
        step = training.make_train_step(self.parts.recipe, tx, rate, config["seed"], mesh=mesh)
        parts = self.parts._replace(mesh=mesh, part=sharding.part_of(mesh))
        batches = iter(examples.train_batches(parts, self.sources, self.features))
        found = []
        for _ in range(steps):
            rows = next(batches)
            batch = {key: rows[key] for key in self.parts.recipe.inputs}
            batch = jax.tree.map(lambda x: x.astype(DTYPE) if x.dtype == np.float32 else x, batch)
            state, metrics = step(state, sharding.to_global(batch, mesh))
            found.append([float(metrics["loss"]), float(metrics["grad_norm"])])
        return np.array(found)


def table(steps: int, names: list[str], apart: dict) -> str:
    """Lay out loss / gradient norm, relative, by step."""
    lines = [f"| step | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for step in (s for s in SHOWN if s <= steps):
        cells = ["{:.1e}, {:.1e}".format(*np.abs(apart[name][step - 1])) for name in names]
        lines.append(f"| {step} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run all and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/imitate.py:demo")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--devices", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--float64", action="store_true", help="compute in double precision")
    parser.add_argument("--out", type=pathlib.Path)
    arguments, overrides = parser.parse_known_args(argv)
    flags.FLAGS.mark_as_parsed()
    config, _ = train.resolve([f"--config={arguments.config}", *overrides])
    study = Study(in_double(config) if DOUBLE else config)
    alone = study.run(1, arguments.steps)
    runs = {f"{count} devices": study.run(count, arguments.steps) for count in arguments.devices}
    runs["moved"] = study.run(1, arguments.steps, move=True)
    apart = {name: run / alone - 1 for name, run in runs.items()}
    print(f"Relative difference to one device, loss and gradient norm, {np.dtype(DTYPE)}:\n")
    print(table(arguments.steps, list(runs), apart))
    if arguments.out:
        facts = {"jax": jax.__version__, "python": platform.python_version()}
        facts |= {"config": arguments.config, "dtype": str(np.dtype(DTYPE)), "overrides": overrides}
        facts |= {"alone": alone.tolist(), "apart": {k: v.tolist() for k, v in apart.items()}}
        with replaced(arguments.out) as scratch:
            scratch.write_text(json.dumps(facts) + "\n")


if __name__ == "__main__":
    cli.leave(cli.run(main))
