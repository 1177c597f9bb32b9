"""One encoder read out of a model of two."""

import json

import jax
import numpy as np
import pytest

from medvlp_jax import convert
from medvlp_jax.config import UserError
from medvlp_jax.encoders.base import Tokens

RNG = np.random.default_rng(0)
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
TEXT = {**SMALL, "vocab_size": 50, "eos_token_id": 49, "max_position_embeddings": 9}
VISION = {**SMALL, "image_size": 16, "patch_size": 4}
IMAGES = RNG.normal(size=(2, 16, 16, 3)).astype(np.float32)
TOKENS = Tokens(np.tile(np.arange(41, 50), (2, 1)).astype(np.int32), np.ones((2, 9), bool))


def make_theirs(architecture, folder, **fields):
    """Save a random model of two encoders, every tensor off its initial value."""
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, architecture)
    config = model.config_class(text_config=TEXT, vision_config=VISION, **fields)
    model = model(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


def assert_close(ours, reference):
    ours, reference = np.asarray(ours), reference.detach().numpy()
    assert ours.shape == reference.shape
    assert np.abs(ours - reference).max() <= 1e-5 * np.abs(reference).max()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    return make_theirs("CLIPModel", folder, projection_dim=12), folder


@pytest.mark.hf
def test_both_towers_of_clip_give_the_features_of_clip(clip):
    import torch

    theirs, folder = clip
    module, variables = convert.load(folder, tower="vision", pooling="projection")
    expected = theirs.get_image_features(torch.tensor(IMAGES).permute(0, 3, 1, 2)).pooler_output
    assert_close(jax.jit(module.apply)(variables, IMAGES).pooled, expected)
    module, variables = convert.load(folder, tower="text", pooling="projection")
    expected = theirs.get_text_features(torch.tensor(TOKENS.ids).long()).pooler_output
    assert_close(jax.jit(module.apply)(variables, TOKENS).pooled, expected)
    again = convert.load_into(module, folder, tower="text")
    jax.tree.map(np.testing.assert_array_equal, again, variables)
    module, variables = convert.load(folder, tower="text", projection=False)
    assert "projection" not in variables["params"]


@pytest.mark.hf
def test_both_towers_of_siglip_give_the_features_of_siglip(tmp_path):
    import torch

    theirs = make_theirs("SiglipModel", tmp_path)
    module, variables = convert.load(tmp_path, tower="vision")
    expected = theirs.get_image_features(torch.tensor(IMAGES).permute(0, 3, 1, 2)).pooler_output
    assert_close(jax.jit(module.apply)(variables, IMAGES).pooled, expected)
    module, variables = convert.load(tmp_path, tower="text")
    expected = theirs.get_text_features(torch.tensor(TOKENS.ids).long()).pooler_output
    assert_close(jax.jit(module.apply)(variables, TOKENS).pooled, expected)


@pytest.mark.hf
def test_early_files_mean_what_stands_in_config_dict(clip, tmp_path):
    config = json.loads((clip[1] / "config.json").read_text())
    config |= {"vision_config_dict": config["vision_config"], "vision_config": {"patch_size": 8}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((clip[1] / "model.safetensors").read_bytes())
    assert convert.load(tmp_path, tower="vision")[0].patch_size == 4


@pytest.mark.hf
def test_a_tower_must_be_named_where_there_are_two_and_only_there(clip, tmp_path):
    with pytest.raises(UserError, match="'clip': tower='text' and tower='vision' can be asked for"):
        convert.load(clip[1])
    module, variables = convert.load(clip[1], tower="text")
    convert.save(module, variables, tmp_path)
    with pytest.raises(UserError, match="no towers can be asked for, and tower='text' was"):
        convert.load(tmp_path, tower="text")


@pytest.mark.hf
def test_a_tower_is_imported_from_the_command_line(clip, tmp_path):
    from medvlp_jax.convert.__main__ import main

    main(["import", str(clip[1]), str(tmp_path / "out"), "--tower", "vision"])
    module, _ = convert.load(tmp_path / "out")
    assert type(module).__name__ == "ClipVision"
