"""FLOPs of traced programs against formulas and against XLA's own count where nothing loops."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Primitive

from medvlp_jax import sharding
from medvlp_jax.losses import tiled
from medvlp_jax.training import flops


def count(function, *shapes):
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    traced = jax.jit(function).trace(*shapes)
    return sum(op.flops for op in flops.operations(traced.jaxpr))


def xla(function, *shapes):
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    return jax.jit(function).lower(*shapes).cost_analysis()["flops"]


def test_a_matrix_product_is_two_operations_for_each_of_its_multiplications():
    assert count(jnp.matmul, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
    assert count(lambda a, b: jnp.einsum("bij,bkj->bik", a, b), (4, 3, 5), (4, 7, 5)) == 840


@pytest.mark.parametrize(("kind", "products"), [("fwd", 2), ("bwd", 4)])
def test_attention_by_cudnn_counts_as_its_matrix_products(kind, products):
    attend = Primitive(f"dot_product_attention_{kind}_wrapper")
    attend.def_abstract_eval(lambda query, key, value: query)
    found = count(attend.bind, (2, 5, 4, 8), (2, 7, 1, 8), (2, 7, 1, 8))
    assert found == products * 2 * (2 * 4 * 5 * 7 * 8)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_convolutions_and_both_their_gradients_count_as_xla_counts_them(stride, groups, padding):
    convolve = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(stride, stride),
        padding=padding,
        feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    shapes = (2, 9, 8, 4), (3, 3, 4 // groups, 6)
    out = jax.eval_shape(convolve, *(jnp.zeros(s) for s in shapes)).shape

    def pulled(which, x, kernel, g):
        return jax.vjp(convolve, x, kernel)[1](g)[which]

    assert count(convolve, *shapes) == xla(convolve, *shapes)
    for which in (0, 1):
        gradient = functools.partial(pulled, which)
        assert count(gradient, *shapes, out) == xla(gradient, *shapes, out)


def test_elementwise_arithmetic_and_sums_are_one_an_element_as_in_xla():
    function = lambda x: (x * 2.0 + x).sum(axis=1)
    assert count(function, (6, 8)) == 3 * 48
    assert abs(xla(function, (6, 8)) - 3 * 48) <= 6  # sums n numbers in n - 1 additions


def test_loops_count_as_often_as_they_run():
    def function(x, w):
        step = lambda x, _: (x @ w, None)
        x, _ = jax.lax.scan(step, x, None, length=5)
        return jax.lax.fori_loop(0, 3, lambda _, x: x @ w, x)

    assert count(function, (2, 4), (4, 4)) == 8 * 2 * 2 * 4 * 4


def test_only_the_dearest_branch_counts():
    function = lambda p, x: jax.lax.cond(p[0] > 0, lambda x: x @ x, lambda x: x, x)
    assert count(function, (1,), (4, 4)) == 2 * 4**3


def test_recomputed_operations_are_told_apart():
    def loss(w, x):
        layer = jax.checkpoint(lambda x: jnp.sin(x @ w))
        return layer(layer(x)).sum()

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((4, 4), (8, 4))]
    traced = jax.jit(jax.grad(loss)).trace(*shapes)
    total, again = flops.by_part(traced.jaxpr, lambda name: "all")
    product = 2 * 8 * 4 * 4
    # Forward 1 (the last value is not asked for), again 2, backward 2 + 1.
    assert again["all"] // product == 2
    assert (total["all"] - again["all"]) // product == 4


@pytest.mark.parametrize(("kind", "products"), [("info_nce", 4), ("sigmoid", 3)])
def test_tiles_on_a_mesh_make_the_products_the_algorithm_has(kind, products):
    """Value and gradient at B x B x E: logits, two gradients, and the softmax's second visit."""
    batch, width = 64, 16
    loss = {
        "info_nce": lambda x, y: tiled.info_nce(x, y, 9.0, tile=4),
        "sigmoid": lambda x, y: tiled.sigmoid(x, y, 9.0, -9.0, tile=4),
    }[kind]

    x = jax.ShapeDtypeStruct((batch, width), jnp.float32)
    for mesh in (None, sharding.make_mesh(data=4, fsdp=2)):
        with sharding.tracing_on(mesh):
            traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).trace(x, x)
        found = sum(op.flops for op in flops.operations(traced.jaxpr))
        matrix = 2 * batch * batch * width
        assert products * matrix <= found < (products + 2) * matrix


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("jvp(Clip.encode)/image/stack/block_0/mlp/up", "image encoder"),
        ("transpose(jvp(Imitate.encode))/Imitate._encode_views/image/stem_conv", "image encoder"),
        ("transpose(jvp())/rematted_computation/Clip.encode/text/norm", "text encoder"),
        ("jvp(Clip.encode)/image_projection", "heads"),
        ("jvp(Imitate.objective)/Imitate._contrast", "loss"),
        ("", "optimiser"),
    ],
)
def test_parts_of_a_step_go_by_the_names_of_modules(name, part):
    assert flops.step_part(name) == part
