"""Whole training steps beside PyTorch on a CPU: forward, backward and update of the same weights.

  python -m benchmarks.steps [--cases imitate ...] [--pairs 9] [--malloc] [--apart]
      [--out FILE.json]

Weights, images, texts and the channels IMITATE draws are the same (benchmarks/step_arms.py). Three
processes, each with all threads of the machine, take their steps by turns: our jitted step, plain
PyTorch (benchmarks/pytorch_step.py) and PyTorch through torch.compile. All three keep freed memory
(KEEP), without which PyTorch faults its activations in anew in every step; --malloc also measures
both as they are without. Where the memory does not hold three processes, --apart has two at a time:
ours beside each of the others.

A ratio is the time over ours of two steps of one turn, median and quartiles over the turns: above 1
we are faster. Of the two kinds of PyTorch the faster counts. Losses have to agree to 1e-4 in the
first two steps, which an update lies between; else nothing is written of that case. Ratios are
stored, not times. Cases that were measured before, on this device with as many threads, stay in the
file; each says under "measured" which code, processor and versions it is of. --tiny only shows that
it all runs.

A fourth process multiplies large matrices in PyTorch in its turns, several one behind the other.
"of_a_product" is the pace of an arm, in the FLOPs counted in our step, over that of those products;
one over PyTorch's share is what a step all of which ran at the products' pace would be ahead by,
the most that can be had.

On a GPU the case is "vit": bfloat16 (losses to 5e-2), cuDNN's attention here, torch's own there.
"""

import argparse
import contextlib
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import jax

from benchmarks import check, origin, studies
from benchmarks.step_arms import CASES, prepare
from medvlp_jax import cli

ROOT = pathlib.Path(__file__).parents[1]
ON_GPU = "vit"
# By default glibc gives a large block back to the system with every `free`; and XLA allocates in a
# thread of its own, whose arena cannot keep such blocks, so that there is to be one arena.
KEEP = {
    "GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776"
    ":glibc.malloc.arena_max=1"
}
ARMS = ("ours", "eager", "compiled")  # as benchmarks/step_arms.py knows them
LOSING = ("ours", "eager")  # those that --malloc measures without KEEP
PRODUCT = "product"  # likewise
WITHOUT = ", default malloc"
SAME = 1e-4  # relative, of the losses
HALF = 5e-2  # likewise in bfloat16: cosines, to 4e-3 each, are 14 times as large in the logits
REST = 0.1  # seconds before each step: the threads of the process before spin for a while


class Ended(RuntimeError):
    """A process ended before it was asked to."""


