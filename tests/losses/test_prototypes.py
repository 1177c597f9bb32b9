"""CFCML's prototypes and relations against golden values and float64 loops from the equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medvlp_jax import sharding
from medvlp_jax.losses import prototypes

EPSILON = 1e-8
LEVELS = ("sample", "unimodal", "crossmodal")

# One program instead of fifty small ones: compilation is what these tests spend their time on.
relations = jax.jit(prototypes.hierarchical_relations, static_argnums=2)
class_prototypes = jax.jit(prototypes.class_prototypes, static_argnums=2)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def golden(modalities, classes):
    """Z[m, i, k] and labels of the CFCML specification 2.3, 1-based, float64."""
    m = np.arange(1, modalities + 1, dtype=np.float64)[:, None, None]
    i = np.arange(1, 13, dtype=np.float64)[None, :, None]
    k = np.arange(1, 129, dtype=np.float64)[None, None, :]
    z = np.sin(0.37 * m * i + 0.11 * k * (1 + 0.05 * i)) + 0.3 * np.cos(0.7 * m + 0.05 * k * m)
    return z, (np.arange(12)) % classes


def unit(x):
    return x / np.linalg.norm(x)


def loop_prototypes(z, label, classes):
    """{(m, k): P} and {k: C} of the classes that are there."""
    modalities, count, _ = z.shape
    uni, cross = {}, {}
    for k in range(classes):
        rows = [i for i in range(count) if label[i] == k]
        if rows:
            for m in range(modalities):
                uni[m, k] = unit(np.mean([unit(z[m, i]) for i in rows], axis=0))
            every = [unit(z[m, i]) for m in range(modalities) for i in rows]
            cross[k] = unit(np.mean(every, axis=0))
    return uni, cross


def loop_loss(anchor, positives, negatives, temperature):
    term = lambda x: np.exp((unit(anchor) @ unit(x) + 1) / temperature)
    near = sum(map(term, positives))
    return -np.log(near / (near + sum(map(term, negatives))) + EPSILON)


def loop_relations(z, label, classes, temperature=0.07):
    """L_sam, L_up and L_cp as sums over anchors; classes without a sample take no part."""
    modalities, count, _ = z.shape
    uni, cross = loop_prototypes(z, label, classes)
    sample, unimodal, crossmodal = 0.0, EPSILON, EPSILON
    for k in cross:
        rows = [i for i in range(count) if label[i] == k]
        positives = [cross[k]] + [uni[m, k] for m in range(modalities)]
        for m in range(modalities):
            others = [z[m, j] for j in range(count) if label[j] not in (k, -1)]
            for i in rows:
                sample += loop_loss(z[m, i], positives, others, temperature) / len(rows)
            away = [p for (_, other), p in uni.items() if other != k]
            unimodal += loop_loss(uni[m, k], [cross[k]], away, temperature) / modalities
        own = [uni[m, k] for m in range(modalities)]
        away = [c for other, c in cross.items() if other != k]
        crossmodal += loop_loss(cross[k], own, away, temperature) / len(cross)
    return {"sample": sample, "unimodal": unimodal, "crossmodal": crossmodal}


def draw(seed, modalities, count, width=7):
    return np.random.default_rng(seed).normal(size=(modalities, count, width))


@pytest.mark.parametrize(
    ("modalities", "classes", "expected"),
    [
        (4, 3, (24.41296277, 12.04097803, 0.00653341)),
        (3, 2, (17.53590227, 3.7862763, 0.49687932)),
    ],
)
def test_golden_values_of_the_specification(float64, modalities, classes, expected):
    z, label = golden(modalities, classes)
    np.testing.assert_allclose(z[0, 0, :3], [0.6861572993, 0.7744795394, 0.8547442623], atol=1e-10)
    found = relations(jnp.asarray(z), jnp.asarray(label), classes)
    np.testing.assert_allclose([found[name] for name in LEVELS], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("modalities", "classes", "label"),
    [
        (2, 3, [0, 1, 2, 0, 1, 2]),
        (3, 2, [0, 0, 0, 0, 0, 1]),  # unbalanced, a class of one
        (4, 5, [0, 2, 2, 4, 0, 4, 4]),  # two classes are absent
        (2, 3, [1, 1, 1, 1]),  # one class alone: nothing to be told from
        (1, 4, [0, 1, 2, 3, 3, 0]),  # a table without images
        (3, 3, [0, -1, 1, -1, 2, 1]),  # unknown labels take no part
    ],
)
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_equals_a_loop_over_anchors(float64, modalities, classes, label, temperature):
    z = draw(len(label), modalities, len(label))
    expected = loop_relations(z, label, classes, temperature)
    found = relations(jnp.asarray(z), jnp.asarray(label), classes, temperature=temperature)
    for name in LEVELS:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-10, atol=1e-12)


def test_gradient_flows_through_prototypes_as_finite_differences_say(float64):
    label = [0, 2, 1, 0, 2, -1]
    z = draw(3, 3, len(label), width=4)
    total = lambda r: sum(r[name] * w for name, w in zip(LEVELS, (0.3, 0.5, 0.7), strict=True))
    ours = lambda z: total(relations(z, jnp.asarray(label), 4))
    gradient = np.asarray(jax.jit(jax.grad(ours))(jnp.asarray(z)))
    expected = np.zeros_like(z)
    for index in np.ndindex(z.shape):
        step = np.zeros_like(z)
        step[index] = 1e-6
        up, down = (total(loop_relations(z + s * step, label, 4)) for s in (1, -1))
        expected[index] = (up - down) / 2e-6
    np.testing.assert_allclose(gradient, expected, atol=1e-7 * np.abs(expected).max())
    assert not gradient[:, 5].any()


def test_gradient_is_finite_where_a_feature_is_zero_or_nobody_is_labelled(float64):
    z = jnp.asarray(draw(0, 2, 5)).at[0, 1].set(0.0)
    for label in ([0, 1, 0, 1, 1], [-1] * 5):
        loss = lambda z, y=label: sum(relations(z, jnp.asarray(y), 2).values())
        assert np.isfinite(jax.jit(jax.grad(loss))(z)).all()


def test_order_of_the_batch_and_of_the_modalities_changes_nothing(float64):
    label = np.array([0, 1, 2, 1, 0, 2, 2])
    z = draw(1, 3, len(label))
    rng = np.random.default_rng(0)
    rows, modalities = rng.permutation(len(label)), rng.permutation(3)
    a = relations(jnp.asarray(z), jnp.asarray(label), 3)
    b = relations(jnp.asarray(z[modalities][:, rows]), jnp.asarray(label[rows]), 3)
    for name in LEVELS:
        # Near 0 a loss is the logarithm of almost 1: what rounding leaves is absolute.
        np.testing.assert_allclose(a[name], b[name], rtol=1e-12, atol=1e-14)


def test_batch_split_over_eight_devices_equals_one():
    label = jnp.asarray(np.arange(16) % 3)
    z = jnp.asarray(draw(2, 3, 16, width=32), jnp.float32)
    loss = lambda z, y: sum(relations(z, y, 3).values())
    whole = jax.jit(jax.value_and_grad(loss))(z, label)
    mesh = sharding.make_mesh()
    rows = jax.sharding.NamedSharding(mesh, sharding.BATCH)
    columns = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, *sharding.BATCH))
    split = jax.jit(jax.value_and_grad(loss))(
        jax.device_put(z, columns), jax.device_put(label, rows)
    )
    np.testing.assert_allclose(split[0], whole[0], rtol=1e-6)
    np.testing.assert_allclose(split[1], whole[1], atol=1e-6 * np.abs(whole[1]).max())


def test_half_precision_features_give_a_float32_loss():
    z, label = golden(4, 3)
    found = relations(jnp.asarray(z, jnp.bfloat16), jnp.asarray(label), 3)
    assert all(found[name].dtype == jnp.float32 for name in LEVELS)
    np.testing.assert_allclose(found["sample"], 24.413, rtol=2e-2)  # what bf16 inputs allow


def test_memory_stands_in_for_absent_classes_and_moves_towards_the_batch(float64):
    z = draw(5, 2, 6)
    first = class_prototypes(jnp.asarray(z), jnp.array([0, 0, 1, 1, 2, 2]), 4)
    assert first.known.tolist() == [True, True, True, False]
    memory = prototypes.Prototypes(*first)
    # Class 2 is absent now, 3 is new, 0 and 1 are averaged with what is remembered.
    later, label = draw(6, 2, 5), np.array([0, 1, 1, 3, 0])
    found = class_prototypes(jnp.asarray(later), jnp.asarray(label), 4, memory=memory, decay=0.75)
    uni, cross = loop_prototypes(later, label, 4)
    for m in range(2):
        np.testing.assert_allclose(found.unimodal[m, 2], memory.unimodal[m, 2], rtol=1e-12)
        np.testing.assert_allclose(found.unimodal[m, 3], uni[m, 3], rtol=1e-12)
        mixed = unit(0.75 * np.asarray(memory.unimodal[m, 1]) + 0.25 * uni[m, 1])
        np.testing.assert_allclose(found.unimodal[m, 1], mixed, rtol=1e-12)
    np.testing.assert_allclose(found.crossmodal[3], cross[3], rtol=1e-12)
    assert found.known.all()


def test_no_gradient_flows_into_what_is_remembered(float64):
    z, label = jnp.asarray(draw(7, 2, 4)), jnp.array([0, 1, 0, 1])
    memory = class_prototypes(jnp.asarray(draw(8, 2, 4)), jnp.array([0, 1, 2, 2]), 3)

    def loss(uni):
        held = class_prototypes(z, label, 3, memory=memory._replace(unimodal=uni))
        return sum(relations(z, label, 3, held=held).values())

    assert not np.asarray(jax.jit(jax.grad(loss))(memory.unimodal)).any()
    plain = relations(z, label, 3)
    assert loss(memory.unimodal) != sum(plain.values())
