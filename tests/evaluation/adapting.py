"""Tiny encoders and corpora of examples for the tests of heads."""

import jax
import numpy as np

from medvlp_jax import sharding
from medvlp_jax.data import pipeline
from medvlp_jax.encoders import resnet, vit
from medvlp_jax.evaluation import adaptation, features
from medvlp_jax.training.step import make_embed

SIDE = 32
MESH = sharding.make_mesh(devices=jax.devices()[:1])  # compiles faster than for eight devices


def encoder(kind="resnet"):
    """Return a small encoder with levels, or one with patches."""
    if kind == "vit":
        return vit.make("tiny", image_size=SIDE, patch_size=8, width=32, depth=1, mlp_dim=64)
    return resnet.make("tiny", embedding_size=8, hidden_sizes=(16, 16, 32, 32))


def discs(count, seed=0, side=SIDE):
    """Yield images with a bright disc on noise: image, mask, its box and the half it lies in."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] + 0.5
    for i in range(count):
        radius = rng.uniform(4, 7)
        cy, cx = rng.uniform(radius, side - radius, 2)
        disc = (y - cy) ** 2 + (x - cx) ** 2 <= radius**2
        image = np.clip(rng.normal(80, 20, (side, side)) + 120 * disc, 0, 255)
        yield {
            "image": image.astype(np.uint8)[..., None],
            "mask": disc[..., None],
            "boxes": np.array([[cy - radius, cx - radius, cy + radius, cx + radius]], np.float32),
            "kinds": np.zeros(1, np.int32),
            "label/half": np.array([cx < side / 2], np.int8),
            "patient_id": np.array(f"patient {i // 2}"),
        }


def train(recipe, variables, examples, value, folder, *, seed=0, **settings):
    """Fit a recipe on the first three quarters, stop by the rest; return what fit does."""
    settings = adaptation.Settings(**settings)
    cut = 3 * len(examples) // 4
    batches = pipeline.train_dataset(
        [examples[:cut]], transform=lambda e, _: e, batch_size=settings.batch_size, seed=seed
    )
    predict = make_embed(recipe, MESH, "predict")
    validate = lambda variables: value(evaluate(predict, variables, examples[cut:]))
    return adaptation.fit(
        recipe,
        variables,
        iter(batches),
        validate=validate,
        settings=settings,
        seed=seed,
        mesh=MESH,
        folder=folder,
    )


def evaluate(predict, variables, examples):
    """Return what a head predicts of examples, as `features.extract` lays it out."""
    batches = pipeline.eval_batches(examples, transform=lambda e, _: e, batch_size=16)
    return features.extract(lambda batch: predict(variables, batch), batches)


def weights_of(kind="resnet", seed=0):
    """Return variables of the small encoder."""
    images = np.zeros((1, SIDE, SIDE, 3), np.float32)
    return jax.jit(encoder(kind).init)(jax.random.key(seed), images)
