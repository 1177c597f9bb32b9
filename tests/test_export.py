"""An export computes in PyTorch what the recipe computes here."""

import types

import jax
import numpy as np
import PIL.Image
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from medvlp_jax import export
from medvlp_jax.data.text import load_tokenizer, tokenize
from medvlp_jax.encoders import (
    bert,
    clip_text,
    clip_vision,
    qwen3,
    resnet,
    siglip,
    siglip_text,
    vit,
)
from medvlp_jax.layers import Lora
from medvlp_jax.recipes import clip, imitate

RNG = np.random.default_rng(0)
LENGTH, CROP = 16, 32
REPORTS = ["Small left pleural effusion.", "No acute disease.", "Heart size is normal. " * 9]
IMAGES = RNG.integers(0, 256, (3, CROP, CROP, 3), dtype=np.uint8)


def text_encoder(**fields):
    tokenizer = load_tokenizer("cxr_phantom")
    small = {"width": 32, "depth": 2, "num_heads": 2, "mlp_dim": 48}
    size = tokenizer.get_vocab_size()
    return bert.make("tiny", vocab_size=size, **small | fields), tokenizer


def image_encoder(kind):
    if kind == "resnet":
        return resnet.make("tiny", embedding_size=8, hidden_sizes=(16, 32, 32, 64))
    small = {"width": 32, "depth": 2, "num_heads": 2, "mlp_dim": 48, "image_size": CROP}
    return vit.make("tiny", patch_size=8, **small, pooling=kind, pooler=kind == "pooler")


