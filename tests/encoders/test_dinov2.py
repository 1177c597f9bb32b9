"""DINOv2, without and with registers, against transformers, and its published sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from twins import (
    RNG,
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
from medvlp_jax.encoders import dinov2

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 4,
    "layerscale_value": 0.3,
}
PLAIN, REGISTERS = "Dinov2Model", "Dinov2WithRegistersModel"
KINDS = {
    "plain": (PLAIN, {"mlp_ratio": 2}),
    "giant": (PLAIN, {"use_swiglu_ffn": True, "qkv_bias": False, "use_mask_token": False}),
    "registers": (REGISTERS, {"mlp_ratio": 2}),
    "giant with registers": (REGISTERS, {"use_swiglu_ffn": True, "num_register_tokens": 1}),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def pair(kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov2")
    architecture, fields = KINDS[kind]
    return make_theirs(architecture, folder, **{**SMALL, **fields}), folder


def outputs_of_theirs(theirs, images, masked=None):
    import torch

    if masked is not None:
        masked = torch.tensor(masked)
    out = theirs(as_torch(images), bool_masked_pos=masked)
    before = 1 + getattr(theirs.config, "num_register_tokens", 0)
    return out.pooler_output, out.last_hidden_state[:, before:]


@pytest.mark.hf
# The native grid of 7 x 7, a finer, a coarser one, both, and one with 650 patches.
@pytest.mark.parametrize("size", [(28, 28), (36, 44), (12, 20), (8, 60), (100, 104)])
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
    if size == (12, 20):
        mean = run(module.clone(pooling="mean"), variables, images)
        assert_close(mean.pooled, patches.mean(1))


@pytest.mark.hf
def test_every_gradient_and_a_step_of_adamw_equal_torch(kind, pair, tmp_path):
    theirs, folder = pair
    layout = "scan" if "giant" in kind else "unrolled"
    module, variables = convert.load(folder, layout=layout, remat="full")
    images = draw_images(20, 44)
    masked = RNG.random((2, 55)) < 0.3 if module.mask_token else None

    def outputs(model, params):
        if model is not None:
            return outputs_of_theirs(model, images, masked)
        out = module.apply({"params": params}, images, train=True, masked=masked)
        return out.pooled, out.tokens

    errors = gradients_and_step(theirs, module, variables, tmp_path, outputs)
    assert_gradients_and_step(*errors)


@pytest.mark.hf
@pytest.mark.parametrize("layout", ["unrolled", "scan"])
def test_weights_go_in_and_out_bit_for_bit(kind, pair, tmp_path, layout):
    module, _ = assert_round_trip(pair[1], tmp_path, layout=layout)
    assert bool(module.registers) == ("registers" in kind)
    assert module.mask_token == (kind != "giant")


@pytest.mark.hf
def test_a_model_without_mask_token_is_whole_for_transformers(pair, tmp_path):
    import transformers

    module, variables = convert.load(pair[1], mask_token=False)
    convert.save(module, variables, tmp_path)
    theirs, report = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert (theirs.embeddings.mask_token is None) == (module.registers == 0)
    jax.tree.map(np.testing.assert_array_equal, convert.load_into(module, tmp_path), variables)
    with pytest.raises(ValueError, match="set mask_token=True"):
        module.apply(variables, draw_images(8, 8), masked=np.ones((2, 4), bool))


@pytest.mark.hf
@pytest.mark.parametrize("registers", [False, True])
def test_a_classifier_on_top_changes_nothing_below(tmp_path, registers):
    name = "Dinov2WithRegisters" if registers else "Dinov2"
    theirs = make_theirs(f"{name}ForImageClassification", tmp_path, **SMALL, mlp_ratio=2)
    assert any(key.startswith("dinov2") for key in load_file(tmp_path / "model.safetensors"))
    module, variables = convert.load(tmp_path)
    images = draw_images(28, 28)
    pooled, _ = outputs_of_theirs(getattr(theirs, theirs.base_model_prefix), images)
    assert_close(run(module, variables, images).pooled, pooled.detach())


@pytest.mark.hf
@pytest.mark.parametrize("variant", dinov2.VARIANTS)
def test_published_sizes_have_the_parameters_of_transformers(variant):
    module = dinov2.make(variant, mask_token=True)
    architecture = REGISTERS if module.registers else PLAIN
    parameters, out = count(module, jnp.zeros((2, 224, 252, 3)))
    assert parameters == count_theirs(architecture, **hugging_face_fields(module))
    assert out.pooled.shape == (2, module.width)
    assert out.tokens.shape == (2, 16 * 18, module.width)


# The authors' table of models: 21 M, 86 M, 300 M, 1,100 M.
@pytest.mark.parametrize(
    ("variant", "millions"), [("S/14", 22), ("B/14", 87), ("L/14-reg", 304), ("g/14", 1136)]
)
def test_published_sizes_have_the_published_number_of_parameters(variant, millions):
    module = dinov2.make(variant, layout="scan")
    assert round(count(module, jnp.zeros((1, 14, 14, 3)))[0] / 1e6) == millions


def test_compute_in_bfloat16_stays_near(variables_of):
    images = draw_images(238, 224)
    module = dinov2.make("tiny", registers=4)
    variables = variables_of(module, images)
    exact = run(module, variables, images)
    half = run(module.clone(dtype=jnp.bfloat16), variables, images)
    assert half.pooled.dtype == jnp.bfloat16
    assert error(half.pooled, exact.pooled) < 0.02
    assert error(half.tokens, exact.tokens) < 0.02


@pytest.mark.hf
@pytest.mark.parametrize(
    ("key", "value"), [("hidden_act", "relu"), ("num_channels", 1), ("patch_size", [14, 16])]
)
def test_settings_that_are_not_here_are_refused_by_name(pair, tmp_path, key, value):
    with pytest.raises(UserError, match="size of" if key == "patch_size" else key):
        convert.load(edit_config(pair[1], tmp_path / "edited", **{key: value}))


@pytest.mark.hf
def test_no_registers_are_refused_where_some_are_due(tmp_path):
    make_theirs(REGISTERS, tmp_path, **SMALL)
    with pytest.raises(UserError, match="num_register_tokens 0"):
        convert.load(edit_config(tmp_path, tmp_path / "edited", num_register_tokens=0))


def test_bad_input_is_refused_before_compiling():
    module = dinov2.make("tiny")
    for shape, message in [
        ((1, 224, 224, 1), r"\[1, 224, 224, 1\]"),
        ((1, 224, 225, 3), "224 x 225 pixels do not tile into patches of 14 x 14"),
    ]:
        with pytest.raises(ValueError, match=message):
            count(module, jnp.zeros(shape))
    with pytest.raises(UserError, match="No DinoV2 variant 'B/14_reg'"):
        dinov2.make("B/14_reg")
