"""Encoders from Hugging Face folders through the evaluations of a run; random weights."""

import json
import shutil
import types

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_config import BLOCK

from configs import common
from medvlp_jax import backbones, convert, evaluate, outside, weights
from medvlp_jax.config import UserError
from medvlp_jax.convert import beside
from medvlp_jax.data import text as tokenisation
from medvlp_jax.data.datasets.nih_cxr14 import nih_cxr14_dataset_builder as nih_cxr14
from medvlp_jax.encoders import clip_vision, vit
from medvlp_jax.encoders.base import normalise
from medvlp_jax.evaluation import results
from medvlp_jax.recipes import base

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
VISION = {**SMALL, "image_size": 32, "patch_size": 8}
PREPARATION = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}


@pytest.fixture(scope="module")
def vocabulary():
    return tokenisation.load_tokenizer("cxr_phantom").get_vocab_size()


@pytest.fixture(scope="module")
def clip(tmp_path_factory, vocabulary):
    """A CLIPModel with the words of the generated reports."""
    torch = pytest.importorskip("torch")
    import transformers

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    text = {**SMALL, "vocab_size": vocabulary, "eos_token_id": 3, "max_position_embeddings": 24}
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=12)
    transformers.CLIPModel(config).eval().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPARATION))
    shutil.copy(tokenisation._VOCAB / "cxr_phantom" / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    data = tmp_path_factory.mktemp("data")

    def run(*arguments, out=None):
        out = out or tmp_path_factory.mktemp("out")
        evaluate.main(
            [
                *("--corpus", "cxr_phantom:tiny", "--data-dir", str(data), "--out", str(out)),
                *("--limit", "24", "--set", "resamples=5", "--set", "batch_size=8"),
                *("--set", "probe_limit=24", *map(str, arguments)),
            ]
        )
        return results.read(out / "results.json").numbers

    return run


@pytest.mark.hf
def test_a_clip_is_evaluated_by_every_protocol_and_flavour(clip, command, capsys):
    found = command(
        *("--encoder", clip, "--protocol", "zero_shot,zero_shot@chexzero,retrieval,probe"),
        *("--set", "zero_shot.threshold=maxf1-on-val", "--set", "probe.fractions=0.5,1"),
    )
    assert found["zero_shot/finding/macro_auroc"]["protocol"] == "zero_shot@clean-v1"
    assert found["zero_shot/finding (chexzero)/macro_auroc"]["protocol"] == "zero_shot@chexzero-v1"
    assert 0 <= found["zero_shot/finding/macro_f1_at_threshold"]["value"] <= 1
    assert found["retrieval/image_to_text/protocol"]["gallery"] > 1
    assert found["retrieval/image_to_text/protocol"]["settings"]["class_task"] == "finding"
    assert found["probe/finding/protocol"]["settings"]["probe_limit"] == 24
    assert len(found["probe/finding_50%/macro_auroc"]["draws"]) == 3
    assert "probe/finding_50% (draw 2)/macro_auroc" in found
    assert "macro_auroc" in capsys.readouterr().out


@pytest.mark.hf
def test_features_are_those_of_transformers(clip):
    import torch
    import transformers

    data = common.data(corpora=("cxr_phantom:tiny",)).to_dict()
    parts, variables = outside.parts(clip, "", data, with_text=True)
    assert (parts.config["data"]["crop"], parts.config["data"]["text_length"]) == (32, 24)
    image = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    tokens = tokenisation.tokenize(parts.tokenizer, ["No effusion.", "Small effusion."], 24)
    found = parts.recipe.apply(variables, {"image": image, "report": tokens}, method="encode")
    theirs = transformers.CLIPModel.from_pretrained(clip).eval()
    mean, std = (np.array(PREPARATION[k]) for k in ("image_mean", "image_std"))
    pixels = torch.tensor((image / 255 - mean) / std).permute(0, 3, 1, 2).float()
    ids, mask = (torch.tensor(np.asarray(x)).long() for x in tokens)
    with torch.no_grad():
        out = theirs(pixel_values=pixels, input_ids=ids, attention_mask=mask)
    np.testing.assert_allclose(found["image"], out.image_embeds, atol=1e-5)
    np.testing.assert_allclose(found["text"], out.text_embeds, atol=1e-5)
    pooled = theirs.vision_model(pixels).pooler_output.detach()  # the class token, unprojected
    np.testing.assert_allclose(found["image_pooled"], pooled, atol=1e-5)


@pytest.mark.hf
def test_an_image_encoder_alone_is_probed_and_no_more(command, tmp_path, capsys):
    pytest.importorskip("torch")
    import transformers

    config = transformers.ViTConfig(**VISION)
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    found = command("--encoder", tmp_path, "--protocol", "probe")
    assert 0 <= found["probe/finding/macro_auroc"]["value"] <= 1
    assert {key.split("/")[0] for key in found} == {"probe"}
    assert "no preprocessor_config.json" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds one encoder: name the one for texts with --text"):
        command("--encoder", tmp_path)


PATCHES = {"width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 32, "image_size": 32}
PATCHES |= {"patch_size": 8}


@pytest.mark.parametrize(
    "module",
    [
        vit.make("tiny", **PATCHES, pooling="mean"),
        vit.make("tiny", **PATCHES, pooling="cls"),
        vit.make("tiny", **PATCHES, pooling="pooler", pooler=True),
        clip_vision.make("tiny", **PATCHES, pooling="projection", projection=True),
        clip_vision.make("tiny", **PATCHES, pooling="mean"),
    ],
    ids=lambda module: f"{type(module).__name__}-{module.pooling}",
)
def test_features_of_an_export_are_pooled_as_in_its_run(module, tmp_path):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 32, 32, 3)))
    variables = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) / 4, shapes)
    convert.save(module, variables, tmp_path)
    images = rng.integers(0, 256, (2, 32, 32, 3), np.uint8)
    expected = module.apply(variables, normalise(images)).pooled
    data = common.data(corpora=("cxr_phantom:tiny",)).to_dict()
    parts, read = outside.parts(str(tmp_path), "", data, with_text=False)
    found = parts.recipe.apply(read, {"image": images}, method="encode")
    np.testing.assert_allclose(found["image_pooled"], expected, rtol=1e-6)
    np.testing.assert_allclose(found["image"], base.unit(expected), rtol=1e-6)
    backbone = backbones.of_folder(str(tmp_path))
    ours = backbone.module.apply(backbone.variables, normalise(images)).pooled
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    # A run that begins with it pools as its config says, and as it where the config says nothing.
    assert weights.load_encoder(tmp_path, {"name": "vit"}, 0)[0].pooling == module.pooling
    spec = {"name": "vit", "pooling": "cls"}
    assert weights.load_encoder(tmp_path, spec, 0)[0].pooling == "cls"


