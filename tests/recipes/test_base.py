"""What all recipes share."""

import jax.numpy as jnp
import pytest

from medvlp_jax.config import UserError
from medvlp_jax.losses import contrastive
from medvlp_jax.recipes import base


def test_a_tile_of_zero_is_the_dense_loss_and_any_other_the_tiled_one():
    assert base.contrastive_loss("sigmoid", 0) is contrastive.sigmoid
    x = jnp.eye(5)
    tiled = base.contrastive_loss("info_nce", 2)(x, x, 3.0)
    assert abs(tiled - contrastive.info_nce(x, x, 3.0)) < 1e-6


def test_a_negative_tile_is_refused():
    with pytest.raises(UserError, match="loss_tile must be at least 1, or 0 for dense, got -3"):
        base.check_tile(-3)
