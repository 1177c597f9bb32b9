"""Layers against independent float64 NumPy and against PyTorch."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medvlp_jax.encoders import modernbert
from medvlp_jax.encoders.base import Tokens
from medvlp_jax.layers import (
    Attention,
    BatchNorm,
    Cache,
    GatedMlp,
    LayerNorm,
    Linear,
    Lora,
    Mlp,
    RMSNorm,
    Stack,
    blocks,
    gelu,
    product,
    rope_1d,
    rotate,
    torch_uniform,
)
from medvlp_jax.layers.layout import row_major
from medvlp_jax.layers.norms import layer_norm

RNG = np.random.default_rng(0)


def assert_close(ours, reference, tolerance=1e-5):
    """Hold max |a - b| <= tolerance * max |b|."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape
    assert np.abs(ours - reference).max() <= tolerance * np.abs(reference).max()


class Block(nn.Module):
    """A pre-norm block, to stack."""

    num_heads: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, mask=None, *, train=False):
        x += Attention(self.num_heads, self.dropout)(LayerNorm()(x), mask, train=train)
        return x + Mlp(16)(LayerNorm()(x))


def test_linear_is_a_matrix_product_and_a_bias():
    x = RNG.normal(size=(2, 3, 4)).astype(np.float32)
    layer = Linear(5, bias_init=nn.initializers.normal(1.0))
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    kernel, bias = (np.asarray(variables["params"][k], np.float64) for k in ("kernel", "bias"))
    assert_close(layer.apply(variables, x), x.astype(np.float64) @ kernel + bias)
    assert set(Linear(5, use_bias=False).init(jax.random.key(0), x)["params"]) == {"kernel"}


def random_variables(layer, *inputs):
    """Draw every array of a layer at random."""
    shapes = jax.eval_shape(layer.init, jax.random.key(0), *inputs)
    return jax.tree.map(lambda s: RNG.normal(size=s.shape).astype(np.float32), shapes)


