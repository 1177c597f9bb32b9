"""Parameter trees by path: naming, freezing, counting, replacing subtrees.

A path is "image/stage1/block0/conv1/kernel". Patterns are regular expressions searched in it.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from medvlp_jax.config import UserError, nearest

Tree = Mapping[str, Any]


def flatten(tree: Tree) -> dict[str, Any]:
    """Return {path: leaf}."""
    return flatten_dict(tree, sep="/")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten`."""
    return unflatten_dict(flat, sep="/")


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Say whether any pattern is found in the path."""
    return any(re.search(pattern, path) for pattern in patterns)


def check_patterns(tree: Tree, patterns: Sequence[str], setting: str) -> None:
    """Refuse patterns that match no parameter: a typo there would silently train everything.

    Raises:
      UserError: naming the pattern and the nearest top-level paths.
    """
    paths = list(flatten(tree))
    for pattern in patterns:
        try:
            found = any(re.search(pattern, path) for path in paths)
        except re.error as error:
            raise UserError(
                f"{setting} pattern '{pattern}' is no regular expression: {error}."
            ) from None
        if not found:
            prefixes = sorted({"/".join(path.split("/")[:2]) for path in paths})
            raise UserError(
                f"{setting} pattern '{pattern}' matches no parameter. {nearest(pattern, prefixes)}"
            )


def split(tree: Tree, frozen: Sequence[str]) -> tuple[dict, dict]:
    """Return (trainable, frozen) parts of a tree; both nested, together the whole."""
    flat = flatten(tree)
    fixed = {path for path in flat if matches(path, frozen)}
    part = lambda keep: unflatten({k: v for k, v in flat.items() if (k in fixed) == keep})
    return part(False), part(True)


def merge(trainable: Tree, frozen: Tree) -> dict:
    """Inverse of `split`."""
    return unflatten({**flatten(trainable), **flatten(frozen)})


def count(tree: Tree) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def replace(tree: Tree, name: str, values: Tree, source: str) -> dict:
    """Put `values` in place of the subtree `name`, shapes and names equal or refused.

    Args:
      tree: nested parameters.
      name: top-level key, such as "text".
      values: the new subtree.
      source: where the values come from, for the message.

    Raises:
      UserError: listing what is missing, unused or of another shape.
    """
    old, new = flatten(tree[name]), flatten(values)
    problems = [f"missing {path}" for path in sorted(old.keys() - new.keys())]
    problems += [f"unused {path}" for path in sorted(new.keys() - old.keys())]
    problems += [
        f"{path} is {tuple(new[path].shape)}, the model has {tuple(old[path].shape)}"
        for path in sorted(old.keys() & new.keys())
        if tuple(old[path].shape) != tuple(new[path].shape)
    ]
    if problems:
        raise UserError(f"{source} does not fit '{name}': {'; '.join(problems)}.")
    return {**tree, name: values}
