"""ViT against transformers with random weights, and its published sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medvlp_jax import convert
from medvlp_jax.config import UserError
from medvlp_jax.encoders import vit
from medvlp_jax.layers import bicubic_matrix

RNG = np.random.default_rng(0)


def assert_close(ours, reference, tolerance=1e-5):
    """Hold max |a - b| <= tolerance * max |b|."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape
    assert np.abs(ours - reference).max() <= tolerance * np.abs(reference).max()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Make a random ViTModel, every tensor moved off its initial value, and its folder."""
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(0)
    theirs = transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=48,
            patch_size=8,
        )
    ).eval()
    for tensor in theirs.state_dict().values():
        tensor += 0.1 * torch.randn_like(tensor)
    folder = tmp_path_factory.mktemp("vit")
    theirs.save_pretrained(folder)
    return theirs, folder


@pytest.mark.hf
@pytest.mark.parametrize("size", [(48, 48), (64, 64), (24, 40), (16, 144), (96, 56)])
def test_outputs_equal_transformers_at_the_native_and_other_sizes(pair, size):
    import torch

    theirs, folder = pair
    module, variables = convert.load(folder)
    images = RNG.normal(size=(2, *size, 3)).astype(np.float32)
    with torch.no_grad():
        reference = theirs(torch.tensor(images).permute(0, 3, 1, 2), interpolate_pos_encoding=True)
    ours = jax.jit(module.apply)(variables, images)
    assert_close(ours.pooled, reference.last_hidden_state[:, 0])
    assert_close(ours.tokens, reference.last_hidden_state[:, 1:])
    pooler = jax.jit(module.clone(pooling="pooler").apply)(variables, images)
    assert_close(pooler.pooled, reference.pooler_output)
    mean = jax.jit(module.clone(pooling="mean").apply)(variables, images)
    assert_close(mean.pooled, reference.last_hidden_state[:, 1:].mean(1))


@pytest.mark.hf
@pytest.mark.parametrize("layout", ["unrolled", "scan"])
def test_gradients_equal_torch(pair, layout):
    import torch

    theirs, folder = pair
    module, variables = convert.load(folder, layout=layout)
    images = RNG.normal(size=(2, 48, 48, 3)).astype(np.float32)
    weight = RNG.normal(size=(2, 32)).astype(np.float32)
    theirs.zero_grad()
    out = theirs(torch.tensor(images).permute(0, 3, 1, 2)).last_hidden_state[:, 0]
    (out * torch.tensor(weight)).sum().backward()

    @jax.jit
    @jax.grad
    def gradient_of(params):
        return (module.apply({"params": params}, images, train=True).pooled * weight).sum()

    gradient = gradient_of(variables["params"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert_close(gradient["position_embedding"], theirs.embeddings.position_embeddings.grad)
    expected = theirs.layers[1].mlp.fc1.weight.grad.T
    blocks = gradient["stack"]
    ours = blocks["blocks"] if layout == "scan" else blocks["block_1"]
    kernel = ours["mlp"]["up"]["kernel"]
    assert_close(kernel[1] if layout == "scan" else kernel, expected)


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
    variables = jax.eval_shape(module.init, jax.random.key(0), images)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == expected
    out = jax.eval_shape(module.apply, variables, images)
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
