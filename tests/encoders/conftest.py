"""Random variables without compiling an `init`, which costs seconds for an encoder."""

import jax
import numpy as np
import pytest
import twins

START = twins.RNG.bit_generator.state


@pytest.fixture(autouse=True)
def same_draws():
    """Start each test at the same draw, whichever tests ran before it."""
    twins.RNG.bit_generator.state = START


def fill(path, leaf):
    """Draw one array: ones for scales and variances, small numbers for the rest."""
    if path[-1].key in ("scale", "var"):
        return np.ones(leaf.shape, np.float32)
    fan_in = int(np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 100
    rng = np.random.default_rng(leaf.size)
    return (rng.normal(size=leaf.shape) / np.sqrt(fan_in)).astype(np.float32)


@pytest.fixture(scope="session")
def variables_of():
    """Return a function of (module, example input) that gives random variables."""

    def draw(module, example):
        shapes = jax.eval_shape(module.init, jax.random.key(0), example)
        return jax.tree_util.tree_map_with_path(fill, shapes)

    return draw
