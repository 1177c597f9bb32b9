"""The residual-Mamba net against float64 loops and PyTorch, and its published size."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from medvlp_jax.config import UserError
from medvlp_jax.encoders import mamba3d

RNG = np.random.default_rng(0)


def error(ours, reference):
    """Return max |a - b| / max |b|."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape
    return np.abs(ours - reference).max() / np.abs(reference).max()


def assert_close(ours, reference, tolerance=1e-5):
    """Hold max |a - b| <= tolerance * max |b|."""
    assert error(ours, reference) <= tolerance


def scan_inputs(batch, length, inner, state=16):
    """Draw inputs with steps and decays as Mamba's initialisation gives them."""
    u = RNG.normal(size=(batch, length, inner))
    delta = np.exp(RNG.uniform(np.log(1e-3), np.log(1e-1), (batch, length, inner)))
    a = -np.broadcast_to(np.arange(1.0, state + 1), (inner, state))
    b, c = RNG.normal(size=(2, batch, length, state))
    return [np.asarray(x, np.float32) for x in (u, delta, a, b, c)]


def sequential(u, delta, a, b, c):
    """Run the recurrence token by token in float64."""
    u, delta, a, b, c = (np.asarray(x, np.float64) for x in (u, delta, a, b, c))
    state, y = np.zeros((u.shape[0], *a.shape)), np.zeros_like(u)
    for t in range(u.shape[1]):
        state *= np.exp(delta[:, t, :, None] * a)
        state += (delta[:, t] * u[:, t])[..., None] * b[:, t, None]
        y[:, t] = (state * c[:, t, None]).sum(-1)
    return y


def test_the_scan_equals_a_sequential_loop_over_6144_tokens():
    inputs = scan_inputs(1, 6144, 64)
    reference = sequential(*inputs)
    for chunk in (64, 6144):
        ours = jax.jit(lambda *x, k=chunk: mamba3d.selective_scan(*x, chunk=k))(*inputs)
        assert_close(ours, reference)


@pytest.mark.parametrize("chunk", [1, 7, 16, 50])
def test_chunks_change_neither_value_nor_gradient(chunk):
    inputs = scan_inputs(2, 50, 3, state=4)
    weight = RNG.normal(size=(2, 50, 3)).astype(np.float32)
    assert_close(mamba3d.selective_scan(*inputs, chunk=chunk), sequential(*inputs))

    def plain(u, delta, a, b, c):
        def step(state, x):
            u, delta, b, c = x
            drive = (delta * u)[..., None] * b[:, None]
            state = jnp.exp(delta[..., None] * a) * state + drive
            return state, (state * c[:, None]).sum(-1)

        along = [x.swapaxes(0, 1) for x in (u, delta, b, c)]
        return jax.lax.scan(step, jnp.zeros((2, 3, 4)), tuple(along))[1].swapaxes(0, 1)

    def gradients(f):
        return jax.jit(jax.grad(lambda x: (f(*x) * weight).sum()))(inputs)

    chunked = gradients(lambda *x: mamba3d.selective_scan(*x, chunk=chunk))
    for ours, expected in zip(chunked, gradients(plain), strict=True):
        assert_close(ours, expected, 1e-5)


