"""Large batches in one step: tiled losses on a mesh, and encoding in chunks, change no gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from medvlp_jax import schedules, sharding
from medvlp_jax.config import UserError
from medvlp_jax.encoders.base import Tokens
from medvlp_jax.recipes import clip, imitate
from medvlp_jax.training import params as paths
from medvlp_jax.training import step as training

TEXT = {"name": "bert", "variant": "tiny", "vocab_size": 50, "width": 16, "depth": 1, "mlp_dim": 32}
VIT = {"name": "vit", "image_size": 16, "patch_size": 8, "width": 16, "depth": 1, "num_heads": 2}
RESNET = {"name": "resnet", "variant": "tiny", "embedding_size": 8}
RESNET |= {"hidden_sizes": (16, 32, 32, 64)}
TERMS = dict.fromkeys(("impression", "findings", "view_diagnosis", "view_reading"), 1.0)
BATCH = 32


def make_clip(dropout=0.0, **fields):
    drop = {"dropout": dropout, "attention_dropout": dropout}
    return clip.make(
        image={**VIT, "mlp_dim": 32, "dropout": dropout},
        text={**TEXT, **drop},
        weights={"contrastive": 1.0},
        **{"dim": 16, "loss_tile": 3, **fields},
    )


def make_imitate(**fields):
    small = {"dim": 16, "num_tokens": 32, "text_hidden": 16, "cached_text": False}
    return imitate.make(image=RESNET, text=TEXT, weights=TERMS, **{**small, **fields})


def batch_of(recipe, side=16, seed=0):
    rng = np.random.default_rng(seed)
    mask = np.arange(8) < rng.integers(3, 8, (BATCH, 1))
    batch = {k: rng.integers(0, 256, (BATCH, side, side, 1), np.uint8) for k in IMAGES}
    for section in ("findings", "impression", "report"):
        batch[section] = Tokens(rng.integers(4, 50, (BATCH, 8)), mask)
        batch[f"{section}_valid"] = rng.random(BATCH) > 0.2
        batch[f"{section}_id"] = rng.integers(0, 9, BATCH)
    return {key: batch[key] for key in recipe.inputs}


IMAGES = ("image", "image_2")
# The "optimiser" whose state is the gradient: what a step computes, before any rounding of params.
RECORD = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
)


def initial(recipe, batch):
    """A state of random values: compiling `init` would take longer than the test."""
    rngs = dict.fromkeys(("params", *training.RNGS), jax.random.key(0))
    init = lambda batch: recipe.init(rngs, batch, train=True, method="encode")
    shapes = jax.eval_shape(init, jax.tree.map(lambda x: x[:2], batch))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        spread = rng.normal(size=leaf.shape) / np.sqrt(leaf.shape[0] if leaf.ndim > 1 else 9)
        name = path[-1].key
        centre = {"log_scale": 2.0, "scale": 1.0, "var": 1.0}.get(name, 0.0)
        return jnp.asarray(centre + spread, leaf.dtype)

    return training.make_state(
        jax.tree_util.tree_map_with_path(draw, shapes), RECORD, recipe.frozen
    )


def gradients(recipe, batch, state, *, chunks=1, mesh=None):
    """Loss and gradient by path of one training step."""
    if mesh is not None:
        state = jax.device_put(state, sharding.shardings(state, mesh))
        batch = sharding.to_global(batch, mesh)
    state = jax.tree.map(jnp.copy, state)
    step = training.make_train_step(recipe, RECORD, lambda _: 0.0, 0, chunks=chunks, mesh=mesh)
    state, metrics = step(state, batch)
    return float(metrics["loss"]), jax.device_get(paths.flatten(state.optimizer))


def assert_same(found, expected, tolerance=1e-6):
    """Differences are relative to the largest element of all gradients, as a step feels them."""
    assert np.isfinite(expected[0])
    assert {path for path, g in expected[1].items() if not np.isfinite(g).all()} == set()
    np.testing.assert_allclose(found[0], expected[0], rtol=tolerance)
    largest = max(np.abs(g).max() for g in expected[1].values())
    assert found[1].keys() == expected[1].keys()
    for path, value in expected[1].items():
        np.testing.assert_allclose(found[1][path], value, 0, tolerance * largest, err_msg=path)


def one_graph_over_all_chunks(recipe, batch, state, chunks):
    """The same chunks and keys, differentiated directly: a Python loop, nothing cached."""
    key = jax.random.fold_in(jax.random.key(0), state.step)
    rngs = dict(zip(training.RNGS, jax.random.split(key, len(training.RNGS)), strict=True))

    def loss(params):
        variables = {"params": paths.merge(params, state.frozen)}
        parts = []
        for c in range(chunks):
            rows = jax.tree.map(lambda x, c=c: x[c::chunks], batch)
            keys = {**rngs, "dropout": jax.random.fold_in(rngs["dropout"], c)}
            encode = {"train": True, "rngs": keys, "method": "encode"}
            parts.append(recipe.apply(variables, rows, **encode))
        features = jax.tree.map(lambda *p: jnp.stack(p, 1).reshape(BATCH, *p[0].shape[1:]), *parts)
        terms = recipe.apply(variables, features, batch, train=True, method="objective")
        return sum(schedules.at(recipe.weights[k], 0) * v for k, v in terms.items())

    value, grads = jax.jit(jax.value_and_grad(loss))(state.params)
    return float(value), jax.device_get(paths.flatten(grads))


@pytest.fixture
def mesh(monkeypatch):
    """4 x 2 devices on which even these small matrices are split over fsdp."""
    monkeypatch.setattr(sharding, "FSDP_FLOOR", 64)
    return sharding.make_mesh(data=4, fsdp=2)


@pytest.mark.parametrize("fields", [{}, {"loss": "sigmoid"}])
def test_a_step_with_tiled_losses_on_eight_devices_equals_the_dense_step_on_one(mesh, fields):
    tiled, dense = make_clip(**fields), make_clip(**fields, loss_tile=0)
    batch = batch_of(tiled)
    state = initial(tiled, batch)
    found = gradients(tiled, batch, state, mesh=mesh)
    # Twice 1e-6: eight devices also sum the encoders' gradients in another order.
    assert_same(found, gradients(dense, batch, state), 2e-6)


@pytest.mark.parametrize("group", [0, 4, 16])
def test_imitate_tiled_equals_dense_with_and_without_contrast_groups(mesh, group):
    """A group of 4 fits the tile, is batched; two of 16 do not, and are tiled one after the other.

    Objective and gradient are taken at given features, since BatchNorm would amplify the rounding.
    """
    fields = {"same_text": True, "contrast_group": group, "centre_prior": True}
    tiled, dense = make_imitate(loss_tile=5, **fields), make_imitate(loss_tile=0, **fields)
    batch = batch_of(tiled, side=64)
    rng = np.random.default_rng(0)
    names = ("image", "image_2", "image_findings", "image_findings_2", "reading", "reading_2")
    features = {}
    for name in (*names, "text", "text_findings", "findings_report", "impression_report"):
        value = rng.normal(size=(BATCH, 16)).astype(np.float32)
        features[name] = value / np.linalg.norm(value, axis=1, keepdims=True)

    def total(recipe, features, batch):
        return sum(recipe.apply({}, features, batch, train=True, method="objective").values())

    def gradient(recipe, features, batch):
        return jax.jit(jax.value_and_grad(lambda f: total(recipe, f, batch)))(features)

    expected = gradient(dense, features, batch)
    if group:
        plain = jax.jit(lambda f, b: total(dense.clone(contrast_group=0), f, b))
        slices = [np.s_[start : start + group] for start in range(0, BATCH, group)]
        each = [plain(*jax.tree.map(lambda x, s=s: x[s], (features, batch))) for s in slices]
        np.testing.assert_allclose(expected[0], np.mean(each), rtol=1e-5)
    with jax.set_mesh(mesh):
        on_mesh = sharding.to_global((features, batch), mesh)
        found = gradient(tiled, *on_mesh)
    assert_same(jax.device_get(found), jax.device_get(expected))


@pytest.mark.parametrize("chunks", [2, 8])
def test_chunks_with_dropout_fsdp_and_a_frozen_text_tower_equal_one_graph(monkeypatch, chunks):
    monkeypatch.setattr(sharding, "FSDP_FLOOR", 64)
    mesh = sharding.make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    recipe = make_clip(dropout=0.3, train_text=False)
    batch = batch_of(recipe)
    state = initial(recipe, batch)
    found = gradients(recipe, batch, state, chunks=chunks, mesh=mesh)
    assert not any(path.startswith("text/") for path in found[1])
    assert_same(found, one_graph_over_all_chunks(recipe, batch, state, chunks))


def test_chunks_without_dropout_equal_the_unchunked_step():
    recipe = make_clip()
    batch = batch_of(recipe)
    state = initial(recipe, batch)
    whole = gradients(recipe, batch, state)
    assert_same(gradients(recipe, batch, state, chunks=8), whole)


@pytest.mark.slow
def test_both_trained_towers_take_their_own_dropout_masks_in_each_chunk():
    recipe = make_clip(dropout=0.3)
    batch = batch_of(recipe)
    state = initial(recipe, batch)
    found = gradients(recipe, batch, state, chunks=2)
    assert_same(found, one_graph_over_all_chunks(recipe, batch, state, 2))


class Draws(nn.Module):
    """Returns the one number it draws for all rows it sees."""

    draws_by_row: bool

    def encode(self, batch, *, train=False):
        return {"drawn": jnp.full(len(batch["x"]), jax.random.uniform(self.make_rng("draws")))}


@pytest.mark.parametrize("by_row", [False, True])
def test_what_is_drawn_for_a_batch_is_the_same_in_all_its_parts(by_row):
    """As IMITATE's channels are; what is drawn for rows, as masked words are, is not."""
    rngs = dict.fromkeys(training.RNGS, jax.random.key(0))
    found = training.encode_in_chunks(Draws(by_row), {}, {"x": jnp.zeros(6)}, rngs, 3)["drawn"]
    assert np.unique(found).size == (3 if by_row else 1)
    whole = Draws(by_row).apply({}, {"x": jnp.zeros(6)}, rngs=rngs, method="encode")["drawn"]
    assert by_row or np.array_equal(found, whole)


def test_chunks_save_the_memory_of_the_encoders():
    recipe = make_clip()
    batch = batch_of(recipe)
    state = initial(recipe, batch)
    temporary = []
    for chunks in (1, 8):
        step = training.make_train_step(recipe, RECORD, lambda _: 0.0, 0, chunks=chunks)
        compiled = step.lower(state, batch).compile()
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
    assert temporary[1] < temporary[0] / 2


def test_chunks_are_refused_where_batch_statistics_would_change():
    recipe = make_imitate()
    batch = batch_of(recipe, side=64)
    state = initial(recipe, batch)
    with pytest.raises(UserError, match=r"train.chunks=2 would change the result.*without BatchNo"):
        gradients(recipe, batch, state, chunks=2)


def test_chunks_that_do_not_divide_the_batch_are_refused_with_both_numbers():
    recipe = make_clip()
    batch = batch_of(recipe)
    with pytest.raises(UserError, match=r"train.chunks=5 does not divide a batch of 32"):
        gradients(recipe, batch, initial(recipe, batch), chunks=5)
