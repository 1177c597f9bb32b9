"""The table of every protocol: what is run for which cell, and how it is laid out."""

import argparse
import json
import pathlib

import pytest

from benchmarks import evaluation as bench
from medvlp_jax.config import UserError
from medvlp_jax.evaluation import detection, finetuning, segmentation

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Record the command lines of medvlp adapt; its results are made up."""
    lines = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(bench.adapt, "main", lines.append)
    entry = {"value": 0.5, "low": 0.4, "high": 0.6, "chance": 0.1, "protocol": "p", "hash": "h"}

    class Everything(dict):
        def __missing__(self, key):
            return {**entry, "key": key}

    found = argparse.Namespace(numbers=Everything())
    monkeypatch.setattr(bench.stored, "read", lambda folder: found)
    monkeypatch.setattr(bench.train, "run", lambda config, folder: lines.append(config))
    arguments = argparse.Namespace(folder=tmp_path, steps=7, only=list(bench.TITLES))
    return lines, bench.measure(arguments, [])


def test_both_methods_are_pretrained_alike(asked):
    lines, _ = asked
    configs = [line for line in lines if isinstance(line, dict)]
    assert [config["recipe"]["name"] for config in configs] == ["imitate", "clip"]
    for config in configs:
        assert config["train"]["steps"] == 7
        assert config["evals"]["probe"]["fractions"] == (0.01, 0.1, 1.0)
        assert config["evals"]["controls"] == ("untrained",)


def test_a_row_is_adapted_from_its_own_encoder(asked):
    lines, rows = asked
    commands = [" ".join(line) for line in lines if isinstance(line, list)]
    assert all("--stretch" in c.split() for c in commands)  # as the table in docs was measured
    assert len(commands) == 11  # three tasks of four rows, but the random row is not fine-tuned
    own = {row: [c for c in commands if f"/{row}-" in c] for row in rows}
    assert all("/imitate/export/image" in c and "--untrained" in c for c in own["random"])
    assert all("/clip/export/image" in c and "--untrained" not in c for c in own["clip"])
    trained = [c for c in commands if "--train-encoder" in c]
    assert {c.split()[0] for c in trained} == {"--task=segment", "--task=detect"}
    assert all("/supervised-" in c for c in trained)


def test_cells_are_those_of_their_row(asked):
    _, rows = asked
    assert rows["random"]["CNR"]["key"] == "grounding/cosine (untrained)/cnr"
    assert rows["clip"]["probe 1 %"]["key"] == "probe/finding_1%/macro_auroc"
    assert rows["random"]["Dice"]["key"] == "segment/regions (untrained)/dice"
    assert set(rows["supervised"]) == set(bench.ADAPTED)
    lines = bench.table(rows).splitlines()
    assert lines[0].endswith("| random weights | trained on the targets | guessing |")
    assert lines[2].endswith("| 0.500 [0.400, 0.600] |  | 0.100 |")
    assert len(lines) == 2 + len(bench.RUN_COLUMNS) + len(bench.ADAPTED)


def test_a_trained_encoder_is_looked_for_under_its_own_protocol(asked):
    _, rows = asked
    kind = lambda protocol: protocol.partition("@")[0]
    for column, protocols in (("Dice", segmentation.PROTOCOL), ("AP@.5", detection.PROTOCOL)):
        for row, cells in rows.items():
            key = cells[column]["key"]
            assert key.split("/")[0] == kind(protocols[row == "supervised"]), (row, column)
    assert rows["supervised"]["fine-tuned 100 %"]["key"].startswith(kind(finetuning.PROTOCOL))


def test_a_row_that_is_measured_alone_leaves_the_others(monkeypatch, tmp_path):
    entry = {"value": 0.5, "low": 0.4, "high": 0.6, "chance": 0.1}
    monkeypatch.setattr(
        bench, "measure", lambda asked, _: {row: {"Dice": entry} for row in asked.only}
    )
    out, begin = tmp_path / "all.json", [f"--folder={tmp_path / 'runs'}"]
    bench.main([*begin, f"--out={out}"])
    entry = {**entry, "value": 0.7}
    bench.main([*begin, f"--out={out}", "--only", "clip"])
    rows = json.loads(out.read_text())["rows"]
    assert {row: cells["Dice"]["value"] for row, cells in rows.items()} == {
        "imitate": 0.5,
        "clip": 0.7,
        "random": 0.5,
        "supervised": 0.5,
    }
    assert list(rows) == list(bench.TITLES)
    asked = [f"--folder={tmp_path / 'others'}", f"--out={out}", "--steps=7"]
    with pytest.raises(UserError, match=r"holds numbers of settings .*: name another --out"):
        bench.main(asked)
    assert not (tmp_path / "others").exists()


def test_runs_of_other_settings_are_not_taken_for_these(tmp_path):
    settings = {"pretraining_steps": 7, "adapting_steps": bench.LENGTHS, "overrides": []}
    for _ in range(2):
        bench.begin(tmp_path / "runs", settings)
    with pytest.raises(
        UserError, match=r"study.json holds numbers of settings .*: name another --folder"
    ):
        bench.begin(tmp_path / "runs", settings | {"pretraining_steps": 8})