def torch_net(volumes, params, stats, depths, train):
    """Compute the net with torch in float64 from parameters by path; returns its levels."""
    import torch
    import torch.nn.functional as F

    def conv(x, path, stride=1):
        kernel = params[f"{path}/kernel"].permute(4, 3, 0, 1, 2)
        return F.conv3d(x, kernel, params.get(f"{path}/bias"), stride, kernel.shape[-1] // 2)

    def norm(x, path):
        mean, var = (stats[f"{path}/{name}"] for name in ("mean", "var"))
        return F.batch_norm(x, mean, var, params[f"{path}/scale"], params[f"{path}/bias"], train)

    def mamba(x, path):
        p = lambda name: params[f"{path}/{name}"]
        u, gate = (x @ p("in/kernel")).chunk(2, -1)
        kernel = p("conv_kernel").T[:, None]
        inner, length = u.shape[-1], u.shape[1]
        u = F.conv1d(u.transpose(1, 2), kernel, p("conv_bias"), padding=3, groups=inner)
        u = F.silu(u[..., :length].transpose(1, 2))
        rank = -(-x.shape[-1] // 16)
        delta, b, c = (u @ p("select/kernel")).split([rank, 16, 16], -1)
        delta = F.softplus(delta @ p("delta/kernel") + p("delta_bias"))
        a = -torch.exp(p("a_log"))
        state, rows = torch.zeros(x.shape[0], inner, 16).double(), []
        for t in range(length):
            drive = (delta[:, t] * u[:, t])[..., None] * b[:, t, None]
            state = torch.exp(delta[:, t, :, None] * a) * state + drive
            rows.append((state * c[:, t, None]).sum(-1) + p("skip") * u[:, t])
        return (torch.stack(rows, 1) * F.silu(gate)) @ p("out/kernel")

    def branch(x, path):
        u = F.relu(norm(conv(x, f"{path}/conv_in"), f"{path}/norm_in"))
        tokens = u.flatten(2).transpose(1, 2)
        y = sum(
            mamba(tokens.flip(axes), f"{path}/mamba").flip(axes)
            for axes in ((), (2,), (1,), (1, 2))
        )
        y = (y / 4).transpose(1, 2).reshape(u.shape) + u
        return F.relu(norm(conv(y, f"{path}/conv_out"), f"{path}/norm_out"))

    x = torch.tensor(volumes).double().permute(0, 4, 1, 2, 3)
    x = F.relu(norm(conv(x, "stem_conv1", 2), "stem_norm1"))
    x = F.relu(norm(conv(x, "stem_conv2"), "stem_norm2"))
    levels = [x]
    for stage, depth in enumerate(depths):
        for i in range(depth):
            path, stride = f"stage_{stage}_block_{i}", 2 if i == 0 else 1
            y = F.relu(norm(conv(x, f"{path}/conv1", stride), f"{path}/norm1"))
            y = norm(conv(y, f"{path}/conv2"), f"{path}/norm2")
            if i == 0:
                x = norm(conv(x, f"{path}/shortcut_conv", 2), f"{path}/shortcut_norm")
            else:
                y = y + branch(x, f"stage_{stage}_branch")
            x = F.relu(x + y)
        levels.append(x)
    return [level.permute(0, 2, 3, 4, 1) for level in levels]


@pytest.mark.hf
@pytest.mark.parametrize("train", [False, True])
def test_levels_gradients_a_step_and_running_averages_equal_torch(train):
    import torch

    module = mamba3d.make("tiny", depths=(3, 2), chunk=8)
    volumes = RNG.normal(size=(3, 16, 20, 9, 1)).astype(np.float32)
    # The net's own start: steps and decays drawn at large let the running averages of `train=False`
    # pass gradients of 1e10, whose rounding is the processor's.
    variables = jax.jit(module.init)(jax.random.key(0), volumes)
    jitter = lambda leaf: leaf + RNG.uniform(-0.1, 0.1, leaf.shape).astype(np.float32)
    variables = jax.tree.map(jitter, variables)
    tensors, stats = (
        {path: torch.tensor(leaf).double() for path, leaf in flatten_dict(tree, sep="/").items()}
        for tree in (variables["params"], variables["batch_stats"])
    )
    for tensor in tensors.values():
        tensor.requires_grad_()
    expected = torch_net(volumes, tensors, stats, module.depths, train)
    weights = [RNG.normal(size=level.shape).astype(np.float32) for level in expected]
    sum((w * torch.tensor(v)).sum() for w, v in zip(expected, weights, strict=True)).backward()

    @jax.jit
    def run(params):
        def loss(params):
            out, updates = module.apply(
                {**variables, "params": params}, volumes, train=train, mutable=["batch_stats"]
            )
            total = sum((w * v).sum() for w, v in zip(out.levels, weights, strict=True))
            return total, (out, updates["batch_stats"])

        return jax.grad(loss, has_aux=True)(params)

    with jax.default_matmul_precision("highest"):
        gradient, (out, updates) = run(variables["params"])
    for level, reference in zip(out.levels, expected, strict=True):
        assert_close(level, reference.detach())
    tokens = expected[-1].detach().flatten(1, 3)
    assert_close(out.tokens, tokens)
    assert_close(out.pooled, tokens.mean(1))
    for path, leaf in flatten_dict(updates, sep="/").items():
        assert_close(leaf, stats[path])
    largest = max(tensor.grad.abs().max() for tensor in tensors.values())
    for path, leaf in flatten_dict(gradient, sep="/").items():
        if train and "stem_conv" in path and path.endswith("bias"):  # the norm takes it off again
            assert np.abs(leaf).max() <= 1e-6 * largest
        else:
            assert_close(leaf, tensors[path].grad, 2e-5)
    # An epsilon that gradients near zero lie well below.
    settings = {"eps": float(largest) / 10, "weight_decay": 0.1}
    torch.optim.AdamW(tensors.values(), lr=1e-3, **settings).step()
    optimiser = optax.adamw(1e-3, **settings)
    updates, _ = optimiser.update(gradient, optimiser.init(gradient), variables["params"])
    stepped = optax.apply_updates(variables["params"], updates)
    for path, leaf in flatten_dict(stepped, sep="/").items():
        assert_close(leaf, tensors[path].detach())


@pytest.mark.hf
@pytest.mark.slow
def test_the_published_size_equals_torch(variables_of):
    import torch

    module = mamba3d.make("men")
    volumes = RNG.normal(size=(1, 128, 128, 24, 1)).astype(np.float32)
    variables = variables_of(module, volumes)
    jitter = lambda leaf: leaf + RNG.uniform(-0.02, 0.02, leaf.shape).astype(np.float32)
    variables = jax.tree.map(jitter, variables)
    params, stats = (
        {path: torch.tensor(leaf).double() for path, leaf in flatten_dict(tree, sep="/").items()}
        for tree in (variables["params"], variables["batch_stats"])
    )
    with torch.no_grad():
        expected = torch_net(volumes, params, stats, module.depths, train=False)
    with jax.default_matmul_precision("highest"):
        out = jax.jit(module.apply)(variables, volumes)
    for level, reference in zip(out.levels, expected, strict=True):
        assert_close(level, reference)
    assert_close(out.pooled, expected[-1].flatten(1, 3).mean(1))


def test_reversed_tokens_give_the_reversed_output(variables_of):
    x = RNG.normal(size=(2, 12, 8)).astype(np.float32)
    module = mamba3d.Mamba(chunk=4)
    variables = variables_of(module, x)
    f = lambda x: mamba3d.four_ways(lambda y: module.apply(variables, y), x)
    assert_close(f(x[:, ::-1]), f(x)[:, ::-1])
    assert_close(f(x[..., ::-1]), f(x)[..., ::-1])
    alone = module.apply(variables, x)
    assert error(module.apply(variables, x[:, ::-1]), alone[:, ::-1]) > 0.01


def test_mamba_is_causal(variables_of):
    x = RNG.normal(size=(1, 12, 8)).astype(np.float32)
    module = mamba3d.Mamba(chunk=4)
    variables = variables_of(module, x)
    changed = np.array(x)
    changed[:, 7:] += 1
    before, after = (module.apply(variables, y) for y in (x, changed))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert not np.allclose(before[:, 7:], after[:, 7:])


def test_initial_steps_are_between_their_bounds():
    params = mamba3d.Mamba().init(jax.random.key(0), jnp.zeros((1, 4, 64)))["params"]
    steps = np.asarray(jax.nn.softplus(params["delta_bias"]))
    assert 1e-3 * 0.999 <= steps.min() < 2e-3
    assert 5e-2 < steps.max() <= 1e-1 * 1.001
    np.testing.assert_allclose(np.exp(params["a_log"][5]), np.arange(1, 17), rtol=1e-6)
    assert np.abs(params["delta"]["kernel"]).max() <= 4**-0.5


def test_the_published_size_has_the_shapes_and_parameters_of_the_released_code():
    module = mamba3d.make("men")
    volumes = jnp.zeros((2, 128, 128, 24, 1))
    out, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), volumes)
    # Of three modalities and in millions: stems 0.02, layers 0.50, 1.96, 7.78.
    counts = dict.fromkeys(("stem", "stage_0", "stage_1", "stage_2"), 0)
    for path, leaf in flatten_dict(variables["params"], sep="/").items():
        counts[next(part for part in counts if path.startswith(part))] += 3 * leaf.size
    assert [round(count / 1e6, 2) for count in counts.values()] == [0.02, 0.50, 1.96, 7.78]
    assert [level.shape for level in out.levels] == [
        (2, 64, 64, 12, 16),
        (2, 32, 32, 6, 32),
        (2, 16, 16, 3, 64),
        (2, 8, 8, 2, 128),
    ]
    assert out.tokens.shape == (2, 128, 128)
    assert out.pooled.shape == (2, module.width)
    assert tuple(level.shape[-1] for level in out.levels) == module.level_widths


def test_compute_in_bfloat16_stays_near(variables_of):
    volumes = RNG.normal(size=(2, 16, 16, 8, 1)).astype(np.float32)
    module = mamba3d.make("tiny")
    variables = variables_of(module, volumes)
    exact = jax.jit(module.apply)(variables, volumes).pooled
    half = jax.jit(module.clone(dtype=jnp.bfloat16).apply)(variables, volumes).pooled
    assert half.dtype == jnp.bfloat16
    assert_close(half, exact, 0.02)  # measured 0.005; bfloat16 keeps 8 bits, 0.4 % a rounding


def test_bad_input_is_refused_before_compiling():
    with pytest.raises(ValueError, match=r"\[1, 128, 128, 3\]"):
        mamba3d.make("tiny").init(jax.random.key(0), jnp.zeros((1, 128, 128, 3)))
    with pytest.raises(UserError, match="No Mamba3D variant 'MEN'"):
        mamba3d.make("MEN")