class Arm:
    """A process that takes steps when asked to."""

    def __init__(self, name: str, command: list[str]):
        """Start it; `said` is its first line: losses of the first steps, or why there are none."""
        is_cpu = jax.default_backend() == "cpu"  # with a GPU its threads would wait for one arena
        environment = {**os.environ, **(KEEP if is_cpu and not name.endswith(WITHOUT) else {})}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, *command]
        self.name = name
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
        self.said = self._read()

    def step(self) -> dict:
        """Take a step.

        Raises:
          Ended: with the code the process left, -9 where memory ran out.
        """
        with contextlib.suppress(BrokenPipeError):  # `_read` says why
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()

    def _read(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("{"):  # else a library's word
                return json.loads(line)
        code = self.process.wait()
        why = " (killed: too little memory?)" if code == -signal.SIGKILL else ""
        raise Ended(f"{self.name} ended with code {code}{why}.")


def by_turns(arms: dict, turns: int) -> dict[str, list[dict]]:
    """Let every arm take one step a turn; who goes first changes from turn to turn."""
    names, taken = list(arms), {name: [] for name in arms}
    for turn in range(turns):
        for i in range(len(names)):
            name = names[(i + turn) % len(names)]
            time.sleep(REST)
            taken[name].append(arms[name].step())
    return taken


def compare(
    name: str, turns: int, *, tiny: bool = False, malloc: bool = False, apart: bool = False
) -> dict:
    """Measure one case.

    Args:
      name: of CASES.
      turns: steps of each arm.
      tiny: with the case's sizes for a test.
      malloc: also without KEEP.
      apart: ours with one other process at a time.

    Raises:
      ValueError: where losses do not agree.
      Ended: where a process does not live to the end.
    """
    names = (*ARMS, *(kind + WITHOUT for kind in LOSING if malloc))
    groups = [("ours", other) for other in names[1:]] if apart else [names]
    losses, failed, taken, flops = {}, {}, [], {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        config = prepare(name, folder, tiny=tiny)
        is_half = config["recipe"]["image"]["dtype"] == "bfloat16"
        for group in groups:
            with contextlib.ExitStack() as stack:
                # One after the other: compiling takes all threads.
                arms = {
                    arm: stack.enter_context(contextlib.closing(_arm(arm, folder)))
                    for arm in (*group, PRODUCT)
                }
                failed |= {arm: a.said["error"] for arm, a in arms.items() if "error" in a.said}
                able = {arm: a for arm, a in arms.items() if arm not in failed}
                losses |= {arm: able[arm].said["losses"] for arm in group if arm in able}
                flops |= {arm: able[arm].said["flops"] for arm in ("ours", PRODUCT)}
                check_losses(name, losses, HALF if is_half else SAME)
                taken.append(by_turns(able, turns))
    found = {"title": CASES[name].title, "losses": losses, "failed": failed, **ratios(taken)}
    return found | {"of_a_product": paces(taken, flops["ours"] / flops[PRODUCT])}


def _arm(name: str, folder: pathlib.Path) -> Arm:
    return Arm(name, ["-m", "benchmarks.step_arms", name.removesuffix(WITHOUT), str(folder)])


def check_losses(name: str, losses: dict[str, list[float]], same: float = SAME) -> None:
    """Refuse arms that do not compute the same.

    Raises:
      ValueError: naming both losses.
    """
    for arm, theirs in losses.items():
        for step, (a, b) in enumerate(zip(losses["ours"], theirs, strict=True)):
            if not abs(a - b) <= same * abs(b):
                raise ValueError(f"{name}, step {step}: the loss is {a} here and {b} in {arm}.")


def ratios(groups: list[dict[str, list[dict]]]) -> dict:
    """Describe steps taken by turns: every arm's time over ours, and which PyTorch is faster."""
    found, faults = {}, {}
    for taken in groups:
        steps = {arm: t for arm, t in taken.items() if arm != PRODUCT}
        faults |= {arm: statistics.median(s["faults"] for s in t) for arm, t in steps.items()}
        for arm in steps:
            if arm != "ours":
                pairs = zip(taken[arm], taken["ours"], strict=True)
                found[arm] = check.entry(b["seconds"] / a["seconds"] for b, a in pairs)
    faster = min((arm for arm in ARMS[1:] if arm in found), key=lambda arm: found[arm]["median"])
    return {"ratios": found, "faster": faster, "faults": faults}


def paces(groups: list[dict[str, list[dict]]], work: float) -> dict[str, float]:
    """Return the pace of each arm over that of the product of its turns, medians.

    Args:
      groups: steps taken by turns.
      work: FLOPs of a step over those of the product.
    """
    found = {}
    for taken in groups:
        for arm in taken.keys() - {PRODUCT}:
            pairs = zip(taken[PRODUCT], taken[arm], strict=True)
            shares = [work * p["seconds"] / a["seconds"] for p, a in pairs]
            found.setdefault(arm, []).extend(shares)  # "ours" is in each group
    return {arm: statistics.median(found[arm]) for arm in sorted(found)}


def table(cases: dict) -> str:
    """Format the comparison."""
    columns = {"PyTorch / ours": "eager", "torch.compile / ours": "compiled"}
    columns |= {f"{kind}{WITHOUT} / ours": f"{kind}{WITHOUT}" for kind in LOSING}
    last = "PyTorch, ours, of a product's pace"
    lines = [f"| step | {' | '.join(columns)} | {last} |", "|---|" + "---:|" * (len(columns) + 1)]
    for found in cases.values():
        cells = [
            check.text(found["ratios"][arm]) if arm in found["ratios"] else ""
            for arm in columns.values()
        ]
        shares = [found["of_a_product"][arm] for arm in (found["faster"], "ours")]
        cells.append(", ".join(f"{share:.0%}" for share in shares))
        lines.append(f"| {found['title']} | {' | '.join(cells)} |")
        lines += [f"{arm} could not be measured: {why}" for arm, why in found["failed"].items()]
    return "\n".join(lines)


def main(argv=None):
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), help="default: by the device")
    parser.add_argument("--pairs", type=int, default=9, help="turns")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--malloc", action="store_true", help="also without keeping freed memory")
    parser.add_argument("--apart", action="store_true", help="two processes at a time")
    kept = "default: benchmarks/results/steps.json, on a GPU steps-gpu.json"
    parser.add_argument("--out", type=pathlib.Path, help=kept)
    options = parser.parse_args(argv)
    if options.tiny and not options.out:
        parser.error("--tiny measures nothing worth keeping: name another --out.")
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the arms share a GPU
    is_cpu = jax.default_backend() == "cpu"
    if not is_cpu:
        import torch  # slow to import, and nothing else here needs it

        if not torch.cuda.is_available():
            parser.error("JAX has a GPU and PyTorch none: install a build of PyTorch with CUDA.")
    results = ROOT / "benchmarks/results"
    options.out = options.out or results / ("steps.json" if is_cpu else "steps-gpu.json")
    here = tuple(name for name in CASES if (name == ON_GPU) != is_cpu)
    facts = {"device": jax.devices()[0].device_kind, "threads": len(os.sched_getaffinity(0))}
    facts |= {"tiny": True} if options.tiny else {}
    cases = studies.parts(options.out, studies.read(options.out), "cases", facts)
    how = {"tiny": options.tiny, "malloc": options.malloc, "apart": options.apart}
    refused = []
    for name in options.cases or here:
        try:
            found = compare(name, options.pairs, **how)
        except (ValueError, Ended) as error:  # the other cases are no worse for it
            refused.append(f"{name}: {error}" if isinstance(error, Ended) else str(error))
            continue
        if not is_cpu and "compiled" in found["failed"]:  # the weaker PyTorch would count
            refused.append(f"{name}: torch.compile: {found['failed']['compiled']}")
        cases[name] = {
            **found,
            "turns": options.pairs,
            "measured": origin.measured("torch", "transformers"),
        }
        check.keep(options.out, {**facts, "cases": cases})
        print(table({name: found}), flush=True)
    if refused:
        raise SystemExit(f"Not measured: {' '.join(refused)}")
    return cases


if __name__ == "__main__":
    cli.leave(cli.run(main))
