"""The study of few pairs: what arms differ in, cells that are kept, the table and the curve."""

import argparse
import json
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from benchmarks import lgdea_tables
from benchmarks import methods_lgdea as bench
from configs import lgdea
from medvlp_jax import convert
from medvlp_jax.config import UserError, flatten, to_json
from medvlp_jax.evaluation import results
from medvlp_jax.recipes import sclip

ROOT = pathlib.Path(__file__).parents[1]

ARGUMENTS = ("--ratios", "0.01", "1", "--seeds", "2", "--steps", "5", "--start", "none")
SMOKE = ("--config=configs/lgdea.py:smoke", "--ratios", "0.3", "--seeds", "1", "--arms", "lgdea")
SMOKE += ("--start", "none")
DRAW = bench.draw


@pytest.fixture(autouse=True)
def home(monkeypatch):
    monkeypatch.chdir(ROOT)


def config_of(arm, ratio=0.05):
    arguments = argparse.Namespace(config="configs/lgdea.py:study", steps=5)
    return dict(flatten(bench.cell_config(arm, ratio, 3, arguments, [])))


def test_arms_differ_from_lgdea_in_what_they_say_and_nothing_else():
    full = config_of("lgdea")
    assert (full["seed"], full["data.pairing.ratio"], full["train.steps"]) == (3, 0.05, 5)
    controls = "evals.controls"
    changed = {
        arm: {k for k, value in config_of(arm).items() if full.get(k) != value} - {controls}
        for arm in bench.ARMS
    }
    assert changed["lgdea"] == set()
    assert changed["no_unpaired"] == {"data.pairing.share", "train.refresh_every"}
    off = {f"recipe.weights.{name}" for name in ("reconstruction", "paired", "unpaired")}
    off |= {f"recipe.weights.{name}" for name in ("alignment", "relations", "global_relations")}
    off |= {"recipe.meets", "evals.zero_shot.by_rules"}
    assert changed["pairs"] == changed["no_unpaired"] | off
    assert all(changed[arm] for arm in bench.ARMS if arm != "lgdea")
    # Another recipe in the same network, on the same rows, at the control's temperature.
    weights = {f"recipe.weights.{name}" for name in sclip.TERMS}
    own = {"recipe.name", "optim.freeze", "data.evidence.pack", "train.refresh_every"}
    assert changed["sclip"] == weights | own | {"evals.zero_shot.by_rules"}
    assert "recipe.lesions" not in config_of("sclip")
    assert config_of("sclip")["optim.freeze"] == ("^log_scale$",)
    for arm in bench.ARMS:  # equal compute: rows, steps, network
        same = ("train.batch_size", "train.steps", "recipe.image.depths", "recipe.lesions")
        assert not changed[arm] & {*same}


def test_the_start_of_the_images_is_told_by_no_report():
    """In a study of few pairs it must not know which reports belong to images apart."""
    recipe = lgdea.get_config("views").recipe
    assert recipe.kernel == "none"
    assert recipe.weights.impression == recipe.weights.findings == 0


def fake_run(calls):
    """Return a training that scores better the more pairs, and more with LGDEA."""

    def run(config, folder):
        calls.append(folder.name)
        folder.mkdir(parents=True)
        (folder / "checkpoints").mkdir()
        lines = [{"step": k, "loss/usage": 0.9 if k == 1 else 0.2} for k in range(1, 21)]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        ratio, is_full = config["data"]["pairing"]["ratio"], config["train"]["refresh_every"] > 0
        value = 0.6 + 0.1 * np.log10(ratio) + 0.05 * is_full * (ratio < 1) + 0.002 * config["seed"]
        found = {metric: {"value": value} for metric in bench.METRICS}
        if is_full:
            found["grounding/cosine (untrained)/cnr"] = {"value": 0.1}
        return found | {"grounding/cosine/miou": {"value": 1.0}, "probe/finding/x": {"value": 1.0}}

    return run


