"""LGDEA: what each term sees, what relations change, and that everything trains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medvlp_jax.config import UserError
from medvlp_jax.data import packing
from medvlp_jax.encoders.base import Tokens
from medvlp_jax.losses import contrastive, evidence
from medvlp_jax.recipes import lgdea
from medvlp_jax.training import params as paths
from medvlp_jax.training import step as training

WEIGHTS = dict.fromkeys(lgdea.TERMS, 1.0)
BLOCK = {"depth": 1, "width": 16, "num_heads": 2, "mlp_dim": 16}
VIT = {"name": "vit", "variant": "tiny", **BLOCK, "patch_size": 16, "image_size": 32}
BERT = {"name": "bert", "variant": "tiny", "vocab_size": 30, **BLOCK, "pooling": "mean"}
BERT |= {"dropout": 0.0, "attention_dropout": 0.0}
IMAGES = 9


def make(**fields):
    small = {"dim": 8, "prototypes": 5, "lesions": 3, "depth": 1, "num_heads": 2, "loss_tile": 0}
    small |= {"related": 4, "kept": 6, "neighbours": 2}
    return lgdea.make(image=VIT, text=BERT, weights=WEIGHTS, **{**small, **fields})


def batch_of(size=6, seed=0):
    rng = np.random.default_rng(seed)

    def tokens(*shape):
        length = rng.integers(2, 6, (*shape, 1))
        return Tokens(rng.integers(4, 30, (*shape, 6)), np.arange(6) < length)

    told = rng.integers(0, 4, size)
    told[0] = 0
    return {
        "image": rng.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8),
        "report": tokens(size),
        "report_valid": np.arange(size) != 1,
        "evidence": tokens(size, 3),
        "evidence_mask": np.arange(3) < told[:, None],
        "paired": np.arange(size) < 3,
        "image_row": np.arange(size) + 1,
        "report_row": np.arange(size) + 2,
    }


RECIPE = make()
# One program instead of hundreds of small ones.
ENCODE = jax.jit(lambda variables, batch: RECIPE.apply(variables, batch, method="encode"))


@pytest.fixture(scope="module")
def model():
    recipe, batch = RECIPE, batch_of()
    variables = training.init_variables(recipe, batch, 0)
    none = recipe.no_relations(IMAGES)
    features = ENCODE(variables, batch)
    judge = jax.jit(lambda v, f, b: recipe.apply(v, f, b, method="objective"))
    return recipe, batch, variables, none, features, judge


def related(none, batch):
    """Return relations of two of the batch's unpaired images with two of its reports."""
    made = {name: array.copy() for name, array in none.items()}
    rng = np.random.default_rng(1)
    made["pseudo"] = rng.dirichlet(np.ones(5), IMAGES).astype(np.float32)
    for row, confidence in ((4, 0.9), (5, 0.6)):
        image = batch["image_row"][row]
        made["confidence"][image] = confidence
        made["column"][image, :2] = batch["report_row"][[3, 5]]
        made["weight"][image, :2] = 0.75, 0.25
    return made


def test_maps_are_the_attention_of_lesions_that_are_like_the_phrase(model):
    recipe, batch, variables, _, features, _ = model
    phrase = Tokens(batch["evidence"].ids[:, 0], batch["evidence"].mask[:, 0])
    see = jax.jit(lambda v, b: recipe.apply(v, b, method="localise"))
    found = see(variables, {"image": batch["image"]})
    said = see(variables, {"phrase": phrase})
    # Attention sums to 1 over the patches: what is left is the lesions' own sum.
    lesions = np.asarray(features["lesions"])
    np.testing.assert_allclose(found["lesions"].sum(1), lesions.sum(1), rtol=1e-4, atol=1e-5)
    told = np.asarray(batch["evidence_mask"])[:, 0]
    phrases = np.asarray(features["phrases"])[:, 0]
    np.testing.assert_allclose(said["lesions"][told], phrases[told], atol=1e-5)
    # The phrase is read as the report is, in the space of the global embedding.
    text = see(variables, {"phrase": batch["report"]})["cosine"]
    np.testing.assert_allclose(text, features["text"], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found["cosine"], axis=-1), 1, rtol=1e-5)


