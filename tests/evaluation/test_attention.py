"""The table's attention traced back to pixels: the network's own attention, all of it, in place."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from medvlp_jax.evaluation import attention
from medvlp_jax.layers import Attention
from medvlp_jax.recipes import cfcml

B, C, WIDTHS = 2, 8, (6, 8)
SIDES = (4, 2)


@pytest.fixture(scope="module")
def network():
    """Two images, two stages; the table has one token and the attention one head."""
    fusion = cfcml.Fusion(
        num_classes=3,
        multi_granularity=True,
        enhance="multi_head",
        num_heads=1,
        dim=C,
        image_tokens=3,
        table_tokens=1,
        hidden=(4,),
        dropout=0.0,
    )
    rng = np.random.default_rng(0)
    levels = {
        name: [
            rng.normal(size=(B, side, side, width)).astype(np.float32)
            for side, width in zip(SIDES, WIDTHS, strict=True)
        ]
        for name in ("image", "dermoscopy")
    }
    table = rng.normal(size=(B, 2, 5)).astype(np.float32)
    flat = {name: [attention._flat(x) for x in stages] for name, stages in levels.items()}
    modalities = {**flat, "tabular": [table]}
    init = jax.jit(lambda key: fusion.init(key, modalities, train=False))
    params = jax.device_get(init(jax.random.key(0))["params"])
    return fusion, params, levels, table, modalities


def test_all_attention_lands_somewhere(network):
    _, params, levels, table, _ = network
    maps = attention.table_maps(params, levels, table, num_heads=1)
    for s, side in enumerate(SIDES):
        assert maps["image"][s].shape == (B, side, side)
        total = sum(maps[name][s].sum((1, 2)) for name in levels)
        np.testing.assert_allclose(total, 1, rtol=1e-5)
        assert min(maps[name][s].min() for name in levels) >= 0


@pytest.fixture(scope="module")
def attended(network):
    """Return the queries and the context of the table's attention in the network, by stage."""
    fusion, params, _, _, modalities = network
    calls = {}

    def watch(call, args, kwargs, where):
        if isinstance(where.module, Attention) and where.method_name == "__call__":
            calls[where.module.name] = jax.device_get((args[0], kwargs["context"]))
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        fusion.apply({"params": params}, modalities, train=False)
    return [calls[f"attend_{s}_tabular"] for s in range(len(SIDES))]


def test_the_attention_is_the_networks_own(network, attended):
    """Weights times values through the output layer give what the network's module gives."""
    _, params, _, table, _ = network
    rows = np.maximum(attention._linear(params["attributes"], table), 0)
    for s, (own, context) in enumerate(attended):
        ours = attention._compress(params, 0, "tabular", rows)
        np.testing.assert_allclose(ours, own, rtol=1e-5, atol=1e-6)
        p = params[f"attend_{s}_tabular"]
        paid = attention._probabilities(p, own, context, 1)
        mixed = np.einsum("bu,buc->bc", paid, attention._linear(p["value"], context))
        ours = attention._linear(p["out"], mixed)
        theirs = Attention(1).apply({"params": p}, own, context=context)[:, 0]
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_each_image_is_credited_with_the_attention_its_own_tokens_get(network, attended):
    _, params, levels, table, modalities = network
    maps = attention.table_maps(params, levels, table, num_heads=1)
    for s, (own, context) in enumerate(attended):
        paid = attention._probabilities(params[f"attend_{s}_tabular"], own, context, 1)
        for name in levels:
            tokens = attention._compress(params, s, name, modalities[name][s])
            start = next(
                u for u in range(0, 6, 3) if np.allclose(context[:, u : u + 3], tokens, atol=1e-5)
            )
            expected = paid[:, start : start + 3].sum(1)
            np.testing.assert_allclose(maps[name][s].sum((1, 2)), expected, rtol=1e-5)
            assert np.abs(expected - 0.5).max() > 1e-3  # else the other image would do


def test_tokens_are_those_of_the_network(network):
    _, params, _, _, modalities = network
    p = params["compress_1_image"]
    theirs = cfcml.TokenConv(3).apply({"params": p}, modalities["image"][1])
    ours = attention._compress(params, 1, "image", modalities["image"][1])
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_map_is_the_loop_over_tokens_and_pixels(network):
    _, params, levels, _, _ = network
    x = np.float64(attention._flat(levels["image"][0]))
    kernel = np.float64(params["compress_0_image"]["kernel"])
    paid = np.abs(np.random.default_rng(1).normal(size=(B, 3)))
    found = attention._land(paid, kernel, x)
    for b in range(B):
        expected = np.zeros(16)
        for o in range(3):
            norms = []
            for t in range(16):
                padded = np.pad(x[b, t], 1)
                c = [kernel[:, t, o] @ padded[i : i + 3] for i in range(WIDTHS[0])]
                norms.append(np.linalg.norm(c))
            expected += paid[b, o] * np.array(norms) / np.sum(norms)
        np.testing.assert_allclose(found[b], expected, rtol=1e-5)


def test_pixels_that_hold_nothing_get_nothing(network):
    _, params, levels, table, _ = network
    blind = {name: [x.copy() for x in stages] for name, stages in levels.items()}
    blind["image"][0][:, :2] = 0
    maps = attention.table_maps(params, blind, table, num_heads=1)
    assert (maps["image"][0][:, :2] == 0).all()
    assert (maps["image"][0][:, 2:] > 0).all()
