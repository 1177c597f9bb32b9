"""The two costly parts of CFCML's 3-D net beside what is plain: Mamba's scan and the convolution.

    python benchmarks/selective_scan.py [--batch=4] [--length=6144] [--out FILE.json]

The scan in chunks beside a sequential `lax.scan`, both under `jit`, at the shapes of the published
net's first stage: 64 inner channels, a state of 16. The convolution of volumes as a sum over slices
beside XLA's own, at the shapes of `cfcml:men_phantom` (12 cases of three sequences). All take
turns; times are medians, a ratio is the first one's time over this one's.
"""

import argparse
import functools
import json
import pathlib
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from medvlp_jax import cli
from medvlp_jax.encoders.mamba3d import convolve, convolve_by_slices, selective_scan
from medvlp_jax.writing import replaced

CHUNKS = (1, 8, 16, 64, 256)
# Cases times sequences, the volume in, the channels out, the stride.
CONVOLUTIONS = {
    "stem": ((36, 32, 32, 24, 1), 4, 2),
    "first stage": ((36, 16, 16, 12, 4), 8, 2),
    "first stage, second block": ((36, 8, 8, 6, 8), 8, 1),
}


def sequential(u, delta, a, b, c):
    """Run the recurrence of `selective_scan` token by token."""

    def step(state, inputs):
        u, delta, b, c = inputs
        state = jnp.exp(delta[..., None] * a) * state + (delta * u)[..., None] * b[:, None]
        return state, jnp.einsum("ben,bn->be", state, c)

    inputs = tuple(x.swapaxes(0, 1) for x in (u, delta, b, c))
    state = jnp.zeros((u.shape[0], *a.shape))
    return jax.lax.scan(step, state, inputs)[1].swapaxes(0, 1)


def milliseconds(ways, inputs, rounds: int) -> dict[str, dict[str, float]]:
    """Return {way: {"forward", "with backward"}}, medians of calls by turns, none compiling."""
    arms = {}
    for name, f in ways.items():
        over = tuple(range(len(inputs)))
        gradient = jax.grad(lambda *x, f=f: jnp.square(f(*x)).sum(), argnums=over)
        for kind, arm in (("forward", jax.jit(f)), ("with backward", jax.jit(gradient))):
            jax.block_until_ready(arm(*inputs))
            arms[name, kind] = arm
    times = {key: [] for key in arms}
    for _ in range(rounds):
        for key, arm in arms.items():
            start = time.perf_counter()
            jax.block_until_ready(arm(*inputs))
            times[key].append((time.perf_counter() - start) * 1e3)
    found = {name: {} for name in ways}
    for (name, kind), each in times.items():
        found[name][kind] = statistics.median(each)
    return found


def scans(batch: int, length: int, rounds: int) -> dict:
    """Time the scans; `ratio` is the sequential one's time over that of the chunks."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    a = -jnp.broadcast_to(jnp.arange(1.0, 17.0), (64, 16))
    inputs = (draw(batch, length, 64), jnp.exp(draw(batch, length, 64) - 4), a)
    inputs += (draw(batch, length, 16), draw(batch, length, 16))
    ways = {f"chunks of {n}": functools.partial(selective_scan, chunk=n) for n in CHUNKS}
    return compared(milliseconds({"sequential": sequential, **ways}, inputs, rounds))


def convolutions(rounds: int) -> dict:
    """Time the convolutions; `ratio` is XLA's time over ours."""
    found = {}
    for name, (shape, features, stride) in CONVOLUTIONS.items():
        keys = jax.random.split(jax.random.key(0))
        x = jax.random.normal(keys[0], shape)
        kernel = jax.random.normal(keys[1], (3, 3, 3, shape[-1], features))
        ways = {"XLA's": convolve, "by slices": convolve_by_slices}
        ways = {way: functools.partial(f, stride=stride) for way, f in ways.items()}
        found[name] = compared(milliseconds(ways, (x, kernel), rounds))
    return found


def compared(times: dict) -> dict:
    """Add each way's ratio to the first."""
    first = next(iter(times.values()))
    for each in times.values():
        each["ratio"] = {kind: first[kind] / each[kind] for kind in first if kind != "ratio"}
    return times


def main(argv: list[str] | None = None) -> None:
    """Print tables and keep them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=6144)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args(argv)
    found = {
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}",
        f"scan, batch {options.batch}, {options.length} tokens": scans(
            options.batch, options.length, options.rounds
        ),
        **{f"convolution, {k}": v for k, v in convolutions(options.rounds).items()},
    }
    for title, ways in found.items():
        if title == "device":
            continue
        print(title)
        for name, each in ways.items():
            cells = (
                f"{kind} {each[kind]:9.1f} ms ({r:5.2f}x)" for kind, r in each["ratio"].items()
            )
            print(f"{name:>16}  {'   '.join(cells)}")
    if options.out:
        with replaced(options.out) as scratch:
            scratch.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    cli.leave(cli.run(main))
