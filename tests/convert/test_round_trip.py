"""Weights go out to transformers and come back the same, bit for bit."""

import json
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from medvlp_jax import convert
from medvlp_jax.config import UserError
from medvlp_jax.encoders import bert, clip_vision, resnet, vit
from medvlp_jax.encoders.base import IMAGENET_MEAN, IMAGENET_STD, Tokens, normalise

RNG = np.random.default_rng(0)

BERT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 12,
}
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
SWIN = {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4, "image_size": 64}
RESNET = {"embedding_size": 8, "hidden_sizes": [16, 32, 32, 64], "depths": [1, 2, 1, 1]}

IMAGES = RNG.normal(size=(2, 32, 32, 3)).astype(np.float32)
TOKENS = Tokens(RNG.integers(0, 50, (2, 7)).astype(np.int32), np.arange(7) < np.array([[7], [4]]))


def assert_close(ours, reference, tolerance=1e-5):
    """Hold max |a - b| <= tolerance * max |b|."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape
    assert np.abs(ours - reference).max() <= tolerance * np.abs(reference).max()


def make_theirs(architecture, fields, folder, noise=0.1, **options):
    """Save a random `transformers` model whose every tensor is off its initial value."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, architecture)
    model = model(model.config_class(**fields), **options).eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif tensor.dtype == torch.float32:
            tensor += noise * torch.randn_like(tensor)
    model.save_pretrained(folder)
    return model


def random_variables(module, example):
    """Draw every array, centred so that norms do not cancel digits, variances positive."""

    def draw(path, leaf):
        fan_in = int(np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 25
        array = RNG.normal(size=leaf.shape).astype(np.float32) / np.float32(np.sqrt(fan_in))
        return np.abs(array) + 0.5 if path[-1].key in ("scale", "var") else array

    shapes = jax.eval_shape(module.init, jax.random.key(0), example)
    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.mark.hf
@pytest.mark.parametrize(
    ("architecture", "fields", "options"),
    [
        ("ResNetForImageClassification", RESNET, {}),
        ("ViTForImageClassification", VIT, {}),
        ("ViTModel", VIT, {"add_pooling_layer": False}),
        ("BertModel", BERT, {"add_pooling_layer": False}),
        ("BertForPreTraining", BERT, {}),
        ("BertForSequenceClassification", BERT, {}),
    ],
)
def test_a_head_on_top_changes_nothing_below(tmp_path, architecture, fields, options):
    import torch

    model = make_theirs(architecture, fields, tmp_path, **options)
    base = getattr(model, model.base_model_prefix, model)
    drop = (
        ()
        if architecture != "BertForSequenceClassification"
        else (
            "classifier.weight",
            "classifier.bias",
        )
    )
    module, variables = convert.load(tmp_path, drop=drop)
    if architecture.startswith("Bert"):
        ids, mask = (torch.tensor(np.array(leaf)).long() for leaf in TOKENS)
        expected = base(input_ids=ids, attention_mask=mask).last_hidden_state
        ours = jax.jit(module.apply)(variables, TOKENS).tokens
    else:
        expected = base(torch.tensor(IMAGES).permute(0, 3, 1, 2)).last_hidden_state
        ours = jax.jit(module.apply)(variables, IMAGES).tokens
        if architecture.startswith("ResNet"):
            expected = expected.flatten(2).transpose(1, 2)
        else:
            expected = expected[:, 1:]
    assert_close(ours, expected.detach())


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 48, "vocab_size": 50}


