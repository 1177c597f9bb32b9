"""Folds as one table: mean and sample standard deviation, nothing that was measured otherwise."""

import json

import numpy as np
import pytest

from medvlp_jax.config import UserError
from medvlp_jax.evaluation import folds

STAMP = {"protocol": "classify@v1", "hash": "x"}
REST = {"low": None, "high": None, "n": 9, "chance": None}


def write(folder, **values):
    folder.mkdir()
    entries = {f"classify/diagnosis/{k}": {"value": v, **REST, **STAMP} for k, v in values.items()}
    entries["classify/diagnosis/protocol"] = {**STAMP, "settings": {}}
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
