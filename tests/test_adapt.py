"""`medvlp adapt` on the generated radiographs: what it writes, and what it refuses."""

import contextlib
import io
import json
import types

import jax
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image
from safetensors.numpy import load_file

from medvlp_jax import (
    adapt,
    backbones,
    cli,
    convert,
    heads,
    origins,
    outside,
    report,
    tuned,
)
from medvlp_jax.data import corpora, regions
from medvlp_jax.encoders import bert, mamba3d, resnet
from medvlp_jax.encoders.base import Tokens
from medvlp_jax.evaluation import paired, probe, provenance, results

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


def described(*given, **data):
    """Return what a seed's results say of how they were measured."""
    asked = ["--task=detect", "--corpus=x", "--out=y", *given]
    options = adapt.parser().parse_args(asked)
    origin = origins.Origin(None, data)
    task = types.SimpleNamespace(frame=adapt.frame_of(options, 32, 1, origin))
    job = types.SimpleNamespace(options=options, task=task, settings=adapt.DEFAULTS)
    job.test_split, job.train_encoder, job.fold = "test", False, origin.fold_of("x")
    fitted = types.SimpleNamespace(step=1, steps=1, value=0.5)
    return adapt.Job._options(job, fitted, probe.Split([0], [1]), 0)


def test_leaving_images_without_a_box_out_is_in_the_settings_that_are_hashed():
    settings = lambda *given: described(*given)["settings"]
    # Without the flag the hash is the one of before.
    assert settings("--annotated-only") == {**settings(), "annotated_only": True}


@pytest.mark.parametrize(
    ("flags", "run", "stretch"),
    [
        ([], {}, False),  # as `evaluate --encoder`
        ([], {"stretch": True}, True),
        ([], {"stretch": False}, False),
        (["--stretch"], {"stretch": False}, True),
        (["--no-stretch"], {"stretch": True}, False),
    ],
)
def test_contrast_is_stretched_as_in_the_encoder_s_run_and_the_hash_covers_it(flags, run, stretch):
    found = described(*flags, **run)
    assert found["notes"]["stretch"] is stretch
    # All images were stretched before there was a choice: that hash has stayed.
    assert ("stretch" in found["settings"]) == (not stretch)
    grey = np.full((8, 8), 90, np.uint8)
    grey[2:4, 2:4] = 120
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "PNG")
    options = adapt.parser().parse_args(["--task=detect", "--corpus=x", "--out=y", *flags])
    image = adapt.frame_of(options, 8, 1, origins.Origin(None, run)).image(
        {"image": buffer.getvalue()}
    )
    assert (image.min(), image.max()) == ((0, 255) if stretch else (90, 120))


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


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("config.json", "out is a run folder; name another for --out."),
        ("seed_1/head.safetensors", "seed_1 holds weights that were saved; name another --out"),
        ("", "out is a file; accepted is a folder"),
    ],
)
def test_a_folder_that_holds_more_than_results_is_refused(tmp_path, capsys, file, sentence):
    out = tmp_path / "out"
    (out / file).parent.mkdir(parents=True, exist_ok=True)
    (out / file).write_text("{}")
    command = ["--task=detect", "--encoder=none", "--corpus=none", f"--out={out}"]
    assert cli.run(adapt.main, command) == 2
    assert sentence in capsys.readouterr().err
    assert (out / file).read_text() == "{}"


@pytest.fixture(scope="module")
def tuned_twice(given, tmp_path_factory):
    """Two seeds of a fine-tuning in which nothing is learnt, with and without pretrained weights.

    Also what lay in the folder when each seed began, and what was printed. In that of the second
    there are boxes of before.
    """
    folder = tmp_path_factory.mktemp("tuned")
    seen, said = [], io.StringIO()
    old = results.assemble(
        "detect@v1", "boxes", {"map": results.number(0.5, n=9)}, settings={}, notes={}
    )
    results.write_results(old, folder / "theirs", {})
    (folder / "theirs/seed_9").mkdir()
    for stale in ("detect.png", "seed_9/predictions.csv"):
        (folder / "theirs" / stale).write_text("old")

    def fit(recipe, variables, batches, *, validate, folder, **how):
        out = folder.parent
        seen.append(results.read(out) if (out / results.FILE).is_file() else None)
        folder.mkdir(parents=True, exist_ok=True)
        moved = jax.tree.map(lambda leaf: np.asarray(leaf) * 1.5, variables["params"]["encoder"])
        params = {**variables["params"], "encoder": moved}
        return adapt.adaptation.Fitted({**variables, "params": params}, 3, 0.5, 4)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(adapt.adaptation, "fit", fit)
        patch.setattr(heads.leakage, "torn_patients", lambda source, dealt: 7)
        for name, more in (("ours", ["--save"]), ("theirs", ["--untrained"])):
            adapt.main(command(given, "finetune", folder / name, "--seeds=0,1", *more))
    return folder, seen, said.getvalue()


@pytest.mark.slow
def test_results_are_written_after_every_seed(tuned_twice):
    folder, seen, _ = tuned_twice
    assert seen[0] is None
    assert {key.split("/")[0] for key in seen[2].numbers} == {"detect"}  # until there are others
    assert not [*folder.glob("theirs/detect.png"), *folder.glob("theirs/seed_9/*")]
    for name, early in zip(("ours", "theirs"), seen[1::2], strict=True):
        assert early.provenance["seeds"]["run"] == [0]
        late = results.read(folder / name)
        assert late.provenance["seeds"]["run"] == [0, 1]
        assert {*early.numbers} == {*late.numbers}