def exact(tree):
    """Return a tree in float64."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 4, 5)])
def test_the_gradients_of_a_product_are_sums_over_its_rows(shape, dtype):
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=s), dtype) for s in (shape, (5, 7)))
    cotangent = jnp.asarray(rng.normal(size=(*shape[:-1], 7)), dtype)
    y, back = jax.vjp(product, x, kernel)
    dx, dkernel = back(cotangent)
    assert (y.dtype, dx.dtype, dkernel.dtype) == (dtype,) * 3
    x64, kernel64, dy64 = (np.asarray(a, np.float64) for a in (x, kernel, cotangent))
    expected = np.zeros((5, 7))
    for row, dy in zip(x64.reshape(-1, 5), dy64.reshape(-1, 7), strict=True):
        expected += np.outer(row, dy)
    tolerance = 1e-5 if dtype == jnp.float32 else 0.03
    np.testing.assert_allclose(np.float64(y), x64 @ kernel64, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(np.float64(dkernel), expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(np.float64(dx), dy64 @ kernel64.T, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("width", [3, 7])
def test_weights_of_a_half_layer_have_whole_gradients(width):
    """Rounded to bfloat16 each, the sums over many devices would not be those of one."""
    x = jnp.asarray(RNG.normal(size=(2, 50, 5)), jnp.bfloat16)
    kernel, bias = (RNG.normal(size=s).astype(np.float32) for s in ((5, width), (width,)))
    y, back = jax.vjp(product, x, kernel, bias)
    dy = jnp.asarray(RNG.normal(size=y.shape), jnp.bfloat16)
    dx, dkernel, dbias = back(dy)
    assert (y.dtype, dx.dtype, dkernel.dtype, dbias.dtype) == (x.dtype, x.dtype, "f4", "f4")
    x64, dy64 = exact(x).reshape(-1, 5), exact(dy).reshape(-1, width)
    assert_close(dkernel, sum(np.outer(row, each) for row, each in zip(x64, dy64, strict=True)))
    assert_close(dbias, sum(dy64))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gelu_and_its_slope_equal_their_formula(dtype):
    x = jnp.asarray(np.linspace(-6, 6, 97), dtype)
    y, slope = jax.vmap(jax.value_and_grad(gelu))(x)
    assert (y.dtype, slope.dtype) == (dtype, dtype)
    for z, value, derivative in zip(exact(x), exact(y), exact(slope), strict=True):
        cdf, pdf = (1 + math.erf(z / 2**0.5)) / 2, math.exp(-z * z / 2) / (2 * math.pi) ** 0.5
        tolerance = 1e-6 if dtype == jnp.float32 else 2**-8 * (1 + abs(z))
        assert abs(value - z * cdf) <= tolerance
        assert abs(derivative - (cdf + z * pdf)) <= tolerance


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_layer_norms_gradients_equal_those_of_its_formula(dtype, biased):
    x = jnp.asarray(RNG.normal(size=(3, 4, 6)), dtype)
    scale, bias = RNG.normal(size=(2, 6)).astype(np.float32)
    bias = bias if biased else None
    run = lambda x, scale, bias: layer_norm(x, scale, bias, 1e-5, dtype)
    y, back = jax.vjp(run, x, scale, bias)
    dy = jnp.asarray(RNG.normal(size=y.shape), dtype)
    dx, dscale, dbias = back(dy)
    assert (y.dtype, dx.dtype, dscale.dtype) == (dtype, dtype, "f4")
    assert (dbias is None) == (bias is None)
    ys, dxs, unit_sum = np.zeros((3, 4, 6)), np.zeros((3, 4, 6)), np.zeros(6)
    for at in np.ndindex(3, 4):
        row, g = exact(x)[at], exact(dy)[at]
        inverse = 1 / np.sqrt(row.var() + 1e-5)
        unit = (row - row.mean()) * inverse
        ys[at] = unit * scale + (0 if bias is None else bias)
        unit_sum += g * unit
        for i in range(6):  # d unit_j / d x_i, term by term
            for j in range(6):
                own = (i == j) - 1 / 6 - unit[i] * unit[j] / 6
                dxs[at][i] += g[j] * scale[j] * inverse * own
    tolerance = 1e-5 if dtype == jnp.float32 else 2**-7
    for found, expected in ((y, ys), (dx, dxs), (dscale, unit_sum)):
        np.testing.assert_allclose(
            exact(found), expected, rtol=tolerance, atol=tolerance * np.abs(expected).max()
        )
    if biased:
        np.testing.assert_allclose(dbias, exact(dy).sum((0, 1)), rtol=1e-5, atol=1e-5)


def test_norm_and_gelu_are_mapped_and_differentiated_twice():
    x, scale, bias = (RNG.normal(size=s).astype(np.float32) for s in ((4, 3, 5), (5,), (5,)))

    def plain(x, scale, bias):
        centred = x - x.mean(-1, keepdims=True)
        unit = centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
        return jax.nn.gelu(unit * scale + bias, approximate=False)

    ours = lambda x, scale, bias: gelu(layer_norm(x, scale, bias, 1e-5, jnp.float32))
    value = lambda f: lambda *xs: jnp.sin(jax.vmap(f, (0, None, None))(*xs)).sum()
    twice = lambda f: jax.grad(lambda *xs: jnp.square(jax.grad(f)(*xs)).sum(), (0, 1, 2))
    for order in (lambda f: jax.grad(f, (0, 1, 2)), twice):
        assert_trees_close(order(value(ours))(x, scale, bias), order(value(plain))(x, scale, bias))


def test_tokens_lie_row_by_row_on_a_gpu_and_are_left_alone_elsewhere(monkeypatch):
    x = RNG.normal(size=(2, 3, 4)).astype(np.float32)
    program = lambda: jax.jit(lambda x: row_major(x) + 1).trace(x).jaxpr.pretty_print()
    assert "layout" not in program()
    jax.clear_caches()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "layout=Layout(major_to_minor=(0, 1, 2)" in program()


def test_a_product_is_mapped_and_differentiated_twice():
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((4, 3, 5), (5, 2)))
    value = lambda times: lambda x, w: jnp.sin(jax.vmap(times, (0, None))(x, w)).sum()
    plain = lambda x, w: x @ w
    for order in (jax.grad, lambda f: jax.grad(lambda x, w: jnp.square(jax.grad(f)(x, w)).sum())):
        ours, theirs = (order(value(times))(x, kernel) for times in (product, plain))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_linear_adds_the_scaled_low_rank_product():
    x = RNG.normal(size=(3, 4)).astype(np.float32)
    layer = Linear(5, lora=Lora(2, 3.0))
    variables = random_variables(layer, x)
    p = exact(variables["params"])
    assert p["lora_a"].shape == (4, 2)
    assert p["lora_b"].shape == (2, 5)
    expected = np.zeros((3, 5))
    for i in range(3):
        for j in range(5):
            low_rank = sum(x[i] @ p["lora_a"][:, r] * p["lora_b"][r, j] for r in range(2))
            expected[i, j] = x[i] @ p["kernel"][:, j] + p["bias"][j] + 3.0 / 2 * low_rank
    assert_close(layer.apply(variables, x), expected)


def test_low_rank_factors_start_as_pefts_and_change_nothing():
    x = RNG.normal(size=(3, 64)).astype(np.float32)
    layer = Linear(256, lora=Lora(128, 3.0, dropout=0.5))
    params = layer.init(jax.random.key(0), x)["params"]
    assert not params["lora_b"].any()
    assert 0.99 / 8 < np.abs(params["lora_a"]).max() <= 1 / 8
    base = {name: params[name] for name in ("kernel", "bias")}
    plain = Linear(256).apply({"params": base}, x)
    np.testing.assert_array_equal(layer.apply({"params": params}, x), plain)
    rngs = {"dropout": jax.random.key(1)}
    np.testing.assert_array_equal(layer.apply({"params": params}, x, train=True, rngs=rngs), plain)


def test_low_rank_dropout_keeps_the_expectation():
    x = np.ones((4096, 4), np.float32)
    layer = Linear(3, lora=Lora(2, 2.0, dropout=0.25))
    variables = random_variables(layer, x)
    ours = layer.apply(variables, x, train=True, rngs={"dropout": jax.random.key(0)})
    plain = layer.apply(variables, x)
    assert np.std(ours, axis=0).min() > 0.01
    # The mean of 4,096 draws: a standard error of a hundredth or two of the branch.
    assert_close(ours.mean(0), plain.mean(0), 0.1)


def test_low_rank_layers_are_chosen_by_path():
    x = jnp.ones((1, 2, 8))
    for pattern, chosen in [
        ("query|value", {"query", "value"}),
        ("^out$", {"out"}),
        (".", {"query", "key", "value", "out"}),
        ("nothing", set()),
    ]:
        layer = Attention(2, lora=Lora(1, 1.0, layers=pattern))
        params = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
        assert {name for name, leaves in params.items() if "lora_a" in leaves} == chosen


def test_rms_norm_divides_by_the_root_mean_square():
    x = RNG.normal(size=(2, 3, 8)).astype(np.float32)
    layer = RMSNorm(1e-3)
    variables = random_variables(layer, x)
    expected = np.zeros(x.shape)
    for index in np.ndindex(2, 3):
        row = exact(x[index])
        root = np.sqrt(np.mean(row**2) + 1e-3)
        expected[index] = row / root * exact(variables["params"]["scale"])
    assert_close(layer.apply(variables, x), expected)
    half = RMSNorm(1e-3, jnp.bfloat16).apply(variables, x)
    assert half.dtype == jnp.bfloat16


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_gated_mlp_multiplies_a_gate_and_a_value(activation, use_bias):
    x = RNG.normal(size=(5, 4)).astype(np.float32)
    act = {"silu": jax.nn.silu, "gelu": gelu}[activation]
    layer = GatedMlp(6, act, use_bias)
    variables = random_variables(layer, x)
    p = exact(variables["params"])
    assert set(p["gate"]) == ({"kernel", "bias"} if use_bias else {"kernel"})
    cdf = {
        "silu": lambda z: 1 / (1 + np.exp(-z)),
        "gelu": np.vectorize(lambda z: (1 + math.erf(z / math.sqrt(2))) / 2),
    }[activation]
    linear = lambda x, name: x @ p[name]["kernel"] + p[name].get("bias", 0)
    gate = linear(exact(x), "gate")
    expected = linear(gate * cdf(gate) * linear(exact(x), "up"), "down")
    assert_close(layer.apply(variables, x), expected)


def turned(x, positions, base):
    """Turn [..., T, A, S] as complex numbers: channel k by the angle position * base^(-2k/S)."""
    half = x.shape[-1] // 2
    pairs = exact(x[..., :half]) + 1j * exact(x[..., half:])
    for k in range(half):
        angle = np.asarray(positions) * float(base) ** (-2 * k / x.shape[-1])
        pairs[..., k] *= np.exp(1j * angle)[..., None]
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


@pytest.mark.parametrize("base", [10_000.0, 160_000.0])
def test_rotary_positions_turn_channel_pairs(base):
    x = RNG.normal(size=(2, 40, 3, 8)).astype(np.float32)
    shared, own = np.arange(40), np.stack([np.arange(40), np.arange(40) * 15 % 41])
    for positions in (shared, own):
        rope = rope_1d(positions, 8, base)
        assert rope.cos.shape == (*positions.shape, 8)
        assert_close(rotate(x, rope), turned(x, positions, base))
    half = rotate(x.astype(jnp.bfloat16), rope_1d(shared, 8, base))
    assert half.dtype == jnp.bfloat16


def test_rotary_products_depend_on_the_distance_alone():
    query, key = RNG.normal(size=(2, 1, 1, 1, 16)).astype(np.float32)

    def product(i, j):
        ropes = [rope_1d(np.array([p]), 16, 10_000.0) for p in (i, j)]
        return (rotate(query, ropes[0]) * rotate(key, ropes[1])).sum()

    assert_close(product(207, 203), product(4, 0))


def test_torch_uniform_fills_its_bounds():
    init = torch_uniform(64)
    layer = Linear(4096, kernel_init=init, bias_init=init)
    params = jax.jit(layer.init)(jax.random.key(0), jnp.zeros((1, 64)))["params"]
    for array in params.values():
        assert np.abs(array).max() <= 1 / 8
        assert np.abs(array).max() > 0.99 / 8
        assert np.std(array) == pytest.approx(1 / 8 / 3**0.5, rel=0.05)


def test_parameters_stay_float32_and_the_output_takes_the_compute_dtype():
    x = jnp.ones((2, 3, 8))
    for layer in (
        Linear(8, dtype=jnp.bfloat16),
        LayerNorm(dtype=jnp.bfloat16),
        BatchNorm(dtype=jnp.bfloat16),
        Mlp(8, jnp.bfloat16),
        Attention(2, dtype=jnp.bfloat16),
    ):
        variables = jax.jit(layer.init)(jax.random.key(0), x)
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
        assert layer.apply(variables, x).dtype == jnp.bfloat16


def test_layer_norm_survives_a_large_mean():
    x = (RNG.normal(size=(4, 64)) + 1e4).astype(np.float32)
    exact = x.astype(np.float64)
    reference = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(
        exact.var(-1, keepdims=True) + 1e-6
    )
    layer = LayerNorm()
    # Measured 3.4e-4: float32 holds a mean of 1e4 to 5e-4. One-pass variances lose whole units.
    assert_close(layer.apply(layer.init(jax.random.key(0), x), x), reference, 1e-3)


@pytest.mark.hf
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 7, 5)])
def test_batch_norm_and_its_running_averages_equal_torch_over_two_calls(shape, affine):
    import torch

    x, y = (RNG.normal(1.0, 2.0, size=shape).astype(np.float32) for _ in range(2))
    theirs = torch.nn.BatchNorm1d(5, affine=affine)
    layer = BatchNorm(affine=affine)
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    if affine:
        scale, bias = RNG.normal(size=(2, 5)).astype(np.float32)
        theirs.weight.data, theirs.bias.data = torch.tensor(scale), torch.tensor(bias)
        variables["params"] = {"scale": scale, "bias": bias}

    def reference(images):
        return theirs(torch.tensor(images.reshape(-1, 5))).detach().numpy().reshape(shape)

    class Twice(nn.Module):
        def setup(self):
            self.norm = BatchNorm(affine=affine)

        def __call__(self, x, y):
            return self.norm(x, train=True), self.norm(y, train=True)

    nested = jax.tree.map(lambda leaf: leaf, {k: {"norm": v} for k, v in variables.items()})
    (ours_x, ours_y), updates = Twice().apply(nested, x, y, mutable=["batch_stats"])
    assert_close(ours_x, reference(x))
    assert_close(ours_y, reference(y))
    stats = updates["batch_stats"]["norm"]
    assert_close(stats["mean"], theirs.running_mean.numpy())
    assert_close(stats["var"], theirs.running_var.numpy())
    theirs.eval()
    trained = {**variables, "batch_stats": stats}
    assert_close(layer.apply(trained, x), reference(x))


def test_batch_norm_variance_is_two_pass():
    x = (RNG.normal(size=(256, 3)) * 0.1 + 1000).astype(np.float32)
    layer = BatchNorm(momentum=1.0, affine=False)
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    _, updates = layer.apply(variables, x, train=True, mutable=["batch_stats"])
    assert_close(updates["batch_stats"]["var"], x.astype(np.float64).var(0, ddof=1))


def test_batch_norm_ignores_the_examples_that_are_not_valid():
    x = RNG.normal(size=(8, 3, 5)).astype(np.float32)
    valid = np.array([1, 1, 0, 1, 0, 1, 1, 0], bool)
    layer = BatchNorm()
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    ours, updates = layer.apply(variables, x, train=True, valid=valid, mutable=["batch_stats"])
    reference, expected = layer.apply(variables, x[valid], train=True, mutable=["batch_stats"])
    assert_close(ours[valid], reference)
    jax.tree.map(assert_close, updates, expected)


@pytest.mark.parametrize("count", [0, 1])
def test_batch_norm_of_too_few_valid_examples_is_that_of_evaluation(count):
    x = RNG.normal(size=(4, 5)).astype(np.float32)
    layer = BatchNorm()
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    variables["batch_stats"] = {"mean": RNG.normal(size=5), "var": np.full(5, 3.0)}
    y, updates = layer.apply(
        variables, x, train=True, valid=np.arange(4) < count, mutable=["batch_stats"]
    )
    assert_close(y, layer.apply(variables, x))
    jax.tree.map(assert_close, updates["batch_stats"], variables["batch_stats"])


def test_batch_norm_does_not_move_at_init():
    stats = BatchNorm().init(jax.random.key(0), RNG.normal(size=(4, 3)), train=True)["batch_stats"]
    assert not np.asarray(stats["mean"]).any()
    assert np.all(np.asarray(stats["var"]) == 1)


def test_batch_norm_refuses_a_batch_without_variance():
    layer = BatchNorm()
    variables = jax.jit(layer.init)(jax.random.key(0), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"\(1, 3\)"):
        layer.apply(variables, jnp.ones((1, 3)), train=True, mutable=["batch_stats"])


def test_batch_norm_on_a_sharded_batch_equals_one_device():
    x = RNG.normal(size=(16, 5)).astype(np.float32)
    layer = BatchNorm()
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("data"))

    @jax.jit
    def run(x):
        return layer.apply(variables, x, train=True, mutable=["batch_stats"])

    jax.tree.map(assert_close, run(jax.device_put(x, sharding)), run(x))


def naive_attention(params, x, mask, heads):
    """Compute attention with float64 loops over batch, head and query."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    q, k, v = (x @ p[n]["kernel"] + p[n]["bias"] for n in ("query", "key", "value"))
    size = x.shape[-1] // heads
    out = np.zeros_like(q)
    for b in range(x.shape[0]):
        for a in range(heads):
            part = slice(a * size, (a + 1) * size)
            for t in range(x.shape[1]):
                logits = k[b, mask[b], part] @ q[b, t, part] / np.sqrt(size)
                weights = np.exp(logits - logits.max())
                out[b, t, part] = weights @ v[b, mask[b], part] / weights.sum()
    return out @ p["out"]["kernel"] + p["out"]["bias"]


