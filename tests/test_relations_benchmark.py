"""How right relations are: what reports say of an image, against loops."""

import numpy as np
import pytest

from benchmarks import relations as bench


@pytest.mark.parametrize("most", [0, 3])
def test_reports_are_asked_by_the_softmax_of_their_cosine(most):
    rng = np.random.default_rng(0)
    cosine, told = rng.uniform(-1, 1, (4, 6)), rng.random((6, 2)) < 0.5
    found = bench.asked(cosine, told, temperature=0.1, most=most)
    for i in range(4):
        chosen = np.argsort(-cosine[i])[: most or 6]
        weight = [np.exp(cosine[i, r] / 0.1) for r in chosen]
        expected = sum(w * told[r] for w, r in zip(weight, chosen, strict=True)) / sum(weight)
        np.testing.assert_allclose(found[i], expected)


def test_a_row_is_the_mean_auroc_over_findings():
    truth = np.array([[True, False], [False, True], [False, False]])
    given = np.array([[0.9, 0.1], [0.5, 0.2], [0.1, 0.3]])
    assert bench.right(given, truth) == pytest.approx((1.0 + 0.5) / 2)
    assert bench.table({"a": {"row": 0.5}, "b": {"row": 0.25}}).endswith("| row | 0.500 | 0.250 |")
