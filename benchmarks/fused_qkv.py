"""Query, key and value of self-attention as one matrix product beside three, on any device.

  python benchmarks/fused_qkv.py [--rounds 15] [--dtype float32] [--out FILE.json]

A checkpoint keeps the three apart, as Hugging Face does, so that the fused way lays their kernels
side by side in the step. Both run by turns, forward with the gradients of input and parameters. On
a CPU the processor's time counts, elsewhere the clock's. A ratio is three products' time over one's
in the same round: above 1 fusing pays.
"""

import argparse
import json
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from medvlp_jax import cli
from medvlp_jax.writing import replaced

# Rows of the batch times tokens, and the width.
SHAPES = {
    "ViT-B/16, 16 images": (16 * 197, 768),
    "ViT-S/16, 32 images": (32 * 197, 384),
    "BERT-base, 16 texts of 128": (16 * 128, 768),
    "the text encoder of LGDEA's demo, 64 texts of 48": (64 * 48, 96),
}
NAMES = ("query", "key", "value")


def apart(params, x):
    """Return query, key and value [N, D] by three products of x [N, D]."""
    return tuple(x @ params[name]["kernel"] + params[name]["bias"] for name in NAMES)


def fused(params, x):
    """Return the same by one product."""
    kernel = jnp.concatenate([params[name]["kernel"] for name in NAMES], 1)
    bias = jnp.concatenate([params[name]["bias"] for name in NAMES])
    return tuple(jnp.split(x @ kernel + bias, 3, -1))


WAYS = (apart, fused)


def gradients(way):
    """Return a compiled (params, x, w) -> gradients of sum(w * outputs) by params and x."""
    loss = lambda params, x, w: sum((a * b).sum() for a, b in zip(way(params, x), w, strict=True))
    return jax.jit(jax.grad(loss, argnums=(0, 1)))


def inputs(rows: int, width: int, dtype) -> tuple:
    """Return params, x [N, D] and w [3, N, D]."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    params = {
        name: {"kernel": draw(width, width) / width**0.5, "bias": draw(width)} for name in NAMES
    }
    return params, draw(rows, width), draw(3, rows, width)


def compare(given: tuple, rounds: int) -> dict[str, float]:
    """Return the median and quartiles of the ratio, and the median time of three products."""
    ways = [gradients(way) for way in WAYS]
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    for way in ways:
        jax.block_until_ready(way(*given))
    times = []
    for turn in range(rounds):
        seconds = {}
        for which in (0, 1) if turn % 2 else (1, 0):
            began = clock()
            jax.block_until_ready(ways[which](*given))
            seconds[which] = clock() - began
        times.append((seconds[0], seconds[1]))
    low, ratio, high = np.percentile([a / b for a, b in times], (25, 50, 75))
    three = float(np.median([a for a, _ in times]))
    return {"ratio": ratio, "low": low, "high": high, "three_seconds": three}


def main(argv=None):
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=pathlib.Path, help="file that gets every number as JSON")
    options = parser.parse_args(argv)
    # One core on a CPU, before XLA makes its threads: their waiting would count.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    results = {"device": jax.devices()[0].device_kind, "dtype": options.dtype}
    results |= {"rounds": options.rounds, "shapes": {}}
    print("| | three products | three over one |\n|---|---:|---:|")
    for name, (rows, width) in SHAPES.items():
        found = compare(inputs(rows, width, options.dtype), options.rounds)
        results["shapes"][name] = found
        spread = f"{found['ratio']:.2f} ({found['low']:.2f}-{found['high']:.2f})"
        print(f"| {name} | {found['three_seconds'] * 1e3:.0f} ms | {spread} |", flush=True)
    if options.out:
        with replaced(options.out) as temporary:
            temporary.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    cli.leave(cli.run(main))
