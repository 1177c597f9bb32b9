"""Contrastive losses: memory against the batch size, and what tiling costs in time.

  python -m benchmarks.contrastive [--parts memory time large] [--repeats 9] [--out FILE.json]

memory  compiled temporary memory of value and gradient on one of 8 emulated devices, D = 512
time    wall time of value and gradient on this machine, all variants by turns, medians of pairs
large   exact softmax at B = 65,536 in a process of its own: seconds and peak resident memory

Prints markdown tables and writes every number; parts that were measured before stay in the file,
and "measured" says of each which code, processor and versions it is of. "ring" is the loop over
neighbours that other code differentiates directly (clip-jax, open_clip): its backward pass keeps
the logits of every hop.
"""

import argparse
import functools
import json
import os
import pathlib
import resource
import subprocess
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import check, studies
from medvlp_jax import cli, sharding
from medvlp_jax.losses import contrastive, tiled
from medvlp_jax.losses.contrastive import ClinicalPrior, RowSoftmax, SameId

ROOT = pathlib.Path(__file__).parents[1]
WIDTH = 512
DEVICES = 8
MEMORY_BATCHES = (4_096, 16_384, 32_768, 65_536, 131_072, 262_144)
DENSE_LIMIT = 131_072  # compiled only, but the compiler counts in 32 bits above
LARGE = 65_536