def test_relations_are_contrasted_in_the_global_space_too(model):
    _, batch, variables, none, features, _ = model
    given = {**variables, "relations": related(none, batch)}
    recipe, target, trust = make(global_temperature=0.2), np.zeros((6, 6)), np.zeros(6)
    trust[[4, 5]] = 0.9, 0.6
    told = batch["evidence_mask"].any(1) & batch["report_valid"]
    target[np.ix_([4, 5], [3, 5])] = np.array([0.75, 0.25]) * told[[3, 5]]
    assert target.any()
    logits = np.asarray(features["image"], np.float64) @ np.asarray(features["text"]).T / 0.2
    logits[:, ~batch["report_valid"]] = -1e30  # no text, no negative
    trusted = trust @ target / np.maximum(target.sum(0), 1e-9)
    total = 0.0
    for x, t, c in ((logits, target, trust), (logits.T, target.T, trusted)):
        for i in np.flatnonzero(t.sum(1)):
            log_share = x[i] - np.log(np.exp(x[i]).sum())
            total -= c[i] * sum(t[i] / t[i].sum() * log_share) / c[t.sum(1) > 0].sum() / 2
    found = recipe.apply(given, features, batch, method="objective")["global_relations"]
    np.testing.assert_allclose(found, total * np.mean(~batch["paired"]), rtol=1e-5)


@pytest.mark.parametrize("tile", [0, 4])
def test_a_pair_is_a_relation_in_their_contrasts(model, tile):
    """The specification's T holds 1 for a pair: its image is no negative of its own report."""
    _, batch, variables, none, features, _ = model
    made, pair = related(none, batch), 2
    image = batch["image_row"][5]
    made["column"][image, :2] = batch["report_row"][[pair, 3]]
    made["weight"][image, :2] = 0.1, 0.9
    given = {**variables, "relations": made}
    told = batch["evidence_mask"].any(1)
    assert told[[pair, 3]].all()
    a, b = (np.asarray(features[f"{side}_direction"], np.float64) for side in ("image", "text"))
    for related_pairs in (True, False):
        target = np.diag(np.where(batch["paired"] & related_pairs, 1.0, 0))
        target[4, [3, 5]], target[5, [pair, 3]] = (0.75, 0.25), (0.1, 0.9)
        target *= told
        trust = np.array([0, 0, 0, 0, 0.9, 0.6])
        trusted = trust @ target / np.maximum(target.sum(0), 1e-9)
        logits = np.where(told, a @ b.T / 0.07, -1e30)
        total = 0.0
        for x, t, c in ((logits, target, trust), (logits.T, target.T, trusted)):
            for i in np.flatnonzero(t.sum(1)):
                log_share = x[i] - np.log(np.exp(x[i]).sum())
                total -= c[i] * sum(t[i] / t[i].sum() * log_share) / c[t.sum(1) > 0].sum() / 2
        recipe = make(related_pairs=related_pairs, loss_tile=tile)
        value = lambda seen, recipe=recipe: recipe.apply(
            given, features | {"image_direction": seen}, batch, method="objective"
        )["relations"]
        found, moves = jax.value_and_grad(value)(features["image_direction"])
        np.testing.assert_allclose(found, total * np.mean(~batch["paired"]), rtol=1e-5)
        # Towards its own report, or away from it.
        assert (np.vdot(moves[pair], b[pair]) < 0) == related_pairs


