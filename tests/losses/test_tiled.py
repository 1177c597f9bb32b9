"""Tiled losses against their dense twins, a float64 loop from the equations, and a memory bound."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medvlp_jax import sharding
from medvlp_jax.losses import contrastive, evidence, relations, tiled
from medvlp_jax.losses.contrastive import ClinicalPrior, RowSoftmax, SameId
from medvlp_jax.losses.targets import Links

BATCH, WIDTH, TILE = 40, 16, 3  # 5 rows a device on 8 devices: no tile is ever full of rows
MESHES = {1: {"data": 1}, 2: {"fsdp": 2}, 4: {"data": 2, "fsdp": 2}, 8: {"data": 4, "fsdp": 2}}


def arrays(seed=0, batch=BATCH):
    """Embeddings, and everything a prior may be made of, with repeats and gaps."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, batch, WIDTH))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    y /= np.linalg.norm(y, axis=1, keepdims=True)
    return {
        "x": x,
        "y": y,
        "report": rng.normal(size=(batch, 9)),
        "ids": rng.integers(0, batch // 2, batch),
        "patient": rng.integers(0, batch // 2, batch),
        "valid": rng.random(batch) > 0.2,
        "has_report": rng.random(batch) > 0.3,
    }


def make_prior(name, a):
    report = jnp.asarray(a["report"], jnp.result_type(float))
    if name == "same_id":
        return SameId(jnp.asarray(a["ids"]))
    if name == "row_softmax":
        return RowSoftmax(report, 0.8)
    if name == "clinical":
        return ClinicalPrior(report, temperature=0.3)
    if name.startswith("everything"):
        return ClinicalPrior(
            report,
            kernel=name.removeprefix("everything_"),
            temperature=0.3,
            ids=jnp.asarray(a["ids"]),
            has_report=jnp.asarray(a["has_report"]),
            centre=True,
            normalise=True,
        )
    return None


PRIORS = ("none", "same_id", "row_softmax", "clinical", "everything_exp")
KERNELS = tuple(f"everything_{kernel}" for kernel in ("gaussian", "laplacian", "sigmoid"))


def value_and_gradients(module, kind, a, *, prior="none", masks=True, devices=0, **fields):
    """Value and gradients of image, text, scale (and bias), as float64, on a mesh or none."""
    valid = jnp.asarray(a["valid"]) if masks else None
    neutral = jnp.asarray(a["patient"]) if masks else None
    prior = make_prior(prior, a)

    def loss(x, y, scale, bias):
        if kind == "sigmoid":
            return module.sigmoid(x, y, scale, bias, valid=valid, neutral=neutral, **fields)
        return module.info_nce(x, y, scale, prior=prior, valid=valid, neutral=neutral, **fields)

    dtype = jnp.result_type(float)
    x, y = jnp.asarray(a["x"], dtype), jnp.asarray(a["y"], dtype)
    context = contextlib.nullcontext()
    if devices:
        mesh = sharding.make_mesh(**MESHES[devices], devices=jax.devices()[:devices])
        x, y = sharding.to_global({"x": x, "y": y}, mesh).values()
        context = jax.set_mesh(mesh)
    with context:
        result = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(
            x, y, jnp.asarray(9.0, dtype), jnp.asarray(-3.0, dtype)
        )
    return jax.tree.map(lambda v: np.asarray(v, np.float64), result)


def assert_close(found, expected, tolerance):
    """Largest difference, relative to the largest element, of the value and of each gradient."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("devices", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["info_nce", "sigmoid"])
def test_tiled_equals_dense_in_value_and_gradient(kind, devices):
    a = arrays()
    dense = value_and_gradients(contrastive, kind, a)
    assert_close(value_and_gradients(tiled, kind, a, devices=devices, tile=TILE), dense, 1e-6)


@pytest.mark.parametrize("prior", PRIORS[1:])
def test_soft_targets_made_by_the_tile_equal_the_dense_ones(prior):
    a = arrays()
    dense = value_and_gradients(contrastive, "info_nce", a, prior=prior)
    for devices in (0, 8):
        found = value_and_gradients(tiled, "info_nce", a, prior=prior, devices=devices, tile=TILE)
        assert_close(found, dense, 1e-6)


@pytest.mark.parametrize("prior", [*PRIORS, *KERNELS])
@pytest.mark.parametrize("invalid", ["drop", "keep"])
def test_in_float64_tiled_and_dense_agree_to_the_last_digits(prior, invalid):
    """What is left in float32 is therefore the order of summation."""
    a = arrays(seed=1)
    with jax.enable_x64(True):
        dense = value_and_gradients(contrastive, "info_nce", a, prior=prior, invalid=invalid)
        found = value_and_gradients(
            tiled, "info_nce", a, prior=prior, invalid=invalid, devices=4, tile=TILE
        )
    assert_close(found, dense, 1e-13)


@pytest.mark.parametrize(("batch", "tile"), [(1, 512), (7, 7), (7, 6), (13, 4), (16, 1)])
def test_any_batch_size_and_tile_without_masks(batch, tile):
    a = arrays(batch=max(batch, 2))
    a = {k: v[:batch] for k, v in a.items()}
    for kind in ("info_nce", "sigmoid"):
        dense = value_and_gradients(contrastive, kind, a, masks=False)
        found = value_and_gradients(tiled, kind, a, masks=False, tile=tile)
        # A single pair has no loss to speak of and no gradient: differences of numbers near 1.
        for f, d in zip(jax.tree.leaves(found), jax.tree.leaves(dense), strict=True):
            np.testing.assert_allclose(f, d, rtol=2e-6, atol=1e-6)


def loop_target(name, a, pairs):
    """Y from the equations: contrastive.py's docstrings, IMITATE 1.2.3, PRIMA Eq. 6."""
    size = len(pairs)
    report = a["report"].copy()
    target = np.zeros((size, size))
    if name.startswith("everything"):
        report -= report[a["has_report"]].mean(0)
    for i in range(size):
        partners = [j for j in range(size) if pairs[i, j]]
        if name == "row_softmax":
            weights = {j: np.exp(report[i] @ report[j] / 0.8) for j in partners}
            for j in partners:
                target[i, j] = weights[j] / sum(weights.values())
            continue
        same = [j for j in partners if a["ids"][i] == a["ids"][j]]
        shared = name == "same_id" or name.startswith("everything")
        for j in same if shared else [j for j in partners if j == i]:
            target[i, j] = 1 / len(same) if shared else 1.0
        if name == "same_id" or name == "none":
            continue
        for j in partners:
            known = name == "clinical" or (a["has_report"][i] and a["has_report"][j])
            if j != i and known:
                rho = max(np.corrcoef(report[i], report[j])[0, 1], 0.0)
                target[i, j] += 0.3 * (1 - np.exp(-0.2 * rho))
        if name == "everything_exp" and partners:
            target[i] /= target[i].sum()
    return target


@pytest.mark.parametrize("prior", PRIORS)
def test_info_nce_equals_the_loop_from_the_equation(prior):
    a = arrays(seed=2)
    size = len(a["valid"])
    pairs = np.zeros((size, size), bool)
    for i in range(size):
        for j in range(size):
            neutral = i != j and a["patient"][i] == a["patient"][j]
            pairs[i, j] = a["valid"][i] and a["valid"][j] and not neutral
    target = loop_target(prior, a, pairs)
    logits = 9.0 * a["x"] @ a["y"].T
    total = 0.0
    for i in range(size):
        row = [j for j in range(size) if pairs[i, j]]
        log_row = np.log(sum(np.exp(logits[i, j]) for j in row)) if row else 0.0
        log_column = np.log(sum(np.exp(logits[j, i]) for j in row)) if row else 0.0
        for j in row:
            total -= target[i, j] * (logits[i, j] - log_row)
            total -= target[j, i] * (logits[j, i] - log_column)
    expected = total / 2 / a["valid"].sum()
    with jax.enable_x64(True):
        for module, fields in ((tiled, {"tile": TILE}), (contrastive, {})):
            value, _ = value_and_gradients(module, "info_nce", a, prior=prior, **fields)
            np.testing.assert_allclose(value, expected, rtol=1e-12)


def test_sigmoid_equals_the_loop_from_the_equation():
    a = arrays(seed=3)
    total = 0.0
    for i in np.flatnonzero(a["valid"]):
        for j in np.flatnonzero(a["valid"]):
            if i == j or a["patient"][i] != a["patient"][j]:
                logit = 9.0 * a["x"][i] @ a["y"][j] - 3.0
                total += np.log1p(np.exp(-logit if i == j else logit))
    with jax.enable_x64(True):
        for module, fields in ((tiled, {"tile": TILE}), (contrastive, {})):
            value, _ = value_and_gradients(module, "sigmoid", a, **fields)
            np.testing.assert_allclose(value, total / a["valid"].sum(), rtol=1e-12)


def test_a_pair_found_with_certainty_keeps_its_digits():
    """Losses near 0 are where `peak - logit` cancels; at scale 100 nothing may be lost."""
    a = arrays(seed=4)
    x = jnp.float32(a["x"])
    y = jnp.float32(a["x"] + 0.1 * a["y"])
    expected = contrastive.info_nce(x, y, 100.0)
    assert expected < 1e-2
    np.testing.assert_allclose(tiled.info_nce(x, y, 100.0, tile=TILE), expected, rtol=1e-5)


def test_nothing_valid_gives_zero_loss_and_zero_gradient():
    a = arrays()
    a["valid"][:] = False
    for kind in ("info_nce", "sigmoid"):
        found = value_and_gradients(tiled, kind, a, tile=TILE)
        for leaf in jax.tree.leaves(found):
            np.testing.assert_array_equal(leaf, 0)


def test_half_precision_embeddings_are_summed_in_float32_and_get_their_own_type_back():
    a = arrays()
    x, y = jnp.bfloat16(a["x"]), jnp.bfloat16(a["y"])
    grad = jax.value_and_grad(lambda x: tiled.info_nce(x, y, 9.0, tile=TILE))
    value, dx = grad(x)
    assert value.dtype == jnp.float32
    assert dx.dtype == jnp.bfloat16
    np.testing.assert_allclose(value, contrastive.info_nce(x, y, 9.0), rtol=1e-6)


def test_no_gradient_flows_into_the_targets():
    a = arrays()
    x, y = jnp.float32(a["x"]), jnp.float32(a["y"])
    for module in (tiled, contrastive):
        loss = lambda f, t, module=module: module.info_nce(
            x, y, 9.0, prior=ClinicalPrior(f, temperature=t, normalise=True)
        )
        for leaf in jax.grad(loss, argnums=(0, 1))(jnp.float32(a["report"]), 0.3):
            np.testing.assert_array_equal(leaf, 0)


def test_a_batch_the_devices_do_not_divide_is_refused_with_both_numbers():
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"batch of 12 cannot be .* 8 devices"):
        tiled.info_nce(jnp.ones((12, 3)), jnp.ones((12, 3)), 1.0)


@pytest.fixture
def optimised():
    """The real compiler settings: what the tests leave out decides about memory."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def compiled_memory(module, kind, batch, **fields):
    """Temporary bytes of value and gradient on one of 8 devices, from the compiled program."""
    mesh = sharding.make_mesh()
    at = lambda spec: jax.sharding.NamedSharding(mesh, spec)
    embedding = jax.ShapeDtypeStruct((batch, 512), jnp.float32, sharding=at(sharding.BATCH))
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=at(jax.sharding.PartitionSpec()))

    def loss(x, y, scale, bias, report):
        if kind == "alignment":
            whole = report[:, :10].astype(int)
            known = Links(whole, report[:, :10], whole[:, 0])
            return module.alignment(x, y, scale, trust=report[:, 0], related=known, **fields)
        if kind == "sigmoid":
            return module.sigmoid(x, y, scale, bias, **fields)
        prior = ClinicalPrior(report, normalise=True) if kind == "clinical" else None
        return module.info_nce(x, y, scale, prior=prior, **fields)

    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))
        lowered = step.lower(embedding, embedding, number, number, embedding)
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("kind", ["info_nce", "sigmoid", "clinical", "alignment"])
def test_compiled_memory_is_linear_in_the_batch(optimised, kind):
    sizes = [compiled_memory(tiled, kind, 2**power) for power in range(14, 19)]
    ratios = np.divide(sizes[1:], sizes[:-1])
    assert ratios.max() <= 2.1, ratios


@pytest.mark.parametrize(("kind", "share"), [("info_nce", 25), ("sigmoid", 50)])
def test_compiled_memory_at_131072_is_a_small_share_of_dense(optimised, kind, share):
    found = compiled_memory(tiled, kind, 131_072)
    assert found * share <= compiled_memory(contrastive, kind, 131_072)
    # Of the leanest dense programs we know: section 1b of the anchors, MiB on the same 8 devices.
    assert found * share <= {"info_nce": 33_025, "sigmoid": 24_832}[kind] * 2**20


def related_arrays(batch, seed=0):
    """Relations of a corpus of twice the size, some of images without trust, some to no report."""
    rng = np.random.default_rng(seed)
    # The related reports of an image differ, as those of `relations.relations` do.
    column = np.stack([rng.permutation(2 * batch)[: batch // 2] for _ in range(batch)])
    weight = rng.random(column.shape) * (rng.random(column.shape) > 0.2)
    report = rng.permutation(2 * batch)[:batch]
    report[rng.random(batch) < 0.2] = -1
    trust = rng.random(batch) * (rng.random(batch) > 0.3)
    return np.where(trust[:, None] > 0, weight, 0), column, report, trust


def aligned(tile, batch, devices=0, related=True, dtype=float):
    """Value and gradients of image, report and scale; tile 0 is the dense loss."""
    weight, column, report, trust = map(jnp.asarray, related_arrays(batch))
    a = arrays(batch=batch)
    told = report >= 0 if related else None  # -1 is related to nothing

    def loss(x, y, scale):
        if tile:
            known = Links(column, weight, report) if related else None
            return tiled.alignment(x, y, scale, trust=trust, related=known, told=told, tile=tile)
        target = relations.in_batch(column, weight, report) if related else jnp.diag(trust > 0)
        shared = {
            "image_confidence": trust,
            "report_confidence": relations.mean_trust(target * 1.0, trust),
        }
        return evidence.alignment(x, y, target, temperature=1 / scale, told=told, **shared)

    x, y, scale = (jnp.asarray(v, dtype) for v in (a["x"], a["y"], 9.0))
    context = contextlib.nullcontext()
    if devices:
        mesh = sharding.make_mesh(**MESHES[devices], devices=jax.devices()[:devices])
        x, y = sharding.to_global({"x": x, "y": y}, mesh).values()
        context = jax.set_mesh(mesh)
    with context:
        value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(x, y, scale)
    return [np.asarray(v, np.float64) for v in (value, *gradients)]


@pytest.mark.parametrize("related", [True, False])
@pytest.mark.parametrize("tile", [1, 3, 7, 512])
def test_relations_made_by_the_tile_equal_the_dense_ones(tile, related):
    with jax.enable_x64(True):
        found = aligned(tile, 13, related=related)
        expected = aligned(0, 13, related=related)
    assert expected[0] > 0
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_relations_travel_around_the_ring(devices):
    found, expected = aligned(TILE, BATCH, devices, dtype=np.float32), aligned(0, BATCH)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_where_nothing_is_related_the_alignment_and_its_gradient_are_zero():
    zero = jnp.zeros((6, 2))
    nothing = Links(zero.astype(int), zero, jnp.arange(6))
    x = jnp.asarray(arrays(batch=6)["x"], jnp.float32)
    for known, trust in ((nothing, jnp.ones(6)), (None, jnp.zeros(6))):
        loss = lambda x, k=known, t=trust: tiled.alignment(x, x, 9.0, trust=t, related=k, tile=4)
        value, gradient = jax.value_and_grad(loss)(x)
        assert value == 0
        np.testing.assert_array_equal(gradient, 0)