@pytest.fixture
def nih(tmp_path):
    """NIH ChestX-ray14 with the published headers, in noise: labels and no report."""
    rows, lists = [nih_cxr14.HEADER], {"train_val": [], "test": []}
    for i in range(16):
        name, finding = (
            f"{i:08}_000.png",
            ("Mass|Effusion", "No Finding", "Mass", "Effusion")[i % 4],
        )
        rows.append(f"{name},{finding},0,{i},058Y,M,PA,40,40,0.143,0.143")
        lists["test" if i >= 12 else "train_val"].append(name)
        (tmp_path / "images").mkdir(exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / name)
    (tmp_path / "Data_Entry_2017_v2020.csv").write_text("\n".join(rows) + "\n")
    for part, names in lists.items():
        (tmp_path / f"{part}_list.txt").write_text("\n".join(names) + "\n")
    return "--corpus", "nih_cxr14:official", "--manual-dir", tmp_path


@pytest.mark.hf
def test_a_corpus_without_reports_has_all_but_retrieval(clip, command, nih, capsys):
    """The commands of README and docs/evaluation.md; nobody asked for retrieval."""
    out = nih[-1] / "out"
    found = command("--encoder", clip, *nih, "--prompts", "chexzero-v1", out=out)
    assert {key.split("/")[0] for key in found} == {"zero_shot", "probe"}
    header, *rows = (out / "zero_shot.csv").read_text().splitlines()
    assert (header.count("(truth)"), len(rows)) == (14, 4)
    assert (out / "zero_shot.png").is_file()
    assert "zero_shot/finding/auroc/Mass" in found
    said = capsys.readouterr().out
    assert "retrieval is left out: retrieval needs texts, and none of 4 records of nih_cx" in said
    # Another evaluation leaves nothing of the one before.
    found = command("--encoder", clip, *nih, "--protocol", "probe", out=out)
    assert {key.split("/")[0] for key in found} == {"probe"}
    assert [path.name for path in out.iterdir()] == ["results.json"]
    said = capsys.readouterr().out
    assert f"this replaces {out / 'results.json'}, which holds zero_shot, probe; another" in said
    for asked in ("retrieval", "probe,retrieval@cxrclip"):
        with pytest.raises(UserError, match=r"Protocol retrieval needs texts, .* has report: leav"):
            command("--encoder", clip, *nih, "--protocol", asked)
    with pytest.raises(UserError, match="shuffled_pairs goes with protocol retrieval"):
        command("--encoder", clip, *nih, "--prompts=chexzero-v1", "--controls=shuffled_pairs")


