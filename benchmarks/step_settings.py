"""Which settings and XLA flags make a training step faster: all by turns, in one process.

  python -m benchmarks.step_settings --config=configs/clip.py:vit_b16 --config.train.batch_size=512
      [--try "xla_gpu_enable_triton_gemm=false"] [--try "config.recipe.image.attention=cudnn"]
      [--rounds 7] [--steps 5] [--out FILE.json]

Takes the settings of `medvlp train`; each --try is one arm beside them, of settings (config.KEY=
VALUE) and XLA flags (xla_...=VALUE) with spaces between. Without --try the arms are FLAGS of the
platform, what has been worth a try. The step is the one the run would take, its input random and on
the device, as in benchmarks/train_step.py. A ratio is the time of the step as configured over that
of the arm, median and quartiles over the rounds, in each of which every arm takes its turn: above 1
the arm is faster. An arm that cannot be compiled is named, with its reason, and stops no other.
"""

import argparse
import json
import os
import pathlib
import time
from collections.abc import Sequence

import jax
from absl import flags

from benchmarks import check, studies, train_step
from medvlp_jax import cli, plan, train

AS_IS = "as configured"
FLAGS = {
    "gpu": (
        "xla_gpu_enable_triton_gemm=false",
        "xla_gpu_enable_cublaslt=true",
        "xla_gpu_dot_merger_threshold_mb=100000",
        "xla_gpu_cudnn_gemm_fusion_level=1",
        "xla_gpu_enable_latency_hiding_scheduler=true",
    ),
    "cpu": ("xla_cpu_enable_fast_math=true", "xla_cpu_use_fusion_emitters=false"),
}


class Arm:
    """A compiled step with a state and a batch of its own."""

    def __init__(self, settings: list[str], words: Sequence[str]):
        """Compile it; `words` are settings and flags beside `settings`."""
        own = [f"--{word}" for word in words if word.startswith("config.")]
        named = (word.split("=", 1) for word in words if not word.startswith("config."))
        options = {flag: _typed(value) for flag, value in named}
        config, _ = train.resolve([*settings, *own])
        blueprint = plan.blueprint(config)
        lowered = blueprint.step.lower(blueprint.state, blueprint.batch)
        began = time.perf_counter()
        self.compiled = lowered.compile(compiler_options=options)
        self.compile_seconds = time.perf_counter() - began
        self.state = train_step.random_state(blueprint)
        self.batch = train_step.random_batch(blueprint)

    def run(self, steps: int) -> float:
        """Take steps, and return the seconds of one."""
        began = time.perf_counter()
        for _ in range(steps):
            self.state, metrics = self.compiled(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))
        return (time.perf_counter() - began) / steps


def _typed(value: str) -> bool | int | str:
    """Read a flag's value: the compiler takes no strings for switches and numbers."""
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def measure(settings: list[str], tried: Sequence[str], rounds: int, steps: int) -> dict:
    """Compile all arms, then let them take turns.

    Args:
      settings: of the run.
      tried: arms, each settings and flags with spaces between.
      rounds: turns of each arm.
      steps: in a turn.
    """
    arms, failed = {AS_IS: Arm(settings, ())}, {}
    for name in tried:
        try:
            arms[name] = Arm(settings, name.split())
        except Exception as error:  # whatever a flag or a setting does to the compiler
            reason = str(error).split("\n", 1)[0]
            failed[name] = f"{type(error).__name__}: {reason}"
            print(f"{name}: {failed[name]}", flush=True)
    for arm in arms.values():
        arm.run(steps)  # warms up
    names, taken = list(arms), {name: [] for name in arms}
    for turn in range(rounds):
        for i in range(len(names)):
            name = names[(i + turn) % len(names)]
            taken[name].append(arms[name].run(steps))
    pairs = {name: zip(taken[AS_IS], taken[name], strict=True) for name in names[1:]}
    return {
        "device": jax.devices()[0].device_kind,
        "threads": len(os.sched_getaffinity(0)),
        "settings": studies.deciding(settings),
        "jax": jax.__version__,
        "milliseconds": 1e3 * sorted(taken[AS_IS])[rounds // 2],
        "compile_seconds": {name: arm.compile_seconds for name, arm in arms.items()},
        "ratios": {name: check.entry(a / b for a, b in each) for name, each in pairs.items()},
        "failed": failed,
    }


def table(found: dict) -> str:
    """Lay out the ratios as a markdown table, the fastest arm first."""
    lines = [f"| {found['milliseconds']:,.1f} ms as configured, over | ratio | compiles in s |"]
    lines.append("|---|---:|---:|")
    for name, ratio in sorted(found["ratios"].items(), key=lambda item: -item[1]["median"]):
        seconds = found["compile_seconds"][name]
        lines.append(f"| `{name}` | {check.text(ratio)} | {seconds:.0f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--try", dest="tried", action="append", help="an arm; default: FLAGS")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="in a turn")
    parser.add_argument("--out", type=pathlib.Path, help="file that gets every number as JSON")
    options, settings = parser.parse_known_args(argv)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads absl's own flags
    tried = options.tried or FLAGS.get(jax.default_backend(), ())
    for word in (word for name in tried for word in name.split()):
        if "=" not in word or not word.startswith(("config.", "xla_")):
            parser.error(f"--try takes config.KEY=VALUE and xla_FLAG=VALUE, got '{word}'.")
    found = measure(settings, tried, options.rounds, options.steps)
    print(table(found))
    if options.out:
        check.keep(options.out, found)
    return found


if __name__ == "__main__":
    cli.leave(cli.run(main))
