"""Segmentation: decoders of published sizes, Dice against loops, and a problem that is learnt."""

import adapting
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medvlp_jax.config import UserError
from medvlp_jax.encoders import resnet, swin, vit
from medvlp_jax.encoders.base import Encoded
from medvlp_jax.evaluation import adaptation, decoders, segmentation
from medvlp_jax.evaluation.results import results_table
from medvlp_jax.training import params as paths
from medvlp_jax.training.step import make_embed

WIDTHS = {"resnet": (16, 16, 8, 8, 8), "vit": (16, 16, 8)}
TRAINED = {"steps": 60, "lr": 1e-2, "evaluate_every": 20, "warmup": 0.1}


@pytest.mark.parametrize(
    ("module", "size"),
    [(resnet.make("50"), 224), (vit.make("B/16"), 224), (swin.make("T"), 224)],
    ids=["R50", "ViT-B/16", "Swin-T"],
)
def test_decoders_reach_the_size_of_the_image(module, size):
    recipe = adaptation.Adapted(module, segmentation.Segmenter(3))
    images = jax.ShapeDtypeStruct((2, size, size, 1), jnp.uint8)
    apply = lambda batch: recipe.init_with_output(
        jax.random.key(0), batch, train=True, method="encode"
    )
    outputs, variables = jax.eval_shape(apply, {"image": images})
    assert outputs["outputs"].shape == (2, size, size, 3)
    head = paths.count(variables["params"]["head"]) / 1e6
    # The published U-Net of segmentation_models on a ResNet-50 has 9.0 M in its decoder, with a
    # skip of the stem that ours lacks; SETR-PUP's width is the 512 of MGCA.
    assert {"resnet": 8.5 < head < 9.1, "vit": 4 < head < 6, "swin": 1.5 < head < 6}[
        type(module).__name__.lower()
    ]


def test_tokens_that_are_no_grid_are_refused():
    with pytest.raises(UserError, match="15 tokens for images of 32 x 32: no grid"):
        decoders.grid_of(Encoded(None, np.zeros((1, 15, 4))), (32, 32))
    assert decoders.grid_of(Encoded(None, np.zeros((1, 8, 4))), (32, 64)).shape == (1, 2, 4, 4)


def random_maps(seed=0, shape=(5, 6, 7, 3)):
    rng = np.random.default_rng(seed)
    logits, mask = rng.normal(size=shape) * 3, rng.random(shape) < 0.4
    mask[0, ..., 0] = False  # nothing there, something predicted
    mask[1, ..., 1], logits[1, ..., 1] = False, -5.0  # nothing on either side
    logits[2, ..., 2] = -5.0  # missed
    return logits, mask


def test_losses_equal_a_loop():
    logits, mask = random_maps()
    cross, soft = [], []
    for i in range(5):
        for k in range(3):
            p, t = 1 / (1 + np.exp(-logits[i, ..., k])), mask[i, ..., k]
            cross.append(-np.mean(np.log(np.where(t, p, 1 - p))))
            soft.append(1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1))
    np.testing.assert_allclose(segmentation.bce(logits, mask), np.mean(cross), rtol=1e-5)
    np.testing.assert_allclose(segmentation.soft_dice(logits, mask), np.mean(soft), rtol=1e-5)


def loop_numbers(logits, mask, patients_twice=()):
    """Dice and IoU as the docstring says, image by image; listed images count twice."""
    rows = [*range(len(mask)), *patients_twice]
    found = {}
    macro, present, whole, whole_rest, ious = [], [], [], [], []
    for k in range(mask.shape[-1]):
        each, there, overlap = [], [], []
        p, t = logits[rows][..., k] > 0, mask[rows][..., k]
        for a, b in zip(p, t, strict=True):
            empty = not (a.any() or b.any())
            each.append(1.0 if empty else 2 * (a & b).sum() / (a.sum() + b.sum()))
            overlap.append(1.0 if empty else (a & b).sum() / (a | b).sum())
            if b.any():
                there.append(each[-1])
        macro.append(np.mean(each))
        ious.append(np.mean(overlap))
        present.append(np.mean(there))
        whole.append(2 * (p & t).sum() / (p.sum() + t.sum()))
        whole_rest.append(2 * (~p & ~t).sum() / ((~p).sum() + (~t).sum()))
    found["dice"], found["dice_present"] = np.mean(macro), np.mean(present)
    found["dice_micro"], found["iou"] = np.mean(whole), np.mean(ious)
    found["mdice_benchx"] = np.mean([whole, whole_rest])
    return found | {"dice/b": macro[1]}