def test_attention_equals_a_loop_over_the_keys_it_may_see():
    x = RNG.normal(size=(2, 5, 8)).astype(np.float32)
    mask = np.array([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]], bool)
    layer = Attention(2, kernel_init=nn.initializers.normal(0.5))
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    reference = naive_attention(variables["params"], x.astype(np.float64), mask, 2)
    assert_close(layer.apply(variables, x, mask), reference)


def test_attention_with_a_vanishing_dropout_equals_attention_without():
    x = RNG.normal(size=(2, 5, 8)).astype(np.float32)
    mask = np.array([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]], bool)
    plain, dropped = Attention(2), Attention(2, dropout=1e-9)
    variables = jax.jit(plain.init)(jax.random.key(0), x)
    rngs = {"dropout": jax.random.key(1)}
    assert_close(
        dropped.apply(variables, x, mask, train=True, rngs=rngs),
        jax.jit(plain.apply)(variables, x, mask),
    )


def test_attention_dropout_drops_and_keeps_the_expectation():
    """The output is linear in the probabilities: its mean over draws is the output without."""
    x = RNG.normal(size=(1, 5, 8)).astype(np.float32)
    layer = Attention(2, dropout=0.5)
    variables = random_variables(layer, x)
    repeated = np.repeat(x, 4096, axis=0)
    rngs = {"dropout": jax.random.key(0)}
    draws = np.float64(layer.apply(variables, repeated, train=True, rngs=rngs))
    spread = draws.std(0)
    assert spread.min() > 0
    without = Attention(2).apply(variables, x)
    off = np.abs(draws.mean(0) - np.asarray(without[0]))
    assert (off <= 6 * spread / np.sqrt(4096)).all()
    np.testing.assert_array_equal(layer.apply(variables, x), without)


