"""S-CLIP: which rows each term reads, and that a run of it trains and goes on after a stop."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medvlp_jax import train
from medvlp_jax.encoders.base import Tokens
from medvlp_jax.losses import contrastive, pseudo_captions
from medvlp_jax.recipes import sclip
from medvlp_jax.training import step as training

ROOT = pathlib.Path(__file__).parents[2]
BLOCK = {"depth": 1, "width": 16, "num_heads": 2, "mlp_dim": 16}
VIT = {"name": "vit", "variant": "tiny", **BLOCK, "patch_size": 16, "image_size": 32}
BERT = {"name": "bert", "variant": "tiny", "vocab_size": 30, **BLOCK, "pooling": "mean"}
BERT |= {"dropout": 0.0, "attention_dropout": 0.0}
RECIPE = sclip.make(
    image=VIT, text=BERT, weights=dict.fromkeys(sclip.TERMS, 1.0), dim=8, loss_tile=0
)
ENCODE = jax.jit(lambda variables, batch: RECIPE.apply(variables, batch, method="encode"))
JUDGE = jax.jit(lambda v, f, b: RECIPE.apply(v, f, b, method="objective"))


def batch_of(size=6):
    rng = np.random.default_rng(0)
    tokens = lambda *n: Tokens(rng.integers(4, 30, (*n, 6)), np.ones((*n, 6), bool))
    return {
        "image": rng.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8),
        "report": tokens(size),
        "report_valid": np.arange(size) != 1,
        "report_id": np.arange(size),
        "evidence": tokens(size, 3),
        "evidence_mask": np.arange(3) < rng.integers(1, 4, (size, 1)),
        "paired": np.arange(size) < 4,
    }


@pytest.fixture(scope="module")
def model():
    batch = batch_of()
    variables = training.init_variables(RECIPE, batch, 0)
    return batch, variables, ENCODE(variables, batch)


def test_terms_are_those_of_their_rows(model):
    batch, variables, features = model
    found = JUDGE(variables, features, batch)
    pairs = np.array([True, False, True, True, False, False])  # a pair without text is none
    rows = {"pairs": pairs, "apart": np.arange(6) >= 4}
    scale = 1 / 0.07
    image, text = features["image"], features["text"]
    np.testing.assert_allclose(
        found["contrastive"],
        contrastive.info_nce(image[pairs], text[pairs], jnp.float32(scale)),
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        found["caption"], pseudo_captions.caption_loss(image, text, scale, **rows), rtol=1e-5
    )
    keywords = pseudo_captions.keyword_loss(
        image,
        features["keywords"],
        batch["evidence"].ids,
        scale,
        told=batch["evidence_mask"],
        **rows,
    )
    np.testing.assert_allclose(found["keyword"], keywords, rtol=1e-5)
    assert min(found.values()) > 0


def test_no_term_reads_a_report_apart(model):
    batch, variables, features = model
    gradient = jax.grad(
        lambda read: sum(JUDGE(variables, {**features, **read}, batch).values()), allow_int=True
    )({name: features[name] for name in ("text", "keywords")})
    pairs = np.array([True, False, True, True, False, False])
    assert np.abs(gradient["text"][pairs]).max(1).min() > 0
    assert not np.any(gradient["text"][~pairs])
    assert not np.any(gradient["keywords"][~pairs])
    assert np.any(gradient["keywords"])


SMALL = ("--config=configs/sclip.py:demo", "--config.data.corpora=('cxr_phantom:tiny',)")
SMALL += ("--config.init.text=",)
SMALL += ("--config.train.steps=6", "--config.train.batch_size=16", "--config.optim.warmup=2")
SMALL += ("--config.train.checkpoint_every=3", "--config.train.log_every=1")
SMALL += ("--config.train.evaluate_every=0", "--config.train.export=False")
SMALL += ("--config.evals.protocols=('retrieval',)", "--config.evals.resamples=5")


def run(folder):
    train.run(*train.resolve([*SMALL, f"--workdir={folder}"]))
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{n: line[f"loss/{n}"] for n in sclip.TERMS} for line in lines if "loss" in line]


@pytest.mark.slow
def test_a_run_trains_on_few_pairs_and_a_stopped_one_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MEDVLP_DATA_DIR", str(tmp_path / "data"))
    whole = run(tmp_path / "whole")
    assert len(whole) == 6
    assert all(value > 0 for terms in whole for value in terms.values())
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "6")
    capsys.readouterr()
    assert run(tmp_path / "again") == whole
    assert f"Resuming {tmp_path / 'again'} at step 3\n" in capsys.readouterr().out
