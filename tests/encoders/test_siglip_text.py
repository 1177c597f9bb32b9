"""SigLIP's text tower against transformers with random weights, and its published sizes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models
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
from medvlp_jax.encoders import siglip_text
from medvlp_jax.encoders.base import Tokens

VOCAB, PAD, LENGTH = 99, 1, 24
SMALL = {
    "vocab_size": VOCAB,
    "max_position_embeddings": LENGTH,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
KINDS = {"plain": {}, "wide": {"projection_size": 20, "hidden_act": "gelu", "pad_token_id": 7}}


def texts(lengths=(24, 1, 13, 5), filler=0, length=LENGTH):
    """Draw texts padded on the right with `filler`, which the encoder replaces."""
    mask = np.arange(length) < np.array(lengths)[:, None]
    ids = np.where(mask, RNG.integers(8, VOCAB, mask.shape), filler)
    return Tokens(ids.astype(np.int32), mask)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def pair(kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip_text")
    return make_theirs("SiglipTextModel", folder, **{**SMALL, **KINDS[kind]}), folder


def outputs_of_theirs(theirs, tokens):
    """Pad as its processor does, and give no mask, as it does."""
    import torch

    ids = np.where(tokens.mask, tokens.ids, theirs.config.pad_token_id)
    out = theirs(input_ids=torch.tensor(ids).long())
    return out.pooler_output, out.last_hidden_state


@pytest.mark.hf
@pytest.mark.parametrize("length", [LENGTH, 9])
def test_outputs_equal_transformers(pair, length):
    import torch

    theirs, folder = pair
    module, variables = convert.load(folder)
    tokens = texts(np.minimum((24, 1, 13, 5), length), length=length)
    with torch.no_grad():
        pooled, hidden = outputs_of_theirs(theirs, tokens)
    ours = run(module, variables, tokens)
    assert_close(ours.pooled, pooled)
    assert_close(ours.tokens, hidden)
    np.testing.assert_array_equal(ours.mask, tokens.mask)


@pytest.mark.hf
def test_a_row_is_filled_as_the_tokenizer_of_the_folder_says(pair, tmp_path):
    """SigLIP 2 fills it with <pad> = 0, and its config has the 1 of SigLIP's class."""
    theirs, folder = pair
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    edit_config(folder, tmp_path).joinpath("tokenizer.json").write_text(tokenizer.to_str())
    tokens = texts()
    for named, number in [({}, 0), ({"pad_token": "</s>"}, 1)]:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
        module, variables = convert.load(tmp_path)
        assert module.pad_id == number
        theirs.config.pad_token_id, kept = number, theirs.config.pad_token_id
        pooled, _ = outputs_of_theirs(theirs, tokens)
        theirs.config.pad_token_id = kept
        assert_close(run(module, variables, tokens).pooled, pooled.detach())


@pytest.mark.hf
def test_without_a_padding_token_a_row_stays_as_it_is(pair, tmp_path):
    theirs, folder = pair
    module, variables = convert.load(edit_config(folder, tmp_path, pad_token_id=None))
    tokens = texts(filler=theirs.config.pad_token_id)
    pooled, _ = outputs_of_theirs(theirs, tokens)
    assert_close(run(module, variables, tokens).pooled, pooled.detach())


@pytest.mark.hf
def test_every_gradient_and_a_step_of_adamw_equal_torch(kind, pair, tmp_path):
    theirs, folder = pair
    layout = "scan" if kind == "wide" else "unrolled"
    module, variables = convert.load(folder, layout=layout, remat="dots")
    tokens = texts()

    def outputs(model, params):
        if model is not None:
            return outputs_of_theirs(model, tokens)
        out = module.apply({"params": params}, tokens, train=True)
        return out.pooled, out.tokens

    errors = gradients_and_step(theirs, module, variables, tmp_path, outputs)
    assert_gradients_and_step(*errors)


@pytest.mark.hf
@pytest.mark.parametrize("layout", ["unrolled", "scan"])
def test_weights_go_in_and_out_bit_for_bit(kind, pair, tmp_path, layout):
    module, _ = assert_round_trip(pair[1], tmp_path, layout=layout)
    assert module.projection_dim == (20 if kind == "wide" else 32)


@pytest.mark.hf
@pytest.mark.parametrize("variant", siglip_text.VARIANTS)
def test_published_sizes_have_the_parameters_of_transformers(variant):
    module = siglip_text.make(variant)
    tokens = Tokens(jnp.zeros((2, 64), jnp.int32), jnp.ones((2, 64), bool))
    parameters, out = count(module, tokens)
    assert parameters == count_theirs("SiglipTextModel", **hugging_face_fields(module))
    assert out.pooled.shape == (2, module.projection_dim)
    assert out.tokens.shape == (2, 64, module.width)


# google/siglip-base-patch16-224 has 203,155,970 parameters: two scalars, 92,884,224 of images.
def test_the_published_size_has_the_published_number_of_parameters():
    tokens = Tokens(jnp.zeros((1, 64), jnp.int32), jnp.ones((1, 64), bool))
    assert count(siglip_text.make("B"), tokens)[0] == 203_155_970 - 2 - 92_884_224


def test_what_fills_a_row_behind_its_text_does_not_matter_and_its_length_does(variables_of):
    module = siglip_text.make("tiny", vocab_size=VOCAB)
    tokens = texts()
    variables = variables_of(module, tokens)
    found = run(module, variables, tokens)
    other = run(module, variables, Tokens(np.where(tokens.mask, tokens.ids, 5), tokens.mask))
    np.testing.assert_array_equal(found.pooled, other.pooled)
    longer = run(module, variables, Tokens(*(np.pad(x, ((0, 0), (0, 8))) for x in tokens)))
    assert error(longer.pooled, found.pooled) > 1e-3


def test_compute_in_bfloat16_stays_near(variables_of):
    module = siglip_text.make("tiny", vocab_size=VOCAB)
    tokens = texts()
    variables = variables_of(module, tokens)
    exact = run(module, variables, tokens)
    half = run(module.clone(dtype=jnp.bfloat16), variables, tokens)
    assert half.pooled.dtype == jnp.bfloat16
    assert error(half.tokens, exact.tokens) < 0.02


@pytest.mark.hf
def test_settings_that_are_not_here_are_refused_by_name(pair, tmp_path):
    with pytest.raises(UserError, match="hidden_act"):
        convert.load(edit_config(pair[1], tmp_path / "edited", hidden_act="relu"))


def test_bad_input_is_refused_before_compiling():
    tokens = Tokens(jnp.zeros((1, 65), jnp.int32), jnp.ones((1, 65), bool))
    for module, message in [
        (siglip_text.make("tiny"), "65 tokens is longer"),
        (siglip_text.make("tiny", pooling="mean"), "No pooling 'mean' in SiglipText"),
    ]:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(module.init, jax.random.key(0), tokens)
