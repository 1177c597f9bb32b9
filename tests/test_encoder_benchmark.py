"""The comparison with PyTorch runs, and its ratios say what they claim; times are not tested."""

import argparse
import json
import os
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import encoder_parts, encoder_profile, encoders, fused_qkv
from medvlp_jax.config import UserError

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.hf


@pytest.fixture(autouse=True)
def no_rest(monkeypatch):
    monkeypatch.setattr(encoders, "REST", 0)


def test_runs_alternate_and_the_ratio_is_their_time_over_ours(monkeypatch):
    calls = []
    monkeypatch.setattr(encoders, "seconds", lambda work: calls.append(work) or work)
    times = encoders.by_turns(2.0, 6.0, 3)
    assert calls == [6.0, 2.0, 2.0, 6.0, 6.0, 2.0]
    assert times == ([2.0] * 3, [6.0] * 3)
    found = encoders.summary(*times)
    assert found["ours_seconds"] == 2.0
    assert found["quartiles"] == [3.0, 3.0, 3.0]


@pytest.mark.slow
def test_every_case_runs_small_and_computes_what_torch_computes(tmp_path, capsys):
    out = tmp_path / "encoders.json"
    main = lambda *models: encoders.main(
        ["--tiny", "--pairs", "2", "--out", str(out), "--models", *models]
    )
    main("vit", "resnet")
    main("modernbert", "qwen3")  # joins what is there
    found = json.loads(out.read_text())["cpu"]
    assert list(found["models"]) == list(encoders.MODELS)
    assert found["tiny"]
    for name, model in found["models"].items():
        versions = model["measured"]["versions"]
        assert versions.keys() == {"python", "jax", "torch", "transformers"}
        assert ("torch_layout" in model["forward"]) == (name in ("vit", "resnet"))
        assert model["error"] < 1e-5
        for part in ("forward", "backward"):
            assert len(model[part]["ratios"]) == 2
            assert model[part]["torch_seconds"] > 0
    table = capsys.readouterr().out.splitlines()[-6:]
    assert [line.count("|") for line in table] == [7] * 6
    assert table[-1].startswith("| Qwen3-0.6B, tiny | 2 x 9 |")
    out.write_text(json.dumps({"cpu": {**found, "threads": 0}}))
    with pytest.raises(UserError, match=r"holds numbers of settings .*: name another --out"):
        main("resnet")  # with other threads the models before do not belong beside it
    assert list(json.loads(out.read_text())["cpu"]["models"]) == list(encoders.MODELS)


def test_a_model_that_is_measured_alone_leaves_the_others(monkeypatch, tmp_path, capsys):
    half = {"ours_seconds": 1.0, "quartiles": [1.0, 1.0, 1.0]}
    made = {"title": "t", "input": [8, 224], "forward": half, "backward": half}
    monkeypatch.setattr(encoders, "compare", lambda *_, **__: dict(made))
    out = tmp_path / "encoders.json"
    kept = json.loads((ROOT / "benchmarks/results/encoders.json").read_text())
    kept["cpu"]["threads"] = len(os.sched_getaffinity(0))
    out.write_text(json.dumps(kept))
    encoders.main(["--models", "resnet", "--out", str(out)])
    found = json.loads(out.read_text())["cpu"]["models"]
    assert set(found) == set(encoders.MODELS)
    assert found["vit"]["forward"] == kept["cpu"]["models"]["vit"]["forward"]
    assert found["vit"]["measured"]["versions"]
    assert found["resnet"]["measured"]["cpu"]
    assert "ResNet-50" in capsys.readouterr().err  # minutes long: it says where it is


def test_the_faster_layout_of_images_is_the_one_that_counts(monkeypatch):
    took = {"first": iter((9.0, 3.0, 3.0, 3.0)), "last": iter((1.0, 5.0, 2.0, 2.0))}
    monkeypatch.setattr(encoders, "seconds", lambda work: next(took[work]))
    assert encoders.fastest({"channels first": "first", "channels last": "last"}) == "channels last"
    assert encoders.fastest({"channels first": "first"}) == "channels first"  # without a run


def test_both_layouts_of_a_convolutional_model_are_the_same_network():
    import torch

    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 5, 3)).eval()
    seen = []

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, pixel_values):
            seen.append(pixel_values.is_contiguous(memory_format=torch.channels_last))
            return argparse.Namespace(last_hidden_state=self.inner(pixel_values))

    assert encoders.is_convolutional(model)
    assert not encoders.is_convolutional(torch.nn.Conv2d(3, 4, 3))  # cuts patches
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)
    first, last = (
        encoders.functions_of_theirs(Wrapped(), images, layout)[0]() for layout in encoders.LAYOUTS
    )
    assert seen == [False, True]
    np.testing.assert_allclose(first, last, rtol=1e-5, atol=1e-5)


def test_a_tiny_run_does_not_replace_the_results(capsys):
    with pytest.raises(SystemExit):
        encoders.main(["--tiny"])
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize("name", encoder_parts.PARTS)
def test_a_part_is_the_same_layer_here_and_in_torch(name):
    import torch

    part = encoder_parts.PARTS[name]
    shape = (1, *part.shape[1:])
    theirs = part.theirs(torch)
    x = torch.zeros((shape[0], shape[3], *shape[1:3]) if len(shape) == 4 else shape)
    parameters, call = 0, part.ours
    if isinstance(part.ours, nn.Module):
        shapes = jax.eval_shape(part.ours.init, jax.random.key(0), jnp.zeros(shape))
        parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
        call = lambda x: part.ours.apply(jax.tree.map(jnp.zeros_like, shapes), x)
    assert parameters == sum(parameter.numel() for parameter in theirs.parameters())
    assert jax.eval_shape(call, jnp.zeros(shape)).size == theirs(x).numel()


def test_a_program_says_which_of_its_instructions_are_products_and_which_copies():
    @jax.jit
    def step(x, y):
        return jnp.tanh(x @ y).sum(0), x.T.copy()

    x = jnp.ones((32, 48))
    program = step.lower(x, x.T).compile().as_text()
    kinds = encoder_profile.kinds_of(program)
    assert encoder_profile.KINDS[0] in kinds.values()
    assert encoder_profile.KINDS[1] in kinds.values()
    assert encoder_profile.KINDS[2] in kinds.values()


def test_one_product_gives_the_gradients_of_three():
    params, x, w = fused_qkv.inputs(6, 4, "float32")
    params = jax.tree.map(lambda leaf: leaf + 0.5, params)
    for ours, theirs in zip(fused_qkv.apart(params, x), fused_qkv.fused(params, x), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    one, three = (fused_qkv.gradients(way)(params, x, w) for way in fused_qkv.WAYS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), one, three)


def test_a_ratio_of_ways_that_are_one_is_about_one(monkeypatch):
    monkeypatch.setattr(fused_qkv, "WAYS", (fused_qkv.apart, fused_qkv.apart))
    ticks = iter(range(1000))
    monkeypatch.setattr(fused_qkv.time, "process_time", lambda: float(next(ticks)))
    monkeypatch.setattr(fused_qkv.time, "perf_counter", lambda: float(next(ticks)))
    found = fused_qkv.compare(fused_qkv.inputs(6, 4, "float32"), rounds=3)
    assert found == {"ratio": 1, "low": 1, "high": 1, "three_seconds": 1}
