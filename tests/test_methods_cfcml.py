"""The benchmark of CFCML: rows differ in the recipe alone, finished ones are kept."""

import argparse
import csv
import json
import pathlib

import numpy as np
import pytest

from benchmarks import methods_cfcml as bench
from medvlp_jax import checks
from medvlp_jax.config import UserError
from medvlp_jax.config import flatten as leaves

ROOT = pathlib.Path(__file__).parents[1]


def write_predictions(file, seed, signal):
    """Sixty cases of two rows a patient; class 2 never occurs."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 120)
    noise = np.random.default_rng(seed).normal(size=(120, 3))
    score = np.exp(noise + signal * np.eye(3)[truth])
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("image_id", "patient_id", "truth", "a", "b", "c"))
        for i in range(120):
            writer.writerow((f"i{i}", f"p{i // 2}", "ab"[truth[i]], *(score[i] / score[i].sum())))


def test_rows_differ_from_one_another_in_the_recipe_alone(monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = argparse.Namespace(config="configs/cfcml.py:derm", steps=5, folds=0)
    full, *others = (dict(leaves(bench.row_config(r, arguments, [], 3))) for r in bench.ROWS)
    assert full["seed"] == 3
    assert full["data.folds.count"] == 0
    assert full["train.steps"] == 5
    for other in others:
        changed = {key for key in full if full[key] != other[key]}
        assert changed
        assert {key.split(".")[0] for key in changed} == {"recipe"}


def test_rows_of_published_settings_report_their_last_step(monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = argparse.Namespace(config="configs/cfcml.py:derm7pt", steps=0, folds=0)
    full, table = (bench.row_config(row, arguments, [], 0) for row in ("full", "table"))
    for config in (full, table):
        checks.settings(config)
        assert not config["train"]["select"]
    assert full["init"]["image"]
    assert full["optim"]["multipliers"]
    assert not table["init"]["image"]  # there is nothing to put them in
    assert not table["optim"]["multipliers"]


def test_a_difference_is_paired_and_averaged_over_seeds(tmp_path):
    for row, signal in (("full", 2.0), ("late", 0.5)):
        for seed in (0, 1):
            write_predictions(tmp_path / f"{row}-{seed}.0/predictions.csv", seed, signal)
    write_predictions(tmp_path / "regression-0.0/predictions-table-and-pixels.csv", 7, 0.0)
    runs = {"0.0": {}, "1.0": {}}
    rows = {"full": runs, "late": runs, "regression: table and pixels": {"0.0": {}}}
    found = bench.differences(rows, tmp_path, 200)
    assert list(found) == ["late", "regression: table and pixels"]
    late = found["late"]
    assert late["low"] <= late["difference"] <= late["high"]
    assert late["low"] > 0


def test_the_table_has_a_line_a_row_and_the_difference():
    entry = {"value": 0.5, "low": 0.4, "high": 0.6}
    results = {f"classify/d/{metric}": entry for metric in bench.METRICS}
    rows = {name: {"0.0": {"results": results, "minutes": 2.0}} for name in ("full", "late")}
    compared = {"late": {"difference": 0.1, "low": -0.05, "high": 0.2, "p": 0.3}}
    lines = bench.table(rows, compared, "d").splitlines()
    assert lines[2].startswith("| late concatenation | 0.500 [0.400, 0.600] |")
    assert lines[2].endswith("| +0.100 [-0.050, +0.200] | 2.0 |")
    assert lines[3].startswith("| CFCML | ")
    entry |= {"low": None, "high": None}  # the same in all resamples
    lines = bench.table(rows, compared, "d").splitlines()
    assert lines[2].startswith("| late concatenation | 0.500 | 0.500 |")


@pytest.fixture
def study(monkeypatch, tmp_path):
    """Return a way to begin a study in one folder, and the folders in which it trains."""
    monkeypatch.chdir(ROOT)
    entry = {
        f"classify/diagnosis/{m}": {"value": 0.5, "low": 0.4, "high": 0.6} for m in bench.METRICS
    }
    trained = []

    def run(config, folder):
        trained.append(folder)
        write_predictions(folder / "predictions.csv", len(trained), 1.0)
        return entry

    monkeypatch.setattr(bench.train, "run", run)
    monkeypatch.setattr(
        bench.paired, "compare", lambda *_, **__: dict.fromkeys(("difference", "low", "high"), 0.0)
    )

    def begin(out, *more):
        rows = ("--rows", "late", "full", f"--folder={tmp_path / 'runs'}")
        bench.main(["--steps=40", *rows, f"--out={tmp_path / out}", *more])
        return json.loads((tmp_path / out).read_text())

    return begin, trained


def test_a_study_of_other_settings_trains_in_a_folder_of_its_own(study):
    begin, trained = study
    for out, more in (("a.json", ()), ("b.json", ("--config.optim.lr=0.05",))):
        begin(out, *more)
    assert len({*trained}) == 4  # else the second study would go on with the first one's runs
    begin("a.json", "--seeds=2")
    first, later = trained[:2], trained[4:]
    assert [folder.parent for folder in later] == [folder.parent for folder in first]


def test_rows_say_of_which_recipe_they_are_and_older_ones_are_added_to(
    study, monkeypatch, tmp_path
):
    begin, trained = study
    found = begin("a.json")
    assert found["settings"]["recipe"]
    older = {**found, "settings": {k: v for k, v in found["settings"].items() if k != "recipe"}}
    (tmp_path / "b.json").write_text(json.dumps(older))
    added = begin("b.json", "--seeds=2")
    assert added["settings"] == older["settings"]  # what those rows were is not known
    assert set(added["rows"]["full"]) == {"0.0", "1.0"}
    assert added["differences"]["late"]
    resolve = bench.train.resolve

    def changed(arguments):
        config, workdir = resolve(arguments)
        config["recipe"]["dropout"] = 0.123
        return config, workdir

    monkeypatch.setattr(bench.train, "resolve", changed)
    with pytest.raises(UserError, match="holds numbers of settings"):
        begin("a.json", "--seeds=2")
    assert len(trained) == 4
