"""An export computes in PyTorch what the recipe computes here."""

import io
import types

import jax
import numpy as np
import PIL.ExifTags
import PIL.Image
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from medvlp_jax import card, export, weights
from medvlp_jax.data import transforms
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
from medvlp_jax.evaluation import provenance, results
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


def settings(crop=CROP, **changed):
    """Return how a config prepares images; of those of its size, as they are."""
    plain = {"channels": 3, "crop_black_border": False, "stretch": False, "fit": "squash"}
    plain |= {"legacy_wrap": False, "mask_lower_edge": 0.0, "size": crop, "crop": crop}
    return plain | {"text_length": LENGTH} | changed


def run_example(recipe, folder, monkeypatch, images=IMAGES, **changed):
    """Return the similarities that the code of the model card computes in a folder."""
    monkeypatch.chdir(folder)
    if isinstance(images, np.ndarray):
        changed["crop"], images = images.shape[1], [*map(PIL.Image.fromarray, images)]
    data, names = settings(**changed), {}
    exec(f"{card.preparation(data)}\n{card.example(recipe, data)}", names)
    return names["similarity"](images, REPORTS).numpy()


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


def encoded(kind, channels):
    """Return a file: a picture with black borders and little contrast, wider than high."""
    pixels = np.zeros((90, 130, 3), np.uint8)
    slope = np.linspace(40, 150, 100)[:, None] + RNG.normal(0, 9, (70, 100, 3)).cumsum(0) / 9
    pixels[8:78, 20:120] = slope.clip(20, 200)
    image = PIL.Image.fromarray(pixels).convert("L" if channels == 1 else "RGB")
    file, exif = io.BytesIO(), PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 6
    turned = {"exif": exif} if kind == "turned JPEG" else {}
    image.save(file, kind.split()[-1], **turned)
    return file.getvalue()


