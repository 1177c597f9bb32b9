"""Two encoders and their projections, in PyTorch: the same similarities."""

import jax
import numpy as np
import pytest

from medvlp_jax import convert
from medvlp_jax.config import UserError
from medvlp_jax.convert import dual
from medvlp_jax.encoders import (
    bert,
    clip_text,
    clip_vision,
    dinov2,
    dinov3,
    modernbert,
    qwen3,
    resnet,
    siglip,
    swin,
    vit,
)
from medvlp_jax.encoders.base import Tokens
from medvlp_jax.recipes import base

RNG = np.random.default_rng(0)
SMALL = {"width": 32, "depth": 2, "num_heads": 4, "mlp_dim": 48}
TEXT = {"vocab_size": 60, **SMALL}
IMAGES = RNG.normal(size=(3, 64, 64, 3)).astype(np.float32)
LENGTHS = np.array([[9], [4], [6]])
TOKENS = Tokens(
    np.where(np.arange(9) < LENGTHS - 1, RNG.integers(3, 58, (3, 9)), 59).astype(np.int32)
    * (np.arange(9) < LENGTHS),
    np.arange(9) < LENGTHS,
)
VISION = {
    "resnet": resnet.make("tiny", embedding_size=8, hidden_sizes=(16, 32, 32, 64)),
    "vit": vit.make("tiny", **SMALL, image_size=64, pooler=True),
    "swin": swin.make("tiny"),
    "dinov2": dinov2.make("tiny", width=32, depth=2, num_heads=4, patch_size=8, image_size=64),
    "dinov3": dinov3.make("tiny", **SMALL),
    "clip": clip_vision.make("tiny", **SMALL, patch_size=16, image_size=64),
    "siglip": siglip.make("tiny", **SMALL, image_size=64),
}
LANGUAGE = {
    "bert": bert.make("tiny", **TEXT, pooler=True),
    "clip": clip_text.make("tiny", **TEXT, eos_id=59),
    "modernbert": modernbert.make("tiny", **TEXT),
    "qwen3": qwen3.make("tiny", **TEXT, num_kv_heads=2, head_width=8, eos_ids=()),
}
CASES = [
    *[
        (VISION[name].clone(**fields), IMAGES)
        for name, fields in [
            ("resnet", {}),
            ("vit", {"pooling": "cls"}),
            ("vit", {"pooling": "mean"}),
            ("vit", {"pooling": "pooler"}),
            ("swin", {}),
            ("dinov2", {}),
            ("dinov3", {}),
            ("clip", {}),
            ("siglip", {}),
            ("siglip", {"pooling": "mean"}),
        ]
    ],
    *[
        (LANGUAGE[name].clone(**fields), TOKENS)
        for name, fields in [
            ("bert", {"pooling": "cls"}),
            ("bert", {"pooling": "mean"}),
            ("bert", {"pooling": "pooler"}),
            ("clip", {}),
            ("modernbert", {}),
            ("modernbert", {"pooling": "mean"}),
            ("qwen3", {}),
        ]
    ],
]


def assert_close(ours, reference, tolerance=1e-5):
    """Hold max |a - b| <= tolerance * max |b|."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape
    assert np.abs(ours - reference).max() <= tolerance * np.abs(reference).max()


def random_variables(module, example):
    def draw(path, leaf):
        fan_in = int(np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 25
        array = RNG.normal(size=leaf.shape).astype(np.float32) / np.float32(np.sqrt(fan_in))
        return np.abs(array) + 0.5 if path[-1].key in ("scale", "var") else array

    shapes = jax.eval_shape(module.init, jax.random.key(0), example)
    return jax.tree_util.tree_map_with_path(draw, shapes)


def torch_inputs(example):
    import torch

    if isinstance(example, Tokens):
        ids, mask = (torch.tensor(np.asarray(leaf)).long() for leaf in example)
        return {"input_ids": ids, "attention_mask": mask}
    return {"pixel_values": torch.tensor(example).permute(0, 3, 1, 2)}


@pytest.mark.hf
@pytest.mark.parametrize(
    ("module", "example"),
    CASES,
    ids=lambda x: f"{type(x).__name__}-{getattr(x, 'pooling', '')}" if hasattr(x, "apply") else "",
)
def test_the_expression_for_pooled_features_gives_ours(tmp_path, module, example):
    torch = pytest.importorskip("torch")
    import transformers

    variables = random_variables(module, example)
    convert.save(module, variables, tmp_path)
    theirs = transformers.AutoModel.from_pretrained(tmp_path).eval()
    given = torch_inputs(example)
    with torch.no_grad():
        out = theirs(**given)
    names = {"out": out, "mask": given.get("attention_mask"), "torch": torch}
    expected = eval(dual.pooled_in_torch(module), names)
    assert_close(jax.jit(module.apply)(variables, example).pooled, expected)


def test_every_expression_has_a_case():
    tried = {(type(module), getattr(module, "pooling", "")) for module, _ in CASES}
    assert tried == dual.POOLED.keys()


@pytest.mark.hf
@pytest.mark.parametrize(
    ("vision", "language"),
    [("vit", "bert"), ("dinov2", "bert"), ("dinov3", "clip"), ("clip", "clip"), ("siglip", "bert")],
)
def test_transformers_gives_the_same_similarities(tmp_path, vision, language):
    import torch
    import transformers

    image, text = VISION[vision], LANGUAGE[language]
    image = image.clone(pooling="pooler") if vision == "vit" else image
    text = text.clone(pooling="pooler", mlm_head=True) if language == "bert" else text
    sides = []
    for module, example in ((image, IMAGES), (text, TOKENS)):
        projection = RNG.normal(size=(32, 12)).astype(np.float32)
        sides.append(dual.Side(module, random_variables(module, example), projection))
    dual.save_dual(*sides, tmp_path, log_scale=1.25)
    ours = [
        base.unit(jax.jit(side.module.apply)(side.variables, example).pooled @ side.projection)
        for side, example in zip(sides, (IMAGES, TOKENS), strict=True)
    ]
    theirs, report = transformers.VisionTextDualEncoderModel.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report.values()), report
    with torch.no_grad():
        out = theirs.eval()(**torch_inputs(IMAGES), **torch_inputs(TOKENS))
    assert_close(ours[0], out.image_embeds)
    assert_close(ours[1], out.text_embeds)
    assert_close(np.exp(1.25) * ours[0] @ ours[1].T, out.logits_per_image)


def test_encoders_whose_pooled_features_are_no_pooler_output_are_refused(tmp_path):
    sides = [dual.Side(m, {}, np.ones((32, 4))) for m in (VISION["resnet"], LANGUAGE["bert"])]
    with pytest.raises(UserError, match=r"of ResNet and .* Bert with pooling 'cls' are not the"):
        dual.save_dual(*sides, tmp_path / "out", log_scale=0.0)
    assert not (tmp_path / "out").exists()