def test_relations_may_move_images_alone(model):
    _, batch, variables, none, features, _ = model
    given = {**variables, "relations": related(none, batch)}

    def gradients(moved, term, *names):
        recipe = make(moved=moved)
        value = lambda met: recipe.apply(given, features | met, batch, method="objective")[term]
        return jax.value_and_grad(value)({name: features[name] for name in names})

    for term, *names in (
        ("relations", "image_direction", "text_direction"),
        ("global_relations", "image", "text"),
    ):
        (one, both), (other, images) = (gradients(moved, term, *names) for moved in lgdea.MOVED)
        assert one == other
        np.testing.assert_array_equal(both[names[0]], images[names[0]])
        assert np.any(both[names[1]])
        assert not np.any(images[names[1]])
    for name in ("moved", "paired_moved"):
        with pytest.raises(UserError, match=f"recipe.{name} must be both or images, got 'texts'"):
            make(**{name: "texts"})


def test_a_pair_may_move_its_report_too(model):
    _, batch, variables, none, features, _ = model
    for moved in lgdea.MOVED:
        recipe = make(paired_moved=moved)
        value = lambda report, recipe=recipe: recipe.apply(
            {**variables, "relations": none},
            features | {"report_evidence": report},
            batch,
            method="objective",
        )["paired"]
        assert np.any(jax.grad(value)(features["report_evidence"])) == (moved == "both")


@pytest.mark.slow
def test_features_are_those_of_the_modalities_in_the_batch(model):
    _, batch, variables, _, whole, _ = model
    image = {"image", "image_pooled", "lesions", "image_evidence", "image_direction", "image_joint"}
    report = {"phrases", "phrases_raw", "report_evidence", "report_told", "text_direction"}
    assert set(whole) == image | report | {"text", "text_joint"}
    for keys, expected in (
        (("image",), image),
        (("report",), {"text"}),
        (("evidence", "evidence_mask"), report),
    ):
        part = ENCODE(variables, {key: batch[key] for key in keys})
        assert set(part) == expected
        for name, value in part.items():
            np.testing.assert_allclose(value, whole[name], rtol=1e-4, atol=1e-5)


def test_rows_are_encoded_independently(model):
    _, batch, variables, _, whole, _ = model
    some = jax.tree.map(lambda x: x[2:5], batch)
    part = ENCODE(variables, some)
    for name, value in part.items():
        np.testing.assert_allclose(value, whole[name][2:5], rtol=1e-4, atol=1e-5)


def test_packed_texts_give_the_same_features(model):
    _, batch, variables, _, whole, _ = model
    packed = packing.Packing({"report": 1.0, "evidence": 2.0}, 2)(batch)
    assert packed["evidence"].mask.sum() == batch["evidence"].mask[batch["evidence_mask"]].sum()
    part = ENCODE(variables, packed)
    assert set(part) == set(whole)
    for name, value in part.items():
        np.testing.assert_allclose(value, whole[name], rtol=1e-4, atol=1e-5)


def test_without_relations_only_pairs_and_phrases_count(model):
    _, batch, variables, none, f, judge = model
    terms = judge({**variables, "relations": none}, f, batch)
    assert set(terms) == set(lgdea.TERMS)
    assert terms["unpaired"] == terms["relations"] == 0
    pair = batch["paired"] & batch["evidence_mask"].any(1)
    mu = variables["params"]["prototypes"]
    np.testing.assert_allclose(
        terms["paired"],
        evidence.paired_divergence(f["report_evidence"], f["image_evidence"], valid=pair),
        rtol=1e-5,
    )
    rebuilt = evidence.reconstruction(
        f["phrases"], batch["evidence_mask"], mu, temperature=0.1, shrinkage=0.01 / 5
    )
    np.testing.assert_allclose(terms["reconstruction"], rebuilt, rtol=1e-5)
    valid = batch["paired"] & batch["report_valid"]
    expected = contrastive.info_nce(f["image"], f["text"], 1 / 0.07, valid=valid)
    np.testing.assert_allclose(terms["global"], expected, rtol=1e-5)
    report, image = (np.asarray(f[f"{side}_evidence"]) for side in ("report", "image"))
    told = batch["evidence_mask"].any(1)
    share = np.mean([(image[i] + report[i]) / 2 if told[i] else image[i] for i in range(6)], 0)
    usage = 1 + (share * np.log(share)).sum() / np.log(5)
    np.testing.assert_allclose(terms["usage"], usage, rtol=1e-4)
    # Alignment: each pair's own report is its positive, all that say something are candidates.
    a = evidence.mean_direction(f["lesions"])
    b = evidence.mean_direction(f["phrases"], batch["evidence_mask"])
    s = np.asarray(a @ b.T, np.float64) / 0.07
    s[:, ~told] = -1e30
    rows = s - np.log(np.exp(s).sum(1, keepdims=True))
    columns = s - np.log(np.exp(s).sum(0, keepdims=True))
    loss = -sum(rows[i, i] + columns[i, i] for i in np.flatnonzero(pair)) / 2 / pair.sum()
    np.testing.assert_allclose(terms["alignment"], loss, rtol=1e-4)