PREPARATIONS = {
    "IMITATE": {"crop_black_border": True, "stretch": True, "size": 48},
    "border alone": {"crop_black_border": True, "size": 36},
    "padded": {"fit": "pad", "stretch": True, "size": 41},
    "masked": {"mask_lower_edge": 0.12, "stretch": True, "size": 48},
    "wrapped": {"legacy_wrap": True, "crop_black_border": True, "stretch": True, "size": 48},
    "plain": {"size": 32},
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", PREPARATIONS)
def test_the_code_of_the_card_prepares_images_as_the_run_did(name, channels):
    data, names = settings(channels=channels, **PREPARATIONS[name]), {}
    exec(card.preparation(data), names)
    keys = ("size", "channels", "crop_black_border", "stretch", "legacy_wrap", "fit")
    for kind in ("PNG", "JPEG", "turned JPEG"):
        file = encoded(kind, 4 - channels)  # of grey a colour image, and the other way round
        whole = transforms.decode(file, **{key: data[key] for key in keys})
        whole = transforms.mask_lower_edge(whole, data["mask_lower_edge"])
        expected = transforms.center_view(whole, size=data["crop"])
        found = names["prepared"](PIL.Image.open(io.BytesIO(file)))
        np.testing.assert_array_equal(np.asarray(found).reshape(expected.shape), expected)
        flat = PIL.Image.new("RGB", (50, 40))  # black all over
        assert names["prepared"](flat).size == (CROP, CROP)


@pytest.mark.hf
@pytest.mark.parametrize("channels", [1, 3])
def test_the_example_gives_the_similarities_of_the_run_for_files(channels, exported, monkeypatch):
    recipe, variables, tokenizer, folder = exported
    how = {"channels": channels, **PREPARATIONS["IMITATE"]}
    files = [encoded(kind, 3) for kind in ("PNG", "JPEG")]
    decoded = [transforms.decode(file, size=48, channels=channels) for file in files]
    images = np.stack([transforms.center_view(one, size=CROP) for one in decoded])
    opened = [PIL.Image.open(io.BytesIO(file)) for file in files]
    theirs = run_example(recipe, folder, monkeypatch, opened, **how)
    assert_close(similarities(recipe, variables, tokenizer, images), theirs)


def test_the_card_says_how_images_are_prepared():
    recipe = clip_recipe(image_encoder("cls"), text_encoder()[0])
    said = lambda **how: " ".join(made_card(recipe, data=settings(**how)).split())
    plain = said()
    assert "Images: in colour, squashed to 32 x 32 pixels, ImageNet mean" in plain
    assert "grey" not in plain
    found = said(channels=1, fit="pad", mask_lower_edge=0.1, **PREPARATIONS["IMITATE"])
    start = "Images: grey, replicated to three channels, black borders cut off, contrast stretched "
    start += "to 0..255, padded to 48 x 48 pixels, the lowest 10% black, of that the central 32 x "
    assert f"{start}32, ImageNet" in found
    assert "def prepared(image)" in found
    assert "processors beside the weights only squash an image to 32 x 32" in found


def test_the_card_has_results_of_the_exported_weights_alone():
    recipe = clip_recipe(image_encoder("cls"), text_encoder()[0])
    params = {"params": {"image": {"kernel": np.ones(3)}, "text": {}}}
    trained = weights.Trained(params, step=4, is_selected=True)
    number = results.number(0.7, 0.6, 0.8, n=11, chance=0.5)
    numbers = {"zero_shot/finding/auroc": {**number, "protocol": "zero_shot", "hash": "1"}}
    rows = {"corpus": "other", "split": "validation", "rows": 11, "patients": 7}
    own = {"weights": provenance.weights_hash(params), "rows": rows}

    def said(**origin):
        measured = results.Written(numbers, own | origin)
        made = made_card(recipe, trained=trained, measured=measured, select="a/b/c")
        return " ".join(made.split())

    found = said()
    assert (
        "recipe `clip`, 4 of 9 steps of 1 pairs; of all evaluated steps the best by `a/b/c`."
        in (found)
    )
    assert "These weights, of step 4, on `other`, split validation: 11 rows of 7 patients." in found
    assert "| zero_shot/finding/auroc |" in found
    for origin in ({"weights": "0" * 16}, {"weights": None}):
        found = said(**origin)
        assert "Not evaluated. The results.json of the run is of other weights" in found
        assert "zero_shot/finding/auroc" not in found
    assert "## Results Not evaluated. ##" in " ".join(made_card(recipe).split())


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


def made_card(recipe, *, data=None, trained=None, measured=None, **train):
    """Return the card of a run of nothing."""
    train = {"steps": 9, "batch_size": 1, "select": ""} | train
    data = {"corpora": []} | (settings() if data is None else data)
    config = {"recipe": {"name": "clip"}, "data": data, "train": train}
    parts = types.SimpleNamespace(recipe=recipe, config=config)
    trained = trained or weights.Trained({"params": {"image": {}, "text": {}}}, step=9)
    return card.card(parts, trained, [], measured)


@pytest.mark.parametrize("kind", ["bert", "clip"])
def test_the_card_names_the_pooler_only_of_encoders_that_have_one(kind):
    text = text_encoder()[0] if kind == "bert" else clip_text.make("tiny")
    said = made_card(clip_recipe(image_encoder("cls"), text))
    row = next(line for line in said.splitlines() if line.startswith("| `text/`"))
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
    assert "interpolate" not in card.example(recipe, settings())


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
    monkeypatch.setattr(export, "card", lambda *_: "A new card, longer than before.")
    (tmp_path / "README.md").write_text("A card.")
    recipe = types.SimpleNamespace(image="an encoder")
    data = {"crop": 32, "text_length": 16}
    parts = types.SimpleNamespace(recipe=recipe, tokenizer="one", config={"data": data})
    full_disk("README.md")
    with pytest.raises(OSError, match="No space left"):
        export.export(parts, weights.Trained({}, step=1), tmp_path, [])
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
