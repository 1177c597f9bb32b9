"""Low-rank factors: what they compute, merging, freezing, and PEFT's files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from medvlp_jax import convert
from medvlp_jax.config import UserError
from medvlp_jax.convert import architectures, lora
from medvlp_jax.convert.bert import TABLE
from medvlp_jax.convert.table import fused
from medvlp_jax.encoders import bert, modernbert, swin
from medvlp_jax.encoders.base import Tokens
from medvlp_jax.layers import Lora
from medvlp_jax.training import params as paths

RNG = np.random.default_rng(0)

SMALL = {"vocab_size": 50, "width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 32, "max_length": 12}
ATTENTION = Lora(4, 8.0, layers="attention/(query|value)$")
TOKENS = Tokens(RNG.integers(0, 50, (2, 7)).astype(np.int32), np.arange(7) < np.array([[7], [4]]))
QUERY = "params/stack/block_1/attention/query"


def assert_close(ours, reference, tolerance=1e-5):
    """Hold max |a - b| <= tolerance * max |b|."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape
    assert np.abs(ours - reference).max() <= tolerance * np.abs(reference).max()


def assert_same(ours, expected):
    """Hold two trees equal bit for bit."""
    ours, expected = flatten_dict(ours, sep="/"), flatten_dict(expected, sep="/")
    assert ours.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(ours[path], leaf)


def draw(module):
    """Draw every array at random, both factors included."""

    def fill(path, leaf):
        fan_in = leaf.shape[-2] if leaf.ndim > 1 else 25
        array = RNG.normal(size=leaf.shape).astype(np.float32) / np.float32(np.sqrt(fan_in))
        return np.abs(array) + 0.5 if path[-1].key == "scale" else array

    example = architectures.table_of_module(module).example(module)
    shapes = jax.eval_shape(module.init, jax.random.key(0), example)
    return jax.tree_util.tree_map_with_path(fill, shapes)


def tokens_of(module, variables):
    return jax.jit(lambda v: module.apply(v, TOKENS).tokens)(variables)


def layouts(adapter=ATTENTION):
    """Make the same adapted model in both layouts."""
    for layout in ("unrolled", "scan"):
        module = bert.make("tiny", **SMALL, lora=adapter, layout=layout)
        yield module, draw(module)


def test_a_model_starts_as_the_one_it_adapts():
    base = bert.make("tiny", **SMALL)
    variables = draw(base)
    module, adapted = lora.attach(base, variables, ATTENTION, jax.random.key(0))
    flat = flatten_dict(adapted, sep="/")
    assert sum("lora_" in path for path in flat) == 2 * 2 * 2
    assert flat[f"{QUERY}/lora_a"].shape == (16, 4)
    assert not flat[f"{QUERY}/lora_b"].any()
    a = np.stack([leaf for path, leaf in flat.items() if path.endswith("lora_a")])
    assert 0.2 < np.abs(a).max() <= 1 / 4  # torch's uniform, 1 / sqrt(in)
    assert not np.array_equal(a[0], a[1])
    np.testing.assert_array_equal(tokens_of(module, adapted), tokens_of(base, variables))


def test_the_scale_is_alpha_over_rank():
    module, variables = next(layouts())
    flat = flatten_dict(variables, sep="/")
    for layer in {path.rsplit("/", 1)[0] for path in flat if path.endswith("lora_a")}:
        low_rank = flat.pop(f"{layer}/lora_a") @ flat.pop(f"{layer}/lora_b")
        flat[f"{layer}/kernel"] = flat[f"{layer}/kernel"] + 8.0 / 4 * low_rank
    expected = tokens_of(module.clone(lora=None), unflatten_dict(flat, sep="/"))
    assert_close(tokens_of(module, variables), expected)


def test_dropout_acts_on_the_low_rank_branch_in_training_only():
    module, variables = next(layouts(ATTENTION._replace(dropout=0.5)))
    module = module.clone(dropout=0.0, attention_dropout=0.0)

    @jax.jit
    def train(variables, seed):
        rngs = {"dropout": jax.random.key(seed)}
        return module.apply(variables, TOKENS, train=True, rngs=rngs).tokens

    exact = tokens_of(module, variables)
    np.testing.assert_array_equal(exact, tokens_of(module, variables))
    assert not np.allclose(train(variables, 0), train(variables, 1))
    without = {
        p: 0 * v if "lora_b" in p else v for p, v in flatten_dict(variables, sep="/").items()
    }
    without = unflatten_dict(without, sep="/")
    assert_close(train(without, 0), tokens_of(module, without))


