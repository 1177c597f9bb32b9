"""Everything that is to be measured on one GPU, unattended, in at most eight minutes.

  python -m benchmarks.gpu FOLDER [--tiny]

  correct   each fast path against float32 in value and gradient (tests/test_attention_gpu.py)
  vit-b16   ViT-B/16 trains in bfloat16, beside a text encoder of no weight: images a second
  vit-l16   ViT-L/16 likewise
  clip      ViT-B/16 and BERT-base on 128 tokens: pairs a second
  beside    the step of `clip`, PyTorch, and torch.compile by turns (benchmarks/steps.py)

Each part is a process with a limit of its own, writes FOLDER/NAME.json and FOLDER/NAME.log, and
fails alone: FOLDER/parts.json says of each whether it was measured. MFU stands in the JSON over the
data sheet's peak and over a matrix product of the same run. --tiny runs the parts at sizes for a
CPU; it shows that they run, and its numbers mean nothing.
"""

import argparse
import pathlib
import subprocess
import sys
import time
from typing import NamedTuple

from benchmarks import check

ROOT = pathlib.Path(__file__).parents[1]
MINUTES = 8
CONFIG = "--config=configs/clip.py:vit_b16"
FAST = ("--config.recipe.image.attention=cudnn", "--config.recipe.text.attention=cudnn")
LIGHT = ("--config.recipe.text.variant=tiny", "--config.data.text_length=16")
SMALL = ("--config.train.batch_size=8", "--config.data.crop=32", "--rounds=1", "--steps=1")


class Part(NamedTuple):
    """One measurement.

    Attributes:
      name: of its files.
      limit: seconds after which it is given up.
      command: after the interpreter.
    """

    name: str
    limit: int
    command: tuple[str, ...]


def parts(folder: pathlib.Path, *, tiny: bool) -> list[Part]:
    """Return what is to be measured; together the limits keep within MINUTES."""
    attention = () if tiny else FAST

    def step(name, limit, *settings):
        settings = (CONFIG, *attention, *settings, *((*LIGHT, *SMALL) if tiny else ()))
        command = ("benchmarks/train_step.py", *settings, "--quick", f"--out={folder}/{name}.json")
        return Part(name, limit, command)

    size = "--config.train.batch_size="
    beside = ("-m", "benchmarks.steps", "--cases", "vit", "--pairs", "2" if tiny else "9")
    beside += ("--tiny",) * tiny + (f"--out={folder}/beside.json",)
    correct = ("-m", "pytest", "-q", "-n0", "tests/test_attention_gpu.py", "-rs")
    return [
        Part("correct", 90, correct),
        step("vit-b16", 70, f"{size}512", *LIGHT),
        step("vit-l16", 90, f"{size}256", *LIGHT, "--config.recipe.image.variant=L/16"),
        step("clip", 80, f"{size}512"),
        Part("beside", 140, beside),
    ]


def measure(part: Part, folder: pathlib.Path) -> dict:
    """Run one part; whatever happens to it is said, and stops no other."""
    began = time.perf_counter()
    with (folder / f"{part.name}.log").open("w") as log:
        try:
            command = [sys.executable, *part.command]
            done = subprocess.run(
                command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=part.limit
            )
            outcome = f"not measured: code {done.returncode}" if done.returncode else "measured"
        except subprocess.TimeoutExpired:
            outcome = f"not measured: longer than {part.limit} s"
    return {"outcome": outcome, "seconds": time.perf_counter() - began}


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
    found = {}
    for part in parts(folder, tiny=options.tiny):
        found[part.name] = measure(part, folder)
        print(f"{part.name}: {found[part.name]['outcome']}", flush=True)
        check.keep(folder / "parts.json", found)
    return found


if __name__ == "__main__":
    main()
