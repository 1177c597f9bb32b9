"""A run moves from mesh to mesh: nothing but the order of summation changes."""

import contextlib

import jax
import numpy as np
import pytest
from flax import linen as nn

from medvlp_jax import sharding
from medvlp_jax.data import pipeline
from medvlp_jax.losses import tiled
from medvlp_jax.recipes import base
from medvlp_jax.training import loop, optim
from medvlp_jax.training import step as training
from medvlp_jax.training.checkpoint import Checkpointer
from medvlp_jax.training.report import Reporter

pytestmark = pytest.mark.slow

RULES = [("first/kernel", ("fsdp", None))]
SOURCE = [np.random.default_rng(k).normal(size=(2, 8)) for k in range(40)]
STEPS = 12


class Pairs(nn.Module):
    """Two towers with dropout and the tiled loss, in one floating-point type."""

    dtype: type

    inputs = ("image", "text")
    frozen = ()
    weights = {"contrastive": 1.0}  # noqa: RUF012 (never changed)

    @nn.compact
    def encode(self, batch, *, train=False):
        def tower(x, name):
            dense = lambda width, layer: nn.Dense(
                width, dtype=self.dtype, param_dtype=self.dtype, name=f"{name}_{layer}"
            )
            x = nn.gelu(dense(32, "first")(x.astype(self.dtype)))
            x = nn.Dropout(0.2, deterministic=not train)(x)
            return base.unit(dense(16, "second")(x))

        return {key: tower(batch[key], key) for key in self.inputs}

    def objective(self, features, batch, *, train=False):
        image, text = features["image"], features["text"]
        return {"contrastive": tiled.info_nce(image, text, 10.0, tile=4)}


def augment(record, rng):
    image, text = record
    return {"image": image + rng.normal(size=8), "text": text}


def train(folder, devices, steps, dtype=np.float32):
    """Go on with the run in `folder` to `steps` on so many devices; return its state."""
    fsdp = min(2, devices)
    mesh = sharding.make_mesh(fsdp=fsdp, devices=jax.devices()[:devices])
    recipe = Pairs(dtype)
    batches = iter(
        pipeline.train_dataset([SOURCE], transform=augment, batch_size=16, seed=0, threads=1)
    )
    example = {"image": np.zeros((2, 8), dtype), "text": np.zeros((2, 8), dtype)}
    variables = training.init_variables(recipe, example, seed=0)
    tx, rate = optim.make(variables["params"], name="adamw", lr=1e-2, steps=STEPS, warmup=2)
    state = training.make_state(variables, tx, ())
    state = sharding.place(state, sharding.shardings(state, mesh, RULES))
    checkpointer = Checkpointer(folder / "checkpoints")
    restored = checkpointer.resume(state)
    if restored:
        state = restored.state
        batches.set_state(restored.position)
        assert len(state.params["image_first"]["kernel"].sharding.device_set) == devices
    state = loop.fit(
        state,
        training.make_train_step(recipe, tx, rate, 0, mesh=mesh),
        batches,
        recipe=recipe,
        mesh=mesh,
        steps=steps,
        reporter=Reporter(folder, every=1),
        checkpointer=checkpointer,
    )
    checkpointer.close()
    return jax.device_get(state)


def largest(a, b):
    """Return the largest difference of two states relative to the norm of its array."""
    pairs = zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True)
    return max(np.abs(x - y).max() / np.abs(x).max() for x, y in pairs)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-13)], ids=["float32", "float64"]
)
def test_eight_then_four_then_one_device_is_one_run_but_for_rounding(tmp_path, dtype, tolerance):
    with jax.enable_x64(True) if dtype == np.float64 else contextlib.nullcontext():
        whole = train(tmp_path / "whole", 8, STEPS, dtype)
        for devices, steps in ((8, 4), (4, 8), (1, STEPS)):
            moved = train(tmp_path / "moved", devices, steps, dtype)
        assert moved.params["image_first"]["kernel"].dtype == dtype
        assert 0 < largest(whole, moved) <= tolerance


def test_on_the_same_mesh_not_a_bit_changes(tmp_path):
    whole = train(tmp_path / "whole", 4, STEPS)
    for steps in (3, 7, STEPS):
        stopped = train(tmp_path / "stopped", 4, steps)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(stopped), strict=True):
        np.testing.assert_array_equal(a, b)
