"""LGDEA with few pairs beside what trains on the pairs alone: the claim of the paper, on phantoms.

  python -m benchmarks.methods_lgdea [--ratios 0.01 0.05 0.1 0.2 1] [--seeds 3] [--first-seed 0]
      [--steps 1800] [--arms pairs no_unpaired lgdea ...] [--config configs/lgdea.py:study]
      [--start kept] [--keep] [--out benchmarks/results/lgdea.json] [--config.KEY=VALUE ...]
  python -m benchmarks.methods_lgdea --corpus cxr_phantom:n2400_seed7_256px --split train --out FILE

A cell is one training: a share of the studies that stay pairs, an arm, a seed. All arms have the
same network, start, steps and rows a batch; they differ in which rows they see and which terms
count. Their image encoder starts where pairs of views of the corpus' images left it: at the "kept"
one beside the results, so that any machine can go on, or at "views", trained once by
`configs/lgdea.py:views`. Their text encoder starts at masked words of its reports. A finished cell
is written to --out at once and never run again; an interrupted one goes on from its checkpoint: run
the same command again. With --corpus nothing is trained: cells that were kept are scored on other
images, say on more than the study's test split has. Beside the numbers come a Markdown table (mean
and spread over seeds, and how much of the way from the control to 100 % pairs LGDEA goes) and a
curve.
"""

import argparse
import hashlib
import json
import pathlib
import shutil
import time
from collections.abc import Mapping, Sequence

import numpy as np
from absl import flags

from benchmarks import studies
from benchmarks.lgdea_arms import ARMS, STUDY, UNTAUGHT, change
from benchmarks.lgdea_tables import METRICS, draw, table
from medvlp_jax import assemble, cli, evaluate, train
from medvlp_jax import config as configs
from medvlp_jax.config import UserError
from medvlp_jax.evaluation import results

KEPT = pathlib.Path(__file__).parent.resolve() / "results/lgdea-start"
IMAGES = ("corpora", "size", "crop", "channels")  # settings that decide what an encoder sees
COLLAPSED = 0.5  # of ln K, below which the prototypes have collapsed
LAST = 10  # logged steps whose mean is the usage entropy of a run


def cell_config(
    arm: str, ratio: float, seed: int, arguments: argparse.Namespace, overrides: list[str]
) -> dict:
    """Return the resolved config of a cell."""
    config, _ = train.resolve([f"--config={arguments.config}", *overrides])
    change(config, ARMS[arm][1])
    config["seed"] = seed
    config["data"]["pairing"]["ratio"] = ratio
    settings = {"evaluate_every": 0, "export": False, "checkpoint_every": 100, "log_every": 5}
    config["train"] |= settings | ({"steps": arguments.steps} if arguments.steps else {})
    config["evals"] |= {"protocols": ("zero_shot", "retrieval", "grounding")}
    # Below 0 where a phrase's map is darker inside its boxes: without a sign that would count, too.
    config["evals"]["grounding"]["signed"] = True
    # The controls ask what the full method's maps owe to training and to the words.
    config["evals"]["controls"] = ("untrained", "shuffled_phrases") if arm == "lgdea" else ()
    return config


def start_of(arguments: argparse.Namespace, config: Mapping) -> str:
    """Return the image encoder all cells start from, after training it if it is not there.

    Args:
      arguments: with `config`, `start` and `folder`.
      config: of a cell, for its images.

    Raises:
      UserError: where one of other settings is there, or the kept one has seen other images.
    """
    if arguments.start == "none" or config["init"]["image"]:
        return config["init"]["image"]
    file = arguments.config.partition(":")[0]
    views, _ = train.resolve([f"--config={file}:views"])
    if arguments.start == "kept":
        for key in IMAGES:
            if config["data"][key] != views["data"][key]:
                raise UserError(
                    f"The kept start has seen data.{key}={views['data'][key]}, not "
                    f"{config['data'][key]}: --start views trains one."
                )
        return str(KEPT)
    place = arguments.folder.absolute() / "views"
    same = (*IMAGES, "data_dir", "manual_dir", "threads")
    views["data"] |= {key: config["data"][key] for key in same}
    if not (place / "export" / "image").is_dir():
        train.run(views, place)
    elif _decides(assemble.read_config(place)) != _decides(views):
        raise UserError(f"{place} holds an encoder of other settings: move it away.")
    return str(place / "export" / "image")


def _decides(views: Mapping) -> str:
    """Return the settings of a run that decide its encoder, as JSON."""
    data = {
        k: v for k, v in views["data"].items() if k not in ("data_dir", "manual_dir", "threads")
    }
    train = {key: views["train"][key] for key in ("steps", "batch_size")}
    kept = {key: views[key] for key in ("seed", "recipe", "optim")}
    return configs.to_json(kept | {"data": data, "train": train})


def weights_of(start: str) -> str:
    """Return what tells the weights of a folder from others, "" for random ones.

    Another machine may round otherwise on the way: cells of another start are another study's.
    """
    digest = hashlib.sha256()
    for file in sorted(pathlib.Path(start).glob("*.safetensors") if start else ()):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12] if start else ""