def test_relations_teach_the_unpaired_images_they_trust(model):
    _, batch, variables, none, f, judge = model
    made = related(none, batch)
    before = judge({**variables, "relations": none}, f, batch)
    after = judge({**variables, "relations": made}, f, batch)
    row = batch["image_row"]
    confidence = np.where(batch["paired"], 0, made["confidence"][row])
    expected = evidence.unpaired_divergence(made["pseudo"][row], f["image_evidence"], confidence)
    share = np.mean(~batch["paired"])
    assert 0 < share < 1
    np.testing.assert_allclose(after["unpaired"], share * expected, rtol=1e-5)
    assert after["unpaired"] > 0
    for name in ("reconstruction", "paired", "alignment", "global", "usage"):
        np.testing.assert_array_equal(after[name], before[name])
    told = batch["evidence_mask"].any(1)
    assert told[[3, 5]].any()
    a = evidence.mean_direction(f["lesions"])
    b = evidence.mean_direction(f["phrases"], batch["evidence_mask"])
    s = np.asarray(a @ b.T, np.float64) / 0.07
    s[:, ~told] = -1e30  # what says nothing is no negative
    target = np.zeros((6, 6))
    target[4, [3, 5]], target[5, [3, 5]] = (0.75, 0.25), (0.75, 0.25)
    target *= told
    trust = np.where(target.sum(1) > 0, confidence, 0)
    total = 0.0
    for x, t, c in ((s, target, trust), (s.T, target.T, trust @ target / (target.sum(0) + 1e-30))):
        for i in np.flatnonzero(t.sum(1)):
            log_share = x[i] - np.log(np.exp(x[i]).sum())
            total -= c[i] * sum(t[i] / t[i].sum() * log_share) / c[t.sum(1) > 0].sum() / 2
    np.testing.assert_allclose(after["relations"], share * total, rtol=1e-4)
    # Without their share they are means over the rows that are trusted.
    whole = make(by_share=False).apply(
        {**variables, "relations": made}, f, batch, method="objective"
    )
    for name in ("unpaired", "relations", "global_relations"):
        np.testing.assert_allclose(share * whole[name], after[name], rtol=1e-6)


