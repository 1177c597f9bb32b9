"""The benchmark of PRIMA: rows differ in what the paper's table says, finished cells are kept."""

import csv
import json
import pathlib

import numpy as np
import pytest

from benchmarks import methods_prima as bench
from medvlp_jax.config import UserError
from medvlp_jax.config import flatten as leaves
from medvlp_jax.evaluation import shuffle

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = "configs/prima.py:phantom"


def config_of(row, stage, fold=0, start="", overrides=()):
    return dict(
        leaves(bench.stage_config(row, stage, fold, start, "corpus", CONFIG, list(overrides)))
    )


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_the_rows_are_those_of_table_3():
    rows = {name: row for name, row in bench.ROWS.items() if row.last == "fuse"}
    assert [int(r.title.split(":")[0]) for r in rows.values()] == list(range(1, 10))
    assert [len(r.losses) for r in rows.values()] == [0, 0, 1, 2, 3, 4, 4, 4, 4]
    assert [r.knowledge for r in rows.values()] == [False, True, *[False] * 4, *[True] * 3]


def test_a_row_has_the_stages_its_ticks_say():
    assert bench.stages("prima") == ["inject", "align", "sharpen", "fuse"]
    assert bench.stages("labels") == ["sharpen", "fuse"]
    assert bench.stages("knowledge") == ["inject", "sharpen", "fuse"]
    assert bench.stages("loss_soft") == ["align", "sharpen", "fuse"]
    assert bench.stages("mlp") == ["mlp"]


@pytest.mark.parametrize("row", [r for r in bench.ROWS if r not in ("image", "mlp", "prima")])
def test_rows_differ_from_prima_in_the_recipe_of_align_alone(row):
    for stage in set(bench.stages(row)) - {"inject"}:
        ours, other = config_of("prima", stage), config_of(row, stage)
        changed = {key for key in ours if ours[key] != other[key]} - {"evals.controls"}
        assert all(key.startswith("recipe.") for key in changed)
        assert not changed or stage == "align"
        # A row without knowledge and with all losses differs in where it starts.
        assert changed or stage != "align" or row == "loss_soft"


def test_a_stage_starts_from_the_one_before_and_tests_on_its_fold():
    found = config_of("prima", "fuse", fold=3, start="there")
    assert found["init.params"] == "there"
    assert found["data.folds.index"] == 3
    assert found["data.folds.count"] == 5
    assert found["evals.split"] == "test"
    assert found["evals.controls"] == shuffle.CONTROLS
    assert config_of("prima", "align")["evals.protocols"] == ()
    assert config_of("prima", "sharpen")["evals.controls"] == ()
    inject = config_of("prima", "inject", overrides=["--config.optim.lr=1e-4"])
    assert inject["data.knowledge.folder"] == "corpus"
    assert inject["optim.lr"] == 1e-4


def cell(value, minutes=2.0):
    """Return a cell of one value everywhere, controls at half of it."""
    names = {"d": value, "d (shuffled images)": value / 2, "d (shuffled metadata)": value / 2}
    results = {
        f"classify/{task}/{metric}": {"value": v, "low": v, "high": v}
        for task, v in names.items()
        for metric in bench.METRICS
    }
    return {"results": results, "minutes": minutes}


def write_predictions(folder, seed, signal):
    truth = np.random.default_rng(0).integers(0, 2, 80)
    score = np.exp(np.random.default_rng(seed).normal(size=(80, 2)) + signal * np.eye(2)[truth])
    score /= score.sum(1, keepdims=True)
    folder.mkdir(parents=True)
    with (folder / "predictions.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("image_id", "patient_id", "truth", "a", "b"))
        for i, chances in enumerate(score):
            writer.writerow((f"i{i}", f"p{i // 2}", "ab"[truth[i]], *chances))


def test_differences_are_over_the_folds_both_have(tmp_path):
    rows = {
        "prima": {"0": cell(0.6), "1": cell(0.7)},
        "image": {"0": cell(0.5), "1": cell(0.5)},
        "mlp": {"0": cell(0.5)},
    }
    for row, signal in (("prima", 2.0), ("image", 0.0)):
        for fold in rows[row]:
            write_predictions(tmp_path / f"{row}-{fold}", int(fold), signal)
    found = bench.differences(rows, tmp_path, 0.25)
    assert found["image"]["folds"]["difference"] == pytest.approx(0.15)
    assert found["image"]["patients"]["low"] > 0
    assert found["shuffled images"]["folds"]["difference"] == pytest.approx(0.325)
    assert found["mlp"] == {"count": 1}  # one fold has no spread, and no predictions are here


def test_the_table_has_a_line_a_row_and_the_controls():
    rows = {"image": {"0": cell(0.5)}, "prima": {"0": cell(0.6), "1": cell(0.8)}}
    compared = {"image": {"patients": {"difference": 0.1, "low": -0.05, "high": 0.2, "p": 0.3}}}
    lines = bench.table(rows, compared).splitlines()
    assert lines[2].startswith("| images only | 1 | 0.500 |")
    assert lines[2].endswith("| +0.100 [-0.050, +0.200] |  | 2.0 |")
    assert lines[3].startswith("| 9: knowledge, all four (PRIMA) | 2 | 0.700 (0.141) |")
    assert lines[4].startswith("| PRIMA, shuffled images | 2 | 0.350 (0.071) |")
    assert len(lines) == 6


def test_a_corpus_without_a_risk_table_is_refused(tmp_path):
    with pytest.raises(UserError, match="No risk table for"):
        bench.write_corpus(tmp_path, "configs/prima.py:men")


def test_a_study_of_other_settings_shares_no_run_and_no_corpus(monkeypatch, tmp_path):
    trained, corpora = [], []

    def run(config, folder):
        trained.append(folder)
        write_predictions(folder, 0, 1.0)
        (folder / "results.json").write_text("{}")
        return cell(0.5)["results"]

    monkeypatch.setattr(bench.train, "run", run)
    monkeypatch.setattr(bench, "write_corpus", lambda out, config: corpora.append(out))

    def begin(out, *more):
        own = ("--rows=prima", f"--folder={tmp_path / 'runs'}", f"--out={tmp_path / out}")
        bench.main([*own, *more])
        return json.loads((tmp_path / out).read_text())

    found = begin("a.json", "--folds=2")
    assert [folder.name for folder in trained].count("inject") == 1  # for all folds
    begin("b.json", "--folds=1", "--config.optim.lr=0.05")
    begin("c.json", "--folds=1", "--config=configs/prima.py:derm")
    assert len({*trained}) == len(trained) == 7 + 4 + 4
    assert len({*corpora}) == 3
    # A file from before the recipe was written down is read, and goes on without.
    assert found["settings"].pop("recipe")
    (tmp_path / "a.json").write_text(json.dumps(found))
    assert begin("a.json", "--folds=3")["settings"] == found["settings"]
    assert [folder.parts[-2:] for folder in trained[15:]] == [
        ("prima-2", stage) for stage in bench.stages("prima")[1:]
    ]


def test_the_recipe_is_that_of_every_stage_and_takes_settings_of_one(monkeypatch):
    first = bench.recipe_of(CONFIG)
    resolve = bench.train.resolve

    def changed(arguments):
        config, workdir = resolve(arguments)
        if any(":align_" in word for word in arguments):
            config["recipe"]["weights"] = {**config["recipe"]["weights"], "soft": 0.123}
        return config, workdir

    monkeypatch.setattr(bench.train, "resolve", changed)
    assert bench.recipe_of(CONFIG) != first
