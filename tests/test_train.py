"""The whole run in small: train, evaluate, export; and bad input, one sentence each."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from medvlp_jax import assemble, cli, evaluate, train, weights
from medvlp_jax.config import UserError
from medvlp_jax.convert import __main__ as convert_cli
from medvlp_jax.evaluation import results as written
from medvlp_jax.training.stopping import Signals

ROOT = pathlib.Path(__file__).parents[1]
SMOKE = ("--config=configs/imitate.py:smoke", "--config.evals.resamples=20")


@pytest.fixture(scope="module")
def _home(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.chdir(ROOT)
    patch.setenv("MEDVLP_DATA_DIR", str(tmp_path_factory.mktemp("data")))
    yield
    patch.undo()


def resolve(*overrides, workdir):
    return train.resolve([*SMOKE, *overrides, f"--workdir={workdir}"])


@pytest.fixture(scope="module")
def finished(_home, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    return folder, train.run(*resolve(workdir=folder))


def test_a_run_folder_holds_config_metrics_results_pictures_checkpoints_and_export(finished):
    folder, results = finished
    pictures = ("curves.png", "examples.png", "zero_shot.png")
    for name in ("config.json", "metrics.jsonl", "results.json", "zero_shot.csv", *pictures):
        assert (folder / name).stat().st_size > 0, name
    assert written.read(folder).numbers == results
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["3", "6"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(line["loss/findings"]) for line in lines if "loss" in line)


def test_results_hold_every_protocol_and_the_untrained_control(finished):
    _, results = finished
    for key in (
        "zero_shot/finding/macro_auroc",
        "retrieval/image_to_text/P@1",
        "retrieval/text_to_image/R@10",
        "probe/finding/macro_auroc",
        "zero_shot/finding (untrained)/macro_auroc",
    ):
        assert 0 <= results[key]["value"] <= 1
        assert results[key]["hash"]


def test_report_text_stays_out_of_metrics_and_results(finished):
    folder, _ = finished
    config = assemble.read_config(folder)
    source = assemble.open_corpus(config["data"]["corpora"][0], config["data"], "test")
    prompts = (ROOT / "medvlp_jax/data/datasets/cxr_phantom/prompts.json").read_text()
    texts = {text for pair in source.texts() for text in pair if len(text) > 30}
    written = (folder / "metrics.jsonl").read_text() + (folder / "results.json").read_text()
    # The protocol entry lists its prompts, some of which are stock phrases of the reports.
    assert not [t for t in texts if t in written and t not in prompts]


@pytest.mark.hf
def test_transformers_loads_the_export_and_gives_the_same_features(finished):
    import torch
    import transformers

    folder, _ = finished
    parts = assemble.parts(assemble.read_config(folder), pretrained=False)
    variables = weights.read_variables(folder, assemble.initial_variables(parts))
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    theirs = transformers.AutoModel.from_pretrained(folder / "export" / "image").eval()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2))).pooler_output[..., 0, 0]
    own = {"params": variables["params"]["image"], "batch_stats": variables["batch_stats"]["image"]}
    ours = parts.recipe.image.apply(own, images).pooled
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "export" / "text")
    text = transformers.AutoModel.from_pretrained(
        folder / "export" / "text", add_pooling_layer=False
    ).eval()
    sentence = "No pleural effusion."
    batch = tokenizer([sentence], return_tensors="pt")
    assert batch["input_ids"][0].tolist() == parts.tokenizer.encode(sentence).ids
    with torch.no_grad():
        expected = text(**batch).last_hidden_state.mean(1)
    from medvlp_jax.data.text import tokenize

    tokens = tokenize(parts.tokenizer, [sentence], 32)
    ours = parts.recipe.text.apply({"params": variables["params"]["text"]}, tokens).pooled
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_the_model_card_says_that_the_data_is_generated_and_shows_the_results(finished):
    card = (finished[0] / "export" / "README.md").read_text()
    assert "cxr_phantom is generated data: no patient was imaged" in card
    assert "zero_shot/finding/macro_auroc" in card
    assert "Not for clinical use" in card


def test_evaluating_the_run_again_gives_the_same_results(finished, tmp_path):
    folder, results = finished
    controls = "--controls=untrained,shuffled_pairs"
    protocols = "--protocol=zero_shot,retrieval"
    evaluate.main([f"--run={folder}", protocols, controls, f"--out={tmp_path}"])
    again = written.read(tmp_path)
    origin = written.read(folder).provenance
    for name in ("code", "config", "rows", "weights", "seeds"):
        assert again.provenance[name] == origin[name], name
    assert origin["rows"]["corpus"] == "cxr_phantom:tiny"
    for key, entry in again.numbers.items():
        if "(shuffled pairs)" not in key:
            assert entry == results[key], key
    assert again.numbers["retrieval/image_to_text (shuffled pairs)/R@10"]["n"] > 0


def test_exporting_the_run_again_writes_the_same_weights(finished, tmp_path):
    folder, _ = finished
    convert_cli.main(["export", str(folder), str(tmp_path / "out")])
    for name in ("image/model.safetensors", "text/model.safetensors", "projections.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / "export" / name).read_bytes()


def test_the_card_of_an_export_tells_the_step_the_corpus_and_the_split(finished, tmp_path, capsys):
    folder, _ = finished
    convert_cli.main(["export", str(folder), str(tmp_path / "out")])
    assert f"Imitate of step 6 in {tmp_path / 'out'}" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert card == (folder / "export" / "README.md").read_text()
    assert " 6 steps of 16 pairs." in " ".join(card.split())
    rows = written.read(folder).provenance["rows"]
    said = f"These weights, of step 6, on `cxr_phantom:tiny`, split test: {rows['rows']} rows of "
    assert f"{said}{rows['patients']} patients." in card


def test_the_card_of_another_checkpoint_has_no_results(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished[0], copy)
    shutil.rmtree(copy / "checkpoints" / "6")
    convert_cli.main(["export", str(copy), str(tmp_path / "out")])
    card = (tmp_path / "out" / "README.md").read_text()
    assert " 3 of 6 steps of 16 pairs." in " ".join(card.split())
    assert "Not evaluated. The results.json of the run is of other weights" in card
    assert "zero_shot/finding/macro_auroc" not in card


def test_the_card_names_the_split_that_was_evaluated_last(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished[0], copy)
    limits = ("--limit=24", "--set=resamples=5", "--controls=none", "--protocol=retrieval")
    evaluate.main([f"--run={copy}", "--split=train", *limits])
    convert_cli.main(["export", str(copy), str(tmp_path / "out")])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "These weights, of step 6, on `cxr_phantom:tiny`, split train: 24 rows of" in card


def test_a_run_is_not_called_shorter_than_it_was(finished):
    folder, _ = finished
    before = (folder / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"train.steps=\d+, but this run was trained to step"):
        train.run(*resolve("--config.train.steps=5", workdir=folder))
    assert (folder / "config.json").read_bytes() == before


def test_an_evaluation_of_nothing_leaves_the_results_of_the_run(finished, capsys):
    folder, _ = finished
    before = (folder / "results.json").read_bytes()
    for wrong, said in (
        (["--set", "protocols="], "evals.protocols is empty"),
        (["--protocol="], "No protocol ''"),
        (["--limit=-1"], "evals.limit=-1 must be 0 or more"),
        ([f"--out={folder / 'config.json'}"], "is a file; accepted is a folder"),
    ):
        assert cli.main(["evaluate", f"--run={folder}", *wrong]) == 2
        assert said in capsys.readouterr().err
    assert (folder / "results.json").read_bytes() == before


def test_a_finished_run_resumes_to_the_same_results(finished):
    folder, results = finished
    assert train.run(*resolve(workdir=folder)) == results


def test_resuming_in_other_batches_goes_on_at_the_same_record(finished, tmp_path, capsys):
    folder, _ = finished
    shutil.copytree(folder, tmp_path / "copy")
    size = assemble.read_config(folder)["train"]["batch_size"]
    other = (f"--config.train.batch_size={2 * size}", "--config.train.steps=9")
    job = train._prepare(*resolve(*other, workdir=tmp_path / "copy"), Signals())
    assert int(job.state.step) == 6
    assert job.batches.get_state() == {"next_index": 3}
    said = capsys.readouterr().out
    assert f"the data go on after {6 * size} records" in said
    # Whoever forgot to name a corpus sees at once that images are drawn.
    assert " pairs of cxr_phantom:tiny (generated), 9 steps" in said


def test_resuming_with_another_architecture_is_refused_and_nothing_is_written_over(finished):
    folder, _ = finished
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="is of another architecture"):
        train.run(*resolve("--config.recipe.dim=64", workdir=folder))
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--config.train.batch_size=12"], "train.batch_size=12 cannot be split over 8 devices"),
        (["--config.recipe.contrast_group=7"], "recipe.contrast_group=7"),
        (["--config.mesh.fsdp=3"], "does not cover the 8 devices"),
        (["--config.data.text_length=600"], "data.text_length=600 is longer than .* 512"),
        (["--config.data.crop=100"], "data.crop=100 is larger than data.size=72"),
        (["--config.data.corpora=('cxr_phantm',)"], "Did you mean cxr_phantom"),
        (["--config.data.tokenizer=nowhere"], "No tokenizer at 'nowhere'"),
        (["--config.init.image=nowhere"], "nowhere"),
        (["--config.recipe.image.variant=tny"], "Did you mean tiny"),
        (["--config.recipe.text.pooling=max"], "No pooling 'max' in this Bert, only cls, mean"),
        (["--config.optim.freeze=('imgae',)"], "optim.freeze pattern 'imgae' matches no parameter"),
        (
            ["--config.evals.protocols=('zeroshot',)"],
            "No protocol 'zeroshot'. Did you mean zero_shot",
        ),
        (["--config.evals.split=dev"], "no split 'dev'"),
        (["--config.init.params=nowhere"], "nowhere has no checkpoint"),
        (["--config.seed=-1"], "seed=-1 must be 0 or more"),
        (["--config.recipe.temperature=0.0"], "recipe.temperature=0.0 must be above 0"),
        (["--config.recipe.eval_draws=0"], "recipe.eval_draws=0 must be at least 1"),
        (["--config.train.select=probe/finding/macro_auroc"], "protocol runs at the end alone"),
    ],
)
@pytest.mark.usefixtures("_home")
def test_bad_input_is_one_sentence_before_anything_is_written(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        train.run(*resolve(*overrides, workdir=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--config.optim.warmup=900"], "warmup must be at least 0 and below steps=.*, got 900"),
        (["--config.mlm.warmup=900", "--config.init.text=mlm"], "mlm: warmup must be .*, got 900"),
        (["--config.optim.name=adamm"], "optim.name must be one of .*, got 'adamm'"),
        (["--config.train.select=x", "--config.train.evaluate_every=0"], "needs evaluations"),
        (["--config.train.keep=0"], "train.keep=0 must be 1 or more"),
        (["--config.train.log_every=0"], "train.log_every=0 must be 1 or more"),
        (["--config.data.mask_lower_edge=12.0"], "mask_lower_edge=12.0 must be at least 0 and"),
        (["--config.train.batch_size=0"], "train.batch_size=0 must be 1 or more"),
        (["--config.data.fit=stretch"], "data.fit=stretch must be squash or pad"),
        (["--config.recipe.image.dtype=half"], "image.dtype=half must be float32 or bfloat16"),
        (["--config.data.corpora=()"], "data.corpora is empty"),
        (["--config.data.balance=grade"], "data.balance: cxr_phantom has no task 'grade'"),
        (["--config.data.shares=(0.5,0.5)"], r"data.shares=\(0.5, 0.5\) has 2 numbers for 1"),
        (["--config.optim.multipliers=('image','text')"], "optim.multipliers has 'image'"),
        (["--config.mesh.tensor=-1"], "mesh.data=-1 must be 1 or more, or -1 for one axis alone"),
        (["--config.train.select=nosuch"], "train.select=nosuch is no number of evals.protocols"),
        (
            ["--config.train.select=retrieval/text_to_image/mean_rank"],
            "of mean_rank the lowest is best",
        ),
        (["--config.train.batch_size=13"], "train.batch_size=13 cannot be split over 8 devices"),
        (
            ["--config.init.text=mlm", "--config.mlm.batch_size=13"],
            "mlm.batch_size=13 cannot be split over 8 devices",
        ),
    ],
)
def test_settings_are_refused_before_a_text_encoder_is_trained(
    tmp_path, monkeypatch, overrides, message
):
    monkeypatch.setattr(assemble, "parts", lambda *_, **__: pytest.fail("built first"))
    with pytest.raises(UserError, match=message):
        train.run(*resolve(*overrides, workdir=tmp_path / "run"))


def test_evaluating_a_folder_that_is_no_run_is_one_sentence(tmp_path, capsys):
    assert cli.main(["evaluate", f"--run={tmp_path}"]) == 2
    assert "is not a run folder: it has no config.json" in capsys.readouterr().err


def test_a_damaged_config_of_a_run_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"seed": 0,}')
    with pytest.raises(UserError, match=r"config\.json is not JSON: .* line 1 column 12"):
        assemble.read_config(tmp_path)
    for levels in (900, 5000):
        (tmp_path / "config.json").write_text('{"recipe":' * levels + "1" + "}" * levels)
        with pytest.raises(UserError, match=r"config\.json is not JSON: more than 100 levels"):
            assemble.read_config(tmp_path)


def test_a_run_from_before_a_setting_existed_has_its_default(tmp_path):
    config, _ = train.resolve(["--config=configs/clip.py:demo"])
    expected = json.loads(json.dumps(config))
    for section, setting in (("data", "texts"), ("evals", "views"), ("optim", "average")):
        del config[section][setting]
    del config["data"]["folds"]["inner"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert json.loads(json.dumps(assemble.read_config(tmp_path))) == expected


@pytest.mark.parametrize("config", ["imitate.py:demo", "cfcml.py:men_phantom", "prima.py"])
def test_a_run_s_own_config_reads_back_as_it_was_written(tmp_path, config):
    """Another method's data.view has no settings of IMITATE's."""
    resolved, _ = train.resolve([f"--config=configs/{config}"])
    (tmp_path / "config.json").write_text(json.dumps(resolved))
    assert assemble.read_config(tmp_path) == assemble.written_config(tmp_path)


def test_an_unknown_verb_names_the_nearest(capsys):
    assert cli.main(["trian"]) == 2
    assert "Did you mean train" in capsys.readouterr().err


def test_emulated_devices_are_eight():
    assert len(jax.devices()) == 8
