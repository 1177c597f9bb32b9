"""Prompt handling and zero-shot numbers on features whose answer is known."""

import json
import math
import zlib

import numpy as np
import pytest
import scipy.special
from sklearn import metrics as sk

from medvlp_jax.config import UserError
from medvlp_jax.evaluation import classify, metrics, zero_shot

PROMPTS = {
    "version": "toy-v1",
    "tasks": {
        "finding": {
            "section": "impression",
            "multi_label": True,
            "classes": {
                "nodule": {"positive": ["a nodule", "nodular opacity"], "negative": ["clear"]},
                "edema": {"positive": ["edema"], "negative": ["no edema"]},
            },
        },
        "view": {
            "section": "findings",
            "multi_label": False,
            "classes": {c: {"positive": [f"{c} view"]} for c in ("AP", "PA", "lateral")},
        },
    },
}


def embed_texts(texts, section):
    """A fixed random vector a text, deliberately not of unit norm."""
    seeds = [zlib.crc32((text + section).encode()) for text in texts]
    return np.stack([np.random.default_rng(s).normal(size=6) * (1 + s % 3) for s in seeds])


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture
def views():
    return zero_shot.embed_prompts(
        zero_shot.prompt_texts(PROMPTS, "view", ("PA", "lateral", "AP")), embed_texts
    )


@pytest.fixture
def findings():
    return zero_shot.embed_prompts(
        zero_shot.prompt_texts(PROMPTS, "finding", ("edema", "nodule")), embed_texts
    )


def test_classes_follow_the_label_columns(views):
    assert views.prompts.positive == (("PA view",), ("lateral view",), ("AP view",))
    assert views.prompts.section == "findings"
    assert views.negative is None


def test_ensemble_normalises_before_and_after_the_mean(findings):
    texts = PROMPTS["tasks"]["finding"]["classes"]["nodule"]["positive"]
    first, second = (unit(embed_texts([t], "impression")[0]) for t in texts)
    np.testing.assert_allclose(findings.positive[1], unit((first + second) / 2), rtol=1e-12)


def test_unknown_task_class_and_missing_negative_are_refused():
    with pytest.raises(UserError, match=r"task 'findings'.*finding"):
        zero_shot.prompt_texts(PROMPTS, "findings", ("edema",))
    with pytest.raises(UserError, match=r"class 'oedema'.*edema"):
        zero_shot.prompt_texts(PROMPTS, "finding", ("oedema",))
    with pytest.raises(UserError, match=r"names no class that task 'finding' .* nodule, edema"):
        zero_shot.prompt_texts(PROMPTS, "finding", ())
    broken = json.loads(json.dumps(PROMPTS))
    del broken["tasks"]["finding"]["classes"]["edema"]["negative"]
    with pytest.raises(UserError, match="needs a negative prompt"):
        zero_shot.prompt_texts(broken, "finding", ("edema",))


def test_score_is_the_difference_of_cosines(findings):
    image = unit(np.random.default_rng(0).normal(size=(4, 6)))
    found = zero_shot.scores(image, findings)
    for i in range(4):
        for c in range(2):
            expected = image[i] @ findings.positive[c] - image[i] @ findings.negative[c]
            assert found[i, c] == pytest.approx(expected, rel=1e-12)


def test_multi_label_numbers_equal_scikit_learn_over_known_rows(findings):
    rng = np.random.default_rng(1)
    image, labels = unit(rng.normal(size=(50, 6))), rng.integers(-1, 2, (50, 2)).astype(np.int8)
    found = zero_shot.run(image, labels, findings, task="finding", groups=np.arange(50) // 2)
    scores = zero_shot.scores(image, findings)
    expected = []
    for c, name in enumerate(("edema", "nodule")):
        known = labels[:, c] >= 0
        expected.append(sk.roc_auc_score(labels[known, c], scores[known, c]))
        entry = found[f"zero_shot/finding/auroc/{name}"]
        assert entry["value"] == pytest.approx(expected[-1])
        assert entry["n"] == known.sum()
        assert entry["low"] < entry["value"] < entry["high"]
        auprc = found[f"zero_shot/finding/auprc/{name}"]
        positives = (labels[known, c] == 1).sum()
        chance = metrics.expected_average_precision(positives, known.sum())
        assert auprc["chance"] == pytest.approx(chance, rel=1e-12)
        assert auprc["chance"] > positives / known.sum()
    assert found["zero_shot/finding/macro_auroc"]["value"] == pytest.approx(np.mean(expected))
    assert found["zero_shot/finding/protocol"]["patients"] == 25


def test_class_with_one_label_is_listed_not_nan(findings):
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, (30, 2)).astype(np.int8)
    labels[:, 0] = 0
    found = zero_shot.run(unit(rng.normal(size=(30, 6))), labels, findings, task="finding")
    assert found["zero_shot/finding/protocol"]["skipped"] == ["edema"]
    assert "zero_shot/finding/auroc/edema" not in found
    macro = found["zero_shot/finding/macro_auroc"]["value"]
    assert macro == found["zero_shot/finding/auroc/nodule"]["value"]


