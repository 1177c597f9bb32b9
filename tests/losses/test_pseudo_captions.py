"""S-CLIP's terms against float64 loops from their formulas, its plans against linear programs."""

import math

import jax
import numpy as np
import pytest
import scipy.optimize

from medvlp_jax.losses import pseudo_captions

SCALE = 5.0
PAIRS = np.array([True, True, False, True, False, False])  # the third has a report that is empty
APART = np.array([False, False, False, False, True, True])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def draw(seed):
    """Return images, texts [B, E], keywords [B, N, E], their tokens [B, N, T], which exist."""
    rng = np.random.default_rng(seed)
    image, text, words = (unit(rng.normal(size=(6, *n, 4))) for n in ((), (), (3,)))
    told = np.array([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0]], bool)
    ids = rng.integers(5, 9, (6, 3, 2))
    ids[0, 1] = ids[1, 2] = ids[3, 0] = (1, 2)  # one keyword of three reports
    words[0, 1] = words[1, 2] = words[3, 0]
    ids[1, 0], ids[1, 1], ids[0, 0] = (3, 1), (3, 2), (3, 3)
    return image, text, words, ids, told


def loop_plan(cost, entropy, sweeps=3000):
    """Sinkhorn: scale rows, then columns, of e^{-cost / entropy} to the uniform marginals."""
    count, other = cost.shape
    kernel = [[math.exp(-cost[i][j] / entropy) for j in range(other)] for i in range(count)]
    u, v = [1.0] * count, [1.0] * other
    for _ in range(sweeps):
        u = [1 / count / sum(kernel[i][j] * v[j] for j in range(other)) for i in range(count)]
        v = [1 / other / sum(kernel[i][j] * u[i] for i in range(count)) for j in range(other)]
    return np.array([[u[i] * kernel[i][j] * v[j] for j in range(other)] for i in range(count)])


@pytest.mark.parametrize("entropy", [0.07, 0.2, 1.0])
def test_the_plan_is_sinkhorns_among_those_that_take_part(entropy):
    cost = np.random.default_rng(1).random((6, 6)) * 2
    expected = loop_plan(cost[np.ix_(APART, PAIRS)], entropy)
    np.testing.assert_allclose(expected.sum(0), 1 / 3, rtol=1e-6)
    found = pseudo_captions.transport(cost, APART, PAIRS, entropy=entropy, sweeps=3000)
    np.testing.assert_allclose(
        found[np.ix_(APART, PAIRS)], expected / expected.sum(1, keepdims=True), rtol=1e-9
    )
    assert not found[~APART].any()
    assert not found[:, ~PAIRS].any()


def test_the_plan_is_the_cheapest_where_entropy_hardly_counts():
    cost = np.random.default_rng(2).random((7, 7))
    row, column = scipy.optimize.linear_sum_assignment(cost)
    cheapest = np.zeros((7, 7))
    cheapest[row, column] = 1
    everyone = np.ones(7, bool)
    found = pseudo_captions.transport(cost, everyone, everyone, entropy=0.002, sweeps=5000)
    np.testing.assert_allclose(found, cheapest, atol=1e-3)


def test_the_default_sweeps_suffice_at_clips_first_temperature():
    rng = np.random.default_rng(3)
    image = unit(rng.normal(size=(64, 64)) + 1)  # alike, as images of one organ are
    pairs = np.arange(64) < 48
    cost = 1 - image @ image.T
    found, more = (
        pseudo_captions.transport(cost, ~pairs, pairs, entropy=0.07, sweeps=sweeps)
        for sweeps in (pseudo_captions.SWEEPS, 10_000)
    )
    np.testing.assert_allclose(found, more, atol=1e-6)
    np.testing.assert_allclose(more[~pairs].mean(0)[pairs], 1 / 48, rtol=1e-6)  # all are used alike


def loop_caption(image, text):
    pairs, apart = np.flatnonzero(PAIRS), np.flatnonzero(APART)
    cost = np.array([[1 - image[j] @ image[i] for i in pairs] for j in apart])
    plan = loop_plan(cost, 1 / SCALE)
    total = 0.0
    for row, j in enumerate(apart):
        scores = [math.exp(SCALE * image[j] @ text[i]) for i in pairs]
        share = plan[row] / plan[row].sum()
        total -= sum(
            q * math.log(score / sum(scores)) for q, score in zip(share, scores, strict=True)
        )
    return total / len(apart)


