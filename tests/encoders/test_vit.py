"""ViT against transformers with random weights, and its published sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from twins import (
    RNG,
    as_torch,
    assert_close,
    assert_gradients_and_step,
    assert_round_trip,
    draw_images,
    edit_config,
    error,
    gradients_and_step,
    make_theirs,
    run,
)

from medvlp_jax import convert
from medvlp_jax.config import UserError
from medvlp_jax.encoders import vit
from medvlp_jax.layers import bicubic_matrix

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 48,
    "patch_size": 8,
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    return make_theirs("ViTModel", folder, **SMALL), folder


def outputs_of_theirs(theirs, images):
    """Return the pooler's output, the class token and the patches."""
    out = theirs(as_torch(images), interpolate_pos_encoding=True)
    return out.pooler_output, out.last_hidden_state[:, 0], out.last_hidden_state[:, 1:]


@pytest.mark.hf
@pytest.mark.parametrize("size", [(48, 48), (64, 64), (24, 40), (16, 144), (200, 208)])
def test_outputs_equal_transformers_at_the_native_and_other_sizes(pair, size):
    import torch

    theirs, folder = pair
    module, variables = convert.load(folder)
    images = draw_images(*size)
    with torch.no_grad():
        pooler, cls, patches = outputs_of_theirs(theirs, images)
    ours = run(module, variables, images)
    assert_close(ours.pooled, cls)
    assert_close(ours.tokens, patches)
    assert_close(run(module.clone(pooling="pooler"), variables, images).pooled, pooler)
    assert_close(run(module.clone(pooling="mean"), variables, images).pooled, patches.mean(1))


@pytest.mark.hf
@pytest.mark.parametrize(("layout", "remat"), [("unrolled", "none"), ("scan", "full")])
def test_every_gradient_and_a_step_of_adamw_equal_torch(pair, tmp_path, layout, remat):
    theirs, folder = pair
    module, variables = convert.load(folder, pooling="pooler", layout=layout, remat=remat)
    images = draw_images(24, 40)

    def outputs(model, params):
        if model is not None:
            pooler, _, patches = outputs_of_theirs(model, images)
            return pooler, patches
        out = module.apply({"params": params}, images, train=True)
        return out.pooled, out.tokens

    assert_gradients_and_step(*gradients_and_step(theirs, module, variables, tmp_path, outputs))


@pytest.mark.hf
@pytest.mark.parametrize("layout", ["unrolled", "scan"])
def test_weights_go_in_and_out_bit_for_bit(pair, tmp_path, layout):
    module, _ = assert_round_trip(pair[1], tmp_path, layout=layout)
    assert module.pooler


@pytest.mark.hf
@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_act", "relu"), ("qkv_bias", False), ("attention_probs_dropout_prob", 0.1)],
)
def test_settings_that_are_not_here_are_refused_by_name(pair, tmp_path, key, value):
    with pytest.raises(UserError, match=key):
        convert.load(edit_config(pair[1], tmp_path / "edited", **{key: value}))


def test_compute_in_bfloat16_stays_near(variables_of):
    images = draw_images(224, 256)
    module = vit.make("tiny")
    variables = variables_of(module, images)
    exact = run(module, variables, images)
    half = run(module.clone(dtype=jnp.bfloat16), variables, images)
    assert half.pooled.dtype == jnp.bfloat16
    assert error(half.pooled, exact.pooled) < 0.02
    assert error(half.tokens, exact.tokens) < 0.02


@pytest.mark.hf
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("old", "new"), [(14, 24), (24, 14), (7, 16), (16, 7), (5, 6), (2, 9)])
def test_bicubic_matrix_equals_torch(old, new, antialias):
    import torch

    table = RNG.normal(size=(1, 3, old, old))
    reference = torch.nn.functional.interpolate(
        torch.tensor(table), size=(new, new), mode="bicubic", antialias=antialias
    )
    matrix = bicubic_matrix(old, new, antialias=antialias).astype(np.float64)
    assert_close(np.einsum("yi,xj,bdij->bdyx", matrix, matrix, table), reference, 1e-6)
    np.testing.assert_allclose(matrix.sum(1), 1, rtol=1e-6)


@pytest.mark.hf
@pytest.mark.parametrize("variant", [name for name in vit.VARIANTS if name != "tiny"])
def test_published_sizes_have_the_parameters_of_transformers(variant):
    import torch
    import transformers

    module = vit.make(variant)
    config = transformers.ViTConfig(
        hidden_size=module.width,
        num_hidden_layers=module.depth,
        num_attention_heads=module.num_heads,
        intermediate_size=module.mlp_dim,
        patch_size=module.patch_size,
    )
    with torch.device("meta"):
        expected = transformers.ViTModel(config, add_pooling_layer=False).num_parameters()
    images = jnp.zeros((2, 224, 224, 3))
    out, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), images)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == expected
    assert out.pooled.shape == (2, module.width)
    assert out.tokens.shape == (2, (224 // module.patch_size) ** 2, module.width)


# Dosovitskiy et al. 2021, Table 1: 86 M, 307 M with a head; Touvron et al. 2021: 5 M, 22 M.
@pytest.mark.parametrize(
    ("variant", "count"),
    [("Ti/16", 5_524_416), ("S/16", 21_665_664), ("B/16", 85_798_656), ("L/16", 303_301_632)],
)
def test_published_sizes_have_the_published_number_of_parameters(variant, count):
    variables = jax.eval_shape(
        vit.make(variant).init, jax.random.key(0), jnp.zeros((1, 224, 224, 3))
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == count


def test_bad_input_is_refused_before_compiling():
    module = vit.make("tiny")
    for shape, message in [
        ((1, 225, 224, 3), "225 x 224 pixels do not tile into patches of 16 x 16"),
        ((1, 224, 224, 1), r"\[1, 224, 224, 1\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(shape))
    module = vit.make("tiny", pooling="pooler")
    with pytest.raises(ValueError, match="'pooler' needs pooler=True"):
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    with pytest.raises(UserError, match="Did you mean B/16"):
        vit.make("B16")
    with pytest.raises(UserError, match=r"ViT has no 'dephth'\. Did you mean depth"):
        vit.make("B/16", dephth=3)


def test_dropout_needs_training(variables_of):
    module = vit.make("tiny", image_size=32, dropout=0.5)
    images = jnp.ones((2, 32, 32, 3))
    variables = variables_of(module, images)

    @jax.jit
    def train(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return module.apply(variables, images, train=True, rngs=rngs).pooled

    assert not np.allclose(train(0), train(1))
    jax.jit(module.apply)(variables, images)  # would ask for a key
