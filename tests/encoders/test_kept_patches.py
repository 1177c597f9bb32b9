"""Training on some of the patches: the rest is as if no token had looked at them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from medvlp_jax.encoders import clip_vision, dinov2, dinov3, siglip, vit
from medvlp_jax.layers import Attention, draw_patches

SMALL = {"width": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
TALL = {"mlp_dim": 48, "image_size": 32}
ENCODERS = {
    "vit": (vit.ViT(**SMALL, **TALL), 1),
    "clip": (clip_vision.ClipVision(**SMALL, **TALL), 1),
    "siglip": (siglip.Siglip(**SMALL, **TALL), 0),
    "dinov2": (dinov2.DinoV2(**SMALL, image_size=32, registers=3), 4),
    "dinov3": (dinov3.DinoV3(**SMALL, mlp_dim=48, rope_rescale=1.0), 5),
}


@pytest.mark.parametrize("share", [0.5, 0.01, 1.0])
def test_each_image_keeps_its_own_patches_in_order(share):
    found = np.asarray(draw_patches(jax.random.key(0), 50, 20, share, prefix=2))
    assert found.shape == (50, 2 + max(1, round(20 * share)))
    assert (found[:, :2] == [0, 1]).all()
    assert (np.diff(found, axis=1) > 0).all()
    assert found.max() < 22
    assert (len({tuple(row) for row in found}) == 1) == (share == 1.0)
    counts = np.bincount(found[:, 2:].ravel() - 2, minlength=20)
    assert counts.min() > 0 or share < 0.1


@pytest.mark.parametrize("share", [0, -0.5, 1.5])
def test_a_share_that_cannot_be_is_refused(share):
    with pytest.raises(ValueError, match=f"kept_patches={share} must be above 0 and at most 1"):
        draw_patches(jax.random.key(0), 2, 4, share)


@pytest.mark.parametrize("name", ENCODERS)
def test_what_is_kept_is_encoded_as_if_the_rest_could_not_be_seen(name, variables_of, monkeypatch):
    module, prefix = ENCODERS[name]
    images = np.random.default_rng(0).normal(size=(3, 32, 40, 3)).astype(np.float32)
    variables = variables_of(module, images)
    kept = draw_patches(jax.random.key(1), 3, 20, 0.4, prefix=prefix)
    drawn = lambda key, *sizes, **options: kept
    monkeypatch.setattr("medvlp_jax.layers.patches.draw_patches", drawn)
    fewer = module.clone(kept_patches=0.4)
    rngs = {"dropout": jax.random.key(2)}
    ours = fewer.apply(variables, images, train=True, rngs=rngs)

    seen = jnp.zeros((3, prefix + 20), bool).at[jnp.arange(3)[:, None], kept].set(True)

    def hide(next_function, args, kwargs, context):
        if isinstance(context.module, Attention) and context.method_name == "__call__":
            return next_function(args[0], seen, **kwargs)
        return next_function(*args, **kwargs)

    with nn.intercept_methods(hide):
        whole = module.apply(variables, images, train=True, rngs=rngs)
    expected = np.take_along_axis(
        np.asarray(whole.tokens), np.asarray(kept)[:, prefix:, None] - prefix, axis=1
    )
    np.testing.assert_allclose(ours.tokens, expected, atol=1e-5)
    np.testing.assert_allclose(ours.pooled, whole.pooled, atol=1e-5)
    # In evaluation nothing is dropped.
    assert fewer.apply(variables, images).tokens.shape[1] == 20
