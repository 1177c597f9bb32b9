"""The row a language model reads: what stands where, what is padding, what the convolutions see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medvlp_jax.layers import Fusion

B, J, D, W, T = 2, 2, 5, 8, 7
FUSION = Fusion(width=W, hidden=6)


def given(patches=16, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    image = draw(B, J, D), draw(B, J, patches, D)
    text = draw(B, D), draw(B, T, D), np.arange(T) < np.array([[7], [3]])
    words = {"question": draw(1, 3, W), "answer": draw(1, 2, W), "delimiters": draw(4, W)}
    return image, text, words


@pytest.fixture(scope="module")
def run():
    image, text, words = given()
    variables = jax.jit(lambda key: FUSION.init(key, image, text, **words))(jax.random.key(0))
    apply = jax.jit(lambda v, image, text, words: FUSION.apply(v, image, text, **words))
    return variables, lambda image, text, words, v=variables: apply(v, image, text, words)


def test_everything_stands_in_order_and_delimiters_begin_as_their_words(run):
    image, text, words = given()
    rows, mask = run[1](image, text, words)
    # question 3 <> 2 x (1 + 4) <> <> 1 + 4 <> answer 2
    assert rows.shape == (B, 3 + 1 + 10 + 2 + 5 + 1 + 2, W)
    for row in np.asarray(rows):
        np.testing.assert_array_equal(row[:3], words["question"][0])
        np.testing.assert_array_equal(row[[3, 14, 15, 21]], words["delimiters"])
        np.testing.assert_array_equal(row[-2:], words["answer"][0])
    # Seven words are four places, three are two.
    assert np.asarray(mask)[:, 17:21].tolist() == [[True] * 4, [True, True, False, False]]
    assert np.asarray(mask).sum(1).tolist() == [24, 22]


def test_local_tokens_are_convolutions_of_stride_2(run):
    image, text, words = given()
    rows, _ = run[1](image, text, words)
    params = jax.tree.map(np.float64, run[0]["params"]["image_local"])
    grid = np.pad(image[1][1, 0].reshape(4, 4, D), ((1, 1), (1, 1), (0, 0)))
    for place, (y, x) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2)]):
        seen = np.einsum("yxd,yxdh->h", grid[y : y + 3, x : x + 3], params["convolution"]["kernel"])
        seen = np.asarray(jax.nn.gelu(seen + params["convolution"]["bias"], approximate=False))
        seen = (seen - seen.mean()) / np.sqrt(seen.var() + 1e-6)
        seen = seen @ params["out"]["kernel"] + params["out"]["bias"]
        np.testing.assert_allclose(rows[1, 5 + place], seen, rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing_that_is_real(run):
    image, (told, read, real), words = given()
    expected, mask = run[1](image, (told, read, real), words)
    noisy = np.where(real[..., None], read, 99.0).astype(np.float32)
    rows, _ = run[1](image, (told, noisy, real), words)
    np.testing.assert_array_equal(rows, expected)
    assert np.abs(np.asarray(rows)[np.asarray(mask)]).max() < 50


def test_patches_form_a_square_and_delimiters_are_four():
    image, text, words = given(patches=15)
    with pytest.raises(ValueError, match="15 patches form no square grid"):
        jax.eval_shape(lambda: FUSION.init(jax.random.key(0), image, text, **words))
    image, text, words = given()
    words["delimiters"] = jnp.zeros((3, W))
    with pytest.raises(ValueError, match="There are 4 delimiters, not 3"):
        jax.eval_shape(lambda: FUSION.init(jax.random.key(0), image, text, **words))
