"""Every setting of every config of transformers: read, refused by name, or shown to be idle."""

import inspect
import json

import numpy as np
import pytest

from medvlp_jax import convert
from medvlp_jax.config import UserError
from medvlp_jax.convert import architectures
from medvlp_jax.convert.neutral import OFF
from medvlp_jax.encoders import bert, modernbert, qwen3
from medvlp_jax.encoders.base import Tokens

pytestmark = pytest.mark.hf

TABLES = {table.model_types[0]: table for table in architectures.TABLES}
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(2, 3, 64, 64)).astype(np.float32)
IDS = RNG.integers(3, 30, (2, 9))
DINOV2 = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
}
VISION = DINOV2 | {"intermediate_size": 32}
TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 12,
}
SMALL = {
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]},
    "vit": VISION,
    "swin": {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4}
    | {"image_size": 64},
    "dinov2": DINOV2,
    "dinov2_with_registers": DINOV2,
    "dinov3_vit": VISION | {"num_register_tokens": 2},
    "clip_vision_model": VISION,
    "siglip_vision_model": VISION,
    "bert": TEXT,
    "clip_text_model": TEXT | {"eos_token_id": 39},
    "siglip_text_model": TEXT,
    "modernbert": TEXT | {"pad_token_id": 1},
    "qwen3": TEXT | {"num_key_value_heads": 1, "head_dim": 8},
}
NESTED = ("rope_parameters", "layer_types")  # `flatten` takes them apart; tests of their own below
COMPUTED = ("stage_names", "num_layers", "hidden_size")  # where idle: by transformers, from others


def config_of(kind, **changes):
    import transformers

    return transformers.AutoConfig.for_model(kind, **SMALL[kind] | changes)


def theirs_of(config):
    """Make the model of a config; AutoModel knows all but the text tower of SigLIP."""
    import transformers

    if config.model_type == "siglip_text_model":
        return transformers.SiglipTextModel(config)
    return transformers.AutoModel.from_config(config)


def changed(key, value):
    """Return another value of the same kind, one that `transformers` accepts."""
    if isinstance(value, bool):
        return not value
    if key == "classifier_pooling":
        return "mean"
    if key == "out_features":
        return ["stem"]
    if key == "out_indices":
        return [0]
    if isinstance(value, str):
        return "relu" if value != "relu" else "gelu"
    if isinstance(value, list | tuple):
        return [*value[:-1], value[-1] * 2]
    if isinstance(value, float):
        return value * 2 + 0.125
    return 2 if value is None or value <= 0 else value * 2


def own_settings(kind):
    """Return the settings that this architecture has beyond those all have."""
    import transformers

    common = transformers.PreTrainedConfig().to_dict()
    config = config_of(kind).to_dict()
    return {key: config[key] for key in config if key not in common and key not in NESTED}


@pytest.mark.parametrize("kind", TABLES)
def test_a_changed_setting_is_read_or_refused_by_name(kind):
    """Of those that are not said to be idle."""
    table = TABLES[kind]
    config = config_of(kind).to_dict()
    plain = architectures.fields_of(table, config, "")
    for key, value in own_settings(kind).items():
        if key not in (*table.fields, *table.fixed, *OFF):
            continue
        change = {key: changed(key, value)}
        fields, refusal = plain, ""
        try:
            fields = architectures.fields_of(table, {**config, **change}, "")
        except UserError as error:
            refusal = str(error)
        if refusal:
            assert key in refusal or "only squares" in refusal, (change, refusal)
        else:
            assert key not in (*table.fixed, *OFF), change
            name = table.fields[key].name
            assert fields[name] != plain[name], change
            assert fields | {name: plain[name]} == plain, change


