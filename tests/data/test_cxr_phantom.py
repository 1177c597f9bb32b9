"""The phantom's pictures agree with its labels, and its patients with its disease model."""

import math
from importlib import resources

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from medvlp_jax.data.datasets import cxr_phantom
from medvlp_jax.data.datasets.cxr_phantom import anatomy, findings, generate, patients, signs

SIZE = 96
OUTLINED = [f for f in findings.FINDINGS if f not in ("cardiomegaly", "edema")]


@pytest.fixture(scope="module")
def studies():
    return list(generate.studies(3, 170, SIZE))


def region(study, name):
    bit = findings.MASK_BITS[findings.REGION.get(name, name)]
    return (study.mask >> bit) & 1 > 0


def width(outline):
    columns = np.flatnonzero(outline.any(axis=0))
    return columns[-1] - columns[0] + 1


def test_equal_numbers_give_equal_bytes():
    who = patients.patient(5, 2)
    one, two = (generate.study(5, who, 0, 128) for _ in range(2))
    assert generate.encode_jpeg(one.image) == generate.encode_jpeg(two.image)
    assert (one.mask == two.mask).all()
    assert one[2:3] + one[5:7] == two[2:3] + two[5:7]
    np.testing.assert_equal(one.table, two.table)


def test_a_study_depends_neither_on_the_population_size_nor_on_what_was_made_before():
    small = generate.first(3, 5, SIZE)
    large = list(generate.studies(5, 4, SIZE))
    for a, b in zip(small, large, strict=False):
        assert a.id == b.id
        assert (a.image == b.image).all()
    alone = generate.study(5, patients.patient(5, 3), 0, SIZE)
    assert (alone.image == next(s for s in large if s.id == alone.id).image).all()


def test_another_seed_gives_other_images():
    assert not np.array_equal(*(generate.first(1, seed, SIZE)[0].image for seed in (1, 2)))


@pytest.mark.parametrize("size", [64, 200, 256])
def test_any_size_can_be_made(size):
    study = generate.first(1, 0, size)[0]
    assert study.image.shape == study.mask.shape == (size, size)
    assert study.image.dtype == np.uint8
    assert study.image.std() > 30


def test_the_same_study_looks_alike_at_two_sizes():
    small, large = (generate.first(1, 0, size)[0].image.astype(float) for size in (64, 256))
    pooled = large.reshape(64, 4, 64, 4).mean((1, 3))
    assert np.corrcoef(small.ravel(), pooled.ravel())[0, 1] > 0.95


def test_every_outlined_finding_has_a_region_and_no_absent_one_has(studies):
    for study in studies:
        regions = {findings.REGION.get(f.name, f.name) for f in study.found}
        for name in OUTLINED:
            where = findings.REGION.get(name, name)
            assert region(study, name).any() == (where in regions), (study.id, name)


def test_the_cardiothoracic_ratio_of_the_mask_exceeds_half_exactly_with_cardiomegaly(studies):
    for study in studies:
        lungs = region(study, "lung_right") | region(study, "lung_left")
        ratio = width(region(study, "heart")) / width(lungs)
        assert (ratio > 0.5) == any(f.name == "cardiomegaly" for f in study.found), study.id


def test_boxes_lie_on_the_image_side_opposite_to_the_patient_side(studies):
    seen = set()
    for study in studies:
        for f in study.found:
            if f.side in ("", "bilateral") or f.name not in OUTLINED:
                continue
            columns = np.flatnonzero(region(study, f.name).any(axis=0))
            if sum(findings.REGION.get(o.name, o.name) in ("lesion",) for o in study.found) > 1:
                continue  # two lesions share one region
            right_of_image = columns.mean() > np.flatnonzero(study.mask.any(axis=0)).mean()
            assert right_of_image == (f.side == "left"), (study.id, f)
            seen.add((f.name, f.side))
    assert len(seen) == 2 * len(OUTLINED)


def test_boxes_are_fractions_and_hold_a_phrase_of_the_report(studies):
    counts = 0
    for study in studies:
        text = " ".join(study.report[:2]).lower()
        for (top, left, bottom, right), phrase in study.boxes:
            assert 0 <= top < bottom <= 1
            assert 0 <= left < right <= 1
            assert phrase
            assert phrase.lower() in text
            counts += 1
        boxed = [f for f in study.found if f.name != "edema"]
        both = sum(f.side == "bilateral" for f in boxed)
        assert len(study.boxes) == len(boxed) + both
    assert counts > 100