def attention_by_loops(layer, params, x, mask, positions):
    """Compute any Attention in float64, one batch row, head and query at a time."""
    p, x = exact(params), exact(x)
    width = layer.head_width or x.shape[-1] // layer.num_heads
    kv_heads = layer.num_kv_heads or layer.num_heads

    def heads(name, count):
        y = x @ p[name]["kernel"] + p[name].get("bias", 0)
        y = y.reshape(*x.shape[:2], count, width)
        if layer.qk_norm and name != "value":
            root = np.sqrt((y**2).mean(-1, keepdims=True) + layer.qk_norm)
            y = y / root * p[f"{name}_norm"]["scale"]
        return turned(y, positions, 100.0) if positions is not None and name != "value" else y

    query, key, value = (
        heads(name, count)
        for name, count in (("query", layer.num_heads), ("key", kv_heads), ("value", kv_heads))
    )
    out = np.zeros((*x.shape[:2], layer.num_heads, width))
    for b, t, a in np.ndindex(out.shape[:3]):
        shared = a * kv_heads // layer.num_heads
        seen = [
            u
            for u in range(x.shape[1])
            if (mask is None or (mask[b, u] if mask.ndim == 2 else mask[b, t, u]))
            and not (layer.causal and u > t)
            and not (layer.window and abs(u - t) > layer.window)
        ]
        logits = np.array([query[b, t, a] @ key[b, u, shared] for u in seen]) / np.sqrt(width)
        weights = np.exp(logits - logits.max())
        weights /= weights.sum()
        out[b, t, a] = sum(w * value[b, u, shared] for w, u in zip(weights, seen, strict=True))
    return out.reshape(*x.shape[:2], -1) @ p["out"]["kernel"] + p["out"].get("bias", 0)


