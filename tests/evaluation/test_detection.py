"""Detection: targets, AP and FROC against loops from the definitions, and discs that are found."""

import adapting
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medvlp_jax.encoders import resnet, vit
from medvlp_jax.evaluation import adaptation, detection, yolo
from medvlp_jax.evaluation import average_precision as ap
from medvlp_jax.evaluation.average_precision import Boxes
from medvlp_jax.training.step import make_embed

IOUS = (0.4, 0.5, 0.75)
losses = jax.jit(yolo.losses)


def random_boxes(rng, count):
    corner = rng.uniform(0, 60, (count, 2))
    return np.concatenate([corner, corner + rng.uniform(8, 30, (count, 2))], axis=1)


def random_images(count=24, classes=2, seed=0):
    """True boxes, and detections near them, twice, and anywhere; scores on a grid, so with ties."""
    rng, found, truth = np.random.default_rng(seed), [], []
    for i in range(count):
        true = random_boxes(rng, rng.integers(0, 4) if i % 5 else 0)
        near = np.repeat(true, rng.integers(0, 3), axis=0)
        near = near + rng.normal(0, 3, near.shape)
        boxes = np.concatenate([near, random_boxes(rng, rng.integers(0, 3))])
        kinds = rng.integers(0, classes, len(boxes))
        found.append(Boxes(boxes, kinds, rng.integers(1, 40, len(boxes)) / 40))
        truth.append(Boxes(true, rng.integers(0, classes, len(true)), np.ones(len(true))))
    return found, truth


def loop_iou(a, b):
    down, across = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    both = max(down, 0) * max(across, 0)
    area = lambda x: (x[2] - x[0]) * (x[3] - x[1])
    return both / (area(a) + area(b) - both)


def loop_average_precision(found, truth, kind, threshold):
    """COCO's AP from its definition; equal scores enter together."""
    flat = [(s, i, j) for i, f in enumerate(found) for j, s in enumerate(f.scores)]
    flat = [(s, i, j) for s, i, j in flat if found[i].kinds[j] == kind]
    flat.sort(key=lambda entry: (-entry[0], entry[1], entry[2]))
    later = [s for s, *_ in flat[1:]] + [None]
    left = {(i, g) for i, t in enumerate(truth) for g, k in enumerate(t.kinds) if k == kind}
    total, points, hits = len(left), [], 0
    for seen, (_, i, j) in enumerate(flat, start=1):
        best, which = threshold, None
        for g in range(len(truth[i].boxes)):
            overlap = loop_iou(found[i].boxes[j], truth[i].boxes[g])
            if (i, g) in left and overlap >= best and (which is None or overlap > best):
                best, which = overlap, g
        if which is not None:
            left.remove((i, which))
            hits += 1
        if later[seen - 1] != flat[seen - 1][0]:
            points.append((hits, hits / seen))
    at = lambda percent: [p for h, p in points if 100 * h >= percent * total]
    return np.mean([max(at(percent), default=0.0) for percent in range(101)])


def without_ties(found, seed=5):
    rng = np.random.default_rng(seed)
    return [f._replace(scores=rng.random(len(f.scores))) for f in found]


def test_average_precision_equals_coco_in_a_loop():
    found, truth = random_images()
    found = without_ties(found)
    for kind in range(2):
        matched = ap.match(found, truth, kind, IOUS)
        values = ap.average_precision(matched, np.ones((1, len(found))))[0]
        expected = [loop_average_precision(found, truth, kind, t) for t in IOUS]
        np.testing.assert_allclose(values, expected, rtol=1e-12)
        assert 0 < expected[-1] < expected[0] < 1


def test_a_weight_of_two_is_the_image_twice_and_of_zero_not_at_all():
    found, truth = random_images(12)
    rng = np.random.default_rng(5)
    weights = rng.integers(0, 3, 12)
    again = [i for i, w in enumerate(weights) for _ in range(w)]
    many = [found[i] for i in again], [truth[i] for i in again]
    one, twice = ap.match(found, truth, 0, IOUS), ap.match(*many, 0, IOUS)
    ones = np.ones((1, len(again)))
    a = ap.average_precision(one, weights[None].astype(float))
    np.testing.assert_allclose(a, ap.average_precision(twice, ones), rtol=1e-12)
    np.testing.assert_allclose(
        ap.froc([one], weights[None].astype(float)), ap.froc([twice], ones), rtol=1e-12
    )


