"""What measures the loader and the loop runs, and says what it claims; times are not tested."""

import json
import pathlib
import time

import numpy as np
import pytest

from benchmarks import check, input_pipeline, loop
from medvlp_jax import bench, cli
from medvlp_jax.data import transforms
from medvlp_jax.encoders.base import Tokens

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = "--config=tests/tiny_config.py"


@pytest.fixture(scope="module", autouse=True)
def _home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("MEDVLP_DATA_DIR", str(tmp_path_factory.mktemp("data")))
        yield


def test_a_loader_is_measured_from_a_config(capsys):
    arguments = ["data", CONFIG, "--seconds=0.1", "--threads", "1", "2", "--consumes=1e9"]
    assert cli.run(bench.main, arguments) == 0
    said = capsys.readouterr().out
    assert "batches of 16" in said
    assert "would starve 100% of the time" in said
    assert "of the tokens are words. data.pack=" in said
    assert len([line for line in said.splitlines() if line.strip()[:1].isdigit()]) == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["date"], "accepted: data"),
        (["data", CONFIG, "--threads", "0"], "--threads=0"),
        (["data", CONFIG, "--consumes=-1"], "--consumes=-1"),
        (["data", CONFIG, "--seconds=nan"], "--seconds=nan must be above 0"),
        (["data"], "Name a config"),
    ],
)
def test_bad_input_is_one_sentence(arguments, said, capsys):
    assert cli.run(bench.main, arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_rates_count_what_was_made_after_the_batches_that_lay_ready():
    made = []

    def batches():
        time.sleep(0.01)
        made.append(1)
        return {"image": np.zeros((8, 2, 2, 1), np.uint8), "text_id": np.zeros(8, np.int32)}

    rate = bench.rate_of(batches, threads=1, images=2, ahead=3, seconds=0.1)
    assert 5 <= len(made) <= 14
    assert 0 < rate.examples <= 800
    assert rate.images == 2 * rate.examples
    assert rate.images_per_core > rate.images  # it sleeps


def test_the_advice_on_packing_holds_every_text():
    sizes = np.array([[5, 5, 9, 3], [2, 2, 2, 2]])
    texts = [Tokens(np.ones((4, 10), np.int32), np.arange(10) < row[:, None]) for row in sizes]
    (said,) = bench.packing_advice([{"report": t} for t in texts], ("report",), 1)
    # The first batch takes three rows of four, the second one: 30 of 80 tokens are words.
    assert said == (
        "report: 38% of the tokens are words. data.pack=0.75 would hold the texts of these 2 "
        "batches; an encoder then computes on 75% of the tokens."
    )


def test_the_verdict_says_how_many_cores_a_device_takes():
    rates = [bench.Rate(1, 60.0, 120.0, 200.0), bench.Rate(2, 100.0, 200.0, 180.0)]
    assert "2.0 times as many" in bench.verdict(rates, 50, 2)
    said = bench.verdict(rates, 400, 2)
    assert "starve 75% of the time" in said
    assert "90 examples/s a core it takes 5 cores" in said


def test_parts_and_pipeline_are_measured_small():
    records = input_pipeline.radiographs(2, large=128, small=96)
    found = {
        "parts": input_pipeline.parts(records, rounds=1),
        "pipeline": input_pipeline.whole(records, seconds=0.1, rounds=1, batch_size=2),
        "position": input_pipeline.position(records, repeats=2, batch_size=2),
    }
    json.dumps(found)
    assert set(found["parts"]["ratios"]) == set(input_pipeline.arms(records)) - {
        input_pipeline.BASE
    }
    assert all(rate > 0 for rate in found["parts"]["images_per_second"].values())
    assert next(row["threads"] for row in found["pipeline"]["rows"]) == 1
    lines = input_pipeline.table(found).splitlines()
    assert lines[-1].startswith("position, microseconds: save ")


def test_what_is_measured_is_the_same_picture():
    (record,) = input_pipeline.radiographs(1, large=512, small=256)
    by_pil = input_pipeline.by_pil(record["large"])[..., 0].astype(float)
    plain = transforms.decode(record["large"], size=256, crop_black_border=False, stretch=False)
    assert np.abs(by_pil - plain[..., 0]).mean() < 2  # of 255


def test_the_loop_and_its_bare_step_take_turns(tmp_path):
    out = tmp_path / "loop.json"
    # Without the text encoder's own training, which would take most of the time.
    settings = [CONFIG, "--config.init.text="]
    found = loop.main([*settings, "--blocks=1", "--block=4", f"--out={out}"])
    assert json.loads(out.read_text()) == found
    assert found["ratios"]["bare over loop"]["median"] == pytest.approx(
        found["bare_step_seconds"] / found["loop_step_seconds"]
    )
    assert found["waits_for_data_seconds"] >= 0
    # What the gate compares, and what the numbers belong to.
    assert {*check.FACTS} - {*found} == {"tiny"}
    assert found["settings"] == settings
    assert found["measured"]["cpu"]


def test_the_input_says_what_the_gate_compares(monkeypatch, tmp_path):
    monkeypatch.setattr(input_pipeline, "radiographs", lambda count: [{"large": b"", "image": b""}])
    for part in ("parts", "whole", "position"):
        monkeypatch.setattr(input_pipeline, part, lambda *_, **__: {"ratios": {}})
    monkeypatch.setattr(input_pipeline, "table", lambda found: "")
    found = input_pipeline.main([f"--out={tmp_path / 'input.json'}"])
    assert {*check.ALWAYS, "batch_size"} <= {*found}
    assert found["measured"]["versions"]["pillow"]


def test_held_batches_come_again_and_know_their_step():
    held = loop.Held(iter(range(100)))
    assert [next(held) for _ in range(5)] == [1, 2, 3, 0, 1]
    assert held.get_state() == {"next_index": 5}
