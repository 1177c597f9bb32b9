"""One published size of each family against transformers, with random weights: values only.

Swin, DINOv3, ModernBERT and the Mamba net have theirs in their own files.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from twins import RNG, as_torch, assert_close, draw_images, hugging_face_fields, make_theirs, run

from medvlp_jax import convert
from medvlp_jax.encoders import (
    bert,
    clip_text,
    clip_vision,
    dinov2,
    qwen3,
    resnet,
    siglip,
    vit,
)
from medvlp_jax.encoders.base import Tokens

pytestmark = [pytest.mark.slow, pytest.mark.hf]

# More noise than the initial 0.02 would saturate the attention of 768 channels.
NOISE = 0.01

VISION = {
    # ours -> (architecture, how the pooled output is asked for, height and width)
    "resnet": (resnet.make("50"), "ResNetModel", {}, (225, 190)),
    "vit": (vit.make("B/16", pooler=True), "ViTModel", {"pooling": "pooler"}, (224, 256)),
    "dinov2": (dinov2.make("B/14", mask_token=True), "Dinov2Model", {}, (224, 252)),
    "clip": (
        clip_vision.make("B/32", projection=True),
        "CLIPVisionModelWithProjection",
        {"pooling": "projection"},
        (224, 256),
    ),
    "siglip": (siglip.make("B/16-224"), "SiglipVisionModel", {}, (224, 250)),
}


def outputs_of_theirs(theirs, images):
    """Return pooled, patches and levels, channels last."""
    import torch

    name = type(theirs).__name__
    options = {} if name in ("ResNetModel", "Dinov2Model") else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        out = theirs(as_torch(images), output_hidden_states=True, **options)
    if name == "ResNetModel":
        levels = [h.permute(0, 2, 3, 1) for h in out.hidden_states[1:]]
        return out.pooler_output[:, :, 0, 0], levels[-1].flatten(1, 2), levels
    projected = getattr(out, "image_embeds", None)
    pooled = out.pooler_output if projected is None else projected
    return pooled, out.last_hidden_state[:, 0 if name == "SiglipVisionModel" else 1 :], ()


@pytest.mark.parametrize("family", VISION)
def test_a_vision_encoder_of_base_size_equals_transformers(tmp_path, family):
    module, architecture, options, size = VISION[family]
    theirs = make_theirs(architecture, tmp_path, noise=NOISE, **hugging_face_fields(module))
    loaded, variables = convert.load(tmp_path, **options)
    assert loaded == module.clone(**options)
    images = draw_images(*size, batch=1)
    pooled, tokens, levels = outputs_of_theirs(theirs, images)
    ours = run(loaded, variables, images)
    assert_close(ours.pooled, pooled)
    assert_close(ours.tokens, tokens)
    for level, expected in zip(ours.levels or (), levels, strict=True):
        assert_close(level, expected)


def tensors_of(tokens):
    import torch

    return {
        "input_ids": torch.tensor(tokens.ids).long(),
        "attention_mask": torch.tensor(tokens.mask).long(),
    }


def texts(lengths, vocab, end=0):
    """Draw texts padded on the right, each ending in `end` where one is given."""
    lengths = np.array(lengths)[:, None]
    steps = np.arange(lengths.max())
    ids = RNG.integers(3, vocab - 2, (len(lengths), len(steps)))
    ids = np.where(steps < lengths, np.where((steps == lengths - 1) & (end > 0), end, ids), 0)
    return Tokens(ids.astype(np.int32), steps < lengths)


def test_bert_base_equals_transformers(tmp_path):
    import torch

    module = bert.make("base", mlm_head=True)
    theirs = make_theirs("BertForMaskedLM", tmp_path, noise=NOISE, **hugging_face_fields(module))
    loaded, variables = convert.load(tmp_path)
    assert loaded == module
    tokens = texts([512, 100, 1], module.vocab_size)
    with torch.no_grad():
        hidden = theirs.bert(**tensors_of(tokens)).last_hidden_state
        logits = theirs(**tensors_of(tokens)).logits
    ours = run(loaded, variables, tokens)
    assert_close(ours.pooled, hidden[:, 0])
    assert_close(ours.tokens[tokens.mask], hidden[tokens.mask])
    predicted = run(loaded, variables, tokens, method="mlm_logits")
    assert_close(predicted[tokens.mask], logits[tokens.mask])


def test_the_text_tower_of_clip_b_32_equals_transformers(tmp_path):
    import torch

    module = clip_text.make("B/32", projection=True, pooling="projection")
    fields = hugging_face_fields(module)
    theirs = make_theirs("CLIPTextModelWithProjection", tmp_path, noise=NOISE, **fields)
    loaded, variables = convert.load(tmp_path, pooling="projection")
    assert loaded == module
    tokens = texts([77, 30, 1], module.vocab_size, end=module.eos_id)
    with torch.no_grad():
        out = theirs(**tensors_of(tokens))
    ours = run(loaded, variables, tokens)
    assert_close(ours.pooled, out.text_embeds)
    assert_close(ours.tokens[tokens.mask], out.last_hidden_state[tokens.mask])


def test_qwen3_of_0_6_billion_with_and_without_a_cache_equals_transformers(tmp_path):
    import torch

    module = qwen3.make("0.6B")
    theirs = make_theirs("Qwen3ForCausalLM", tmp_path, noise=NOISE, **hugging_face_fields(module))
    loaded, variables = convert.load(tmp_path)
    assert loaded == module
    tokens = texts([24, 9], module.vocab_size)
    with torch.no_grad():
        expected = theirs(**tensors_of(tokens)).logits[tokens.mask]
    assert_close(run(loaded, variables, tokens, method="logits")[tokens.mask], expected)

    @jax.jit
    def extend(variables, tokens, state):
        encoded, state = loaded.apply(variables, tokens, state, method="extend")
        return loaded.apply(variables, encoded.tokens, method="decode"), state

    state, pieces = qwen3.start(loaded, 2, 24), []
    for begin, end in [(0, 16), (16, 24)]:
        piece = jax.tree.map(lambda leaf: leaf[:, begin:end], tokens)  # noqa: B023 - used at once
        with jax.default_matmul_precision("highest"):
            logits, state = extend(variables, piece, state)
        pieces.append(logits)
    assert_close(jnp.concatenate(pieces, axis=1)[tokens.mask], expected)
