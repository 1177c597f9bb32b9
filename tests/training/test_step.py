"""The one training step, with IMITATE in small."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medvlp_jax import sharding
from medvlp_jax.config import UserError
from medvlp_jax.encoders.base import Tokens
from medvlp_jax.recipes import clip, imitate
from medvlp_jax.training import optim
from medvlp_jax.training import params as paths
from medvlp_jax.training import step as training

RESNET = {
    "name": "resnet",
    "variant": "tiny",
    "embedding_size": 8,
    "hidden_sizes": (16, 32, 32, 64),
}
BERT = {"name": "bert", "variant": "tiny", "vocab_size": 50, "width": 16, "depth": 1, "mlp_dim": 32}
WEIGHTS = {"impression": 1.0, "findings": 1.0, "view_diagnosis": 1.0, "view_reading": 1.0}


def make_imitate(**fields):
    small = {"dim": 32, "num_tokens": 32, "text_hidden": 32, "cached_text": False}
    return imitate.make(image=RESNET, text=BERT, weights=WEIGHTS, **{**small, **fields})


def make_clip(**fields):
    return clip.make(image=RESNET, text=BERT, weights={"contrastive": 1.0}, dim=32, **fields)


def batch_of(size, seed=0):
    rng = np.random.default_rng(seed)
    mask = np.arange(12) < rng.integers(3, 12, (size, 1))
    batch = {}
    for key in ("image", "image_2"):
        batch[key] = rng.integers(0, 256, (size, 64, 64, 1), dtype=np.uint8)
    for section in ("findings", "impression", "report"):
        batch[section] = Tokens(rng.integers(4, 50, (size, 12)), mask)
        batch[f"{section}_valid"] = np.ones(size, bool)
        batch[f"{section}_id"] = np.arange(size)
    return batch


RECIPES = {
    "imitate": make_imitate().clone(weights={**WEIGHTS, "findings": ((0, 0.5), (2, 1.0))}),
    "imitate, kernel none": make_imitate(kernel="none"),
    "clip": make_clip(),
    "clip, sigmoid": make_clip(loss="sigmoid"),
}


@functools.cache
def variables_of(name):
    return training.init_variables(RECIPES[name], batch_of(2), seed=0)


def make_state(name, *, lr=1e-3, freeze=(), weight_decay=0.05, steps=100):
    recipe = RECIPES[name]
    variables = jax.tree.map(jnp.copy, variables_of(name))  # a step gives its state away
    frozen = (*recipe.frozen, *freeze)
    trainable, _ = paths.split(variables["params"], frozen)
    tx, rate = optim.make(trainable, name="adamw", lr=lr, steps=steps, weight_decay=weight_decay)
    step = training.make_train_step(recipe, tx, rate, seed=0)
    return training.make_state(variables, tx, frozen), step


def keep(recipe, batch):
    return {key: batch[key] for key in recipe.inputs}


@functools.cache
def compiled(name):
    """Return recipe and step of one name, and the state on the host: compiled once for all."""
    state, step = make_state(name, lr=3e-3, weight_decay=0.0)
    return RECIPES[name], step, jax.device_get(state)


@pytest.mark.parametrize("name", ["imitate", "clip", "clip, sigmoid"])
def test_every_trainable_leaf_moves_and_frozen_leaves_stay_bit_identical(name):
    recipe, step, before = compiled(name)
    batch, state = batch_of(8), before
    for _ in range(3):
        state, metrics = step(state, keep(recipe, batch))
    after = jax.device_get(state)
    still = [
        path
        for path, old in paths.flatten(before.params).items()
        if (old == paths.flatten(after.params)[path]).all()
    ]
    # A key bias adds one number to all logits of a head and cancels in the softmax: no gradient.
    assert still in ([], [p for p in still if p.endswith(("key_bias", "key/bias"))])
    for path, old in paths.flatten(before.frozen).items():
        np.testing.assert_array_equal(old, paths.flatten(after.frozen)[path])
    assert np.isfinite(float(metrics["loss"]))
    assert after.step == 3


@pytest.mark.parametrize("name", ["imitate, kernel none", "clip"])
def test_eight_examples_overfit(name):
    recipe, step, state = compiled(name)
    batch = batch_of(8)
    losses = []
    for _ in range(40):
        state, metrics = step(state, keep(recipe, batch))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.35 * losses[0]


def test_frozen_parameters_have_no_optimiser_state():
    state, _ = make_state("imitate", freeze=("^diagnosis/",))
    assert {path.split("/")[0] for path in paths.flatten(state.frozen)} == {"text", "diagnosis"}
    moments = next(s for s in state.optimizer if hasattr(s, "mu"))
    assert paths.flatten(moments.mu).keys() == paths.flatten(state.params).keys()


def test_loss_is_the_weighted_sum_of_its_terms_and_weights_follow_their_knots():
    recipe, step, state = compiled("imitate")
    batch = batch_of(8)
    for weight in (0.5, 0.75, 1.0, 1.0):
        state, metrics = step(state, keep(recipe, batch))
        assert metrics["weight/findings"] == weight
        total = sum(metrics[f"loss/{k}"] * metrics[f"weight/{k}"] for k in WEIGHTS)
        np.testing.assert_allclose(metrics["loss"], total, rtol=1e-6)
        # What is watched is logged and has no weight.
        assert metrics["loss/mass_findings"] > 0
        assert "weight/mass_findings" not in metrics


def test_a_step_on_eight_devices_equals_the_step_on_one():
    recipe, step, state = compiled("imitate")
    batch = batch_of(8)
    one, metrics_one = step(state, keep(recipe, batch))
    mesh = sharding.make_mesh(data=4, fsdp=2)
    placed = jax.device_put(state, sharding.shardings(state, mesh))
    eight, metrics_eight = step(placed, sharding.to_global(keep(recipe, batch), mesh))
    for name, value in metrics_one.items():
        np.testing.assert_allclose(value, metrics_eight[name], rtol=1e-4)
    for a, b in zip(
        jax.tree.leaves(one.collections), jax.tree.leaves(eight.collections), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    # The first moments are the gradients, a tenth of them.
    ours, theirs = (
        paths.flatten(next(s for s in after.optimizer if hasattr(s, "mu")).mu)
        for after in (eight, one)
    )
    largest = max(np.abs(value).max() for value in theirs.values())
    assert largest > 0
    for path, value in theirs.items():
        np.testing.assert_allclose(ours[path], value, 0, 1e-4 * largest, err_msg=path)


def test_a_step_is_a_function_of_state_and_batch_alone():
    recipe, step, state = compiled("imitate")
    runs = [step(state, keep(recipe, batch_of(8))) for _ in range(2)]
    for a, b in zip(*map(jax.tree.leaves, runs), strict=True):
        np.testing.assert_array_equal(a, b)


def test_multipliers_and_decay_masks_follow_patterns():
    params = {
        "image": {"kernel": jnp.ones(3)},
        "head": {"kernel": jnp.ones(3), "bias": jnp.ones(3)},
    }
    tx, _ = optim.make(
        params,
        name="sgd",
        lr=0.1,
        steps=1,
        schedule="constant",
        weight_decay=0.5,
        multipliers=(("^image/", 0.1),),
        no_decay=("bias$",),
    )
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["image"]["kernel"], -0.1 * 0.1 * 1.5, rtol=1e-6)
    np.testing.assert_allclose(updates["head"]["kernel"], -0.1 * 1.5, rtol=1e-6)
    np.testing.assert_allclose(updates["head"]["bias"], -0.1, rtol=1e-6)


def test_adamw_without_extras_equals_optax_adamw():
    params = {"a": {"kernel": jnp.linspace(-1, 1, 7)}}
    ours, _ = optim.make(
        params, name="adamw", lr=1e-2, steps=9, schedule="constant", weight_decay=0.05
    )
    theirs = optax.adamw(1e-2, weight_decay=0.05)
    grads = {"a": {"kernel": jnp.linspace(2, 3, 7)}}
    a, _ = ours.update(grads, ours.init(params), params)
    b, _ = theirs.update(grads, theirs.init(params), params)
    np.testing.assert_allclose(a["a"]["kernel"], b["a"]["kernel"], rtol=1e-6)


def test_the_average_follows_its_formula_changes_no_update_and_is_what_is_evaluated():
    params = {"a": {"kernel": jnp.linspace(-1, 1, 7)}}
    settings = {"name": "adam", "lr": 0.1, "steps": 40, "schedule": "constant"}
    plain, _ = optim.make(params, **settings)
    tracked, _ = optim.make(params, **settings, average=0.6)
    state = training.make_state({"params": params}, tracked, ())
    plain_state, now = plain.init(params), params
    expected = np.float64(params["a"]["kernel"])
    for t in range(20):
        grads = {"a": {"kernel": jnp.cos(jnp.arange(7.0) + t)}}
        updates, plain_state = plain.update(grads, plain_state, now)
        same, optimizer = tracked.update(grads, state.optimizer, now)
        np.testing.assert_array_equal(same["a"]["kernel"], updates["a"]["kernel"])
        now = optax.apply_updates(now, updates)
        state = state._replace(params=now, optimizer=optimizer)
        decay = min(0.6, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * np.float64(now["a"]["kernel"])
    found = state.evaluated["params"]["a"]["kernel"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert np.abs(found - now["a"]["kernel"]).max() > 1e-3
    assert optim.find_average(plain_state) is None


@pytest.mark.hf
def test_three_steps_of_adam_with_decay_equal_torch():
    torch = pytest.importorskip("torch")
    start = np.linspace(-1, 1, 7, dtype=np.float32)
    params = {"a": {"kernel": jnp.asarray(start)}}
    ours, _ = optim.make(
        params, name="adam", lr=1e-2, steps=9, schedule="constant", weight_decay=0.3
    )
    state = ours.init(params)
    leaf = torch.nn.Parameter(torch.tensor(start))
    theirs = torch.optim.Adam([leaf], lr=1e-2, weight_decay=0.3)
    for step in range(3):
        gradient = np.cos(np.arange(7, dtype=np.float32) + step)
        updates, state = ours.update({"a": {"kernel": jnp.asarray(gradient)}}, state, params)
        params = optax.apply_updates(params, updates)
        leaf.grad = torch.tensor(gradient)
        theirs.step()
    np.testing.assert_allclose(params["a"]["kernel"], leaf.detach().numpy(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "adagrad"}, "optim.name must be one of adam, adamw, lamb, sgd, got 'adagrad'"),
        (
            {"multipliers": (("imgae", 0.1),)},
            "optim.multipliers pattern 'imgae' matches no parameter",
        ),
        ({"average": 1.0}, "optim.average=1.0 must be at least 0 and below 1"),
        ({"warmup": 9, "steps": 9}, "warmup must be at least 0 and below steps=9, got 9"),
    ],
)
def test_wrong_optimiser_settings_are_one_sentence(fields, message):
    with pytest.raises(UserError, match=message):
        optim.make({"a": {"b": jnp.ones(1)}}, **{"name": "adamw", "lr": 1.0, "steps": 9, **fields})


def test_a_batch_without_what_the_recipe_reads_is_refused():
    recipe = make_imitate()
    with pytest.raises(
        UserError, match="Imitate reads image_2, findings, impression, but the batch"
    ):
        training.check_batch(recipe, {"image": 0, "findings_valid": 0, "impression_valid": 0})
