"""What is to be measured on a GPU would run there: settings, limits, and what fails alone."""

import json
import pathlib

import pytest

from benchmarks import gpu
from medvlp_jax import train

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize("tiny", [False, True])
def test_every_part_has_settings_that_exist_and_time_that_is_there(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    parts = gpu.parts(tmp_path, tiny=tiny)
    assert sum(part.limit for part in parts) <= 60 * gpu.MINUTES
    own = ("--quick", "--out", "--rounds", "--steps")
    steps = [part for part in parts if part.commands[0][1] == "benchmarks.train_step"]
    assert len(steps) == 3
    for _, program, *arguments in (command for part in steps for command in part.commands):
        settings = [s for s in arguments if s.partition("=")[0] not in own]
        config, _ = train.resolve(settings)
        assert config["recipe"]["image"]["dtype"] == "bfloat16"
        assert config["recipe"]["image"]["attention"] == ("xla" if tiny else "cudnn")
        assert config["recipe"]["text"]["attention_dropout"] == 0  # cuDNN's has none
        assert (ROOT / f"{program.replace('.', '/')}.py").is_file()
    # On a GPU the correctness tests must not fall back to a CPU, where they are skipped.
    (correct,) = (part for part in parts if part.name == "correct")
    assert correct.environment["JAX_PLATFORMS"] == ("cpu" if tiny else "cuda,cpu")


def test_a_part_that_fails_is_named_and_stops_no_other(tmp_path, monkeypatch, capsys):
    sleeping = ["bash", "-c", f"sleep 2; touch {tmp_path}/awake"]  # a child of the part
    made = [
        gpu.Part("hangs", 1, (("-c", f"import subprocess; subprocess.run({sleeping})"),)),
        gpu.Part("breaks", 60, (("-c", "raise SystemExit(3)"), ("-c", "raise SystemExit(4)"))),
        gpu.Part("full", 60, (("-c", f"raise ValueError('{gpu.FULL}')"), ("-c", "print(2)"))),
        gpu.Part(
            "runs",
            60,
            (("-c", "import os; print(os.environ['WORD'])", f"--out={tmp_path}/out/runs.json"),),
            {"WORD": "a word"},
        ),
    ]
    monkeypatch.setattr(gpu, "parts", lambda folder, tiny: made)
    found = gpu.main([str(tmp_path / "out")])
    assert {name: part["outcome"] for name, part in found.items()} == {
        "hangs": "not measured: longer than 1 s",
        "breaks": "not measured: code 3",
        "full": "measured",
        "runs": "measured",
    }
    assert json.loads((tmp_path / "out/parts.json").read_text()) == found
    assert found["runs"]["command"][-1] == "--out=FOLDER/runs.json"  # no path of the machine
    assert (tmp_path / "out/runs.log").read_text() == "a word\n"
    assert (tmp_path / "out/full.log").read_text() == "2\n"
    assert not (tmp_path / "awake").exists()
    assert capsys.readouterr().out.splitlines()[-1] == "runs: measured"


@pytest.mark.slow
def test_all_parts_run_small_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # one device, not the eight of the other tests
    found = gpu.main([str(tmp_path), "--tiny"])
    assert {name for name, part in found.items() if part["outcome"] != "measured"} <= {"beside"}
    for name in ("vit-b16", "vit-l16", "clip"):
        (row,) = json.loads((tmp_path / f"{name}.json").read_text())["rows"]
        assert row["finite_loss"]
        assert "seconds_of" not in row