@pytest.mark.slow
def test_each_seed_says_what_it_was_fitted_on_and_began_with(tuned_twice, given):
    folder, seen, _ = tuned_twice
    backbone = backbones.of_folder(str(given / "image"))
    pretrained = provenance.weights_hash(backbone.variables)
    notes = results.read(folder / "ours").numbers["finetune/finding/protocol"]
    assert notes["of_seeds"] == [0, 1]
    assert notes["best_step"] == [3, 3]
    assert [len(notes[key]) for key in ("train_rows", "validation", "not_fitted")] == [2, 2, 2]
    assert notes["encoder"]["weights"] == pretrained
    assert notes["encoder"]["untrained"] is False
    assert results.read(folder / "ours").provenance["weights"] == pretrained
    key = "finetune/finding (untrained)/protocol"
    random = results.read(folder / "theirs").numbers[key]["encoder"]
    assert len({pretrained, *random["weights"]}) == 3
    assert results.read(folder / "theirs").provenance["weights"] == ", ".join(random["weights"])
    first = seen[1].numbers["finetune/finding/protocol"]
    train = corpora.open_source(
        "cxr_phantom", "train", data_dir=given / "data", builder_config="tiny"
    )
    rows = probe.validation_split(np.array([r["patient_id"] for r in train]), seed=0).fit
    labels = train.labels("finding")[rows]
    both = (labels == 1).any(0) & (labels == 0).any(0)
    classes = train.tasks["finding"]
    assert first["not_fitted"] == [
        c for c, is_there in zip(classes, both, strict=True) if not is_there
    ]


@pytest.mark.slow
def test_predictions_are_those_that_were_scored_and_are_compared(tuned_twice, capsys):
    folder, seen, _ = tuned_twice
    scored = paired.read(folder / "ours/seed_0")
    assert scored.truth.ndim == 2  # an image has several findings
    expected = seen[1].numbers["finetune/finding/macro_auroc"]
    found = paired.value("macro_auroc", scored, np.ones((1, len(scored.truth))))
    assert found == pytest.approx(expected["value"], abs=1e-9)
    assert len(scored.images) == expected["n"]
    sides = [f"--ours={folder / 'ours'}", f"--theirs={folder / 'theirs'}"]
    paired.main([*sides, "--resamples=20"])
    assert capsys.readouterr().out.startswith("macro_auroc")


@pytest.mark.slow
def test_saved_weights_are_those_that_were_scored(tuned_twice, given):
    folder, _, _ = tuned_twice
    seed = folder / "ours/seed_0"
    assert {path.name for path in seed.rglob("*.*") if path.suffix != ".json"} == {
        "head.safetensors",
        "model.safetensors",
        "predictions.csv",
    }
    about = json.loads((seed / "head.json").read_text())
    assert (about["task"], about["labels"], about["multi_label"]) == ("finetune", "finding", True)
    assert (about["size"], about["stretch"], about["mean"]) == (32, False, [0.5, 0.5, 0.5])
    assert about["began"]["source"] == str(given / "image")
    backbone = backbones.of_folder(str(seed / "encoder"))
    assert (backbone.size, backbone.std) == (32, (0.25, 0.25, 0.25))
    head = adapt.tasks.finetuning.Classifier("finding", len(about["classes"]), True)
    recipe = adapt.adaptation.Adapted(backbone.module, head, True, backbone.mean, backbone.std)
    flat = load_file(seed / "head.safetensors")
    own = traverse_util.unflatten_dict(flat, sep="/")["params"]["head"]
    params = {"encoder": backbone.variables["params"], "head": own}
    rest = {k: {"encoder": v} for k, v in backbone.variables.items() if k != "params"}
    test = corpora.open_source(
        "cxr_phantom", "test", data_dir=given / "data", builder_config="tiny"
    )
    frame = regions.Frame(**{name: about[name] for name in regions.Frame._fields})
    images = np.stack([frame.image(test[row]) for row in range(4)])
    logits = recipe.apply({"params": params, **rest}, {"image": images}, method="predict")["logits"]
    scored = paired.read(seed)
    assert scored.images[:4].tolist() == [test[row]["image_id"] for row in range(4)]
    np.testing.assert_allclose(scored.chances[:4], 1 / (1 + np.exp(-logits)), rtol=1e-4)


@pytest.mark.slow
def test_what_is_not_known_torn_or_replaced_is_said_and_a_report_is_made(tuned_twice, given):
    folder, _, said = tuned_twice
    unknown = f"what {given / 'image'} was trained on is not known here"
    assert said.count(unknown) == 1  # random weights have seen nothing
    assert said.count(f"7 patients of {CORPUS} are in more than one of its splits") == 2
    assert results.read(folder / "ours").provenance["rows"]["torn_patients"] == 7
    page = report.build(folder / "ours")
    assert "ROC of each finding, of seed_0" in page
    assert "What the encoder was trained on is not recorded here" in page
    assert "7 patients of cxr_phantom:tiny" in page
    assert said.count("medvlp: this replaces") == 1
    assert f"{folder / 'theirs/results.json'}, which holds detect; another --out keeps it" in said


def test_an_encoder_without_a_form_of_its_own_is_not_trained_to_be_saved():
    with pytest.raises(backbones.UserError, match="No Hugging Face form of"):
        tuned.check(mamba3d.make(), {"params": {}})


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
