"""launch/prima.sh: the stages in order, each from the one before; a second start goes on."""

import os
import pathlib
import re
import shutil
import stat
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = pathlib.Path(__file__).parent / "golden" / "launch-prima.txt"
PYTHON = """#!/usr/bin/env bash
echo "$*" >> {log}
{fate}
mkdir -p {work}/corpus
for each; do case "$each" in --workdir=*) mkdir -p "${{each#*=}}" ;; esac; done
"""
DRY_RUN = ["--dry-run", "--workdir=runs/x", "--folds=2", "--config.seed=3", "--fuse.optim.lr=1e-5"]


def launch(*arguments, **settings):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MEDVLP_", "JAX_"))}
    return subprocess.run(
        ["bash", "launch/prima.sh", *arguments],
        cwd=ROOT,
        env={**environment, **settings},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_dry_run_prints_the_committed_commands_and_starts_nothing():
    """`python tests/test_launch_prima.py` renews the text."""
    done = launch(*DRY_RUN)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == GOLDEN.read_text()
    assert not (ROOT / "runs/x").exists()


def test_every_config_a_dry_run_names_exists():
    from configs import prima

    for corpus in prima.CORPORA:
        done = launch("--dry-run", f"--config=configs/prima.py:{corpus}", "--folds=1")
        named = re.findall(r"--config=configs/prima.py:(\w+)", done.stdout)
        assert [name.partition("_")[0] for name in named] == ["inject", "align", "sharpen", "fuse"]
        assert set(named) <= set(prima.VARIANTS)


def test_flags_of_the_corpus_and_of_one_stage_reach_that_stage_alone():
    done = launch(
        "--dry-run", "--workdir=w", "--folds=0", "--risk=my.json", "--backend=endpoint",
        "--model=m", "--articles=a b", "--extra-body={}", "--allow-remote", "--align.train.steps=7",
    )  # fmt: skip
    corpus, inject, *others, table = done.stdout.splitlines()
    assert corpus.endswith(
        r"--risk my.json --backend endpoint --out w/corpus --model m --articles a\ b "
        r"--extra-body \{\} --allow-remote"
    )
    assert "allow_unvetted" not in inject
    assert ["--config.train.steps=7" in line for line in others] == [True, False, False]
    assert all("--config.data.folds.count=0" in line for line in others)
    assert table.endswith("w/own/fuse --out w/results.json")
    given = launch("--dry-run", "--workdir=w", "--corpus=c", "--allow-unvetted").stdout
    assert "medvlp_jax.evidence" not in given
    assert "knowledge.folder=c --config.data.knowledge.allow_unvetted=True" in given


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--slurm"], "what is '--slurm'"),
        (["--folds=x"], "--folds must be a whole number, got 'x'"),
        (["--folds=6"], "--folds=6 is more than the 5 folds there are"),
        (["--config.data.folds.count=3"], "--folds=5 is more than the 3 folds"),
        (["--config=configs/prima.py"], "must be FILE:CORPUS, .* got 'configs/prima.py'"),
        (["--config=configs/prma.py:pad"], "no config file 'configs/prma.py'"),
    ],
)
def test_bad_flags_are_one_sentence(arguments, message):
    done = launch(*arguments, "--dry-run")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert re.search(message, done.stderr)


def test_help_names_every_flag():
    said = launch("--help").stdout
    for flag in (
        "config", "workdir", "folds", "risk", "articles", "backend", "model", "url", "retriever",
        "max-tokens", "extra-body", "allow-remote", "allow-unvetted", "corpus", "inject.",
        "processes", "restarts", "dry-run",
    ):  # fmt: skip
        assert f"--{flag}" in said, flag


@pytest.fixture
def chain(tmp_path):
    """Return a function that runs the chain with a shell script in the place of Python."""
    programs = tmp_path / "bin"
    programs.mkdir()
    log = tmp_path / "log"

    def run(fate="", *more):
        file = programs / "python"
        file.write_text(PYTHON.format(log=log, fate=fate, work=tmp_path / "w"))
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
        path = f"{programs}:{os.environ['PATH']}"
        log.write_text("")
        settings = {"MEDVLP_VENV": "none", "PATH": path}
        done = launch(f"--workdir={tmp_path}/w", "--folds=2", *more, **settings)
        run.said = done.stderr
        stages = re.findall(
            r"evidence corpus|prima.py:(\w+)_phantom|evaluation.(folds)", log.read_text()
        )
        return done.returncode, ["".join(found) or "corpus" for found in stages]

    return run


def test_a_chain_that_failed_goes_on_with_the_stage_that_failed(chain):
    fold = ["align", "sharpen", "fuse"]
    assert chain('case "$*" in *sharpen_*fold-1*) exit 75 ;; esac') == (
        75,
        ["corpus", "inject", *fold, "align", "sharpen"],
    )
    assert chain("") == (0, ["sharpen", "fuse", "folds"])
    assert chain("") == (0, ["folds"])


def test_a_stage_that_ended_with_other_settings_is_not_passed_over(chain):
    assert chain("")[0] == 0
    assert chain("", "--restarts=1", "--processes=2") == (0, ["folds"])
    assert chain("", "--fuse.optim.lr=1e-5") == (2, [])
    assert "w/fold-0/fuse was finished with other settings" in chain.said
    assert "--config.optim.lr=1e-5" in chain.said
    assert "Name another --workdir" in chain.said


def test_bash_parses_it():
    subprocess.run(["bash", "-n", ROOT / "launch/prima.sh"], check=True)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say():
    command = ["shellcheck", "-x", "launch/prima.sh"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == ""


if __name__ == "__main__":
    GOLDEN.write_text(launch(*DRY_RUN).stdout)
