"""Contrastive losses against float64 loops from the equations, and IMITATE's golden values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medvlp_jax.losses import contrastive, targets
from medvlp_jax.losses.contrastive import ClinicalPrior, SameId


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def fixture(m, rows, columns, a, b, c):
    """f(m, i, k; a, b, c) of the IMITATE specification 1.2.6, 1-based, float64."""
    i = np.arange(1, rows + 1, dtype=np.float64)[:, None]
    k = np.arange(1, columns + 1, dtype=np.float64)[None, :]
    return np.sin(a * m * i + b * k * (1 + c * i)) + 0.3 * np.cos(0.7 * m + 0.05 * k * m)


def golden():
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    x = unit(fixture(1, 8, 16, 0.37, 0.11, 0.05))
    y = unit(fixture(2, 8, 16, 0.53, 0.17, 0.05))
    return jnp.asarray(x), jnp.asarray(y), jnp.asarray(fixture(1, 8, 32, 0.9, 0.23, 0.11))


def loop_soft_cross_entropy(logits, target, valid):
    """Sum over valid anchors and valid candidates, in plain float64 loops."""
    total = 0.0
    for i in range(len(logits)):
        if not valid[i]:
            continue
        log_total = np.log(sum(np.exp(logits[i, j]) for j in range(len(logits)) if valid[j]))
        total -= sum(
            target[i, j] * (logits[i, j] - log_total) for j in range(len(logits)) if valid[j]
        )
    return total


def alike(batch, rho, width=160):
    """Report features of which each two have the correlation rho."""
    rng = np.random.default_rng(0)
    centred = rng.normal(size=(batch + 1, width))
    centred -= centred.mean(axis=1, keepdims=True)
    basis = np.linalg.qr(centred.T)[0].T  # orthonormal, each of mean 0
    return np.sqrt(rho) * basis[:1] + np.sqrt(1 - rho) * basis[1:]


@pytest.mark.parametrize(("temperature", "expected"), [(0.07, 1.31), (0.2, 3.76)])
def test_the_mass_of_the_prior_is_that_of_the_specification_dense_and_in_tiles(
    float64, temperature, expected
):
    """1.2.3: 128 reports that correlate at 0.8; those that are missing count nowhere."""
    prior = ClinicalPrior(jnp.asarray(alike(128, 0.8)), temperature=temperature)
    mass = contrastive.prior_mass(prior)
    np.testing.assert_allclose(mass, temperature * 127 * (1 - np.exp(-0.2 * 0.8)), rtol=1e-6)
    assert round(float(mass), 2) == expected
    features = np.concatenate([alike(128, 0.8), np.ones((5, 160))])
    prior = ClinicalPrior(
        jnp.asarray(features),
        temperature=temperature,
        has_report=jnp.arange(133) < 128,
        ids=jnp.arange(133) // 2,
        normalise=True,
    )
    np.testing.assert_allclose(contrastive.prior_mass(prior), mass, rtol=1e-6)
    np.testing.assert_allclose(targets.prior_mass(prior, tile=50), mass, rtol=1e-6)
    # Filled tails of tiles count nowhere either, with a kernel that is not 0 at 0.
    other = ClinicalPrior(jnp.asarray(features), kernel="gaussian")
    found = targets.prior_mass(other, tile=50)
    np.testing.assert_allclose(found, contrastive.prior_mass(other), rtol=1e-6)
    nobody = prior._replace(has_report=jnp.zeros(133, bool))
    assert contrastive.prior_mass(nobody) == targets.prior_mass(nobody, tile=50) == 0


def random_pair(seed=0, batch=12, width=5):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, batch, width))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    y /= np.linalg.norm(y, axis=1, keepdims=True)
    return x, y, rng.random(batch) > 0.3, rng.normal(size=(batch, 7))


@pytest.mark.parametrize(
    ("kernel", "temperature", "expected"),
    [
        ("exp", 0.07, 25.76462071),
        ("exp", 0.2, 10.45108626),
        (None, 0.07, 25.48529359),
        (None, 0.2, 10.1151987),
        ("gaussian", 0.07, 30.23616441),
        ("gaussian", 0.2, 15.60872391),
        ("laplacian", 0.07, 30.93222877),
        ("laplacian", 0.2, 16.39523775),
        ("sigmoid", 0.07, 31.90757454),
        ("sigmoid", 0.2, 17.56618228),
    ],
)
def test_cicl_equals_the_golden_values(float64, kernel, temperature, expected):
    x, y, report = golden()
    prior = kernel and ClinicalPrior(report, kernel=kernel, temperature=temperature)
    loss = 2 * contrastive.info_nce(x, y, 1 / temperature, prior=prior)
    np.testing.assert_allclose(loss, expected, rtol=0, atol=1e-6)


def test_cicl_in_float32_stays_within_the_specified_1e_4_of_the_golden_value():
    x, y, report = golden()
    prior = ClinicalPrior(jnp.asarray(report, jnp.float32), temperature=0.07)
    loss = 2 * contrastive.info_nce(jnp.float32(x), jnp.float32(y), 1 / 0.07, prior=prior)
    np.testing.assert_allclose(loss, 25.76462071, rtol=0, atol=1e-4)


def test_prior_equals_the_golden_rows(float64):
    _, _, report = golden()
    rho = [1, 0.2199102554, -0.7631275175, -0.5506352990]
    rho += [0.2445649460, 0.4189701843, 0.1110323226, -0.0535338504]
    np.testing.assert_allclose(contrastive.pearson(report)[0], rho, atol=1e-9)
    similarity = ClinicalPrior(report).similarity()
    expected = [0, 0.0430288661, 0, 0, 0.0477360167, 0.0803793554, 0.0219617160, 0]
    np.testing.assert_allclose(similarity[0], expected, atol=1e-9)
    np.testing.assert_allclose(similarity.sum() / (8 * 7), 0.0327340950, atol=1e-9)


def test_exp_prior_is_symmetric_with_zero_diagonal_and_bounded():
    similarity = ClinicalPrior(jnp.asarray(random_pair(batch=40)[3], jnp.float32)).similarity()
    np.testing.assert_array_equal(similarity, similarity.T)
    np.testing.assert_array_equal(jnp.diag(similarity), 0)
    assert similarity.min() >= 0
    assert similarity.max() <= 1 - np.exp(-0.2)


@pytest.mark.parametrize("with_prior", [False, True])
def test_info_nce_equals_the_loop_with_missing_examples(float64, with_prior):
    x, y, valid, report = random_pair()
    prior = ClinicalPrior(jnp.asarray(report), temperature=0.1) if with_prior else None
    target = np.eye(12) + (0.1 * np.asarray(prior.similarity()) if with_prior else 0)
    logits = x @ y.T / 0.1
    rows = loop_soft_cross_entropy(logits, target, valid)
    columns = loop_soft_cross_entropy(logits.T, target.T, valid)
    loss = contrastive.info_nce(
        jnp.asarray(x), jnp.asarray(y), 10.0, prior=prior, valid=jnp.asarray(valid)
    )
    np.testing.assert_allclose(loss, (rows + columns) / 2 / valid.sum(), rtol=1e-12)


def test_keeping_invalid_examples_leaves_them_as_negatives_and_divides_by_the_batch(float64):
    x, y, valid, _ = random_pair()
    logits = x @ y.T * 10
    rows = -(logits - np.log(np.exp(logits).sum(1, keepdims=True))).diagonal()[valid].sum()
    columns = -(logits - np.log(np.exp(logits).sum(0, keepdims=True))).diagonal()[valid].sum()
    loss = contrastive.info_nce(
        jnp.asarray(x), jnp.asarray(y), 10.0, valid=jnp.asarray(valid), invalid="keep"
    )
    np.testing.assert_allclose(loss, (rows + columns) / 2 / 12, rtol=1e-12)


def test_gradient_is_finite_and_zero_for_invalid_examples():
    x, y, valid, report = random_pair()
    valid[:6] = False
    loss = lambda x, y, s: contrastive.info_nce(
        x, y, s, prior=ClinicalPrior(jnp.float32(report)), valid=jnp.asarray(valid)
    )
    dx, dy, ds = jax.grad(loss, argnums=(0, 1, 2))(jnp.float32(x), jnp.float32(y), 10.0)
    assert np.isfinite(dx).all()
    assert np.isfinite(dy).all()
    assert np.isfinite(ds)
    np.testing.assert_array_equal(dx[:6], 0)
    np.testing.assert_array_equal(dy[:6], 0)


def test_nothing_valid_gives_zero_loss_and_zero_gradient():
    x, y, _, _ = random_pair()
    none = jnp.zeros(12, bool)
    loss, grad = jax.value_and_grad(
        lambda x: contrastive.info_nce(x, jnp.float32(y), 10.0, valid=none)
    )(jnp.float32(x))
    assert loss == 0
    np.testing.assert_array_equal(grad, 0)


def test_loss_does_not_depend_on_the_content_of_invalid_rows():
    x, y, valid, report = random_pair()
    prior = lambda report: ClinicalPrior(jnp.float32(report))
    a = contrastive.info_nce(
        jnp.float32(x), jnp.float32(y), 9.0, prior=prior(report), valid=jnp.asarray(valid)
    )
    x[~valid], y[~valid], report[~valid] = x[::-1][~valid], y[::-1][~valid], 3.0
    b = contrastive.info_nce(
        jnp.float32(x), jnp.float32(y), 9.0, prior=prior(report), valid=jnp.asarray(valid)
    )
    assert a == b


def test_a_row_without_report_keeps_its_pair_and_loses_its_prior():
    report = jnp.asarray(random_pair()[3], jnp.float32)
    has_report = jnp.arange(12) != 3
    target = ClinicalPrior(report, has_report=has_report).targets(jnp.ones(12, bool))
    np.testing.assert_array_equal(target[3], np.eye(12)[3])
    np.testing.assert_array_equal(target[:, 3], np.eye(12)[3])


def test_features_are_centred_on_the_mean_of_those_that_are_reports(float64):
    report = random_pair()[3]
    has = np.arange(12) % 3 != 0
    report[~has] = 0.0  # as missing sections are cached
    centred = report[has] - report[has].mean(0)
    rho = np.zeros((12, 12))
    for a, i in enumerate(np.flatnonzero(has)):
        for b, j in enumerate(np.flatnonzero(has)):
            if i != j:
                rho[i, j] = max(np.corrcoef(centred[a], centred[b])[0, 1], 0)
    prior = lambda features: ClinicalPrior(features, has_report=jnp.asarray(has), centre=True)
    expected = 1 - np.exp(-0.2 * rho)
    np.testing.assert_allclose(prior(report).similarity(), expected, rtol=1e-10, atol=1e-12)
    other = np.where(has[:, None], report, 7.0)
    np.testing.assert_array_equal(prior(other).similarity(), prior(report).similarity())


def test_same_id_shares_the_mass_between_equal_texts(float64):
    x, y, _, _ = random_pair(batch=5)
    ids = np.array([7, 3, 7, 7, 1])
    target = np.array([[(a == b) / (ids == a).sum() for b in ids] for a in ids])
    logits = x @ y.T * 10
    expected = loop_soft_cross_entropy(logits, target, np.ones(5, bool))
    expected += loop_soft_cross_entropy(logits.T, target.T, np.ones(5, bool))
    loss = contrastive.info_nce(
        jnp.asarray(x), jnp.asarray(y), 10.0, prior=SameId(jnp.asarray(ids))
    )
    np.testing.assert_allclose(loss, expected / 2 / 5, rtol=1e-12)


def test_normalised_prior_rows_sum_to_one():
    report = jnp.asarray(random_pair()[3], jnp.float32)
    target = ClinicalPrior(report, normalise=True).targets(jnp.ones(12, bool))
    np.testing.assert_allclose(target.sum(1), 1, rtol=1e-6)


def test_sigmoid_equals_the_loop(float64):
    x, y, valid, _ = random_pair()
    total = 0.0
    for i in np.flatnonzero(valid):
        for j in np.flatnonzero(valid):
            z = 1 if i == j else -1
            total += np.log1p(np.exp(-z * (4.0 * x[i] @ y[j] - 2.0)))
    loss = contrastive.sigmoid(jnp.asarray(x), jnp.asarray(y), 4.0, -2.0, valid=jnp.asarray(valid))
    np.testing.assert_allclose(loss, total / valid.sum(), rtol=1e-12)


def test_permuting_the_batch_changes_no_loss(float64):
    x, y, valid, report = map(jnp.asarray, random_pair())
    order = np.random.default_rng(1).permutation(12)
    for loss in (
        lambda p: contrastive.info_nce(
            x[p], y[p], 9.0, prior=ClinicalPrior(report[p]), valid=valid[p]
        ),
        lambda p: contrastive.sigmoid(x[p], y[p], 9.0, -3.0, valid=valid[p]),
    ):
        np.testing.assert_allclose(loss(np.arange(12)), loss(order), rtol=1e-12)


def test_groups_average_the_losses_of_their_parts(float64):
    x, y, valid, report = map(jnp.asarray, random_pair())
    loss = lambda x, y, r, v: contrastive.info_nce(x, y, 9.0, prior=ClinicalPrior(r), valid=v)
    parts = [
        loss(x[s], y[s], report[s], valid[s]) for s in (slice(0, 4), slice(4, 8), slice(8, 12))
    ]
    np.testing.assert_allclose(
        contrastive.grouped(loss, 4)(x, y, report, valid), np.mean(parts), rtol=1e-12
    )


def test_groups_that_do_not_divide_the_batch_are_refused():
    x = jnp.ones((12, 3))
    with pytest.raises(ValueError, match="batch of 12 does not split into contrast groups of 5"):
        contrastive.grouped(lambda x: x.sum(), 5)(x)


def test_an_unknown_kernel_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="exp, gaussian, laplacian, sigmoid, got 'cosine'"):
        ClinicalPrior(jnp.ones((2, 3)), kernel="cosine").similarity()


def test_sharded_loss_equals_the_single_device_loss():
    x, y, valid, report = random_pair(batch=16)
    sharding = jax.sharding.NamedSharding(
        jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)),
        jax.sharding.PartitionSpec("data"),
    )
    loss = lambda x, y, r, v: contrastive.info_nce(x, y, 9.0, prior=ClinicalPrior(r), valid=v)
    arrays = [jnp.float32(x), jnp.float32(y), jnp.float32(report), jnp.asarray(valid)]
    step = jax.jit(jax.value_and_grad(loss))
    value, grad = step(*arrays)
    value_sharded, grad_sharded = step(*jax.device_put(arrays, sharding))
    np.testing.assert_allclose(value, value_sharded, rtol=1e-6)
    np.testing.assert_allclose(grad, grad_sharded, atol=1e-6)