PADDED = np.arange(9) < np.array([[9], [6]])
# Which pairs may meet: two packed texts, and everyone itself.
PAIRS = np.stack([np.kron(np.eye(3), np.ones((3, 3))), np.tri(9, k=1)]).astype(bool)


@pytest.mark.parametrize("dropout", [0.0, 1e-9])
@pytest.mark.parametrize(
    ("fields", "mask", "rotary"),
    [
        ({"num_kv_heads": 2}, None, False),
        ({"num_kv_heads": 1}, PADDED, True),
        ({"num_kv_heads": 2, "head_width": 6, "qk_norm": 1e-6, "causal": True}, None, True),
        ({"head_width": 2, "biased": ("query", "value", "out")}, PADDED, False),
        ({"qk_norm": 1e-2}, PADDED, True),
        ({"causal": True}, PADDED, False),
        ({"window": 3}, PADDED, True),
        ({"window": 3, "causal": True}, None, False),
        ({}, PAIRS, True),
        ({"num_kv_heads": 2, "window": 2, "biased": ()}, PAIRS, True),
    ],
)
def test_every_kind_of_attention_equals_loops(fields, mask, rotary, dropout):
    x = RNG.normal(size=(2, 9, 16)).astype(np.float32)
    layer = Attention(4, dropout, **fields)
    params = jax.tree.map(lambda leaf: leaf / 4, random_variables(layer, x)["params"])
    width = layer.head_width or 4
    rope = rope_1d(np.arange(9), width, 100.0) if rotary else None
    expected = attention_by_loops(layer, params, x, mask, np.arange(9) if rotary else None)

    @jax.jit
    def run(params):
        rngs = {"dropout": jax.random.key(0)} if dropout else {}
        train = dropout > 0
        return layer.apply({"params": params}, x, mask, train=train, rope=rope, rngs=rngs)

    assert_close(run(params), expected)


