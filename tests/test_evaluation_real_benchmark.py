"""The table of real images and the profile of a large evaluation: nothing is trained here."""

import argparse
import json
import pathlib
import threading
import time

import pytest

from benchmarks import evaluation_real as real
from benchmarks import evaluation_scale as scale
from medvlp_jax.config import UserError
from medvlp_jax.data import corpora

ROOT = pathlib.Path(__file__).parents[1]


class Everything(dict):
    """Numbers of any key, which remember their key."""

    def __missing__(self, key):
        return {"value": 0.5, "low": 0.4, "high": 0.6, "chance": 0.1, "key": key}


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Record configs trained and command lines of medvlp adapt; their results are made up."""
    lines, trained = [], {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(real.adapt, "main", lines.append)
    monkeypatch.setattr(real.train, "run", lambda config, at: trained.update({at.name: config}))
    made_up = argparse.Namespace(numbers=Everything())
    monkeypatch.setattr(real.stored, "read", lambda folder: made_up)
    names = [*real.RUNS, *real.ADAPTED]
    options = {"folder": tmp_path, "sources": tmp_path / "all", "seeds": "0,1", "only": names}
    arguments = argparse.Namespace(**options)
    return lines, trained, real.measure(arguments)


def test_runs_are_those_of_the_configs_on_the_sources(asked, tmp_path):
    _, trained, _ = asked
    assert {name: config["data"]["corpora"] for name, config in trained.items()} == {
        "radiology": ("radiology_qa",),
        "pairs": ("cxr_pairs",),
        "icu": ("cxr_tabular",),
    }
    for name, config in trained.items():
        assert config["data"]["manual_dir"] == str(tmp_path / "all" / real.SAID[name])
        assert "untrained" in config["evals"]["controls"]
    assert trained["icu"]["recipe"]["num_classes"] == 2
    assert trained["pairs"]["evals"]["protocols"][2] == "grounding"


def test_each_head_has_its_untrained_twin(asked, tmp_path):
    lines, _, _ = asked
    assert len(lines) == 2 * len(real.ADAPTED)
    assert all("--stretch" in line for line in lines)  # as the table in docs was measured
    for with_weights, without in zip(lines[::2], lines[1::2], strict=True):
        assert {*without} - {*with_weights} >= {"--untrained"}
        assert "--seeds=0,1" in with_weights
        assert f"--encoder={tmp_path / 'radiology/export/image'}" in with_weights
    (skin,) = (line for line in lines[::2] if "--corpus=ham10000" in line)
    assert f"--manual-dir={tmp_path / 'all/derm_tabular'}" in skin


def test_a_control_stands_in_the_line_of_its_number(asked):
    _, _, lines = asked
    assert len(lines) == len(real.ROWS)
    for line in lines:
        trained = line["trained"]["key"]
        assert "(" not in trained or trained.startswith("regression/")
        for name, control in ((real.UNTRAINED, real.UNTRAINED), ("other", line["control"])):
            if name in line:
                task = line[name]["key"].replace(f" ({control})", "")
                assert task == trained
                assert f"({control})" in line[name]["key"]
    text = real.table(lines).splitlines()
    assert len(text) == 2 + len(lines)
    assert all(line.count("|") == 7 for line in text)


def test_lines_that_are_measured_alone_leave_the_others(asked, monkeypatch, tmp_path):
    _, _, lines = asked
    out, kept = tmp_path / "real.json", [line for line in lines if line["title"] != "tumour, FROC"]
    settings = {"seeds": "0,1", "overrides": []}
    out.write_text(json.dumps({"settings": settings, "lines": kept}))
    again = ["--sources=all", f"--folder={tmp_path / 'runs'}", f"--out={out}", "--only"]
    real.main([*again, "lungs", "boxes", "--seeds=0,1"])
    found = json.loads(out.read_text())["lines"]
    assert [(line["of"], line["title"]) for line in found] == [
        (line["of"], line["title"]) for line in lines
    ]
    with pytest.raises(UserError, match=r"holds numbers of settings .*: name another --out"):
        real.main([*again, "lungs", "--seeds=0,1,2"])


def test_a_profile_counts_where_the_watched_thread_is():
    watch = scale.Watch(threading.get_ident())
    watch.start()
    while len(watch.looks) < 3:
        time.sleep(scale.EVERY)
    watch.done.set()
    watch.join()
    assert {where for where, _ in watch.looks} == {"outside"}  # this test is none of the package
    held = [held for _, held in watch.looks]
    assert min(held) > 10 * 2**20

    features = f"{scale.FEATURES}: collect"
    looks = [("outside", 900 * 2**20), *((features, k * 2**20) for k in range(101))]
    looks += [("evaluation/statistics.py: resample", 50 * 2**20)] * 2
    found = scale.profile(looks)
    assert found["share"][features] == pytest.approx(101 / 104)
    assert found["MiB_by_tenths_of_the_images"] == [*range(0, 101, 10)]
    assert found["peak_MiB"] == 900
    assert scale.table(found).splitlines()[2] == f"| {features} | 0.971 |"


def test_the_source_folder_is_one_of_chestxray14(tmp_path):
    folder = scale.make_corpus(tmp_path, images=7, different=2)
    assert scale.make_corpus(tmp_path, images=7, different=2) == folder  # and is not made again
    found = corpora.open_all(
        "nih_cxr14", data_dir=tmp_path / "data", manual_dir=folder, builder_config="official"
    )
    counted = {source.split: len(source) for source in found}
    assert counted["test"] == 7
    assert sum(counted.values()) == 10
