"""CFCML: shapes, counts and equalities of the specification, sections 2.2, 2.10 and 2.12."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medvlp_jax import config, sharding
from medvlp_jax.recipes import cfcml
from medvlp_jax.training import params as paths
from medvlp_jax.training import step as training

WEIGHTS = {"cross_entropy": 1.0, "sample": 0.04, "unimodal": 0.06, "crossmodal": 0.18}
NO_RELATIONS = {**WEIGHTS, "sample": 0.0, "unimodal": 0.0, "crossmodal": 0.0}
SWIN = {
    "name": "swin",
    "variant": "tiny",
    "embed_dim": 8,
    "num_heads": (1, 1, 2),
    "drop_path": 0.0,
    "window_size": 2,
}
IMAGES = ("clinical", "dermoscopy")
K, T, D, C = 3, 4, 6, 16


def make(**fields):
    small = {
        "task": "diagnosis",
        "num_classes": K,
        "weights": WEIGHTS,
        "image": SWIN,
        "images": IMAGES,
        "num_heads": 2,
        "dim": C,
        "image_tokens": 5,
        "table_tokens": 3,
        "hidden": (12, 8),
        "dropout": 0.0,
    }
    return cfcml.make(**{**small, **fields})


def batch_of(size, seed=0):
    rng = np.random.default_rng(seed)
    picture = lambda: rng.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8)
    return {
        "clinical": picture(),
        "dermoscopy": picture(),
        "tabular": rng.normal(size=(size, T, D)).astype(np.float32),
        "label/diagnosis": np.eye(K, dtype=np.int8)[np.arange(size) % K],
    }


def state_of(recipe, batch, rate=1e-2):
    variables = training.init_variables(recipe, batch, 0)
    tx = optax.adam(rate)
    return training.make_state(variables, tx, ()), training.make_train_step(
        recipe, tx, lambda _: jnp.float32(rate), 0
    )


@pytest.fixture(scope="module")
def small():
    recipe = make()
    return recipe, training.init_variables(recipe, batch_of(6), 0)


def total(recipe, variables, batch):
    """The weighted loss and its gradient with respect to the parameters."""

    def loss(params):
        out, _ = recipe.apply(
            {**variables, "params": params},
            batch,
            train=True,
            mutable=["batch_stats", "memory"],
            rngs={"dropout": jax.random.key(0)},
        )
        return sum(recipe.weights[k] * v for k, v in out.items())

    return jax.jit(jax.value_and_grad(loss))(variables["params"])


# The whole network once more, in float64 and without a line of the code under test.


def loop_conv(p, x):
    """torch's Conv1d(N, n, 3, padding=1) of x [N, c]."""
    kernel, bias = np.float64(p["kernel"]), np.float64(p["bias"])
    padded = np.pad(x, ((0, 0), (1, 1)))
    y = np.zeros((kernel.shape[2], x.shape[1]))
    for o in range(y.shape[0]):
        for c in range(y.shape[1]):
            y[o, c] = bias[o] + (kernel[:, :, o] * padded[:, c : c + 3].T).sum()
    return y


def loop_linear(p, x):
    return x @ np.float64(p["kernel"]) + np.float64(p["bias"])


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def loop_attention(p, x, context, heads):
    q, k, v = (
        loop_linear(p[n], s) for n, s in (("query", x), ("key", context), ("value", context))
    )
    size = q.shape[1] // heads
    parts = []
    for h in range(heads):
        at = slice(h * size, (h + 1) * size)
        parts.append(softmax(q[:, at] @ k[:, at].T / np.sqrt(size)) @ v[:, at])
    return loop_linear(p["out"], np.concatenate(parts, 1))


def loop_fusion(p, stages, heads):
    """2.2, stages 4 to 8, of one example: {modality: [tokens [N, c] of every stage]}."""
    depth = max(map(len, stages.values()))
    tokens = {}
    for name, every in stages.items():
        tokens[name] = []
        for s, x in enumerate(every):
            if name == "tabular":
                x = np.maximum(loop_linear(p["attributes"], x), 0)
            x = loop_conv(p[f"compress_{s}_{name}"], x)
            if x.shape[1] != C:
                x = loop_linear(p[f"project_{s}_{name}"], x)
            tokens[name].append(x)
    tokens["tabular"] *= depth
    z = []
    for name in stages:
        enhanced = []
        for s in range(depth):
            own = tokens[name][s]
            others = np.concatenate([tokens[m][s] for m in stages if m != name])
            found = loop_attention(p[f"attend_{s}_{name}"], own, others, heads)
            enhanced += [own, found]
        z.append(loop_conv(p[f"aggregate_{name}"], np.concatenate(enhanced)).mean(0))
    x = np.concatenate(z)
    for i in range(2):
        x = np.maximum(loop_linear(p[f"hidden_{i}"], x), 0)
    return np.array(z), loop_linear(p["logits"], x)


