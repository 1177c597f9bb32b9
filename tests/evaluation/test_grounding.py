"""Grounding metrics against the reference's oracles, geometry against counted pixels."""

import json

import numpy as np
import pytest

from medvlp_jax.config import UserError
from medvlp_jax.evaluation import grounding

NAN = np.nan
SMALL = np.array([[0.9, 0.1], [0.3, 0.5]]), np.array([[1, 0], [0, 0]], bool)
LARGE = (
    np.array([[0.8, 0.6, 0.1], [0.7, 0.5, NAN], [0.2, 0.0, 0.1]]),
    np.array([[1, 1, 0], [0, 0, 0], [0, 0, 0]], bool),
)


def loop_cnr(values, inside, ddof=0):
    """|mean_A - mean_B| / sqrt(var_A + var_B), pixel by pixel."""
    parts = {True: [], False: []}
    for value, is_inside in zip(values.ravel(), inside.ravel(), strict=True):
        if value == value:
            parts[bool(is_inside)].append(float(value))
    means = {k: sum(p) / len(p) for k, p in parts.items()}
    variances = [sum((x - means[k]) ** 2 for x in p) / (len(p) - ddof) for k, p in parts.items()]
    return abs(means[True] - means[False]) / sum(variances) ** 0.5


# The values of reference section 3.c.
@pytest.mark.parametrize(
    ("case", "ddof", "expected"), [(SMALL, 0, 3.6742), (LARGE, 0, 1.6125), (LARGE, 1, 1.4084)]
)
def test_contrast_to_noise_is_the_references(case, ddof, expected):
    found = grounding.contrast_to_noise(*case, ddof=ddof)
    assert found == pytest.approx(expected, abs=5e-5)
    assert found == pytest.approx(loop_cnr(*case, ddof), rel=1e-12)


def test_mean_iou_is_the_references_and_strictness_moves_it():
    by_threshold = [grounding.mean_iou(*LARGE, thresholds=(t,)) for t in grounding.THRESHOLDS]
    np.testing.assert_allclose(by_threshold, [0.4, 0.5, 0.5, 0.5, 2 / 3], atol=1e-4)
    assert grounding.mean_iou(*LARGE) == pytest.approx(0.5133, abs=5e-5)
    loose = [
        grounding.mean_iou(*LARGE, thresholds=(t,), strict=False) for t in grounding.THRESHOLDS
    ]
    np.testing.assert_allclose(loose, [0.2857, 0.4, 0.5, 0.5, 0.5], atol=1e-4)
    assert grounding.mean_iou(*LARGE, strict=False) == pytest.approx(0.4371, abs=5e-5)


def test_the_sign_says_which_side_is_brighter():
    values, inside = SMALL
    assert grounding.contrast_to_noise(values, ~inside, signed=True) < 0
    assert grounding.contrast_to_noise(values, inside, signed=True) > 0
    assert grounding.contrast_to_noise(values, ~inside) == grounding.contrast_to_noise(*SMALL)


def test_a_flat_map_scores_zero_and_says_so():
    flat = np.full((3, 3), 0.3)
    found = grounding.score(flat, LARGE[1])
    assert found.cnr == 0
    assert found.flat
    assert found.pointing == pytest.approx(2 / 9)  # what a random pixel hits
    assert not grounding.score(*LARGE).flat


@pytest.mark.parametrize("high", [0.3, 0.7])
def test_a_map_that_separates_without_noise_is_infinite_and_rounding_is_no_noise(high):
    inside = np.zeros((7, 7), bool)
    inside[1:4, 2:6] = True
    values = np.where(inside, high, 0.1)  # whose means and variances are not exact
    assert grounding.contrast_to_noise(values, inside) == np.inf
    assert grounding.contrast_to_noise(values, ~inside) == np.inf
    assert grounding.contrast_to_noise(values, ~inside, signed=True) == -np.inf
    values[0, 0] += 1e-3
    found = grounding.contrast_to_noise(values, inside)
    assert found == pytest.approx(loop_cnr(values, inside), rel=1e-9)


def test_pointing_takes_the_largest_pixel_and_shares_ties():
    assert grounding.pointing(*LARGE) == 1
    values, inside = LARGE
    assert grounding.pointing(values, ~inside) == 0
    tied = np.where(values >= 0.7, 0.7, values)  # one of the two is inside
    assert grounding.pointing(tied, inside) == 0.5


def test_what_is_not_seen_does_not_count():
    inside = np.zeros((3, 3), bool)
    inside[1, 2] = True  # where LARGE is NaN
    assert np.isnan(grounding.score(LARGE[0], inside).cnr)
    seen = grounding.centred(np.arange(4.0).reshape(2, 2), 4)
    np.testing.assert_array_equal(np.isfinite(seen), np.pad(np.ones((2, 2), bool), 1))


