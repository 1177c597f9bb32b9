"""How arrays lie in memory, where the compiler would choose badly."""

import jax
from jax.experimental.layout import Layout, with_layout_constraint


def row_major(x):
    """Return x, which lies in memory with its last axis together, as its gradient does.

    XLA lets what is summed over lie together, which on a GPU makes the axis of examples the last of
    a transformer's tokens: its positions, scales and biases have gradients that sum over examples.
    Then every product has to transpose what it reads (docs/performance.md). A no-op on other
    devices, whose compilers need no such word.
    """
    if jax.default_backend() != "gpu":
        return x
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def sum_of_rows(x):
    """Sum [..., D] over all axes but the last."""
    return row_major(x).sum(tuple(range(x.ndim - 1)))