def loop_froc(found, truth, classes, rate):
    """Share of lesions at `rate` false ones an image: on the line between two thresholds.

    Without ties that is the largest share over all thresholds with at most so many.
    """
    scores = sorted({s for f in found for s in f.scores}, reverse=True)
    total, allowed = sum(len(t.boxes) for t in truth), rate * len(found)
    before = (0, 0)
    for threshold in scores:
        hits = false = 0
        for ours, theirs in zip(found, truth, strict=True):
            for k in range(classes):
                reached = set()
                for box, kind, s in zip(*ours, strict=True):
                    if kind != k or s < threshold:
                        continue
                    y, x = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
                    inside = [
                        g
                        for g, (t, tk) in enumerate(zip(theirs.boxes, theirs.kinds, strict=True))
                        if tk == k and t[0] <= y <= t[2] and t[1] <= x <= t[3]
                    ]
                    reached |= {*inside}
                    false += not inside
                hits += len(reached)
        if false > allowed:
            part = (allowed - before[0]) / (false - before[0])
            return (before[1] + part * (hits - before[1])) / total
        before = (false, hits)
    return before[1] / total


@pytest.mark.parametrize("tied", [False, True])
def test_froc_equals_a_search_over_all_thresholds(tied):
    found, truth = random_images(40)
    found = found if tied else without_ties(found)
    matched = [ap.match(found, truth, k, (0.5,)) for k in range(2)]
    values = ap.froc(matched, np.ones((1, 40)))[0]
    expected = [loop_froc(found, truth, 2, rate) for rate in ap.FROC_RATES]
    np.testing.assert_allclose(values, expected, rtol=1e-12)
    assert 0 < expected[0] < expected[-1]


def test_average_precision_takes_equal_scores_together():
    found, truth = random_images()
    found = [f._replace(scores=np.ceil(f.scores * 5) / 5) for f in found]
    for kind in range(2):
        matched = ap.match(found, truth, kind, IOUS)
        values = ap.average_precision(matched, np.ones((1, len(found))))[0]
        expected = [loop_average_precision(found, truth, kind, t) for t in IOUS]
        np.testing.assert_allclose(values, expected, rtol=1e-12)


def test_the_order_of_the_images_changes_nothing():
    found, truth = random_images(30)
    found = [f._replace(scores=np.ceil(f.scores * 4) / 4) for f in found]
    weights = np.random.default_rng(1).integers(0, 3, (3, 30)).astype(float)
    seen = []
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(30) if seed else np.arange(30)
        rows = [found[i] for i in order], [truth[i] for i in order]
        matched = [ap.match(*rows, k, IOUS) for k in range(2)]
        values = [ap.average_precision(m, weights[:, order]) for m in matched]
        seen.append(np.concatenate([*values, ap.froc(matched, weights[:, order])], axis=1))
        np.testing.assert_array_equal(seen[-1], seen[0])


@pytest.mark.parametrize("first", [True, False])
def test_one_box_in_every_image_finds_what_its_place_finds(first):
    box, none = np.array([[0, 0, 10, 10.0]]), np.zeros((0, 4))
    has = np.arange(100) < 20 if first else np.arange(100) >= 80
    one = lambda boxes: Boxes(boxes, np.zeros(len(boxes), int), np.full(len(boxes), 0.5))
    matched = ap.match([one(box)] * 100, [one(box if h else none) for h in has], 0, (0.5,))
    # 20 hits among 100 detections; 20 boxes and 80 false positives, so that of r false positives
    # an image, 100 r in all, go with 20 * 100 r / 80 boxes.
    assert ap.average_precision(matched, np.ones((1, 100)))[0, 0] == pytest.approx(0.2)
    expected = [min(r * 100 / 80, 1) for r in ap.FROC_RATES]
    np.testing.assert_allclose(ap.froc([matched], np.ones((1, 100)))[0], expected, rtol=1e-12)


def test_nms_keeps_the_best_of_each_heap_and_class():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 10], [20, 20, 30, 30.0]])
    found = Boxes(boxes, np.array([0, 0, 1, 0]), np.array([0.6, 0.9, 0.5, 0.7]))
    kept = ap.suppress(found, 0.5, limit=10)
    np.testing.assert_array_equal(kept.scores, [0.9, 0.7, 0.5])
    assert len(ap.suppress(found, 0.5, limit=2).scores) == 2


def test_the_legacy_mean_leaves_out_what_lowers_it():
    good = np.array([[0, 0, 10, 10.0]])
    box = lambda b, s: Boxes(b, np.zeros(len(b), int), np.full(len(b), s))
    none = box(np.zeros((0, 4)), 1.0)
    truth = [box(good, 1.0), box(good, 1.0), none]
    found = [box(good, 0.9), none, box(good, 0.95)]  # a hit, a miss, a false alarm
    assert ap.legacy_map(found, truth, IOUS) == (1.0, 1)
    clean = ap.average_precision(ap.match(found, truth, 0, IOUS), np.ones((1, 3)))[0]
    np.testing.assert_allclose(clean, 0.5 * 51 / 101)