def test_only_the_factors_train_where_all_else_is_frozen():
    module, variables = next(layouts())
    module = module.clone(dropout=0.0, attention_dropout=0.0)
    trainable, frozen = paths.split(variables["params"], [r"^(?!.*/lora_[ab]$)"])
    assert all("/lora_" in path for path in paths.flatten(trainable))
    assert not any("/lora_" in path for path in paths.flatten(frozen))
    assert len(paths.flatten(trainable)) == 2 * 2 * 2

    @jax.jit
    def step(trainable):
        def loss(trainable):
            params = paths.merge(trainable, frozen)
            return jnp.square(
                module.apply({"params": params}, TOKENS, train=True).pooled[:, 0]
            ).sum()

        gradient = jax.grad(loss)(trainable)
        optimiser = optax.adamw(1e-2)
        updates, _ = optimiser.update(gradient, optimiser.init(trainable), trainable)
        return optax.apply_updates(trainable, updates)

    moved = paths.flatten(step(trainable))
    for path, leaf in paths.flatten(trainable).items():
        assert np.abs(moved[path] - leaf).max() > 1e-3


def test_merging_changes_no_output_and_unmerging_gives_every_bit_back():
    for module, variables in layouts():
        merged = lora.merge(variables, ATTENTION)
        base = module.clone(lora=None)
        assert_close(tokens_of(base, merged.variables), tokens_of(module, variables))
        assert_same(lora.unmerge(merged), variables)


def test_merged_weights_can_be_exported(tmp_path):
    module, variables = next(layouts())
    with pytest.raises(UserError, match=r"no tensor for params/stack/block_0.*lora_a.*merge"):
        convert.save(module, variables, tmp_path)
    merged = lora.merge(variables, ATTENTION).variables
    convert.save(module.clone(lora=None), merged, tmp_path)
    assert_same(convert.load(tmp_path)[1], merged)
    with pytest.raises(UserError, match=r"attach or load_adapter"):
        convert.load(tmp_path, lora=ATTENTION)


def test_unmerging_refuses_kernels_that_have_changed_since():
    _, variables = next(layouts())
    merged = lora.merge(variables, ATTENTION)
    flat = flatten_dict(merged.variables, sep="/")
    flat[f"{QUERY}/kernel"] = flat[f"{QUERY}/kernel"] + 1
    with pytest.raises(UserError, match=f"changed since merging: {QUERY}"):
        lora.unmerge(merged._replace(variables=unflatten_dict(flat, sep="/")))
    with pytest.raises(UserError, match="no low-rank factors"):
        lora.merge(merged.variables, ATTENTION)


