"""Published retrieval numbers against loops over sorted galleries, and their oracle."""

import numpy as np
import pytest
from test_retrieval import CLASSES, ORACLE

from medvlp_jax.config import UserError
from medvlp_jax.evaluation import retrieval, retrieval_legacy


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def corpus():
    """Forty images of twelve patients, 25 distinct texts, four classes, one of them unknown."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 25, 40)
    texts = unit(rng.normal(size=(25, 5)))[ids]
    classes = rng.integers(0, 4, 25)[ids]
    labels = np.eye(4, dtype=np.int8)[classes]
    labels[:3] = -1
    return unit(texts + rng.normal(size=(40, 5))), texts, ids, labels, rng.integers(0, 12, 40)


def test_oracle_of_precision_hit_recall_and_rank():
    same, pairs, ks = CLASSES[:, None] == CLASSES, np.eye(6, dtype=bool), (1, 2, 3)
    found = retrieval_legacy.ranked(ORACLE, same, ks)
    np.testing.assert_allclose(found["precision"].mean(0), [0.6667, 0.3333, 0.3889], atol=1e-4)
    np.testing.assert_allclose(found["hit"].mean(0), [0.6667, 0.6667, 1.0], atol=1e-4)
    found = retrieval_legacy.ranked(ORACLE, pairs, ks)
    np.testing.assert_allclose(found["hit"].mean(0), [0.6667, 0.6667, 0.8333], atol=1e-4)


def test_ties_keep_the_order_of_the_gallery():
    right = np.array([[0, 1, 0]], bool)
    found = retrieval_legacy.ranked(np.zeros((1, 3)), right, (1, 2))
    assert found["hit"].tolist() == [[0, 1]]
    assert found["precision"].tolist() == [[0, 0.5]]
    assert found["rank"].tolist() == [2]
    assert retrieval_legacy.ranked(np.zeros((1, 3)), right & False, (1,))["rank"].tolist() == [4]


def loops(queries, gallery, y_query, y_gallery, k, letter, *, standardise=False):
    """P@K or H@K over the queries of a known class, one sorted list at a time."""
    matrix = [[float(a @ b) for b in gallery] for a in queries]
    if standardise:  # over the queries that are scored
        known = [row for row, y in zip(matrix, y_query, strict=True) if y >= 0]
        columns = [np.array(c) for c in zip(*known, strict=True)]
        moments = [(c.mean(), c.std()) for c in columns]
        matrix = [[(s - m) / d for s, (m, d) in zip(r, moments, strict=True)] for r in matrix]
    scores = []
    for row, y in zip(matrix, y_query, strict=True):
        if y < 0:
            continue
        best = sorted(range(len(row)), key=lambda g: -row[g])[:k]  # Python's sort is stable
        hits = [y_gallery[g] == y for g in best]
        scores.append(sum(hits) / k if letter == "P" else float(any(hits)))
    return sum(scores) / len(scores)


def test_class_metrics_are_the_loops_over_every_report(corpus):
    image, text, ids, labels, groups = corpus
    y = np.where((labels < 0).all(1), -1, labels.argmax(1))
    options = {"labels": labels, "groups": groups, "resamples": 20, "tile": 7}
    found = retrieval_legacy.run(image, text, ids, flavour="benchx", **options)
    for task, queries, gallery in (("image_to_text", image, text), ("text_to_image", text, image)):
        for letter, k in (("P", 1), ("P", 5), ("P", 10), ("H", 1), ("H", 5), ("H", 10)):
            entry = found[f"retrieval/{task} (benchx)/{letter}@{k}"]
            assert entry["value"] == pytest.approx(loops(queries, gallery, y, y, k, letter))
            assert entry["n"] == 37
        assert found[f"retrieval/{task} (benchx)/protocol"]["gallery"] == 40  # copies too
        assert found[f"retrieval/{task} (benchx)/protocol"][retrieval.UNKNOWN] == 3
        one = f"retrieval/{task} (benchx)"
        assert found[f"{one}/H@1"]["value"] == found[f"{one}/P@1"]["value"]
    found = retrieval_legacy.run(image, text, ids, flavour="gloria", **options)
    for k in (5, 10):
        expected = loops(image, text, y, y, k, "P", standardise=True)
        entry = found[f"retrieval/image_to_text (gloria)/P@{k}"]
        assert entry["value"] == pytest.approx(expected, rel=1e-12)
    plain = loops(image, text, y, y, 10, "P")
    assert found["retrieval/image_to_text (gloria)/P@10"]["value"] != pytest.approx(plain)
    assert "retrieval/image_to_text (gloria)/P@100" not in found  # more than the gallery


def test_moments_are_those_of_the_whole_matrix(corpus):
    matrix = corpus[0] @ corpus[1].T
    mean, spread = retrieval_legacy.column_moments(corpus[0], corpus[1])
    np.testing.assert_allclose(mean, matrix.mean(0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(spread, matrix.std(0), rtol=1e-9)


def test_pair_recall_counts_a_hit_on_any_copy(corpus):
    image, text, ids, labels, groups = corpus
    found = retrieval_legacy.run(
        image, text, ids, flavour="cxrclip", labels=labels, groups=groups, resamples=0
    )
    distinct = list(dict.fromkeys(sorted(ids.tolist())))
    gallery = [text[ids.tolist().index(i)] for i in distinct]
    ranks = []
    for i, row in enumerate(image):
        order = sorted(range(len(gallery)), key=lambda g: -float(row @ gallery[g]))
        ranks.append(order.index(distinct.index(ids[i])) + 1)
    ranks = np.array(ranks)
    key = "retrieval/image_to_text (cxrclip)"
    for k in (1, 5, 10):
        assert found[f"{key}/R@{k}"]["value"] == pytest.approx((ranks <= k).mean())
    assert found[f"{key}/mean_rank"]["value"] == pytest.approx(ranks.mean())
    assert found[f"{key}/protocol"]["gallery"] == len(distinct) < 40
    assert retrieval.UNKNOWN not in found[f"{key}/protocol"]  # no class counts here
    assert found[f"{key}/R@1"]["protocol"] == "retrieval@cxrclip-v1"


def test_what_cannot_be_measured_is_refused(corpus):
    image, text, ids, *_ = corpus
    with pytest.raises(UserError, match=r"No retrieval flavour 'bench'.*benchx"):
        retrieval_legacy.run(image, text, ids, flavour="bench")
    with pytest.raises(UserError, match="retrieval@gloria counts classes"):
        retrieval_legacy.run(image, text, ids, flavour="gloria")


def test_queries_that_do_not_differ_leave_the_order_of_the_gallery():
    rng = np.random.default_rng(0)
    query, entries = np.tile(unit(rng.normal(size=6)), (7, 1)), unit(rng.normal(size=(9, 6)))
    kind = rng.permutation(9) % 3
    sides = [
        retrieval_legacy.Side(features, np.arange(n), kinds, np.arange(n))
        for features, n, kinds in ((query, 7, np.zeros(7, int)), (entries, 9, kind))
    ]
    found = retrieval_legacy.search(*sides, retrieval_legacy.FLAVOURS["gloria"], (4,))
    assert found["P@4"].tolist() == [(kind[:4] == 0).mean()] * 7


@pytest.mark.parametrize(("flavour", "counts"), [("benchx", True), ("cxrclip", False)])
def test_the_task_whose_classes_count_is_in_the_hash_where_they_do(corpus, flavour, counts):
    image, text, ids, labels, _ = corpus
    options = {"flavour": flavour, "labels": labels, "resamples": 0}
    runs = [
        retrieval_legacy.run(image, text, ids, class_task=task, **options)
        for task in ("organ", "plane")
    ]
    hashes = {run[f"retrieval/image_to_text ({flavour})/protocol"]["hash"] for run in runs}
    assert (len(hashes) == 2) == counts
