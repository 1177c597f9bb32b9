"""PRIMA: losses from the equations, what trains and what does not, what the fusion reads."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import prima as configs
from medvlp_jax import plan
from medvlp_jax.config import UserError
from medvlp_jax.data.prompts import Prompt
from medvlp_jax.encoders.base import Tokens
from medvlp_jax.recipes import base, prima
from medvlp_jax.training import params as paths
from medvlp_jax.training import step as training

C, T, E, K = 3, 9, 16, 16
BLOCK = {"depth": 1, "width": 16, "num_heads": 2, "mlp_dim": 16}
LORA = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "layers": ""}
IMAGE = {"name": "dinov3", "variant": "tiny", **BLOCK, "patch_size": 8, "lora": LORA}
TEXT = {"name": "modernbert", "variant": "tiny", **BLOCK, "depth": 2, "vocab_size": 50}
LLM = {"name": "qwen3", "variant": "tiny", **BLOCK, "num_kv_heads": 1, "head_width": 8}
LLM |= {"vocab_size": 50, "lora": LORA}
PROMPT = Prompt((1, 2, 3), (4, 5), (6, 7, 8), ((9, 10), (11,), (12, 13), (14,)))
ALIGN = {"image": 0.2, "global": 0.3, "local": 0.2, "soft": 0.3}
STAGES = ("align", "sharpen", "fuse")


def make(stage, **fields):
    small = {"image": IMAGE, "text": {**TEXT, "lora": LORA}, "label": "d", "num_classes": C}
    small |= {"stage": stage, "dim": E, "hidden": E, "loss_tile": 0, "cached_text": False}
    small["weights"] = ALIGN if stage == "align" else {"cross_entropy": 1.0}
    if stage == "fuse":
        small |= {"llm": LLM, "prompt": PROMPT, "fusion_hidden": E}
    return prima.make(**{**small, **fields})


def batch_of(size, seed=0):
    rng = np.random.default_rng(seed)
    picture = lambda: rng.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8)
    ids = rng.integers(15, 50, (size, T)).astype(np.int32)
    return {
        "image": picture(),
        "image_2": picture(),
        "metadata": Tokens(ids, np.arange(T) < rng.integers(4, T + 1, (size, 1))),
        "metadata_vector": np.eye(4, dtype=np.float32)[rng.integers(0, 4, size)],
        "label/d": np.eye(C, dtype=np.int8)[np.arange(size) % C],
    }


class Stage:
    """A stage with its variables and its step."""

    def __init__(self, name, **fields):
        self.recipe, self.batch = make(name, **fields), batch_of(8)
        self.variables = training.init_variables(self.recipe, self.batch, 0)
        self.tx = optax.adam(1e-2)
        rate = lambda _: jnp.float32(1e-2)
        self.step = training.make_train_step(self.recipe, self.tx, rate, 0)
        self.encode = jax.jit(lambda v, b: self.recipe.apply(v, b, method="encode"))

    def state(self):
        fresh = jax.tree.map(jnp.array, self.variables)  # a step donates what it is given
        return training.make_state(fresh, self.tx, self.recipe.frozen)

    def train(self, steps):
        state, seen = self.state(), []
        for _ in range(steps):
            state, metrics = self.step(state, {k: self.batch[k] for k in self.recipe.inputs})
            seen.append({k: float(v) for k, v in metrics.items()})
        return state, seen


@pytest.fixture(scope="module")
def stages():
    found = {}

    def get(name):
        if name not in found:
            found[name] = Stage(name)
        return found[name]

    return get


# The losses, once more in float64 and without a line of the code under test.


def log_softmax(x, axis):
    top = x.max(axis, keepdims=True)
    return x - top - np.log(np.exp(x - top).sum(axis, keepdims=True))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def aligned(size=5, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "views": rng.normal(size=(size, 2, E)),
        "patches": rng.normal(size=(size, 2, K, E)),
        "text": unit(rng.normal(size=(size, E))),
        "words": rng.normal(size=(size, T - 1, E)),
        "words_mask": np.arange(T - 1) < rng.integers(1, T, (size, 1)),
    }


def objective(features, batch, **fields):
    recipe = make("align", **fields)
    return jax.jit(lambda f, b: recipe.apply({}, f, b, method="objective"))(features, batch)


@pytest.mark.parametrize(
    ("fields", "factor"),
    [({}, 3), ({"label_weight": 1.7}, 1.7), ({"label_weight": 0.0}, 0), ({"soft": "label"}, 3)],
)
def test_the_objective_is_equations_3_and_6_with_y_of_label_and_metadata(fields, factor):
    features, batch = aligned(), batch_of(5)
    with jax.enable_x64(True):
        terms = objective(features, batch, **fields)
    y = factor * np.float64(batch["label/d"] == 1)
    if "soft" not in fields:
        y = np.concatenate([y, np.float64(batch["metadata_vector"])], 1)
    inner = np.array([[a @ b for b in y] for a in y]) / 5.0
    target = np.exp(log_softmax(inner, 1))
    soft = exact = 0.0
    for j in range(2):
        sim = unit(features["views"][:, j]) @ features["text"].T / 0.07
        both = log_softmax(sim, 1) + log_softmax(sim, 0)
        exact -= np.trace(both) / (4 * 5)
        soft -= (target * both).sum() / (4 * 5)
    np.testing.assert_allclose(terms["global"], exact, rtol=1e-6)
    np.testing.assert_allclose(terms["soft"], soft, rtol=1e-6)
    assert set(terms) == set(ALIGN)


def test_the_ablation_without_attention_contrasts_means_over_the_batch():
    features, batch = aligned(seed=1), batch_of(5)
    with jax.enable_x64(True):
        terms = objective(features, batch, local="direct")
    expected = 0.0
    mean = [w[m].mean(0) for w, m in zip(features["words"], features["words_mask"], strict=True)]
    for j in range(2):
        sim = unit(features["patches"][:, j].mean(1)) @ unit(np.array(mean)).T / 0.07
        expected -= np.trace(log_softmax(sim, 1) + log_softmax(sim, 0)) / (4 * 5)
    np.testing.assert_allclose(terms["local"], expected, rtol=1e-6)


def test_printed_forms_are_switches():
    features, batch = aligned(seed=2), batch_of(5)
    mean = objective(features, batch)
    printed = {"soft_norm": "paper", "printed_local": True, "symmetric_views": True}
    paper = objective(features, batch, **printed)
    np.testing.assert_allclose(paper["soft"] * 5, mean["soft"], rtol=1e-5)
    assert paper["local"] != mean["local"]
    assert paper["image"] != mean["image"]
    np.testing.assert_allclose(paper["global"], mean["global"], rtol=1e-6)


def test_tiles_and_dense_losses_agree_in_the_objective():
    features, batch = aligned(8), batch_of(8)
    dense, tiled = objective(features, batch), objective(features, batch, loss_tile=3)
    for name in ALIGN:
        np.testing.assert_allclose(tiled[name], dense[name], rtol=1e-5)


# What trains.


@pytest.mark.parametrize("stage", STAGES)
def test_frozen_leaves_have_no_gradient_and_no_optimiser_state_and_all_others_move(stages, stage):
    each = stages(stage)
    begin = each.state()
    trained = {
        "align": r"(image/.*lora_[ab]|(image|text)_projection/.*)",
        "sharpen": r"(image/.*lora_[ab]|classifier/.*)",
        "fuse": r"(llm/.*lora_[ab]|fusion/.*)",
    }[stage]
    named = {
        p for p in paths.flatten(each.variables["params"]) if paths.matches(p, [f"^{trained}$"])
    }
    assert set(paths.flatten(begin.params)) == named
    # Adam keeps two numbers a trainable parameter, and a count.
    held = sum(leaf.size for leaf in jax.tree.leaves(begin.optimizer))
    assert held == 2 * paths.count(begin.params) + 1
    frozen = jax.tree.map(np.array, begin.frozen)
    state, seen = each.train(3)
    assert all(np.isfinite(metrics["grad_norm"]) for metrics in seen)
    jax.tree.map(np.testing.assert_array_equal, state.frozen, frozen)
    before = paths.flatten(each.variables["params"])
    for path, leaf in paths.flatten(state.params).items():
        assert np.any(np.asarray(leaf) != np.asarray(before[path])), path


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "below"), [("align", 0.9), ("sharpen", 0.05), ("fuse", 0.05)])
def test_eight_examples_are_learnt_by_heart(stages, stage, below):
    # Against random word embeddings that stay frozen no logit grows beyond 0.3: all of it trains.
    each = Stage("fuse", train_llm="all") if stage == "fuse" else stages(stage)
    _, seen = each.train(150)
    assert seen[-1]["loss"] < below < seen[0]["loss"]


def shapes_of(variant):
    """The published configuration of a stage in shapes; no weight or tokenizer is read."""
    with np.errstate(all="ignore"):
        config = configs.get_config(variant).to_dict()
    return plan.blueprint(config, jax.devices()[:1]).state


def test_injection_trains_1_1_percent_of_clinical_modernbert():
    text = base.encoder(configs.get_config("inject_pad").recipe.text.to_dict())
    tokens = Tokens(jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool))
    shapes = jax.eval_shape(text.init, jax.random.key(0), tokens)["params"]
    factors, rest = paths.split(shapes, ("^(?!.*/lora_[ab]$)",))
    assert paths.count(factors) == 1_689_600
    assert paths.count(factors) / paths.count(rest) == pytest.approx(0.0113, abs=5e-4)


def test_fusion_trains_1_0_percent_of_qwen3_besides_the_projectors():
    state = shapes_of("fuse_pad")
    assert set(state.params) == {"llm", "fusion"}
    factors = paths.count(state.params["llm"])
    assert factors == 17_432_576
    assert factors / paths.count(state.frozen["llm"]) == pytest.approx(0.0101, abs=5e-4)


def test_alignment_trains_5_31_m_of_dinov3_and_sharpening_the_same_with_a_head():
    state = shapes_of("align_pad")
    assert set(state.params) == {"image", "image_projection", "text_projection"}
    assert paths.count(state.params["image"]) == 5_308_416
    state = shapes_of("sharpen_pad")
    assert set(state.params) == {"image", "classifier"}
    assert paths.count(state.params["classifier"]) == 6 * 769


# What is read.


@pytest.mark.parametrize("stage", STAGES)
def test_rows_are_independent_and_a_modality_that_is_missing_gives_no_feature(stages, stage):
    each, other = stages(stage), batch_of(8, seed=1)
    batch = {k: each.batch[k] for k in ("image", "image_2", "metadata")}
    whole = each.encode(each.variables, batch)
    beside = {k: jax.tree.map(lambda x, y: np.r_[x[:3], y[3:]], batch[k], other[k]) for k in batch}
    for name, value in each.encode(each.variables, beside).items():
        np.testing.assert_allclose(value[:3], whole[name][:3], rtol=1e-4, atol=1e-5, err_msg=name)
        assert np.abs(np.asarray(value[3:]) - np.asarray(whole[name][3:])).max() > 1e-3, name
    assert each.recipe.apply(each.variables, {}, method="encode") == {}


def test_fusion_reads_image_and_metadata_and_no_padding(stages):
    each = stages("fuse")
    batch = {k: each.batch[k] for k in ("image", "image_2", "metadata")}
    logits = lambda batch: np.asarray(each.encode(each.variables, batch)["logits"])
    found = logits(batch)
    assert found.shape == (8, C)
    moved = lambda key: {**batch, key: jax.tree.map(lambda x: np.roll(x, 1, 0), batch[key])}
    for key in batch:
        assert np.abs(logits(moved(key)) - found).max() > 1e-4, key
    ids, mask = batch["metadata"]
    noisy = Tokens(np.where(mask, ids, 49), mask)
    np.testing.assert_allclose(logits({**batch, "metadata": noisy}), found, rtol=1e-5, atol=1e-6)
    longer = Tokens(*(np.pad(x, ((0, 0), (0, 3))) for x in batch["metadata"]))
    np.testing.assert_allclose(logits({**batch, "metadata": longer}), found, rtol=1e-4, atol=1e-5)


def test_a_single_scan_is_seen_twice(stages):
    each = stages("fuse")
    batch = {k: each.batch[k] for k in ("image", "metadata")}
    twice = {**batch, "image_2": batch["image"]}
    one, two = (each.encode(each.variables, b)["logits"] for b in (batch, twice))
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


def test_class_logits_are_those_of_the_whole_vocabulary_at_the_classes(stages):
    llm, params = stages("fuse").recipe.llm, stages("fuse").variables["params"]["llm"]
    x = np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)
    decode = lambda *ids: llm.apply({"params": params}, x, *ids, method="decode")
    np.testing.assert_allclose(decode(jnp.asarray([6, 7, 8])), decode()[:, 6:9], rtol=1e-5)


@pytest.mark.parametrize(
    ("stage", "fields", "message"),
    [
        ("algin", {}, "No recipe.stage 'algin'. Did you mean align"),
        ("align", {"soft_norm": "sum"}, "No recipe.soft_norm 'sum'"),
        ("align", {"temperature": 0.0}, "recipe.temperature=0.0 must be above 0"),
        ("align", {"weights": {**ALIGN, "golbal": 1.0}}, "Did you mean global"),
        ("align", {"views": 3}, "recipe.views=3, but of recipe.images=.* it can be 1 or 2"),
        ("align", {"image": {**IMAGE, "lora": {**LORA, "rank": 0}}}, "nothing would train"),
        ("align", {"image": {**IMAGE, "lora": {**LORA, "rnk": 1}}}, "lora has no 'rnk'"),
        ("fuse", {"prompt": None}, "needs recipe.llm and recipe.prompt"),
        ("fuse", {"num_classes": 4}, "the prompt has 3 options"),
    ],
)
def test_what_does_not_fit_is_refused(stage, fields, message):
    weights = {} if stage in STAGES else {"weights": ALIGN}
    with pytest.raises(UserError, match=message):
        make(stage, **{**weights, **fields})