def test_fusion_equals_the_specification_written_out_in_float64(small):
    recipe, variables = small
    batch = batch_of(3)
    found = recipe.apply(variables, batch, method="encode")
    image = {"params": variables["params"]["image"]}
    for i in range(3):
        stages = {}
        for name in IMAGES:
            pixels = (batch[name][i : i + 1] / 255.0 - [0.485, 0.456, 0.406]) / [
                0.229,
                0.224,
                0.225,
            ]
            encoded = recipe.image.apply(image, jnp.float32(pixels))
            maps = [np.float64(x[0]).reshape(-1, x.shape[-1]) for x in encoded.levels[:-1]]
            stages[name] = [*maps, np.float64(encoded.tokens[0])]
        stages["tabular"] = [np.float64(batch["tabular"][i])]
        z, logits = loop_fusion(variables["params"]["fusion"], stages, 2)
        np.testing.assert_allclose(found["modalities"][i], z, atol=2e-6 * np.abs(z).max())
        np.testing.assert_allclose(found["logits"][i], logits, atol=2e-6 * np.abs(logits).max())


DERM7PT = {"image": {"name": "swin", "variant": "T"}, "images": IMAGES, "num_classes": 2}
MEN = {
    "image": {"name": "mamba3d", "variant": "men"},
    "images": ("t1", "t2", "adc"),
    "num_classes": 3,
    "share_encoder": False,
    "image_tokens": 48,
    "table_tokens": 16,
}


def published(fields, batch):
    recipe = cfcml.make(task="diagnosis", weights=WEIGHTS, **fields)
    encode = lambda: recipe.init_with_output(
        {"params": jax.random.key(0), "dropout": jax.random.key(1)},
        batch,
        train=True,
        method="encode",
    )
    features, variables = jax.eval_shape(encode)
    return features, paths.flatten(variables["params"])


def sized(shape, dtype=np.uint8):
    return np.broadcast_to(np.zeros((), dtype), shape)


def test_derm7pt_has_the_published_shapes_and_parameters():
    batch = {name: sized((36, 224, 224, 3)) for name in IMAGES}
    batch["tabular"] = sized((36, 5, 512), np.float32)
    features, params = published(DERM7PT, batch)
    assert features["modalities"].shape == (36, 3, 128)
    assert features["logits"].shape == (36, 2)
    shape = lambda name: params[f"fusion/{name}/kernel"].shape
    for s, pixels in enumerate((3136, 784, 196, 49)):
        assert shape(f"compress_{s}_dermoscopy") == (3, pixels, 32)
        assert shape(f"attend_{s}_tabular/query") == (128, 128)
    assert shape("compress_0_tabular") == (3, 5, 24)
    assert shape("aggregate_clinical") == (3, 256, 32)
    assert shape("aggregate_tabular") == (3, 192, 24)
    assert shape("hidden_0") == (384, 128)
    count = sum(np.prod(x.shape) for x in params.values())
    unused = 0.769e6 + 0.197e6  # Swin's head of 1,000 classes and a linear pair, section 2.7 #17
    assert abs(count + unused - 30.63e6) < 0.01e6


def test_men_has_the_published_shapes_and_parameters():
    batch = {name: sized((2, 128, 128, 24), np.float32) for name in MEN["images"]}
    batch["tabular"] = sized((2, 6, 512), np.float32)
    features, params = published(MEN, batch)
    assert features["modalities"].shape == (2, 4, 128)
    assert features["logits"].shape == (2, 3)
    shape = lambda name: params[f"fusion/{name}/kernel"].shape
    for s, voxels in enumerate((49152, 6144, 768, 128)):
        assert shape(f"compress_{s}_adc") == (3, voxels, 48)
    assert "fusion/project_3_adc/kernel" not in params
    assert shape("compress_0_tabular") == (3, 6, 16)
    assert shape("aggregate_t1") == (3, 384, 48)
    assert shape("aggregate_tabular") == (3, 128, 16)
    assert shape("hidden_0") == (512, 128)
    count = sum(np.prod(x.shape) for x in params.values())
    unused = 3 * (128 * 128 + 128)  # linears the release makes and never calls
    assert abs(count + unused - 35.98e6) < 0.01e6