def outputs_of(model):
    import torch

    wants_ids = "input_ids" in inspect.signature(model.forward).parameters
    name, array = ("input_ids", IDS) if wants_ids else ("pixel_values", IMAGES)
    with torch.no_grad():
        out = model.eval()(**{name: torch.tensor(array)})
    return [leaf for leaf in out.to_tuple() if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("kind", TABLES)
def test_a_setting_that_is_passed_over_changes_nothing_in_transformers(kind):
    """So that none that matters stands on the list of `convert.neutral`."""
    import torch

    table = TABLES[kind]
    settings = own_settings(kind)
    known = (*table.fields, *table.fixed, *OFF, *COMPUTED)
    idle = [key for key in settings if key not in known]
    torch.manual_seed(0)
    model = theirs_of(config_of(kind))
    expected = outputs_of(model)
    for key in idle:
        config = config_of(kind)
        setattr(config, key, changed(key, settings[key]))
        other = theirs_of(config)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        if shapes != {name: tensor.shape for name, tensor in other.state_dict().items()}:
            continue  # then a tensor is refused for its shape
        other.load_state_dict(model.state_dict())
        for ours, theirs in zip(outputs_of(other), expected, strict=True):
            assert torch.equal(ours, theirs), key


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "qwen3",
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor 0.5; here are only rope_type, type, rope_theta",
        ),
        ("qwen3", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type 'llama3'"),
        ("qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("modernbert", {"rope_parameters": {"rope_type": "linear"}}, "for rope_type; here they"),
        ("modernbert", {"layer_types": ["full_attention", "chunked_attention"]}, "chunked_"),
        ("swin", {"patch_size": [4, 2]}, "size of [4, 2]; only squares"),
        ("bert", {"embedding_size": 8}, "embedding_size 8"),
    ],
)
def test_what_lies_deeper_in_a_config_is_refused_by_name(kind, changes, message):
    config = {**config_of(kind).to_dict(), **changes}
    with pytest.raises(UserError) as refusal:
        architectures.fields_of(TABLES[kind], config, "FOLDER")
    assert message in str(refusal.value)


def test_other_names_of_a_setting_are_read_as_transformers_reads_them():
    import transformers

    for kind, changes, ours in [
        ("modernbert", {"sliding_window": 5}, {"window": 10}),
        ("modernbert", {"rope_scaling": None, "local_rope_theta": 5.0}, {"local_base": 5.0}),
        (
            "modernbert",
            {"rope_scaling": {"rope_type": "default", "rope_theta": 7.0}},
            {"local_base": 7.0, "global_base": 7.0},
        ),
        ("qwen3", {"rope_scaling": None, "rope_theta": 5.0}, {"rope_base": 5.0}),
        (
            "qwen3",
            {
                "rope_scaling": {"rope_type": "default", "rope_theta": 7.0},
                "rope_parameters": {"rope_type": "default", "rope_theta": 9.0},
            },
            {"rope_base": 7.0},
        ),
    ]:
        written = SMALL[kind] | changes
        found = architectures.fields_of(TABLES[kind], written, "")
        theirs = transformers.AutoConfig.for_model(kind, **json.loads(json.dumps(written)))
        expected = architectures.fields_of(TABLES[kind], theirs.to_dict(), "")
        assert found == expected, changes
        assert found | ours == found, changes


@pytest.mark.parametrize(
    ("module", "copy", "override"),
    [
        (bert.make("tiny", mlm_head=True), "cls.predictions.decoder.weight", {"mlm_head": False}),
        (modernbert.make("tiny", mlm_head=True), "decoder.weight", {"mlm_head": False}),
        (qwen3.make("tiny"), "lm_head.weight", {"is_tied": False}),
    ],
)
def test_a_head_that_is_not_tied_is_refused_with_what_reads_it(tmp_path, module, copy, override):
    import jax
    from safetensors.numpy import load_file, save_file

    module = module.clone(vocab_size=20, width=16, depth=2, num_heads=2, mlp_dim=16)
    tokens = Tokens(np.ones((1, 2), np.int32), np.ones((1, 2), bool))
    shapes = jax.eval_shape(module.init, jax.random.key(0), tokens)
    convert.save(module, jax.tree.map(lambda s: np.ones(s.shape, np.float32), shapes), tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), copy: np.zeros((20, 16), np.float32)}, file)
    (name, value), *_ = override.items()
    with pytest.raises(UserError, match=f"'{copy}' differs from .*; {name}={value} reads"):
        convert.load(tmp_path)
    loaded, variables = convert.load(tmp_path, **override)
    assert getattr(loaded, name) == value
    if name == "is_tied":
        assert not variables["params"]["head"].any()
