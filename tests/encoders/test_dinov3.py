"""DINOv3 against transformers with random weights, and its published sizes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
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
from medvlp_jax.encoders import dinov3
from medvlp_jax.layers import Lora, rope_2d

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "patch_size": 4,
    "num_register_tokens": 4,
    "layerscale_value": 0.3,
    "pos_embed_rescale": None,
}
KINDS = {
    "plain": {},
    "gated": {"use_gated_mlp": True, "hidden_act": "silu"},
    "7B": {
        "use_gated_mlp": True,
        "hidden_act": "silu",
        "query_bias": False,
        "value_bias": False,
    },
    "others": {"key_bias": True, "num_register_tokens": 0, "rope_theta": 50.0},
}


LAYOUTS = {
    "plain": {"layout": "unrolled"},
    "gated": {"layout": "scan", "remat": "full"},
    "7B": {"layout": "scan"},
    "others": {"layout": "unrolled", "remat": "dots"},
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def pair(kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov3")
    return make_theirs("DINOv3ViTModel", folder, **{**SMALL, **KINDS[kind]}), folder


def outputs_of_theirs(theirs, images, masked=None):
    import torch

    if masked is not None:
        masked = torch.tensor(masked)
    out = theirs(as_torch(images), bool_masked_pos=masked)
    patches = out.last_hidden_state[:, 1 + theirs.config.num_register_tokens :]
    return out.pooler_output, patches


@pytest.mark.hf
@pytest.mark.parametrize("size", [(32, 32), (20, 4), (12, 36), (100, 108)])  # 675 patches
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
    if size == (20, 4):
        mean = run(module.clone(pooling="mean"), variables, images)
        assert_close(mean.pooled, patches.mean(1))


@pytest.mark.hf
@pytest.mark.slow
def test_the_base_size_equals_transformers(tmp_path):
    import torch

    module = dinov3.make("B/16")
    # More noise than the initial 0.02 would saturate the attention of 768 channels.
    theirs = make_theirs("DINOv3ViTModel", tmp_path, noise=0.01, **hugging_face_fields(module))
    loaded, variables = convert.load(tmp_path)
    assert loaded == module.clone(mask_token=True)
    images = draw_images(224, 256, batch=1)
    with torch.no_grad():
        pooled, patches = outputs_of_theirs(theirs, images)
    ours = run(loaded, variables, images)
    assert_close(ours.pooled, pooled)
    assert_close(ours.tokens, patches)


@pytest.mark.hf
def test_every_gradient_and_a_step_of_adamw_equal_torch(kind, pair, tmp_path):
    theirs, folder = pair
    module, variables = convert.load(folder, **LAYOUTS[kind])
    images = draw_images(20, 28)
    masked = RNG.random((2, 35)) < 0.3

    def outputs(model, params):
        if model is not None:
            return outputs_of_theirs(model, images, masked)
        out = module.apply({"params": params}, images, train=True, masked=masked)
        return out.pooled, out.tokens

    errors = gradients_and_step(theirs, module, variables, tmp_path, outputs)
    assert_gradients_and_step(*errors)


@pytest.mark.hf
@pytest.mark.parametrize("layout", ["unrolled", "scan"])
def test_weights_go_in_and_out_bit_for_bit(pair, tmp_path, layout):
    module, _ = assert_round_trip(pair[1], tmp_path, layout=layout)
    assert module.mask_token


@pytest.mark.hf
def test_a_model_without_mask_token_is_whole_for_transformers(pair, tmp_path):
    module, variables = convert.load(pair[1], mask_token=False)
    assert "mask_token" not in variables["params"]
    convert.save(module, variables, tmp_path)
    import transformers

    _, report = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    jax.tree.map(np.testing.assert_array_equal, convert.load_into(module, tmp_path), variables)
    with pytest.raises(ValueError, match="set mask_token=True"):
        module.apply(variables, draw_images(8, 8), masked=np.ones((2, 4), bool))


@pytest.mark.hf
def test_augmented_positions_equal_transformers(monkeypatch):
    import torch
    from transformers.models.dinov3_vit import modeling_dinov3_vit as theirs

    drawn = [np.array([0.1, -0.2]), np.log([1.2, 0.9]), np.log([1.7])]
    values = iter(drawn)
    monkeypatch.setattr(
        torch.Tensor, "uniform_", lambda self, low, high: self.copy_(torch.tensor(next(values)))
    )
    centres = theirs.get_patches_center_coordinates(5, 7, torch.float64, torch.device("cpu"))
    centres = theirs.augment_patches_center_coordinates(centres, shift=1.0, jitter=2.0, rescale=2.0)
    frequencies = 1 / 100 ** torch.arange(0, 1, 4 / 16, dtype=torch.float64)
    angles = (2 * np.pi * centres[:, :, None] * frequencies).flatten(1, 2).tile(2)
    scale = np.exp(drawn[1]) * np.exp(drawn[2])
    ours = rope_2d(5, 7, 16, base=100.0, shift=drawn[0], scale=scale)
    assert_close(ours.cos, torch.cos(angles))
    assert_close(ours.sin, torch.sin(angles))


def test_positions_are_augmented_in_training_only(variables_of):
    images = draw_images(48, 32)
    module = dinov3.make("tiny", depth=1)
    variables = variables_of(module, images)

    def train(seed, module=module):
        rngs = {"dropout": jax.random.key(seed)}
        return run(module, variables, images, train=True, rngs=rngs).tokens

    exact = run(module, variables, images).tokens
    assert error(train(0), train(1)) > 1e-3
    assert error(train(0), exact) > 1e-3
    for field in ("rope_shift", "rope_jitter"):
        augmented = module.clone(rope_rescale=1.0, **{field: 1.5})
        assert error(train(0, augmented), exact) > 1e-3
    off = module.clone(rope_rescale=1.0)
    np.testing.assert_array_equal(run(off, variables, images, train=True).tokens, exact)


def test_training_drops_whole_branches_of_some_examples(variables_of):
    """At a rate of one half an example has each of two branches twice over, or not at all."""
    images = np.repeat(draw_images(32, 32, batch=1), 64, axis=0)
    module = dinov3.make("tiny", depth=1, drop_path=0.5, rope_rescale=1.0)
    variables = variables_of(module, images)
    rngs = {"dropout": jax.random.key(0)}
    out = run(module, variables, images, train=True, rngs=rngs).tokens
    flat = flatten_dict(variables, sep="/")
    scales = [f"params/stack/block_0/{name}_scale" for name in ("attention", "mlp")]
    kinds = []
    for times in itertools.product((0, 2), repeat=2):
        changed = {path: n * flat[path] for path, n in zip(scales, times, strict=True)}
        exact = run(module, unflatten_dict(flat | changed, sep="/"), images[:1])
        kinds.append(exact.tokens[0])
    like = [[k for k, kind in enumerate(kinds) if error(row, kind) < 1e-5] for row in out]
    assert {tuple(found) for found in like} == {(0,), (1,), (2,), (3,)}


@pytest.mark.hf
@pytest.mark.parametrize("variant", dinov3.VARIANTS)
def test_published_sizes_have_the_parameters_of_transformers(variant):
    module = dinov3.make(variant, mask_token=True)
    parameters, out = count(module, jnp.zeros((2, 224, 256, 3)))
    assert parameters == count_theirs("DINOv3ViTModel", **hugging_face_fields(module))
    assert out.pooled.shape == (2, module.width)
    assert out.tokens.shape == (2, 14 * 16, module.width)


# Siméoni et al. 2025, Table 15 and section 3: 21 M, 29 M, 86 M, 300 M, 840 M, 6,716 M.
@pytest.mark.parametrize(
    ("variant", "millions"),
    [("S/16", 22), ("S+/16", 29), ("B/16", 86), ("L/16", 303), ("H+/16", 841), ("7B/16", 6716)],
)
def test_published_sizes_have_the_published_number_of_parameters(variant, millions):
    module = dinov3.make(variant, layout="scan")
    assert round(count(module, jnp.zeros((1, 16, 16, 3)))[0] / 1e6) == millions


def test_lora_covers_the_layers_it_names_and_changes_nothing_at_first(variables_of):
    images = draw_images(32, 32)
    base = dinov3.make("tiny")
    module = base.clone(lora=Lora(2, 4.0, layers="attention/(query|value)"))
    flat = flatten_dict(variables_of(module, images), sep="/")
    added = [path for path in flat if "lora" in path]
    assert len(added) == 4 * 2 * 2
    flat |= {path: np.zeros_like(flat[path]) for path in added if path.endswith("lora_b")}
    without = {path: leaf for path, leaf in flat.items() if path not in added}
    ours = run(module, unflatten_dict(flat, sep="/"), images).pooled
    plain = run(base, unflatten_dict(without, sep="/"), images).pooled
    # Another program: its norms may be fused and so rounded otherwise.
    np.testing.assert_allclose(ours, plain, rtol=1e-6, atol=1e-6)


def test_compute_in_bfloat16_stays_near(variables_of):
    images = draw_images(160, 160)
    module = dinov3.make("tiny")
    variables = variables_of(module, images)
    exact = run(module, variables, images)
    half = run(module.clone(dtype=jnp.bfloat16), variables, images)
    assert half.pooled.dtype == jnp.bfloat16
    assert error(half.pooled, exact.pooled) < 0.02
    assert error(half.tokens, exact.tokens) < 0.02


@pytest.mark.hf
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "relu"),
        ("proj_bias", False),
        ("mlp_bias", False),
        ("num_channels", 1),
    ],
)
def test_settings_that_are_not_here_are_refused_by_name(pair, tmp_path, key, value):
    with pytest.raises(UserError, match=key):
        convert.load(edit_config(pair[1], tmp_path / "edited", **{key: value}))


def test_bad_input_is_refused_before_compiling():
    module = dinov3.make("tiny")
    for shape, message in [
        ((1, 224, 224, 1), r"\[1, 224, 224, 1\]"),
        ((1, 224, 200, 3), "224 x 200 pixels do not tile into patches of 16 x 16"),
    ]:
        with pytest.raises(ValueError, match=message):
            count(module, jnp.zeros(shape))
    with pytest.raises(UserError, match="No DinoV3 variant 'G/16'"):
        dinov3.make("G/16")
