"""What benchmarks/injection.py measures, on numbers whose answer is known; nothing is trained."""

import numpy as np
import pytest

from benchmarks import injection
from medvlp_jax.data.datasets.cxr_phantom import patients
from medvlp_jax.evidence import risk


def test_likeness_equals_a_loop_over_pairs():
    rng = np.random.default_rng(0)
    features, kinds = rng.normal(size=(30, 5)) + 3.0, rng.integers(0, 3, 30)
    features[kinds == 1] += 1.0
    found = injection.likeness(features, kinds)
    centred = features - features.mean(0)
    cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    for name, x in (("raw_", features), ("", centred)):
        same, other = [], []
        for i in range(30):
            for j in range(30):
                if i != j:
                    (same if kinds[i] == kinds[j] else other).append(cosine(x[i], x[j]))
        assert found[f"{name}within"] == pytest.approx(np.mean(same))
        assert found[f"{name}between"] == pytest.approx(np.mean(other))
    hits = []
    for i in range(30):
        order = sorted(
            (j for j in range(30) if j != i), key=lambda j: -cosine(centred[i], centred[j])
        )
        hits += [kinds[j] == kinds[i] for j in order[: injection.NEIGHBOURS]]
    assert found["neighbours"] == pytest.approx(np.mean(hits))


def test_a_profile_is_the_disease_the_table_raises_most_and_shuffling_keeps_the_sizes():
    table = risk.read("cxr_phantom")
    rows = injection.tables(3, 60)
    kinds = injection.profiles(table, rows)
    drawn = [
        patients._before_disease(patients.stream(3, i, 0, "visit"), patients.patient(3, i), 0)
        for i in range(60)
    ]
    odds = np.array([list(patients.log_odds(row).values()) for row in drawn])
    names = list(patients.LOG_ODDS)
    expected = ((odds - odds.mean(0)) / odds.std(0)).argmax(1)
    assert [table.diseases[k] for k in kinds] == [names[k] for k in expected]
    wrong = injection.shuffled(table, 0)
    sizes = lambda t: sorted(v for f in t.factors.values() for v in f.log_odds.values())
    assert sizes(wrong) == sizes(table)
    assert wrong.factors["bnp"].log_odds != table.factors["bnp"].log_odds


def test_the_table_of_the_results_names_every_number():
    side = dict.fromkeys(("within", "between", "neighbours", "raw_within", "raw_between"), 0.5)
    run = {
        name: {"masked_loss": 2.0, "cls": side, "mean": side}
        for name in ("before", "after", "shuffled")
    }
    lines = injection.summary({"runs": [run, run]}).splitlines()
    assert len(lines) == 2 + 1 + 2 * 5
    assert lines[2] == "| masked-token loss, held-out paraphrases |" + " 2.000 [2.000, 2.000] |" * 3
