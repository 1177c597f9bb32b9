"""Paths, freezing, replacing."""

import jax.numpy as jnp
import numpy as np
import pytest

from medvlp_jax.config import UserError
from medvlp_jax.training import params

TREE = {"text": {"block": {"kernel": jnp.ones((2, 3))}}, "head": {"bias": jnp.zeros(4)}}


def test_split_and_merge_are_inverse():
    trainable, frozen = params.split(TREE, ["^text/"])
    assert set(params.flatten(trainable)) == {"head/bias"}
    assert set(params.flatten(frozen)) == {"text/block/kernel"}
    merged, whole = (params.flatten(t) for t in (params.merge(trainable, frozen), TREE))
    assert merged.keys() == whole.keys()
    for path, value in whole.items():
        np.testing.assert_array_equal(merged[path], value)


def test_count_counts_scalars():
    assert params.count(TREE) == 10


def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest():
    with pytest.raises(
        UserError, match=r"optim.freeze pattern 'txt/' matches no parameter.*text/block"
    ):
        params.check_patterns(TREE, ["txt/"], "optim.freeze")


def test_a_broken_pattern_is_refused():
    with pytest.raises(UserError, match="is no regular expression"):
        params.check_patterns(TREE, ["("], "optim.freeze")


def test_replace_lists_every_difference_at_once():
    with pytest.raises(UserError, match=r"missing block/kernel; unused kernel"):
        params.replace(TREE, "text", {"kernel": np.ones(1)}, "init.text=x")
    with pytest.raises(UserError, match=r"block/kernel is \(3, 3\), the model has \(2, 3\)"):
        params.replace(TREE, "text", {"block": {"kernel": np.ones((3, 3))}}, "init.text=x")
    replaced = params.replace(TREE, "text", {"block": {"kernel": np.zeros((2, 3))}}, "x")
    assert replaced["text"]["block"]["kernel"].sum() == 0