def draw(path, leaf):
    fan_in = int(np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 25
    array = RNG.normal(size=leaf.shape).astype(np.float32) / np.float32(np.sqrt(fan_in))
    return np.abs(array) + 0.5 if path[-1].key.startswith(("scale", "var")) else array


def random_variables(recipe, batch):
    keys = {name: jax.random.key(0) for name in ("params", "draws")}
    method = lambda recipe, batch: recipe.encode(batch)
    shapes = jax.eval_shape(lambda: recipe.init(keys, batch, method=method))
    shapes = {kind: dict(tree) for kind, tree in shapes.items()}
    return jax.tree_util.tree_map_with_path(draw, shapes)


def clip_recipe(image, text, loss="info_nce"):
    return clip.make(
        image=image,
        text=text,
        weights={"contrastive": 1.0},
        dim=24,
        loss=loss,
        section="impression",
    )


def imitate_recipe(image, text, **fields):
    weights = dict.fromkeys(("impression", "findings", "view_diagnosis", "view_reading"), 1.0)
    return imitate.make(image=image, text=text, weights=weights, dim=24, **fields)


def similarities(recipe, variables, tokenizer, images=IMAGES):
    tokens = tokenize(tokenizer, REPORTS, LENGTH)
    batch = {"image": images, "impression": tokens}
    features = jax.jit(lambda v: recipe.apply(v, batch, method="encode"))(variables)
    return np.asarray(features["image"] @ features["text"].T)


def run_example(recipe, folder, monkeypatch, images=IMAGES):
    """Return the similarities that the code of the model card computes in a folder."""
    monkeypatch.chdir(folder)
    names = {}
    exec(export.example(recipe, LENGTH, images.shape[1]), names)
    return names["similarity"](list(map(PIL.Image.fromarray, images)), REPORTS).numpy()


def assert_close(ours, reference):
    assert np.abs(ours - reference).max() <= 1e-5 * np.abs(reference).max()


RECIPES = {
    "clip": lambda: (clip_recipe, image_encoder("cls"), {"pooling": "cls"}),
    "clip, mean": lambda: (clip_recipe, image_encoder("mean"), {"pooling": "mean"}),
    "clip, pooler": lambda: (
        clip_recipe,
        image_encoder("pooler"),
        {"pooling": "pooler", "pooler": True},
    ),
    "imitate": lambda: (imitate_recipe, image_encoder("resnet"), {"pooling": "mean"}),
}


@pytest.fixture(params=RECIPES)
def exported(request, tmp_path):
    """Return a recipe, its variables, its tokenizer and the folder it is exported to."""
    pytest.importorskip("torch")
    make, image, fields = RECIPES[request.param]()
    text, tokenizer = text_encoder(**fields)
    recipe = make(image, text)
    batch = dict.fromkeys(("findings", "impression"), tokenize(tokenizer, REPORTS, LENGTH))
    variables = random_variables(recipe, {"image": IMAGES, **batch})
    export.write_weights(recipe, variables, tmp_path, tokenizer, crop=CROP, length=LENGTH)
    return recipe, variables, tokenizer, tmp_path


@pytest.mark.hf
def test_the_example_of_the_model_card_gives_the_same_similarities(exported, monkeypatch):
    recipe, variables, tokenizer, folder = exported
    theirs = run_example(recipe, folder, monkeypatch)
    assert_close(similarities(recipe, variables, tokenizer), theirs)


@pytest.mark.hf
def test_low_rank_factors_are_folded_into_both_encoders(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    factors = Lora(2, 4.0, 0.0, "attention/(query|value)")
    text, tokenizer = text_encoder(pooling="pooler", pooler=True, lora=factors)
    recipe = clip_recipe(image_encoder("pooler").clone(lora=factors), text)
    batch = {"image": IMAGES, "impression": tokenize(tokenizer, REPORTS, LENGTH)}
    variables = random_variables(recipe, batch)
    export.write_weights(recipe, variables, tmp_path, tokenizer, crop=CROP, length=LENGTH)
    theirs = run_example(recipe, tmp_path, monkeypatch)
    assert_close(similarities(recipe, variables, tokenizer), theirs)
    names = {name for name in load_file(tmp_path / "projections.safetensors") if "lora" in name}
    assert (names, (tmp_path / "dual").is_dir()) == (set(), True)


LETTERS = "abcdefghijklmnopqrstuvwxyz.Ġ"


def byte_pair(*special, template=""):
    """Return a tokenizer of letters, and of the special tokens that come first."""
    vocabulary = {token: i for i, token in enumerate((*special, *LETTERS))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_special_tokens([*special])
    if template:
        ids = [(token, vocabulary[token]) for token in special if token in template]
        tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=ids)
    return tokenizer


SMALL = {"width": 32, "depth": 2, "num_heads": 2, "mlp_dim": 48}
OTHERS = {
    "clip": (
        byte_pair("<|startoftext|>", "<|endoftext|>", template="<|startoftext|> $A <|endoftext|>"),
        lambda size: clip_text.make("tiny", vocab_size=size, eos_id=1, max_length=LENGTH, **SMALL),
        {"pad": "<|endoftext|>", "eos": "<|endoftext|>", "bos": "<|startoftext|>"},
    ),
    "qwen3": (
        byte_pair("<|endoftext|>", "<|im_end|>"),
        lambda size: qwen3.make(
            "tiny", vocab_size=size, eos_ids=(1,), head_width=16, num_kv_heads=1, **SMALL
        ),
        {"pad": "<|endoftext|>", "eos": "<|im_end|>", "bos": None},
    ),
    "siglip": (
        byte_pair("<pad>", "</s>", "<unk>", template="$A </s>"),
        lambda size: siglip_text.make("tiny", vocab_size=size, max_length=LENGTH, **SMALL),
        {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"},
    ),
}


@pytest.mark.hf
@pytest.mark.parametrize("kind", OTHERS)
def test_tokenizers_that_are_not_berts_name_their_special_tokens(kind, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    import transformers

    tokenizer, make_text, special = OTHERS[kind]
    recipe = clip_recipe(image_encoder("cls"), make_text(tokenizer.get_vocab_size()))
    tokens = tokenize(tokenizer, REPORTS, LENGTH)
    variables = random_variables(recipe, {"image": IMAGES, "impression": tokens})
    export.write_weights(recipe, variables, tmp_path, tokenizer, crop=CROP, length=LENGTH)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "text")
    assert {name: getattr(theirs, f"{name}_token") for name in special} == special
    assert theirs.model_max_length == LENGTH
    ids = theirs(REPORTS, padding="max_length", truncation=True, return_tensors="np").input_ids
    np.testing.assert_array_equal(ids, tokens.ids)
    if kind != "siglip":  # whose pooled feature is no short expression there
        ours = similarities(recipe, variables, tokenizer)
        assert_close(ours, run_example(recipe, tmp_path, monkeypatch))


@pytest.mark.parametrize("kind", ["bert", "clip"])
def test_the_card_names_the_pooler_only_of_encoders_that_have_one(kind):
    text = text_encoder()[0] if kind == "bert" else clip_text.make("tiny")
    data = {"corpora": [], "fit": "squash", "size": CROP, "crop": CROP, "text_length": LENGTH}
    config = {"recipe": {"name": "clip"}, "data": data, "train": {"steps": 1, "batch_size": 1}}
    recipe = clip_recipe(image_encoder("cls"), text)
    parts = types.SimpleNamespace(recipe=recipe, config=config)
    card = export._card(parts, {"params": {"image": {}, "text": {}}}, [], {})
    row = next(line for line in card.splitlines() if line.startswith("| `text/`"))
    assert ("add_pooling_layer=False" in row) == (kind == "bert")


LARGER = RNG.integers(0, 256, (3, 48, 48, 3), dtype=np.uint8)
TOWER = {**SMALL, "patch_size": 8, "image_size": CROP}


@pytest.mark.hf
@pytest.mark.parametrize(
    "image",
    [image_encoder("pooler"), clip_vision.make("tiny", **TOWER), siglip.make("tiny", **TOWER)],
    ids=lambda module: type(module).__name__,
)
def test_the_example_takes_images_of_another_size_than_the_position_table(
    image, tmp_path, monkeypatch
):
    pytest.importorskip("torch")
    text, tokenizer = text_encoder(pooling="pooler", pooler=True)
    recipe = clip_recipe(image, text)
    batch = {"image": LARGER, "impression": tokenize(tokenizer, REPORTS, LENGTH)}
    variables = random_variables(recipe, batch)
    export.write_weights(recipe, variables, tmp_path, tokenizer, crop=48, length=LENGTH)
    ours = similarities(recipe, variables, tokenizer, LARGER)
    assert_close(ours, run_example(recipe, tmp_path, monkeypatch, LARGER))
    assert not (tmp_path / "dual").exists()  # that model cannot be told
    assert "interpolate" not in export.example(recipe, LENGTH, CROP)


@pytest.mark.hf
def test_the_exported_processor_takes_grey_images(exported):
    import transformers

    processor = transformers.AutoImageProcessor.from_pretrained(exported[3] / "image")
    grey = PIL.Image.fromarray(IMAGES[0, ..., 0])
    found, expected = (
        processor(image, return_tensors="np").pixel_values for image in (grey, grey.convert("RGB"))
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.hf
def test_a_dual_encoder_is_written_where_the_heads_allow(exported):
    import torch
    import transformers

    recipe, variables, tokenizer, folder = exported
    pools = [recipe.image, recipe.text]
    allowed = [getattr(module, "pooling", "") for module in pools] == ["pooler", "pooler"]
    assert (folder / "dual").exists() == allowed
    if not allowed:
        return
    model, report = transformers.VisionTextDualEncoderModel.from_pretrained(
        folder / "dual", output_loading_info=True
    )
    assert not any(report.values()), report
    processor = transformers.AutoImageProcessor.from_pretrained(folder / "dual")
    theirs = transformers.AutoTokenizer.from_pretrained(folder / "dual")
    images = [PIL.Image.fromarray(pixels) for pixels in IMAGES]
    texts = theirs(REPORTS, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
    with torch.no_grad():
        out = model.eval()(**processor(images, return_tensors="pt"), **texts)
    ours = similarities(recipe, variables, tokenizer)
    assert_close(ours, (out.image_embeds @ out.text_embeds.T).numpy())
    scale = min(np.exp(variables["params"]["log_scale"]), clip.MAX_SCALE)
    assert_close(ours * scale, out.logits_per_image.numpy())


def test_a_full_disk_leaves_the_card_of_an_earlier_export(tmp_path, monkeypatch, full_disk):
    monkeypatch.setattr(export, "write_weights", lambda *_, **__: None)
    monkeypatch.setattr(export, "_card", lambda *_: "A new card, longer than before.")
    (tmp_path / "README.md").write_text("A card.")
    recipe = types.SimpleNamespace(image="an encoder")
    data = {"crop": 32, "text_length": 16}
    parts = types.SimpleNamespace(recipe=recipe, tokenizer="one", config={"data": data})
    full_disk("README.md")
    with pytest.raises(OSError, match="No space left"):
        export.export(parts, {}, tmp_path, [])
    assert (tmp_path / "README.md").read_bytes() == b"A card."
    assert len([*tmp_path.iterdir()]) == 1


def test_a_full_disk_leaves_the_tokenizer_of_an_earlier_export(tmp_path, full_disk):
    pytest.importorskip("transformers")
    encoder, tokenizer = text_encoder()
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), tokenize(tokenizer, REPORTS, LENGTH))
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes["params"])
    export.write_text(encoder, params, tmp_path, tokenizer, length=LENGTH)
    kept = {file: file.read_bytes() for file in (tmp_path / "text").iterdir()}
    assert tmp_path / "text/tokenizer.json" in kept
    full_disk("tokenizer.json")
    with pytest.raises(OSError, match="No space left"):
        export.write_text(encoder, params, tmp_path, tokenizer, length=LENGTH)
    assert kept == {file: file.read_bytes() for file in (tmp_path / "text").iterdir()}
