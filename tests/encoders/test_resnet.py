"""ResNet against transformers with random weights, and its published sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medvlp_jax import config, convert
from medvlp_jax.encoders import resnet

RNG = np.random.default_rng(0)


def assert_close(ours, reference, tolerance=1e-5):
    """Hold max |a - b| <= tolerance * max |b|."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape
    assert np.abs(ours - reference).max() <= tolerance * np.abs(reference).max()


def channels_last(tensor):
    return tensor.detach().numpy().transpose(0, 2, 3, 1)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Make a random ResNetModel with non-trivial statistics, and ours with its weights."""
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(0)
    theirs = transformers.ResNetModel(
        transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[16, 16, 32, 64], depths=[2, 1, 2, 1]
        )
    ).eval()
    for name, tensor in theirs.state_dict().items():
        if name.endswith(("normalization.weight", "running_var")):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith(("normalization.bias", "running_mean")):
            tensor.normal_(0, 0.2)
    folder = tmp_path_factory.mktemp("resnet")
    theirs.save_pretrained(folder)
    return theirs, *convert.load(folder)


@pytest.mark.hf
@pytest.mark.parametrize("size", [(64, 64), (70, 93)])
def test_outputs_equal_transformers(pair, size):
    import torch

    theirs, module, variables = pair
    images = RNG.normal(size=(2, *size, 3)).astype(np.float32)
    with torch.no_grad():
        reference = theirs(torch.tensor(images).permute(0, 3, 1, 2), output_hidden_states=True)
    ours = jax.jit(module.apply)(variables, images)
    assert_close(ours.pooled, reference.pooler_output[:, :, 0, 0])
    last = channels_last(reference.last_hidden_state)
    assert_close(ours.tokens, last.reshape(2, -1, 64))
    assert len(ours.levels) == 4
    for level, expected in zip(ours.levels, reference.hidden_states[1:], strict=True):
        assert_close(level, channels_last(expected))


@pytest.mark.hf
def test_training_outputs_gradients_and_running_averages_equal_torch(pair):
    import copy

    import torch

    theirs, module, variables = pair
    theirs = copy.deepcopy(theirs).double().train()
    images = RNG.normal(size=(4, 64, 64, 3)).astype(np.float32)
    weight = RNG.normal(size=(4, 64)).astype(np.float32)
    pooled = theirs(torch.tensor(images).double().permute(0, 3, 1, 2)).pooler_output[:, :, 0, 0]
    (pooled * torch.tensor(weight)).sum().backward()

    def loss(params):
        out, updates = module.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        return (out.pooled * weight).sum(), (out.pooled, updates["batch_stats"])

    gradient, (ours, stats) = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    assert_close(ours, pooled.detach())
    stem, state = theirs.embedder.embedder, theirs.state_dict()
    assert_close(stats["stem_norm"]["var"], stem.normalization.running_var)
    deepest = "encoder.stages.3.layers.0.layer.2.normalization"
    assert_close(stats["stage_3_block_0"]["norm3"]["mean"], state[f"{deepest}.running_mean"])
    assert_close(stats["stage_3_block_0"]["norm3"]["var"], state[f"{deepest}.running_var"])
    stem_gradient = stem.convolution.weight.grad.numpy().transpose(2, 3, 1, 0)
    assert_close(gradient["stem_conv"]["kernel"], stem_gradient)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 12), (7, 7), (1, 2)])
def test_max_pool_equals_reduce_window(height, width):
    x = np.maximum(RNG.normal(size=(2, height, width, 3)), 0).astype(np.float32)
    expected = jax.lax.reduce_window(
        x, -np.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
    )
    np.testing.assert_array_equal(resnet.max_pool(x), expected)


# Without the classifier: torchvision's 25,557,032 and 44,549,160 less 2,049,000.
@pytest.mark.parametrize(("variant", "count"), [("50", 23_508_032), ("101", 42_500_160)])
def test_published_sizes_have_the_published_number_of_parameters(variant, count):
    module = resnet.make(variant)
    images = jnp.zeros((2, 224, 224, 3))
    variables = jax.eval_shape(module.init, jax.random.key(0), images)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == count
    out = jax.eval_shape(module.apply, variables, images)
    assert out.pooled.shape == (2, 2048) == (2, module.width)
    assert out.tokens.shape == (2, 49, 2048)
    assert [level.shape for level in out.levels] == [
        (2, 56, 56, 256),
        (2, 28, 28, 512),
        (2, 14, 14, 1024),
        (2, 7, 7, 2048),
    ]
    assert tuple(level.shape[-1] for level in out.levels) == module.level_widths


def test_the_momentum_of_every_norm_is_a_field(variables_of):
    images = RNG.normal(size=(2, 32, 32, 3)).astype(np.float32)
    moved = []
    for momentum in (0.1, 0.2):
        module = resnet.make("tiny", bn_momentum=momentum)
        variables = variables_of(module, images)
        _, updates = jax.jit(
            lambda v, m=module: m.apply(v, images, train=True, mutable=["batch_stats"])
        )(variables)
        moved.append(
            jax.tree.map(lambda a, b: a - b, updates["batch_stats"], variables["batch_stats"])
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(2 * a, b, rtol=1e-4, atol=1e-6), *moved)


def test_examples_are_encoded_independently_in_evaluation(variables_of):
    images = RNG.normal(size=(3, 32, 32, 3)).astype(np.float32)
    module = config.build("medvlp_jax.encoders", "resnet", variant="tiny")
    variables = variables_of(module, images)
    whole = jax.jit(module.apply)(variables, images)
    alone = jax.jit(module.apply)(variables, images[1:2])
    assert_close(alone.pooled, whole.pooled[1:2])


def test_compute_in_bfloat16_stays_near(variables_of):
    images = RNG.normal(size=(2, 64, 64, 3)).astype(np.float32)
    module = resnet.make("tiny")
    variables = variables_of(module, images)
    exact = jax.jit(module.apply)(variables, images).pooled
    half = jax.jit(module.clone(dtype=jnp.bfloat16).apply)(variables, images).pooled
    assert half.dtype == jnp.bfloat16
    assert_close(half, exact, 0.02)  # measured 0.006; bfloat16 keeps 8 bits, 0.4 % a rounding


def test_bad_input_is_refused_before_compiling():
    with pytest.raises(ValueError, match=r"\[1, 64, 64, 1\]"):
        resnet.make("tiny").init(jax.random.key(0), jnp.zeros((1, 64, 64, 1)))
    with pytest.raises(config.UserError, match="No ResNet variant '52'"):
        resnet.make("52")