def test_no_usable_class_gives_only_the_notes(findings):
    labels = np.zeros((5, 2), np.int8)
    found = zero_shot.run(unit(np.ones((5, 6))), labels, findings, task="finding")
    assert list(found) == ["zero_shot/finding/protocol"]


def test_images_of_a_prompt_are_classified_as_its_class(views):
    truth = np.array([0, 1, 2, 2, 1, 0])
    labels = np.eye(3, dtype=np.int8)[truth]
    found = zero_shot.run(views.positive[truth], labels, views, task="view")
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "macro_auroc", "mcc"):
        assert found[f"zero_shot/view/{name}"]["value"] == pytest.approx(1.0)


def test_single_label_numbers_equal_scikit_learn(views):
    rng = np.random.default_rng(2)
    image, truth = unit(rng.normal(size=(60, 6))), rng.integers(0, 3, 60)
    labels = np.eye(3, dtype=np.int8)[truth]
    labels[:6] = -1
    found = zero_shot.run(image, labels, views, task="view")
    truth, scores = truth[6:], zero_shot.scores(image, views)[6:]
    guess, chances = scores.argmax(1), scipy.special.softmax(scores / 0.07, axis=1)
    expected = {
        "accuracy": sk.accuracy_score(truth, guess),
        "balanced_accuracy": sk.balanced_accuracy_score(truth, guess),
        "macro_f1": sk.f1_score(truth, guess, average="macro"),
        "macro_auroc": np.mean([sk.roc_auc_score(truth == c, chances[:, c]) for c in range(3)]),
        "mcc": sk.matthews_corrcoef(truth, guess),
        "recall/lateral": (guess[truth == 1] == 1).mean(),
        "f1/lateral": sk.f1_score(truth, guess, average=None)[1],
        "auroc/AP": sk.roc_auc_score(truth == 2, chances[:, 2]),
        "auprc/AP": sk.average_precision_score(truth == 2, chances[:, 2]),
        "prevalence_control_accuracy": np.bincount(truth).max() / 54,
        "prevalence_control_balanced_accuracy": 1 / 3,
    }
    for name, value in expected.items():
        assert found[f"zero_shot/view/{name}"]["value"] == pytest.approx(value), name
    assert found["zero_shot/view/accuracy"]["chance"] == pytest.approx(1 / 3)
    assert found["zero_shot/view/protocol"]["left_out"] == 6


def near_to_all_texts(flavour, **options):
    """Five classes; some images are near to all texts, which is no answer."""
    rng = np.random.default_rng(5)
    truth, texts = rng.integers(0, 5, 200), unit(np.eye(5, 6) + np.eye(6)[5])
    image = 0.3 * np.eye(5, 6)[truth] + 0.1 * rng.normal(size=(200, 6))
    image[:, 5] = rng.uniform(0, 1, 200)
    image /= 2 * np.linalg.norm(image, axis=1).max()  # cosines with what else such vectors have
    names = tuple("abcde")
    prompts = zero_shot.Prompts("toy-v1", "", False, names, tuple((n,) for n in names), ())
    embeddings = zero_shot.ClassEmbeddings(prompts, tuple(texts[:, None]), ())
    labels = np.eye(5, dtype=np.int8)[truth]
    options = {"task": "t", "flavour": flavour, "resamples": 0, **options}
    return truth, image @ texts.T, zero_shot.run(image, labels, embeddings, **options)


def test_an_image_near_to_all_texts_is_not_ranked_first_for_every_class():
    truth, cosines, found = near_to_all_texts("clean")
    per_class = []
    for c in range(5):
        chances = []
        for row in cosines:
            each = [math.exp(cosine / 0.07) for cosine in row]
            chances.append(each[c] / sum(each))
        per_class.append(sk.roc_auc_score(truth == c, chances))
        entry = found[f"zero_shot/t/auroc/{'abcde'[c]}"]
        assert entry["value"] == pytest.approx(per_class[c], rel=1e-12)
    raw = np.mean([sk.roc_auc_score(truth == c, cosines[:, c]) for c in range(5)])
    macro = found["zero_shot/t/macro_auroc"]
    assert macro["value"] == pytest.approx(np.mean(per_class), rel=1e-12)
    assert macro["value"] > raw + 0.1
    assert macro["protocol"] == "zero_shot@clean-v2"
    assert found["zero_shot/t/protocol"]["settings"]["temperature"] == 0.07
    # Answers are those of the cosines, and so is what a transductive z-score makes of them.
    expected = classify.single_label_scores(
        np.eye(5, dtype=np.int8)[truth], cosines, "abcde", resamples=0
    ).numbers
    for name in ("accuracy", "macro_f1", "accuracy_zscore", "recall/c"):
        assert found[f"zero_shot/t/{name}"]["value"] == expected[name]["value"], name