def test_numbers_equal_a_loop_and_a_weight_of_two_is_the_image_twice():
    logits, mask = random_maps()
    counted = {k: np.asarray(v) for k, v in segmentation.counts(logits > 0, mask).items()}
    weights = np.array([[1.0, 1, 1, 1, 1], [1, 2, 1, 1, 2]])
    found = segmentation.scored(counted, "abc", weights)
    for row, twice in enumerate([(), (1, 4)]):
        for name, value in loop_numbers(logits, mask, twice).items():
            np.testing.assert_allclose(found[name][row], value, rtol=1e-12, err_msg=name)


def test_mgcas_average_weighs_a_small_last_batch_like_a_full_one():
    each = np.array([1.0, 1.0, 0.0])  # Dice of three images
    both = each[:, None] * 10
    found = {"both": both, "predicted": np.full((3, 1), 10.0), "truth": np.full((3, 1), 10.0)}
    assert segmentation.mgca_dice(found, batch=2) == 0.5
    np.testing.assert_allclose(segmentation.dice(found).mean(), 2 / 3)


def test_the_blind_map_is_the_part_that_the_masks_share():
    masks = np.zeros((4, 8, 8, 1), bool)
    masks[:, 2:6, 2:6] = True
    masks[0, :2] = True
    blind = segmentation.blind(masks)
    np.testing.assert_array_equal(blind, masks[1])


@pytest.fixture(scope="module", params=["resnet", pytest.param("vit", marks=pytest.mark.slow)])
def learnt(request, tmp_path_factory):
    examples = [*adapting.discs(64)]
    encoder = adapting.encoder(request.param)
    recipe = adaptation.Adapted(encoder, segmentation.Segmenter(1, WIDTHS[request.param]))
    weights = adapting.weights_of(request.param)
    variables = adaptation.initial(recipe, weights, examples[0], seed=0)
    folder = tmp_path_factory.mktemp("fit")
    fitted = adapting.train(recipe, variables, examples, segmentation.value, folder, **TRAINED)
    predict = make_embed(recipe, adapting.MESH, "predict")
    test = [*adapting.discs(32, seed=1)]
    found = [adapting.evaluate(predict, v, test) for v in (variables, fitted.variables)]
    return recipe, weights, fitted, found, test


def test_a_frozen_encoder_with_a_decoder_learns_to_segment(learnt):
    _, _, fitted, (before, after), _ = learnt
    assert segmentation.value(after) > 0.75
    assert segmentation.value(after) > segmentation.value(before) + 0.3
    assert fitted.value > 0.75


def test_the_frozen_encoder_is_the_same_to_the_bit(learnt):
    _, weights, fitted, _, _ = learnt
    for kind, tree in weights.items():
        kept = paths.flatten(fitted.variables[kind]["encoder"])
        for path, leaf in paths.flatten(tree).items():
            np.testing.assert_array_equal(kept[path], leaf, err_msg=path)


def test_results_beat_the_blind_map_and_say_how_they_were_measured(learnt):
    _, _, _, (_, after), test = learnt
    blind = segmentation.blind([e["mask"] for e in adapting.discs(64)])
    masks = np.stack([e["mask"] for e in test])
    control = segmentation.counts(np.broadcast_to(blind, masks.shape), masks)
    options = {"settings": {"size": 32}, "notes": {"step": 1}, "fraction": 0.1, "resamples": 200}
    control = {k: np.asarray(v) for k, v in control.items()}
    found = segmentation.run(after, control, ["disc"], **options)
    entry = found["segment/disc_10%/dice"]
    assert entry["low"] < entry["value"] < entry["high"]
    assert entry["value"] > entry["chance"] + 0.3
    assert (entry["n"], found["segment/disc_10%/protocol"]["patients"]) == (32, 16)
    assert "dice_mgca" in results_table(found)
    again = segmentation.run(after, control, ["disc"], train_encoder=True, **options)
    assert next(key.split("/")[0] for key in again) == "segment-train-encoder"


def test_regions_that_no_image_has_are_listed():
    counted = {k: np.ones((3, 2)) for k in ("predicted", "truth", "both")}
    counted["truth"][:, 1] = 0
    counted |= {"pixels": np.full(3, 9.0), "patient_id": np.arange(3)}
    options = {"fraction": 1, "settings": {}, "notes": {}, "resamples": 0}
    found = segmentation.run(counted, counted, ["a", "b"], **options)
    assert found["segment/regions/protocol"]["skipped"] == ["b"]
    assert "segment/regions/dice/b" not in found
    assert found["segment/regions/dice"]["value"] == 1
