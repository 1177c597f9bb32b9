"""A stage takes what the run before has, begins what that lacks, and lists all else."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_config

from medvlp_jax import assemble, convert, weights
from medvlp_jax.config import UserError
from medvlp_jax.encoders import dinov2
from medvlp_jax.training.checkpoint import Checkpointer
from medvlp_jax.training.step import TrainState

LATER = types.SimpleNamespace(fresh=("classifier", "fusion"), left=("^text/mlm_",))


def template():
    return {
        "params": {
            "image": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)},
            "text": {"kernel": jnp.zeros((4, 4))},
            "classifier": {"kernel": jnp.full((3, 5), 7.0)},
        }
    }


@pytest.fixture
def before(monkeypatch):
    """What the run before has; to be changed by a test."""
    held = {
        "image": {"kernel": np.ones((2, 3)), "bias": np.ones(3)},
        "text": {"kernel": np.ones((4, 4)), "mlm_dense": {"kernel": np.ones((4, 4))}},
    }
    trained = weights.Trained({"params": held}, step=1)
    monkeypatch.setattr(weights, "_read", lambda folder: trained)
    return held


def test_a_selection_without_a_step_does_not_hide_the_checkpoints(tmp_path):
    params = {"head": {"kernel": jnp.ones(3)}}
    (tmp_path / "selected" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="has no checkpoint"):
        weights.read(tmp_path, {"params": params})
    save(tmp_path, 1, params)
    found = weights.read(tmp_path, {"params": params})
    np.testing.assert_array_equal(found.variables["params"]["head"]["kernel"], np.ones(3))
    assert found[1:] == (1, False)


def save(folder, step, params):
    state = TrainState(jnp.int32(step), params, {}, {}, optax.sgd(0.1).init(params))
    checkpointer = Checkpointer(folder / "checkpoints")
    checkpointer.save(step, state, {}, {})
    checkpointer.close()


def test_the_step_that_is_read_is_told(tmp_path):
    """Of the newest checkpoint, and of the one that was selected."""
    params = {"head": {"kernel": jnp.ones(3)}}
    save(tmp_path, 2, params)
    save(tmp_path, 5, params)
    assert weights.read(tmp_path, {"params": params})[1:] == (5, False)
    save(tmp_path / "selected", 3, {"head": {"kernel": jnp.zeros(3)}})
    found = weights.read(tmp_path, {"params": params})
    assert found[1:] == (3, True)
    np.testing.assert_array_equal(found.variables["params"]["head"]["kernel"], np.zeros(3))


def test_a_folder_says_what_an_encoder_is_and_the_config_how_it_is_run(tmp_path):
    module = dinov2.make("tiny")
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 28, 28, 3)))
    convert.save(module, jax.tree.map(lambda s: np.ones(s.shape, np.float32), shapes), tmp_path)
    spec = {"name": "vit", "depth": 99, "drop_path": 0.2, "kept_patches": 0.5}
    loaded, _ = weights.load_encoder(tmp_path, spec, seed=0)
    assert (loaded.drop_path, loaded.kept_patches, loaded.depth) == (0.2, 0.5, module.depth)


@pytest.mark.parametrize(
    ("said", "line"),
    [
        (None, ""),
        ({"size": 224}, ""),
        ({"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}, ""),
        ({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}, "mean 0.5, 0.5, 0.5, std 0.25, 0.25"),
        ({"image_processor_type": "ViTImageProcessor"}, "mean 0.5, 0.5, 0.5, std 0.5, 0.5, 0.5; "),
    ],
)
def test_other_numbers_than_the_runs_are_said_of_the_image_encoder(tmp_path, capsys, said, line):
    module = dinov2.make("tiny", depth=1, width=16, num_heads=2, image_size=28)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 28, 28, 3)))
    convert.save(module, jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes), tmp_path)
    if said is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    config = tiny_config.get_config().to_dict()
    config["init"] |= {"image": str(tmp_path), "text": ""}
    assemble.parts(config)
    found = capsys.readouterr().out
    assert line in found
    assert found.count("runs normalise by ImageNet's: mean 0.485, 0.456, 0.406") == bool(line)
    assemble.parts(config, pretrained=False)  # of a run that was trained before
    assert "ImageNet" not in capsys.readouterr().out


def test_what_both_have_is_taken_and_what_is_new_begins(before, capsys):
    found = weights.begin_from("RUN", template(), LATER)["params"]
    assert np.all(np.asarray(found["image"]["kernel"]) == 1)
    assert np.all(np.asarray(found["classifier"]["kernel"]) == 7)
    assert set(found["text"]) == {"kernel"}
    said = capsys.readouterr()
    assert "takes image, text; begins classifier" in said.out + said.err


def test_a_part_that_both_have_is_never_begun_anew(before):
    before["classifier"] = {"kernel": np.full((3, 5), 2.0)}
    found = weights.begin_from("RUN", template(), LATER)["params"]
    assert np.all(np.asarray(found["classifier"]["kernel"]) == 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held.pop("text"), "missing text/kernel"),
        (lambda held: held["image"].pop("bias"), "missing image/bias"),
        (lambda held: held.update(head={"kernel": np.ones(2)}), "unused head/kernel"),
        (
            lambda held: held["image"].update(kernel=np.ones((2, 4))),
            r"image/kernel is \(2, 4\), the model has \(2, 3\)",
        ),
        (lambda held: held.update(classifier={"bias": np.ones(2)}), "missing classifier/kernel"),
    ],
)
def test_everything_that_does_not_fit_is_listed(before, change, message):
    change(before)
    with pytest.raises(UserError, match=message):
        weights.begin_from("RUN", template(), LATER)


def test_a_recipe_without_stages_takes_all_or_fails(before):
    with pytest.raises(UserError, match="missing classifier/kernel; unused text/mlm_dense/kernel"):
        weights.begin_from("RUN", template(), types.SimpleNamespace())