def test_opacities_are_brighter_and_pneumothorax_darker_than_the_healthy_chest():
    """The same chest with and without one finding, rendered with the same random numbers."""
    for name in OUTLINED:
        chest = anatomy.draw_anatomy(np.random.default_rng(1), male=True, age=60.0)
        found = findings.draw_findings(np.random.default_rng(2), [name])
        half = anatomy.half(findings.alter(chest, found), found[0].side, 128)
        healthy = signs.healthy(chest, half, np.random.default_rng(3), 128)
        before = healthy.aerated - healthy.water
        marked = signs.Tissue(*(array.copy() for array in healthy))
        outlines = signs.mark(chest, half, marked, found, rng=np.random.default_rng(4), size=128)
        index, outline = outlines[0]
        filled = np.minimum(marked.water, marked.aerated)
        change = ((marked.aerated - filled) - before)[index][outline].mean()
        assert (change > 0.5) if name == "pneumothorax" else (change < -0.5), name


def test_a_study_has_at_most_three_findings_and_two_fifths_are_normal():
    plans = [generate.plan(0, who, 0) for who in patients.population(0, 3000)]
    counts = np.bincount([len(p.found) for p in plans], minlength=4)
    assert len(counts) == 4
    assert 0.35 < counts[0] / len(plans) < 0.45
    for name in findings.FINDINGS:
        share = np.mean([any(f.name == name for f in p.found) for p in plans])
        assert 0.06 < share < 0.2, name


def test_normal_means_none_of_the_findings(studies):
    for study in studies:
        assert study.labels[-1] == (study.labels[:-1].sum() == 0)
        assert list(np.flatnonzero(study.labels[:-1])) == [
            i for i, n in enumerate(findings.FINDINGS) if n in {f.name for f in study.found}
        ]


def test_logistic_regression_recovers_the_log_odds_model():
    """Each coefficient within four standard errors, and the risk factors shift the odds."""
    rows, labels = [], []
    for who in patients.population(9, 12000):
        rng = patients.stream(9, who.index, 0, "test")
        table = patients._before_disease(rng, who, 0)
        names = patients._draw_disease(rng, table)
        rows.append(list(patients.covariates(table).values()))
        labels.append([f in names for f in findings.FINDINGS])
    x, y = np.array(rows), np.array(labels)
    columns = list(patients.covariates(table))
    for i, finding in enumerate(findings.FINDINGS):
        fit = LogisticRegression(C=1e6, max_iter=1000).fit(x, y[:, i])
        p = fit.predict_proba(x)[:, 1]
        design = np.c_[np.ones(len(x)), x]
        errors = np.sqrt(np.diag(np.linalg.inv(design.T @ (design * (p * (1 - p))[:, None]))))
        truth = patients.LOG_ODDS[finding]
        for column, value, error in zip(columns, fit.coef_[0], errors[1:], strict=True):
            assert abs(value - truth.get(column, 0.0)) < 4 * error + 0.03, (finding, column)
            if abs(truth.get(column, 0.0)) > 0.5:
                assert np.sign(value) == np.sign(truth[column])
                assert abs(value) > 2 * error


def test_the_data_card_prints_the_log_odds_model():
    card = (resources.files(cxr_phantom) / "README.md").read_text(encoding="utf-8")
    columns = ("base", "age", "male", "smoking", "fever", "cough", "white_cells", "bnp")
    for finding, terms in patients.LOG_ODDS.items():
        cells = [f"{terms[c]:+.2f}" if c in terms else "" for c in columns]
        assert f"| {finding} | {' | '.join(cells)} |" in card
        assert set(terms) <= set(columns)


def test_values_are_missing_as_often_as_said_and_saturation_falls_with_disease():
    visits = [patients.visit(4, who, 0) for who in patients.population(4, 4000)]
    for column, share in patients.MISSING.items():
        gone = np.mean([math.isnan(v.table[column]) for v in visits])
        assert abs(gone - share) < 0.03, column
    sick = [v.table["oxygen_saturation"] for v in visits if "edema" in v.findings]
    well = [v.table["oxygen_saturation"] for v in visits if not v.findings]
    assert np.nanmean(sick) < np.nanmean(well) - 2


def test_patients_have_one_to_four_visits_and_keep_sex_and_smoking():
    visits = np.bincount([who.visits for who in patients.population(0, 2000)])
    assert len(visits) == 5
    assert visits[0] == 0
    assert visits[1:].min() > 50
    who = next(p for p in patients.population(0, 100) if p.visits == 4)
    tables = [patients.visit(0, who, n).table for n in range(4)]
    assert len({t["sex"] for t in tables}) == 1
    assert len({t["smoking"] for t in tables if not math.isnan(t["smoking"])}) == 1
