"""Retrieval against loops over sorted galleries, its oracle, and exact chance."""

import itertools
import json
import math
import tracemalloc

import numpy as np
import pytest

from medvlp_jax.config import UserError
from medvlp_jax.evaluation import features, retrieval

ORACLE = np.array(
    [
        [0.9, 0.1, 0.8, 0.2, 0.3, 0.0],
        [0.2, 0.7, 0.1, 0.6, 0.5, 0.4],
        [0.6, 0.5, 0.4, 0.3, 0.2, 0.1],
        [0.1, 0.3, 0.2, 0.9, 0.8, 0.4],
        [0.1, 0.6, 0.2, 0.5, 0.3, 0.4],
        [0.3, 0.2, 0.1, 0.5, 0.4, 0.6],
    ]
)
CLASSES = np.array([0, 0, 1, 1, 2, 2])


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture
def corpus():
    """Thirty images, 12 patients, 19 distinct texts, 3 findings."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 25, 30)
    texts = unit(rng.normal(size=(25, 8)))[ids]
    labels = rng.integers(0, 2, (25, 3))[ids].astype(np.int8)
    image = unit(texts + rng.normal(size=(30, 8)))
    return image, texts, ids, labels, rng.integers(0, 12, 30)


def test_oracle_of_precision_hit_and_recall():
    ks = (1, 2, 3)
    same = CLASSES[:, None] == CLASSES
    found = retrieval.precision(ORACLE, same, ks).mean(0)
    np.testing.assert_allclose(found, [0.6667, 0.3333, 0.3889], atol=1e-4)
    hits = retrieval.first_right(ORACLE, same, ks)[1].mean(0)
    np.testing.assert_allclose(hits, [0.6667, 0.6667, 1.0], atol=1e-4)
    pairs = retrieval.first_right(ORACLE, np.eye(6, dtype=bool), ks)[1].mean(0)
    np.testing.assert_allclose(pairs, [0.6667, 0.6667, 0.8333], atol=1e-4)


def test_oracle_through_run():
    # inner products of ORACLE's rows with the identity are ORACLE itself
    one_hot = np.eye(3, dtype=np.int8)[CLASSES]
    found = retrieval.run(ORACLE, np.eye(6), np.arange(6), labels=one_hot, ks=(1, 2, 3))
    expected = {"P@1": 2 / 3, "P@2": 1 / 3, "P@3": 7 / 18, "H@3": 1.0, "R@1": 2 / 3, "R@3": 5 / 6}
    for name, value in expected.items():
        assert found[f"retrieval/image_to_text/{name}"]["value"] == pytest.approx(value)


def test_ties_equal_the_mean_over_all_orders():
    similarity = np.array([[0.5, 0.5, 0.5, 0.9, 0.1]])
    right = np.array([[True, True, False, False, True]])
    ks = (1, 2, 3, 4, 5)
    ranks, hits, shares = [], [], []
    for order in itertools.permutations(range(5)):
        order = sorted(order, key=lambda g: -similarity[0, g])  # stable: ties keep this order
        answers = right[0, order]
        ranks.append(np.argmax(answers) + 1)
        hits.append([answers[:k].any() for k in ks])
        shares.append([answers[:k].mean() for k in ks])
    rank, hit = retrieval.first_right(similarity, right, ks)
    assert rank[0] == pytest.approx(np.mean(ranks))
    np.testing.assert_allclose(hit[0], np.mean(hits, axis=0), atol=1e-12)
    np.testing.assert_allclose(
        retrieval.precision(similarity, right, ks)[0], np.mean(shares, axis=0), atol=1e-12
    )


def test_nothing_right_ranks_after_the_gallery():
    rank, hit = retrieval.first_right(ORACLE, np.zeros((6, 6), bool), (1, 6))
    np.testing.assert_array_equal(rank, 7)
    np.testing.assert_array_equal(hit, 0)


def test_run_equals_loops_over_a_sorted_gallery(corpus):
    image, text, ids, labels, groups = corpus
    found = retrieval.run(image, text, ids, labels=labels, groups=groups, ks=(1, 5))
    names, first = np.unique(ids, return_index=True)
    similarity = image.astype(np.float64) @ text[first].astype(np.float64).T
    ranks, shares = [], []
    for i in range(30):
        order = np.argsort(-similarity[i], kind="stable")
        ranks.append(1 + list(names[order]).index(ids[i]))
        same = [(labels[first[g]] == labels[i]).all() for g in order[:5]]
        shares.append(np.mean(same))
    direction = "retrieval/image_to_text"
    assert found[f"{direction}/R@1"]["value"] == pytest.approx(np.mean(np.array(ranks) <= 1))
    assert found[f"{direction}/R@5"]["value"] == pytest.approx(np.mean(np.array(ranks) <= 5))
    assert found[f"{direction}/mean_rank"]["value"] == pytest.approx(np.mean(ranks))
    assert found[f"{direction}/median_rank"]["value"] == pytest.approx(np.median(ranks))
    assert found[f"{direction}/P@5"]["value"] == pytest.approx(np.mean(shares))
    assert found[f"{direction}/protocol"]["gallery"] == len(names)
    back = []
    for u, name in enumerate(names):
        order = np.argsort(-similarity[:, u], kind="stable")
        back.append(1 + np.flatnonzero(ids[order] == name)[0])
    assert found["retrieval/text_to_image/R@5"]["value"] == pytest.approx(
        np.mean(np.array(back) <= 5)
    )
    assert found["retrieval/text_to_image/R@5"]["n"] == len(names)


def test_reports_with_the_same_impression_are_one_text_for_a_model_of_impressions():
    """Of 200 reports 100 conclude alike: a perfect model of impressions cannot tell them apart."""
    impression = np.maximum(np.arange(200) - 99, 0)
    found = {"text_id": np.arange(200)[::-1], "impression_id": impression}
    found["findings_id"] = np.arange(200)
    texts = np.eye(101)[impression]
    run = lambda *sections: retrieval.run(
        texts, texts, features.text_ids(found, sections), resamples=0
    )
    one, both = run("impression"), run("findings", "impression")
    assert one["retrieval/image_to_text/R@1"]["value"] == 1
    assert one["retrieval/image_to_text/protocol"]["gallery"] == 101
    assert both["retrieval/image_to_text/R@1"]["value"] == pytest.approx(0.505)
    assert both == retrieval.run(texts, texts, found["text_id"], resamples=0)  # as ever


def test_tiled_equals_dense(corpus):
    image, text, ids, labels, groups = corpus
    dense = retrieval.run(image, text, ids, labels=labels, groups=groups, tile=1000)
    tiled = retrieval.run(image, text, ids, labels=labels, groups=groups, tile=7)
    assert tiled == dense


def dense_scores(similarity, right, ks):
    """Rank, R@K and P@K of each query: every place a right answer can take, from the counts."""
    ranks, hits, shares = [], [], []
    for row, answers in zip(similarity, right, strict=True):
        best = max(s for s, is_right in zip(row, answers, strict=True) if is_right)
        above = sum(s > best for s in row)
        tied = sum(s == best for s in row)
        good = sum(s == best and is_right for s, is_right in zip(row, answers, strict=True))
        first = [  # probability that the first right answer stands at place p among the tied
            math.comb(tied - good, p) / math.comb(tied, p) * good / (tied - p) for p in range(tied)
        ]
        ranks.append(sum(q * (above + p + 1) for p, q in enumerate(first)))
        hits.append([sum(q for p, q in enumerate(first) if above + p < k) for k in ks])
        place = []  # probability that place p of the whole gallery is right
        for value in sorted(set(row), reverse=True):
            level = [is_right for s, is_right in zip(row, answers, strict=True) if s == value]
            place += [sum(level) / len(level)] * len(level)
        shares.append([sum(place[:k]) / k for k in ks])
    return np.array(ranks), np.array(hits), np.array(shares)


def test_run_with_many_ties_equals_the_whole_matrix_counted_by_loops():
    rng = np.random.default_rng(5)
    ids = rng.integers(0, 20, 40)
    text = rng.integers(-1, 2, (20, 3))[ids] + np.array([0, 0, 3])  # no text is a zero row
    image = rng.integers(-1, 2, (40, 3))
    labels = rng.integers(0, 2, (20, 2))[ids]
    ks = (1, 3, 10)
    found = retrieval.run(image, text, ids, labels=labels, ks=ks, tile=7, resamples=0)
    names, first = np.unique(ids, return_index=True)
    similarity = (image @ text[first].T).astype(float)
    assert len(np.unique(similarity)) < 15  # of 40 x 20 cosines
    pair = ids[:, None] == names
    kind = (labels[:, None] == labels[first][None]).all(-1)
    for task, s, own, same in (
        ("image_to_text", similarity, pair, kind),
        ("text_to_image", similarity.T, pair.T, kind.T),
    ):
        rank, hit, _ = dense_scores(s, own, ks)
        _, _, share = dense_scores(s, same, ks)
        value = lambda name, task=task: found[f"retrieval/{task}/{name}"]["value"]
        assert value("mean_rank") == pytest.approx(rank.mean(), rel=1e-12)
        for i, k in enumerate(ks):
            assert value(f"R@{k}") == pytest.approx(hit[:, i].mean(), rel=1e-12)
            assert value(f"P@{k}") == pytest.approx(share[:, i].mean(), rel=1e-12)


def test_memory_is_linear_in_the_pairs_and_far_below_the_matrix():
    def peak(pairs):
        rng = np.random.default_rng(0)
        image, text = rng.normal(size=(2, pairs, 8))
        labels = rng.integers(0, 5, pairs)[:, None] == np.arange(5)
        tracemalloc.start()
        run = {"labels": labels.astype(np.int8), "tile": 64, "resamples": 0}
        retrieval.run(image, text, np.arange(pairs), **run)
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    small, large = peak(1_000), peak(2_000)
    assert large <= 2.1 * small
    assert large <= 2_000**2 * 8 / 4  # one matrix of float64 cosines takes 32 MB


def test_order_of_rows_does_not_matter(corpus):
    order = np.random.default_rng(1).permutation(30)
    options = {"resamples": 0}
    image, text, ids, labels, _ = corpus
    straight = retrieval.run(image, text, ids, labels=labels, **options)
    shuffled = retrieval.run(image[order], text[order], ids[order], labels=labels[order], **options)
    for name, entry in straight.items():
        if "value" in entry:
            assert shuffled[name]["value"] == pytest.approx(entry["value"], rel=1e-12)


def test_collapsed_embeddings_score_exactly_chance(corpus):
    _, _, ids, labels, _ = corpus
    rng = np.random.default_rng(0)
    same = np.tile(unit(rng.normal(size=8)), (30, 1))
    noisy = same + np.float32(1e-8) * rng.normal(size=same.shape).astype(np.float32)
    found = retrieval.run(noisy, same, ids, labels=labels, resamples=0)
    assert "retrieval/image_to_text/mean_rank" in found
    for name, entry in found.items():
        if "value" in entry and not name.endswith("median_rank"):  # the median is discrete
            assert entry["value"] == pytest.approx(entry["chance"], rel=1e-9), name


def test_chance_equals_random_embeddings_on_average():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 20, 40)
    labels = rng.integers(0, 2, (20, 2))[ids]
    sums, runs = {}, 150
    for _ in range(runs):
        image, text = unit(rng.normal(size=(40, 16))), unit(rng.normal(size=(20, 16)))[ids]
        found = retrieval.run(image, text, ids, labels=labels, resamples=0)
        for name, entry in found.items():
            if "value" in entry:
                sums[name] = sums.get(name, 0) + entry["value"] / runs
    for name, mean in sums.items():
        tolerance = 0.6 if name.endswith("rank") else 0.025  # 4 standard errors of 150 runs
        assert mean == pytest.approx(found[name]["chance"], abs=tolerance), name


def test_rows_without_text_are_left_out(corpus):
    image, text, ids, labels, groups = corpus
    holes = text.copy()
    holes[:5] = 0
    found = retrieval.run(image, holes, ids, labels=labels, groups=groups)
    plain = retrieval.run(image[5:], text[5:], ids[5:], labels=labels[5:], groups=groups[5:])
    note = "retrieval/image_to_text/protocol"
    assert found.pop(note)["left_out"] == 5
    plain.pop(note)
    name = "retrieval/text_to_image/protocol"
    assert found.pop(name)["gallery"] == plain.pop(name)["gallery"] == 25
    assert found == plain


def test_top_texts_are_distinct_and_best_first(corpus):
    image, text, ids, *_ = corpus
    rows, scores = retrieval.top_texts(image[:3], text, ids, 4)
    assert rows.shape == scores.shape == (3, 4)
    for i in range(3):
        assert len(set(ids[rows[i]])) == 4
        best = max(float(image[i] @ t) for t in text)
        assert scores[i, 0] == pytest.approx(best, rel=1e-5)
        np.testing.assert_allclose(scores[i], text[rows[i]] @ image[i], rtol=1e-5)
        assert (np.diff(scores[i]) <= 0).all()


def test_label_sets_join_equal_sets_and_mark_rows_with_an_unknown_finding():
    labels = np.array([[1, 0], [1, -1], [0, 0], [-1, -1], [1, 1], [1, 0], [0, -1]])
    sets = retrieval.label_sets(labels)
    assert sets[0] == sets[5] != sets[2]
    assert (sets < 0).tolist() == [False, True, False, True, False, False, True]
    assert len({*sets}) == 4
    complete = labels[labels.min(1) >= 0]
    numbered = np.unique(complete == 1, axis=0, return_inverse=True)[1]
    np.testing.assert_array_equal(retrieval.label_sets(complete), numbered)


def test_shared_text_takes_its_most_frequent_label_set():
    labels = np.array([[1, 0], [0, 1], [0, 1], [-1, -1]])
    image = np.eye(4)
    _, texts = retrieval.sides(image, image, np.array([7, 7, 7, 8]), labels=labels)
    assert texts.kind.tolist() == [retrieval.label_sets(labels)[1], -1]


def test_unknown_queries_do_not_count_for_class_precision(corpus):
    image, text, ids, labels, groups = corpus
    run = lambda labels: retrieval.run(image, text, ids, labels=labels, groups=groups)
    unknown, uncertain = labels.copy(), labels.copy()
    unknown[:4], uncertain[:4, 1] = -1, -1
    found, whole = run(unknown), run(labels)
    assert found["retrieval/image_to_text/P@5"]["n"] == 26
    assert found["retrieval/image_to_text/R@5"]["n"] == 30
    assert found["retrieval/image_to_text/protocol"][retrieval.UNKNOWN] == 4
    assert run(uncertain) == found  # one uncertain finding says as little as none
    for task in ("image_to_text", "text_to_image"):
        assert retrieval.UNKNOWN not in whole[f"retrieval/{task}/protocol"]


def test_an_uncertain_finding_is_no_right_answer_to_images_without_it():
    """Text 0 is nearest to all; its report is unsure of the second finding."""
    labels = np.array([[0, -1], [0, 0], [0, 0], [1, 0]])
    near = np.eye(4) + 2 * (np.arange(4) == 0)
    found = retrieval.run(near, np.eye(4), np.arange(4), labels=labels, ks=(1,), resamples=0)
    entry = found["retrieval/image_to_text/P@1"]
    assert (entry["value"], entry["n"]) == (0, 3)
    assert entry["chance"] == pytest.approx(np.mean([2, 2, 1]) / 4)  # it stays in the gallery
    assert found["retrieval/image_to_text/P@1/other classes"]["n"] == 1
    note = found["retrieval/image_to_text/protocol"]
    assert note[retrieval.ONE_ANSWER] == pytest.approx(2 / 3)


def test_the_best_single_answer_is_noted_beside_class_precision(corpus):
    """Every entry in turn as the answer to all queries: none is better, and one is as good."""
    image, text, ids, labels, groups = corpus
    found = retrieval.run(image, text, ids, labels=labels, groups=groups, resamples=2)
    for side, queries, gallery in zip(
        ("image_to_text", "text_to_image"),
        (sides := retrieval.sides(image, text, ids, labels=labels, groups=groups)),
        sides[::-1],
        strict=True,
    ):
        always = [float(np.mean(queries.kind == kind)) for kind in gallery.kind]
        assert found[f"retrieval/{side}/protocol"][retrieval.ONE_ANSWER] == max(always)
        usual = gallery.kind[np.argmax(always)]
        similarity = queries.features.astype(np.float64) @ gallery.features.astype(np.float64).T
        rest = [i for i in range(len(queries.kind)) if queries.kind[i] != usual]
        right = [gallery.kind[similarity[i].argmax()] == queries.kind[i] for i in rest]
        entry = found[f"retrieval/{side}/P@1/other classes"]
        assert entry["value"] == pytest.approx(np.mean(right))
        guessed = [np.mean(gallery.kind == queries.kind[i]) for i in rest]
        assert (entry["n"], entry["chance"]) == (len(rest), pytest.approx(np.mean(guessed)))
    plain = retrieval.run(image, text, ids, resamples=2)
    assert retrieval.ONE_ANSWER not in plain["retrieval/image_to_text/protocol"]
    assert not any("other classes" in key for key in plain)


def test_k_above_the_gallery_is_dropped():
    found = retrieval.run(np.eye(4), np.eye(4), np.arange(4), ks=(1, 5))
    assert "retrieval/image_to_text/R@1" in found
    assert "retrieval/image_to_text/R@5" not in found


def test_diverged_or_missing_features_are_refused(corpus):
    image, text, ids, *_ = corpus
    broken = image.copy()
    broken[3] = np.nan
    with pytest.raises(UserError, match="1 of 30 rows of 'image' are not finite"):
        retrieval.run(broken, text, ids)
    with pytest.raises(UserError, match="None of 30 examples has a text"):
        retrieval.run(image, 0 * text, ids)


def test_result_is_json(corpus):
    image, text, ids, labels, groups = corpus
    found = retrieval.run(image, text, ids, labels=labels, groups=groups)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    entry = found["retrieval/image_to_text/R@1"]
    assert entry["low"] <= entry["value"] <= entry["high"]
    assert entry["protocol"] == "retrieval@clean-v1"


def test_the_task_whose_classes_count_is_in_the_hash(corpus):
    image, text, ids, labels, groups = corpus
    options = {"groups": groups, "resamples": 0}
    key = "retrieval/image_to_text/protocol"
    run = lambda **more: retrieval.run(image, text, ids, **options, **more)[key]
    organ, plane = (run(labels=labels, class_task=task) for task in ("organ", "plane"))
    assert organ["settings"]["class_task"] == "organ"
    assert organ["hash"] != plane["hash"]
    assert run()["hash"] == run(class_task="organ")["hash"]  # without labels no class counts


def test_the_sections_that_are_read_are_in_the_hash(corpus):
    image, text, ids, *_ = corpus
    runs = [
        retrieval.run(image, text, ids, reads={"sections": sections, "texts": ""}, resamples=0)
        for sections in (["findings", "impression"], ["impression"])
    ]
    both, one = (run["retrieval/text_to_image/protocol"] for run in runs)
    assert one["settings"]["sections"] == ["impression"]
    assert both["hash"] != one["hash"]