def test_an_adapter_goes_out_and_comes_back_bit_for_bit(tmp_path):
    for module, variables in layouts(ATTENTION._replace(dropout=0.1)):
        out = tmp_path / module.layout
        lora.save_adapter(module, variables, out, base="google-bert/bert-base-cased")
        flat = flatten_dict(variables, sep="/")
        base = unflatten_dict({p: v for p, v in flat.items() if "lora_" not in p}, sep="/")
        loaded, back = lora.load_adapter(module.clone(lora=None), base, out)
        assert_same(back, variables)
        assert loaded.lora[:3] == (4, 8.0, 0.1)
        np.testing.assert_array_equal(tokens_of(loaded, back), tokens_of(module, variables))
        config = json.loads((out / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "google-bert/bert-base-cased"
        assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8.0)
        assert config["lora_dropout"] == 0.1
        assert "encoder.layer.1.attention.self.query" in config["target_modules"]
        tensors = load_file(out / "adapter_model.safetensors")
        query = "base_model.model.encoder.layer.1.attention.self.query"
        assert len(tensors) == 8
        assert tensors[f"{query}.lora_A.weight"].shape == (4, 16)
        assert tensors[f"{query}.lora_B.weight"].shape == (16, 4)


def test_fused_factors_share_one_a_as_one_linear_of_pytorch_has(tmp_path):
    module = modernbert.make("tiny", **SMALL, lora=Lora(4, 8.0, fused=True))
    variables = draw(module)
    flat = flatten_dict(variables, sep="/")
    block = "params/stack/block_0"
    of_block = [p.removeprefix(f"{block}/") for p in flat if p.startswith(block) and "lora" in p]
    shared = ["attention/lora_a", "mlp/lora_a"]
    own = ["attention/out/lora_a", "mlp/down/lora_a"]
    assert sorted(p for p in of_block if p.endswith("a")) == sorted([*shared, *own])
    layers = ("query", "key", "value", "out"), ("gate", "up", "down")
    pairs = zip(("attention", "mlp"), layers, strict=True)
    assert sorted(p for p in of_block if p.endswith("b")) == sorted(
        f"{part}/{name}/lora_b" for part, names in pairs for name in names
    )
    expected = tokens_of(module, variables)
    merged = lora.merge(variables, module.lora)
    assert_close(tokens_of(module.clone(lora=None), merged.variables), expected)
    assert_same(lora.unmerge(merged), variables)
    lora.save_adapter(module, variables, tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 2 * 2 * 4  # blocks, Linears
    base = unflatten_dict({p: v for p, v in flat.items() if "lora_" not in p}, sep="/")
    loaded, back = lora.load_adapter(module.clone(lora=None), base, tmp_path)
    assert_close(tokens_of(loaded, back), expected)


@pytest.mark.hf
def test_an_adapter_does_in_torch_what_it_does_here(tmp_path):
    import torch
    import transformers

    module, variables = next(layouts(Lora(4, 8.0)))
    flat = flatten_dict(variables, sep="/")
    base = unflatten_dict({p: v for p, v in flat.items() if "lora_" not in p}, sep="/")
    convert.save(module.clone(lora=None), base, tmp_path / "base")
    lora.save_adapter(module, variables, tmp_path / "adapter")
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "base", add_pooling_layer=False)
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    scale = 8.0 / 4
    for name in [name for name in tensors if name.endswith("lora_A.weight")]:
        layer = theirs.get_submodule(name.removeprefix(lora.ROOT).removesuffix(".lora_A.weight"))
        a, b = (torch.tensor(tensors[name.replace("lora_A", f"lora_{x}")]) for x in "AB")
        layer.weight.data += scale * b @ a
    ids, mask = (torch.tensor(np.array(leaf)).long() for leaf in TOKENS)
    expected = theirs.eval()(input_ids=ids, attention_mask=mask).last_hidden_state.detach()
    assert_close(tokens_of(module, variables), expected)


@pytest.mark.hf
@pytest.mark.parametrize("architecture", ["bert", "swin"])
def test_peft_loads_what_we_write_and_we_load_what_it_writes(tmp_path, architecture):
    peft = pytest.importorskip("peft")
    import torch
    import transformers

    if architecture == "bert":
        module, example = bert.make("tiny", **SMALL, lora=ATTENTION), TOKENS
        ids, mask = (torch.tensor(np.array(leaf)).long() for leaf in TOKENS)
        inputs, options = {"input_ids": ids, "attention_mask": mask}, {"add_pooling_layer": False}
    else:
        module = swin.make("tiny", lora=ATTENTION)
        example = RNG.normal(size=(1, 64, 64, 3)).astype(np.float32)
        inputs = {"pixel_values": torch.tensor(example).permute(0, 3, 1, 2)}
        options = {}
    variables = draw(module)
    flat = flatten_dict(variables, sep="/")
    base = unflatten_dict({p: v for p, v in flat.items() if "lora_" not in p}, sep="/")
    convert.save(module.clone(lora=None), base, tmp_path / "base")
    lora.save_adapter(module, variables, tmp_path / "adapter")
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "base", **options)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    expected = theirs(**inputs).last_hidden_state.detach()
    assert_close(jax.jit(lambda v: module.apply(v, example).tokens)(variables), expected)
    theirs.save_pretrained(tmp_path / "again")
    loaded, back = lora.load_adapter(module.clone(lora=None), base, tmp_path / "again")
    assert_same(back, variables)
    assert loaded.lora.scale == 2.0


def write_peft(folder, tensors, **changes):
    """Write an adapter as PEFT lays it out."""
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "target_modules": ["query"],
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "task_type": "FEATURE_EXTRACTION",
    }
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    save_file(tensors, folder / "adapter_model.safetensors")


def factors(name, inside=16, outside=16, rank=2):
    name = f"base_model.model.{name}"
    a, b = (RNG.normal(size=s).astype(np.float32) for s in ((rank, inside), (outside, rank)))
    return {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}


