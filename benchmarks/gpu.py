"""Everything that is to be measured on one GPU, unattended, in at most eight minutes.

  python -m benchmarks.gpu FOLDER [--tiny]

  vit-b16   ViT-B/16 trains in bfloat16, beside a text encoder of no weight: images a second
  clip      ViT-B/16 and BERT-base on 128 tokens: pairs a second
  correct   each fast path against float32 in value and gradient (tests/test_attention_gpu.py)
  beside    the step of `clip`, PyTorch, and torch.compile by turns (benchmarks/steps.py)
  vit-l16   ViT-L/16 as ViT-B/16

Each part is a process with a limit of its own, to which comes what the parts before it left over;
it writes FOLDER/NAME.json and FOLDER/NAME.log and fails alone: FOLDER/parts.json says of each
whether it was measured. A batch that does not fit into the memory is halved. MFU stands in the JSON
over the data sheet's peak and over a matrix product of the same run. --tiny runs the parts at sizes
for a CPU; it shows that they run, and its numbers mean nothing.
"""

import argparse
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import NamedTuple

from benchmarks import check
from medvlp_jax import cli

ROOT = pathlib.Path(__file__).parents[1]
MINUTES = 8
CONFIG = "--config=configs/clip.py:vit_b16"
FAST = ("--config.recipe.image.attention=cudnn", "--config.recipe.text.attention=cudnn")
LIGHT = ("--config.recipe.text.variant=tiny", "--config.data.text_length=16")
SMALL = ("--config.data.crop=32", "--rounds=1", "--steps=1")
FULL = "RESOURCE_EXHAUSTED"  # what XLA says where the memory does not do
ROOM = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}  # nobody else is on the GPU


class Part(NamedTuple):
    """One measurement.

    Attributes:
      name: of its files.
      limit: seconds after which it is given up, unless others left some.
      commands: after the interpreter; the next one where the memory did not do for the last.
      environment: beside that of this process.
    """

    name: str
    limit: float
    commands: tuple[tuple[str, ...], ...]
    environment: Mapping[str, str] = {}


def parts(folder: pathlib.Path, *, tiny: bool) -> list[Part]:
    """Return what is to be measured; together the limits keep within MINUTES."""
    attention = () if tiny else FAST

    def step(name, limit, largest, *settings):
        settings = (CONFIG, *attention, *settings, *((*LIGHT, *SMALL) if tiny else ()))
        out = ("--quick", f"--out={folder}/{name}.json")
        sizes = (8,) if tiny else (largest, largest // 2, largest // 4)
        batch = "--config.train.batch_size="
        commands = [("-m", "benchmarks.train_step", *settings, f"{batch}{n}", *out) for n in sizes]
        return Part(name, limit, tuple(commands), ROOM)

    beside = ("-m", "benchmarks.steps", "--cases", "vit", "--pairs", "2" if tiny else "9")
    beside += ("--tiny",) * tiny + (f"--out={folder}/beside.json",)
    correct = ("-m", "pytest", "-q", "-n4", "tests/test_attention_gpu.py", "-rs")
    # The tests' own default is a CPU, on which they would all be skipped. How fast products are
    # does not matter there, and trying them out takes minutes.
    there = {"JAX_PLATFORMS": "cpu" if tiny else "cuda,cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    there["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # four of them share the memory
    if not tiny:
        there["XLA_FLAGS"] = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    return [
        step("vit-b16", 70, 512, *LIGHT),
        step("clip", 80, 512),
        Part("correct", 90, (correct,), there),
        Part("beside", 150, (beside,)),
        step("vit-l16", 90, 512, *LIGHT, "--config.recipe.image.variant=L/16"),
    ]


def measure(part: Part, folder: pathlib.Path) -> dict:
    """Run one part; whatever happens to it is said, and stops no other."""
    began = time.perf_counter()
    file = folder / f"{part.name}.log"
    for command in part.commands:
        left = part.limit - (time.perf_counter() - began)
        code = run(command, file, left, {**os.environ, **part.environment})
        if code == 0 or FULL not in file.read_text():
            break
    outcome = f"not measured: code {code}" if code else "measured"
    if code is None:
        outcome = f"not measured: longer than {part.limit:.0f} s"
    words = [word.replace(str(folder), "FOLDER") for word in command]
    return {"outcome": outcome, "seconds": time.perf_counter() - began, "command": words}


def run(command, log: pathlib.Path, limit: float, environment: Mapping[str, str]) -> int | None:
    """Run a program of the interpreter, and return its code, or None where it took too long.

    Its children end with it: they would hold the GPU's memory.
    """
    with log.open("w") as out:
        settings = {"stdout": out, "stderr": subprocess.STDOUT, "start_new_session": True}
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment, **settings
        )
        try:
            return process.wait(timeout=max(limit, 0))
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def main(argv: list[str] | None = None) -> dict:
    """Run all parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(argv)
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    found, spare = {}, 0.0
    for part in parts(folder, tiny=options.tiny):
        part = part._replace(limit=part.limit + spare)
        found[part.name] = measure(part, folder)
        spare = max(part.limit - found[part.name]["seconds"], 0)
        print(f"{part.name}: {found[part.name]['outcome']}", flush=True)
        check.keep(folder / "parts.json", found)
    return found


if __name__ == "__main__":
    cli.leave(cli.run(main))
