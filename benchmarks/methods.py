"""Ablations with seeds: the same budget, one setting changed, retrieval with intervals.

  python -m benchmarks.methods [--steps 200] [--seeds 3] [--arms InfoNCE ...]
      [--out benchmarks/results/cicl.json] [--config.KEY=VALUE ...]

Compares IMITATE's clinical-informed loss with plain InfoNCE (recipe.kernel=none) on the generated
radiographs, whose reports repeat and nearly repeat. Same-class retrieval is image to text P@K: the
share of the first K reports whose set of findings is that of the image. Prints a markdown table
and writes every number; a training that is done stays in the file and is not run again.
"""

import argparse
import pathlib
import tempfile

import numpy as np
from absl import flags

from benchmarks import studies
from medvlp_jax import cli, train

CONFIG = "configs/imitate.py:demo"
ARMS = {
    "InfoNCE": {"kernel": "none"},
    "CICL, as released": {"kernel": "exp", "centre_prior": False},
    "CICL, centred": {"kernel": "exp", "centre_prior": True},
}
METRICS = {
    "zero_shot/finding/macro_auroc": "zero-shot macro AUROC",
    "retrieval/image_to_text/P@1": "image to text P@1",
    "retrieval/image_to_text/P@5": "image to text P@5",
    "retrieval/text_to_image/P@5": "text to image P@5",
    "retrieval/image_to_text/R@10": "image to text R@10",
}


def run_arm(fields: dict, seed: int, steps: int, overrides: list[str]) -> dict:
    """Train once and return the results."""
    config, _ = train.resolve([f"--config={CONFIG}", *overrides])
    config["seed"] = seed
    config["recipe"] |= fields
    config["train"] |= {"steps": steps, "evaluate_every": 0, "export": False}
    config["train"] |= {"checkpoint_every": 0}
    config["evals"] |= {"protocols": ("zero_shot", "retrieval"), "controls": ()}
    with tempfile.TemporaryDirectory() as folder:
        return train.run(config, pathlib.Path(folder))


def table(results: dict) -> str:
    """Lay out mean and standard deviation over seeds, and the interval of each seed's mean."""
    lines = [f"| | {' | '.join(METRICS.values())} |", f"|---|{'---|' * len(METRICS)}"]
    for arm, runs in results.items():
        cells = []
        for metric in METRICS:
            values = [r[metric]["value"] for r in runs]
            spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
            cell, bounds = f"{np.mean(values):.3f} ± {spread:.3f}", ("low", "high")
            if all(r[metric][side] is not None for r in runs for side in bounds):
                low, high = (np.mean([r[metric][side] for r in runs]) for side in bounds)
                cell += f" [{low:.3f}, {high:.3f}]"
            cells.append(cell)
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    chance = [next(iter(results.values()))[0][m]["chance"] for m in METRICS]
    lines.append(f"| chance | {' | '.join(f'{c:.3f}' for c in chance)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run all arms and seeds; results so far are written after each run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/cicl.json")
    )
    arguments, overrides = parser.parse_known_args(argv)
    flags.FLAGS.mark_as_parsed()
    settings = {"config": CONFIG, "steps": arguments.steps}
    settings["overrides"] = studies.deciding(overrides)
    results = {arm: [] for arm in ARMS}
    results |= studies.finished(arguments.out, settings).get("results", {})
    shown = lambda: table({arm: runs for arm, runs in results.items() if runs})
    # Seeds outermost: an interrupted study is still a paired one.
    for seed in range(arguments.seeds):
        for arm in arguments.arms:
            if len(results[arm]) > seed:
                continue
            found = run_arm(ARMS[arm], seed, arguments.steps, overrides)
            results[arm].append({k: v for k, v in found.items() if k in METRICS})
            studies.keep(arguments.out, {"settings": settings, "results": results})
            print(f"\nseed {seed}, {arm} done\n{shown()}", flush=True)
    print(shown())


if __name__ == "__main__":
    cli.leave(cli.run(main))
