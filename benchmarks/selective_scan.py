"""Mamba's selective scan in chunks against a sequential `lax.scan`, both under `jit`.

    python benchmarks/selective_scan.py --batch=4 --length=6144

The shapes are those of CFCML's first stage: 64 inner channels, a state of 16.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from medvlp_jax.encoders.mamba3d import selective_scan


def sequential(u, delta, a, b, c):
    """Run the recurrence of `selective_scan` token by token."""

    def step(state, inputs):
        u, delta, b, c = inputs
        state = jnp.exp(delta[..., None] * a) * state + (delta * u)[..., None] * b[:, None]
        return state, jnp.einsum("ben,bn->be", state, c)

    inputs = tuple(x.swapaxes(0, 1) for x in (u, delta, b, c))
    state = jnp.zeros((u.shape[0], *a.shape))
    return jax.lax.scan(step, state, inputs)[1].swapaxes(0, 1)


def milliseconds(f, inputs, repeats=5):
    """Return the median time of a call, without compilation."""
    f = jax.jit(f)
    jax.block_until_ready(f(*inputs))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(f(*inputs))
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def main():
    """Print a table: forward, and forward with backward, in milliseconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=6144)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    shape = (options.batch, options.length)
    a = -jnp.broadcast_to(jnp.arange(1.0, 17.0), (64, 16))
    inputs = (draw(*shape, 64), jnp.exp(draw(*shape, 64) - 4), a, draw(*shape, 16))
    inputs += (draw(*shape, 16),)
    ways = {"sequential": sequential}
    for chunk in (1, 16, 64, 256, 1024):
        ways[f"chunks of {chunk}"] = functools.partial(selective_scan, chunk=chunk)
    print(f"{jax.devices()[0].device_kind}, batch {options.batch}, {options.length} tokens")
    for name, f in ways.items():
        gradient = jax.grad(lambda *x: jnp.square(f(*x)).sum(), argnums=range(5))  # noqa: B023
        forward, both = (milliseconds(g, inputs) for g in (f, gradient))
        print(f"{name:>16}  forward {forward:8.1f}  with backward {both:8.1f}")


if __name__ == "__main__":
    main()
