"""The launch scripts: what they would run, word by word, and what they do when a rank dies."""

import itertools
import os
import pathlib
import re
import shutil
import signal
import stat
import subprocess
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = pathlib.Path(__file__).parent / "golden"
SCRIPTS = [*(ROOT / "launch").glob("*.sh"), ROOT / "launch/slurm.sbatch", ROOT / "tests/run.sh"]
DRY_RUNS = {
    "host": ["--config=configs/imitate.py", "--config.optim.lr=3e-4", "--workdir=runs/x"],
    "processes": ["--processes=2", "--workdir=runs/x", "--config.data.corpora=('a b',)"],
    "processes-gpu": ["--processes=2", "--workdir=runs/x"],
    "slurm": [
        "--slurm",
        "--nodes=2",
        "--gpus=2",
        "--sbatch=--partition=gpu --time=24:00:00",
        "--workdir=runs/x",
        "--config.data.corpora=('a b',)",
    ],
    "tpu": ["--tpu=pod", "--zone=us-central2-b", "--workdir=/mnt/runs/x"],
    "jobset": [
        "--jobset=pairs",
        "--image=registry/medvlp:1",
        "--claim=shared-files",
        "--nodes=2",
        "--gpus=8",
        "--workdir=/shared/runs/x",
    ],
    "jobset-tpu": [
        "--jobset=pairs",
        "--image=registry/medvlp:1",
        "--claim=shared-files",
        "--nodes=2",
        "--gpus=4",
        "--restarts=100",
        "--selector=cloud.google.com/gke-tpu-accelerator=tpu-v5-lite-podslice",
        "--selector=cloud.google.com/gke-tpu-topology=2x4",
        "--workdir=/shared/runs/x",
    ],
}
ACCELERATORS = {"processes-gpu": "cuda13", "jobset-tpu": "tpu"}

NEEDS_GIT = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git lists what is packed")


def launch(*arguments, stderr=subprocess.PIPE, **settings):
    own = ("MEDVLP_", "JAX_", "XLA_", "LIBTPU_", "HF_", "WANDB_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    return subprocess.Popen(
        ["bash", "launch/run.sh", *arguments],
        cwd=ROOT,
        env={**environment, **{k: str(v) for k, v in settings.items()}},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
    )


