"""cuDNN's attention in bfloat16 against XLA's in float32: run on an NVIDIA GPU, skipped elsewhere.

  bash tests/run.sh --gpu tests/test_attention_gpu.py

Values and gradients. The reference is computed on the CPU of the same process, which compiles in a
fraction of the time and whose float32 is float32.
"""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medvlp_jax.encoders import bert, modernbert, qwen3, vit
from medvlp_jax.encoders.base import Tokens
from medvlp_jax.layers import Attention, rope_1d

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs an NVIDIA GPU"),
]

RNG = np.random.default_rng(0)
TOLERANCE = 0.02  # a few roundings of bfloat16, 0.4 % each


def error(ours, reference, scale=0.0):
    """Return |a - b| / |b|, Euclidean, or over `scale` where that is larger."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert np.isfinite(ours).all()
    return np.linalg.norm(ours - reference) / max(np.linalg.norm(reference), scale)


def on_cpu():
    return jax.default_device(jax.local_devices(backend="cpu")[0])


def initial(module, *inputs):
    with on_cpu():
        return jax.device_get(jax.jit(module.init)(jax.random.key(0), *inputs))


def value_and_gradients(run, variables, weight):
    def loss(variables):
        out = run(variables).astype(jnp.float32)
        return (out * weight).sum(), out

    gradients, out = jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(variables))
    return out, gradients


def assert_agree(make, variables, weight):
    """Hold cuDNN in bfloat16 near XLA in float32."""
    with on_cpu():
        exact = value_and_gradients(make("xla", jnp.float32), variables, weight)
    found = value_and_gradients(make("cudnn", jnp.bfloat16), variables, weight)
    assert error(found[0], exact[0]) <= TOLERANCE
    # The gradient of a key's bias is rounding alone: others of its shape say how large that is.
    scale = collections.Counter()
    for leaf in jax.tree.leaves(exact[1]):
        scale[leaf.shape] = max(scale[leaf.shape], np.linalg.norm(leaf))
    for a, b in zip(*(jax.tree.leaves(x[1]) for x in (found, exact)), strict=True):
        assert error(a, b, scale[b.shape]) <= TOLERANCE


PADDED = np.arange(256) < np.array([[256], [100], [1]])


@pytest.mark.parametrize(
    ("fields", "mask"),
    [
        ({}, None),
        ({}, PADDED),
        ({"causal": True}, None),
        ({"causal": True}, PADDED),
        ({"causal": True, "window": 32}, None),
        ({"num_kv_heads": 2, "causal": True}, PADDED),
        ({"qk_norm": 1e-6, "biased": ()}, PADDED),
        ({}, PADDED[:, None, :] & PADDED[:, :, None] | np.eye(256, dtype=bool)),
    ],
)
@pytest.mark.parametrize("rotary", [False, True])
def test_cudnn_equals_xla_in_value_and_gradient(fields, mask, rotary):
    x = RNG.normal(size=(3, 256, 256)).astype(np.float32)
    rope = rope_1d(np.arange(256), 64, 1e4) if rotary else None
    variables = initial(Attention(4, **fields), x)
    real = np.ones((3, 256, 1)) if mask is None else PADDED[..., None]
    weight = RNG.normal(size=x.shape) * real

    def make(implementation, dtype):
        layer = Attention(4, implementation=implementation, dtype=dtype, **fields)
        return lambda variables: layer.apply(variables, x, mask, rope=rope)

    assert_agree(make, variables, weight)


@pytest.mark.parametrize("fields", [{}, {"causal": True}, {"causal": True, "window": 32}])
@pytest.mark.parametrize("length", [197, 640])
def test_lengths_that_are_no_multiple_of_anything(length, fields):
    x = RNG.normal(size=(2, length, 256)).astype(np.float32)
    variables = initial(Attention(4, **fields), x)

    def make(implementation, dtype):
        layer = Attention(4, implementation=implementation, dtype=dtype, **fields)
        return lambda variables: layer.apply(variables, x)

    assert_agree(make, variables, RNG.normal(size=x.shape))


TEXT = {"vocab_size": 90, "width": 256, "depth": 2, "num_heads": 4, "mlp_dim": 256}
TOKENS = Tokens(RNG.integers(1, 90, PADDED.shape).astype(np.int32), PADDED)
ENCODERS = {
    "vit": (vit.make("tiny", depth=2), RNG.normal(size=(2, 224, 224, 3)).astype(np.float32)),
    "bert": (bert.make("tiny", **TEXT), TOKENS),
    "modernbert": (modernbert.make("tiny", **TEXT), TOKENS),
    "qwen3": (qwen3.make("tiny", **TEXT, num_kv_heads=2, head_width=64), TOKENS),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_with_cudnn_equals_one_with_xla(name):
    module, inputs = ENCODERS[name]
    variables = initial(module, inputs)
    shape = jax.eval_shape(module.apply, variables, inputs).pooled.shape

    def make(implementation, dtype):
        ours = module.clone(attention=implementation, dtype=dtype)
        return lambda variables: ours.apply(variables, inputs).pooled

    assert_agree(make, variables, RNG.normal(size=shape))


def test_a_text_that_is_all_padding_is_finite_with_its_gradients():
    tokens = Tokens(TOKENS.ids, PADDED & np.array([[True], [True], [False]]))
    module = ENCODERS["bert"][0].clone(attention="cudnn", dtype=jnp.bfloat16)
    variables = initial(module, tokens)
    run = lambda variables: module.apply(variables, tokens).pooled
    out, gradients = value_and_gradients(run, variables, np.ones((3, 256)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((out, gradients)))
