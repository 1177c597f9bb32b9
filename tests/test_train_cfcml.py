"""A whole run of a classifier on images and a table; and bad input, one sentence each."""

import csv
import io
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import transformers
from PIL import Image

from medvlp_jax import assemble, evaluate, plan, train
from medvlp_jax.config import UserError
from medvlp_jax.data.datasets.ham10000.ham10000_dataset_builder import DIAGNOSES
from medvlp_jax.evaluation import provenance
from medvlp_jax.evaluation import results as written
from medvlp_jax.evaluator import Evaluator
from medvlp_jax.training import params as paths

ROOT = pathlib.Path(__file__).parents[1]
SMALL = (
    "--config=configs/cfcml.py:derm",
    "--config.data.size=32",
    "--config.data.crop=32",
    "--config.train.steps=4",
    "--config.train.batch_size=56",
    "--config.train.checkpoint_every=2",
    "--config.train.evaluate_every=2",
    "--config.train.log_every=1",
    "--config.optim.warmup=1",
    "--config.evals.resamples=20",
    "--config.evals.controls=()",
    "--config.evals.views=1",
)


@pytest.fixture(scope="module")
def lesions(tmp_path_factory):
    """A folder with two training lesions and one validation lesion a class."""
    folder = tmp_path_factory.mktemp("ham")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i, dx in enumerate([*DIAGNOSES] * 3):
        image = Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG")
        (folder / f"images/{i}.jpg").write_bytes(buffer.getvalue())
        split = "val" if i >= 2 * len(DIAGNOSES) else "train"
        rows.append((f"l{i}", f"i{i}", dx, "histo", 50, "male", "back", f"images/{i}.jpg", split))
    header = [
        "lesion_id",
        "image_id",
        "dx",
        "dx_type",
        "age",
        "sex",
        "localization",
        "file",
        "split",
    ]
    with (folder / "tabular.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return folder


@pytest.fixture
def resolve(lesions, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(ROOT)
    data = f"--config.data.data_dir={lesions / 'prepared'}"

    def resolved(*overrides):
        source = f"--config.data.manual_dir={lesions}"
        folder = tmp_path_factory.mktemp("runs") / "derm"
        return train.resolve([*SMALL, data, source, *overrides, f"--workdir={folder}"])

    return resolved


def _metrics(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("modality", "inputs"),
    [
        ("table=False", ("pixels",)),
        ("images=()", ("table",)),
        ("multi_granularity=False", ("table", "pixels", "table and pixels")),
    ],
)
def test_one_modality_or_late_concatenation_is_a_switch(resolve, modality, inputs):
    config, folder = resolve(
        "--config.recipe.enhance=none",
        f"--config.recipe.{modality}",
        "--config.train.steps=2",
        "--config.train.evaluate_every=0",
        "--config.evals.protocols=('classify',)",
        "--config.evals.controls=('regression',)",
        "--config.evals.views=4",
    )
    results = train.run(config, folder)
    assert results["classify/diagnosis/protocol"]["settings"]["views"] == 4
    floors = [k for k in results if k.startswith("regression/") and k.endswith("/protocol")]
    assert floors == [f"regression/diagnosis ({kind})/protocol" for kind in inputs]


@pytest.mark.slow
def test_a_run_ends_with_a_classifiers_numbers_and_repeats_when_it_is_resumed(resolve, capsys):
    config, folder = resolve("--config.optim.average=0.5", "--config.evals.controls=()")
    results = train.run(config, folder)
    for name in ("results.json", "curves.png", "examples.png"):
        assert (folder / name).stat().st_size > 0, name
    with (folder / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["image_id"] for row in rows) == sorted(f"i{i}" for i in range(14, 21))
    for row in rows:
        chances = [float(row[name]) for name in DIAGNOSES.values()]
        assert sum(chances) == pytest.approx(1, abs=1e-4)
        assert row["truth"] == [*DIAGNOSES.values()][int(row["image_id"][1:]) % 7]
    for key in ("classify/diagnosis/macro_auroc", "probe/diagnosis/balanced_accuracy"):
        assert 0 <= results[key]["value"] <= 1
    assert "dx_type" not in json.dumps(results)
    assert train.run(config, folder) == results
    # As if killed after the first checkpoint: the run goes on from there, to the same end.
    lines = _metrics(folder)
    shutil.rmtree(folder / "checkpoints" / "4")
    (folder / "results.json").unlink()
    capsys.readouterr()
    assert train.run(config, folder) == results
    assert f"Resuming {folder} at step 2\n" in capsys.readouterr().out
    assert _metrics(folder) == lines
    # The average lies in the checkpoint and is what is read from it.
    evaluate.main(["--run", str(folder), "--protocol", "classify", "--out", str(folder / "again")])
    cases = [file / "predictions.csv" for file in (folder, folder / "again")]
    assert cases[0].read_text() == cases[1].read_text()
    again = written.read(folder / "again").numbers
    assert again == {key: entry for key, entry in results.items() if key.startswith("classify")}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evals.protocols=('retrieval',)", "Protocol retrieval does not fit recipe cfcml"),
        ("recipe.num_classes=5", "num_classes=5, but task diagnosis of ham10000 has 7 classes"),
        ("recipe.task=diagnose", "ham10000 has no task 'diagnose'. Did you mean diagnosis"),
        ("evals.controls=('untrain',)", "No control 'untrain'. Did you mean untrained"),
        ("evals.positive=melanom", "evals.positive: no class 'melanom'.* Did you mean melanoma"),
        ("evals.views=2", "evals.views=2 must be one of"),
        ("train.export=True", "Recipe cfcml has no text encoder"),
        ("init.text=somewhere", "init.text=somewhere, but recipe cfcml has no text encoder"),
        ("data.table.exclude=('ages',)", "The table has no column 'ages'. Did you mean age"),
        ("data.view.name=turn", "No view 'turn'"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_no_run(resolve, override, message):
    config, folder = resolve(f"--config.{override}")
    with pytest.raises(UserError, match=message):
        train.run(config, folder)
    assert not (folder / "config.json").exists()


def test_a_classifier_protocol_does_not_fit_two_towers(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MEDVLP_DATA_DIR", str(tmp_path))
    arguments = ("--config=configs/imitate.py:smoke", "--config.evals.protocols=('classify',)")
    config, _ = train.resolve([*arguments, f"--workdir={tmp_path / 'run'}"])
    parts = assemble.parts(config, pretrained=False)
    with pytest.raises(UserError, match="accepted are zero_shot, retrieval, grounding, probe"):
        Evaluator(parts, config["evals"])


def test_a_step_on_a_table_is_planned_without_data(resolve):
    config, _ = resolve()
    batch = plan.blueprint(config).batch
    assert batch["tabular"].shape == (56, 3, 20)
    assert batch["label/diagnosis"].shape == (56, 7)


@pytest.fixture(scope="module")
def swin_folder(tmp_path_factory):
    """A small Swin with the head of ImageNet, as Hugging Face has it."""
    folder = tmp_path_factory.mktemp("swin")
    size = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
    described = transformers.SwinConfig(image_size=32, num_labels=5, **size)
    transformers.SwinForImageClassification(described).save_pretrained(folder)
    return folder


def derm7pt(folder, tmp_path, **recipe):
    """Parts of the published variant on 32 pixels, from the weights of a folder."""
    overrides = ("--config.data.size=32", "--config.data.crop=32", f"--config.init.image={folder}")
    data = f"--config.data.data_dir={tmp_path / 'prepared'}"
    config, _ = train.resolve(["--config=configs/cfcml.py:derm7pt", data, *overrides])
    config["recipe"] |= recipe
    return assemble.parts(config)


@pytest.mark.parametrize(
    ("share_encoder", "names"), [(True, ("image",)), (False, ("encoders_0", "encoders_1"))]
)
def test_every_image_encoder_begins_with_the_weights_it_is_given(
    swin_folder, tmp_path, monkeypatch, share_encoder, names
):
    monkeypatch.chdir(ROOT)
    parts = derm7pt(swin_folder, tmp_path, share_encoder=share_encoder)
    params = assemble.initial_variables(parts)["params"]
    assert {*params} == {*names, "fusion"}
    given = paths.flatten(parts.loaded["image"]["params"])
    for name in names:
        begun = paths.flatten(params[name])
        assert begun.keys() == given.keys()
        for path, leaf in given.items():
            np.testing.assert_array_equal(begun[path], leaf, err_msg=path)


def test_weights_that_nothing_would_take_are_refused(swin_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    parts = derm7pt(swin_folder, tmp_path, images=(), enhance="none")
    message = r"with these settings recipe cfcml has no image encoder; accepted is init\.image= \("
    with pytest.raises(UserError, match=message):
        assemble.initial_variables(parts)


@pytest.fixture(scope="module")
def own_folder(tmp_path_factory):
    """A folder of one's own: two photographs a case, 24 cases of 12 patients, most ages missing."""
    folder = tmp_path_factory.mktemp("own")
    description = {
        "classes": ["benign", "malignant"],
        "columns": {"image": "far", "label": "dx", "group": "who", "id": "", "split": ""},
        "images": {"closeup": "near"},
    }
    (folder / "corpus.json").write_text(json.dumps(description))
    schema = {"age": {"kind": "numeric", "range": [0, 120]}}
    (folder / "table.json").write_text(json.dumps(schema))
    rng = np.random.default_rng(0)
    rows = [("far", "near", "who", "dx", "age")]
    for i in range(24):
        for name in (f"far{i}.png", f"near{i}.png"):
            pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name)
        dx = description["classes"][i // 2 % 2]
        rows.append((f"far{i}.png", f"near{i}.png", f"w{i // 2}", dx, 50 if i < 2 else ""))
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


OWN = (
    "--config.data.corpora=('csv_folder:mine',)",
    "--config.data.balance=label",
    "--config.recipe.task=label",
    "--config.recipe.num_classes=2",
    "--config.recipe.images=('image','closeup')",
    "--config.train.batch_size=16",
    "--config.evals.protocols=('classify',)",
)


@pytest.mark.slow
def test_a_fold_of_ones_own_folder_reports_the_step_that_was_best_in_validation(
    own_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(ROOT)
    config, folder = train.resolve(
        [
            *SMALL,
            *OWN,
            f"--config.data.data_dir={tmp_path / 'prepared'}",
            f"--config.data.manual_dir={own_folder}",
            "--config.data.folds.count=3",
            "--config.data.folds.index=1",
            "--config.evals.split=test",
            "--config.train.select=classify/label/accuracy",
            f"--workdir={tmp_path / 'run'}",
        ]
    )
    hashes, quick = [], Evaluator.quick

    def first_is_best(self, variables, *, limit):
        found = quick(self, variables, limit=limit)
        if limit:  # before the first step, for the names of its numbers
            return found
        hashes.append(provenance.weights_hash(jax.device_get(variables)))
        found["classify/label/accuracy"]["value"] = 0.9 / len(hashes)
        return found

    monkeypatch.setattr(Evaluator, "quick", first_is_best)
    results = train.run(config, folder)
    assert 0 <= results["classify/label/accuracy"]["value"] <= 1
    for name in ("predictions.csv", "classifier.png", "attention.png"):
        assert (folder / name).stat().st_size > 0, name
    seen = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in seen if "classify/label/accuracy" in line] == [2]
    position = json.loads(next(folder.glob("selected/checkpoints/*/position/metadata")).read_text())
    assert position == {"step": 2, "value": 0.9}
    after_two, after_four = hashes
    assert written.read(folder).provenance["weights"] == after_two != after_four
    assert train.run(config, folder) == results
    assert written.read(folder).provenance["weights"] == after_two


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("recipe.images=('image','near')", r"csv_folder has no image 'near'"),
        ("train.select=classify/label/accuracy", "the one that evals.split reports"),
        ("data.folds.count=2", "data.folds.count=2 must be 0, or at least 3"),
        ("data.view.name=men", "data.view.name=men does not fit 'closeup', an image"),
        ("data.table.encoding=words", r"data.table.encoding is 'words'"),
    ],
)
def test_bad_input_about_ones_own_folder_is_one_sentence(
    own_folder, tmp_path, monkeypatch, override, message
):
    monkeypatch.chdir(ROOT)
    config, folder = train.resolve(
        [
            *SMALL,
            *OWN,
            f"--config.data.data_dir={own_folder / 'prepared'}",
            f"--config.data.manual_dir={own_folder}",
            f"--config.{override}",
            f"--workdir={tmp_path / 'run'}",
        ]
    )
    with pytest.raises(UserError, match=message):
        train.run(config, folder)
    assert not (folder / "config.json").exists()


def test_a_copy_of_the_label_in_the_table_is_refused_before_anything_is_trained(
    own_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(ROOT)
    copied = tmp_path / "copied"
    shutil.copytree(own_folder, copied, ignore=shutil.ignore_patterns("prepared"))
    schema = json.loads((copied / "table.json").read_text())
    schema["code"] = {"kind": "categorical", "categories": ["benign", "malignant"]}
    (copied / "table.json").write_text(json.dumps(schema))
    with (own_folder / "table.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    with (copied / "table.csv").open("w", newline="") as file:
        dx = header.index("dx")
        again = ([f"{k}{row[0]}", *row[1:], row[dx]] for k in "ab" for row in rows)
        csv.writer(file).writerows([[*header, "code"], *again])
    for name in (row[0] for row in rows):
        for k in "ab":
            shutil.copy(copied / name, copied / f"{k}{name}")
    where = (f"--config.data.data_dir={tmp_path / 'data'}", f"--config.data.manual_dir={copied}")
    config, folder = train.resolve([*SMALL, *OWN, *where, f"--workdir={tmp_path / 'run'}"])
    monkeypatch.setattr(assemble, "initial_variables", lambda parts: pytest.fail("began"))
    with pytest.raises(UserError, match="The table has 'code', and each of its values goes with"):
        train.run(config, folder)
    assert not (folder / "config.json").exists()


@pytest.mark.slow
def test_volumes_of_three_sequences_run_to_their_end(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config, folder = train.resolve(
        [
            "--config=configs/cfcml.py:men_phantom",
            "--config.data.corpora=('men_phantom:tiny',)",
            f"--config.data.data_dir={tmp_path / 'prepared'}",
            "--config.data.size=32",
            "--config.data.crop=32",
            "--config.train.steps=2",
            "--config.train.evaluate_every=0",
            "--config.train.batch_size=24",
            "--config.optim.warmup=1",
            "--config.evals.split=test",
            "--config.evals.resamples=20",
            "--config.evals.controls=('regression',)",
            f"--workdir={tmp_path / 'run'}",
        ]
    )
    results = train.run(config, folder)
    assert results["classify/grade/protocol"]["skipped"] == []
    assert "regression/grade (table and pixels)/macro_auroc" in results
    assert (folder / "attention.png").stat().st_size > 0
