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
    shown = bench.table({"a": {"row": (0.5, 0.9, 1.2)}, "b": {"row": (0.25, 1, 1)}})
    assert shown.endswith("| row | 0.500 (0.90-1.20) | 0.250 (1.00-1.00) |")


def test_what_is_favoured_is_given_more_often_than_it_is_there():
    rng = np.random.default_rng(1)
    truth, given, trust = rng.random((7, 3)) < 0.5, rng.random((7, 3)), rng.random(7)
    truth[0] = True  # each is there
    there = [sum(truth[i, f] for i in range(7)) / 7 for f in range(3)]
    shares = [
        sum(trust[i] * given[i, f] for i in range(7)) / sum(trust) / there[f] for f in range(3)
    ]
    assert bench.favour(given, truth, trust) == pytest.approx((min(shares), max(shares)))
    nobody = bench.row(given, truth, np.zeros(7))
    assert nobody == pytest.approx(bench.row(given, truth, np.ones(7)))