@pytest.mark.hf
@pytest.mark.parametrize(
    ("architecture", "fields", "options"),
    [
        ("ViTModel", VIT, {}),
        ("ViTForImageClassification", VIT, {}),
        ("SwinModel", SWIN, {}),
        ("Dinov2Model", {k: v for k, v in VIT.items() if k != "intermediate_size"}, {}),
        ("BertForMaskedLM", BERT, {}),
        ("BertForMaskedLM", BERT, {"mlm_head": False}),
        ("ModernBertForMaskedLM", SIZES | {"pad_token_id": 0}, {}),
        ("ModernBertForMaskedLM", SIZES | {"pad_token_id": 0}, {"mlm_head": False}),
        ("Qwen3ForCausalLM", SIZES | {"tie_word_embeddings": True, "num_key_value_heads": 1}, {}),
    ],
)
def test_files_of_save_model_are_read_as_those_of_save_pretrained(
    tmp_path, architecture, fields, options
):
    """They have names of memory, and one of two tied tensors, whichever comes first."""
    from safetensors.torch import save_model

    model = make_theirs(architecture, fields, tmp_path)
    _, expected = convert.load(tmp_path, **options)
    save_model(model, str(tmp_path / "model.safetensors"), metadata={"format": "pt"})
    _, found = convert.load(tmp_path, **options)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.hf
@pytest.mark.parametrize("heads", ["plain", "pooler", "mlm"])
def test_bert_made_here_runs_in_transformers(tmp_path, heads):
    import torch
    import transformers

    module = bert.make(
        "tiny",
        vocab_size=50,
        depth=2,
        max_length=12,
        pooler=heads == "pooler",
        mlm_head=heads == "mlm",
    )
    variables = random_variables(module, TOKENS)
    convert.save(module, variables, tmp_path)
    ids, mask = (torch.tensor(np.array(leaf)).long() for leaf in TOKENS)
    theirs, report = transformers.AutoModel.from_pretrained(
        tmp_path, add_pooling_layer=heads == "pooler", output_loading_info=True
    )
    assert not report["missing_keys"]
    out = theirs.eval()(input_ids=ids, attention_mask=mask)
    assert_close(jax.jit(module.apply)(variables, TOKENS).tokens, out.last_hidden_state.detach())
    if heads == "pooler":
        ours = jax.jit(module.clone(pooling="pooler").apply)(variables, TOKENS).pooled
        assert_close(ours, out.pooler_output.detach())
    if heads == "mlm":
        theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
        expected = theirs(input_ids=ids, attention_mask=mask).logits.detach()
        ours = jax.jit(lambda v: module.apply(v, TOKENS, method="mlm_logits"))(variables)
        assert_close(ours, expected)


@pytest.mark.hf
def test_resnet_made_here_runs_in_transformers(tmp_path):
    import torch
    import transformers

    module = resnet.make("tiny", embedding_size=8, hidden_sizes=(16, 32, 32, 64))
    variables = random_variables(module, IMAGES)
    convert.save(module, variables, tmp_path)
    theirs, report = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    expected = theirs.eval()(torch.tensor(IMAGES).permute(0, 3, 1, 2)).pooler_output.detach()
    assert_close(jax.jit(module.apply)(variables, IMAGES).pooled, expected[:, :, 0, 0])


@pytest.mark.hf
def test_vit_made_here_runs_in_transformers(tmp_path):
    import torch
    import transformers

    module = vit.make("tiny", image_size=32, depth=2, width=32, mlp_dim=64)
    variables = random_variables(module, IMAGES)
    convert.save(module, variables, tmp_path)
    theirs, report = transformers.AutoModel.from_pretrained(
        tmp_path, add_pooling_layer=False, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    expected = theirs.eval()(torch.tensor(IMAGES).permute(0, 3, 1, 2)).last_hidden_state.detach()
    assert_close(jax.jit(module.apply)(variables, IMAGES).pooled, expected[:, 0])


@pytest.mark.hf
def test_shards_read_as_one_file(tmp_path):
    model = make_theirs("BertModel", BERT, tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="8KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    _, one = convert.load(tmp_path / "one")
    _, many = convert.load(tmp_path / "many")
    jax.tree.map(np.testing.assert_array_equal, one, many)


@pytest.mark.hf
def test_half_precision_files_give_float32_parameters_of_the_same_value(tmp_path):
    import torch

    model = make_theirs("BertModel", BERT, tmp_path / "full")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    _, variables = convert.load(tmp_path / "half", dtype=jnp.bfloat16)
    for leaf in jax.tree.leaves(variables):
        assert leaf.dtype == np.float32
    expected = model.embeddings.word_embeddings.weight.detach().float().numpy()
    np.testing.assert_array_equal(variables["params"]["word_embedding"], expected)


@pytest.mark.hf
def test_half_precision_parameters_leave_as_they_are_and_the_config_says_so(tmp_path):
    import transformers

    module = bert.make("tiny", vocab_size=50, depth=1, pooler=True)
    variables = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16), random_variables(module, TOKENS)
    )
    convert.save(module, variables, tmp_path)
    theirs = transformers.AutoModel.from_pretrained(tmp_path)
    assert {str(parameter.dtype) for parameter in theirs.parameters()} == {"torch.bfloat16"}
    table = theirs.embeddings.word_embeddings.weight.detach().float().numpy()
    np.testing.assert_array_equal(table, variables["params"]["word_embedding"].astype(np.float32))
    read = convert.load(tmp_path)[1]
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b.astype(np.float32)), read, variables
    )