@pytest.fixture
def cudnn(monkeypatch):
    """Let XLA compute what cuDNN is asked for, if it is what JAX lets cuDNN compute in training.

    Bias: https://github.com/jax-ml/jax/issues/28974; the rest: jax/_src/cudnn and the GPU.
    """
    attend, asked = jax.nn.dot_product_attention, []

    def strict(query, key, value, *, implementation, mask=None, **settings):
        assert implementation == "cudnn"
        shape = (len(query), 1, query.shape[1], key.shape[1])
        assert shape[2] % 2 == shape[3] % 2 == 0
        assert mask is None or mask.shape == shape
        window = settings["local_window_size"]
        assert window is None or (settings["is_causal"] and window[1] == 0)
        asked.append(shape)
        return attend(query, key, value, mask=mask, implementation="xla", **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", strict)
    return asked


def value_and_gradients(layer, variables, x, *args, **settings):
    loss = lambda variables, x: jnp.square(layer.apply(variables, x, *args, **settings)).sum()
    return jax.value_and_grad(loss, (0, 1))(variables, x)


def assert_trees_close(found, expected):
    """Compare with the largest number: a key's bias has a gradient of zero but for rounding."""
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(expected))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest)
    jax.tree.map(close, found, expected)


@pytest.mark.parametrize("length", [5, 6])
@pytest.mark.parametrize(
    "fields", [{}, {"causal": True}, {"window": 2}, {"window": 2, "causal": True}]
)
@pytest.mark.parametrize("kind", ["all", "count", "keys", "one row", "pairs"])
def test_cudnn_is_asked_for_what_it_takes(cudnn, kind, fields, length):
    shapes = {"keys": (2, length), "one row": (1, 1, length), "pairs": (2, length, length)}
    mask = {"all": None, "count": 3}.get(kind)
    if kind in shapes:
        mask = np.broadcast_to(np.arange(length) < 3, shapes[kind])
    x = RNG.normal(size=(2, length, 8)).astype(np.float32)
    variables = random_variables(Attention(2), x)
    found, expected = (
        value_and_gradients(Attention(2, implementation=how, **fields), variables, x, mask)
        for how in ("cudnn", "xla")
    )
    assert_trees_close(found, expected)
    assert cudnn