def test_captions_are_carried_by_the_plan():
    image, text, *_ = draw(4)
    rows = {"pairs": PAIRS, "apart": APART}
    found = pseudo_captions.caption_loss(image, text, SCALE, **rows)
    np.testing.assert_allclose(found, loop_caption(image, text), rtol=1e-9)
    other = text.copy()
    other[~PAIRS] += 1  # no caption of these is read
    assert pseudo_captions.caption_loss(image, other, SCALE, **rows) == found
    for nobody in ({"pairs": PAIRS & False}, {"apart": APART & False}):
        assert pseudo_captions.caption_loss(image, text, SCALE, **{**rows, **nobody}) == 0


def loop_candidates(own, image, words, ids, told):
    """Return every keyword's vector by its tokens, and which the nearest pair's report holds."""
    pairs = np.flatnonzero(PAIRS)
    vector = {tuple(ids[i, n]): words[i, n] for i in pairs for n in np.flatnonzero(told[i])}
    nearest = max(pairs, key=lambda i: own @ image[i])
    return vector, {tuple(ids[nearest, n]) for n in np.flatnonzero(told[nearest])}


def loop_keyword(image, words, ids, told):
    total, count = 0.0, 0
    for j in np.flatnonzero(APART):
        vector, candidates = loop_candidates(image[j], image, words, ids, told)
        score = {k: math.exp(SCALE * image[j] @ v) for k, v in vector.items()}
        inside = sum(score[k] for k in candidates)
        for k in candidates:
            total -= score[k] / inside * math.log(score[k] / sum(score.values()))
        count += 1
    return total / count


def test_keywords_are_those_of_the_nearest_pair_and_equal_ones_are_one():
    image, _, words, ids, told = draw(5)
    image[4], image[5] = unit(image[0] + 0.1), unit(image[1] + 0.1)
    rows = {"told": told, "pairs": PAIRS, "apart": APART}
    found = pseudo_captions.keyword_loss(image, words, ids, SCALE, **rows)
    np.testing.assert_allclose(found, loop_keyword(image, words, ids, told), rtol=1e-9)
    for nobody in ("told", "pairs", "apart"):
        none = {**rows, nobody: rows[nobody] & False}
        assert pseudo_captions.keyword_loss(image, words, ids, SCALE, **none) == 0


def test_pseudo_labels_are_targets_and_take_no_gradient():
    image, text, words, ids, told = draw(6)
    rows = {"pairs": PAIRS, "apart": APART}
    losses = {
        "caption": lambda image: pseudo_captions.caption_loss(image, text, SCALE, **rows),
        "keyword": lambda image: pseudo_captions.keyword_loss(
            image, words, ids, SCALE, told=told, **rows
        ),
    }
    for name, loss in losses.items():
        gradient = np.asarray(jax.grad(loss)(image))
        assert np.abs(gradient[APART]).max() > 0, name
        assert not gradient[~APART].any(), name  # the paired images are but compared with
    # d/du of -sum_i q_i log softmax_i(s u.y) is s sum_i (p_i - q_i) y_i, over two images apart.
    gradient = np.asarray(jax.grad(losses["caption"])(image))
    cost = 1 - image[APART] @ image[PAIRS].T
    plan = loop_plan(cost, 1 / SCALE)
    for row, j in enumerate(np.flatnonzero(APART)):
        score = np.exp(SCALE * text[PAIRS] @ image[j])
        expected = SCALE * (score / score.sum() - plan[row] / plan[row].sum()) @ text[PAIRS] / 2
        np.testing.assert_allclose(gradient[j], expected, rtol=1e-7)
    gradient = np.asarray(jax.grad(losses["keyword"])(image))
    for j in np.flatnonzero(APART):
        vector, candidates = loop_candidates(image[j], image, words, ids, told)
        score = {k: math.exp(SCALE * image[j] @ v) for k, v in vector.items()}
        inside = sum(score[k] for k in candidates)
        expected = np.zeros(4)
        for k, v in vector.items():
            target = score[k] / inside if k in candidates else 0
            expected += SCALE * (score[k] / sum(score.values()) - target) * v / 2
        np.testing.assert_allclose(gradient[j], expected, rtol=1e-7, atol=1e-12)
