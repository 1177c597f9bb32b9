"""Limited pairing: shares, pools, patients, and rows that are a function of their number."""

import numpy as np
import pytest

from medvlp_jax.config import UserError
from medvlp_jax.data import pairing

PATIENTS = [f"p{i}" for i in range(40) for _ in range(1 + i % 3)]  # 79 studies


class Corpus:
    """Records that say which study they are."""

    metadata = {"table": None}  # noqa: RUF012

    def __len__(self):
        return len(PATIENTS)

    def __getitem__(self, i):
        texts = {"findings": f"findings {i}", "impression": "", "text_id": f"t{i}"}
        return {"image": i, "patient_id": PATIENTS[i], "labels": {"x": i}, **texts}


def pools(ratio=0.3, variant="disjoint", seed=0):
    return pairing.split(PATIENTS, ratio=ratio, variant=variant, seed=seed)


def owners(rows):
    return {PATIENTS[i] for i in rows}


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.3, 0.5])
@pytest.mark.parametrize("variant", pairing.VARIANTS)
def test_the_share_of_pairs_is_met_by_whole_patients(ratio, variant):
    found = pools(ratio, variant)
    assert ratio * 79 <= len(found.pairs) < ratio * 79 + 3  # a patient has at most three studies
    rest = set(range(79)) - set(found.pairs)
    assert not owners(found.pairs) & owners(rest)


def test_disjoint_pools_share_no_patient_and_lose_no_study():
    found = pools()
    count = len(found.pairs)
    images, reports = found.images[count:], found.reports[count:]
    assert not owners(images) & owners(reports)
    assert sorted([*found.pairs, *images, *reports]) == list(range(79))
    assert abs(len(images) - len(reports)) < 15


def test_shuffled_pools_hold_every_other_study_twice():
    found = pools(variant="shuffled")
    count = len(found.pairs)
    assert sorted([*found.pairs, *found.images[count:]]) == list(range(79))
    assert found.images.tolist() == found.reports.tolist()


def test_pools_begin_with_the_pairs_and_follow_the_seed():
    found = pools()
    count = len(found.pairs)
    assert found.images[:count].tolist() == found.reports[:count].tolist() == found.pairs.tolist()
    assert pools().images.tolist() == found.images.tolist()
    assert pools(seed=1).pairs.tolist() != found.pairs.tolist()


def test_a_smaller_share_is_part_of_a_larger_one():
    assert set(pools(0.1).pairs) < set(pools(0.3).pairs)


def test_all_pairs_leave_nothing_apart():
    found = pools(1.0)
    assert len(found.pairs) == len(found.images) == len(found.reports) == 79
    assert len(pairing.Unpaired(Corpus(), found, 0)) == 0


def test_rows_of_pairs_are_pairs():
    found = pools()
    source = pairing.Pairs(Corpus(), found)
    for k in range(len(source)):
        row = source[k]
        assert row["paired"]
        assert row["findings"] == f"findings {row['image']}"
        assert row["image_row"] == row["report_row"] == k
        assert found.images[k] == row["image"]


@pytest.mark.parametrize("variant", pairing.VARIANTS)
def test_other_rows_are_images_and_reports_of_their_pools(variant):
    found = pools(variant=variant)
    source, count = pairing.Unpaired(Corpus(), found, 0), len(found.pairs)
    met = {}
    for k in range(len(source)):
        row = source[k]
        assert not row["paired"]
        assert "labels" not in row  # they would be the image's and not the report's
        assert min(row["image_row"], row["report_row"]) >= count
        assert found.images[row["image_row"]] == row["image"]
        assert row["findings"] == f"findings {found.reports[row['report_row']]}"
        met.setdefault(row["image"], set()).add(row["findings"])
    assert set(met) == set(found.images[count:])
    # Every image meets many reports: what a row joins is no pair.
    assert min(map(len, met.values())) > 5
    assert source[5] == pairing.Unpaired(Corpus(), found, 0)[5]


def test_every_report_comes_in_every_round():
    found = pools()
    source, count = pairing.Unpaired(Corpus(), found, 0), len(found.pairs)
    per_round = len(source) // pairing.ROUNDS
    seen = {source[k]["report_row"] for k in range(3 * per_round, 4 * per_round)}
    assert seen == set(range(count, len(found.reports)))


def test_what_cannot_be_is_refused_by_name():
    with pytest.raises(UserError, match=r"ratio .* got 0"):
        pools(ratio=0)
    with pytest.raises(UserError, match="disjoint or shuffled, got 'mixed'"):
        pools(variant="mixed")
    assert len(pools(1e-9).pairs) >= 1


def test_a_share_of_the_reports_is_drawn_from_those_an_image_is_related_to():
    found, related = pools(), pairing.Related()
    pairs, images, reports = len(found.pairs), len(found.images), len(found.reports)
    rows = pairing.Unpaired(Corpus(), found, 0, 0.5, related)
    before = [rows[k]["report_row"] for k in range(500)]
    # Every image is related to a pair's report, to the first and, thrice as much, to the last.
    column = np.tile([0, pairs, reports - 1], (images, 1))
    weight = np.tile([0.2, 0.2, 0.6], (images, 1))
    confidence = np.ones(images)
    confidence[pairs] = 0
    related.learn(column, weight, confidence)
    after = [rows[k] for k in range(500)]
    changed = [k for k in range(500) if after[k]["report_row"] != before[k]]
    assert {after[k]["report_row"] for k in changed} == {pairs, reports - 1}
    assert {after[k]["image_row"] for k in changed} == {*range(pairs + 1, images)}
    assert 0.4 < len(changed) / 500 < 0.55
    last = sum(after[k]["report_row"] == reports - 1 for k in changed) / len(changed)
    assert 0.65 < last < 0.85
    assert [rows[k]["report_row"] for k in range(500)] == [r["report_row"] for r in after]
    texts = {row["report_row"]: row["findings"] for row in after}
    assert texts[reports - 1] == f"findings {found.reports[-1]}"
