"""LGDEA end to end in small: relations are refreshed, act, and are there again after a stop."""

import json
import pathlib
import shutil

import pytest

from medvlp_jax import train

ROOT = pathlib.Path(__file__).parents[1]
TERMS = ("alignment", "global", "paired", "reconstruction", "relations", "unpaired", "usage")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.chdir(ROOT)
    patch.setenv("MEDVLP_DATA_DIR", str(tmp_path_factory.mktemp("data")))
    yield
    patch.undo()


def run(folder):
    train.run(*train.resolve(["--config=configs/lgdea.py:smoke", f"--workdir={folder}"]))
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: line[f"loss/{name}"] for name in TERMS} for line in lines if "loss" in line]


@pytest.mark.slow
def test_relations_act_after_the_first_refresh_and_a_stopped_run_repeats_them(
    home, tmp_path, capsys
):
    whole = run(tmp_path / "whole")
    # Steps 1-4 are before the first refresh: no unpaired image has a relation.
    assert [terms["unpaired"] for terms in whole[:4]] == [0.0] * 4
    assert all(terms["unpaired"] > 0 for terms in whole[4:])
    assert json.loads((tmp_path / "whole" / "results.json").read_text())
    # As if the run had ended right after saving step 4, where the next thing is a refresh.
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "8")
    capsys.readouterr()
    assert run(tmp_path / "again") == whole
    assert f"Resuming {tmp_path / 'again'} at step 4\n" in capsys.readouterr().out