def test_a_fixture_in_the_layout_of_peft_is_read(tmp_path):
    module = bert.make("tiny", **SMALL)
    variables = draw(module)
    # One of two blocks, behind the prefix of a model with a head.
    tensors = factors("bert.encoder.layer.1.attention.self.query")
    write_peft(tmp_path, tensors, init_lora_weights="gaussian")
    loaded, back = lora.load_adapter(module, variables, tmp_path)
    flat = flatten_dict(back, sep="/")
    assert [path for path in flat if "lora_" in path] == [f"{QUERY}/lora_a", f"{QUERY}/lora_b"]
    a, b = tensors.values()
    np.testing.assert_array_equal(flat[f"{QUERY}/lora_a"], a.T)
    np.testing.assert_array_equal(flat[f"{QUERY}/lora_b"], b.T)
    assert (loaded.lora.scale, loaded.lora.dropout) == (8.0, 0.05)
    flat = flatten_dict(variables, sep="/")
    flat[f"{QUERY}/kernel"] = flat[f"{QUERY}/kernel"] + 8.0 * (b @ a).T
    assert_close(tokens_of(loaded, back), tokens_of(module, unflatten_dict(flat, sep="/")))
    with pytest.raises(
        UserError, match=r"blocks/attention/query/lora_a \[1, 16, 2\] where \[2, 16"
    ):
        lora.load_adapter(module.clone(layout="scan"), variables, tmp_path)


@pytest.mark.parametrize(
    ("tensors", "changes", "message"),
    [
        ({}, {"use_dora": True, "bias": "all"}, "not here: bias 'all', use_dora True"),
        ({}, {"use_rslora": True}, "use_rslora True"),
        ({}, {"rank_pattern": {"query": 8}}, "rank_pattern"),
        *(
            ({}, {"init_lora_weights": how}, f"not here: init_lora_weights '{how}'")
            for how in ("pissa", "pissa_niter_16", "olora", "corda", "loftq")
        ),
        (factors("encoder.layer.7.attention.self.query"), {}, "unused .*layer.7.*query.lora_A"),
        (factors("encoder.layer.0.attention.self.query"), {"r": 4}, r"\[16, 2\] where \[16, 4\]"),
        (
            {"base_model.model.encoder.layer.0.attention.self.key.lora_A.weight": np.ones((2, 16))},
            {},
            "missing params/stack/block_0/attention/key/lora_b",
        ),
    ],
)
def test_adapters_that_do_not_fit_are_refused(tmp_path, tensors, changes, message):
    module = bert.make("tiny", **SMALL)
    write_peft(tmp_path, tensors, **changes)
    with pytest.raises(UserError, match=message):
        lora.load_adapter(module, {}, tmp_path)


def test_other_bad_input_is_refused(tmp_path):
    module = bert.make("tiny", **SMALL)
    with pytest.raises(UserError, match=r"holds no adapter_config\.json"):
        lora.load_adapter(module, {}, tmp_path)
    with pytest.raises(UserError, match="no low-rank factors to write"):
        lora.save_adapter(module, {}, tmp_path)
    with pytest.raises(UserError, match="'attention/querry' matches no layer of Bert"):
        lora.attach(module, {}, Lora(2, 2.0, layers="attention/querry"), jax.random.key(0))


def test_one_torch_module_for_several_of_ours(tmp_path, monkeypatch):
    """Query, key and value in one Wqkv, as ModernBERT keeps them."""

    def rules(module):
        kept = [r for r in TABLE.rules(module) if ".attention.self." not in r.tensor]
        for i in range(module.depth):
            layers = [f"stack/block_{i}/attention/{name}" for name in ("query", "key", "value")]
            kept += fused(f"encoder.layer.{i}.attention.Wqkv", layers)
        return kept

    monkeypatch.setattr(architectures, "TABLES", (TABLE._replace(rules=rules),))
    module = bert.make("tiny", **SMALL)
    variables = draw(module)
    name = "encoder.layer.1.attention.Wqkv"
    tensors = factors(name, outside=48)
    write_peft(tmp_path / "in", tensors)
    loaded, back = lora.load_adapter(module, variables, tmp_path / "in")
    flat = flatten_dict(back, sep="/")
    a, b = tensors.values()
    for i, part in enumerate(("query", "key", "value")):
        layer = QUERY.replace("query", part)
        np.testing.assert_array_equal(flat[f"{layer}/lora_a"], a.T)
        np.testing.assert_array_equal(flat[f"{layer}/lora_b"], b[16 * i : 16 * (i + 1)].T)
    lora.save_adapter(loaded, back, tmp_path / "out")
    assert_same(load_file(tmp_path / "out/adapter_model.safetensors"), tensors)
    flat[f"{QUERY}/lora_a"] = flat[f"{QUERY}/lora_a"] + 1
    with pytest.raises(UserError, match=f"{name} .one A for all of .*query, .*key, .*value"):
        lora.save_adapter(loaded, unflatten_dict(flat, sep="/"), tmp_path / "out")
