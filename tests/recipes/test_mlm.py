"""Masked language modelling against NumPy loops; with low-rank factors they alone train."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medvlp_jax.config import UserError
from medvlp_jax.data import text
from medvlp_jax.encoders.base import Tokens
from medvlp_jax.recipes import mlm
from medvlp_jax.training import optim
from medvlp_jax.training import params as paths
from medvlp_jax.training import step as training

VOCAB, LENGTH, BATCH = 40, 24, 12
FIELDS = {"vocab_size": VOCAB, "mask_id": 4, "special_ids": (0, 2, 3)}
TEXT = {
    "name": "modernbert",
    "variant": "tiny",
    "vocab_size": VOCAB,
    "width": 16,
    "depth": 2,
    "num_heads": 2,
    "mlp_dim": 16,
    "mlm_head": True,
}
LORA = {"rank": 3, "alpha": 6.0, "dropout": 0.05, "layers": ""}


def batch_of(rng, size=BATCH):
    """Return [CLS] words [SEP] [PAD]... of different lengths."""
    ids, mask = np.zeros((size, LENGTH), np.int32), np.zeros((size, LENGTH), bool)
    for row in range(size):
        length = int(rng.integers(4, LENGTH + 1))
        ids[row, :length] = [2, *rng.integers(5, VOCAB, length - 2), 3]
        mask[row, :length] = True
    return {"report": Tokens(ids, mask)}


@pytest.fixture(scope="module")
def injected():
    """Return recipe, variables and batch; the factors B are not zero."""
    recipe = mlm.make(text={**TEXT, "lora": LORA}, weights={"mlm": 1.0}, rate=0.3, **FIELDS)
    batch = batch_of(np.random.default_rng(0))
    variables = training.init_variables(recipe, batch, 0)
    flat = paths.flatten(variables["params"])
    rng = np.random.default_rng(1)
    moved = {
        path: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32)
        if path.endswith("lora_b")
        else leaf
        for path, leaf in flat.items()
    }
    return recipe, {"params": paths.unflatten(moved)}, batch


def test_masks_are_drawn_at_the_stated_rates_and_never_from_special_tokens():
    rng = np.random.default_rng(3)
    tokens = batch_of(rng, size=4000)["report"]
    masked, chosen = mlm.mask_tokens(jax.random.key(5), tokens, rate=0.3, **FIELDS)
    chosen, after = np.asarray(chosen), np.asarray(masked.ids)
    ordinary = tokens.mask & ~np.isin(tokens.ids, FIELDS["special_ids"])
    assert not chosen[~ordinary].any()
    np.testing.assert_array_equal(after[~chosen], tokens.ids[~chosen])
    count = ordinary.sum()
    within = lambda share, expected, n: abs(share - expected) < 4 * math.sqrt(0.25 / n)
    assert within(chosen.sum() / count, 0.3, count)
    at, before = after[chosen], tokens.ids[chosen]
    kept = 0.1 + 0.1 / VOCAB  # a random token may be the same
    assert within((at == 4).mean(), 0.8 + 0.1 / VOCAB, len(at))
    assert within((at == before).mean(), kept, len(at))


def test_the_loss_is_the_mean_over_chosen_tokens_of_the_whole_batch(injected):
    recipe, variables, batch = injected
    key = jax.random.key(7)
    apply = jax.jit(
        lambda v: recipe.apply(
            v, batch, train=True, rngs={"draws": key, "dropout": key}, method="encode"
        )
    )
    features = apply(variables)
    masked, chosen = mlm.mask_tokens(
        recipe.apply(variables, rngs={"draws": key}, method=lambda m: m.make_rng("draws")),
        batch["report"], rate=0.3, **FIELDS,
    )  # fmt: skip
    np.testing.assert_array_equal(features["chosen"], chosen)
    plain = recipe.text.clone(lora=recipe.text.lora._replace(dropout=0.0), parent=None)
    quiet = mlm.make(text=plain, weights={"mlm": 1.0}, rate=0.3, **FIELDS)
    found = jax.jit(lambda v: quiet.apply(v, batch, train=True, rngs={"draws": key}))(variables)
    guess = jax.jit(lambda p: plain.apply({"params": p}, masked, method="mlm_logits"))
    logits = np.asarray(guess(variables["params"]["text"]), np.float64)
    losses = []
    for i, row in enumerate(np.asarray(chosen)):
        for t in np.flatnonzero(row):
            z = logits[i, t] - logits[i, t].max()
            losses.append(-(z[batch["report"].ids[i, t]] - np.log(np.exp(z).sum())))
    np.testing.assert_allclose(found["mlm"], np.mean(losses), rtol=1e-5)


def test_evaluation_masks_a_text_alike_wherever_it_stands_and_however_padded(injected):
    recipe, variables, batch = injected
    encode = jax.jit(lambda v, b: recipe.apply(v, b, train=False, method="encode"))
    whole = encode(variables, batch)
    order = np.random.default_rng(0).permutation(BATCH)
    moved = encode(variables, {"report": Tokens(*(x[order] for x in batch["report"]))})
    for name in ("masked_loss", "masked_count"):
        np.testing.assert_allclose(moved[name], np.asarray(whole[name])[order], rtol=1e-5)
    # The draws of a row do not depend on the rows beside it.
    settings = {"rate": 0.3, **FIELDS}
    _, chosen = mlm.mask_by_content(batch["report"], **settings)
    alone = [
        mlm.mask_by_content(Tokens(*(x[i : i + 1] for x in batch["report"])), **settings)[1]
        for i in range(3)
    ]
    np.testing.assert_array_equal(np.concatenate(alone), chosen[:3])
    padded = Tokens(*(np.pad(x, ((0, 0), (0, 5))) for x in batch["report"]))
    _, longer = mlm.mask_by_content(padded, **settings)
    np.testing.assert_array_equal(longer[:, : chosen.shape[1]], chosen)
    assert not np.asarray(longer[:, chosen.shape[1] :]).any()
    assert len({tuple(row) for row in np.asarray(chosen)}) == BATCH
    found = recipe.apply(variables, whole, batch, method="objective")["mlm"]
    total = np.asarray(whole["masked_loss"]).sum() / np.asarray(whole["masked_count"]).sum()
    np.testing.assert_allclose(found, total, rtol=1e-6)


def test_only_the_factors_move_and_all_of_them_do(injected):
    recipe, variables, batch = injected
    trainable, frozen = paths.split(variables["params"], recipe.frozen)
    layers = {p.rsplit("/", 1)[0] for p in paths.flatten(trainable)}
    kernels = {p.rsplit("/", 1)[0] for p in paths.flatten(frozen) if p.endswith("/kernel")}
    assert layers == {k for k in kernels if "mlm" not in k}
    tx, rate = optim.make(trainable, name="adamw", lr=1e-2, steps=30, weight_decay=1e-3)
    state = training.make_state(jax.tree.map(jnp.array, variables), tx, recipe.frozen)
    step = training.make_train_step(recipe, tx, rate, seed=0)
    before = jax.tree.map(np.array, (state.params, state.frozen))
    losses = []
    for _ in range(30):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    jax.tree.map(np.testing.assert_array_equal, before[1], state.frozen)
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before[0], state.params)
    assert all(jax.tree.leaves(moved))
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_the_parts_of_a_batch_are_masked_apart(injected):
    """With train.chunks; the second row, the fourth, ... are the second part."""
    recipe, variables, _ = injected
    row = batch_of(np.random.default_rng(0), size=1)
    batch = {"report": Tokens(*(np.repeat(x, 8, axis=0) for x in row["report"]))}
    rngs = dict.fromkeys(training.RNGS, jax.random.key(3))
    encode = lambda variables: training.encode_in_chunks(recipe, variables, batch, rngs, 2)
    chosen = np.asarray(jax.jit(encode)(variables)["chosen"])
    assert chosen[0::2].any()
    assert not np.array_equal(chosen[0::2], chosen[1::2])


def test_without_factors_everything_trains():
    assert mlm.make(text=TEXT, weights={"mlm": 1.0}, **FIELDS).frozen == ()


def test_the_trainable_share_at_published_size_is_the_papers_one_percent():
    """PRIMA: about 1 %; rank 8 on all linears is 1,689,600, methods/prima.md stage 1b."""
    lora = {"rank": 8, "alpha": 16.0, "dropout": 0.05, "layers": "", "fused": True}
    module = {"name": "modernbert", "variant": "base", "mlm_head": True, "lora": lora}
    recipe = mlm.make(text=module, weights={"mlm": 1.0}, rate=0.3, **FIELDS)
    tokens = Tokens(jax.ShapeDtypeStruct((1, 8), jnp.int32), jax.ShapeDtypeStruct((1, 8), bool))
    shapes = jax.eval_shape(lambda b: training.init_variables(recipe, b, 0), {"report": tokens})
    trainable, frozen = paths.split(shapes["params"], recipe.frozen)
    assert paths.count(trainable) == 1_689_600
    assert round(100 * paths.count(trainable) / paths.count(frozen), 1) == 1.1


def test_a_rate_or_tokenizer_that_cannot_be_is_refused(tmp_path):
    with pytest.raises(UserError, match="rate=0 must be above 0"):
        mlm.make(text=TEXT, weights={"mlm": 1.0}, rate=0, **FIELDS)
    tokenizer = text.train_wordpiece(["a b"], vocab_size=20, out_dir=tmp_path)
    assert mlm.token_fields(tokenizer)["special_ids"] == (0, 2, 3)
    import tokenizers

    with pytest.raises(UserError, match=r"needs a tokenizer with \[PAD\]"):
        mlm.token_fields(tokenizers.Tokenizer(tokenizers.models.BPE()))