def test_without_relations_the_gradient_is_that_of_the_cross_entropy(small):
    recipe, variables = small
    batch = batch_of(6)
    _, gradient = total(recipe.clone(weights=NO_RELATIONS), variables, batch)

    def plain(params):
        features = recipe.apply({"params": params}, batch, method="encode")
        log = jax.nn.log_softmax(features["logits"])
        return -(log * batch["label/diagnosis"]).sum() / 6

    expected = jax.jit(jax.grad(plain))(variables["params"])
    for path, value in paths.flatten(gradient).items():
        limit = 1e-5 * max(np.abs(paths.flatten(expected)[path]).max(), 1e-6)
        np.testing.assert_allclose(value, paths.flatten(expected)[path], atol=limit, err_msg=path)


@pytest.mark.slow
def test_detached_stages_train_the_encoder_through_its_last_output_alone(small):
    recipe, variables = small
    batch = batch_of(6)
    _, gradient = total(recipe.clone(grad_multistage=False), variables, batch)
    image, fusion = variables["params"]["image"], variables["params"]["fusion"]
    normalised = {name: cfcml.normalise(batch[name]) for name in IMAGES}
    encoder = jax.jit(lambda p, x: recipe.image.apply({"params": p}, x, train=True))
    apply = lambda p, name: encoder(p, normalised[name])
    flat = lambda x: x.reshape(6, -1, x.shape[-1])
    constants = {name: [flat(x) for x in apply(image, name).levels[:-1]] for name in IMAGES}

    def loss(image):
        stages = {name: [*constants[name], apply(image, name).tokens] for name in IMAGES}
        stages["tabular"] = [jnp.asarray(batch["tabular"])]
        module = recipe.bind(variables).fusion
        z, logits = module.clone(parent=None).apply({"params": fusion}, stages, train=False)
        features = {"modalities": z, "logits": logits}
        terms = recipe.apply(variables, features, batch, train=True, method="objective")
        return sum(WEIGHTS[k] * v for k, v in terms.items())

    expected = paths.flatten(jax.jit(jax.grad(loss))(image))
    whole = paths.flatten(total(recipe, variables, batch)[1]["image"])
    differs = 0
    largest = max(np.abs(leaf).max() for leaf in expected.values())
    for path, value in paths.flatten(gradient["image"]).items():
        # A key bias adds the same to every logit of a softmax: its gradient is 0 but for rounding.
        scale = largest if path.endswith("key/bias") else np.abs(expected[path]).max()
        limit = 1e-5 * max(scale, 1e-6)
        np.testing.assert_allclose(value, expected[path], atol=limit, err_msg=path)
        differs += not np.allclose(value, whole[path], atol=limit)
    assert differs > 10


def test_ablations_leave_out_what_they_name():
    def names(**fields):
        recipe = make(**fields)
        batch = batch_of(2)
        variables = jax.eval_shape(lambda: training.init_variables(recipe, batch, 0))
        return set(paths.flatten(variables["params"]))

    full = names()
    assert not any("attend" in n for n in names(enhance="none"))
    single = [n for n in names(enhance="single_head") if "attend" in n]
    assert single
    assert not any("bias" in n for n in single)
    last = names(multi_granularity=False)
    assert "fusion/attend_0_clinical/query/kernel" in last
    assert not any("aggregate" in n or "compress_1" in n for n in last)
    assert not any("tabular" in n or "attributes" in n for n in names(table=False))
    alone = names(images=(), enhance="none")
    assert not any(n.startswith("image/") or "clinical" in n for n in alone)
    assert {n.split("/")[0] for n in names(share_encoder=False)} == {
        "encoders_0",
        "encoders_1",
        "fusion",
    }
    assert len(full) > len(last)


@pytest.mark.slow
def test_rows_are_encoded_independently_and_a_missing_modality_gives_missing_keys(small):
    recipe, variables = small
    batch = batch_of(4)
    encode = lambda b: recipe.apply(variables, b, method="encode")
    whole, part = encode(batch), encode(jax.tree.map(lambda x: x[1:3], batch))
    for name in ("logits", "modalities", "image_pooled"):
        np.testing.assert_allclose(whole[name][1:3], part[name], atol=1e-5)
    assert encode({k: v for k, v in batch.items() if k != "clinical"}) == {}
    images = encode({name: batch[name] for name in IMAGES})
    assert images.keys() == {"image_pooled"}
    np.testing.assert_array_equal(images["image_pooled"], whole["image_pooled"])