@pytest.mark.hf
def test_what_a_refused_pickle_is_answered_with_converts_it(tmp_path, monkeypatch):
    import torch

    model = make_theirs("BertModel", BERT, tmp_path / "whole")
    old = tmp_path / "old"
    old.mkdir()
    torch.save(model.state_dict(), old / "pytorch_model.bin")
    (old / "config.json").write_text((tmp_path / "whole/config.json").read_text())
    with pytest.raises(UserError) as refusal:
        convert.load(old)
    monkeypatch.chdir(tmp_path)
    command = shlex.split(str(refusal.value).partition("installed: ")[2])
    assert command[:2] == ["python", "-c"]
    exec(command[2])
    jax.tree.map(
        np.testing.assert_array_equal, convert.load("NEW")[1], convert.load(tmp_path / "whole")[1]
    )


def test_the_oldest_names_of_layer_norm_are_read(tmp_path):
    module = bert.make("tiny", vocab_size=50, depth=1)
    variables = random_variables(module, TOKENS)
    convert.save(module, variables, tmp_path)
    file = tmp_path / "model.safetensors"
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in load_file(file).items()
    }
    assert any("gamma" in name for name in old)
    save_file(old, file)
    jax.tree.map(np.testing.assert_array_equal, convert.load(tmp_path)[1], variables)


def test_load_into_fills_a_module_that_is_already_built(tmp_path):
    saved = bert.make("tiny", vocab_size=50, depth=2, mlm_head=True)
    variables = random_variables(saved, TOKENS)
    convert.save(saved, variables, tmp_path)
    module = bert.make("tiny", vocab_size=50, depth=2, pooling="mean", dropout=0.0)
    loaded = convert.load_into(module, tmp_path)
    expected = {k: v for k, v in variables["params"].items() if not k.startswith("mlm_")}
    jax.tree.map(np.testing.assert_array_equal, loaded["params"], expected)


@pytest.mark.hf
def test_what_goes_with_the_weights_is_carried_along(tmp_path):
    import transformers

    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nheart\n")
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    module = bert.make("tiny", vocab_size=6, depth=1)
    variables = random_variables(module, TOKENS)
    convert.save(module, variables, out, tokenizer=source, card="# A card\n")
    convert.save(module, variables, out, tokenizer=out)
    assert transformers.AutoTokenizer.from_pretrained(out)("heart").input_ids == [2, 5, 3]
    assert (out / "README.md").read_text() == "# A card\n"


class Words:
    """Writes two files, as a tokenizer of Hugging Face's does."""

    def save_pretrained(self, folder):
        (Path(folder) / "templates").mkdir(exist_ok=True)
        (Path(folder) / "templates/chat.jinja").write_text("some words")
        (Path(folder) / "tokenizer.json").write_text("some words")


@pytest.mark.parametrize(
    "name",
    ["config.json", "preprocessor_config.json", "README.md", "tokenizer.json", "vocab.txt"],
)
def test_a_full_disk_leaves_the_old_file_or_the_new_one(tmp_path, full_disk, name):
    module, source, out = (
        bert.make("tiny", vocab_size=6, depth=1),
        tmp_path / "in",
        tmp_path / "out",
    )
    source.mkdir()
    (source / "vocab.txt").write_text("heart\n")
    variables = random_variables(module, TOKENS)

    def save():
        files = {"preprocessor": {"a": 1}, "card": "A card"}
        convert.save(module, variables, out, tokenizer=Words(), **files)
        convert.save(module, variables, out, tokenizer=source)

    save()
    kept = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert {"chat.jinja", "model.safetensors", name} < {file.name for file in kept}
    full_disk(name)
    with pytest.raises(OSError, match="No space left"):
        save()
    assert kept == {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}


