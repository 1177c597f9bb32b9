"""Which rows are pairs when few studies are, and what is refused."""

from types import SimpleNamespace

import numpy as np
import pytest

from medvlp_jax import unpaired
from medvlp_jax.config import UserError
from medvlp_jax.data import pairing

POOLS = pairing.Pools(np.arange(20), np.arange(60), np.arange(50))


def parts(**settings):
    how = {"ratio": 0.2, "variant": "disjoint", "related": 0.5, "share": 0.5, "passes": 0}
    return SimpleNamespace(
        config={
            "data": {"pairing": how | settings, "balance": ""},
            "train": {"steps": 10, "batch_size": 40},
            "seed": 0,
        },
        recipe=SimpleNamespace(inputs=("image", "paired")),
    )


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        ({}, (0.5, 0.5)),
        ({"share": 1.0}, (1.0,)),
        ({"share": 1.0, "passes": 5}, (0.25, 0.75)),  # 400 rows, of which 5 x 20 may be pairs
        ({"share": 0.2, "passes": 5}, (0.2, 0.8)),
        ({"share": 1.0, "passes": 20}, (1.0,)),
    ],
)
def test_pairs_fill_their_share_or_are_seen_as_often_as_they_may(settings, shares):
    rows, found = unpaired.streams(parts(**settings), None, POOLS, pairing.Related())
    assert found == pytest.approx(shares)
    assert [len(source) for source in rows][: len(shares)] == [20, 16 * 40][: len(shares)]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"share": 0.0}, "data.pairing.share must be above 0 and at most 1, got 0.0"),
        ({"passes": -1}, "data.pairing.passes must be 0, for any number, or more, got -1"),
    ],
)
def test_shares_and_passes_that_cannot_be_are_refused(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        unpaired.pools(parts(**settings), [[{"patient_id": "a"}]])
