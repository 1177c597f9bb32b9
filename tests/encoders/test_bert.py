"""BERT against transformers with random weights, and its published sizes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import assert_packed_equals_padded
from twins import (
    RNG,
    assert_close,
    assert_gradients_and_step,
    assert_round_trip,
    error,
    gradients_and_step,
    make_theirs,
    run,
)

from medvlp_jax import convert
from medvlp_jax.config import UserError
from medvlp_jax.encoders import bert
from medvlp_jax.encoders.base import Tokens

SMALL = {
    "vocab_size": 90,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 20,
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    return make_theirs("BertForPreTraining", folder, **SMALL), folder


def tokens_of(lengths, total):
    """Draw texts of the given lengths, padded to `total`."""
    mask = np.arange(total) < np.array(lengths)[:, None]
    return Tokens(np.where(mask, RNG.integers(1, 90, mask.shape), 0).astype(np.int32), mask)


def reference_of(model, tokens):
    import torch

    return model(
        input_ids=torch.tensor(tokens.ids).long(), attention_mask=torch.tensor(tokens.mask).long()
    )


@pytest.mark.hf
@pytest.mark.parametrize("layout", ["unrolled", "scan"])
def test_outputs_equal_transformers(pair, layout):
    theirs, folder = pair
    module, variables = convert.load(folder, layout=layout)
    tokens = tokens_of([20, 7, 1], 20)
    reference = reference_of(theirs.bert, tokens)
    hidden = reference.last_hidden_state.detach().numpy()
    ours = run(module, variables, tokens)
    assert_close(ours.tokens, hidden)
    assert_close(ours.pooled, hidden[:, 0])
    np.testing.assert_array_equal(ours.mask, tokens.mask)
    pooler = run(module.clone(pooling="pooler"), variables, tokens)
    assert_close(pooler.pooled, reference.pooler_output.detach())
    mean = run(module.clone(pooling="mean"), variables, tokens)
    assert_close(mean.pooled, [h[m].mean(0) for h, m in zip(hidden, tokens.mask, strict=True)])


@pytest.mark.hf
def test_mlm_logits_equal_transformers(pair):
    theirs, folder = pair
    module, variables = convert.load(folder)
    tokens = tokens_of([12, 5], 12)
    expected = reference_of(theirs, tokens).prediction_logits.detach()
    assert_close(run(module, variables, tokens, method="mlm_logits"), expected)


@pytest.mark.hf
@pytest.mark.parametrize(("layout", "remat"), [("unrolled", "none"), ("scan", "full")])
def test_every_gradient_and_a_step_of_adamw_equal_torch(pair, tmp_path, layout, remat):
    """The tied table gathers the gradients of the input and of the decoder."""
    theirs, folder = pair
    options = {"layout": layout, "remat": remat, "pooling": "pooler"}
    module, variables = convert.load(folder, dropout=0.0, attention_dropout=0.0, **options)
    tokens = tokens_of([20, 5], 20)

    def outputs(model, params):
        if model is not None:
            pooled = reference_of(model.bert, tokens).pooler_output
            return pooled, reference_of(model, tokens).prediction_logits[tokens.mask]
        mine = {"params": params}
        logits = module.apply(mine, tokens, train=True, method="mlm_logits")
        return module.apply(mine, tokens, train=True).pooled, logits[tokens.mask]

    assert_gradients_and_step(*gradients_and_step(theirs, module, variables, tmp_path, outputs))


@pytest.mark.hf
@pytest.mark.parametrize("layout", ["unrolled", "scan"])
@pytest.mark.parametrize("architecture", ["BertModel", "BertForMaskedLM"])
def test_weights_go_in_and_out_bit_for_bit(tmp_path, architecture, layout):
    make_theirs(architecture, tmp_path / "theirs", **SMALL)
    module, _ = assert_round_trip(tmp_path / "theirs", tmp_path, layout=layout)
    assert (module.mlm_head, module.pooler) == ((False, True), (True, False))["LM" in architecture]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_long_texts_and_one_without_a_real_token_are_near_and_finite(variables_of, dtype):
    """In bfloat16 too, with the gradients of both."""
    fields = {"vocab_size": 90, "depth": 2, "max_length": 640, "pooling": "mean"}
    module = bert.make("tiny", dropout=0.0, attention_dropout=0.0, **fields)
    tokens = tokens_of([640, 300, 0], 640)
    variables = variables_of(module, tokens)
    exact = run(module, variables, tokens)

    def loss(v):
        out = module.clone(dtype=dtype).apply(v, tokens)
        return jnp.square(out.tokens.astype(jnp.float32)).sum(), out

    gradient, ours = jax.jit(jax.grad(loss, has_aux=True))(variables)
    assert ours.pooled.dtype == dtype
    for leaf in jax.tree.leaves((gradient, ours.pooled, ours.tokens)):
        assert np.isfinite(np.asarray(leaf, np.float32)).all()
    assert error(ours.tokens[tokens.mask], exact.tokens[tokens.mask]) < 0.02
    assert error(ours.pooled[:2], exact.pooled[:2]) < 0.02


@pytest.mark.parametrize(
    ("pooling", "layout"), [("cls", "unrolled"), ("mean", "scan"), ("pooler", "scan")]
)
def test_texts_packed_into_rows_equal_padded_texts(variables_of, pooling, layout):
    heads = {"pooling": pooling, "pooler": pooling == "pooler", "mlm_head": True}
    module = bert.make("tiny", vocab_size=90, depth=2, max_length=32, layout=layout, **heads)
    padded = tokens_of([9, 30, 17, 1, 5], 32)
    rows = [[0, 2, 4], [1, 3]]  # 31 of 32 tokens each
    assert_packed_equals_padded(module, variables_of(module, padded), padded, rows)


def test_what_stands_in_the_padding_does_not_matter(variables_of):
    module = bert.make("tiny", vocab_size=90, depth=2, pooling="mean")
    tokens = tokens_of([9, 4], 9)
    other = Tokens(np.where(tokens.mask, tokens.ids, 55), tokens.mask)
    variables = variables_of(module, tokens)
    ours, same = jax.jit(module.apply)(variables, tokens), jax.jit(module.apply)(variables, other)
    assert_close(ours.pooled, same.pooled, 1e-6)
    assert_close(ours.tokens[tokens.mask], same.tokens[tokens.mask], 1e-6)
    short = Tokens(tokens.ids[1:, :4], tokens.mask[1:, :4])
    assert_close(module.apply(variables, short).pooled, ours.pooled[1:])


@pytest.mark.hf
@pytest.mark.parametrize("variant", list(bert.VARIANTS))
@pytest.mark.parametrize("heads", ["plain", "pooler", "mlm"])
def test_every_size_has_the_parameters_of_transformers(variant, heads):
    import torch
    import transformers

    module = bert.make(variant, pooler=heads == "pooler", mlm_head=heads == "mlm")
    config = transformers.BertConfig(
        vocab_size=module.vocab_size,
        hidden_size=module.width,
        num_hidden_layers=module.depth,
        num_attention_heads=module.num_heads,
        intermediate_size=module.mlp_dim,
    )
    with torch.device("meta"):
        if heads == "mlm":
            expected = transformers.BertForMaskedLM(config).num_parameters()
        else:
            model = transformers.BertModel(config, add_pooling_layer=heads == "pooler")
            expected = model.num_parameters()
    tokens = Tokens(jnp.zeros((2, 9), jnp.int32), jnp.ones((2, 9), bool))
    out, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), tokens)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == expected
    assert out.pooled.shape == (2, module.width)
    assert out.tokens.shape == (2, 9, module.width)


def test_bioclinicalbert_has_the_published_number_of_parameters():
    tokens = Tokens(jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool))
    variables = jax.eval_shape(bert.make("base", pooler=True).init, jax.random.key(0), tokens)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == 108_310_272


def test_one_init_makes_every_parameter_also_inside_another_module():
    class Recipe(nn.Module):
        text: nn.Module

        @nn.compact
        def __call__(self, tokens):
            return nn.Dense(3)(self.text(tokens).pooled)

    fields = {"vocab_size": 90, "depth": 1, "pooler": True, "mlm_head": True}
    recipe = Recipe(bert.make("tiny", **fields))
    tokens = tokens_of([3], 3)
    module = bert.make("tiny", **fields)
    alone = jax.jit(module.init)(jax.random.key(0), tokens)["params"]
    through_head = jax.eval_shape(
        lambda: module.init(jax.random.key(0), tokens, method="mlm_logits")
    )["params"]
    inside = jax.jit(recipe.init)(jax.random.key(0), tokens)["params"]["text"]
    assert jax.tree.map(jnp.shape, inside) == jax.tree.map(jnp.shape, alone)
    assert jax.tree.map(jnp.shape, through_head) == jax.tree.map(jnp.shape, alone)
    assert {"pooler_dense", "mlm_dense", "mlm_norm", "mlm_bias"} <= set(inside)


def test_dropout_needs_training(variables_of):
    module = bert.make("tiny", vocab_size=90, depth=1)
    tokens = tokens_of([5, 4], 5)
    variables = variables_of(module, tokens)

    @jax.jit
    def train(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return module.apply(variables, tokens, train=True, rngs=rngs).pooled

    assert not np.allclose(train(0), train(1))
    jax.jit(module.apply)(variables, tokens)  # would ask for a key


def test_bad_input_is_refused_or_shows(variables_of):
    module = bert.make("tiny", vocab_size=90, depth=1, max_length=16)
    tokens = tokens_of([16], 16)
    variables = variables_of(module, tokens)
    with pytest.raises(ValueError, match=r"text of 17 tokens .* position table of 16"):
        module.apply(variables, tokens_of([17], 17))
    with pytest.raises(ValueError, match="mlm_head=True"):
        module.apply(variables, tokens, method="mlm_logits")
    with pytest.raises(ValueError, match="No pooling 'max' in this Bert, only cls, mean"):
        jax.jit(module.clone(pooling="max").apply)(variables, tokens)
    with pytest.raises(ValueError, match="segments and num_segments come together"):
        module.apply(variables, tokens, segments=np.zeros((1, 16), int))
    beyond = Tokens(np.full((1, 2), 90, np.int32), np.ones((1, 2), bool))
    assert np.isnan(jax.jit(module.apply)(variables, beyond).pooled).all()
    with pytest.raises(UserError, match="Did you mean base"):
        bert.make("bas")
