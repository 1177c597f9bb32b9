"""ResNet against transformers with random weights, and its published sizes."""

import copy

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
    gradients_and_step,
    make_theirs,
    run,
)

from medvlp_jax import config, convert
from medvlp_jax.encoders import base, resnet

SMALL = {"embedding_size": 8, "hidden_sizes": [16, 16, 32, 64], "depths": [2, 1, 2, 1]}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Make a random ResNetModel with non-trivial statistics, and ours with its weights."""
    folder = tmp_path_factory.mktemp("resnet")
    return make_theirs("ResNetModel", folder, **SMALL), *convert.load(folder)


def outputs_of_theirs(theirs, images):
    """Return pooled and the four levels, channels last."""
    out = theirs(as_torch(images), output_hidden_states=True)
    return out.pooler_output[:, :, 0, 0], *(h.permute(0, 2, 3, 1) for h in out.hidden_states[1:])


def draw_images_off_kinks(theirs, *size, batch, margin=1e-5):
    """Draw images until no input of a ReLU and no two of a maximum are nearer than float32 errs.

    The gradient jumps where one of some 1e5 inputs changes side: one in 1e-6 of zero is not rare.
    """
    import torch

    nearest = []

    def relu(module, inputs, output):
        nearest.append(inputs[0].abs().min().item())

    def pool(module, inputs, output):
        windows = torch.nn.functional.unfold(inputs[0], 3, padding=1, stride=2)
        windows = windows.unflatten(1, (-1, 9)).topk(2, dim=2).values
        apart = (windows[:, :, 0] - windows[:, :, 1])[windows[:, :, 0] > 0]
        nearest.append(apart.min().item())

    hooks = [
        module.register_forward_hook(relu if isinstance(module, torch.nn.ReLU) else pool)
        for module in theirs.modules()
        if isinstance(module, (torch.nn.ReLU, torch.nn.MaxPool2d))
    ]
    for _ in range(100):
        nearest.clear()
        images = draw_images(*size, batch=batch)
        with torch.no_grad():
            theirs(as_torch(images))
        if min(nearest) > margin:
            break
    else:
        raise AssertionError(f"No draw of 100 keeps {margin} from every kink.")
    for hook in hooks:
        hook.remove()
    return images


@pytest.mark.hf
@pytest.mark.parametrize("size", [(64, 64), (70, 93)])
def test_outputs_equal_transformers(pair, size):
    import torch

    theirs, module, variables = pair
    images = draw_images(*size)
    with torch.no_grad():
        pooled, *levels = outputs_of_theirs(theirs, images)
    ours = run(module, variables, images)
    assert_close(ours.pooled, pooled)
    assert_close(ours.tokens, levels[-1].reshape(2, -1, 64))
    assert len(ours.levels) == 4
    for level, expected in zip(ours.levels, levels, strict=True):
        assert_close(level, expected)


@pytest.mark.hf
@pytest.mark.parametrize("train", [False, True])
def test_every_gradient_and_a_step_of_adamw_equal_torch(pair, tmp_path, train):
    theirs, module, variables = pair
    theirs = copy.deepcopy(theirs).train(train)
    images = draw_images_off_kinks(copy.deepcopy(theirs), 38, 45, batch=4)

    def outputs(model, params):
        if model is not None:
            return outputs_of_theirs(model, images)
        mine = {**variables, "params": params}
        out, _ = module.apply(mine, images, train=train, mutable=["batch_stats"])
        return out.pooled, *out.levels

    assert_gradients_and_step(*gradients_and_step(theirs, module, variables, tmp_path, outputs))


@pytest.mark.hf
def test_training_outputs_and_every_running_average_equal_torch(pair, tmp_path):
    theirs, module, variables = pair
    theirs = copy.deepcopy(theirs).train()
    images = draw_images(70, 93, batch=4)
    pooled = outputs_of_theirs(theirs, images)[0].detach()
    theirs.save_pretrained(tmp_path)
    _, expected = convert.load(tmp_path)
    out, moved = run(module, variables, images, train=True, mutable=["batch_stats"])
    assert_close(out.pooled, pooled)
    jax.tree.map(assert_close, moved["batch_stats"], expected["batch_stats"])


@pytest.mark.hf
def test_weights_go_in_and_out_bit_for_bit(tmp_path):
    make_theirs("ResNetModel", tmp_path / "theirs", **SMALL)
    assert_round_trip(tmp_path / "theirs", tmp_path)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 12), (7, 7), (1, 2)])
def test_max_pool_equals_reduce_window(height, width):
    x = np.maximum(RNG.normal(size=(2, height, width, 3)), 0).astype(np.float32)
    expected = jax.lax.reduce_window(
        x, -np.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
    )
    np.testing.assert_array_equal(resnet.max_pool(x), expected)


@pytest.mark.parametrize(("height", "width"), [(8, 10), (9, 12), (7, 7), (1, 2)])
def test_halved_convolution_equals_one_of_stride_2(height, width):
    x = RNG.normal(size=(2, height, width, 2)).astype(np.float32)
    kernel = RNG.normal(size=(7, 7, 2, 3)).astype(np.float32)
    layout = ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(
        x, kernel, (2, 2), ((3, 3), (3, 3)), dimension_numbers=layout
    )
    assert_close(resnet.halved_convolution(x, kernel), expected)


@pytest.mark.parametrize("size", [(32, 32), (33, 47)])
def test_a_stem_that_folds_grey_equals_three_channels_its_gradient_too(size):
    grey = RNG.integers(0, 256, (3, *size, 1)).astype(np.uint8)
    stem = resnet.Stem(5)
    variables = stem.init(jax.random.key(0), base.normalise(grey))
    pulled = RNG.normal(size=(3, -(-size[0] // 2), -(-size[1] // 2), 5)).astype(np.float32)

    def results(*given):
        outputs, backward = jax.vjp(lambda v: stem.apply(v, *given), variables)
        return outputs, backward(pulled)[0]["params"]["kernel"]

    expected = results(base.normalise(grey))
    scaled = base.normalise(grey, mean=(0.0,), std=(1.0,))
    folded = results(scaled, (base.IMAGENET_MEAN, base.IMAGENET_STD))
    jax.tree.map(assert_close, folded, expected)


@pytest.mark.parametrize("train", [False, True])
def test_grey_pixels_are_encoded_as_three_equal_channels(variables_of, train):
    grey = RNG.integers(0, 256, (3, 64, 64, 1)).astype(np.uint8)
    module = resnet.make("tiny")
    variables = variables_of(module, np.zeros((1, 64, 64, 3), np.float32))
    expected, moved = module.apply(
        variables, base.normalise(grey), train=train, mutable=["batch_stats"]
    )
    found, also_moved = module.apply(
        variables, grey, train=train, mutable=["batch_stats"], method=base.encode_pixels
    )
    jax.tree.map(assert_close, (found, also_moved), (expected, moved))


def test_coloured_pixels_and_other_encoders_are_normalised_as_ever(variables_of):
    coloured = RNG.integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    module = resnet.make("tiny")
    variables = variables_of(module, np.zeros((1, 32, 32, 3), np.float32))
    expected = module.apply(variables, base.normalise(coloured)).pooled
    found = module.apply(variables, coloured, method=base.encode_pixels).pooled
    np.testing.assert_array_equal(found, expected)

    class Other:
        def __call__(self, images, *, train):
            return images

    grey = coloured[..., :1]
    np.testing.assert_array_equal(base.encode_pixels(Other(), grey), base.normalise(grey))


# Without the classifier: torchvision's 25,557,032 and 44,549,160 less 2,049,000.
@pytest.mark.parametrize(("variant", "count"), [("50", 23_508_032), ("101", 42_500_160)])
def test_published_sizes_have_the_published_number_of_parameters(variant, count):
    module = resnet.make(variant)
    images = jnp.zeros((2, 224, 224, 3))
    out, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), images)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == count
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
    normalisation = (base.IMAGENET_MEAN, base.IMAGENET_STD)
    images = jnp.zeros((1, 64, 64, 3))
    with pytest.raises(ValueError, match=r"images \[B, H, W, 1\], got \[1, 64, 64, 3\]"):
        resnet.make("tiny").init(jax.random.key(0), images, normalisation=normalisation)
    with pytest.raises(config.UserError, match="No ResNet variant '52'"):
        resnet.make("52")