def test_a_region_is_the_union_of_boxes_by_pixel_centres():
    boxes = np.array([[0, 0, 2, 1], [1.4, 0.4, 3.6, 2.6], [3.1, 3.1, 3.2, 3.2]])
    expected = [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    np.testing.assert_array_equal(grounding.region(boxes, 4, 4), np.array(expected, bool))


def test_maps_are_interpolated_between_patch_centres():
    patches = np.array([[0.0, 1.0], [2.0, 3.0]])
    found = grounding.heatmap(patches, 4)
    line = np.array([0, 0.25, 0.75, 1])  # patch centres at 1 and 3 of 4 pixels
    np.testing.assert_allclose(found, 2 * line[:, None] + line, atol=1e-12)
    nearest = grounding.heatmap(patches, 4, interpolation="nearest")
    np.testing.assert_array_equal(nearest, np.kron(patches, np.ones((2, 2))))


def test_smoothing_keeps_the_mean_and_lowers_the_peak():
    patches = np.zeros((9, 9))
    patches[4, 4] = 1
    found = grounding.heatmap(patches, 9, smoothing=1.5, interpolation="nearest")
    assert found.sum() == pytest.approx(1, abs=1e-2)
    assert found.max() == found[4, 4] < 0.1


def test_smoothing_mirrors_the_grid_at_its_edges_as_biovils_does():
    patches = np.random.default_rng(0).random((7, 7))
    found = grounding.heatmap(patches, 7, smoothing=1.5, interpolation="nearest")
    mirrored = np.tile(
        np.block([[patches, patches[:, ::-1]], [patches[::-1], patches[::-1, ::-1]]]), (3, 3)
    )
    offsets = range(-6, 7)  # SciPy cuts the Gaussian at four deviations
    weights = {i: np.exp(-(i**2) / 2 / 1.5**2) for i in offsets}
    total = sum(weights.values()) ** 2
    for y, x in ((0, 0), (0, 3), (5, 6)):
        expected = sum(
            weights[i] * weights[j] * mirrored[14 + y + i, 14 + x + j]
            for i in offsets
            for j in offsets
        )
        assert found[y, x] == pytest.approx(expected / total, rel=1e-12)


def pairs():
    box = [[0.1, 0.1, 0.4, 0.4]]
    made = [
        grounding.pairs_of(i, f"p{i // 2}", [f"phrase {i}"], ["effusion" if i % 3 else "mass"], box)
        for i in range(12)
    ]
    return [pair for found in made for pair in found]


def test_boxes_of_one_phrase_are_one_pair():
    boxes = np.arange(12.0).reshape(3, 4) / 12
    found = grounding.pairs_of(0, "p", ["a", "b", "a"], ["x", "y", "x"], boxes)
    assert [pair.phrase for pair in found] == ["a", "b"]
    np.testing.assert_array_equal(found[0].boxes, boxes[[0, 2]])


def test_shuffled_phrases_come_from_another_category_and_nothing_else_changes():
    before = pairs()
    kind = {pair.phrase: pair.category for pair in before}
    after = grounding.shuffled(before)
    for one, other in zip(before, after, strict=True):
        assert kind[other.phrase] != one.category
        assert other._replace(phrase=one.phrase) == one
    assert [p.phrase for p in after] == [p.phrase for p in grounding.shuffled(before)]


def test_means_are_over_categories_first_and_intervals_over_patients():
    values = np.arange(12.0)
    scores = [grounding.Scores(v, v / 12, float(v > 5), False, 0.1) for v in values]
    scores[11] = scores[11]._replace(cnr=NAN)
    found = grounding.run(pairs(), scores, task="cosine", resamples=200)
    kinds = np.array([p.category for p in pairs()])[:11]
    expected = np.mean([values[:11][kinds == k].mean() for k in ("effusion", "mass")])
    entry = found["grounding/cosine/cnr"]
    assert entry["value"] == pytest.approx(expected)
    assert entry["low"] < expected < entry["high"]
    assert found["grounding/cosine/cnr_micro"]["value"] == pytest.approx(values[:11].mean())
    assert found["grounding/cosine/cnr/mass"]["n"] == 4
    assert found["grounding/cosine/pointing"]["chance"] == pytest.approx(0.1)
    assert found["grounding/cosine/protocol"]["left_out"] == 1
    assert found["grounding/cosine/protocol"]["patients"] == 6
    json.dumps(found, allow_nan=False)


def test_an_infinite_contrast_is_left_out_of_cnr_alone_and_counted():
    scores = [grounding.Scores(float(v), v / 12, float(v > 5), False, 0.1) for v in range(12)]
    for i in (0, 4):  # one of each category
        scores[i] = scores[i]._replace(cnr=np.inf)
    scores[11] = scores[11]._replace(cnr=NAN)
    found = grounding.run(pairs(), scores, task="cosine", resamples=200)
    kinds = [p.category for p in pairs()]

    def loop(metric):
        means = []
        for kind in ("effusion", "mass"):
            own = [getattr(scores[i], metric) for i in range(11) if kinds[i] == kind]
            own = [v for v in own if v < np.inf]
            means.append(sum(own) / len(own))
        return sum(means) / 2

    for metric, n in (("cnr", 9), ("miou", 11), ("pointing", 11)):
        entry = found[f"grounding/cosine/{metric}"]
        assert entry["value"] == pytest.approx(loop(metric), rel=1e-12)
        assert entry["low"] < entry["value"] < entry["high"]
        assert entry["n"] == found[f"grounding/cosine/{metric}_micro"]["n"] == n
    assert found["grounding/cosine/cnr/mass"]["n"] == 3
    assert found["grounding/cosine/miou/mass"]["n"] == 4
    notes = found["grounding/cosine/protocol"]
    assert (notes["left_out"], notes["cnr_infinite"], notes["patients"]) == (1, 2, 6)


def test_a_category_of_infinite_contrasts_alone_is_none_of_cnrs():
    scores = [grounding.Scores(2.0, 0.5, 1.0, False, 0.1) for _ in range(12)]
    mass = [i for i, p in enumerate(pairs()) if p.category == "mass"]
    for i in mass:
        scores[i] = scores[i]._replace(cnr=np.inf)
    found = grounding.run(pairs(), scores, task="cosine", resamples=20)
    assert found["grounding/cosine/cnr"]["value"] == 2
    assert found["grounding/cosine/cnr/mass"]["value"] is None
    assert found["grounding/cosine/miou/mass"]["value"] == 0.5
    every = [s._replace(cnr=np.inf) for s in scores]
    found = grounding.run(pairs(), every, task="cosine", resamples=20)
    assert found["grounding/cosine/cnr"]["value"] is None
    assert found["grounding/cosine/pointing"]["value"] == 1


def test_guessing_has_a_level_of_the_signed_contrast_alone():
    rng = np.random.default_rng(0)
    inside = np.zeros((28, 28), bool)
    inside[3:12, 8:20] = True
    found = {}
    for is_signed in (False, True):
        variant = grounding.Variant(signed=is_signed)
        maps = [grounding.heatmap(rng.normal(size=(7, 7)), 28) for _ in range(400)]  # of nothing
        scores = [grounding.score(values, inside, variant) for values in maps]
        many = [pairs()[i % 12] for i in range(400)]
        entries = grounding.run(many, scores, task="t", variant=variant, resamples=0)
        found[is_signed] = entries["grounding/t/cnr_micro"]
    assert found[True]["chance"] == pytest.approx(found[True]["value"], abs=0.05)
    assert found[False]["value"] > 0.15
    assert found[False]["chance"] is None


def test_boxes_outside_what_was_seen_leave_no_number_and_are_counted():
    unseen = grounding.Scores(NAN, 0.0, 0.0, False, 0.0)
    found = grounding.run(pairs(), [unseen] * 12, task="cosine", resamples=20)
    assert {*found} == {"grounding/cosine/protocol"}
    assert found["grounding/cosine/protocol"]["left_out"] == 12


@pytest.mark.parametrize(
    ("variant", "cnr", "miou"),
    [
        ({}, 1.6125, 0.5133),
        ({"ddof": 1}, 1.4084, 0.5133),
        ({"strict": False}, 1.6125, 0.4371),
    ],
)
def test_a_variant_scores_as_its_settings_say(variant, cnr, miou):
    found = grounding.score(*LARGE, grounding.Variant(**variant))
    assert (found.cnr, found.miou) == pytest.approx((cnr, miou), abs=5e-5)


def test_scaling_each_map_is_another_iou_and_the_same_cnr():
    values, inside = LARGE[0] - 0.4, LARGE[1]  # a cosine may be negative
    by_scale = {
        scale: grounding.score(values, inside, grounding.Variant(scale=scale))
        for scale in ("clamp", "min-max")
    }
    assert by_scale["clamp"].cnr == by_scale["min-max"].cnr
    expected = []
    seen = values == values
    low, high = values[seen].min(), values[seen].max()
    for t in grounding.THRESHOLDS:
        above = np.array([[v == v and (v - low) / (high - low) > t for v in row] for row in values])
        expected.append((above & inside).sum() / (above | inside).sum())
    assert by_scale["min-max"].miou == pytest.approx(np.mean(expected), rel=1e-12)
    assert by_scale["clamp"].miou != pytest.approx(by_scale["min-max"].miou, abs=0.01)
    # No threshold is negative, so clamping changes no published number; NaN margins stay unseen.
    assert by_scale["clamp"].miou == grounding.mean_iou(values, inside)
    assert np.isnan(grounding.scaled(values, "min-max")[1, 2])
    assert grounding.scaled(np.full((2, 2), 0.3), "min-max").max() == 0


def test_signed_keeps_the_sign_and_variants_have_an_id_of_their_own():
    values, inside = SMALL
    signed = grounding.Variant(signed=True)
    scores = [grounding.score(values, ~inside, signed)]
    assert scores[0].cnr < 0
    pairs = grounding.pairs_of(0, "p", ["a"], ["k"], [[0, 0, 1, 1]])
    found = grounding.run(pairs, scores, task="t", variant=signed, resamples=0)
    plain = grounding.run(pairs, scores, task="t", resamples=0)
    assert found["grounding/t/cnr"]["protocol"] == "grounding@legacy-v1"
    assert plain["grounding/t/cnr"]["protocol"] == "grounding@clean-v1"
    assert found["grounding/t/protocol"]["settings"]["signed"] is True
    with pytest.raises(UserError, match="ddof=2"):
        grounding.Variant(ddof=2).check()
