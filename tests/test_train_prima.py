"""PRIMA's stages as runs: each from the one before, resumed bit by bit, on one and three images."""

import csv
import json
import pathlib
import shutil

import pytest

from medvlp_jax import clinical, train
from medvlp_jax.config import UserError
from medvlp_jax.data import corpora

ROOT = pathlib.Path(__file__).parents[1]
BLOCK = {"depth": 1, "width": 16, "num_heads": 2, "mlp_dim": 16}
SMALL = {
    "data.size": 36,
    "data.crop": 32,
    "data.text_length": 40,
    "train.batch_size": 16,
    "train.steps": 4,
    "train.checkpoint_every": 2,
    "train.log_every": 1,
    "optim.warmup": 1,
    "evals.resamples": 10,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("prima")


@pytest.fixture
def resolve(folder, monkeypatch):
    monkeypatch.chdir(ROOT)

    def resolved(variant, *, corpus="cxr_phantom:clinic_tiny", **overrides):
        settings = SMALL | {"data.data_dir": folder / "data", "data.corpora": f"('{corpus}',)"}
        settings |= {key.replace("__", "."): value for key, value in overrides.items()}
        run = folder / "runs" / variant
        arguments = [f"--config=configs/prima.py:{variant}", f"--workdir={run}"]
        arguments += [f"--config.{key}={value}" for key, value in settings.items()]
        config, workdir = train.resolve(arguments)
        recipe = config["recipe"]
        recipe["image"] |= {**BLOCK, "patch_size": 8}
        recipe["text"] |= {**BLOCK, "depth": 2}
        if "llm" in recipe:
            recipe["llm"] |= {**BLOCK, "num_kv_heads": 1, "head_width": 8}
            recipe["fusion_hidden"] = 16
        recipe |= {"dim": 16, "hidden": 16, "loss_tile": 8}
        return config, workdir

    return resolved


def metrics_of(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


@pytest.mark.slow
def test_each_stage_is_a_run_that_starts_from_the_one_before(resolve, capsys):
    inner = {"data__folds__inner": 4}
    config, aligned = resolve("align_phantom", **inner)
    results = train.run(config, aligned)
    assert results["probe/diagnosis/macro_auroc"]["n"] > 0
    assert {"loss/image", "loss/global", "loss/local", "loss/soft"} <= set(metrics_of(aligned)[0])

    chosen = {**inner, "train__evaluate_every": 2}
    config, sharpened = resolve("sharpen_phantom", init__params=aligned, **chosen)
    train.run(config, sharpened)
    assert (sharpened / "selected").is_dir()

    controls = {"evals__controls": "('shuffled_images','shuffled_metadata')"}
    config, fused = resolve("fuse_phantom", init__params=sharpened, **chosen, **controls)
    results = train.run(config, fused)
    tasks = {key.split("/")[1] for key in results if key.startswith("classify/")}
    shuffled = {f"diagnosis (shuffled {what})" for what in ("images", "metadata")}
    assert tasks >= {"diagnosis", "diagnosis (by study)", *shuffled}
    with (fused / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    for row in rows:
        names = [key for key in row if key not in ("image_id", "patient_id", "truth")]
        assert len(names) == 6
        assert sum(float(row[name]) for name in names) == pytest.approx(1, abs=1e-4)

    # As if killed after the second step: the same end.
    lines = metrics_of(fused)
    for gone in (fused / "checkpoints" / "4", fused / "selected"):
        shutil.rmtree(gone)
    capsys.readouterr()
    assert train.run(config, fused) == results
    assert f"Resuming {fused} at step 2\n" in capsys.readouterr().out
    assert metrics_of(fused) == lines

    # One of another fold would be tested on what was trained on.
    config, _ = resolve("fuse_phantom", init__params=sharpened, data__folds__index=1, **chosen)
    with pytest.raises(UserError, match=r"by data\.folds\.index=0, and here it is tested"):
        train.run(config, fused.with_name("other"))

    # A stage that skips one says what it lacks.
    config, _ = resolve("fuse_phantom", init__params=aligned, **inner)
    config["recipe"]["dim"] = 24
    with pytest.raises(UserError, match=r"image_projection/out/kernel is \(16, 16\)"):
        train.run(config, fused.with_name("other"))


@pytest.mark.slow
def test_the_baselines_start_from_nothing(resolve):
    config, run = resolve("mlp_phantom", data__folds__inner=4, train__evaluate_every=2)
    results = train.run(config, run)
    assert results["classify/diagnosis/macro_f1"]["n"] > 0


@pytest.mark.slow
def test_three_modalities_are_three_views(resolve):
    three = {"corpus": "men_phantom:flat_tiny", "train__batch_size": 8}
    config, aligned = resolve("align_men", **three)
    train.run(config, aligned)
    config, fused = resolve("fuse_men", init__params=aligned, train__evaluate_every=2, **three)
    results = train.run(config, fused)
    where = {"data_dir": config["data"]["data_dir"], "builder_config": "flat_tiny"}
    cases = sum(map(len, corpora.open_all("men_phantom", **where)))
    assert results["classify/grade/accuracy"]["n"] in (cases // 5, -(-cases // 5))  # a fold of five


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sentences": ("Confirmed by {dx_type}.",)}, "has 'dx_type', which gives the label away"),
        ({"sentences": ("Site: {site}.",)}, "the table has no column 'site'"),
        ({"bins": ()}, "for the number 'age'"),
    ],
)
def test_a_metadata_setting_that_leaks_or_does_not_exist_is_refused(resolve, settings, message):
    config, _ = resolve("align_derm", corpus="ham10000")
    config["data"]["metadata"] |= settings
    with pytest.raises(UserError, match=message):
        clinical.described(config["data"])
