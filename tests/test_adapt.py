"""`medvlp adapt` on the generated radiographs: what it writes, and what it refuses."""

import types

import jax
import numpy as np
import pytest
from PIL import Image

from medvlp_jax import adapt, backbones, cli, convert, outside
from medvlp_jax.data import corpora, regions
from medvlp_jax.encoders import bert, resnet
from medvlp_jax.encoders.base import Tokens
from medvlp_jax.evaluation import probe, provenance, results

CORPUS = "cxr_phantom:tiny"
SHORT = ["--steps=4", "--batch-size=8", "--evaluate-every=2", "--resamples=20", "--width=16"]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A small exported encoder and the prepared corpus."""
    folder = tmp_path_factory.mktemp("given")
    module = resnet.make("tiny", embedding_size=8, hidden_sizes=(16, 16, 16, 32))
    variables = jax.jit(module.init)(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    processor = convert.image_processor(32, mean=(0.5,) * 3, std=(0.25,) * 3)
    variables = jax.tree.map(np.asarray, variables)
    convert.save(module, variables, folder / "image", preprocessor=processor)
    corpora.prepare("cxr_phantom", data_dir=folder / "data", builder_config="tiny")
    return folder


def command(given, task, out, *more):
    known = [f"--task={task}", f"--encoder={given / 'image'}", f"--data-dir={given / 'data'}"]
    return [*known, f"--corpus={CORPUS}", f"--out={out}", *SHORT, *more]


def run(given, task, out, *more):
    adapt.main(command(given, task, out, *more))
    rows = results.read(out).provenance["rows"]
    assert rows["split"] == "test"
    assert {"finetune": "labels", "detect": "boxes"}.get(task, "hash") in rows
    found = results.read(out).numbers
    assert min(Image.open(out / f"{task}.png").size) > 300
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    return found


def test_segment_writes_results_with_their_origin_and_a_picture(given, tmp_path, capsys):
    results = run(given, "segment", tmp_path, "--regions=lung_left+lung_right,heart")
    entry = results["segment/regions/dice"]
    assert 0 <= entry["value"] <= 1
    assert entry["chance"] > 0.5  # lungs and hearts lie where they use to
    notes = results["segment/regions/protocol"]
    assert notes["protocol"] == "segment@clean-v1"
    backbone = backbones.of_folder(str(given / "image"))
    assert notes["encoder"]["weights"] == provenance.weights_hash(backbone.variables)
    assert (backbone.size, backbone.mean) == (32, (0.5, 0.5, 0.5))
    assert notes["settings"]["size"] == 32
    train = corpora.open_source(
        "cxr_phantom", "train", data_dir=given / "data", builder_config="tiny"
    )
    assert notes["train_rows"] + notes["validation_rows"] == len(train)
    assert "segment@clean-v1" in capsys.readouterr().out


@pytest.mark.slow
def test_detect_writes_every_metric(given, tmp_path):
    results = run(given, "detect", tmp_path, "--fraction=0.5")
    assert {"detect/boxes_50%/map", "detect/boxes_50%/froc/0.125"} <= {*results}
    notes = results["detect/boxes_50%/protocol"]
    assert not {*notes["skipped"]} & {*notes["boxes"]}
    assert {*notes["skipped"], *notes["boxes"]} == {*notes["settings"]["classes"]}


@pytest.mark.slow
def test_finetune_of_two_seeds_and_the_untrained_control(given, tmp_path):
    results = run(given, "finetune", tmp_path, "--fraction=0.5", "--seeds=0,1", "--untrained")
    entry = results["finetune/finding_50% (untrained)/macro_auroc"]
    notes = results["finetune/finding_50% (untrained)/protocol"]
    assert entry["value"] == pytest.approx(np.mean(notes["per_seed"]["macro_auroc"]))
    assert notes["encoder"]["untrained"] is True


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (["--run=x"], "one of --encoder FOLDER_OR_HUB_ID and --run RUN"),
        (["--fraction=1.5"], "--fraction=1.5; accepted is a share"),
        (["--seeds=a"], "--seeds=a; accepted are whole numbers"),
        (["--classes=x"], "--classes goes with --task detect"),
        (["--regions=hart"], "cxr_phantom has no region 'hart'. Did you mean heart"),
        (["--split=train"], "--split train is what is learnt from"),
        (["--split=tests"], "cxr_phantom has no split 'tests'. Did you mean test"),
        (["--lr=0"], "lr=0.0; accepted is a positive number"),
        (["--encoder-lr=1"], "--encoder-lr goes with --train-encoder"),
        (["--train-encoder", "--encoder-lr=2"], "encoder_lr=2.0; accepted is a share"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(given, tmp_path, capsys, changed, sentence):
    out = tmp_path / "out"
    assert cli.run(adapt.main, command(given, "segment", out, *changed)) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert "Traceback" not in said
    assert not out.exists()


@pytest.mark.parametrize(
    ("task", "given", "share"),
    [
        ("segment", [], 0.1),  # frozen: it does not matter
        ("segment", ["--untrained"], 0.1),
        ("segment", ["--untrained", "--train-encoder"], 1.0),
        ("finetune", [], 0.1),
        ("finetune", ["--untrained"], 1.0),
        ("finetune", ["--untrained", "--encoder-lr=0.1"], 0.1),
    ],
)
def test_random_weights_that_are_trained_move_as_fast_as_their_head(task, given, share):
    options = adapt.parser().parse_args([f"--task={task}", "--corpus=x", "--out=y", *given])
    assert adapt.settings_of(options, adapt.tasks.TASKS[task]).encoder_lr == share


def test_leaving_images_without_a_box_out_is_in_the_settings_that_are_hashed():
    def settings(*given):
        asked = ["--task=detect", "--corpus=x", "--out=y", *given]
        options = adapt.parser().parse_args(asked)
        task = types.SimpleNamespace(frame=regions.Frame(32, 1, fit="squash"))
        job = types.SimpleNamespace(options=options, task=task, settings=adapt.DEFAULTS)
        job.backbone, job.test_split = types.SimpleNamespace(description=dict), "test"
        job.train_encoder = False
        fitted = types.SimpleNamespace(step=1, steps=1, value=0.5)
        return adapt.Job._options(job, fitted, probe.Split([0], [1]), 0)["settings"]

    # Without the flag the hash is the one of before.
    assert settings("--annotated-only") == {**settings(), "annotated_only": True}


def test_the_labels_and_boxes_that_are_scored_are_in_the_provenance(given):
    opened = {"data_dir": given / "data", "builder_config": "tiny"}
    source = corpora.open_source("cxr_phantom", "train", **opened)
    records = [source[row] for row in range(12)]
    ids = [[record[key] for record in records] for key in ("image_id", "patient_id")]
    of = lambda task: adapt.tasks.TASKS[task](source, regions.Frame(32)).seen(records)
    labels = {"finding": [record["labels"]["finding"] for record in records]}
    assert of("finetune") == provenance.rows(*ids, labels)
    assert of("segment") == provenance.rows(*ids)
    assert of("detect") == of("segment") | {"boxes": provenance.boxes(records)}


def test_a_split_with_nothing_to_find_is_one_sentence_and_leaves_nothing(
    given, tmp_path, capsys, monkeypatch
):
    nothing = lambda task, source: (np.zeros(0, int), np.zeros(0, str))
    monkeypatch.setattr(adapt.tasks, "scan", nothing)
    assert cli.run(adapt.main, command(given, "segment", tmp_path / "out")) == 2
    assert "has nothing to segment in train" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_text_encoder_is_refused(tmp_path):
    module = bert.make("tiny", vocab_size=20, width=16, depth=1, mlp_dim=16)
    tokens = Tokens(np.zeros((1, 4), int), np.ones((1, 4), bool))
    variables = jax.tree.map(np.asarray, jax.jit(module.init)(jax.random.key(0), tokens))
    convert.save(module, variables, tmp_path)
    with pytest.raises(
        backbones.UserError, match=r"text encoder \(Bert\); an image encoder is need"
    ):
        backbones.of_folder(str(tmp_path))
    with pytest.raises(backbones.UserError, match=r"text encoder \(Bert\)"):  # of evaluate, too
        outside.parts(str(tmp_path), "", {}, with_text=False)
