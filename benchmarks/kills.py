"""Kill a training again and again, and compare what comes out with one that was left alone.

  python benchmarks/kills.py [--kills 50] [--processes 1 1,2,4] [--seed 0] [--out FILE.json]

One study for each --processes. Whole runs first, one for each number of processes; then a run that
is killed with SIGKILL at random moments, by turns while it compiles, steps, saves and evaluates,
and started again with the next number of processes. With several processes one rank is killed, and
the launcher has to take down the rest. Real processes, gloo, the configuration of the tests.

Prints a table and writes every kill: phase, step, newest checkpoint then, step of the next start.
"""

import argparse
import itertools
import json
import os
import pathlib
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from medvlp_jax import cli
from medvlp_jax.training.checkpoint import Checkpointer
from medvlp_jax.writing import replaced

ROOT = pathlib.Path(__file__).parents[1]
PHASES = ("compile", "step", "save", "evaluation")
AFTER = 50  # steps left to run after the last kill
SAVE, EVALUATE = 3, 8  # steps between checkpoints and between evaluations
PATIENCE = 3600.0  # seconds after which a run counts as hung


# Of the tests; optimised machine code would take longer to make than to run.
TINY = (
    "--config=tests/tiny_config.py",
    f"--config.train.checkpoint_every={SAVE}",
    f"--config.train.evaluate_every={EVALUATE}",
)


