"""The mesh, parameter rules, and global batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import gpu_program
from medvlp_jax import sharding
from medvlp_jax.encoders import vit


def test_one_free_axis_takes_the_devices_that_are_left():
    mesh = sharding.make_mesh(data=-1, fsdp=2, tensor=1)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert sharding.batch_devices(mesh) == 8


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ({"data": 3}, "does not cover the 8 devices"),
        ({"data": -1, "fsdp": 3}, "does not cover the 8 devices"),
        ({"data": -1, "fsdp": -1}, "mesh.data=-1 must be 1 or more, or -1 for one axis alone"),
        ({"data": -2, "fsdp": -4}, "mesh.data=-2 must be"),
    ],
)
def test_a_mesh_that_does_not_cover_the_devices_is_refused(axes, said):
    with pytest.raises(ValueError, match=said):
        sharding.make_mesh(**axes)


def test_rules_come_first_then_large_arrays_are_split_and_small_ones_replicated():
    mesh = sharding.make_mesh(data=2, fsdp=4)
    spec = lambda path, shape: sharding.parameter_spec(
        path, shape, [("head", (None, "tensor"))], mesh
    )
    assert spec("head/kernel", (8, 8)) == P(None, "tensor")
    assert spec("body/kernel", (1024, 2048)) == P(None, "fsdp")
    assert spec("body/kernel", (2048, 1023)) == P("fsdp", None)
    assert spec("body/kernel", (64, 64)) == P()
    assert spec("body/kernel", (1023, 1025)) == P()


def test_a_global_batch_keeps_its_rows_and_is_split_over_data_and_fsdp():
    mesh = sharding.make_mesh(data=2, fsdp=4)
    rows = np.arange(32).reshape(16, 2)
    batch = sharding.to_global({"x": rows}, mesh)
    np.testing.assert_array_equal(batch["x"], rows)
    assert {s.data.shape for s in batch["x"].addressable_shards} == {(2, 2)}


def test_optimiser_state_is_split_like_its_parameter():
    mesh = sharding.make_mesh(data=1, fsdp=8)
    leaf = jax.ShapeDtypeStruct((2048, 1024), np.float32)
    tree = {"params": {"w": leaf}, "optimizer": {"mu": {"w": leaf}}}
    specs = {s.spec for s in jax.tree.leaves(sharding.shardings(tree, mesh))}
    assert specs == {P("fsdp", None)}


@pytest.mark.parametrize(("size", "whole"), [(1, 6), (6, 6), (64, 66)])
def test_a_batch_is_rounded_up_to_what_the_devices_divide(size, whole):
    mesh = sharding.make_mesh(data=3, fsdp=2, devices=jax.devices()[:6])
    assert sharding.whole_batch(mesh, size) == whole


def test_activations_are_split_along_the_batch_where_it_can_be():
    mesh = sharding.make_mesh(data=2, fsdp=4)
    traced = lambda rows: str(jax.jit(sharding.batch_apart).trace(np.zeros((rows, 3))).jaxpr)
    assert "sharding_constraint" not in traced(16)
    with sharding.tracing_on(mesh):
        assert "spec=P(('data', 'fsdp'),)" in traced(16)
        assert "sharding_constraint" not in traced(12)  # as in an evaluation of a few prompts
        inside = jax.shard_map(
            sharding.batch_apart, mesh=mesh, in_specs=sharding.BATCH, out_specs=sharding.BATCH
        )
        assert "sharding_constraint" not in str(jax.jit(inside).trace(np.zeros((64, 3))).jaxpr)


@pytest.mark.parametrize("layout", ["unrolled", "scan"])
def test_where_weights_are_split_they_are_gathered_and_activations_stay(layout):
    """Without `batch_apart` the scanned blocks' activations go from device to device."""
    mesh = sharding.make_mesh(data=1, fsdp=4, devices=jax.devices()[:4])
    module = vit.make("B/16", depth=2, layout=layout)
    images = jax.ShapeDtypeStruct((16, 224, 224, 3), np.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), images)
    where = (sharding.shardings(variables, mesh), NamedSharding(mesh, sharding.BATCH))
    loss = lambda variables, x: jnp.square(module.apply(variables, x).pooled).sum()
    step = jax.jit(jax.grad(loss), in_shardings=where, out_shardings=where[0])
    with sharding.tracing_on(mesh):
        program = step.lower(variables, images).compile().as_text()
    sent = gpu_program.exchanged(program)
    assert sent["all-gather f32"] > 0
    assert "all-to-all f32" not in sent
