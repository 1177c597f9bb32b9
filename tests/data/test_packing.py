"""Texts share rows: none is lost, none is cut without need, and features stay what they were."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from medvlp_jax import sharding
from medvlp_jax.config import UserError
from medvlp_jax.data import packing
from medvlp_jax.encoders import bert, clip_text, modernbert, qwen3
from medvlp_jax.encoders.base import Tokens
from medvlp_jax.recipes import base

CLS, SEP, PAD = 1, 2, 0


def texts_of(sizes, length, seed=0):
    """Texts of so many tokens: [CLS] words [SEP], padded."""
    rng = np.random.default_rng(seed)
    sizes = np.asarray(sizes)
    ids = np.full((*sizes.shape, length), PAD, np.int32)
    mask = np.arange(length) < sizes[..., None]
    ids[mask] = rng.integers(3, 50, mask.sum())
    ids[..., 0] = CLS
    np.put_along_axis(ids, sizes[..., None] - 1, SEP, axis=-1)
    return Tokens(ids, mask)


def read(packed, text):
    """The tokens of one text, as an encoder would see them."""
    slots = packed.filled.shape[-1]
    row, slot = divmod(int(packed.at[text]), slots)
    assert packed.filled[row, slot]
    return packed.ids[row][(packed.segments[row] == slot) & packed.mask[row]]


@pytest.mark.parametrize("seed", range(20))
def test_every_text_lies_whole_in_one_row(seed):
    rng = np.random.default_rng(seed)
    length, count = int(rng.integers(4, 40)), int(rng.integers(1, 60))
    sizes = rng.integers(2, length + 1, count)
    tokens = texts_of(sizes, length, seed)
    packed, cut = packing.pack(tokens, rows=count)
    assert cut == 0
    assert packed.mask.sum() == sizes.sum()
    for text, size in enumerate(sizes):
        np.testing.assert_array_equal(read(packed, text), tokens.ids[text, :size])
    assert len(set(packed.at.tolist())) == count
    for segments in packed.segments:  # equal ids are adjacent, in order
        assert (np.diff(segments) >= 0).all()
    assert (packed.ids[~packed.mask] == PAD).all()


def test_rows_are_filled_first_fit_longest_first():
    sizes = np.array([3, 7, 5, 2, 6, 2])
    found = packing.place(sizes, rows=3, length=10, slots=5)
    # 7 | 6 | 5, then 3 behind the 7, then both 2s behind the 6.
    assert found.row.tolist() == [0, 0, 2, 1, 1, 1]
    assert found.start.tolist() == [7, 0, 0, 6, 0, 8]
    assert found.slot.tolist() == [1, 0, 0, 1, 0, 2]


def test_no_row_holds_more_texts_than_it_has_places_for():
    found = packing.place(np.full(6, 2), rows=3, length=100, slots=2)
    assert sorted(found.row.tolist()) == [0, 0, 1, 1, 2, 2]
    assert packing.place(np.full(7, 2), rows=3, length=100, slots=2) is None


def test_the_longest_texts_are_cut_down_to_one_length_no_more_than_needed():
    sizes = np.array([20, 18, 9, 4, 4])
    tokens = texts_of(sizes, 20)
    packed, cut = packing.pack(tokens, rows=2)
    seen = [len(read(packed, text)) for text in range(5)]
    longest = max(seen)
    assert seen == np.minimum(sizes, longest).tolist()
    assert cut == sizes.sum() - sum(seen) > 0
    fits = lambda most: packing.place(np.minimum(sizes, most), rows=2, length=20, slots=10)
    assert fits(longest) is not None
    assert fits(longest + 1) is None
    for text in range(5):
        assert read(packed, text)[0] == CLS
        assert read(packed, text)[-1] == SEP


def test_texts_that_are_not_needed_take_no_place():
    tokens = texts_of([6, 6, 6, 6], 8)
    packed, cut = packing.pack(tokens, rows=2, used=np.array([True, False, False, True]))
    assert cut == 0
    assert packed.mask.sum() == 12
    for text in (0, 3):
        np.testing.assert_array_equal(read(packed, text), tokens.ids[text, :6])


def test_each_group_lies_in_rows_of_its_own():
    tokens = texts_of(np.full((8, 3), 5), 10)
    used = np.ones((8, 3), bool)
    packed = packing.Packing({"evidence": 1.5}, 4)({"evidence": tokens, "evidence_mask": used})
    packed = packed["evidence"]
    assert packed.ids.shape == (4, 3, 10)
    assert packed.at.shape == (4, 2, 3)
    for group in range(4):
        alone, _ = packing.pack(Tokens(*(x.reshape(4, 6, 10)[group] for x in tokens)), rows=3)
        np.testing.assert_array_equal(packed.ids[group], alone.ids)
        np.testing.assert_array_equal(packed.at[group].ravel(), alone.at)


def test_cut_words_are_said_once(monkeypatch):
    said = []
    monkeypatch.setattr(logging, "warning", lambda form, *values: said.append(form % values))
    pack = packing.Packing({"report": 0.5}, 1)
    for _ in range(2):
        pack({"report": texts_of([8, 8, 8, 8], 10)})
    assert said == [
        "Packing report at 0.5 rows an example cut off 37.5 % of the words of a batch; they fill "
        "0.80 rows an example."
    ]
    packing.Packing({"report": 1.0}, 1)({"report": texts_of([8, 8, 8, 8], 10)})
    assert len(said) == 1


@pytest.mark.parametrize(
    ("share", "examples", "texts", "length", "said"),
    [
        (-0.5, 8, 8, 20, r"data.pack=-0.5 must be in \(0, 1\], or 0"),
        (1.5, 8, 8, 20, r"data.pack=1.5 must be in \(0, 1\], or 0"),
        (13, 8, 96, 20, r"data.pack=13 must be in \(0, 12\], or 0"),
        (0.1, 64, 64, 4, "64 texts 7 rows of 4 tokens, .* accepted is 0.500 or more"),
    ],
)
def test_shares_that_cannot_be_are_refused(share, examples, texts, length, said):
    with pytest.raises(UserError, match=said):
        packing.check(share, examples, texts, length, "data.pack")


ONE = texts_of([5, 9], 16)
ENCODERS = {
    "bert-cls": bert.make("tiny", vocab_size=50, dropout=0.0, attention_dropout=0.0),
    "bert-mean": bert.make("tiny", vocab_size=50, pooling="mean", width=32, num_heads=2),
    "modernbert": modernbert.make("tiny", vocab_size=50),
    "clip": clip_text.make("tiny", vocab_size=50, eos_id=SEP),
    "qwen3": qwen3.make("tiny", vocab_size=50),
}


def at(tree, path):
    for key in path:
        tree = tree[key.key]
    return tree


# How examples with several texts are laid out is not the encoder's doing: one shows it.
@pytest.mark.parametrize(
    ("name", "shape"), [*((name, (12,)) for name in ENCODERS), ("bert-mean", (12, 3))]
)
def test_features_and_gradients_are_those_of_texts_a_row_each(name, shape):
    encoder = ENCODERS[name]
    rng = np.random.default_rng(0)
    tokens = texts_of(rng.integers(2, 17, shape), 16)
    share = 0.75 * np.prod(shape[1:], dtype=int)
    packed = packing.Packing({"report": share}, 2)({"report": tokens})["report"]
    assert packed.ids.size < tokens.ids.size
    assert packed.mask.sum() == tokens.mask.sum()
    variables = jax.jit(encoder.init)(jax.random.key(0), ONE)
    weight = rng.normal(size=(*shape, encoder.width)).astype(np.float32)

    def loss(params, texts):
        pooled = encoder.apply({"params": params}, texts, method=base.pooled_texts)
        return (pooled * weight).sum(), pooled

    with jax.default_matmul_precision("highest"):
        run = jax.jit(jax.grad(loss, has_aux=True))
        (ours, features), (theirs, expected) = (
            run(variables["params"], texts) for texts in (packed, tokens)
        )
    np.testing.assert_allclose(features, expected, atol=2e-6 * np.abs(expected).max())
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(theirs))
    for path, leaf in jax.tree.leaves_with_path(jax.tree.map(np.subtract, ours, theirs)):
        # A key's bias moves all logits of a query alike: its gradient is rounding.
        of = (
            largest
            if "key" in str(path) and "bias" in str(path)
            else np.abs(at(theirs, path)).max()
        )
        assert np.abs(leaf).max() <= 1e-5 * of, path


def test_a_packed_batch_over_eight_devices_gives_the_features_of_one():
    encoder = ENCODERS["bert-cls"]
    tokens = texts_of(np.random.default_rng(1).integers(2, 9, 32), 16)
    variables = jax.jit(encoder.init)(jax.random.key(0), ONE)
    mesh = sharding.make_mesh()
    packed = packing.Packing({"report": 0.75}, 8)({"report": tokens})["report"]
    reads = jax.jit(lambda v, t: encoder.apply(v, t, method=base.pooled_texts))
    placed = sharding.to_global(packed, mesh)
    found = reads(variables, placed)
    expected = reads(variables, tokens)
    np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())
    # A group lies on one device: nothing is fetched from another.
    text = reads.lower(variables, placed).compile().as_text()
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))


def test_padding_is_what_is_saved():
    sizes = np.random.default_rng(2).integers(10, 60, 256)
    tokens = texts_of(sizes, 128)
    rows = next(r for r in itertools.count(1) if packing.place(sizes, rows=r, length=128, slots=12))
    assert rows <= 11 / 9 * np.ceil(sizes.sum() / 128) + 1
    packed, cut = packing.pack(tokens, rows=rows)
    assert cut == 0
    assert packed.mask.mean() > 0.9 > 2 * tokens.mask.mean()
    assert jnp.asarray(packed.ids).dtype == jnp.int32