@pytest.mark.hf
def test_the_image_processor_does_what_normalise_does(tmp_path):
    import transformers

    module = resnet.make("tiny", embedding_size=8, hidden_sizes=(16, 32, 32, 64))
    processor = convert.image_processor(32, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    convert.save(module, random_variables(module, IMAGES), tmp_path, preprocessor=processor)
    pixels = RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    theirs = processor(images=[pixels], return_tensors="np")["pixel_values"][0]
    assert_close(normalise(pixels), theirs.transpose(1, 2, 0))


PATCHES = {"image_size": 32, "patch_size": 8, "depth": 1, "width": 32, "num_heads": 2}
PATCHES |= {"mlp_dim": 48}


@pytest.mark.parametrize(
    ("module", "example"),
    [
        (vit.make("tiny", **PATCHES, pooling="mean"), IMAGES),
        (vit.make("tiny", **PATCHES, pooling="pooler", pooler=True), IMAGES),
        (clip_vision.make("tiny", **PATCHES, pooling="projection", projection=True), IMAGES),
        (bert.make("tiny", vocab_size=50, depth=1, pooling="mean"), TOKENS),
        (bert.make("tiny", vocab_size=50, depth=1, pooling="cls"), TOKENS),
    ],
    ids=lambda x: f"{type(x).__name__}-{x.pooling}" if hasattr(x, "pooling") else "",
)
def test_a_folder_says_how_features_were_pooled(module, example, tmp_path):
    variables = random_variables(module, example)
    convert.save(module, variables, tmp_path)
    again, read = convert.load(tmp_path)
    assert again.pooling == module.pooling
    pooled = [m.apply(v, example).pooled for m, v in ((module, variables), (again, read))]
    np.testing.assert_array_equal(*pooled)
    # A module that is already built runs as it was built; so does what is asked for by name.
    default = type(module).pooling
    other = module.clone(pooling=default)
    jax.tree.map(np.testing.assert_array_equal, convert.load_into(other, tmp_path), read)
    assert convert.load(tmp_path, pooling=default)[0].pooling == default
    file = tmp_path / "config.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in said.items() if not k.startswith("medvlp")}))
    assert convert.load(tmp_path)[0].pooling == default  # a folder from before


@pytest.mark.parametrize(
    ("pooling", "message"),
    [
        ("max", r"No pooling 'max' in this ViT, only cls, mean"),
        (["mean"], r"config\.json has medvlp_pooling \['mean'\]; a name is needed"),
        (None, r"config\.json has medvlp_pooling None; a name is needed"),
    ],
)
def test_a_pooling_that_is_none_is_one_sentence(pooling, message, tmp_path):
    module = vit.make("tiny", **PATCHES)
    convert.save(module, random_variables(module, IMAGES), tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"medvlp_pooling": pooling}))
    with pytest.raises(UserError, match=message):
        convert.load(tmp_path)


@pytest.mark.hf
def test_transformers_passes_over_how_features_were_pooled(tmp_path):
    import torch
    import transformers

    module = vit.make("tiny", **PATCHES, pooling="mean")
    variables = random_variables(module, IMAGES)
    convert.save(module, variables, tmp_path / "ours")
    theirs, report = transformers.AutoModel.from_pretrained(
        tmp_path / "ours", add_pooling_layer=False, output_loading_info=True
    )
    assert not any(report.values()), report
    tokens = theirs.eval()(torch.tensor(IMAGES).permute(0, 3, 1, 2)).last_hidden_state.detach()
    assert_close(module.apply(variables, IMAGES).pooled, tokens[:, 1:].mean(1))
    theirs.save_pretrained(tmp_path / "theirs")
    assert convert.load(tmp_path / "theirs")[0].pooling == "mean"
