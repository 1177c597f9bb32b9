"""Regressions on the raw input: what they see, and that each finds what its input holds."""

import numpy as np
import pytest

from medvlp_jax.data.tabular import UNKNOWN
from medvlp_jax.evaluation import baselines


def test_pixels_are_histograms_and_block_means_of_each_channel():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (2, 16, 24, 3), dtype=np.uint8)
    found = baselines.raw_features({"image": image}, ("image",))["pixels"]
    counts, blocks = np.split(found, [3 * 16], axis=1)
    for b in range(2):
        for c in range(3):
            expected = np.histogram(image[b, ..., c], bins=16, range=(0, 256))[0] / (16 * 24)
            np.testing.assert_allclose(counts[b, 16 * c : 16 * c + 16], expected)
    thumbnail = blocks.reshape(2, 3, 8, 8)
    np.testing.assert_allclose(thumbnail[1, 2, 3, 5], image[1, 6:8, 15:18, 2].mean(), rtol=1e-5)


def test_a_volume_is_one_channel_and_its_blocks_have_depth():
    volume = np.random.default_rng(0).normal(size=(1, 16, 16, 9)).astype(np.float32)
    found = baselines.raw_features({"t1": volume}, ("t1",))["pixels"][0]
    assert found.shape == (16 + 4 * 8 * 8,)
    assert found[:16].sum() == pytest.approx(1)
    # nine slices in four layers: 2, 2, 2 and 3
    last = found[16:].reshape(4, 8, 8)[3, 0, 0]
    np.testing.assert_allclose(last, volume[0, :2, :2, 6:].mean(), rtol=1e-5)


def make(n, rng):
    """Class 1 of three is in the table, class 2 in the brightness; nothing else tells them."""
    truth = np.arange(n) % 3
    image = rng.integers(0, 100, (n, 16, 16, 3)) + 100 * (truth == 2)[:, None, None, None]
    batch = {
        "image": image.astype(np.uint8),
        "tabular": rng.normal(size=(n, 2, 3)) + 4 * (truth == 1)[:, None, None],
    }
    found = baselines.raw_features(batch, ("image",))
    return found | {
        "label/d": np.eye(3, dtype=np.int8)[truth],
        "patient_id": np.arange(n),
    }


def test_each_regression_finds_what_its_input_holds():
    rng = np.random.default_rng(0)
    train, test = make(120, rng), make(90, rng)
    scores = baselines.scores(train, test, task="d")
    found = baselines.results(scores, test, task="d", classes=("a", "b", "c"), resamples=50)
    recall = lambda kind, name: found[f"regression/d ({kind})/recall/{name}"]["value"]
    assert recall("table", "b") > 0.9
    assert recall("pixels", "c") > 0.9
    assert min(recall("table and pixels", name) for name in "abc") > 0.9
    assert found["regression/d (table)/macro_auroc"]["value"] < 0.9
    assert found["regression/d (pixels)/macro_auroc"]["value"] < 0.9
    key = "regression/d (table)/protocol"
    assert found[key]["train_rows"] == 120
    options = {"task": "d", "classes": ("a", "b", "c"), "resamples": 50}
    limited = baselines.results(scores, test, probe_limit=120, **options)
    assert limited[key]["settings"]["probe_limit"] == 120
    assert limited[key]["hash"] != found[key]["hash"]


def test_what_is_missing_is_told_apart_from_what_is_written():
    schema = {
        "age": {"kind": "numeric", "range": [0, 120]},
        "smokes": {"kind": "categorical", "categories": ["no", "yes"]},
    }
    rng, rows = np.random.default_rng(0), []
    for i in range(90):
        truth = i % 3
        age = np.nan if truth == 1 else rng.uniform(20, 90)  # class 1: nobody asked for the age
        smokes = UNKNOWN if truth == 2 else rng.integers(2)  # class 2: asked, nobody knew
        table = {"age": age, "smokes": float(smokes)}
        label = np.eye(3, dtype=np.int8)[truth]
        rows.append({"table": table, "labels": {"d": label}, "patient_id": str(i)})
    source = Rows(rows)
    source.metadata = {"table": schema}
    found = baselines.missing(source, ("age", "smokes"), task="d", limit=60)
    assert found["missing mask"].shape == (60, 2)
    np.testing.assert_array_equal(found["missing mask"][:3], [[0, 0], [1, 0], [0, 1]])
    scores = baselines.scores(found, found, task="d")
    assert list(scores) == ["missing mask"]
    numbers = baselines.results(scores, found, task="d", classes=("a", "b", "c"), resamples=20)
    assert numbers["regression/d (missing mask)/balanced_accuracy"]["value"] == 1
    age = baselines.missing(source, ("age",), task="d")
    numbers = baselines.results(
        baselines.scores(age, age, task="d"),
        age,
        task="d",
        classes=("a", "b", "c"),
        resamples=0,
    )
    assert numbers["regression/d (missing mask)/recall/b"]["value"] == 1  # the age alone
    assert numbers["regression/d (missing mask)/balanced_accuracy"]["value"] < 1


class Rows(list):
    """Records with metadata, as a Source has them."""


def test_without_a_table_there_is_one_regression():
    rng = np.random.default_rng(0)
    only = lambda n: {k: v for k, v in make(n, rng).items() if k != "table"}
    assert list(baselines.scores(only(60), only(30), task="d")) == ["pixels"]