def fingerprint(settings: Mapping) -> str:
    """Return a short name of what decides a cell, so that no other study goes on in its place."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def run_cell(config: dict, folder: pathlib.Path, *, keep: bool = False) -> dict:
    """Train and score one cell; pictures and metrics stay, checkpoints if they are to be kept."""
    began = time.time()
    numbers = train.run(config, folder)
    if not keep:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return {
        "results": {key: entry for key, entry in numbers.items() if _is_kept(key)},
        "usage_entropy": usage_entropy(folder / "metrics.jsonl"),
        "minutes": (time.time() - began) / 60,
    }


def score_cell(folder: pathlib.Path, corpus: str, split: str) -> dict:
    """Score a kept cell on other images; what was done before is read.

    Raises:
      UserError: where its weights were not kept.
    """
    if not (folder / "checkpoints").is_dir():
        raise UserError(f"{folder} has no checkpoints: train that cell with --keep first.")
    out = folder / f"{corpus.replace(':', '-')}-{split}"
    began = time.time()
    if not (out / results.FILE).is_file():
        flags = {"--run": folder, "--corpus": corpus, "--split": split, "--out": out}
        flags |= {"--controls": "none"}
        evaluate.main([str(word) for pair in flags.items() for word in pair])
    numbers = results.read(out).numbers
    return {
        "results": {key: entry for key, entry in numbers.items() if _is_kept(key)},
        "usage_entropy": usage_entropy(folder / "metrics.jsonl"),
        "minutes": (time.time() - began) / 60,
    }


def _is_kept(key: str) -> bool:
    """Keep headline numbers and CNR by category, of controls too."""
    head, task, metric = key.split("/", 2)
    plain = f"{head}/{task.partition(' (')[0]}/{metric}"
    return plain in METRICS or (head == "grounding" and metric.startswith("cnr"))


def usage_entropy(metrics_jsonl: pathlib.Path) -> float | None:
    """Return the entropy of the mean assignment over ln K, a mean over the last logged steps.

    None where there are no prototypes.
    """
    lines = map(json.loads, metrics_jsonl.read_text().splitlines())
    found = [1 - line["loss/usage"] for line in lines if "loss/usage" in line]
    return float(np.mean(found[-LAST:])) if found else None


def main(argv: Sequence[str] | None = None) -> None:
    """Run the cells that are not done yet, seed by seed."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", default="configs/lgdea.py:study")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.01, 0.05, 0.1, 0.2, 1.0])
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    help_first = "so that two processes, with an --out each, can share a study"
    parser.add_argument("--first-seed", type=int, default=0, help=help_first)
    parser.add_argument("--steps", type=int, default=0, help="0: as the config says")
    help_start = "of the image encoder: the kept one, views of the images, or none: random weights"
    starts = ("kept", "views", "none")
    parser.add_argument("--start", default="kept", choices=starts, help=help_start)
    help_keep = "checkpoints, to score a cell again: medvlp evaluate --run"
    parser.add_argument("--keep", action="store_true", help=help_keep)
    help_corpus = "score kept cells on this one, NAME or NAME:VARIANT, and train nothing"
    parser.add_argument("--corpus", default="", help=help_corpus)
    parser.add_argument("--split", default="test", help="of --corpus")
    parser.add_argument("--arms", nargs="+", default=list(STUDY), choices=list(ARMS))
    folder = pathlib.Path("runs/methods_lgdea")
    parser.add_argument("--folder", type=pathlib.Path, default=folder, help="runs")
    out = pathlib.Path("benchmarks/results/lgdea.json")
    parser.add_argument("--out", type=pathlib.Path, default=out)
    arguments, overrides = parser.parse_known_args(argv)
    flags.FLAGS.mark_as_parsed()
    whole = cell_config("lgdea", 1.0, 0, arguments, overrides)
    settings = {"config": arguments.config, "steps": whole["train"]["steps"]}
    # The kept encoder was trained on views, too; its weights tell it from others.
    start = "none" if arguments.start == "none" else "views"
    settings |= {"start": start, "overrides": studies.deciding(overrides)}
    # The config may have changed since, under the same name.
    rows = whole["data"]["pairing"]
    settings["recipe"] = fingerprint({"recipe": whole["recipe"], "pairing": rows})
    scored = {"corpus": arguments.corpus, "split": arguments.split} if arguments.corpus else {}
    # Before anything is trained.
    studies.finished(arguments.out, settings | scored, later=("weights",))
    start = start_of(arguments, whole)
    settings["weights"] = weights_of(start)
    cells = studies.finished(arguments.out, settings | scored).get("cells", {})
    # Seeds outermost: an interrupted study is still one of all arms.
    todo = [
        (seed, ratio, arm)
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds)
        for ratio in arguments.ratios
        for arm in arguments.arms
        # With every pair nothing is apart, and LGDEA is what it is on the pairs alone.
        if f"{arm}/{ratio:g}/{seed}" not in cells and (arm, ratio) != ("lgdea", 1.0)
    ]
    for done, (seed, ratio, arm) in enumerate(todo, start=1):
        name = f"{arm}/{ratio:g}/{seed}"
        place = arguments.folder / f"{name.replace('/', '-')}-{fingerprint(settings)}"
        if scored:
            cells[name] = score_cell(place.absolute(), **scored)
        else:
            config = cell_config(arm, ratio, seed, arguments, overrides)
            config["init"]["image"] = start
            cells[name] = run_cell(config, place.absolute(), keep=arguments.keep)
        studies.keep(arguments.out, {"settings": settings | scored, "cells": cells}, table(cells))
        draw(cells, arguments.out.with_suffix(".png"))
        cell = cells[name]
        print(f"\n{done} of {len(todo)}: {name}, {cell['minutes']:.1f} minutes", flush=True)
        if arm not in UNTAUGHT and cell["usage_entropy"] < COLLAPSED:
            print(f"WARNING: prototypes collapsed, usage {cell['usage_entropy']:.2f} ln K")
    print(table(cells))


if __name__ == "__main__":
    cli.leave(cli.run(main))