@pytest.mark.parametrize("layout", ["unrolled", "scan"])
@pytest.mark.parametrize("rotary", ["", "one for all", "one each"])
def test_a_stack_fills_odd_tokens_up_once_for_cudnn(cudnn, rotary, layout):
    x = RNG.normal(size=(2, 5, 8)).astype(np.float32)
    positions = {"one for all": np.arange(5), "one each": np.arange(10).reshape(2, 5)}
    rope = rope_1d(positions[rotary], 4, 100.0) if rotary else None
    fields = {"num_heads": 2, "mlp_dim": 16}
    stacks = [
        Stack(blocks.Block, fields | {"attention": how}, 2, layout) for how in ("cudnn", "xla")
    ]
    variables = random_variables(stacks[1], x)
    found, expected = (value_and_gradients(s, variables, x, rope=rope) for s in stacks)
    assert_trees_close(found, expected)
    assert set(cudnn) == {(2, 1, 8, 8)}
    assert stacks[0].apply(variables, x, rope=rope).shape == x.shape


@pytest.mark.parametrize("length", [5, 12])
def test_blocks_with_positions_of_their_own_are_not_filled_up_for_cudnn(cudnn, length):
    module = modernbert.make("tiny", vocab_size=9, pad_id=0, depth=4)
    ids = RNG.integers(1, 9, (2, length)).astype(np.int32)
    tokens = Tokens(ids, np.arange(length) < np.array([[length], [3]]))
    variables = random_variables(module, tokens)
    ours = module.clone(attention="cudnn").apply(variables, tokens)
    expected = module.apply(variables, tokens)
    assert_trees_close(ours.pooled, expected.pooled)
    assert cudnn


@pytest.mark.parametrize("train", [False, True])
def test_a_row_that_may_see_nothing_is_finite(train):
    x = RNG.normal(size=(2, 9, 16)).astype(np.float32)
    layer = Attention(4, 0.1, dtype=jnp.bfloat16, window=2)
    variables = random_variables(layer, x)
    mask = PADDED & np.array([[True], [False]])

    @jax.jit
    @jax.value_and_grad
    def run(variables):
        rngs = {"dropout": jax.random.key(0)}
        y = layer.apply(variables, x, mask, train=train, rngs=rngs)
        return jnp.square(y.astype(jnp.float32)).sum()

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run(variables)))


@pytest.mark.parametrize(
    "fields", [{}, {"num_kv_heads": 2, "qk_norm": 1e-6}, {"num_kv_heads": 1, "window": 2}]
)
def test_token_by_token_with_a_cache_equals_all_at_once(fields):
    x = RNG.normal(size=(2, 9, 16)).astype(np.float32)
    layer = Attention(4, causal=True, **fields)
    variables = random_variables(layer, x)
    whole = layer.apply(variables, x, rope=rope_1d(np.arange(9), 4, 100.0))
    room = np.zeros((2, 12, layer.num_kv_heads or 4, 4), np.float32)
    cache = Cache(room, room, jnp.zeros((), jnp.int32))

    @jax.jit
    def step(cache, x):
        at = cache.length + jnp.arange(x.shape[1])
        mask = jnp.arange(12) <= at[:, None]
        if layer.window:
            mask &= jnp.arange(12) >= at[:, None] - layer.window
        mask = jnp.broadcast_to(mask, (2, *mask.shape))
        return layer.apply(variables, x, mask, rope=rope_1d(at, 4, 100.0), cache=cache)

    rows = []
    for start, stop in [(0, 3), *((t, t + 1) for t in range(3, 9))]:
        y, cache = step(cache, x[:, start:stop])
        rows.append(y)
    assert_close(np.concatenate(rows, axis=1), whole)
    assert cache.length == 9


def test_attention_says_what_it_cannot_do():
    x = jnp.ones((1, 2, 6))
    with pytest.raises(ValueError, match="4 heads do not divide a width of 6"):
        Attention(4).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"Attention dropout 0\.1 needs implementation 'xla'"):
        Attention(2, 0.1, "cudnn").init(
            {"params": jax.random.key(0), "dropout": jax.random.key(1)}, x, train=True
        )


@pytest.fixture(scope="module")
def stacked():
    """Make an unrolled stack's input, parameters, value and gradient."""
    x = RNG.normal(size=(2, 3, 8)).astype(np.float32)
    mask = np.array([[1, 1, 0], [1, 1, 1]], bool)
    stack = Stack(Block, {"num_heads": 2}, 2)
    shapes = jax.eval_shape(stack.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda s: RNG.normal(size=s.shape).astype(np.float32) / 2, shapes)
    return x, mask, params, value_and_gradient(stack, params, x, mask)


def value_and_gradient(stack, params, x, mask):
    return jax.jit(
        jax.value_and_grad(lambda p: jnp.square(stack.apply({"params": p}, x, mask)).sum())
    )(params)


