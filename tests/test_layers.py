"""Layers against independent float64 NumPy and against PyTorch."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medvlp_jax.layers import Attention, BatchNorm, LayerNorm, Linear, Mlp, Stack, torch_uniform

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
    [("unrolled", "dots"), ("unrolled", "full"), ("scan", "none"), ("scan", "full")],
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
def test_dropout_in_a_stack_draws_anew_in_every_block(layout):
    class Noise(nn.Module):
        @nn.compact
        def __call__(self, x, mask=None, *, train=False):
            return x + nn.Dropout(0.5, deterministic=not train)(jnp.ones_like(x))

    stack = Stack(Noise, {}, 2, layout)
    out = stack.apply({}, jnp.zeros((1, 8, 64)), train=True, rngs={"dropout": jax.random.key(0)})
    # Each block adds 0 or 2: drawn alike, no sum would be 2.
    assert np.mean(np.asarray(out) == 2) == pytest.approx(0.5, abs=0.1)