def outputs_of(boxes, kinds, size=64, classes=2, confident=12.0):
    """Raw outputs that say exactly these boxes of one image, by the equations; no to all others."""
    anchors = [np.array(g, float)[:, ::-1] * size / 416 for g in yolo.ANCHORS]
    shapes = [(size // 32,) * 2, (size // 16,) * 2, (size // 8,) * 2]
    raw = [np.full((1, *s, 3, 5 + classes), -confident, np.float32) for s in shapes]
    for box, kind in zip(boxes, kinds, strict=True):
        h, w = box[2] - box[0], box[3] - box[1]
        best = max(
            ((i, a) for i in range(3) for a in range(3)),
            key=lambda at: loop_iou((0, 0, *anchors[at[0]][at[1]]), (0, 0, h, w)),
        )
        i, a = best
        stride = size / shapes[i][0]
        y, x = (box[0] + box[2]) / 2 / stride, (box[1] + box[3]) / 2 / stride
        logit = lambda p: np.log(p / (1 - p))
        cell = raw[i][0, int(y), int(x), a]
        cell[:4] = (
            logit(x % 1),
            logit(y % 1),
            np.log(w / anchors[i][a, 1]),
            np.log(h / anchors[i][a, 0]),
        )
        cell[4] = cell[5 + kind] = confident
    return {"raw": [jnp.asarray(r) for r in raw], "size": jnp.array([size, size], jnp.float32)}


TRUE = np.array([[5, 9, 13, 18], [20, 3, 60, 40], [30, 33, 44, 61.0]])
KINDS = np.array([1, 0, 1])


def test_what_the_equations_say_is_decoded_and_costs_nothing():
    outputs = outputs_of(TRUE, KINDS)
    found = jax.tree.map(np.asarray, jax.jit(lambda o: yolo.candidates(o, 3))(outputs))
    order = np.argsort(found["boxes"][0][:, 0])
    np.testing.assert_allclose(found["boxes"][0][order], TRUE, atol=1e-3)
    np.testing.assert_array_equal(found["kinds"][0][order], KINDS)
    padded = np.concatenate([TRUE, np.zeros((1, 4))])[None]
    terms = losses(outputs, padded.astype(np.float32), np.array([[*KINDS, -1]]))
    assert float(terms["shape"]) < 1e-8
    assert float(terms["kind"]) < 1e-4
    assert float(terms["object"]) < 1e-2
    # Of the place what is left is the entropy of where in the cell the centre lies.
    expected = []
    for box in TRUE:
        h, w = box[2:] - box[:2]
        sizes = [np.array(g, float)[:, ::-1] * 64 / 416 for g in yolo.ANCHORS]
        overlaps = [[loop_iou((0, 0, *a), (0, 0, h, w)) for a in g] for g in sizes]
        stride = (32, 16, 8)[int(np.max(overlaps, axis=1).argmax())]
        p = (box[:2] + box[2:]) / 2 / stride % 1
        entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p)).sum()
        expected.append((2 - h * w / 64**2) * entropy)
    np.testing.assert_allclose(float(terms["place"]), np.mean(expected), rtol=1e-4)


def test_a_prediction_that_overlaps_without_owning_is_ignored():
    outputs = outputs_of(TRUE[:1], KINDS[:1])
    loss = lambda outputs: float(
        losses(outputs, TRUE[None, :1].astype(np.float32), KINDS[None, :1])["object"]
    )
    fine = np.array(outputs["raw"][2])
    row, column = 1, 1  # the cell of the centre (9, 13.5)
    own = int(fine[0, row, column, :, 4].argmax())
    before = loss(outputs)
    other = fine.copy()
    other[0, row, column, (own + 1) % 3] = fine[0, row, column, own]
    anchors = np.array(yolo.ANCHORS[2], float) * 64 / 416
    shift = np.log(anchors[own] / anchors[(own + 1) % 3])
    other[0, row, column, (own + 1) % 3, 2:4] += shift  # the same box from another anchor
    assert loss({**outputs, "raw": [*outputs["raw"][:2], jnp.asarray(other)]}) <= before + 1e-3
    far = fine.copy()
    far[0, 6, 6, 0, 4] = 5.0  # a false alarm elsewhere costs its cross-entropy
    assert loss({**outputs, "raw": [*outputs["raw"][:2], jnp.asarray(far)]}) > before + 4.9