@pytest.mark.slow
def test_permuting_the_batch_changes_no_loss_and_unknown_labels_take_no_part(small):
    recipe, variables = small
    batch = batch_of(7)
    objective = lambda b: recipe.apply(variables, b, train=False)
    plain = objective(batch)
    order = np.random.default_rng(0).permutation(7)
    permuted = objective(jax.tree.map(lambda x: x[order], batch))
    unknown = {k: np.concatenate([v, v[:2]]) for k, v in batch.items()}
    unknown["label/diagnosis"][7:] = -1
    with_unknown = objective(unknown)
    for name in plain:
        np.testing.assert_allclose(permuted[name], plain[name], rtol=1e-5)
        np.testing.assert_allclose(with_unknown[name], plain[name], rtol=1e-5)


@pytest.mark.slow
def test_eight_devices_equal_one(small):
    recipe, variables = small
    batch = batch_of(8)
    value, gradient = total(recipe, variables, batch)
    mesh = sharding.make_mesh()
    split, split_gradient = total(recipe, variables, sharding.to_global(batch, mesh))
    np.testing.assert_allclose(split, value, rtol=1e-6)
    for path, leaf in paths.flatten(gradient).items():
        limit = 2e-5 * max(np.abs(leaf).max(), 1e-6)
        np.testing.assert_allclose(
            paths.flatten(split_gradient)[path], leaf, atol=limit, err_msg=path
        )


@pytest.mark.slow
def test_every_leaf_moves_and_eight_examples_are_learnt_by_heart():
    recipe, batch = make(), batch_of(8)
    batch["label/diagnosis"] = np.eye(K, dtype=np.int8)[[0, 1, 2, 2, 1, 0, 0, 1]]
    state, step = state_of(recipe, batch, rate=3e-3)
    before = jax.device_get(state.params)
    for _ in range(200):
        state, metrics = step(state, batch)
    assert float(metrics["loss/cross_entropy"]) < 0.02
    for path, value in paths.flatten(before).items():
        if "key/bias" not in path:  # adds the same to every logit of a softmax
            assert (np.asarray(value) != np.asarray(paths.flatten(state.params)[path])).any(), path


@pytest.mark.slow
def test_gradients_of_chunks_equal_those_of_the_whole_batch():
    recipe, batch = make(), batch_of(8)
    variables = training.init_variables(recipe, batch, 0)
    states = []
    for chunks in (1, 4):
        tx = optax.sgd(1.0)
        state = training.make_state(variables, tx, ())
        step = training.make_train_step(recipe, tx, lambda _: jnp.float32(1), 0, chunks=chunks)
        states.append(paths.flatten(step(jax.tree.map(jnp.copy, state), batch)[0].params))
    start = paths.flatten(variables["params"])
    for path, whole in states[0].items():
        limit = 1e-6 + 1e-5 * np.abs(whole - start[path]).max()
        np.testing.assert_allclose(states[1][path], whole, atol=limit, err_msg=path)


@pytest.mark.slow
def test_memory_holds_the_classes_a_batch_lacks():
    recipe, batch = make(memory=0.9), batch_of(6)
    state, step = state_of(recipe, batch)
    assert not state.collections["memory"]["known"].any()
    state, _ = step(state, batch)
    assert state.collections["memory"]["known"].all()
    kept = np.asarray(state.collections["memory"]["crossmodal"])
    lacking = {k: v[:4] for k, v in batch.items()}
    lacking["label/diagnosis"] = np.eye(K, dtype=np.int8)[[0, 0, 1, 1]]
    state, metrics = step(state, lacking)
    after = np.asarray(state.collections["memory"]["crossmodal"])
    np.testing.assert_array_equal(after[2], kept[2])
    assert (after[:2] != kept[:2]).any(1).all()
    assert np.isfinite(float(metrics["loss"]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"enhance": "all"}, "recipe.enhance must be one of multi_head, single_head, none"),
        ({"images": ()}, "relates modalities to one another"),
        ({"memory": 1.0}, "recipe.memory=1.0 must be at least 0 and below 1"),
        ({"num_classes": 1}, "recipe.num_classes=1 must be at least 2"),
        ({"image": {"name": "bert", "variant": "tiny", "vocab_size": 9}}, "several stages"),
        ({"weights": {"samples": 1.0}}, "No loss term 'samples'. Did you mean sample"),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(fields, message):
    with pytest.raises(config.UserError, match=message):
        make(**fields)