@pytest.fixture
def study(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(bench.train, "run", fake_run(calls))
    monkeypatch.setattr(bench, "draw", lambda cells, out_png: None)
    out = tmp_path / "lgdea.json"
    begin = lambda *more: bench.main(
        [*ARGUMENTS, f"--out={out}", f"--folder={tmp_path / 'runs'}", *more]
    )
    return begin, calls, out


def test_a_finished_cell_is_kept_and_never_run_again(study, monkeypatch):
    begin, calls, out = study
    whole = bench.train.run

    def break_off(config, folder):
        if len(calls) == 5:
            raise KeyboardInterrupt
        return whole(config, folder)

    monkeypatch.setattr(bench.train, "run", break_off)
    with pytest.raises(KeyboardInterrupt):
        begin()
    assert len(json.loads(out.read_text())["cells"]) == 5
    monkeypatch.setattr(bench.train, "run", whole)
    begin()
    assert len(calls) == len(set(calls)) == 2 * (3 + 2)  # with all pairs nothing is apart
    assert [name.rpartition("-")[0] for name in calls[:3]] == [
        *("pairs-0.01-0", "no_unpaired-0.01-0", "lgdea-0.01-0")
    ]
    cells = json.loads(out.read_text())["cells"]
    assert cells["lgdea/0.01/1"]["usage_entropy"] == pytest.approx(0.8)
    assert set(cells["pairs/1/0"]["results"]) == set(bench.METRICS)
    assert not list(out.parent.glob("runs/*/checkpoints"))
    with pytest.raises(UserError, match="holds numbers of settings"):
        begin("--config.recipe.hops=2")


def test_two_processes_share_a_study_by_its_seeds(study):
    begin, calls, _ = study
    begin("--first-seed", "3", "--ratios", "0.01", "--arms", "lgdea")
    assert [name.rpartition("-")[0] for name in calls] == ["lgdea-0.01-3", "lgdea-0.01-4"]


def test_all_cells_start_from_one_encoder_trained_once(study, monkeypatch, tmp_path):
    begin, calls, _ = study
    cell, starts = bench.train.run, []

    def run(config, folder):
        if folder.name != "views":
            starts.append(config["init"]["image"])
            return cell(config, folder)
        assert config["recipe"]["weights"]["findings"] == 0
        assert config["data"]["data_dir"] == "elsewhere"
        calls.append("views")
        (folder / "export" / "image").mkdir(parents=True)
        (folder / "config.json").write_text(to_json(config))
        return {}

    monkeypatch.setattr(bench.train, "run", run)
    data = "--config.data.data_dir=elsewhere"
    for seeds in ("1", "2"):
        begin("--start", "views", "--seeds", seeds, "--ratios", "0.01", data)
    assert calls.count("views") == 1
    assert calls[0] == "views"
    image = tmp_path / "runs" / "views" / "export" / "image"
    assert starts == [str(image)] * 6
    # Cells that began elsewhere are no cells of this study, nor is what had other settings.
    (image / "model.safetensors").write_bytes(b"others")
    with pytest.raises(UserError, match="holds numbers of settings"):
        begin("--start", "views", "--seeds", "2", "--ratios", "0.01", data)
    made = json.loads((image.parents[1] / "config.json").read_text())
    made["train"]["steps"] += 1
    (image.parents[1] / "config.json").write_text(json.dumps(made))
    with pytest.raises(UserError, match="holds an encoder of other settings"):
        begin("--start", "views", "--seeds", "2", "--ratios", "0.01", data)


def test_cells_that_were_kept_are_scored_on_other_images(study, monkeypatch):
    begin, calls, out = study
    other = out.with_name("other.json")
    again = ("--corpus", "cxr_phantom:tiny", "--split", "train", f"--out={other}")
    begin()
    with pytest.raises(UserError, match="has no checkpoints: train that cell with --keep"):
        begin(*again)
    out.unlink()
    shutil.rmtree(out.parent / "runs")
    begin("--keep")
    trained, asked = len(calls), []

    def evaluate(argv):
        asked.append(dict(zip(argv[::2], argv[1::2], strict=True)))
        folder = pathlib.Path(asked[-1]["--out"])
        folder.mkdir()
        stamp = {"protocol": "any@v1", "hash": "0"}
        found = {
            metric: results.number(0.25, 0.2, 0.3, n=1, chance=0.0) | stamp
            for metric in bench.METRICS
        }
        (folder / "results.json").write_text(json.dumps(found | {"provenance": {}}))

    monkeypatch.setattr(bench.evaluate, "main", evaluate)
    begin(*again)
    begin(*again)
    assert (len(calls), len(asked)) == (trained, 10)
    assert {(a["--corpus"], a["--split"]) for a in asked} == {("cxr_phantom:tiny", "train")}
    assert {a["--run"] for a in asked} == {*map(str, out.parent.glob("runs/*"))}
    saved = json.loads(other.read_text())
    assert saved["settings"]["corpus"] == "cxr_phantom:tiny"
    cell = saved["cells"]["lgdea/0.01/1"]
    assert cell["results"]["grounding/cosine/cnr"]["value"] == 0.25
    assert cell["usage_entropy"] == pytest.approx(0.8)
    with pytest.raises(UserError, match="holds numbers of settings"):
        begin(*again[:4], f"--out={out}")


def test_the_kept_start_fits_the_study_and_is_told_from_others(study, monkeypatch):
    begin, _, out = study
    cell, starts = bench.train.run, set()

    def run(config, folder):
        starts.add(config["init"]["image"])
        return cell(config, folder)

    monkeypatch.setattr(bench.train, "run", run)
    begin("--start", "kept", "--seeds", "1", "--keep")
    assert starts == {str(bench.KEPT)}
    assert len(list(out.parent.glob("runs/*/checkpoints"))) == 5
    settings = json.loads(out.read_text())["settings"]
    assert settings["start"] == "views"
    assert settings["weights"] == bench.weights_of(str(bench.KEPT)) != ""
    module, _ = convert.load(bench.KEPT)
    sizes = {key: lgdea.STUDY_IMAGE[key] for key in ("hidden_sizes", "depths")}
    assert {key: tuple(getattr(module, key)) for key in sizes} == sizes
    with pytest.raises(UserError, match=r"has seen data\.size=88, not 96: --start views"):
        begin("--start", "kept", "--config.data.size=96", f"--out={out.with_name('other.json')}")
    # A config that has changed under its name is another study, too.
    monkeypatch.setattr(bench, "ARMS", {**bench.ARMS, "lgdea": ("", {"recipe": {"hops": 2}})})
    with pytest.raises(UserError, match="holds numbers of settings"):
        begin("--start", "kept", "--seeds", "1")


def test_the_table_says_what_was_gained_and_how_much_of_the_way_that_is(study, capsys):
    begin, _, out = study
    begin()
    assert capsys.readouterr().out.count("of 10: ") == 10
    lines = out.with_suffix(".md").read_text().splitlines()
    assert lines[2].startswith("| 1% | pairs alone, global InfoNCE | 0.401 ± 0.001 |")
    assert lines[2].split(" | ")[-3:-1] == ["-", "2"]  # usage, seeds; minutes come last
    assert lines[4].startswith("| 1% | LGDEA | 0.451 ± 0.001 |")
    assert lines[5].startswith("| 1% | LGDEA, untrained | - | - | - | - | - | 0.100 ± 0.000 |")
    assert lines[-6].startswith("| 1% | pairs alone, global InfoNCE | +0.050 ± 0.000 |")
    # (0.451 - 0.401) / (0.601 - 0.401) of the way.
    assert "* 1%: zero-shot macro AUROC +25%" in lines[-1]
    DRAW(json.loads(out.read_text())["cells"], out.with_suffix(".png"))
    assert min(Image.open(out.with_suffix(".png")).size) > 600


def test_a_way_shorter_than_the_spread_has_no_share():
    metric = next(iter(bench.METRICS))
    at = {("pairs", 0.05): (0.37, 0.43), ("pairs", 1): (0.38, 0.44), ("lgdea", 0.05): (0.45, 0.45)}
    cells = {
        f"{arm}/{ratio:g}/{seed}": {"results": {metric: {"value": value}}}
        for (arm, ratio), values in at.items()
        for seed, value in enumerate(values)
    }
    assert np.isnan(lgdea_tables.gap_closed(cells, 0.05, metric))
    for seed, value in enumerate((0.57, 0.63)):
        cells[f"pairs/1/{seed}"]["results"][metric]["value"] = value
    assert lgdea_tables.gap_closed(cells, 0.05, metric) == pytest.approx(0.25)


def test_bars_are_as_long_as_the_spread_of_the_table(monkeypatch, tmp_path):
    metric, values, figures = next(iter(bench.METRICS)), (0.5, 0.6, 0.8), []
    cells = {
        f"lgdea/0.05/{seed}": {"results": {metric: {"value": value}}}
        for seed, value in enumerate(values)
    }
    monkeypatch.setattr(lgdea_tables.plots, "save", lambda figure, out_png: figures.append(figure))
    DRAW(cells, tmp_path / "curve.png")
    (bar,) = figures[0].axes[0].containers[0].lines[2][0].get_segments()
    assert np.ptp(bar[:, 1]) / 2 == pytest.approx(np.std(values, ddof=1))


def test_a_collapse_is_said(study, monkeypatch, capsys):
    begin, _, _ = study
    monkeypatch.setattr(bench, "usage_entropy", lambda file: 0.3)
    begin("--arms", "pairs", "lgdea")
    assert capsys.readouterr().out.count("WARNING: prototypes collapsed, usage 0.30") == 2


@pytest.mark.slow
def test_one_cell_runs_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDVLP_DATA_DIR", str(tmp_path / "data"))
    out = tmp_path / "lgdea.json"
    bench.main([*SMOKE, f"--out={out}", f"--folder={tmp_path / 'runs'}"])
    cell = json.loads(out.read_text())["cells"]["lgdea/0.3/0"]
    assert {*bench.METRICS} <= {*cell["results"]}
    assert 0 < cell["usage_entropy"] <= 1
    assert list(tmp_path.glob("runs/lgdea-0.3-0-*/grounding.png"))
