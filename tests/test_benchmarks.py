"""The benchmarks run where there is no accelerator, and count what the programs really do."""

import argparse
import itertools
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    contrastive,
    coverage,
    encoder_profile,
    evidence,
    methods,
    origin,
    step_model,
    step_profile,
    step_settings,
    train_step,
)
from medvlp_jax import cli, sharding
from medvlp_jax.config import UserError
from medvlp_jax.losses import tiled
from medvlp_jax.training import flops

ROOT = pathlib.Path(__file__).parents[1]
BATCH, WIDTH, DEVICES, TILE = 256, 128, 8, 16
SMALL = (
    "--config=configs/clip.py:vit_b16",
    "--config.train.batch_size=16",
    "--config.recipe.image.variant=tiny",
    "--config.recipe.image.dtype=float32",
    "--config.recipe.text.variant=tiny",
    "--config.recipe.text.dtype=float32",
    "--config.data.crop=32",
    "--config.data.text_length=16",
)


@pytest.fixture(autouse=True)
def _home(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MEDVLP_DATA_DIR", str(tmp_path / "data"))


def traced_softmax(width=WIDTH):
    mesh = sharding.make_mesh(devices=jax.devices()[:DEVICES])
    shape = jax.ShapeDtypeStruct((BATCH, width), jnp.float32)
    loss = lambda x, y, scale: tiled.info_nce(x, y, scale, tile=TILE)
    with jax.set_mesh(mesh):
        return jax.jit(jax.value_and_grad(loss, (0, 1, 2))).trace(shape, shape, 10.0).jaxpr


def bytes_sent(jaxpr, times=1):
    """Add up what `ppermute` sends from each device, loops unfolded."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "ppermute":
            total += times * sum(v.aval.size * v.aval.dtype.itemsize for v in eqn.invars)
        repeats = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for inner in flops._inner(eqn.params):
            total += bytes_sent(inner, times * repeats)
    return total


def test_the_ring_sends_as_many_bytes_as_the_model_says():
    sent = bytes_sent(traced_softmax().jaxpr)
    assert sent == step_model.ring_bytes(BATCH, WIDTH)


def test_the_softmax_takes_as_many_flops_as_the_model_says():
    """Of what grows with the width; exponentials and sums over pairs do not, and are left out."""
    narrow, wide = (
        flops.by_part(traced_softmax(width), lambda name: "all")[0]["all"]
        for width in (WIDTH, 2 * WIDTH)
    )
    # A tile's products are added to the sums of its rows and columns; four more scale them.
    additions = (2 * BATCH // TILE + 4) * BATCH * WIDTH
    assert wide - narrow == step_model.softmax_flops(BATCH, WIDTH) + additions


def test_a_step_on_more_chips_takes_longer_but_makes_more_pairs():
    method = step_model.Method(1.7e11, 200_000_000, 512, 2e8)
    chip = step_model.CHIPS["H100, 8 a host"]
    steps = [step_model.step(method, chip, n, 64, fsdp=True) for n in step_model.COUNTS]
    for few, many in itertools.pairwise(steps):
        assert few["seconds"] < many["seconds"]
        assert few["pairs_per_second"] < many["pairs_per_second"]
        assert few["bytes"] > many["bytes"]
    for row in steps:
        parts = row["towers"] + row["loss"] + row["ring"] + row["gradients_exposed"]
        assert math.isclose(parts, row["seconds"])


def test_a_step_is_measured_with_every_number(tmp_path):
    out = tmp_path / "step.json"
    (row,) = train_step.main([*SMALL, "--devices=1", "--rounds=1", "--steps=1", f"--out={out}"])
    assert out.is_file()
    assert row["finite_loss"]
    for key, value in row.items():
        if isinstance(value, float):
            assert np.isfinite(value), key
    assert row["pairs_per_second"] == pytest.approx(16 / row["step_seconds"])
    assert 0.25 * 16 * 16 <= row["tokens_per_second"] * row["step_seconds"] <= 16 * 16
    assert row["model_flops"] > 0
    assert row["seconds_of"]["encode forward"] > 0
    assert row["mfu_of_data_sheet"] is None  # no data sheet of a CPU


def test_a_step_is_profiled_by_part_and_kind(tmp_path):
    out = tmp_path / "profile.json"
    rows = step_profile.main([*SMALL, "--rounds=1", "--top=3", f"--out={out}"])
    found = json.loads(out.read_text())
    assert found["milliseconds"] == rows
    times = [each["milliseconds"] for each in found["slowest"]]
    assert times == sorted(times, reverse=True)
    assert len(times) == 3
    assert all(each["makes"] and each["kind"] in encoder_profile.KINDS for each in found["slowest"])
    assert {"image encoder", "text encoder", "heads", "loss", "optimiser"} <= set(rows)
    for row in rows.values():
        by_way = sum(row.get(way, 0) for way in ("forward", "backward"))
        assert by_way == pytest.approx(sum(row.get(kind, 0) for kind in encoder_profile.KINDS))
    for encoder in ("image encoder", "text encoder"):
        assert rows[encoder]["forward"] > 0
        assert rows[encoder]["backward"] > 0
        assert rows[encoder]["matrix products"] > 0
    assert rows["optimiser"].get("backward", 0) == 0


def test_settings_and_flags_take_turns_and_what_cannot_be_compiled_is_named(tmp_path, capsys):
    out = tmp_path / "settings.json"
    tried = ("config.optim.b1=0.5", "xla_llvm_disable_expensive_passes=true", "xla_nonsense=1")
    arms = [f"--try={words}" for words in (*tried, "config.nonsense=1")]
    found = step_settings.main([*SMALL, *arms, "--rounds=2", "--steps=1", f"--out={out}"])
    assert json.loads(out.read_text()) == found
    assert list(found["ratios"]) == [*tried[:2]]
    assert all(ratio["median"] > 0 for ratio in found["ratios"].values())
    assert set(found["failed"]) == {tried[2], "config.nonsense=1"}
    assert "xla_nonsense" in found["failed"][tried[2]]
    assert f"| `{tried[0]}` |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        step_settings.main([*SMALL, "--try=nonsense"])


def test_an_instruction_that_runs_others_is_not_counted_beside_them():
    @jax.jit
    def step(x):
        return jax.lax.fori_loop(0, 100, lambda _, x: jnp.tanh(x @ x), x)

    program = step.lower(jnp.ones((8, 8))).compile().as_text()
    loops = [line.split("=")[0].strip(" %") for line in program.splitlines() if " while(" in line]
    assert loops
    parts = step_profile.parts_of(program)
    assert not set(loops) & set(parts)
    assert parts


def test_more_and_more_devices_are_measured_as_one_would_be(monkeypatch, tmp_path):
    commands = []
    row = {"step_seconds": 1.0, "devices": 1}

    def run(command, **_):
        commands.append(command)
        return argparse.Namespace(returncode=0, stdout=f"words\n{json.dumps(row)}\n")

    monkeypatch.setattr(train_step.subprocess, "run", run)
    monkeypatch.setattr(train_step, "table", lambda rows: "")
    train_step.main([*SMALL, "--weak", "1", "2", "--data", "--quick"])
    assert [word for word in commands[1] if word.startswith("--devices")] == ["--devices=2"]
    for command in commands:
        assert {"--data", "--quick"} <= {*command}
    train_step.main([*SMALL, "--weak", "1"])
    assert not {"--data", "--quick"} & {*commands[-1]}
    monkeypatch.setattr(
        train_step.subprocess, "run", lambda *_, **__: argparse.Namespace(returncode=2)
    )
    with pytest.raises(UserError, match="1 devices could not be measured, see above"):
        train_step.main([*SMALL, "--weak", "1"])
    with pytest.raises(SystemExit):
        train_step.main([*SMALL, "--weak", "1", "--devices=2"])


def test_where_a_number_comes_from_names_the_processor_and_never_the_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(origin, "INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(origin.platform, "processor", lambda: "")
    monkeypatch.setattr(origin.platform, "node", lambda: pytest.fail("the machine's name"))
    assert origin.cpu() == "unknown"
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: A Processor 7\nflags : x\n")
    found = origin.measured("numpy")
    assert found["cpu"] == "A Processor 7"
    assert found["versions"].keys() == {"python", "jax", "numpy"}
    assert found["code"].keys() == {"version", "commit", "dirty"}


def test_a_part_that_is_measured_again_does_not_relabel_the_others(monkeypatch, tmp_path):
    old, out = {"jax": "0.1", "cores": 64}, tmp_path / "contrastive.json"
    out.write_text(json.dumps({"memory": [], "large": {"batch": 1}, "machine": old}))
    monkeypatch.setattr(contrastive, "in_a_process", lambda part, repeats: {"batch": 2})
    contrastive.main(["--parts", "large", f"--out={out}"])
    found = json.loads(out.read_text())
    assert (found["memory"], found["large"]) == ([], {"batch": 2})
    assert found["measured"]["memory"] == old
    assert found["measured"]["large"].keys() == {"threads", "code", "cpu", "versions"}
    assert "machine" not in found
    contrastive.main(["--parts", "large", f"--out={out}"])
    assert json.loads(out.read_text())["measured"]["memory"] == old


def test_a_training_that_is_done_is_kept_and_other_settings_are_refused(monkeypatch, tmp_path):
    asked, entry = [], {"value": 0.5, "low": 0.4, "high": 0.6, "chance": 0.1}

    def run_arm(fields, seed, steps, overrides):
        asked.append((fields["kernel"], seed))
        return dict.fromkeys(methods.METRICS, entry)

    monkeypatch.setattr(methods, "run_arm", run_arm)
    out = tmp_path / "cicl.json"
    kept = json.loads((ROOT / "benchmarks/results/cicl.json").read_text())
    out.write_text(json.dumps(kept))
    again = ["--steps=120", "--config.mlm.steps=400", f"--out={out}"]
    methods.main([*again, "--seeds=1", "--arms", "InfoNCE"])
    assert json.loads(out.read_text()) == kept  # nine trainings, none of which is run again
    assert not asked
    methods.main([*again, "--seeds=4", "--arms", "InfoNCE"])
    found = json.loads(out.read_text())
    assert asked == [("none", 3)]
    assert {arm: len(runs) for arm, runs in found["results"].items()} == dict(
        zip(methods.ARMS, (4, 3, 3), strict=True)
    )
    assert found["settings"]["overrides"] == ["--config.mlm.steps=400"]
    for other in (["--steps=120"], ["--steps=7", "--config.mlm.steps=400"]):
        with pytest.raises(UserError, match=r"holds numbers of settings .*: name another --out"):
            methods.main([*other, f"--out={out}"])


@pytest.mark.parametrize(
    ("main", "arguments", "said"),
    [
        (coverage.main, ["--replications=0"], "--replications=0 must be above 0."),
        (evidence.main, ["--openi=/nope"], "--openi=/nope has no index.csv and no ecgen-radiology"),
        (train_step.main, ["--config=configs/nope.py"], "configs/nope.py"),
        (step_profile.main, ["--config=configs/clip.py:demo", "--config.nope=1"], "nope"),
    ],
)
def test_bad_input_is_one_sentence(main, arguments, said, capsys):
    assert cli.run(main, arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


OWN_WAY = ("check.py", "step_arms.py")  # with codes of its own, and read by steps.py


@pytest.mark.parametrize("file", (ROOT / "benchmarks").glob("*.py"), ids=lambda file: file.name)
def test_every_command_ends_as_those_of_medvlp_do(file):
    if "__main__" in (text := file.read_text()) and file.name not in OWN_WAY:
        assert text.endswith("\n    cli.leave(cli.run(main))\n")
        assert re.search(r"^def main\(argv", text, re.MULTILINE)


ADDED_TO = ("methods", "evaluation", "steps.py", "encoders.py", "contrastive.py")  # to what is kept


@pytest.mark.parametrize("file", (ROOT / "benchmarks").glob("*.py"), ids=lambda file: file.name)
def test_what_is_written_as_a_whole_has_no_place_by_default(file):
    """A quick look with fewer rounds would take the place of the kept result."""
    text = file.read_text()
    if not file.name.startswith(ADDED_TO) or file.name == "evaluation_scale.py":
        assert not re.search(r'"--out",[^)]*default', text)
    elif "--out" in text:
        assert "studies." in text


@pytest.mark.parametrize("file", (ROOT / "benchmarks").glob("*.py"), ids=lambda file: file.name)
def test_no_benchmark_writes_over_its_results_in_place(file):
    assert not re.search(r"\.out\.(write_text|write_bytes|open)\(", file.read_text())
