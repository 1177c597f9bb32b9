"""Which operations of the compiled program an encoder's forward and backward pass take on a CPU.

  python benchmarks/encoder_profile.py [--model vit ...] [--depth 2] [--rounds 3] [--out FILE.json]

Explains the ratios of benchmarks/encoders.py together with encoder_parts.py: the same inputs, the
first blocks of the model alone. Printed are the shares of the instructions' time by kind of
operation; a product that waits for a thread counts with its waiting.
"""

import argparse
import collections
import json
import pathlib
import re
import tempfile
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from medvlp_jax import cli
from medvlp_jax.encoders import modernbert, vit
from medvlp_jax.encoders.base import Tokens
from medvlp_jax.writing import replaced

RNG = np.random.default_rng(0)
WORDS = Tokens(jnp.asarray(RNG.integers(5, 50_000, (4, 256)), jnp.int32), jnp.ones((4, 256), bool))
MODELS = {  # title, depth -> module, input as in benchmarks/encoders.py
    "vit": (
        "ViT-B/16",
        lambda depth: vit.make("B/16", depth=depth),
        jnp.asarray(RNG.normal(size=(8, 224, 224, 3)), jnp.float32),
    ),
    "modernbert": ("ModernBERT-base", lambda depth: modernbert.make("base", depth=depth), WORDS),
}
# What these run is an instruction of its own, and is counted there.
CONTAINERS = re.compile(r" (while|conditional|call)\(")
KINDS = ("matrix products", "copies and transposes", "all else")
# On a GPU they are calls of a library, among them cuDNN's attention, or Triton's.
PRODUCT = re.compile(r" (dot|convolution)\(|__cublas|__cudnn|__triton_gemm")


def instructions(program: str) -> Iterator[tuple[str, str]]:
    """Yield name and line of each instruction of a compiled program that does its own work."""
    for line in program.splitlines():
        match = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line)
        if match and not CONTAINERS.search(line):
            yield match.group(1), line


def kinds_of(program: str) -> dict[str, str]:
    """Return the kind of each instruction of a compiled program, by its name."""
    bodies, name = collections.defaultdict(str), ""
    for line in program.splitlines():
        if line.endswith("{") and "(" in line:
            name = line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
        bodies[name] += f"{line}\n"
    found = {}
    for name, line in instructions(program):
        called = re.search(r"calls=%?([\w.\-]+)", line)
        text = bodies[called.group(1)] if called else line
        if PRODUCT.search(text) or "matmul" in line:
            found[name] = KINDS[0]
        elif name.startswith(("copy", "transpose")):
            found[name] = KINDS[1]
        else:
            found[name] = KINDS[2]
    return found


def profile(module, inputs, rounds: int) -> dict[str, float]:
    """Return milliseconds of instructions a pass, by kind."""
    variables = module.init(jax.random.key(0), inputs)
    loss = lambda params: jnp.square(module.apply({"params": params}, inputs).tokens).mean()
    step = jax.jit(jax.value_and_grad(loss)).lower(variables["params"]).compile()
    jax.block_until_ready(step(variables["params"]))
    kinds = kinds_of(step.as_text())
    spent = dict.fromkeys(KINDS, 0.0)
    run = lambda: jax.block_until_ready(step(variables["params"]))
    for name, milliseconds in by_instruction(run, kinds, rounds).items():
        spent[kinds[name]] += milliseconds
    return spent


def by_instruction(run, names, rounds: int) -> dict[str, float]:
    """Return milliseconds that each of the instructions took in a run; they may overlap.

    Args:
      run: function that runs the program once and waits for it.
      names: of the instructions.
      rounds: runs.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(rounds):
                run()
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
    spent = collections.Counter()
    for plane in planes:
        for line in plane.lines:
            for event in line.events:
                # On a GPU an event is a kernel, and says which instruction it belongs to.
                name = event.name if event.name in names else dict(event.stats).get("hlo_op")
                if name in names:
                    spent[name] += event.duration_ns / 1e6 / rounds
    return dict(spent)


def main(argv=None):
    """Profile, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", choices=tuple(MODELS), default=tuple(MODELS))
    parser.add_argument("--depth", type=int, default=2, help="blocks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args(argv)
    results = {}
    print("| blocks of | ms of instructions | " + " | ".join(KINDS) + " |")
    print("|---|---:|" + "---:|" * len(KINDS))
    for name in options.model:
        title, make, inputs = MODELS[name]
        spent = profile(make(options.depth), inputs, options.rounds)
        whole = sum(spent.values())
        shares = " | ".join(f"{spent[kind] / whole:.0%}" for kind in KINDS)
        print(f"| {options.depth} x {title} | {whole:,.0f} | {shares} |", flush=True)
        results[name] = spent
    if options.out:
        with replaced(options.out) as scratch:
            scratch.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    cli.leave(cli.run(main))
