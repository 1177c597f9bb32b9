"""--plan: memory and FLOPs of the run's own step, from shapes."""

import json
import pathlib

import jax
import numpy as np
import pytest
import transformers

from medvlp_jax import cli, plan, sharding, train
from medvlp_jax.config import UserError
from medvlp_jax.training import flops
from medvlp_jax.training import params as paths

ROOT = pathlib.Path(__file__).parents[1]
TINY = {"width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 32}
VIT_B = {"name": "vit", "variant": "B/16", "dtype": "bfloat16"}


@pytest.fixture(autouse=True)
def _home(monkeypatch, tmp_path):
    jax.devices()  # the eight of conftest, before anything asks for others
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MEDVLP_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.delenv("MEDVLP_TEST_DATA", raising=False)


def config_of(name, **changes):
    config, _ = train.resolve([f"--config=configs/{name}"])
    for key, value in changes.items():
        section, _, leaf = key.partition("__")
        config[section][leaf] = value
    return config


def tiny_clip(**changes):
    """A two-tower config that compiles in seconds; equal texts make every batch key count."""
    config = config_of("clip.py:demo", train__batch_size=16, data__crop=32, **changes)
    config["recipe"] |= {"image": {"name": "vit", "variant": "tiny", "image_size": 32, **TINY}}
    config["recipe"]["text"] |= TINY
    config["recipe"] |= {"same_text": True, "loss_tile": 3}
    return config


def test_what_lies_on_a_device_is_what_the_compiled_step_is_handed(monkeypatch):
    monkeypatch.setattr(sharding, "FSDP_FLOOR", 64)
    config = tiny_clip()
    config["mesh"] |= {"data": 4, "fsdp": 2}
    blueprint = plan.blueprint(config)
    compiled = blueprint.step.lower(blueprint.state, blueprint.batch).compile()
    found = plan.make(blueprint)
    memory = compiled.memory_analysis()
    temporary = found.memory["activations and gradients"]
    assert sum(found.memory.values()) - temporary == memory.argument_size_in_bytes
    assert temporary == memory.temp_size_in_bytes
    # AdamW keeps two numbers a parameter; it, its schedule and the run each count steps.
    assert found.memory["optimiser"] == 2 * found.memory["parameters"] + 12
    assert 0 < found.loss_memory < temporary
    assert set(found.flops) == set(plan.PARTS) - {"language model"}
    assert min(found.flops.values()) > 0
    assert found.recomputed == 0


def test_fsdp_splits_large_parameters_and_their_optimiser_state():
    config = tiny_clip()
    config["recipe"]["text"] |= {"width": 1024, "num_heads": 16}
    whole = plan.blueprint(config)
    config["mesh"] |= {"data": 1, "fsdp": 8}
    split = plan.blueprint(config)
    large = sum(
        leaf.size * 4
        for leaf in paths.flatten(whole.state.params).values()
        if leaf.size >= sharding.FSDP_FLOOR
    )
    assert large > 0
    for name, copies in (("params", 1), ("optimizer", 2)):
        before, after = (plan.bytes_on_a_device(getattr(b.state, name)) for b in (whole, split))
        assert before - after == copies * large * 7 // 8


@pytest.mark.slow
def test_full_size_imitate_is_planned_without_data_weights_or_memory():
    before = sum(array.nbytes for array in jax.live_arrays())
    blueprint = plan.blueprint(config_of("imitate.py"))
    traced = blueprint.step.trace(blueprint.state, blueprint.batch)
    found, _ = flops.by_part(traced.jaxpr, flops.step_part)
    assert sum(array.nbytes for array in jax.live_arrays()) - before < 2**20
    assert not pathlib.Path("runs").exists() or not list(pathlib.Path("runs").glob("imitate-2*"))
    counts = {k: paths.count(v) for k, v in blueprint.state.variables["params"].items()}
    assert counts["image"] == 23_508_032  # torchvision's ResNet-50 without its classifier
    assert counts["text"] == 107_719_680  # BertModel, cased vocabulary, without its pooler
    # Two views forward, and twice that backward; 4.11 GMACs an image is the published figure. It
    # counts products with padding, and of pixels no gradient is asked: measured 4 % less.
    expected = 128 * 2 * 3 * 2 * 4.11e9
    assert 0.95 * expected < found["image encoder"] < expected
    assert found["text encoder"] == 0  # its features are cached
    assert any("Bio_ClinicalBERT is not read" in note for note in blueprint.notes)


@pytest.mark.slow
def test_two_full_size_towers_have_the_published_flops():
    """GMACs of ViT-B/16 at 224 pixels: 17.58, anchors of shared/reference; BERT-base by formula."""
    config = config_of("clip.py", data__text_length=128)
    config["recipe"]["image"] = VIT_B
    blueprint = plan.blueprint(config)
    traced = blueprint.step.trace(blueprint.state, blueprint.batch)
    found, _ = flops.by_part(traced.jaxpr, flops.step_part)
    pairs, tokens, width = 128, 128, 768
    assert found["image encoder"] == pytest.approx(pairs * 6 * 17.58e9, rel=0.03)
    block = tokens * (12 * width**2 + 2 * tokens * width)
    assert found["text encoder"] == pytest.approx(pairs * 6 * 12 * block, rel=0.03)


def test_remat_is_shown_as_flops_made_again():
    config = tiny_clip()
    config["recipe"]["image"]["remat"] = "block"
    blueprint = plan.blueprint(config)
    traced = blueprint.step.trace(blueprint.state, blueprint.batch)
    total, again = flops.by_part(traced.jaxpr, flops.step_part)
    # All products of a block but its last, whose value no gradient needs: 16 images of 5 tokens.
    products = 16 * 5 * 2 * (4 * 16**2 + 16 * 32)
    assert products < again["image encoder"] < 1.5 * products
    assert again["image encoder"] < total["image encoder"]
    assert again["text encoder"] == again["loss"] == 0


def test_an_encoder_folder_is_described_by_its_config_alone(tmp_path):
    described = transformers.BertConfig(
        vocab_size=77, hidden_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    (tmp_path / "config.json").write_text(json.dumps(described.to_dict()))
    config = tiny_clip()
    config["init"]["text"] = str(tmp_path)
    text = plan.blueprint(config).state.params["text"]
    assert text["word_embedding"].shape == (77, 24)


def test_an_encoder_of_the_hub_is_planned_by_the_sizes_of_the_config():
    config = config_of("cfcml.py:derm7pt", data__crop=32)
    size = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
    config["recipe"]["image"] |= size
    blueprint = plan.blueprint(config)
    assert blueprint.state.params["image"]["patch_embedding"]["kernel"].shape == (4, 4, 3, 8)
    assert "init.image=microsoft/swin-tiny-patch4-window7-224 is not read" in blueprint.notes[0]


def test_the_command_prints_a_table_and_writes_nothing(capsys, monkeypatch, tmp_path):
    config = tiny_clip()
    monkeypatch.setattr(train, "resolve", lambda argv: (config, tmp_path / "run"))
    train.main(["--config=configs/clip.py:demo", "--plan", "--devices=2"])
    printed = capsys.readouterr().out
    assert "16 pairs a step in 1 chunk(s) on 2 cpu device(s): data=2, fsdp=1, tensor=1" in printed
    rows = {line.strip().rsplit("  ", 1)[0].strip() for line in printed.splitlines()}
    for row in ("parameters", "optimiser", "activations and gradients", "(the loss alone, tempora"):
        assert any(line.startswith(row) for line in rows), row
    for part in set(plan.PARTS) - {"language model"}:
        assert any(line.startswith(part) for line in rows), part
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices=2"], "--devices goes with --plan"),
        (["--plan", "--devices=0"], "--devices must be at least 1, got 0"),
        (["--plan", "--devices=16"], "--devices=16, but this process already has 8"),
        (["--plan", "--config.mesh.fsdp=3"], "does not cover the 8 devices"),
        (["--plan", "--config.train.batch_size=12"], "batch_size=12 cannot be split over 8 dev"),
        (["--plan", "--config.data.text_length=600"], "600 tokens is longer than .* 512"),
        (["--plan", "--config.optim.freeze=('imgae',)"], "pattern 'imgae' matches no parameter"),
        (["--plan", "--config.recipe.image.variant=tny"], "Did you mean tiny"),
        (["--plan", "--config.data.pack=2"], r"data.pack=2.0 must be in \(0, 1\], or 0"),
        (["--plan", "--config.data.evidence.pack=1"], "Clip reads no text that could be packed"),
        (["--plan", "--config.data.pack=0.5", "--config.train.chunks=2"], "one of the two"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message):
    with pytest.raises(UserError, match=message):
        train.main(["--config=configs/clip.py:demo", *arguments])


def test_packed_reports_cost_what_their_rows_cost():
    found = []
    for share in (0.0, 0.5):
        blueprint = plan.blueprint(tiny_clip(data__pack=share))
        jaxpr = blueprint.step.trace(blueprint.state, blueprint.batch).jaxpr
        found.append(flops.by_part(jaxpr, flops.step_part)[0])
    alone, packed = found
    assert packed["image encoder"] == alone["image encoder"]
    assert packed["text encoder"] == pytest.approx(alone["text encoder"] / 2, rel=0.05)


def test_bad_input_leaves_with_code_2(capsys):
    assert cli.main(["train", "--config=configs/clip.py:demo", "--plan", "--devices=0"]) == 2
    assert "--devices must be at least 1" in capsys.readouterr().err


def test_gradients_flow_through_the_plan_of_any_chunking():
    """FLOPs do not depend on chunks but for what is encoded again."""
    blueprints = [plan.blueprint(tiny_clip(train__chunks=chunks)) for chunks in (1, 2)]
    once, chunked = (
        flops.by_part(b.step.trace(b.state, b.batch).jaxpr, flops.step_part) for b in blueprints
    )
    for part in ("image encoder", "text encoder"):
        assert chunked[0][part] - chunked[1][part] == pytest.approx(once[0][part], rel=0.02)
    np.testing.assert_allclose(chunked[0]["loss"], once[0]["loss"], rtol=0.02)
