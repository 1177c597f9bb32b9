"""CLIP's vision tower against transformers with random weights, and its published sizes."""

import jax.numpy as jnp
import pytest
from twins import (
    as_torch,
    assert_close,
    assert_gradients_and_step,
    assert_round_trip,
    count,
    count_theirs,
    draw_images,
    edit_config,
    error,
    gradients_and_step,
    hugging_face_fields,
    make_theirs,
    run,
)

from medvlp_jax import convert
from medvlp_jax.config import UserError
from medvlp_jax.encoders import clip_vision

SMALL = {
    "image_size": 20,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "projection_dim": 20,
}
KINDS = {
    "plain": ("CLIPVisionModel", {"hidden_act": "gelu"}),
    "projection": ("CLIPVisionModelWithProjection", {}),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def pair(kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip_vision")
    architecture, fields = KINDS[kind]
    return make_theirs(architecture, folder, **{**SMALL, **fields}), folder


def outputs_of_theirs(theirs, images):
    out = theirs(as_torch(images), interpolate_pos_encoding=True)
    projected = getattr(out, "image_embeds", None)
    pooled = out.pooler_output if projected is None else projected
    return pooled, out.last_hidden_state[:, 1:]


def load(folder, kind, **options):
    return convert.load(folder, pooling="projection" if kind == "projection" else "cls", **options)


@pytest.mark.hf
@pytest.mark.parametrize("size", [(20, 20), (28, 28), (12, 36), (100, 4), (100, 104)])
def test_outputs_equal_transformers(kind, pair, size):
    import torch

    theirs, folder = pair
    module, variables = load(folder, kind)
    images = draw_images(*size)
    with torch.no_grad():
        pooled, patches = outputs_of_theirs(theirs, images)
    ours = run(module, variables, images)
    assert_close(ours.pooled, pooled)
    assert_close(ours.tokens, patches)


@pytest.mark.hf
def test_every_gradient_and_a_step_of_adamw_equal_torch(kind, pair, tmp_path):
    theirs, folder = pair
    layout = {"plain": "unrolled", "projection": "scan"}[kind]
    module, variables = load(folder, kind, layout=layout, remat="full")
    images = draw_images(28, 12)

    def outputs(model, params):
        if model is not None:
            return outputs_of_theirs(model, images)
        out = module.apply({"params": params}, images, train=True)
        return out.pooled, out.tokens

    errors = gradients_and_step(theirs, module, variables, tmp_path, outputs)
    assert_gradients_and_step(*errors)


@pytest.mark.hf
@pytest.mark.parametrize("layout", ["unrolled", "scan"])
def test_weights_go_in_and_out_bit_for_bit(kind, pair, tmp_path, layout):
    module, _ = assert_round_trip(pair[1], tmp_path, layout=layout)
    assert module.projection == (kind == "projection")


@pytest.mark.hf
@pytest.mark.parametrize("variant", clip_vision.VARIANTS)
def test_published_sizes_have_the_parameters_of_transformers(variant):
    module = clip_vision.make(variant, projection=True, pooling="projection")
    parameters, out = count(module, jnp.zeros((2, 224, 224, 3)))
    fields = hugging_face_fields(module)
    assert parameters == count_theirs("CLIPVisionModelWithProjection", **fields)
    assert out.pooled.shape == (2, module.projection_dim)
    assert out.tokens.shape == (2, (224 // module.patch_size) ** 2, module.width)


# OpenAI's ViT-B/32 has 151,277,313 parameters, of which the vision tower 87,849,216.
def test_the_published_size_has_the_published_number_of_parameters():
    module = clip_vision.make("B/32", projection=True)
    assert count(module, jnp.zeros((1, 224, 224, 3)))[0] == 87_849_216


def test_the_mean_is_over_patches(variables_of):
    images = draw_images(64, 32)
    module = clip_vision.make("tiny", pooling="mean")
    out = run(module, variables_of(module, images), images)
    assert_close(out.pooled, out.tokens.mean(1))


def test_compute_in_bfloat16_stays_near(variables_of):
    images = draw_images(224, 224)
    module = clip_vision.make("tiny")
    variables = variables_of(module, images)
    exact = run(module, variables, images)
    half = run(module.clone(dtype=jnp.bfloat16), variables, images)
    assert half.pooled.dtype == jnp.bfloat16
    assert error(half.pooled, exact.pooled) < 0.02
    assert error(half.tokens, exact.tokens) < 0.02


@pytest.mark.hf
@pytest.mark.parametrize(
    ("key", "value"), [("hidden_act", "relu"), ("num_channels", 1), ("patch_size", [4, 5])]
)
def test_settings_that_are_not_here_are_refused_by_name(pair, tmp_path, key, value):
    with pytest.raises(UserError, match="size of" if key == "patch_size" else key):
        convert.load(edit_config(pair[1], tmp_path / "edited", **{key: value}))


def test_bad_input_is_refused_before_compiling():
    module = clip_vision.make("tiny", pooling="projection")
    for shape, message in [
        ((1, 224, 224, 1), r"\[1, 224, 224, 1\]"),
        ((1, 224, 200, 3), "224 x 200 pixels do not tile into patches of 32 x 32"),
        ((1, 224, 192, 3), "'projection' needs projection=True"),
    ]:
        with pytest.raises(ValueError, match=message):
            count(module, jnp.zeros(shape))
