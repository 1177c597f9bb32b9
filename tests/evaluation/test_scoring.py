"""Scoring flavours and thresholds against loops written from their definitions."""

import math
import tracemalloc

import numpy as np
import pytest
from sklearn import metrics as sk

from medvlp_jax.config import UserError
from medvlp_jax.evaluation import classify, scoring, thresholds, zero_shot

RNG = np.random.default_rng(0)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


IMAGE = unit(RNG.normal(size=(23, 6)))
POSITIVE = tuple(unit(RNG.normal(size=(p, 6))) for p in (4, 2, 3))
NEGATIVE = tuple(unit(RNG.normal(size=(p, 6))) for p in (1, 3, 2))
TRUTH = RNG.integers(0, 3, 23)
LABELS = np.eye(3, dtype=np.int8)[TRUTH]


def embedded(*, multi_label, negative=NEGATIVE):
    names = ("a", "b", "c")
    texts = lambda groups: tuple(tuple(f"{i}" for i in range(len(g))) for g in groups)
    sides = texts(POSITIVE), texts(negative)
    prompts = zero_shot.Prompts("toy-v1", "", multi_label, names, *sides)
    return zero_shot.ClassEmbeddings(prompts, POSITIVE, negative)


SINGLE = embedded(multi_label=False, negative=())


def loop_pool(image, prompts, pool):
    cosines = [float(image @ p) for p in prompts]
    if pool == "max":
        return max(cosines)
    mean = sum(prompts) / len(prompts)
    length = math.sqrt(float(mean @ mean)) if pool == "ensemble" else 1.0
    return sum(cosines) / len(cosines) / length


def loop_standardise(rows):
    out = []
    columns = list(zip(*rows, strict=True))
    means = [sum(c) / len(c) for c in columns]
    spreads = [
        math.sqrt(sum((x - m) ** 2 for x in c) / len(c))
        for c, m in zip(columns, means, strict=True)
    ]
    for row in rows:
        out.append([(x - m) / s for x, m, s in zip(row, means, spreads, strict=True)])
    return out


@pytest.mark.parametrize("name", [n for n, f in scoring.FLAVOURS.items() if f.single])
def test_single_label_scores_are_the_loops(name):
    pool = {"clean": "ensemble", "cxrclip": "mean", "medclip": "mean"}.get(name, "max")
    expected = [[loop_pool(image, p, pool) for p in POSITIVE] for image in IMAGE]
    if name == "gloria":
        expected = loop_standardise(expected)
    if name == "benchx":
        batches = [expected[s : s + 5] for s in range(0, 23, 5)]
        expected = [row for batch in batches for row in loop_standardise(batch)]
    found = zero_shot.scores(IMAGE, SINGLE, flavour=name, batch_size=5)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_findings_are_compared_with_their_absence():
    pairs = embedded(multi_label=True)
    for name, pool in (("clean", "ensemble"), ("biovil", "ensemble"), ("cxrclip", "mean")):
        found = zero_shot.scores(IMAGE, pairs, flavour=name)
        for i, c in np.ndindex(found.shape):
            expected = loop_pool(IMAGE[i], POSITIVE[c], pool)
            expected -= loop_pool(IMAGE[i], NEGATIVE[c], pool)
            assert found[i, c] == pytest.approx(expected, rel=1e-9, abs=1e-12)
    found = zero_shot.scores(IMAGE, pairs, flavour="chexzero")
    for i, c in np.ndindex(found.shape):
        a = math.exp(loop_pool(IMAGE[i], POSITIVE[c], "ensemble"))
        b = math.exp(loop_pool(IMAGE[i], NEGATIVE[c], "ensemble"))
        assert found[i, c] == pytest.approx(a / (a + b), rel=1e-12)


def accuracy(flavour, batch_size, metric="accuracy"):
    found = zero_shot.run(
        *(IMAGE, LABELS, SINGLE),
        task="t",
        flavour=flavour,
        batch_size=batch_size,
        resamples=0,
    )
    return found[f"zero_shot/t ({flavour})/{metric}"]


def test_gloria_does_not_depend_on_the_batch_size_and_benchx_does():
    assert len({accuracy("gloria", size)["value"] for size in (2, 5, 23)}) == 1
    assert len({accuracy("gloria", size)["hash"] for size in (2, 5, 23)}) == 1
    scores = [zero_shot.scores(IMAGE, SINGLE, flavour="benchx", batch_size=s) for s in (2, 5, 23)]
    assert not np.allclose(scores[0], scores[1])
    whole = zero_shot.scores(IMAGE, SINGLE, flavour="gloria")
    np.testing.assert_allclose(scores[2], whole, rtol=1e-12)
    assert len({accuracy("benchx", size)["hash"] for size in (2, 5, 23)}) == 3


def test_glorias_accuracy_is_the_standardised_row_of_the_same_scores():
    values = np.stack([(IMAGE @ p.T).max(1) for p in POSITIVE], 1)
    expected = classify.single_label_scores(LABELS, values, "abc", resamples=0).numbers
    assert accuracy("gloria", 0)["value"] == expected["accuracy_zscore"]["value"]


def test_benchx_averages_batches_of_unequal_size():
    right = zero_shot.scores(IMAGE, SINGLE, flavour="benchx", batch_size=10).argmax(1) == TRUTH
    expected = (right[:10].mean() + right[10:20].mean() + right[20:].mean()) / 3
    found = accuracy("benchx", 10, "accuracy_by_batch")["value"]
    assert found == pytest.approx(expected, rel=1e-12)
    assert found != pytest.approx(right.mean())