def test_permuting_the_batch_changes_no_term(model):
    _, batch, variables, none, f, judge = model
    state = {**variables, "relations": related(none, batch)}
    order = np.array([4, 2, 0, 5, 1, 3])
    permuted = judge(state, *jax.tree.map(lambda x: x[order], (f, batch)))
    for name, value in judge(state, f, batch).items():
        np.testing.assert_allclose(permuted[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_every_parameter_moves(model):
    recipe, batch, variables, none, _, _ = model
    made = related(none, batch)

    def total(params):
        return sum(recipe.apply({"params": params, "relations": made}, batch).values())

    gradients = paths.flatten(jax.jit(jax.grad(total))(variables["params"]))
    # A key's bias shifts all logits of a softmax alike.
    still = [
        name
        for name, value in gradients.items()
        if float(jnp.abs(value).max()) < 1e-8 and not name.endswith("key/bias")
    ]
    assert still == []


def test_refresh_relates_images_to_reports_of_their_pattern():
    recipe = make(neighbours=6, hops=3, related=4, kept=30)
    rng = np.random.default_rng(0)
    label = np.arange(60) % 3
    base = np.full((3, 5), 0.02)
    base[np.arange(3), np.arange(3)] = 0.92
    noisy = lambda: base[label] * np.exp(0.3 * rng.normal(size=(60, 5)))
    q = [x / x.sum(1, keepdims=True) for x in (noisy(), noisy())]
    images = {"image_evidence": q[0]}
    told = {"report_evidence": q[1], "report_told": np.ones(60)}
    made = {name: np.asarray(x) for name, x in recipe.refresh(images, told, pairs=9).items()}
    empty = recipe.no_relations(60)
    assert {n: (x.shape, x.dtype) for n, x in made.items()} == {
        n: (x.shape, x.dtype) for n, x in empty.items()
    }
    reached = made["weight"].sum(1) > 0
    assert reached[9:].mean() > 0.5
    best = made["column"][np.arange(60), made["weight"].argmax(1)]
    assert (label[best] == label)[reached].mean() > 0.95
    assert (made["confidence"][9:] > 0).mean() > 0.3
    mixed = np.einsum("im,imk->ik", made["weight"], q[1][made["column"]])
    np.testing.assert_allclose(made["pseudo"], mixed, rtol=1e-4, atol=1e-6)


def test_images_may_start_from_the_reports_they_meet():
    """Without any hop an image has its pair, or the reports nearest to it that are no hubs."""
    fields = {"neighbours": 6, "hops": 0, "related": 4, "kept": 5, "near_reports": 5}
    recipe = make(**fields, alignment_temperature=0.1)
    assert recipe.described == ("image_evidence", "image_joint")
    assert recipe.told == ("report_evidence", "report_told", "text_joint")
    assert recipe.told_by == ("evidence", "evidence_mask", "report")
    rng = np.random.default_rng(0)
    told = rng.dirichlet(np.ones(5), 30)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    image, text = unit(rng.normal(size=(40, 6))), unit(rng.normal(size=(30, 6)))
    images = {"image_evidence": rng.dirichlet(np.ones(5), 40), "image_joint": image}
    reports = {"report_evidence": told, "report_told": np.ones(30), "text_joint": text}
    made = {k: np.asarray(x) for k, x in recipe.refresh(images, reports, pairs=9).items()}
    share = np.exp(image @ text.T / 0.1)
    share /= share.sum(0)
    for i in range(40):
        weights = {r: share[i, r] for r in np.argsort(-share[i])[:4]} if i >= 9 else {i: 1}
        found = np.bincount(made["column"][i], made["weight"][i], 30)
        for r, weight in weights.items():
            np.testing.assert_allclose(found[r], weight / sum(weights.values()), rtol=1e-4)


def test_a_report_without_a_phrase_is_related_to_nothing():
    """Its distribution is uniform: it would be near, and agree with, every other such report."""
    recipe = make(neighbours=3, hops=2, related=4, kept=8, near_reports=5)
    rng = np.random.default_rng(0)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    is_told = np.arange(30) % 3 > 0
    said = np.where(is_told[:, None], rng.dirichlet(np.ones(5), 30), 1 / 5)
    images = {"image_evidence": rng.dirichlet(np.ones(5), 40)}
    images["image_joint"] = unit(rng.normal(size=(40, 6)))
    reports = {"report_evidence": said, "report_told": is_told}
    reports["text_joint"] = unit(rng.normal(size=(30, 6)))
    made = {k: np.asarray(x) for k, x in recipe.refresh(images, reports, pairs=9).items()}
    assert all(np.isfinite(x).all() for x in made.values())
    used = made["weight"] > 0
    assert is_told[made["column"][used]].all()
    assert (made["confidence"][9:] > 0).any()
    with pytest.raises(UserError, match="None of the reports of 9 pairs holds a phrase"):
        recipe.refresh(images, reports | {"report_told": np.arange(30) >= 9}, pairs=9)


def test_tiles_give_the_terms_and_gradients_of_the_whole_logits(model):
    recipe, batch, variables, none, _, _ = model
    made = related(none, batch)

    def both(params, recipe):
        terms = recipe.apply({"params": params, "relations": made}, batch)
        return sum(terms.values()), terms

    found = []
    for tile in (0, 4):
        tiled = recipe.clone(loss_tile=tile)
        run = jax.jit(jax.grad(lambda p, r=tiled: both(p, r), has_aux=True))
        found.append(run(variables["params"]))
    (whole, expected), (parts, terms) = found
    assert expected["relations"] > 0
    assert expected["alignment"] > 0
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    jax.tree.map(close, parts, whole)


def test_the_joint_space_means_both_cosines(model):
    _, batch, _, _, features, _ = model
    cosine = lambda name: features[f"image_{name}"] @ features[f"text_{name}"].T
    both = (features["image"] @ features["text"].T + cosine("direction")) / 2
    np.testing.assert_allclose(cosine("joint"), both, atol=1e-6)
    told = batch["evidence_mask"].any(1)
    np.testing.assert_array_equal(np.asarray(features["text_direction"]).any(1), told)


def test_texts_meet_images_where_the_recipe_says():
    at_evidence = make(meets="evidence")
    assert at_evidence.spaces == {"report": ("image_joint", "text_joint")}
    assert at_evidence.prompted == ("image_direction", "text_direction")
    assert RECIPE.prompted == RECIPE.spaces["report"] == ("image", "text")
    assert RECIPE.beside == ()


def test_prototypes_start_at_the_centres_of_the_phrases():
    recipe = make()
    rng = np.random.default_rng(0)
    # Features of a text encoder: five directions beside one, nine times as long, that all share.
    raw = 9 * np.eye(8)[7] + np.eye(8)[np.arange(60) % 5] + 0.1 * rng.normal(size=(60, 8))
    phrases = np.concatenate([raw.reshape(20, 3, 8), np.zeros((20, 1, 8))], 1)  # and empty places
    params = {"phrase_projection": {"kernel": 1, "bias": np.ones(8)}, "others": 2}
    start = recipe.start(params, phrases, 0)
    assert start["others"] == 2
    assert start["phrase_projection"]["kernel"] == 1
    np.testing.assert_allclose(start["phrase_projection"]["bias"], 1 - raw.mean(0), rtol=1e-6)
    assert sorted(start["prototypes"].argmax(1).tolist()) == list(range(5))
    np.testing.assert_allclose(np.linalg.norm(start["prototypes"], axis=1), 1, rtol=1e-5)
    with pytest.raises(UserError, match="prototypes=5 needs more than 3 phrases"):
        recipe.start(params, phrases[:1], 0)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"temperature": 0.0}, "recipe.temperature=0.0 must be above 0"),
        ({"prototypes": 1}, "recipe.prototypes=1 must be at least 2"),
        ({"alpha": 1.0}, r"recipe.alpha must be in \[0, 1\)"),
        ({"near_reports": 7}, "recipe.near_reports must be in 0 .. recipe.kept=6"),
        ({"related": 7}, "recipe.related must be in 2 .. recipe.kept=6"),
        ({"confidence": "both"}, "recipe.confidence must be evidence or link, got 'both'"),
        ({"meets": "both"}, "recipe.meets must be global or evidence, got 'both'"),
        ({"num_heads": 3}, "does not divide the image encoder's 16"),
        ({"loss_tile": -1}, "loss_tile"),
    ],
)
def test_what_cannot_be_is_refused(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        make(**fields)


def test_too_small_a_corpus_for_the_graphs_is_refused():
    told = {"report_evidence": np.ones((9, 5)) / 5}
    with pytest.raises(UserError, match="neighbours=2 needs more than 2"):
        make().refresh({"image_evidence": np.ones((2, 5)) / 5}, told, pairs=1)
