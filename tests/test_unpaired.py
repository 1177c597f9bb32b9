"""Which rows are pairs when few studies are, and what is refused."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medvlp_jax import unpaired
from medvlp_jax.data import pairing
from medvlp_jax.training import optim
from medvlp_jax.training import step as training

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


def test_the_average_of_the_weights_is_what_looks_at_the_corpus(monkeypatch):
    """A mean teacher, where the optimiser keeps an average; else the weights as they are."""
    none = {name: np.zeros((60, 4), np.float32) for name in ("column", "weight")}
    none["confidence"] = np.zeros(60, np.float32)
    recipe = SimpleNamespace(described=(), told=(), told_by=())
    recipe.refresh = lambda images, reports, pairs, mesh: none
    looking = []
    encode = lambda variables, *_: looking.append(float(variables["params"]["w"][0])) or {}
    monkeypatch.setattr(unpaired, "encoder", lambda *_: encode)
    run = SimpleNamespace(mesh=SimpleNamespace(size=1), recipe=recipe)
    for average, seen in ((0.0, 3.0), (0.9, 2.0)):
        tx, _ = optim.make({"w": jnp.ones(1)}, name="adamw", lr=1e-3, steps=10, average=average)
        state = training.make_state({"params": {"w": jnp.full(1, 2.0)}}, tx, ())
        state = state._replace(
            params={"w": jnp.full(1, 3.0)},
            collections={"relations": jax.tree.map(jnp.asarray, none)},
        )
        refresh = unpaired.refresher(run, None, POOLS, pairing.Related(), None)
        after = refresh(state)
        assert looking[-2:] == [seen, seen]
        assert float(after.params["w"][0]) == 3.0
