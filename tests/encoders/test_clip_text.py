"""CLIP's text tower against transformers with random weights, and its published sizes."""

import functools

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
    count,
    count_theirs,
    edit_config,
    error,
    gradients_and_step,
    hugging_face_fields,
    make_theirs,
    run,
)

from medvlp_jax import convert
from medvlp_jax.config import UserError
from medvlp_jax.encoders import clip_text
from medvlp_jax.encoders.base import Tokens

VOCAB, EOS, PAD = 99, 98, 1
SMALL = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 24,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "projection_dim": 20,
    "eos_token_id": EOS,
    "bos_token_id": 97,
    "pad_token_id": PAD,
}
KINDS = {
    "plain": ("CLIPTextModel", {}),
    "old": ("CLIPTextModel", {"eos_token_id": 2, "hidden_act": "gelu"}),
    "projection": ("CLIPTextModelWithProjection", {}),
}
LENGTHS = np.array([24, 1, 13, 5])


def texts(lengths, pad):
    """Draw texts that end in EOS, padded on the right to the longest."""
    at = np.arange(lengths.max())
    ids = np.where(at < lengths[:, None] - 1, RNG.integers(3, 97, (len(lengths), len(at))), pad)
    ids[np.arange(len(lengths)), lengths - 1] = EOS
    return Tokens(ids.astype(np.int32), at < lengths[:, None])


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def pair(kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip_text")
    architecture, fields = KINDS[kind]
    return make_theirs(architecture, folder, **{**SMALL, **fields}), folder


def outputs_of_theirs(theirs, tokens):
    import torch

    ids, mask = (torch.tensor(leaf).long() for leaf in tokens)
    out = theirs(input_ids=ids, attention_mask=mask)
    projected = getattr(out, "text_embeds", None)
    return out.pooler_output if projected is None else projected, out.last_hidden_state


def load(folder, kind, **options):
    return convert.load(folder, pooling="projection" if kind == "projection" else "eos", **options)


@pytest.mark.hf
@pytest.mark.parametrize("pad", [PAD, EOS])  # older tokenizers pad with the token of the end
def test_outputs_equal_transformers(kind, pair, pad):
    import torch

    theirs, folder = pair
    module, variables = load(folder, kind)
    tokens = texts(LENGTHS, pad)
    with torch.no_grad():
        pooled, hidden = outputs_of_theirs(theirs, tokens)
    ours = run(module, variables, tokens)
    assert_close(ours.pooled, pooled)
    assert_close(ours.tokens[tokens.mask], hidden[torch.tensor(tokens.mask)])
    np.testing.assert_array_equal(ours.mask, tokens.mask)


@pytest.mark.hf
def test_every_gradient_and_a_step_of_adamw_equal_torch(kind, pair, tmp_path):
    theirs, folder = pair
    layout = {"plain": "unrolled", "old": "scan", "projection": "scan"}[kind]
    module, variables = load(folder, kind, layout=layout, remat="dots")
    tokens = texts(LENGTHS, PAD)

    def outputs(model, params):
        if model is not None:
            pooled, hidden = outputs_of_theirs(model, tokens)
            return pooled, hidden[tokens.mask]
        out = module.apply({"params": params}, tokens, train=True)
        return out.pooled, out.tokens[tokens.mask]

    errors = gradients_and_step(theirs, module, variables, tmp_path, outputs)
    assert_gradients_and_step(*errors)


@pytest.mark.hf
@pytest.mark.parametrize("layout", ["unrolled", "scan"])
def test_weights_go_in_and_out_bit_for_bit(kind, pair, tmp_path, layout):
    module, _ = assert_round_trip(pair[1], tmp_path, layout=layout)
    assert module.projection == (kind == "projection")


@pytest.mark.hf
@pytest.mark.parametrize("variant", clip_text.VARIANTS)
def test_published_sizes_have_the_parameters_of_transformers(variant):
    module = clip_text.make(variant, projection=True, pooling="projection")
    tokens = Tokens(jnp.zeros((2, 77), jnp.int32), jnp.ones((2, 77), bool))
    parameters, out = count(module, tokens)
    fields = hugging_face_fields(module)
    assert parameters == count_theirs("CLIPTextModelWithProjection", **fields)
    assert out.pooled.shape == (2, module.projection_dim)
    assert out.tokens.shape == (2, 77, module.width)


# OpenAI's ViT-B/32 has 151,277,313 parameters, of which the text tower 63,428,096 and a scale.
def test_the_published_size_has_the_published_number_of_parameters():
    module = clip_text.make("B/32", projection=True)
    tokens = Tokens(jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool))
    assert count(module, tokens)[0] == 63_428_096


