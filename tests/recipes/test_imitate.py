"""IMITATE: shapes, windows, counts and equalities of the specification, section 1.11.2."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medvlp_jax import config, examples
from medvlp_jax.data import pipeline, text
from medvlp_jax.encoders.base import Tokens
from medvlp_jax.layers import reading
from medvlp_jax.recipes import imitate
from medvlp_jax.training import params as paths
from medvlp_jax.training import step as training

WEIGHTS = {"impression": 1.0, "findings": 1.0, "view_diagnosis": 1.0, "view_reading": 1.0}
RESNET = {
    "name": "resnet",
    "variant": "tiny",
    "embedding_size": 8,
    "hidden_sizes": (16, 32, 32, 64),
}
BERT = {"name": "bert", "variant": "tiny", "vocab_size": 50, "width": 16, "depth": 1, "mlp_dim": 32}


def make(**fields):
    small = {"dim": 32, "num_tokens": 32, "text_hidden": 32, "cached_text": False}
    return imitate.make(image=RESNET, text=BERT, weights=WEIGHTS, **{**small, **fields})


def batch_of(size, seed=0):
    rng = np.random.default_rng(seed)
    tokens = lambda: Tokens(
        rng.integers(4, 50, (size, 12)), np.arange(12) < rng.integers(3, 12, (size, 1))
    )
    return {
        "image": rng.integers(0, 256, (size, 64, 64, 1), dtype=np.uint8),
        "image_2": rng.integers(0, 256, (size, 64, 64, 1), dtype=np.uint8),
        "findings": tokens(),
        "impression": tokens(),
        "findings_valid": np.arange(size) % 3 != 1,
        "impression_valid": np.arange(size) % 4 != 2,
        "findings_id": np.arange(size) // 2,
        "impression_id": np.arange(size) // 2,
    }


def losses(recipe, variables, batch, seed=7):
    rngs = {"draws": jax.random.key(seed)}
    return recipe.apply(variables, batch, train=True, rngs=rngs, mutable=["batch_stats"])


def value_and_gradient(recipe, variables, batch):
    def total(params):
        terms, state = losses(recipe, {**variables, "params": params}, batch)
        return sum(terms[name] for name in WEIGHTS), (terms, state)  # what is watched is no loss

    return jax.jit(jax.value_and_grad(total, has_aux=True))(variables["params"])


@pytest.fixture(scope="module")
def small():
    recipe = make()
    return recipe, training.init_variables(recipe, batch_of(4), seed=0)


@pytest.mark.parametrize(
    ("size", "windows"),
    [
        (7, "0-1 0-1 0-2 1-2 1-3 2-3 2-4 3-4 3-4 3-5 4-5 4-6 5-6 5-7 6-7 6-7"),
        (14, "0-1 0-2 1-3 2-4 3-5 4-6 5-7 6-7 7-8 7-9 8-10 9-11 10-12 11-13 12-14 13-14"),
        (
            28,
            "0-2 1-4 3-6 5-7 7-9 8-11 10-13 12-14 14-16 15-18 17-20 19-21 21-23 22-25 24-27 26-28",
        ),
    ],
)
def test_adaptive_pooling_averages_torch_s_windows(size, windows):
    matrix = reading.adaptive_pool_matrix(size)
    for row, window in zip(matrix, windows.split(), strict=True):
        start, end = map(int, window.split("-"))
        np.testing.assert_array_equal(np.flatnonzero(row), np.arange(start, end))
        np.testing.assert_allclose(row[start:end], 1 / (end - start), rtol=1e-6)


@pytest.mark.hf
@pytest.mark.parametrize("size", [56, 28, 14, 7, 32, 8, 4])
def test_adaptive_pooling_equals_torch(size):
    import torch

    x = np.random.default_rng(0).normal(size=(2, 3, size, size)).astype(np.float32)
    matrix = reading.adaptive_pool_matrix(size)
    expected = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(x), 16)
    np.testing.assert_allclose(matrix @ x @ matrix.T, expected, atol=1e-6)


@pytest.mark.hf
def test_class_attention_equals_the_last_row_of_torch_s_attention_over_pooled_channels():
    import torch

    rng = np.random.default_rng(0)
    shapes = ((3, 20, 12, 6), (3, 5, 5, 9))
    levels = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    # One channel twice, all of the second level; another reading.
    draws = [[np.array([4, 1, 4, 0]), None], [np.array([2, 2, 5, 3]), np.arange(9)[::-1]]]
    fixed = rng.normal(size=(17, 256)).astype(np.float32)  # three rows of padding, the class token
    layer = reading.ClassAttention(num_heads=4)
    variables = layer.init(jax.random.key(0), levels, draws, fixed)
    variables = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), variables
    )
    p = variables["params"]
    reference = torch.nn.MultiheadAttention(256, 4, batch_first=True).double()
    stacked = lambda suffix, axis: np.concatenate(
        [np.asarray(p[f"{n}_{suffix}"]).T for n in ("query", "key", "value")], axis
    )
    pool = torch.nn.AdaptiveAvgPool2d(16)
    channels_of = lambda x, drawn: torch.tensor(x if drawn is None else x[..., drawn]).double()
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.tensor(stacked("kernel", 0)))
        reference.in_proj_bias.copy_(torch.tensor(stacked("bias", 0)))
        reference.out_proj.weight.copy_(torch.tensor(np.asarray(p["out"]["kernel"]).T))
        reference.out_proj.bias.copy_(torch.tensor(np.asarray(p["out"]["bias"])))
        expected = []
        for drawn in draws:
            tokens = [
                pool(channels_of(*pair).movedim(-1, 1)) for pair in zip(levels, drawn, strict=True)
            ]
            x = torch.cat([t.flatten(2) for t in tokens], 1)  # [B, T, G]
            x = torch.nn.functional.pad(x, (0, 0, 0, 4)) + torch.tensor(fixed)
            expected.append(reference(x, x, x, need_weights=False)[0][:, -1] + x[:, -1])
    ours = layer.apply(variables, levels, draws, fixed)
    # At this width and numbers up to 10 torch's own float32 is 3.5e-6 away from its float64.
    np.testing.assert_allclose(ours, torch.stack(expected, 1), rtol=1e-5, atol=4e-6)
    # bfloat16 keeps 8 bits, 0.4 % a rounding.
    half = layer.apply(variables, [level.astype(jnp.bfloat16) for level in levels], draws, fixed)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, ours, rtol=0, atol=0.02 * np.abs(ours).max())


def test_published_size_has_the_specified_tokens_shapes_and_30_66_million_trainable_parameters():
    recipe = imitate.make(
        image={"name": "resnet", "variant": "50"},
        text={"name": "bert", "variant": "base"},
        weights=WEIGHTS,
        cached_text=False,
    )
    image = jnp.zeros((2, 224, 224, 1), jnp.uint8)
    tokens = Tokens(jnp.zeros((2, 256), jnp.int32), jnp.ones((2, 256), bool))
    batch = {"image": image, "image_2": image, "findings": tokens, "impression": tokens}
    rngs = {"params": jax.random.key(0), "draws": jax.random.key(1)}
    features, variables = jax.eval_shape(
        lambda b: recipe.init_with_output(rngs, b, train=True, method="encode"), batch
    )
    trainable, frozen = paths.split(variables["params"], recipe.frozen)
    assert (
        sum(int(k * c) for k, c in zip(recipe.keep, recipe.image.level_widths, strict=True)) == 446
    )
    assert trainable["reading"]["positions"].shape == (1, 513, 256)
    names = ("image", "image_findings", "reading", "text", "text_findings")
    assert all(features[name].shape == (2, 512) for name in names)
    counts = {name: paths.count(tree) for name, tree in trainable.items()}
    attention = paths.count(trainable["reading"]["attention"])
    assert counts["image"] == 23_508_032
    assert (counts["diagnosis"], counts["text_head"], attention) == (5_249_536, 1_314_304, 263_168)
    assert paths.count(trainable["reading"]["head"]) == 197_888
    assert round(paths.count(trainable) / 1e6, 2) == 30.66
    assert paths.count(frozen) == pytest.approx(108e6, rel=0.01)


def test_two_backbone_passes_equal_the_released_four_in_loss_and_gradient(small):
    recipe, variables = small
    batch = batch_of(8)
    (loss_2, (terms_2, state_2)), grad_2 = value_and_gradient(recipe, variables, batch)
    four = recipe.clone(legacy_four_passes=True)
    (loss_4, (terms_4, state_4)), grad_4 = value_and_gradient(four, variables, batch)
    np.testing.assert_allclose(loss_2, loss_4, rtol=1e-6)
    for name in terms_2:
        np.testing.assert_allclose(terms_2[name], terms_4[name], rtol=1e-6)
    for part in grad_4:
        theirs = jax.tree.leaves(grad_4[part])
        # A bias before BatchNorm has no gradient, only the rounding of what cancels in it: both
        # readings of an image are one product in two passes, and two in four. So each is held
        # against 0, not against the other's rounding, which is a processor's own.
        rounding = 1e-6 * max(np.abs(b).max() for b in theirs)
        for a, b in zip(jax.tree.leaves(grad_2[part]), theirs, strict=True):
            if np.abs(b).max() <= rounding:
                np.testing.assert_allclose(a, 0, rtol=0, atol=rounding)
                continue
            atol = 1e-5 * max(np.abs(b).max(), 1e-2) + rounding
            np.testing.assert_allclose(a, b, rtol=0, atol=atol)
    # The averages differ, as in the specification 1.1: theirs move twice per view.
    twice = state_4["batch_stats"]["diagnosis"]["norm"]["mean"]
    assert not np.allclose(twice, state_2["batch_stats"]["diagnosis"]["norm"]["mean"])


def test_the_text_head_keeps_running_statistics_of_each_section(small):
    recipe, variables = small
    _, state = losses(recipe, variables, batch_of(8))
    norm = state["batch_stats"]["text_head"]["norm"]
    assert set(norm) == {"mean_findings", "var_findings", "mean_impression", "var_impression"}
    assert not np.allclose(norm["mean_findings"], norm["mean_impression"])
    shared = recipe.clone(legacy_shared_statistics=True)
    released = training.init_variables(shared, batch_of(4), seed=0)
    terms, _ = losses(recipe, {**variables, "params": released["params"]}, batch_of(8))
    for name, value in losses(shared, released, batch_of(8))[0].items():
        np.testing.assert_array_equal(value, terms[name])


@pytest.mark.parametrize("centred", [False, True])
def test_losses_do_not_depend_on_the_content_of_missing_sections(small, centred):
    recipe, variables = small
    recipe = recipe.clone(centre_prior=centred)
    batch = batch_of(8)
    spoiled = dict(batch)
    for section in ("impression", "findings"):
        missing = ~batch[f"{section}_valid"][:, None]
        tokens = batch[section]
        spoiled[section] = Tokens(
            np.where(missing, 4, tokens.ids), np.where(missing, np.arange(12) < 2, tokens.mask)
        )
    terms, state = losses(recipe, variables, batch)
    others, moved = losses(recipe, variables, spoiled)
    for name, value in terms.items():
        np.testing.assert_array_equal(value, others[name])
    jax.tree.map(np.testing.assert_array_equal, state, moved)


@pytest.mark.parametrize(("kernel", "reads"), [("exp", True), ("none", False)])
def test_without_a_kernel_the_view_terms_read_no_report(small, kernel, reads):
    """So that an image encoder can start from views without being told what reports say."""
    recipe, variables = small
    recipe = recipe.clone(kernel=kernel)
    batch, other = batch_of(8), batch_of(8, seed=1)
    retold = {**batch, "findings": other["findings"], "impression": other["impression"]}
    terms, _ = losses(recipe, variables, batch)
    others, _ = losses(recipe, variables, retold)
    assert (terms["view_diagnosis"] != others["view_diagnosis"]) == reads
    assert terms["view_reading"] == others["view_reading"]


def test_cached_text_features_equal_computing_them(small):
    recipe, variables = small
    batch = batch_of(8)
    cached = {k: v for k, v in batch.items() if k not in ("findings", "impression")}
    for section in ("findings", "impression"):
        encoder = {"params": variables["params"]["text"]}
        feature = recipe.text.apply(encoder, batch[section]).pooled
        # A section that is missing has no text to embed.
        cached[f"{section}_feature"] = jnp.where(batch[f"{section}_valid"][:, None], feature, 0)
    terms, _ = losses(recipe, variables, batch)
    from_cache, _ = losses(recipe.clone(cached_text=True), variables, cached)
    for name in terms:
        np.testing.assert_allclose(terms[name], from_cache[name], rtol=1e-6)


def test_with_the_mean_over_the_batch_missing_sections_are_blanks_cached_or_computed(
    small, tmp_path
):
    """As in the release, whose table has a blank there, which BERT encodes and BatchNorm sees."""
    recipe, variables = small
    legacy = recipe.clone(legacy_mean_over_batch=True)
    said = ["no edema", "", "heart normal", "small effusion", "", "edema", "normal", "effusion"]
    records = [
        {"text_id": str(row), "findings": said[row], "impression": said[row - 1]}
        for row in range(len(said))
    ]
    tokenizer = text.train_wordpiece(said, vocab_size=50, out_dir=tmp_path / "vocabulary")

    def batch(recipe, features=None):
        transform = pipeline.record_transform(
            inputs=[key for key in recipe.inputs if not key.startswith("image")],
            decode=None,
            view=None,
            tokenizer=tokenizer,
            lengths=dict.fromkeys(imitate.SECTIONS, 12),
            features=features,
        )
        rows = [transform(record, None) for record in records]
        images = {key: value for key, value in batch_of(8).items() if key.startswith("image")}
        return {**images, **jax.tree.map(lambda *leaves: np.stack(leaves), *rows)}

    looked_up = legacy.clone(cached_text=True)
    sections = [(record["findings"], record["impression"]) for record in records]
    parts = SimpleNamespace(
        recipe=looked_up, tokenizer=tokenizer, config={"data": {"text_length": 12}}
    )
    source = SimpleNamespace(texts=lambda: sections)
    features = examples.cached_text(parts, variables, [source])
    computed, cached = batch(legacy), batch(looked_up, features)
    for section in imitate.SECTIONS:
        encoder = {"params": variables["params"]["text"]}
        feature = recipe.text.apply(encoder, computed[section]).pooled
        np.testing.assert_allclose(cached[f"{section}_feature"], feature, rtol=1e-5, atol=1e-6)
        # BatchNorm divides the rounding of another batch size by how little features differ here.
        cached[f"{section}_feature"] = feature
    terms, state = losses(legacy, variables, computed)
    from_cache, moved = losses(looked_up, variables, cached)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6)
    jax.tree.map(close, (terms, state), (from_cache, moved))

    def normalised(recipe, **changed):
        how = {"train": True, "rngs": {"draws": jax.random.key(0)}, "mutable": ["batch_stats"]}
        encoded, _ = recipe.apply(variables, {**computed, **changed}, method="encode", **how)
        return encoded["text"]

    everything = {"impression_valid": np.ones(8, bool)}
    np.testing.assert_array_equal(normalised(legacy), normalised(legacy, **everything))
    assert not np.allclose(normalised(recipe), normalised(recipe, **everything))


@pytest.mark.parametrize(("normalise", "meet"), [(False, "reading"), (True, "diagnosis")])
def test_objective_equals_the_sum_of_eight_contrastive_losses(small, normalise, meet):
    """1.2.4 with every C written out from the definition, in float64."""
    recipe, variables = small
    recipe = recipe.clone(normalise_target=normalise, findings_meet=meet)
    batch = batch_of(6)
    features, _ = recipe.apply(
        variables,
        batch,
        train=True,
        rngs={"draws": jax.random.key(3)},
        mutable=["batch_stats"],
        method="encode",
    )
    f = {k: np.asarray(v, np.float64) for k, v in features.items()}

    def similarity(report, has):
        s = np.zeros((6, 6))
        for i in range(6):
            for j in range(6):
                if i != j and has[i] and has[j]:
                    s[i, j] = 1 - np.exp(-0.2 * max(np.corrcoef(report[i], report[j])[0, 1], 0))
        return s

    def c(x, y, tau, s, valid):
        index = np.flatnonzero(valid)
        a = (x @ y.T / tau)[np.ix_(index, index)]
        target = (np.eye(6) + tau * s)[np.ix_(index, index)]
        if normalise:  # our choice: rows of sum 1, used transposed the other way
            target = target / target.sum(1, keepdims=True)
        rows = a - np.log(np.exp(a).sum(1, keepdims=True))
        columns = a - np.log(np.exp(a).sum(0, keepdims=True))
        return -(target * (rows + columns)).sum() / len(index)

    v_f, v_i = batch["findings_valid"], batch["impression_valid"]
    s_f, s_i = similarity(f["findings_report"], v_f), similarity(f["impression_report"], v_i)
    everyone, zero = np.ones(6, bool), np.zeros((6, 6))
    d_s = ("image", "image_2")
    expected = {
        "impression": sum(c(f[d], f["text"], 0.07, s_i, v_i) for d in d_s),
        "findings": sum(
            c(f[r], f["text_findings"], 0.07, s_f, v_f)
            for r in (("image_findings", "image_findings_2") if meet == "reading" else d_s)
        ),
        "view_diagnosis": c(f["image"], f["image_2"], 0.2, s_i, everyone)
        + c(f["image_2"], f["image"], 0.2, s_i, everyone),
        "view_reading": c(f["reading"], f["reading_2"], 0.2, zero, v_f)
        + c(f["reading_2"], f["reading"], 0.2, zero, v_f),
        "mass_impression": 0.07 * s_i.sum() / v_i.sum(),
        "mass_findings": 0.07 * s_f.sum() / v_f.sum(),
    }
    terms = recipe.apply(variables, features, batch, train=True, method="objective")
    assert set(terms) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=1e-5)


@pytest.mark.parametrize("group", [0, 4])
def test_the_mass_of_the_prior_is_that_of_each_section_dense_and_in_tiles(small, group):
    recipe, variables = small
    rng = np.random.default_rng(0)
    random = lambda width: jnp.float32(rng.normal(size=(8, width)))
    unit = lambda x: x / jnp.linalg.norm(x, axis=1, keepdims=True)
    names = ("image", "image_2", "image_findings", "image_findings_2", "reading", "reading_2")
    features = {name: unit(random(16)) for name in (*names, "text", "text_findings")}
    features |= {f"{section}_report": random(6) for section in imitate.SECTIONS}
    terms = {
        tile: recipe.clone(loss_tile=tile, contrast_group=group).apply(
            variables, features, batch_of(8), train=True, method="objective"
        )
        for tile in (0, 3)
    }
    for name, value in terms[0].items():
        np.testing.assert_allclose(terms[3][name], value, rtol=1e-5)
    assert terms[0]["mass_impression"] > 0
    assert set(terms[0]) == {*WEIGHTS, *recipe.watched}
    without = recipe.clone(kernel="none").apply(
        variables, features, batch_of(8), train=True, method="objective"
    )
    assert set(without) == set(WEIGHTS)


def test_encoding_in_evaluation_is_independent_per_row_and_repeatable(small):
    recipe, variables = small
    batch = {k: v for k, v in batch_of(6).items() if k != "image_2"}
    encode = lambda b: recipe.apply(variables, b, method="encode")
    whole = encode(batch)
    half = encode(jax.tree.map(lambda x: x[2:4], batch))
    for name in ("image", "image_findings", "text", "text_findings"):
        np.testing.assert_allclose(np.linalg.norm(whole[name], axis=1), 1, rtol=1e-5)
        np.testing.assert_allclose(whole[name][2:4], half[name], atol=1e-5)
        np.testing.assert_array_equal(whole[name], encode(batch)[name])


def test_a_missing_modality_gives_missing_keys(small):
    recipe, variables = small
    only_text = recipe.apply(variables, {"impression": batch_of(3)["impression"]}, method="encode")
    assert set(only_text) == {"text", "impression_report"}
    only_image = recipe.apply(variables, {"image": batch_of(3)["image"]}, method="encode")
    assert set(only_image) == {"image", "image_findings", "image_pooled"}


def test_permuting_the_batch_changes_no_loss(small):
    recipe, variables = small
    batch = batch_of(8)
    order = np.random.default_rng(0).permutation(8)
    terms, _ = losses(recipe, variables, batch)
    permuted, _ = losses(recipe, variables, jax.tree.map(lambda x: x[order], batch))
    for name in terms:
        np.testing.assert_allclose(terms[name], permuted[name], rtol=2e-5)


def test_channel_draws_repeat_with_the_seed_and_keep_the_specified_counts(small):
    recipe, variables = small
    keys = lambda seed: jax.random.split(jax.random.key(seed), 2)
    draw = lambda seed: recipe.apply(variables, keys(seed), method="draw")[1]
    assert [len(d) for d in draw(0)] == [4, 4, 3, 6]  # 25 % of 16, 15 % of 32, 10 % of 32, of 64
    for a, b, width in zip(draw(0), draw(0), recipe.image.level_widths, strict=True):
        np.testing.assert_array_equal(a, b)
        assert 0 <= a.min() <= a.max() < width
    assert any((a != b).any() for a, b in zip(draw(0), draw(1), strict=True))


def test_a_draw_is_that_of_its_key_whatever_is_drawn_beside_it(small):
    recipe, variables = small
    keys = jax.random.split(jax.random.key(0), 3)
    for key, levels in zip(keys, recipe.apply(variables, keys, method="draw"), strict=True):
        own = jax.random.split(key, len(recipe.keep))
        for k, share, width, found in zip(
            own, recipe.keep, recipe.image.level_widths, levels, strict=True
        ):
            alone = jax.random.randint(k, (int(share * width),), 0, width)
            np.testing.assert_array_equal(alone, found)


def test_a_share_of_one_takes_every_channel_once_in_order(small):
    recipe, variables = small
    whole = recipe.clone(keep=(1.0, 0.15, 1.0, 0.10))
    draws = whole.apply(variables, jax.random.split(jax.random.key(0), 3), method="draw")
    assert [[d is None for d in levels] for levels in draws] == 3 * [[True, False, True, False]]
    rng, order = np.random.default_rng(0), np.arange(3)
    levels = [rng.normal(size=(2, 8, 8, 3)).astype(np.float32) for _ in range(2)]
    fixed = rng.normal(size=(7, 256)).astype(np.float32)
    read = reading.ClassAttention()
    draws = [[None, None], [order, order]]
    variables = read.init(jax.random.key(0), levels, draws, fixed)
    every, drawn = read.apply(variables, levels, draws, fixed).swapaxes(0, 1)
    np.testing.assert_allclose(every, drawn, rtol=1e-6)


def test_contrast_groups_of_the_whole_batch_equal_the_global_batch(small):
    recipe, variables = small
    terms, _ = losses(recipe, variables, batch_of(8))
    grouped, _ = losses(recipe.clone(contrast_group=8), variables, batch_of(8))
    for name in terms:
        np.testing.assert_allclose(terms[name], grouped[name], rtol=1e-6)


def test_smaller_contrast_groups_average_the_losses_of_their_slices(small):
    recipe, variables = small
    batch = batch_of(8)
    rngs = {"draws": jax.random.key(7)}
    how = {"train": True, "mutable": ["batch_stats"], "method": "encode"}
    features, _ = recipe.apply(variables, batch, rngs=rngs, **how)
    objective = lambda recipe, f, b: recipe.apply(variables, f, b, train=True, method="objective")
    grouped = objective(recipe.clone(contrast_group=4), features, batch)
    halves = [
        objective(recipe, *jax.tree.map(lambda x, s=s: x[s], (features, batch)))
        for s in (np.s_[:4], np.s_[4:])
    ]
    whole = objective(recipe, features, batch)
    for name, value in grouped.items():
        np.testing.assert_allclose(value, np.mean([half[name] for half in halves]), rtol=1e-5)
        assert abs(value - whole[name]) > 0.05 * whole[name], name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kernel": "cosine"}, "recipe.kernel must be one of none, exp, gaussian"),
        ({"findings_meet": "both"}, "findings_meet must be reading or diagnosis, got 'both'"),
        ({"num_tokens": 16}, "recipe.num_tokens=16 cannot hold the 17 drawn channels"),
        ({"keep": (0.5, 0.5)}, "recipe.keep has 2 shares but the image encoder has 4 levels"),
        ({"train_text": True, "cached_text": True}, "set recipe.cached_text=False"),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(fields, message):
    with pytest.raises(config.UserError, match=message):
        make(**fields)


def test_a_misspelt_loss_weight_names_the_nearest():
    with pytest.raises(config.UserError, match=r"No loss term 'finding'. Did you mean findings"):
        imitate.make(image=RESNET, text=BERT, weights={"finding": 1.0})
