"""Masked-token loss: a mean over tokens, not texts; intervals over what texts are about."""

import math

import numpy as np
import pytest

from medvlp_jax.evaluation import masked_tokens


def test_the_mean_is_over_tokens_and_resampling_keeps_texts_about_one_thing_together():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(12), 3)
    count = rng.integers(0, 9, 36)
    loss = count * (2.0 + rng.normal(size=12)[groups])
    settings = {"vocab_size": 50, "rate": 0.3}
    found = masked_tokens.run(loss, count, groups=groups, resamples=400, **settings)
    entry = found["masked_tokens/knowledge/loss"]
    assert entry["value"] == pytest.approx(sum(loss) / sum(count))
    assert entry["n"] == count.sum()
    assert entry["chance"] == pytest.approx(math.log(50))
    assert entry["low"] < entry["value"] < entry["high"]
    alone = masked_tokens.run(loss, count, resamples=400, **settings)[
        "masked_tokens/knowledge/loss"
    ]
    assert entry["high"] - entry["low"] > alone["high"] - alone["low"]
    quick = masked_tokens.run(loss, count, resamples=0, **settings)["masked_tokens/knowledge/loss"]
    assert (quick["value"], quick["low"]) == (entry["value"], None)


def test_texts_without_a_masked_token_do_not_count():
    found = masked_tokens.run([6.0, 0.0], [3, 0], vocab_size=9, rate=0.3, resamples=0)
    assert found["masked_tokens/knowledge/loss"]["value"] == pytest.approx(2.0)
