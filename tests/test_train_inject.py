"""PRIMA's stage "inject" end to end in small: factors on a Hugging Face folder learn a corpus."""

import pathlib

import jax
import numpy as np
import pytest

from medvlp_jax import assemble, convert, export, plan, train, weights
from medvlp_jax.config import UserError
from medvlp_jax.data import text
from medvlp_jax.encoders import modernbert
from medvlp_jax.encoders.base import Tokens
from medvlp_jax.evaluation import results as written
from medvlp_jax.evidence import backends, corpus, risk, template
from medvlp_jax.training import params as paths

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 6
SETTINGS = (
    "--config=configs/prima.py:inject_phantom",
    f"--config.train.steps={STEPS}",
    "--config.train.checkpoint_every=3",
    "--config.train.evaluate_every=3",
    "--config.train.log_every=1",
    "--config.data.text_length=48",
    "--config.data.tokenizer=risk",
    "--config.data.knowledge.allow_unvetted=True",
    "--config.data.knowledge.held_out=('template:1',)",
    "--config.recipe.text.lora.rank=2",
    "--config.recipe.text.lora.alpha=4.0",
    "--config.optim.lr=0.02",
    "--config.optim.warmup=0",
    "--config.evals.protocols=('masked_tokens',)",
    "--config.evals.controls=('untrained',)",
    "--config.evals.resamples=50",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Return a folder with a corpus and a tiny ModernBERT that has its head."""
    patch = pytest.MonkeyPatch()
    patch.chdir(ROOT)
    home = tmp_path_factory.mktemp("inject")
    patch.setenv("MEDVLP_DATA_DIR", str(home / "data"))
    table = risk.read("cxr_phantom").narrowed(["fever", "cough", "age"], ["consolidation", "mass"])
    backend = backends.writer("template", template.writer(table))
    corpus.run(corpus.from_table(table, variants=2), backend, home / "corpus")
    tokenizer = text.load_tokenizer("risk")
    (home / "bert").mkdir()
    tokenizer.save(str(home / "bert" / "tokenizer.json"))
    size = {"width": 16, "mlp_dim": 16, "num_heads": 2, "depth": 2, "mlm_head": True, "pad_id": 0}
    module = modernbert.make("tiny", vocab_size=tokenizer.get_vocab_size(), **size)
    tokens = Tokens(np.zeros((1, 4), np.int32), np.ones((1, 4), bool))
    variables = jax.jit(module.init)(jax.random.key(0), tokens)
    convert.save(module, variables, home / "bert", tokenizer=home / "bert")
    yield home
    patch.undo()


def settings(home, *more):
    """Return the flags; one in `more` takes the place of its like, for tuples would be joined."""
    folders = (
        f"--config.data.knowledge.folder={home / 'corpus'}",
        f"--config.init.text={home / 'bert'}",
    )
    given = {flag.split("=")[0]: flag for flag in (*SETTINGS, *folders, *more)}
    return list(given.values())


@pytest.fixture(scope="module")
def ran(home):
    """Return the config, the run folder and the results."""
    config, folder = train.resolve([*settings(home), f"--workdir={home / 'run'}"])
    return config, folder, train.run(config, folder)


def test_a_run_reports_the_masked_loss_of_held_out_paraphrases_before_and_after(ran):
    _, folder, results = ran
    assert written.read(folder).numbers == results
    after = results["masked_tokens/knowledge/loss"]
    before = results["masked_tokens/knowledge (untrained)/loss"]
    assert before["value"] == pytest.approx(
        np.log(text.load_tokenizer("risk").get_vocab_size()), abs=0.3
    )
    assert after["value"] < before["value"]
    assert after["n"] == before["n"] > 50
    assert after["low"] < after["value"] < after["high"]
    assert results["masked_tokens/knowledge/protocol"]["settings"]["rate"] == 0.3


def test_only_factors_differ_from_the_folder_the_run_began_with(home, ran):
    config, folder, _ = ran
    parts = assemble.parts(config)
    begun = assemble.initial_variables(parts)
    trained = weights.read_variables(folder, begun)
    before, after = (paths.flatten(v["params"]) for v in (begun, trained))
    _, published = convert.load(home / "bert")
    for path, leaf in paths.flatten(published["params"]).items():
        np.testing.assert_array_equal(after[f"text/{path}"], leaf)
    factors = {path for path in after if path.endswith(("lora_a", "lora_b"))}
    assert len(after) == len(paths.flatten(published["params"])) + len(factors)
    assert all(not np.array_equal(before[path], after[path]) for path in factors)


def test_an_image_encoder_is_not_read_where_none_is(home):
    config, _ = train.resolve(settings(home))
    with pytest.raises(UserError, match=r"init\.image=SOME, but recipe mlm has no image encoder"):
        assemble.parts({**config, "init": {**config["init"], "image": "SOME"}})
    published, _ = train.resolve(["--config=configs/prima.py:inject_pad"])
    assert not published["init"]["image"]


def test_the_vocabulary_of_another_encoder_is_refused(home, ran):
    """Ids of a small vocabulary are valid in a large embedding, and mean other words there."""
    config, _, _ = ran
    other = {**config, "data": {**config["data"], "tokenizer": "cxr_phantom"}}
    with pytest.raises(UserError, match=r"data\.tokenizer=cxr_phantom .* is not the vocabulary of"):
        assemble.parts(other)


def test_the_exported_encoder_guesses_as_the_trained_one_with_its_factors(home, ran):
    config, folder, _ = ran
    parts = assemble.parts(config)
    trained = weights.read(folder, assemble.initial_variables(parts))
    params = trained.variables["params"]
    export.export(parts, trained, home / "export", ())
    module, variables = convert.load(home / "export" / "text")
    assert module.lora is None
    tokens = text.tokenize(text.load_tokenizer(home / "export" / "text"), ["fever and cough"], 48)
    guess = lambda m, v: jax.jit(lambda v: m.apply(v, tokens, method="mlm_logits"))(v)
    expected = guess(parts.recipe.text, {"params": params["text"]})
    np.testing.assert_allclose(guess(module, variables), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_run_that_stopped_half_way_goes_on_bit_by_bit(home, ran, capsys):
    config, _, _ = ran
    half = home / "half"
    short = {**config, "train": {**config["train"], "steps": 3}}
    schedule = {**config["optim"], "schedule": "constant"}
    train.run({**short, "optim": schedule}, half)
    capsys.readouterr()
    again = train.run({**config, "optim": schedule}, half)
    assert f"Resuming {half} at step 3\n" in capsys.readouterr().out
    whole = train.run({**config, "optim": schedule}, home / "whole")
    assert again["masked_tokens/knowledge/loss"] == whole["masked_tokens/knowledge/loss"]
    begun = assemble.initial_variables(assemble.parts(config))
    ended = [weights.read_variables(folder, begun) for folder in (half, home / "whole")]
    jax.tree.map(np.testing.assert_array_equal, *ended)


def test_texts_no_physician_approved_stop_the_run_before_anything_is_written(home):
    config, folder = train.resolve(
        [
            *settings(home, "--config.data.knowledge.allow_unvetted=False"),
            f"--workdir={home / 'no'}",
        ]
    )
    with pytest.raises(UserError, match="were not approved by a physician"):
        train.run(config, folder)
    assert not (folder / "config.json").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("--config.data.knowledge.held_out=('template:7',)", "no 'template:7'. Did you mean"),
        ("--config.data.knowledge.held_out=()", "name a source of the corpus in"),
        ("--config.data.knowledge.folder=nowhere", r"nowhere/corpus.jsonl is missing"),
        ("--config.evals.protocols=('probe',)", "does not fit recipe mlm; accepted are masked_"),
        ("--config.recipe.rate=0.0", "recipe.rate=0.0 must be above 0"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused_by_name(home, setting, message):
    config, folder = train.resolve([*settings(home, setting), f"--workdir={home / 'refused'}"])
    with pytest.raises(UserError, match=message):
        train.run(config, folder)


def test_the_published_stage_is_planned_from_shapes():
    config, _ = train.resolve(["--config=configs/prima.py:inject_pad"])
    assert (config["train"]["batch_size"], config["data"]["text_length"]) == (16, 512)
    assert config["recipe"]["rate"] == 0.3
    assert config["recipe"]["text"]["lora"] == {
        "rank": 8, "alpha": 16.0, "dropout": 0.05, "layers": "", "fused": True,
    }  # fmt: skip
    optim = config["optim"]
    assert (optim["lr"], optim["weight_decay"], optim["schedule"]) == (5e-5, 1e-3, "cosine")
    assert optim["warmup"] == config["train"]["steps"] // 10 == 250 * 18
    blueprint = plan.blueprint(config)
    state = blueprint.state
    assert all("lora" in path for path in paths.flatten(state.params))
    assert any(path.startswith("text/mlm_") for path in paths.flatten(state.frozen))
    assert paths.count(state.params) == 1_689_600  # the paper's "about 1 %"
