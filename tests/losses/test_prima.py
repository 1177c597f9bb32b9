"""PRIMA's four alignment losses against loops over the printed equations, in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medvlp_jax import sharding
from medvlp_jax.losses import contrastive, local, tiled

TAU, TAU_LABEL = 0.07, 5.0


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def log_share(own, others):
    """log exp(own) / sum exp(others)."""
    others = np.array(others)
    peak = others.max()
    return own - peak - np.log(np.exp(others - peak).sum())


def views(count, width=12, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, 2, width)), rng.normal(size=(count, width))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def looped_image(p):
    """Eq. 2 as printed: view 1 is the anchor."""
    total = 0.0
    for i in range(len(p)):
        own = cosine(p[i, 0], p[i, 1]) / TAU
        others = [cosine(p[i, 0], p[k, 1]) / TAU for k in range(len(p))]
        others += [cosine(p[i, 0], p[k, 0]) / TAU for k in range(len(p)) if k != i]
        assert len(others) == 2 * len(p) - 1
        total -= log_share(own, others)
    return total / len(p)


def looped_soft(p, q, target):
    """Eq. 6 times N: with the identity as target, Eq. 3."""
    count, total = len(q), 0.0
    for k in range(2):
        sim = np.array([[cosine(p[i, k], q[j]) / TAU for j in range(count)] for i in range(count)])
        for i in range(count):
            for j in range(count):
                forth = log_share(sim[i, j], sim[i])
                back = log_share(sim[i, j], sim[:, j])
                total -= target[i, j] * (forth + back)
    return total / (4 * count)


def likeness(y):
    """s_ij = softmax_j(<y_i, y_j> / tau_label)."""
    rows = []
    for i in range(len(y)):
        inner = np.array([y[i] @ y[j] / TAU_LABEL for j in range(len(y))])
        rows.append(np.exp(inner - inner.max()) / np.exp(inner - inner.max()).sum())
    return np.array(rows)


def looped_local(q, mask, p, printed):
    """Eq. 4 and 5 over the valid tokens; the mean over all of them."""
    total, count = 0.0, 0
    for i in range(len(q)):
        tokens = np.flatnonzero(mask[i])
        for j in range(p.shape[1]):
            seen = {}
            for t in tokens:
                inner = np.array([q[i, t] @ p[i, j, k] for k in range(p.shape[2])])
                inner = inner / np.sqrt(q.shape[-1])
                alpha = np.exp(inner - inner.max()) / np.exp(inner - inner.max()).sum()
                seen[t] = sum(a * p[i, j, k] for k, a in enumerate(alpha))
            for t in tokens:
                own = cosine(q[i, t], seen[t]) / TAU
                forth = log_share(own, [cosine(q[i, t], seen[m]) / TAU for m in tokens])
                other = [cosine(seen[t], q[i, m]) / TAU for m in tokens]
                back = forth if printed else log_share(own, other)
                total -= (forth + back) / 2
                count += 1
    return total / max(count, 1)


@pytest.mark.parametrize("count", [2, 7])
@pytest.mark.parametrize("symmetric", [False, True])
def test_image_consistency_is_equation_2(count, symmetric):
    p, _ = views(count)
    expected = looped_image(p)
    if symmetric:
        expected = (expected + looped_image(p[:, ::-1])) / 2
    first, second = unit(p)[:, 0], unit(p)[:, 1]
    found = contrastive.view_consistency(first, second, 1 / TAU, symmetric=symmetric)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("devices", [0, 1, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_image_consistency_in_tiles_has_the_same_value_and_gradients(devices, symmetric):
    p, _ = views(24, seed=3)
    first, second = jnp.asarray(unit(p)[:, 0]), jnp.asarray(unit(p)[:, 1])

    def run(module, **fields):
        loss = lambda *a: 3 * module.view_consistency(*a, symmetric=symmetric, **fields)
        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(first, second, 1 / TAU)

    expected = run(contrastive)
    if devices:
        mesh = sharding.make_mesh(devices=jax.devices()[:devices])
        with jax.set_mesh(mesh):
            found = run(tiled, tile=2)
    else:
        found = run(tiled, tile=5)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("module", [contrastive, tiled])
@pytest.mark.parametrize("count", [3, 8])
def test_soft_semantic_is_equation_6(module, count):
    p, q = views(count, seed=1)
    y = np.random.default_rng(2).integers(0, 2, (count, 6)).astype(float)
    y[1] = y[0]  # two patients with the same metadata
    expected = looped_soft(p, q, likeness(y))
    temperatures = {"temperature": TAU, "label_temperature": TAU_LABEL}
    soft = lambda norm: contrastive.soft_semantic(
        unit(p), unit(q), y, **temperatures, norm=norm, loss=module.info_nce
    )
    np.testing.assert_allclose(soft("mean"), expected, rtol=1e-12)
    np.testing.assert_allclose(soft("paper"), expected / count, rtol=1e-12)


def test_with_the_identity_as_target_the_soft_loss_is_equation_3():
    p, q = views(6, seed=4)
    expected = looped_soft(p, q, np.eye(6))
    y = 1e3 * np.eye(6)  # row softmax of a large diagonal
    soft = contrastive.soft_semantic(
        unit(p), unit(q), y, temperature=TAU, label_temperature=TAU_LABEL
    )
    np.testing.assert_allclose(soft, expected, rtol=1e-12)
    pair = [contrastive.info_nce(unit(p)[:, k], unit(q), 1 / TAU) for k in range(2)]
    np.testing.assert_allclose(sum(pair) / 2, expected, rtol=1e-12)


def test_identical_orthonormal_views_and_texts_have_a_global_loss_near_zero():
    q = np.eye(8)
    same = contrastive.info_nce(q, q, 1 / TAU)
    np.testing.assert_allclose(same, np.log1p(7 * np.exp(-1 / TAU)), rtol=1e-9)
    assert same < 1e-5
    assert contrastive.info_nce(q, np.roll(q, 1, 0), 1 / TAU) > 14


def test_an_unknown_normalisation_is_refused():
    p, q = views(2)
    with pytest.raises(ValueError, match="'mean' or 'paper', got 'sum'"):
        contrastive.soft_semantic(
            unit(p), unit(q), q, temperature=TAU, label_temperature=1.0, norm="sum"
        )


def local_input(seed=5):
    rng = np.random.default_rng(seed)
    q, p = rng.normal(size=(3, 5, 8)), rng.normal(size=(3, 2, 7, 8))
    mask = np.arange(5) < np.array([[5], [2], [3]])
    return q, mask, p


@pytest.mark.parametrize("printed", [False, True])
def test_token_patch_alignment_is_equations_4_and_5(printed):
    q, mask, p = local_input()
    found = local.token_patch_alignment(q, mask, p, temperature=TAU, printed=printed)
    np.testing.assert_allclose(found, looped_local(q, mask, p, printed), rtol=1e-12)


def test_token_patch_alignment_does_not_see_padding():
    q, mask, p = local_input()

    def run(q, mask):
        loss = lambda q, p: local.token_patch_alignment(q, mask, p, temperature=TAU)
        return jax.value_and_grad(loss, (0, 1))(q, p)

    value, (dq, dp) = run(q, mask)
    noisy = np.where(mask[..., None], q, 1e3)
    longer = np.pad(noisy, ((0, 0), (0, 4), (0, 0)), constant_values=-7.0)
    padded, (dq_padded, dp_padded) = run(longer, np.pad(mask, ((0, 0), (0, 4))))
    np.testing.assert_allclose(padded, value, rtol=1e-12)
    np.testing.assert_allclose(dp_padded, dp, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(dq_padded[:, :5][mask], dq[mask], rtol=1e-9, atol=1e-12)
    assert not dq_padded[:, :5][~mask].any()
    assert not dq_padded[:, 5:].any()


def test_a_patient_without_text_adds_nothing_and_no_text_at_all_is_zero():
    q, mask, p = local_input()
    some = mask & np.array([[True], [False], [True]])
    found = local.token_patch_alignment(q, some, p, temperature=TAU)
    np.testing.assert_allclose(found, looped_local(q, some, p, False), rtol=1e-12)
    loss = lambda q: local.token_patch_alignment(q, np.zeros_like(mask), p, temperature=TAU)
    value, gradient = jax.value_and_grad(loss)(q)
    assert value == 0
    assert not np.asarray(gradient).any()
