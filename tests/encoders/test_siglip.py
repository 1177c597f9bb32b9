"""SigLIP's vision tower against transformers with random weights, and its published sizes."""

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
from medvlp_jax.encoders import siglip

SMALL = {
    "image_size": 20,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
KINDS = {
    "plain": {},
    "no head": {"vision_use_head": False, "hidden_act": "gelu"},
    "14": {"patch_size": 6, "num_attention_heads": 2},  # 20 = 3 * 6 + 2, as 384 = 27 * 14 + 6
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def pair(kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip")
    return make_theirs("SiglipVisionModel", folder, **{**SMALL, **KINDS[kind]}), folder


def outputs_of_theirs(theirs, images):
    out = theirs(as_torch(images), interpolate_pos_encoding=True)
    tokens = out.last_hidden_state
    return tokens.mean(1) if out.pooler_output is None else out.pooler_output, tokens


@pytest.mark.hf
@pytest.mark.parametrize("size", [(20, 20), (28, 28), (13, 38), (100, 7), (150, 156)])
def test_outputs_equal_transformers(pair, size):
    import torch

    theirs, folder = pair
    module, variables = convert.load(folder)
    images = draw_images(*size)
    with torch.no_grad():
        pooled, patches = outputs_of_theirs(theirs, images)
    ours = run(module, variables, images)
    assert_close(ours.pooled, pooled)
    assert_close(ours.tokens, patches)


@pytest.mark.hf
def test_every_gradient_and_a_step_of_adamw_equal_torch(kind, pair, tmp_path):
    theirs, folder = pair
    layout = "scan" if kind == "no head" else "unrolled"
    module, variables = convert.load(folder, layout=layout, remat="full")
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
    assert module.head == (kind != "no head")


@pytest.mark.hf
@pytest.mark.parametrize("variant", siglip.VARIANTS)
def test_published_sizes_have_the_parameters_of_transformers(variant):
    module = siglip.make(variant)
    size = module.image_size
    parameters, out = count(module, jnp.zeros((2, size, size, 3)))
    assert parameters == count_theirs("SiglipVisionModel", **hugging_face_fields(module))
    assert out.pooled.shape == (2, module.width)
    assert out.tokens.shape == (2, (size // module.patch_size) ** 2, module.width)


# google/siglip-base-patch16-224's vision tower, and So400m/14's (Alabdulmohsin et al.: 428 M).
@pytest.mark.parametrize(("variant", "millions"), [("B/16-224", 93), ("So400m/14-384", 428)])
def test_published_sizes_have_the_published_number_of_parameters(variant, millions):
    module = siglip.make(variant, layout="scan")
    assert round(count(module, jnp.zeros((1, 384, 384, 3)))[0] / 1e6) == millions


def test_the_mean_is_over_patches(variables_of):
    images = draw_images(64, 32)
    module = siglip.make("tiny", pooling="mean")
    out = run(module, variables_of(module, images), images)
    assert_close(out.pooled, out.tokens.mean(1))


def test_compute_in_bfloat16_stays_near(variables_of):
    images = draw_images(230, 224)
    module = siglip.make("tiny")
    variables = variables_of(module, images)
    exact = run(module, variables, images)
    half = run(module.clone(dtype=jnp.bfloat16), variables, images)
    assert half.pooled.dtype == jnp.bfloat16
    assert error(half.pooled, exact.pooled) < 0.02
    assert error(half.tokens, exact.tokens) < 0.02


@pytest.mark.hf
@pytest.mark.parametrize(("key", "value"), [("hidden_act", "relu"), ("num_channels", 1)])
def test_settings_that_are_not_here_are_refused_by_name(pair, tmp_path, key, value):
    with pytest.raises(UserError, match=key):
        convert.load(edit_config(pair[1], tmp_path / "edited", **{key: value}))


def test_bad_input_is_refused_before_compiling():
    module = siglip.make("tiny", head=False)
    for shape, message in [
        ((1, 224, 224, 1), r"\[1, 224, 224, 1\]"),
        ((1, 15, 224, 3), "15 x 224 pixels are smaller than a patch of 16 x 16"),
        ((1, 224, 192, 3), "'head' needs head=True"),
    ]:
        with pytest.raises(ValueError, match=message):
            count(module, jnp.zeros(shape))