class Run:
    """One start of the training in a run folder."""

    def __init__(
        self,
        folder: pathlib.Path,
        processes: int,
        steps: int,
        home: pathlib.Path,
        log: str = "",
        settings: tuple[str, ...] = TINY,
    ):
        """Start it; data, compile cache and logs lie in `home`."""
        self.folder, self.processes = folder, processes
        self.log = home / f"{log or folder.name}.log"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
        environment |= {
            "MEDVLP_VENV": "none",
            "MEDVLP_DATA_DIR": str(home / "data"),
            "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "",
            # What is measured is not the compiler: an executable is the same, cached or not.
            "JAX_COMPILATION_CACHE_DIR": str(home / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        if settings is TINY:
            environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        arguments = [*settings, f"--workdir={folder}", f"--config.train.steps={steps}"]
        arguments += [f"--processes={processes}"] if processes > 1 else []
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                ["bash", "launch/run.sh", *arguments],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait(self) -> int:
        """Return its exit code; one that hangs is an error."""
        return self.process.wait(timeout=PATIENCE)

    def ranks(self) -> list[int]:
        """Return the process ids of its ranks, which are children of the launcher or itself."""
        if self.processes == 1:
            return [self.process.pid]
        launcher = self.process.pid
        children = pathlib.Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        command = lambda pid: pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
        return [int(pid) for pid in children if b"medvlp_jax.train" in command(pid)]

    def until(self, condition) -> bool:
        """Wait for a condition; False where the run ends before it holds."""
        while self.process.poll() is None:
            if condition():
                return True
            time.sleep(0.002)
        return False


def last_step(folder: pathlib.Path) -> int:
    """Return the last step in metrics.jsonl."""
    file = folder / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return max(map(int, re.findall(r'^\{"step": (\d+),', text, re.MULTILINE)), default=0)


def newest(folder: pathlib.Path) -> int:
    """Return the newest whole checkpoint by its name."""
    found = (folder / "checkpoints").glob("*")
    return max((int(p.name) for p in found if p.name.isdigit()), default=0)


def kill(run: Run, phase: str, rng: random.Random) -> bool:
    """Kill one rank in a phase; False where the run was over before."""
    folder, start = run.folder, newest(run.folder)
    ready = lambda: "trainable and" in run.log.read_text()
    writing = lambda: any((folder / "checkpoints").glob("*tmp*"))
    # Steps here are faster than saving: without a new checkpoint no start would come further.
    further = lambda: newest(folder) > start
    goal = start + rng.randint(1, 2 * SAVE)
    evaluated = lambda: last_step(folder) // EVALUATE > start // EVALUATE
    conditions = {
        "compile": ready,
        "step": lambda: further() and last_step(folder) >= goal,
        "save": lambda: further() and writing(),
        "evaluation": lambda: further() and evaluated(),
    }
    longest = {"compile": 3.0, "step": 0.2, "save": 0.03, "evaluation": 0.2}
    if not run.until(ready) or not run.until(conditions[phase]):
        return False
    time.sleep(rng.random() * longest[phase])
    ranks = run.ranks()
    if not ranks:
        return False
    os.kill(rng.choice(ranks), signal.SIGKILL)
    return True


def metrics(folder: pathlib.Path) -> list[dict]:
    """Return the lines of metrics.jsonl without times."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def parameters(folder: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    """Return {path: array} of the state in a checkpoint."""
    checkpointer = Checkpointer(folder / "checkpoints")
    leaves = jax.tree_util.tree_leaves_with_path(checkpointer.read(step))
    checkpointer.close()
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def compare(a: pathlib.Path, b: pathlib.Path, steps: int) -> dict:
    """Compare two finished runs: metrics line by line, and the last state array by array."""
    ours, theirs = parameters(a, steps), parameters(b, steps)
    assert ours.keys() == theirs.keys()
    params = [k for k in ours if k.startswith("['params']")]
    norm = lambda names, of: np.sqrt(sum(np.sum(of(k).astype(np.float64) ** 2) for k in names))
    relative_to = lambda names: float(
        norm(names, lambda k: ours[k].astype(np.float64) - theirs[k]) / norm(names, ours.get)
    )
    # The softmax does not see the bias of a key: its gradient is rounding and nothing else, which
    # Adam makes as large as any step.
    felt = [k for k in params if not k.endswith("['key']['bias']")]
    losses = [[m["loss"] for m in metrics(f) if "loss" in m] for f in (a, b)]
    loss_relative = [abs(x - y) / abs(x) for x, y in zip(*losses, strict=True)]
    return {
        "state_bit_identical": all(np.array_equal(ours[k], theirs[k]) for k in ours),
        "metrics_identical": metrics(a) == metrics(b),
        "steps_once_each": [m["step"] for m in metrics(b) if "loss" in m]
        == list(range(1, steps + 1)),
        "parameters_relative": relative_to(params),
        "parameters_relative_without_key_biases": relative_to(felt),
        "loss_relative_largest": max(loss_relative),
    }


def study(counts: list[int], kills: int, seed: int, home: pathlib.Path) -> dict:
    """Return what `kills` kills with these process counts by turns did."""
    rng = random.Random(seed)
    steps = EVALUATE * kills + AFTER  # more than the kills take: in turns 0, 9, 6 and 11
    name = "-".join(map(str, counts))
    whole = {}
    for count in sorted(set(counts)):
        whole[count] = home / f"whole-{count}-{steps}"
        if not (whole[count] / "results.json").exists():
            code = Run(whole[count], count, steps, home).wait()
            assert code == 0, (home / f"{whole[count].name}.log").read_text()[-3000:]
    folder = home / f"killed-{name}"
    turns, events = itertools.cycle(counts), []
    for number in range(kills):
        phase = PHASES[number % len(PHASES)]
        run = Run(folder, next(turns), steps, home)
        struck = kill(run, phase, rng)
        began = time.monotonic()
        code = run.wait()
        assert struck, f"ended with {code} before it was killed: {run.log.read_text()[-3000:]}"
        resumed = re.search(r"Resuming .* at step (\d+)", run.log.read_text())
        events.append(
            {
                "phase": phase,
                "processes": run.processes,
                "started_at": int(resumed.group(1)) if resumed else 0,
                "step": last_step(folder),
                "newest_checkpoint": newest(folder),
                "code": code,
                "seconds_to_end": round(time.monotonic() - began, 2),
            }
        )
        print(json.dumps(events[-1]), flush=True)
    last = Run(folder, next(turns), steps, home)
    assert last.wait() == 0, last.log.read_text()[-3000:]
    resumed = int(re.search(r"Resuming .* at step (\d+)", last.log.read_text()).group(1))
    starts = [event["started_at"] for event in events[1:]] + [resumed]
    return {
        "processes": counts,
        "kills": events,
        "steps": steps,
        "last_start": resumed,
        "started_from_newest_checkpoint": [
            start == event["newest_checkpoint"] for start, event in zip(starts, events, strict=True)
        ],
        "against_whole": {count: compare(f, folder, steps) for count, f in whole.items()},
        "whole_against_whole": {
            f"{a}-{b}": compare(whole[a], whole[b], steps)
            for a, b in itertools.combinations(whole, 2)
        },
    }


def table(studies: list[dict]) -> str:
    """Lay the studies out in Markdown."""
    names = ("processes, by turns", "kills", "against a whole run of", "state")
    names += ("parameters, relative", "without key biases", "losses, largest relative")
    head = f"| {' | '.join(names)} |\n{'|---' * len(names)}|"
    rows = [head]
    for each in studies:
        turns = ", ".join(map(str, each["processes"]))
        for count, found in each["against_whole"].items():
            state = "bit-identical" if found["state_bit_identical"] else "differs"
            rows.append(
                f"| {turns} | {len(each['kills'])} | {count} | {state} | "
                f"{found['parameters_relative']:.1e} | "
                f"{found['parameters_relative_without_key_biases']:.1e} | "
                f"{found['loss_relative_largest']:.1e} |"
            )
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> None:
    """Run the studies."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, help="in each study")
    parser.add_argument("--processes", nargs="+", default=["1", "1,2,4"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--home", type=pathlib.Path, help="where runs go; default: a temporary one")
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args(argv)
    home = arguments.home or pathlib.Path(tempfile.mkdtemp(prefix="kills-"))
    home.mkdir(parents=True, exist_ok=True)
    studies = [
        study([*map(int, counts.split(","))], arguments.kills, arguments.seed, home)
        for counts in arguments.processes
    ]
    print(table(studies))
    if arguments.out:
        facts = {"jax": jax.__version__, "python": platform.python_version()}
        facts |= {"seed": arguments.seed, "cores": os.cpu_count(), "studies": studies}
        with replaced(arguments.out) as scratch:
            scratch.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    cli.leave(cli.run(main))
