"""LGDEA's equations 4-9 and our choices around them against float64 loops from the formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medvlp_jax.losses import evidence

TAU = 0.1


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def draw(seed, batch=5, phrases=4, width=6, count=7):
    """Return z [B, N, E] unit, mask with an empty report, mu [K, E]."""
    rng = np.random.default_rng(seed)
    z = unit(rng.normal(size=(batch, phrases, width)))
    mask = rng.random((batch, phrases)) < 0.6
    mask[0], mask[1] = False, True
    return z, mask, rng.normal(size=(count, width))


def loop_shares(z, mu, temperature):
    """Eq. 4: e^{z.mu_k/tau} / sum_l e^{z.mu_l/tau}, for one vector."""
    scores = [sum(z[e] * mu[k][e] for e in range(len(z))) / temperature for k in range(len(mu))]
    terms = [math.exp(s) for s in scores]
    return [t / sum(terms) for t in terms]


def loop_distribution(z, mask, mu, temperature):
    """Eq. 8, for one report; uniform where no phrase is real."""
    rows = [loop_shares(z[n], mu, temperature) for n in range(len(z)) if mask[n]]
    count = len(mu)
    if not rows:
        return [1 / count] * count
    return [sum(row[k] for row in rows) / len(rows) for k in range(count)]


def loop_divergence(p, q):
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


def test_assignments_are_equation_4_and_6():
    z, _, mu = draw(0)
    found = evidence.assignments(z, mu, temperature=TAU)
    for b in range(5):
        for n in range(4):
            np.testing.assert_allclose(found[b, n], loop_shares(z[b, n], mu, TAU), rtol=1e-12)


def test_distributions_are_equation_7_and_8():
    z, mask, mu = draw(1)
    shares = evidence.assignments(z, mu, temperature=TAU)
    found = evidence.distribution(shares, mask)
    expected = [loop_distribution(z[b], mask[b], mu, TAU) for b in range(5)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    every = [loop_distribution(z[b], [True] * 4, mu, TAU) for b in range(5)]
    np.testing.assert_allclose(evidence.distribution(shares), every, rtol=1e-12)


def test_reconstruction_is_equation_5_over_all_real_phrases():
    z, mask, mu = draw(2)
    total, count = 0.0, 0
    for b in range(5):
        for n in range(4):
            if mask[b, n]:
                p = loop_shares(z[b, n], mu, TAU)
                rebuilt = [sum(p[k] * mu[k][e] for k in range(7)) for e in range(6)]
                total += sum((z[b, n, e] - rebuilt[e]) ** 2 for e in range(6))
                count += 1
    expected = total / count + 0.01 * sum(mu[k][e] ** 2 for k in range(7) for e in range(6))
    found = evidence.reconstruction(z, mask, mu, temperature=TAU, shrinkage=0.01)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_reconstruction_moves_phrases_and_prototypes_but_no_padding():
    z, mask, mu = draw(3)
    loss = lambda z, mu: evidence.reconstruction(z, mask, mu, temperature=TAU, shrinkage=0.01)
    into_z, into_mu = jax.grad(loss, (0, 1))(z, mu)
    assert (np.abs(into_z).max(-1) > 0).tolist() == mask.tolist()
    assert (np.abs(into_mu).max(-1) > 0).all()
    nothing = evidence.reconstruction(z, mask & False, mu, temperature=TAU, shrinkage=0.0)
    assert nothing == 0


def simplex(seed, rows=5, count=7):
    return np.random.default_rng(seed).dirichlet(np.full(count, 0.3), rows)


def test_paired_divergence_is_equation_9_over_the_pairs():
    report, image = simplex(4), simplex(5)
    terms = [loop_divergence(report[i], image[i]) for i in range(5)]
    np.testing.assert_allclose(
        evidence.paired_divergence(report, image), np.mean(terms), rtol=1e-12
    )
    valid = np.array([True, False, True, True, False])
    np.testing.assert_allclose(
        evidence.paired_divergence(report, image, valid=valid), np.mean(np.take(terms, [0, 2, 3]))
    )
    assert evidence.paired_divergence(report, image, valid=valid & False) == 0
    np.testing.assert_allclose(evidence.paired_divergence(report, report), 0, atol=1e-15)


def test_the_report_teaches_and_is_not_taught():
    report, image = simplex(6), simplex(7)
    into_report, into_image = jax.grad(evidence.paired_divergence, (0, 1))(report, image)
    np.testing.assert_array_equal(into_report, 0)
    # d KL / d Qbar_I(k) = -Qbar_R(k) / Qbar_I(k), over B
    np.testing.assert_allclose(into_image, -report / image / 5, rtol=1e-12)
    # Where it is not fixed, d KL / d Qbar_R(k) = log Qbar_R(k) - log Qbar_I(k) + 1.
    both = lambda report, image: evidence.paired_divergence(report, image, fixed=False)
    into_report, same = jax.grad(both, (0, 1))(report, image)
    np.testing.assert_allclose(into_report, (np.log(report) - np.log(image) + 1) / 5, rtol=1e-9)
    np.testing.assert_array_equal(same, into_image)


def test_unpaired_divergence_weighs_by_confidence():
    pseudo, image = simplex(8), simplex(9)
    pseudo[2] = 0  # nothing is related to this image, and its confidence is 0
    confidence = np.array([0.9, 0.3, 0.0, 0.5, 0.0])
    terms = [loop_divergence(pseudo[i], image[i]) for i in range(5)]
    expected = sum(c * t for c, t in zip(confidence, terms, strict=True)) / sum(confidence)
    found = evidence.unpaired_divergence(pseudo, image, confidence)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert evidence.unpaired_divergence(pseudo, image, 0 * confidence) == 0


def test_alignment_is_the_printed_sum_in_both_directions():
    rng = np.random.default_rng(10)
    a, b = unit(rng.normal(size=(4, 6))), unit(rng.normal(size=(5, 6)))
    target = rng.random((4, 5)) * (rng.random((4, 5)) < 0.4)
    target[1], target[:, 2] = 0, 0  # an image and a report without a positive
    ci, cr = rng.random(4), rng.random(5)
    positive_i, positive_r = target.sum(1) > 0, target.sum(0) > 0
    s = [[sum(a[i] * b[r]) / 0.07 for r in range(5)] for i in range(4)]
    to_report = to_image = 0.0
    for i in range(4):
        norm = sum(math.exp(s[i][r]) for r in range(5))
        for r in range(5):
            if target[i].sum() > 0:
                share = target[i, r] / target[i].sum()
                to_report += ci[i] * share * math.log(math.exp(s[i][r]) / norm)
    for r in range(5):
        norm = sum(math.exp(s[i][r]) for i in range(4))
        for i in range(4):
            if target[:, r].sum() > 0:
                share = target[i, r] / target[:, r].sum()
                to_image += cr[r] * share * math.log(math.exp(s[i][r]) / norm)
    to_report /= sum(ci[i] for i in range(4) if positive_i[i])
    to_image /= sum(cr[r] for r in range(5) if positive_r[r])
    found = evidence.alignment(
        a, b, target, image_confidence=ci, report_confidence=cr, temperature=0.07
    )
    np.testing.assert_allclose(found, -(to_report + to_image) / 2, rtol=1e-12)


def test_a_report_that_says_nothing_is_no_negative():
    rng = np.random.default_rng(12)
    a, b = unit(rng.normal(size=(4, 5))), unit(rng.normal(size=(6, 5)))
    told = np.array([True, False, True, True, False, True])
    target = rng.random((4, 6)) * told
    ci, cr = rng.random(4), rng.random(6)
    settings = {"image_confidence": ci, "temperature": 0.07}

    def loss(a, b, target, cr, **told):
        return evidence.alignment(a, b, target, report_confidence=cr, **settings, **told)

    both = jax.value_and_grad(loss, argnums=(0, 1))
    found, moved = both(a, b, target, cr, told=told)
    expected, alone = both(a, b[told], target[:, told], cr[told])
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(moved[0], alone[0], rtol=1e-10)
    np.testing.assert_allclose(moved[1][told], alone[1], rtol=1e-10)
    assert not np.any(moved[1][~told])
    assert np.isfinite(loss(a, b, 0 * target, cr, told=np.zeros(6, bool)))


def test_alignment_of_pairs_alone_is_info_nce():
    from medvlp_jax.losses import contrastive

    rng = np.random.default_rng(11)
    a, b = unit(rng.normal(size=(2, 6, 5)))
    one = np.ones(6)
    found = evidence.alignment(
        a, b, np.eye(6), image_confidence=one, report_confidence=one, temperature=0.07
    )
    np.testing.assert_allclose(found, contrastive.info_nce(a, b, 1 / 0.07), rtol=1e-12)


def test_mean_direction_is_the_unit_mean_of_the_real_ones():
    z, mask, _ = draw(12)
    found = evidence.mean_direction(z, mask)
    for b in range(1, 5):
        if mask[b].any():
            np.testing.assert_allclose(found[b], unit(z[b][mask[b]].mean(0)), rtol=1e-12)
    np.testing.assert_array_equal(found[0], 0)
    gradient = jax.grad(lambda z: evidence.mean_direction(z, mask).sum())(z)
    assert np.isfinite(gradient).all()


def test_usage_entropy_is_one_for_even_use_and_zero_for_one_prototype():
    np.testing.assert_allclose(evidence.usage_entropy(np.eye(8)), 1, rtol=1e-12)
    np.testing.assert_allclose(evidence.usage_entropy(np.eye(8)[[3, 3]]), 0, atol=1e-12)
    half = np.eye(8)[[0, 1]]
    np.testing.assert_allclose(evidence.usage_entropy(half), 1 / 3, rtol=1e-12)


def test_permuting_the_batch_changes_no_loss():
    z, mask, mu = draw(13)
    report, image, order = simplex(14), simplex(15), np.array([3, 0, 4, 2, 1])
    for loss, arrays in (
        (lambda z, m: evidence.reconstruction(z, m, mu, temperature=TAU, shrinkage=0.1), (z, mask)),
        (evidence.paired_divergence, (report, image)),
        (evidence.unpaired_divergence, (report, image, np.arange(5) / 5)),
    ):
        permuted = loss(*(array[order] for array in arrays))
        np.testing.assert_allclose(permuted, loss(*arrays), rtol=1e-12)


def test_bfloat16_inputs_give_float32_losses():
    z, mask, mu = (jnp.asarray(x) for x in draw(16))
    low = evidence.reconstruction(
        z.astype(jnp.bfloat16), mask, mu.astype(jnp.bfloat16), temperature=TAU, shrinkage=0.1
    )
    assert low.dtype == jnp.float32


def test_spherical_kmeans_finds_planted_directions():
    rng = np.random.default_rng(17)
    planted = np.eye(5)
    label = np.arange(200) % 5
    z = unit(planted[label] + 0.15 * rng.normal(size=(200, 5)))
    centres, found = evidence.spherical_kmeans(z, 5, key=jax.random.key(0))
    np.testing.assert_allclose(np.linalg.norm(centres, axis=1), 1, rtol=1e-6)
    # One centre for each planted direction, and the same grouping.
    assert sorted(np.argmax(centres, 1).tolist()) == list(range(5))
    assert (np.argmax(np.asarray(centres)[np.asarray(found)], 1) == label).all()


def test_spherical_kmeans_survives_more_centres_than_directions():
    z = np.tile(np.eye(3), (4, 1))
    centres, _ = evidence.spherical_kmeans(z, 6, key=jax.random.key(0))
    assert np.isfinite(centres).all()
    np.testing.assert_allclose(np.linalg.norm(centres, axis=1), 1, rtol=1e-6)