def ring_sigmoid(image, text, scale, bias):
    """Sum the SigLIP loss over blocks of texts that travel from device to device; no recompute."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = sharding.BATCH_AXES
    devices = mesh.shape["data"] * mesh.shape["fsdp"]

    def local(x, y):
        total = 0.0
        for hop in range(devices):
            logits = scale * jnp.matmul(x, y.T, precision="highest") + bias
            sign = 2.0 * jnp.eye(len(x)) - 1.0 if hop == 0 else -1.0
            total -= jax.nn.log_sigmoid(sign * logits).sum()
            y = jax.lax.ppermute(y, axes, [(i, (i + 1) % devices) for i in range(devices)])
        return jax.lax.psum(total, axes) / (devices * len(x))

    return jax.shard_map(local, in_specs=P(axes), out_specs=P())(image, text)


def sigmoid(module, x, y, scale, bias, report, **fields):
    """SigLIP of either module."""
    return module.sigmoid(x, y, scale, bias, **fields)


def softmax(module, x, y, scale, bias, report, *, prior=None, **fields):
    """InfoNCE of either module; `prior` makes the targets from the report features."""
    return module.info_nce(x, y, scale, prior=prior and prior(report), **fields)


PRIORS = {
    "plain": None,
    "same id": lambda report: SameId(jnp.arange(len(report)) // 2),
    "CICL": ClinicalPrior,
    "CICL, rows sum to 1": lambda report: ClinicalPrior(report, normalise=True),
    "row softmax": lambda report: RowSoftmax(report, 0.2),
}


def differentiated(loss):
    """Compile value and gradients of image, text, scale and bias."""
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))


def memory() -> list[dict]:
    """Read temporary memory from the compiled programs; nothing is run."""
    mesh = sharding.make_mesh()
    split, whole = NamedSharding(mesh, sharding.BATCH), NamedSharding(mesh, P())
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    losses = {
        "sigmoid dense": functools.partial(sigmoid, contrastive),
        "sigmoid ring": lambda x, y, scale, bias, report: ring_sigmoid(x, y, scale, bias),
        "sigmoid tiled": functools.partial(sigmoid, tiled),
        "softmax dense": functools.partial(softmax, contrastive),
        "softmax tiled": functools.partial(softmax, tiled),
        "CICL dense": functools.partial(softmax, contrastive, prior=ClinicalPrior),
        "CICL tiled": functools.partial(softmax, tiled, prior=ClinicalPrior),
    }
    rows = []
    for batch in MEMORY_BATCHES:
        embedding = jax.ShapeDtypeStruct((batch, WIDTH), jnp.float32, sharding=split)
        arguments = embedding, embedding, number, number, embedding
        for name, loss in losses.items():
            if batch > DENSE_LIMIT and not name.endswith("tiled"):
                continue
            with jax.set_mesh(mesh):
                compiled = differentiated(loss).lower(*arguments).compile()
            size = compiled.memory_analysis().temp_size_in_bytes
            rows.append({"loss": name, "batch": batch, "mebibytes": round(size / 2**20, 1)})
            print(f"  {name} {batch}: {rows[-1]['mebibytes']} MiB", file=sys.stderr, flush=True)
    return rows


def embeddings(batch: int, seed: int = 0):
    """Unit-norm images and texts, and report features, [B, 512] each."""
    keys = jax.random.split(jax.random.key(seed), 3)
    x, y, report = (jax.random.normal(k, (batch, WIDTH)) for k in keys)
    return [v / jnp.linalg.norm(v, axis=1, keepdims=True) for v in (x, y, report)]


def race(variants: dict, batch: int, repeats: int) -> dict[str, list[float]]:
    """Time all variants by turns, forth and back, so that what else the machine does hits all."""
    x, y, report = embeddings(batch)
    arguments = x, y, jnp.float32(10.0), jnp.float32(-10.0), report
    compiled = {name: differentiated(loss) for name, loss in variants.items()}
    seconds = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name in list(compiled)[:: 1 if turn % 2 else -1]:
            began = time.perf_counter()
            jax.block_until_ready(compiled[name](*arguments))
            if turn:  # the first compiles
                seconds[name].append(time.perf_counter() - began)
    return seconds


def compare(seconds: dict, base: str, **labels) -> list[dict]:
    """Rows of median time, and of the quartiles of the ratio to `base` in the same turn."""
    rows = []
    for name, times in seconds.items():
        ratios = np.quantile(np.divide(times, seconds[base]), (0.5, 0.25, 0.75))
        low, high = ratios[1:].round(3).tolist()
        row = {"loss": name, "seconds": round(float(np.median(times)), 4)}
        row |= {f"times {base}": round(float(ratios[0]), 3), "low": low, "high": high}
        rows.append({**labels, **row, "turns": len(times)})
        print(f"  {rows[-1]}", file=sys.stderr, flush=True)
    return rows


def timings(repeats: int) -> dict[str, list[dict]]:
    """Tiled against dense where dense fits, by tile, and soft targets against plain ones."""
    against, by_tile, soft = [], [], []
    for batch in (512, 1_024, 2_048, 4_096):
        for name, loss in (("softmax", softmax), ("sigmoid", sigmoid)):
            arms = {"dense": contrastive, "tiled": tiled}
            arms = {arm: functools.partial(loss, module) for arm, module in arms.items()}
            against += compare(race(arms, batch, repeats), "dense", kind=name, batch=batch)
    arms = {f"tile {t}": functools.partial(softmax, tiled, tile=t) for t in (128, 256, 512, 1024)}
    by_tile += compare(race(arms, 4_096, repeats), f"tile {tiled.TILE}", batch=4_096)
    arms = {k: functools.partial(softmax, tiled, prior=v) for k, v in PRIORS.items()}
    soft += compare(race(arms, 4_096, repeats), "plain", batch=4_096)
    return {"against_dense": against, "by_tile": by_tile, "soft_targets": soft}


def large() -> dict:
    """Value and gradient of exact softmax at B = 65,536, alone in this process."""
    x, y, _ = embeddings(LARGE)
    jax.block_until_ready((x, y))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loss = differentiated(lambda x, y, scale, bias: tiled.info_nce(x, y, scale))
    began = time.perf_counter()
    value, _ = jax.block_until_ready(loss(x, y, jnp.float32(10.0), jnp.float32(0.0)))
    return {
        "batch": LARGE,
        "width": WIDTH,
        "loss": float(value),
        "seconds_with_compilation": round(time.perf_counter() - began, 1),
        "peak_rss_mebibytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "rss_before_mebibytes": before // 1024,
    }


def in_a_process(part: str, repeats: int) -> dict:
    """Measure a part in a fresh process: each needs its own devices or its own peak memory."""
    environment = dict(os.environ)
    if part == "memory":
        flag = f"--xla_force_host_platform_device_count={DEVICES}"
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {flag}"
    command = [
        sys.executable,
        "-m",
        "benchmarks.contrastive",
        "--measure",
        part,
        "--repeats",
        str(repeats),
    ]
    how = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "text": True}
    done = subprocess.run(command, check=True, **how)
    return json.loads(done.stdout.splitlines()[-1])


def grid(rows: list[dict], down: str, across: str, cell: str) -> str:
    """Lay out rows as a markdown table."""
    columns = list(dict.fromkeys(r[across] for r in rows))
    lines = [f"| {down} | {' | '.join(map(str, columns))} |", "|---:" * (len(columns) + 1) + "|"]
    for label in dict.fromkeys(r[down] for r in rows):
        cells = {r[across]: r[cell] for r in rows if r[down] == label}
        lines.append(f"| {label:,} | {' | '.join(str(cells.get(c, '')) for c in columns)} |")
    return "\n".join(lines)


def flat(rows: list[dict]) -> str:
    """Lay out rows of the same keys as a markdown table."""
    lines = [f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|"]
    return "\n".join(lines + [f"| {' | '.join(map(str, row.values()))} |" for row in rows])


def tables(results: dict) -> str:
    """Return all markdown tables there are results for."""
    parts = []
    if "memory" in results:
        parts.append("MiB a device, 8 devices, B down")
        parts.append(grid(results["memory"], "batch", "loss", "mebibytes"))
    for name in ("against_dense", "by_tile", "soft_targets"):
        if "time" in results:
            parts += [name.replace("_", " "), flat(results["time"][name])]
    if "large" in results:
        parts.append(flat([results["large"]]))
    return "\n\n".join(parts)


def before(out: pathlib.Path) -> dict:
    """Return what a file holds, with what each of its parts was measured with.

    Until November 2026 one word on the machine stood for all parts.
    """
    results = studies.read(out)
    machine = results.pop("machine", None)
    parts = dict.fromkeys(results.keys() - {"measured"}, machine) if machine else {}
    return {**results, "measured": parts | results.get("measured", {})}


def main(argv: list[str] | None = None) -> None:
    """Run the parts asked for; parts measured before stay in the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    measures = {"memory": memory, "time": timings, "large": large}
    parser.add_argument("--parts", nargs="+", default=list(measures), choices=list(measures))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--measure", choices=list(measures), help=argparse.SUPPRESS)
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/contrastive.json")
    )
    arguments = parser.parse_args(argv)
    if arguments.measure:
        measure = measures[arguments.measure]
        print(json.dumps(measure(arguments.repeats) if measure is timings else measure()))
        return
    from benchmarks import origin  # here, since what it imports would count as memory in `large`

    results = before(arguments.out)
    for part in arguments.parts:
        results[part] = in_a_process(part, arguments.repeats)
        results["measured"][part] = {"threads": len(os.sched_getaffinity(0)), **origin.measured()}
        check.keep(arguments.out, results)
    print(tables(results))


if __name__ == "__main__":
    cli.leave(cli.run(main))