def finish(process, timeout=120):
    """Return (exit code, stdout, stderr); a launcher that hangs is killed and fails the test."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"hangs: {process.communicate()}")
    return process.returncode, out, err


def dry_run(name):
    data = "/shared/data" if name.startswith("jobset") else "/data"
    settings = {"MEDVLP_DATA_DIR": data, "MEDVLP_ACCELERATOR": ACCELERATORS.get(name, "")}
    code, out, err = finish(launch("--dry-run", *DRY_RUNS[name], **settings))
    assert (code, err) == (0, "")
    return out.replace(str(ROOT), "CHECKOUT")


@pytest.mark.parametrize("name", DRY_RUNS)
def test_a_dry_run_prints_the_committed_text_and_starts_nothing(name):
    """The text has command and environment of every rank; `python tests/test_launch.py` renews."""
    assert dry_run(name) == (GOLDEN / f"launch-{name}.txt").read_text()
    assert not (ROOT / "runs/x").exists()


def test_the_jobset_is_yaml_with_one_process_a_pod():
    yaml = pytest.importorskip("yaml")
    for name in ("jobset", "jobset-tpu"):
        (spec,) = yaml.safe_load(dry_run(name))["spec"]["replicatedJobs"]
        job = spec["template"]["spec"]
        assert job["completions"] == job["parallelism"] == 2
        (container,) = job["template"]["spec"]["containers"]
        assert container["command"][:2] == ["bash", "launch/run.sh"]
        assert len(container["env"]) == 5


def test_the_jobset_passes_every_setting_on_as_it_was_given():
    yaml = pytest.importorskip("yaml")
    settings = (
        '--config.data.corpora=("mimic_cxr",)',
        r"--config.optim.freeze=('\bbias', '\.norm/')",
        "--config.data.texts=a & b: #c",
        "--config.data.words=$(HOME) $5",
    )
    data = r'/shared/a "b\c" $(HOME)'
    run = launch("--dry-run", *DRY_RUNS["jobset"], *settings, MEDVLP_DATA_DIR=data)
    code, out, err = finish(run)
    assert (code, err) == (0, "")
    (spec,) = yaml.safe_load(out)["spec"]["replicatedJobs"]
    (container,) = spec["template"]["spec"]["template"]["spec"]["containers"]
    # Kubernetes puts a variable in the place of $(NAME), and $ in that of $$.
    assert {s.replace("$", "$$") for s in settings} <= {*container["command"]}
    values = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert values["MEDVLP_DATA_DIR"] == data.replace("$", "$$")
    assert len(values) == 5


SETTINGS = {
    "JAX_COMPILATION_CACHE_DIR": '/shared/a "b\\c" $(HOME)',
    "JAX_ENABLE_X64": "1",
    "XLA_FLAGS": "--xla_a='b' --xla_c=$5",
    "LIBTPU_INIT_ARGS": "--x=y",
}
# What says which process and machine this is, and what nobody else is to read.
KEPT = {"JAX_PROCESS_ID": "7", "JAX_PLATFORMS": "cpu", "WANDB_API_KEY": "geheim", "HF_TOKEN": "x9y"}
KEPT |= {"JAX_CUDA_VISIBLE_DEVICES": "0", "JAX_NUM_CPU_DEVICES": "2", "HF_HOME": "/home/me"}
KEPT |= {"JAX_COORDINATOR_BIND_ADDRESS": "10.0.0.1:1"}


def test_the_jobset_gets_settings_of_libraries_and_no_secrets():
    yaml = pytest.importorskip("yaml")
    code, out, _ = finish(launch("--dry-run", *DRY_RUNS["jobset"], **SETTINGS, **KEPT))
    assert code == 0
    (spec,) = yaml.safe_load(out)["spec"]["replicatedJobs"]
    (container,) = spec["template"]["spec"]["template"]["spec"]["containers"]
    values = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert len(values) == 5 + len(SETTINGS)
    assert values.items() >= {k: v.replace("$", "$$") for k, v in SETTINGS.items()}.items()
    assert container["envFrom"] == [{"secretRef": {"name": "medvlp", "optional": True}}]
    assert (
        "# Not sent: HF_TOKEN, WANDB_API_KEY. Pods get them by kubectl create secret generic medvlp"
        in out
    )
    assert not re.search("geheim|x9y", out)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_bash_parses_every_script(script):
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say():
    done = subprocess.run(
        ["shellcheck", "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout == ""


def test_help_names_every_flag():
    code, out, _ = finish(launch("--help"))
    assert code == 0
    flags = ("processes", "slurm", "tpu", "zone", "jobset", "image", "claim", "nodes", "gpus")
    for flag in (*flags, "restarts", "selector", "sbatch", "dry-run", "workdir", "config"):
        assert f"--{flag}" in out, flag


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes=0"], "--processes must be a whole number from 1 on, got '0'"),
        (["--restarts=x"], "--restarts must be a whole number from 1 on, got 'x'"),
        (["--slurm", "--processes=2"], "choose one of --processes, --slurm, --tpu and --jobset"),
        (["--tpu=pod"], "--tpu=pod needs --zone=ZONE"),
        (["--tpu=pod", "--zone=z", "--workdir=runs/x"], "absolute path .* got 'runs/x'"),
        (
            ["--tpu=pod", "--zone=z", "--workdir=/s/x", "--restarts=2"],
            "--restarts does not go with --tpu",
        ),
        (
            ["--tpu=pod", "--zone=z", "--workdir=/home/me/medvlp_jax_checkout/runs/x"],
            "empties medvlp_jax_checkout .* '/home/me/medvlp_jax_checkout/runs/x' must not",
        ),
        (["--jobset=x"], "--jobset needs --image=IMAGE"),
        (["--jobset=x", "--image=i", "--claim=c", "--workdir=runs/x"], "got 'runs/x'"),
        (["--jobset=X_", "--image=i", "--claim=c"], "--jobset=X_ must be lower-case"),
        (["--jobset=x", "--image=i\nhostPID: true", "--claim=c"], "--image=i hostPID: true is no"),
        (["--jobset=x", "--image=i:", "--claim=c"], "--image=i: is no name of an image"),
        (["--jobset=x", "--image=i", "--claim=c}, a: {b"], "--claim=c}, a: {b must be lower-case"),
        (["--jobset=x", '--selector=a=b"'], "--selector must be KEY=VALUE, .* got 'a=b\"'"),
        (["--jobset=x", "--selector=a: b\nc=d"], "--selector must be KEY=VALUE"),
        (["--jobset=x", "--selector=a"], "--selector must be KEY=VALUE"),
        ([*DRY_RUNS["jobset"], "--config.a=b\nc: d"], "no line break .* got '--config.a=b c: d'"),
        (["--slurm", "--sbatch=--time=1\ncurl x"], "--sbatch must be one line"),
        *(
            (["--slurm", f"--workdir=runs/a{sign}b"], "--workdir without blanks, quotes, .* got")
            for sign in " \n\t\"'\\#%"
        ),
    ],
)
def test_bad_flags_are_one_sentence(arguments, message):
    code, out, err = finish(launch(*arguments, "--dry-run"))
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert re.search(message, err)


@pytest.mark.parametrize("data", ["/data", "/shared-not", "gs://bucket/data"])
def test_data_that_no_pod_can_see_is_refused(data):
    run = launch("--dry-run", *DRY_RUNS["jobset"], MEDVLP_DATA_DIR=data)
    code, out, err = finish(run)
    assert (code, out) == (2, "")
    assert f"needs MEDVLP_DATA_DIR in /shared, the volume of --claim, got '{data}'" in err


@pytest.mark.parametrize("name", DRY_RUNS)
def test_an_accelerator_that_is_none_is_refused_and_stands_in_no_script(name):
    run = launch("--dry-run", *DRY_RUNS[name], MEDVLP_ACCELERATOR="cuda13; curl x")
    code, out, err = finish(run)
    assert (code, out) == (2, "")
    assert err == "medvlp: MEDVLP_ACCELERATOR must be cuda13 or tpu, got 'cuda13; curl x'.\n"


def test_a_star_of_sbatch_is_no_name_of_a_file():
    code, out, _ = finish(launch("--slurm", "--sbatch=--exclude=n* *", "--dry-run"))
    assert code == 0
    assert "#SBATCH --exclude=n*\n#SBATCH *\n" in out


@pytest.fixture
def ranks(tmp_path):
    """Return a function that puts a shell script in the place of the training, and settings."""
    programs = tmp_path / "bin"
    programs.mkdir()
    path = f"{programs}:{os.environ['PATH']}"

    def install(script, name="python"):
        file = programs / name
        file.write_text(f"#!/usr/bin/env bash\ncd {tmp_path}\n{script}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
        return {"MEDVLP_VENV": "none", "MEDVLP_PORT": 29500, "PATH": path}

    return install


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_every_rank_gets_its_environment_and_rank_0_the_console(tmp_path, ranks):
    script = 'echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS: $*"'
    workdir = tmp_path / "run"
    code, _, err = finish(launch("--processes=2", f"--workdir={workdir}", **ranks(script)))
    assert code == 0
    command = f"-m medvlp_jax.train --config=configs/imitate.py:demo --workdir={workdir}\n"
    assert err == f"0 of 2 at localhost:29500: {command}"
    log = (workdir / "logs/rank-1.log").read_text()
    assert log == f"1 of 2 at localhost:29500: {command}"


@pytest.mark.parametrize(
    ("fate", "code"), [("echo the reason; exit 3", 3), ("echo the reason; kill -9 $$", 137)]
)
def test_a_rank_that_dies_takes_the_others_down_and_its_log_is_shown(tmp_path, ranks, fate, code):
    # The others ignore SIGTERM, as a rank inside a collective operation does.
    script = f"""
        if [[ $JAX_PROCESS_ID == 2 ]]; then sleep 1; {fate}; fi
        trap "" TERM; echo $$ > pid-$JAX_PROCESS_ID; while :; do sleep 0.2; done
    """
    got, _, err = finish(launch("--processes=3", f"--workdir={tmp_path}/run", **ranks(script)))
    assert got == code
    assert f"rank 2 of 3 ended with code {code}" in err
    assert err.rstrip().endswith("the reason")
    assert not any(is_running(int((tmp_path / f"pid-{k}").read_text())) for k in (0, 1))


def test_a_log_keeps_what_rank_0_said_when_the_launcher_speaks_after_it(tmp_path, ranks):
    script = "[[ $JAX_PROCESS_ID == 1 ]] && { sleep 1; exit 3; }; echo first; sleep 60"
    with (tmp_path / "log").open("w") as log:
        log.write("before\n")
        log.flush()
        process = launch("--processes=2", f"--workdir={tmp_path}/run", stderr=log, **ranks(script))
        assert finish(process)[0] == 3
    assert (
        (tmp_path / "log")
        .read_text()
        .startswith("before\nfirst\nmedvlp: rank 1 of 2 ended with code 3")
    )


def test_a_rank_that_jax_aborts_for_its_peer_is_not_taken_for_the_cause(tmp_path, ranks):
    script = "[[ $JAX_PROCESS_ID == 1 ]] && { echo why; exit 1; }; exit 134"
    code, _, err = finish(launch("--processes=2", f"--workdir={tmp_path}/run", **ranks(script)))
    assert code == 1
    assert "rank 1 of 2 ended with code 1" in err


def test_sigterm_reaches_every_rank_and_the_launcher_returns_their_code(tmp_path, ranks):
    script = 'trap "exit 75" TERM; touch up-$JAX_PROCESS_ID; while :; do sleep 0.1; done'
    arguments = ("--processes=2", f"--workdir={tmp_path}/run", "--restarts=5")
    process = launch(*arguments, **ranks(script))
    while not all((tmp_path / f"up-{k}").exists() for k in (0, 1)):
        time.sleep(0.05)
    process.terminate()
    assert finish(process)[0] == 75


@pytest.mark.parametrize(
    ("code", "restarts", "starts"), [(1, 2, 3), (137, 1, 2), (2, 5, 1), (75, 5, 1), (0, 5, 1)]
)
def test_a_crash_is_restarted_and_bad_input_is_not(tmp_path, ranks, code, restarts, starts):
    script = f"echo x >> starts; exit {code}"
    arguments = (f"--restarts={restarts}", f"--workdir={tmp_path}/run")
    assert finish(launch(*arguments, **ranks(script)))[0] == code
    assert len((tmp_path / "starts").read_text().split()) == starts


def slurm(ranks, tmp_path, script, **settings):
    """Run --slurm where the scheduler is three small scripts; return what sbatch said."""
    settings |= ranks(script)
    job = "SLURM_JOB_ID=7 SLURM_JOB_NODELIST=n[1-2] SLURM_NTASKS=4 SLURM_RESTART_COUNT=$count"
    ranks(
        f"""
        for ((count = 0; ; count++)); do
          {job} bash "$1" && code=0 || code=$?
          echo "$code" >> starts
          if [[ ! -e requeued ]]; then exit "$code"; fi
          rm requeued
        done
        """,
        "sbatch",
    )
    ranks('[[ $1 == show ]] && printf "n1\\nn2\\n" || touch requeued', "scontrol")
    ranks(
        """
        echo "$*" > flags; code=0
        while [[ $1 == --* ]]; do [[ $1 == --output=* ]] && logs="${1#--output=}"; shift; done
        for ((task = 0; task < 4; task++)); do
          SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) "$@" > "${logs/\\%t/$task}" 2>&1 || code=$?
        done
        exit $code
        """,
        "srun",
    )
    workdir = f"--workdir={tmp_path}/run"
    return finish(launch("--slurm", "--nodes=2", "--gpus=2", workdir, **settings))


def test_a_job_script_that_cannot_be_written_leaves_the_old_one(tmp_path, ranks):
    script = tmp_path / "run/job.sbatch"
    script.parent.mkdir()
    script.write_text("old")
    settings = ranks("exit 1", "mv") | ranks("true", "sbatch")
    code, _, _ = finish(launch("--slurm", f"--workdir={tmp_path}/run", **settings))
    assert code != 0
    assert script.read_text() == "old"


@NEEDS_GIT
@pytest.mark.parametrize("code", [0, 1])
def test_a_tpu_gets_the_checkout_from_a_folder_that_nobody_else_can_write(tmp_path, ranks, code):
    """`gcloud` notes who may enter the folder of what it copies, and what is in the bundle."""
    note = """
        for each; do
          if [[ $each == */checkout.tgz ]]; then
            stat -c %a "${each%/*}" >> modes; tar -tzf "$each" launch/run.sh >> names
          fi
        done
        echo "$4" >> verbs
    """
    folder = tmp_path / "scratch"
    folder.mkdir()
    settings = ranks(f"{note} exit {code}", "gcloud")
    arguments = ("--tpu=pod", "--zone=z", "--workdir=/shared/x")
    assert finish(launch(*arguments, TMPDIR=folder, **settings))[0] == code
    assert (tmp_path / "modes").read_text() == "700\n"
    assert (tmp_path / "names").read_text() == "launch/run.sh\n"
    assert (tmp_path / "verbs").read_text().split() == (["scp"] if code else ["scp", "ssh"])
    assert not [*folder.iterdir()]


@pytest.fixture
def tpu(tmp_path, ranks):
    """Return a function that starts --tpu where this host is worker 3, with a home of its own."""
    home = tmp_path / "home"
    home.mkdir()

    def start(script, **settings):
        settings |= ranks(script)
        ranks("echo t1v-n-0-w-3", "hostname")
        command = f'env -i HOME={home} PATH="$PATH" MEDVLP_VENV=none bash -c "${{last#*=}}"'
        ranks(
            f"""
            for last; do true; done; cd {home}
            if [[ $4 == scp ]]; then cp "${{@: -2:1}}" medvlp-checkout.tgz; else {command}; fi
            """,
            "gcloud",
        )
        return launch("--tpu=pod", "--zone=z", f"--workdir={tmp_path}/run", **settings)

    return start


@NEEDS_GIT
def test_who_watches_a_tpu_to_the_end_sees_its_log_and_gets_its_code(tmp_path, tpu):
    """Its environment has the settings of libraries as they were given here, and no secrets."""
    code, out, err = finish(tpu("env -0 > environment; echo said; exit 7", **SETTINGS, **KEPT))
    assert (code, err) == (7, "")
    assert out.endswith("said\n")
    assert (tmp_path / "run/logs/rank-3.log").read_text() == "said\n"
    environment = (tmp_path / "environment").read_text().split("\0")
    assert {f"{name}={value}" for name, value in SETTINGS.items()} <= {*environment}
    assert not [line for line in environment if line.startswith(tuple(KEPT))]
    assert "# Not sent: HF_TOKEN, WANDB_API_KEY. Log in there" in out
    assert not re.search("geheim|x9y", out)


@NEEDS_GIT
def test_a_tpu_goes_on_when_who_watches_leaves_and_stops_when_it_is_told_to(tmp_path, tpu):
    """A second start meanwhile is refused, before it takes the files of the first away."""
    wait = "for ((k = 0; k < 1200; k++)); do sleep 0.1; done"
    script = f'trap "echo saved; exit 75" TERM; echo up; {wait}'
    watched = tpu(script)
    said = [*itertools.takewhile(lambda line: line != "up\n", watched.stdout)]
    os.killpg(watched.pid, signal.SIGKILL)
    watched.communicate()
    code, _, err = finish(tpu(script))
    assert code == 2
    assert "medvlp: a run is going on on t1v-n-0-w-3: stop it first." in err
    log = tmp_path / "run/logs/rank-3.log"
    assert log.read_text() == "up\n"
    look, stop = (line for line in said if line.startswith("gcloud") and "--command" in line)
    assert "/run/logs/rank-0.log" in look
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    subprocess.run(["bash", "-c", stop], env={**os.environ, "PATH": path}, check=True)
    for _ in range(600):
        if log.read_text() != "up\n":
            break
        time.sleep(0.1)
    assert log.read_text() == "up\nsaved\n"


def test_slurm_runs_one_task_a_gpu_with_the_first_node_as_coordinator(tmp_path, ranks):
    script = 'env | grep ^JAX_ | sort | tr "\\n" " " > env-$JAX_PROCESS_ID'
    code, out, _ = slurm(ranks, tmp_path, script)
    assert code == 0
    assert (tmp_path / "run/job.sbatch").read_text().strip() in out
    for task in range(4):
        assert (tmp_path / f"env-{task}").read_text().split() == [
            "JAX_COORDINATOR_ADDRESS=n1:20007",
            f"JAX_LOCAL_DEVICE_IDS={task % 2}",
            "JAX_NUM_PROCESSES=4",
            f"JAX_PROCESS_ID={task}",
        ]
    assert (tmp_path / "starts").read_text() == "0\n"
    assert "--cpus-per-task" not in (tmp_path / "flags").read_text()


def test_slurm_gives_a_task_the_cpus_that_the_job_was_given(tmp_path, ranks):
    assert slurm(ranks, tmp_path, "true", SLURM_CPUS_PER_TASK=6)[0] == 0
    assert " --cpus-per-task=6 " in (tmp_path / "flags").read_text()


@pytest.mark.parametrize(
    ("given", "lines"),
    [
        ("", ["--cpus-per-task=8"]),
        ("--cpus-per-task=4", ["--cpus-per-task=8", "--cpus-per-task=4"]),
        ("--cpus-per-gpu=4", ["--cpus-per-gpu=4"]),
    ],
)
def test_what_the_user_says_of_cpus_comes_last_and_holds(given, lines):
    code, out, _ = finish(launch("--slurm", f"--sbatch={given}", "--dry-run"))
    assert code == 0
    assert re.findall(r"^#SBATCH (--cpus.*)$", out, re.MULTILINE) == lines


@pytest.mark.parametrize(
    "codes", [[2], [0], [1, 0], [1, 137, 74, 1], [75, 75, 75, 75, 1, 1, 75, 1, 1, 1, 1]]
)
def test_slurm_requeues_what_was_stopped_and_three_crashes_in_a_row(tmp_path, ranks, codes):
    script = f"""
        codes=({" ".join(map(str, codes))}); code=${{codes[SLURM_RESTART_COUNT]}}
        echo "medvlp: process $JAX_PROCESS_ID of 4 leaves with code $code"; exit $code
    """
    for _ in range(2):  # a job that is submitted again counts anew
        (tmp_path / "starts").unlink(missing_ok=True)
        got, out, _ = slurm(ranks, tmp_path, script)
        assert got == codes[-1]
        assert [*map(int, (tmp_path / "starts").read_text().split())] == codes
        shown = [code for code in codes if code not in (0, 75)]
        assert re.findall(r"process 0 of 4 leaves with code (\d+)", out) == [*map(str, shown)]


def test_slurm_requeues_a_crash_that_it_cannot_count(tmp_path, ranks):
    """On a full disk, whose code is one that another start may mend."""
    (tmp_path / "run/logs/crashes").mkdir(parents=True)  # where the count would be written
    got, _, _ = slurm(ranks, tmp_path, "codes=(74 0); exit ${codes[SLURM_RESTART_COUNT]}")
    assert got == 0
    assert (tmp_path / "starts").read_text().split() == ["74", "0"]


if __name__ == "__main__":
    for each in DRY_RUNS:
        (GOLDEN / f"launch-{each}.txt").write_text(dry_run(each))