def test_images_that_all_look_alike_are_answered_by_chance_in_every_batch():
    same = np.tile(IMAGE[:1], (23, 1))
    for names in ([0] * 20 + [1, 2, 2], [2] * 20 + [1, 0, 0]):
        found = zero_shot.run(
            *(same, np.eye(3, dtype=np.int8)[names], SINGLE),
            **{"task": "t", "flavour": "benchx", "batch_size": 10, "resamples": 0},
        )
        for name in ("accuracy", "accuracy_by_batch"):
            assert found[f"zero_shot/t (benchx)/{name}"]["value"] == pytest.approx(1 / 3), name


def test_a_single_image_and_a_constant_class_stay_finite():
    for flavour in ("gloria", "benchx"):
        one = zero_shot.scores(IMAGE[:1], SINGLE, flavour=flavour)
        expected = [[loop_pool(IMAGE[0], p, "max") for p in POSITIVE]]
        np.testing.assert_allclose(one, expected, rtol=1e-9)
        same = zero_shot.scores(np.tile(IMAGE[:1], (3, 1)), SINGLE, flavour=flavour)
        assert np.abs(same).max() < 1e-6
    last = zero_shot.scores(IMAGE, SINGLE, flavour="benchx", batch_size=11)[22]  # 11, 11 and 1
    np.testing.assert_allclose(last, [loop_pool(IMAGE[22], p, "max") for p in POSITIVE], rtol=1e-9)


def test_what_a_flavour_does_not_score_is_refused_with_what_does():
    with pytest.raises(UserError, match=r"No zero-shot flavour 'glora'.*gloria"):
        scoring.find("glora")
    pairs, alone = embedded(multi_label=True), embedded(multi_label=True, negative=())
    for embeddings, flavour, message in (
        (SINGLE, "chexzero", "have one class each; accepted are clean, gloria"),
        (pairs, "gloria", "has prompts of the absence.*accepted are clean, cxrclip"),
        (alone, "clean", "has no prompts of the absence.*accepted are gloria, benchx"),
    ):
        with pytest.raises(UserError, match=message):
            zero_shot.run(IMAGE, LABELS, embeddings, task="t", flavour=flavour)
    with pytest.raises(UserError, match=r"No threshold rule 'maxf1'.*maxf1-on-val"):
        zero_shot.run(IMAGE, LABELS, pairs, task="t", threshold="maxf1")


def test_scores_of_all_images_of_a_corpus_take_little_memory():
    """25,596 images, 14 findings: beyond the features a few [N, P], far below [N, E P]."""
    n, width = 25_596, 64
    image = np.random.default_rng(0).normal(size=(n, width))
    prompts = [unit(np.random.default_rng(c).normal(size=(3, width))) for c in range(14)]
    for name in ("clean", "cxrclip", "chexzero"):
        tracemalloc.start()
        scoring.scores(name, image, prompts, prompts)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 6 * n * 14 * 8, name


def test_thresholds_decide_as_scikit_learn_counts():
    rng = np.random.default_rng(3)
    labels = rng.integers(-1, 2, (60, 3)).astype(np.int8)
    labels[:, 2] = np.minimum(labels[:, 2], 0)  # no positive: skipped and listed
    scores, groups = rng.normal(size=(60, 3)) + labels, np.arange(60) // 2
    found = thresholds.choose(labels, scores)
    assert np.isnan(found[2])
    scored = thresholds.decide(
        labels, scores, found, "abc", rule="maxf1-on-test", groups=groups, resamples=50
    )
    f1 = []
    for c, name in enumerate("ab"):
        known = labels[:, c] >= 0
        y, called = labels[known, c], scores[known, c] >= found[c]
        f1.append(sk.f1_score(y, called))
        assert f1[-1] == max(sk.f1_score(y, scores[known, c] >= t) for t in scores[known, c])
        entry = scored.numbers[f"f1_at_threshold/{name}"]
        assert entry["value"] == pytest.approx(f1[-1], rel=1e-12)
        assert entry["chance"] == pytest.approx(sk.f1_score(y, np.ones_like(y)), rel=1e-12)
        assert entry["low"] <= entry["value"] <= entry["high"]
        right = scored.numbers[f"accuracy_at_threshold/{name}"]["value"]
        assert right == pytest.approx(sk.accuracy_score(y, called), rel=1e-12)
    assert scored.numbers["macro_f1_at_threshold"]["value"] == pytest.approx(np.mean(f1))
    assert scored.notes["without_threshold"] == ["c"]
    assert scored.notes["threshold_rule"] == "maxf1-on-test (optimistic)"


def test_a_threshold_of_the_validation_split_does_not_see_the_test_split():
    pairs, labels = embedded(multi_label=True), (IMAGE[:, :3] > 0).astype(np.int8)
    held = zero_shot.Validation(unit(np.random.default_rng(9).normal(size=(40, 6))), None)
    held = held._replace(labels=(held.image[:, :3] > 0).astype(np.int8))
    options = {"task": "t", "resamples": 0, "validation": held, "threshold": "maxf1-on-val"}
    found = zero_shot.run(IMAGE, labels, pairs, **options)
    fewer = zero_shot.run(IMAGE[:15], labels[:15], pairs, **options)
    key = "zero_shot/t/protocol"
    assert found[key]["thresholds"] == fewer[key]["thresholds"]
    assert found[key]["threshold_rule"] == "maxf1-on-val"
    other = zero_shot.run(IMAGE, labels, pairs, **options | {"threshold": "maxf1-on-test"})
    for name in "abc":
        best, honest = (f[f"zero_shot/t/f1_at_threshold/{name}"]["value"] for f in (other, found))
        assert best >= honest
    assert other[key]["hash"] != found[key]["hash"]
