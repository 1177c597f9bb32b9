"""Folds as one table: mean and sample standard deviation, nothing that was measured otherwise."""

import json

import numpy as np
import pytest

from medvlp_jax.config import UserError
from medvlp_jax.evaluation import folds

STAMP = {"protocol": "classify@v1", "hash": "x"}
REST = {"low": None, "high": None, "n": 9, "chance": None}


def write(folder, *, numbers=None, hash="x", notes=None, **values):
    folder.mkdir()
    stamp = STAMP | {"hash": hash}
    values |= numbers or {}
    entries = {f"classify/diagnosis/{k}": {"value": v, **REST, **stamp} for k, v in values.items()}
    entries["classify/diagnosis/protocol"] = {**stamp, "settings": {}, **(notes or {})}
    (folder / "results.json").write_text(json.dumps(entries))
    return folder


def test_mean_and_standard_deviation_are_those_of_the_sample(tmp_path, capsys):
    runs = [
        write(tmp_path / str(i), macro_f1=v, accuracy=0.5) for i, v in enumerate((0.6, 0.7, 0.9))
    ]
    folds.main([*map(str, runs), "--out", str(tmp_path / "all.json")])
    found = json.loads((tmp_path / "all.json").read_text())
    assert set(found) == {"classify/diagnosis/macro_f1", "classify/diagnosis/accuracy"}
    entry = found["classify/diagnosis/macro_f1"]
    np.testing.assert_allclose(entry["mean"], np.mean([0.6, 0.7, 0.9]))
    np.testing.assert_allclose(entry["sd"], np.std([0.6, 0.7, 0.9], ddof=1))
    assert entry["values"] == [0.6, 0.7, 0.9]
    assert "macro_f1  0.733 (0.153)" in capsys.readouterr().out


def test_one_run_has_no_spread_and_a_number_one_run_lacks_is_left_out(tmp_path):
    one = write(tmp_path / "a", macro_f1=0.5)
    assert folds.summarise(folds.read([one]))["classify/diagnosis/macro_f1"]["sd"] is None
    two = write(tmp_path / "b", macro_f1=None)
    assert folds.summarise(folds.read([one, two])) == {}


def test_runs_that_were_not_or_otherwise_evaluated_are_refused(tmp_path):
    one = write(tmp_path / "a", macro_f1=0.5)
    with pytest.raises(UserError, match=r"has no results.json"):
        folds.read([one, tmp_path / "b"])
    other = write(tmp_path / "c", macro_auroc=0.5)
    with pytest.raises(UserError, match="macro_auroc"):
        folds.read([one, other])
    more = write(tmp_path / "d", macro_f1=0.5, accuracy=0.5)
    with pytest.raises(UserError, match=r"d has 'classify/diagnosis/accuracy', and .*a has not"):
        folds.read([more, one])  # the first has it
    settings = write(tmp_path / "e", macro_f1=0.5, hash="y")
    with pytest.raises(UserError, match=r"e has .*macro_f1' of classify@v1 #y, and .*a of .* #x"):
        folds.read([one, settings])


@pytest.mark.parametrize(
    ("lacking", "notes"),
    [
        ("auroc/edema", {"skipped": ["edema"]}),
        ("f1_at_threshold/edema", {"without_threshold": ["edema"]}),
        ("macro_auroc", {"undefined": ["macro_auroc"]}),
    ],
)
def test_what_a_fold_says_it_cannot_compute_is_left_out(tmp_path, lacking, notes):
    whole = write(tmp_path / "a", accuracy=0.5, numbers={lacking: 0.5})
    part = write(tmp_path / "b", accuracy=0.7, notes=notes)
    for runs in ([whole, part], [part, whole]):
        assert [*folds.summarise(folds.read(runs))] == ["classify/diagnosis/accuracy"]