@pytest.mark.parametrize("module", [resnet.make("50"), vit.make("B/16")], ids=["R50", "ViT-B/16"])
def test_three_scales_at_published_sizes(module):
    recipe = adaptation.Adapted(module, yolo.Detector(4))
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.uint8)
    apply = lambda batch: recipe.init_with_output(
        jax.random.key(0), batch, train=True, method="encode"
    )[0]["outputs"]["raw"]
    shapes = [raw.shape for raw in jax.eval_shape(apply, {"image": images})]
    assert shapes == [(2, s, s, 3, 9) for s in (7, 14, 28)]


def test_the_blind_detector_knows_where_boxes_use_to_be():
    usual, rare = np.array([[10, 10, 40, 40.0]]), np.array([[50, 50, 60, 60.0]])
    box = lambda b, k: Boxes(b, np.array([k]), np.ones(1))
    found = detection.blind([box(usual, 0), box(usual + 1, 0), box(rare, 0), box(rare, 1)], 2)
    assert found.kinds.tolist() == [0, 0, 1]
    np.testing.assert_allclose(found.scores, [2 / 3, 1 / 3, 1])
    assert yolo.box_iou(found.boxes[0], usual[0]) > 0.9


def test_results_of_the_truth_as_a_prediction_are_perfect_and_of_others_are_not():
    _, truth = random_images(20)
    pad = lambda rows, value: np.stack(
        [np.concatenate([r, np.full((4 - len(r), *r.shape[1:]), value)]) for r in rows]
    )
    boxes, kinds = pad([t.boxes for t in truth], 0), pad([t.kinds for t in truth], -1)
    found = {"true_boxes": boxes, "true_kinds": kinds, "patient_id": np.arange(20) // 2}
    found |= {"boxes": boxes, "kinds": np.maximum(kinds, 0), "scores": (kinds >= 0) * 0.9}
    options = {"fraction": 0.1, "settings": {}, "notes": {"seed": 3}, "resamples": 20}
    control = detection.blind(truth, 3)
    results = detection.run(found, control, ["a", "b", "never"], **options)
    for name in ("map", "ap50", "froc", "froc/0.125", "ap/a", "legacy_map"):
        assert results[f"detect/boxes_10%/{name}"]["value"] == pytest.approx(1), name
    assert results["detect/boxes_10%/map"]["chance"] < 0.3
    notes = results["detect/boxes_10%/protocol"]
    assert (notes["skipped"], notes["patients"], notes["seed"]) == (["never"], 10, 3)
    found["scores"] = found["scores"] * 0
    results = detection.run(found, control, ["a", "b"], train_encoder=True, **options)
    assert results["detect-train-encoder/boxes_10%/map"]["value"] == 0
    assert "detect-train-encoder/boxes_10%/legacy_map" not in results


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    examples = [*adapting.discs(128, side=64)]
    recipe = adaptation.Adapted(adapting.encoder(), yolo.Detector(1, 16), train_encoder=True)
    variables = adaptation.initial(recipe, adapting.weights_of(), examples[0], seed=0)
    settings = {"steps": 200, "lr": 1e-2, "evaluate_every": 100, "encoder_lr": 1.0, "clip": 10.0}
    folder = tmp_path_factory.mktemp("fit")
    fitted = adapting.train(recipe, variables, examples, detection.value, folder, **settings)
    predict = make_embed(recipe, adapting.MESH, "predict")
    test = [*adapting.discs(32, seed=1, side=64)]
    return [adapting.evaluate(predict, v, test) for v in (variables, fitted.variables)]


@pytest.mark.slow
def test_an_encoder_with_heads_learns_to_find_discs(learnt):
    before, after = map(detection.value, learnt)
    assert after > 0.5
    assert after > before + 0.3


@pytest.mark.slow
def test_results_hold_every_metric_and_beat_the_blind_detector(learnt):
    control = detection.blind(detection.truth(learnt[1]), 1)
    options = {"fraction": 1, "settings": {"size": 64}, "notes": {}, "resamples": 50}
    found = detection.run(learnt[1], control, ["disc"], **options)
    names = {"map", "ap50", "froc", "legacy_map"}
    assert names <= {key.split("/", 2)[2] for key in found}
    entry = found["detect/disc/ap50"]
    assert entry["low"] <= entry["value"] <= entry["high"]
    assert entry["value"] > entry["chance"]
    assert found["detect/disc/protocol"]["boxes"] == {"disc": 32}
