"""A step on a mesh: where its arrays lie, what it gives back, and that it changes no gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_chunks import assert_same, batch_of, gradients, initial, make_clip, make_imitate

from medvlp_jax import sharding
from medvlp_jax.encoders import qwen3
from medvlp_jax.encoders.base import Tokens
from medvlp_jax.training import optim
from medvlp_jax.training import params as paths
from medvlp_jax.training import step as training


@pytest.fixture
def mesh(monkeypatch):
    """2 x 4 devices on which even these small arrays are split over fsdp."""
    monkeypatch.setattr(sharding, "FSDP_FLOOR", 64)
    return sharding.make_mesh(data=2, fsdp=4)


def adamw_step(recipe, batch, mesh):
    """State on the mesh, where it should lie, and a step of AdamW."""
    state = initial(recipe, batch)
    tx, rate = optim.make(state.params, name="adamw", lr=1e-3, steps=9)
    state = training.make_state(state.variables, tx, recipe.frozen)
    where = sharding.shardings(state, mesh)
    step = training.make_train_step(recipe, tx, rate, 0, mesh=mesh)
    return jax.device_put(state, where), where, step


def test_the_state_comes_back_where_it_was_and_the_old_one_is_given_away(mesh):
    """Else the second step would be another program, and both states would lie in memory."""
    recipe = make_clip()
    batch = batch_of(recipe)
    state, where, step = adamw_step(recipe, batch, mesh)
    batch = sharding.to_global(batch, mesh)
    size = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    memory = step.lower(state, batch).compile().memory_analysis()
    assert memory.alias_size_in_bytes == size
    kernel = state.params["image"]["stack"]["block_0"]["mlp"]["up"]["kernel"]
    after, _ = step(state, batch)
    assert kernel.is_deleted()
    for leaf, before in zip(jax.tree.leaves(after), jax.tree.leaves(where), strict=True):
        assert leaf.sharding.is_equivalent_to(before, leaf.ndim)


def test_moments_lie_with_their_parameter(mesh):
    recipe = make_clip()
    state, _, _ = adamw_step(recipe, batch_of(recipe), mesh)
    moments = next(s for s in state.optimizer if hasattr(s, "mu"))
    specs = lambda tree: {k: leaf.sharding.spec for k, leaf in paths.flatten(tree).items()}
    assert specs(moments.mu) == specs(moments.nu) == specs(state.params)
    assert P(None, "fsdp") in specs(state.params).values()


@pytest.mark.slow
def test_imitate_split_over_data_and_fsdp_equals_one_device(mesh):
    """Statistics of BatchNorm are those of the whole batch, wherever its rows lie."""
    recipe = make_imitate()
    batch = batch_of(recipe, side=64)
    state = initial(recipe, batch)
    found = gradients(recipe, batch, state, mesh=mesh)
    assert_same(found, gradients(recipe, batch, state), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "block", "full"])
@pytest.mark.parametrize("chunks", [1, 2])
def test_remat_on_a_mesh_with_dropout_changes_no_gradient(mesh, remat, chunks):
    """Dropout masks are drawn again from the same keys."""
    plain = make_clip(dropout=0.3)
    image, text = (getattr(plain, side).clone(remat=remat) for side in ("image", "text"))
    recipe = plain.clone(image=image, text=text)
    batch = batch_of(plain)
    state = initial(plain, batch)
    expected = gradients(plain, batch, state, chunks=chunks)
    assert_same(gradients(recipe, batch, state, chunks=chunks, mesh=mesh), expected, 2e-6)


@pytest.mark.parametrize("layout", ["unrolled", "scan"])
def test_qwen3_split_over_a_tensor_axis_equals_one_device(layout):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    module = qwen3.make("tiny", width=32, depth=2, head_width=8, mlp_dim=64, vocab_size=48)
    module = module.clone(layout=layout)
    rng = np.random.default_rng(0)
    tokens = Tokens(rng.integers(0, 48, (4, 6)), np.arange(6) < rng.integers(2, 7, (4, 1)))
    shapes = jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) / 6, shapes)

    def loss(params, tokens):
        return jnp.square(module.apply({"params": params}, tokens).pooled).sum()

    value_and_grad = jax.jit(jax.value_and_grad(loss))
    expected = value_and_grad(params, tokens)
    split = jax.device_put(params, sharding.shardings(params, mesh, qwen3.RULES))
    found = value_and_grad(split, sharding.to_global(tokens, mesh))
    flatten = lambda pair: (float(pair[0]), jax.device_get(paths.flatten(pair[1])))
    assert_same(flatten(found), flatten(expected), 2e-6)
    for path, leaf in paths.flatten(split).items():
        pieces = leaf.size // leaf.addressable_shards[0].data.size
        assert pieces == (4 if leaf.ndim > 1 and "norm" not in path else 1), path


@pytest.mark.parametrize("variant", ["0.6B", "1.7B", "4B", "8B"])
@pytest.mark.parametrize("layout", ["unrolled", "scan"])
def test_every_large_array_of_qwen3_is_split_over_both_axes(variant, layout):
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=4)
    module = qwen3.make(variant, layout=layout, depth=2)
    tokens = Tokens(np.zeros((1, 4), np.int32), np.ones((1, 4), bool))
    shapes = paths.flatten(jax.eval_shape(module.init, jax.random.key(0), tokens)["params"])
    for path, leaf in shapes.items():
        spec = sharding.parameter_spec(path, leaf.shape, qwen3.RULES, mesh)
        piece = NamedSharding(mesh, spec).shard_shape(leaf.shape)
        pieces = leaf.size // int(np.prod(piece))
        assert pieces == (8 if leaf.size >= sharding.FSDP_FLOOR else 1), path


def test_a_compiled_step_is_found_again_in_the_compile_cache(tmp_path, mesh):
    """JAX_COMPILATION_CACHE_DIR: a restarted run builds its step anew and compiles nothing."""
    from jax.experimental.compilation_cache import compilation_cache

    recipe = make_clip()
    batch = batch_of(recipe)
    names = {"jax_compilation_cache_dir": str(tmp_path)}
    names |= {"jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in names}
    entries = []
    try:
        compilation_cache.reset_cache()  # a process looks once whether there is one
        for name, value in names.items():
            jax.config.update(name, value)
        for _ in range(2):
            state, _, step = adamw_step(recipe, batch, mesh)
            step.lower(state, sharding.to_global(batch, mesh)).compile()
            entries.append({p.name for p in tmp_path.iterdir() if p.name.startswith("jit_step")})
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
    assert len({name.rsplit("-", 1)[0] for name in entries[0]}) == 1
    assert entries[0] == entries[1]