def test_what_follows_changes_nothing_before(variables_of):
    module = clip_text.make("tiny", vocab_size=VOCAB, eos_id=EOS)
    tokens = texts(np.array([9, 9]), PAD)
    variables = variables_of(module, tokens)
    ids = tokens.ids.copy()
    ids[:, 5:] = 7
    before, after = (
        run(module, variables, Tokens(i, tokens.mask)).tokens for i in (tokens[0], ids)
    )
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert error(after[:, 5:], before[:, 5:]) > 0.1


@pytest.mark.parametrize(
    ("eos_id", "layout", "heads"),
    [
        (EOS, "unrolled", {}),
        (clip_text.OLD_EOS, "scan", {"projection": True, "pooling": "projection"}),
    ],
)
def test_texts_packed_into_rows_equal_padded_texts(variables_of, eos_id, layout, heads):
    sizes = {"vocab_size": VOCAB, "depth": 2, "max_length": 32, "projection_dim": 20}
    module = clip_text.make("tiny", eos_id=eos_id, layout=layout, **sizes, **heads)
    padded = texts(np.array([9, 30, 17, 1, 5]), PAD)
    padded.ids[2, 4] = EOS  # a text is pooled at its first end
    rows = [[0, 2], [1], [3, 4]]
    assert_packed_equals_padded(module, variables_of(module, padded), padded, rows, logits="")


def test_compute_in_bfloat16_stays_near_with_a_text_that_is_all_padding(variables_of):
    module = clip_text.make("tiny", vocab_size=VOCAB, eos_id=EOS, max_length=640)
    tokens = texts(np.array([640, 300, 1]), PAD)
    tokens.mask[2] = False
    variables = variables_of(module, tokens)
    exact = run(module, variables, tokens)
    half = run(module.clone(dtype=jnp.bfloat16), variables, tokens)
    assert half.pooled.dtype == jnp.bfloat16
    assert np.isfinite(half.tokens).all()
    assert error(half.tokens[tokens.mask], exact.tokens[tokens.mask]) < 0.02


@pytest.mark.hf
@pytest.mark.parametrize(("key", "value"), [("hidden_act", "relu"), ("eos_token_id", [2, 98])])
def test_settings_that_are_not_here_are_refused_by_name(pair, tmp_path, key, value):
    with pytest.raises(UserError, match=key):
        convert.load(edit_config(pair[1], tmp_path / "edited", **{key: value}))


def test_bad_input_is_refused_before_compiling():
    module = clip_text.make("tiny", pooling="projection")
    for length, message in [(78, "78 tokens"), (7, "'projection' needs projection=True")]:
        tokens = Tokens(jnp.zeros((1, length), jnp.int32), jnp.ones((1, length), bool))
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(module.init, jax.random.key(0), tokens)
    tokens = Tokens(np.zeros((1, 7), np.int32), np.ones((1, 7), bool))
    init = functools.partial(clip_text.make("tiny").init, segments=tokens.ids)
    with pytest.raises(ValueError, match="come together"):
        jax.eval_shape(init, jax.random.key(0), tokens)
    with pytest.raises(UserError, match="No ClipText variant 'H/14'"):
        clip_text.make("H/14")