@pytest.mark.hf
def test_two_encoders_that_do_not_meet_are_refused(clip, command, tmp_path, vocabulary):
    import transformers

    width = BLOCK["width"]
    config = transformers.BertConfig(
        **SMALL | {"hidden_size": width}, vocab_size=vocabulary, max_position_embeddings=24
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    shutil.copy(tokenisation._VOCAB / "cxr_phantom" / "tokenizer.json", tmp_path)
    with pytest.raises(UserError, match=f"Images become 12 numbers and texts {width}"):
        command("--encoder", clip, "--text", tmp_path)


NORMALISED = {"image_mean": [0.5], "image_std": [0.2]}


@pytest.mark.parametrize(
    ("said", "size"),
    [
        ({}, 518),  # of the encoder
        ({"crop_size": {"height": 224, "width": 224}, "size": {"shortest_edge": 256}}, 224),
        ({"crop_size": 224, "do_center_crop": False, "size": {"height": 384, "width": 384}}, 384),
        ({"size": 256, "rescale_factor": 0.00392156862745098}, 256),
        ({"size": None}, 518),
    ],
)
def test_a_folder_says_how_images_are_prepared(tmp_path, said, size):
    module = types.SimpleNamespace(image_size=518)
    (tmp_path / "processor_config.json").write_text('{"image_processor": {"size": 7}}')
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said | NORMALISED))
    found = outside.preparation(tmp_path, module)
    assert found == ((0.5,), (0.2,), size)
    found = outside.preparation(tmp_path / "none", types.SimpleNamespace())
    assert found == (outside.IMAGENET_MEAN, outside.IMAGENET_STD, outside.SIZE)


def test_the_one_file_of_two_processors_says_how_images_are_prepared(tmp_path):
    """What CLIPProcessor.save_pretrained writes since release 5."""
    file = tmp_path / "processor_config.json"
    file.write_text(json.dumps({"image_processor": {"size": 64, **NORMALISED}}))
    found = outside.preparation(tmp_path, types.SimpleNamespace())
    assert found == ((0.5,), (0.2,), 64)
    file.write_text('{"processor_class": "CLIPProcessor"}')  # of earlier releases
    found = outside.preparation(tmp_path, types.SimpleNamespace())
    assert found.mean == outside.IMAGENET_MEAN


@pytest.mark.hf
@pytest.mark.parametrize(
    "name",
    [name for name in beside.NUMBERS if "DINOv3" not in name],  # whose class needs torchvision
)
def test_numbers_that_a_file_leaves_out_are_those_of_its_class(tmp_path, name):
    pytest.importorskip("torch")
    import transformers

    theirs = getattr(transformers, name)()
    for key, suffix in (("image_processor_type", "Fast"), ("image_processor_type", "")):
        said = {key: name + suffix, "size": 32}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
        found = outside.preparation(tmp_path, types.SimpleNamespace())
        assert found[:2] == (tuple(theirs.image_mean), tuple(theirs.image_std))
    old = name.replace("ImageProcessor", "FeatureExtractor")
    said = {"feature_extractor_type": old, "size": 32, "image_std": [0.1, 0.2, 0.3]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    found = outside.preparation(tmp_path, types.SimpleNamespace())
    assert found[:2] == (tuple(theirs.image_mean), (0.1, 0.2, 0.3))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"size": {"depth": 3}}, "accepted is one of whole pixels"),
        ({"size": "big"}, "accepted is one of whole pixels"),
        (
            {"image_mean": [0.5, 0.5]},
            r"image_mean \[0.5, 0.5\] and image_std \[0.2\]; accepted are",
        ),
        ({"image_mean": 0.5}, "accepted are lists of numbers"),
        ({"image_mean": None}, "image_mean None and .* or none where image_processor_type is one"),
        ({"do_normalize": False, "do_rescale": False}, "do_normalize False, do_rescale False; acc"),
        ({"rescale_factor": 1 / 127.5}, r"rescale_factor 0\.0078.*; accepted are pixels that are"),
    ],
)
def test_a_preparation_that_cannot_be_is_one_sentence(tmp_path, said, message):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(NORMALISED | said))
    with pytest.raises(UserError, match=message):
        outside.preparation(tmp_path, types.SimpleNamespace())


def test_bad_arguments_are_one_sentence(tmp_path):
    def refused(*arguments):
        with pytest.raises(UserError) as error:
            evaluate.main([*map(str, arguments)])
        return str(error.value)

    assert "--encoder needs --corpus and --out" in refused("--encoder", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    given = ("--encoder", tmp_path, "--corpus", "cxr_phantom:tiny", "--out")
    assert "is a run folder; name another" in refused(*given, tmp_path)
    other = tmp_path / "out"
    message = refused(*given, other, "--protocol", "zero_shot@glora")
    assert "No protocol 'zero_shot@glora'. Did you mean zero_shot@gloria" in message
    assert "untrained goes with --run" in refused(*given, other, "--controls", "untrained")
    assert "no such setting" in refused(*given, other, "--set", "zero_shot.draws=3")
    message = refused(*given, other, "--set", "zero_shot.draw=many")
    assert "the value is not like 0" in message