def test_published_flavours_rank_by_their_scores_and_findings_keep_their_protocol(findings):
    truth, cosines, found = near_to_all_texts("cxrclip")
    raw = np.mean([sk.roc_auc_score(truth == c, cosines[:, c]) for c in range(5)])
    entry = found["zero_shot/t (cxrclip)/macro_auroc"]
    assert entry["value"] == pytest.approx(raw, rel=1e-12)
    assert entry["protocol"] == "zero_shot@cxrclip-v1"
    labels = np.array([[0, 1], [1, 0], [1, 1]], np.int8)
    found = zero_shot.run(np.eye(3, 6), labels, findings, task="finding", resamples=0)
    entry = found["zero_shot/finding/protocol"]
    assert entry["protocol"] == "zero_shot@clean-v1"
    assert "temperature" not in entry["settings"]


def test_prevalence_control_equals_the_majority_predictor():
    truth = np.array([0, 0, 0, 1, 2])
    scores = np.tile([1.0, 0.0, 0.0], (5, 1))
    labels = np.eye(3, dtype=np.int8)[truth]
    numbers = classify.single_label_scores(labels, scores, "abc", resamples=0).numbers
    for name in ("accuracy", "balanced_accuracy", "macro_f1"):
        control = numbers[f"prevalence_control_{name}"]["value"]
        assert control == pytest.approx(numbers[name]["value"]), name


def test_absent_class_is_listed_and_still_a_possible_answer(views):
    labels = np.eye(3, dtype=np.int8)[[0, 0, 1, 1]]
    found = zero_shot.run(views.positive[[0, 2, 1, 1]], labels, views, task="view")
    assert found["zero_shot/view/protocol"]["skipped"] == ["AP"]
    assert found["zero_shot/view/balanced_accuracy"]["value"] == 0.75
    assert "zero_shot/view/recall/AP" not in found


def test_two_classes_in_a_single_label_row_are_refused(views):
    with pytest.raises(UserError, match="Row 1 of a single-label task has 2 classes"):
        zero_shot.run(np.ones((2, 6)), np.array([[1, 0, 0], [1, 1, 0]]), views, task="view")


def test_prompts_decide_the_hash(views):
    labels = np.eye(3, dtype=np.int8)[[0, 1, 2]]
    found = zero_shot.run(views.positive, labels, views, task="view", resamples=0)
    other = views._replace(prompts=views.prompts._replace(version="toy-v2"))
    changed = zero_shot.run(views.positive, labels, other, task="view", resamples=0)
    name = "zero_shot/view/accuracy"
    assert found[name]["value"] == changed[name]["value"]
    assert found[name]["hash"] != changed[name]["hash"]


def test_order_of_rows_does_not_matter(findings):
    rng = np.random.default_rng(1)
    image, labels = unit(rng.normal(size=(40, 6))), rng.integers(0, 2, (40, 2)).astype(np.int8)
    groups, order = rng.integers(0, 15, 40), rng.permutation(40)
    straight = zero_shot.run(image, labels, findings, task="t", groups=groups, resamples=100)
    shuffled = zero_shot.run(
        image[order], labels[order], findings, task="t", groups=groups[order], resamples=100
    )
    a, b = straight["zero_shot/t/macro_auroc"], shuffled["zero_shot/t/macro_auroc"]
    assert [a[k] for k in ("value", "low", "high")] == pytest.approx(
        [b[k] for k in ("value", "low", "high")], rel=1e-12
    )


def test_binary_task_reports_the_positive_class():
    y = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 1, 0])
    a = np.array([0.10, 0.40, 0.35, 0.20, 0.15, 0.80, 0.70, 0.35, 0.90, 0.60, 0.55, 0.05])
    found = classify.run(
        np.stack([1 - a, a], 1),
        np.eye(2, dtype=np.int8)[y],
        ("NEV", "MEL"),
        task="diagnosis",
        multi_label=False,
        positive="MEL",
        resamples=50,
    )
    expected = {"sensitivity": 0.8, "specificity": 0.857143, "g_mean": 0.828079, "mcc": 0.657143}
    expected |= {"auprc/MEL": 0.885, "auroc/MEL": 0.9, "hard_auprc": 0.723333}
    for name, value in expected.items():
        assert found[f"classify/diagnosis/{name}"]["value"] == pytest.approx(value, abs=1e-6)


def test_result_is_json(views, findings):
    rng = np.random.default_rng(0)
    labels = np.eye(3, dtype=np.int8)[rng.integers(0, 3, 20)]
    found = zero_shot.run(unit(rng.normal(size=(20, 6))), labels, views, task="view", resamples=20)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