@pytest.mark.parametrize(
    ("layout", "remat"),
    [("unrolled", r) for r in ("dots", "block", "full")]
    + [("scan", r) for r in ("none", "dots", "block", "full")],
)
def test_every_layout_and_remat_gives_the_same_value_and_gradients(stacked, layout, remat):
    x, mask, params, (value, gradient) = stacked
    if layout == "scan":
        params, gradient = (
            {"blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *tree.values())}
            for tree in (params, gradient)
        )
    stack = Stack(Block, {"num_heads": 2}, 2, layout, remat)
    own = jax.eval_shape(stack.init, jax.random.key(0), x)["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, own)
    ours = value_and_gradient(stack, params, x, mask)
    assert_close(ours[0], value)
    # One scale for all leaves: the gradient of the key bias is zero but for rounding.
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale), ours[1], gradient
    )


@pytest.mark.parametrize("layout", ["unrolled", "scan"])
def test_each_remat_policy_keeps_less_than_the_one_before(layout):
    """What the forward pass hands to the backward pass, read from the traced program."""
    x = np.ones((2, 16, 8), np.float32)
    kept = []
    for remat in ("none", "dots", "block", "full"):
        stack = Stack(Block, {"num_heads": 2}, 4, layout, remat)
        params = jax.eval_shape(stack.init, jax.random.key(0), x)["params"]
        apply = lambda params, x, s=stack: s.apply({"params": params}, x)
        residuals = jax.eval_shape(lambda p, x, f=apply: jax.vjp(f, p, x)[1], params, x)
        kept.append(sum(leaf.size for leaf in jax.tree.leaves(residuals)))
    assert kept == sorted(set(kept), reverse=True), kept


@pytest.mark.parametrize("layout", ["unrolled", "scan"])
def test_dropout_in_a_stack_draws_anew_in_every_block(layout):
    class Noise(nn.Module):
        @nn.compact
        def __call__(self, x, mask=None, *, train=False):
            return x + nn.Dropout(0.5, deterministic=not train)(jnp.ones_like(x))

    stack = Stack(Noise, {}, 2, layout)
    out = stack.apply({}, jnp.zeros((1, 8, 64)), train=True, rngs={"dropout": jax.random.key(0)})
    # Each block adds 0 or 2: drawn alike, no sum would be 2.
    assert np.mean(np.asarray(out) == 2) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_each_block_gets_its_own_and_all_get_what_is_shared(remat):
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x, mask=None, *, train=False, own, shift):
            x = own["factor"] * Linear(4, False)(x) + shift * own["shift"]
            return x, {"first": x[:, 0], "factor": own["factor"]}

    x = RNG.normal(size=(2, 3, 4)).astype(np.float32)
    shift = RNG.normal(size=4).astype(np.float32)
    each = {"factor": np.array([1.0, -2.0, 3.0], np.float32), "shift": np.arange(3)}
    kernels = RNG.normal(size=(3, 4, 4)).astype(np.float32)
    layouts = {
        "unrolled": {f"block_{i}": {"Linear_0": {"kernel": k}} for i, k in enumerate(kernels)},
        "scan": {"blocks": {"Linear_0": {"kernel": kernels}}},
    }
    expected, firsts = exact(x), []
    for factor, at, kernel in zip(each["factor"], each["shift"], exact(kernels), strict=True):
        expected = factor * (expected @ kernel) + shift * at
        firsts.append(expected[:, 0])
    for layout, params in layouts.items():
        stack = Stack(Own, {}, 3, layout, remat)
        run = jax.jit(lambda p, s=stack: s.apply({"params": p}, x, each=each, shift=shift))
        y, outputs = run(params)
        assert_close(y, expected)
        assert_close(outputs["first"], np.stack(firsts))
        np.testing.assert_array_equal(outputs["factor"], each["factor"])


def test_an_unrolled_block_can_branch_on_its_own():
    class Branch(nn.Module):
        @nn.compact
        def __call__(self, x, mask=None, *, train=False, own):
            return (x + 1 if own else 2 * x), None

    stack = Stack(Branch, {}, 3)
    each = np.array([True, False, True])
    y, outputs = jax.jit(lambda x: stack.apply({}, x, each=each))(jnp.full((1, 1, 1), 5.0))
    assert y == 13
    assert outputs is None


def test_the_attention_that_is_shown_is_what_mixes_the_values():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 8)).astype(np.float32)
    context = rng.normal(size=(2, 5, 8)).astype(np.float32)
    module = Attention(num_heads=1)
    variables = module.init(jax.random.key(0), x, context=context)
    y, paid = module.apply(variables, x, context=context, shows=True)
    assert paid.shape == (2, 3, 5)
    np.testing.assert_allclose(paid.sum(-1), 1, rtol=1e-6)
    p = variables["params"]
    values = context @ p["value"]["kernel"] + p["value"]["bias"]
    mixed = np.einsum("btu,bus->bts", paid, values) @ p["out"]["kernel"] + p["out"]["bias"]
    np.testing.assert_allclose(y, mixed, atol=1e-5)
    with pytest.raises(ValueError, match="'xla' shows"):
        module.clone(implementation="cudnn").apply(variables, x, context=context, shows=True)
