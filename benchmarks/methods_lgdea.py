"""LGDEA with few pairs beside what trains on the pairs alone: the claim of the paper, on phantoms.

  python -m benchmarks.methods_lgdea [--ratios 0.01 0.05 0.1 0.2 1] [--seeds 3] [--steps 900]
      [--arms pairs no_unpaired lgdea ...] [--config configs/lgdea.py:study]
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
import math
import pathlib
import shutil
import time
from collections.abc import Mapping, Sequence

import numpy as np
from absl import flags
from matplotlib.figure import Figure

from benchmarks import studies
from configs import lgdea as variants
from medvlp_jax import assemble, cli, evaluate, train
from medvlp_jax import config as configs
from medvlp_jax.config import UserError
from medvlp_jax.evaluation import plots, results
from medvlp_jax.recipes import lgdea

KEPT = pathlib.Path(__file__).parent.resolve() / "results/lgdea-start"
IMAGES = ("corpora", "size", "crop", "channels")  # settings that decide what an encoder sees
OTHERS = tuple(term for term in lgdea.TERMS if term != "global")
PAIRS_ALONE = {"data": {"pairing": {"share": 1.0, "passes": 0}}, "train": {"refresh_every": 0}}


def without(*terms: str) -> dict:
    """Return the change that switches loss terms off."""
    return {"recipe": {"weights": dict.fromkeys(terms, 0.0)}}


def globally(change: dict) -> dict:
    """Let texts meet images by the global embeddings: nothing else is trained.

    Prompts are read by the rules there, too: it helps, and LGDEA reads them so.
    """
    by_rules = {"evals": {"zero_shot": {"by_rules": True}}}
    return change | {"recipe": {**change["recipe"], "meets": "global"}} | by_rules


STUDIED = variants.get_config("study").recipe.weights
APART = {name: STUDIED[name] for name in ("unpaired", "relations", "global_relations")}
# By name: title, and what differs from LGDEA. The first three are the study, the rest section B.6.
ARMS = {
    "pairs": ("pairs alone, global InfoNCE", globally(PAIRS_ALONE | without(*OTHERS))),
    "no_unpaired": ("LGDEA on the pairs alone", PAIRS_ALONE),
    "lgdea": ("LGDEA", {}),
    "no_rec": ("without L_rec", without("reconstruction")),
    "no_paired": ("without L_evid^p", without("paired")),
    "no_pseudo": ("without L_evid^u", without("unpaired")),
    "no_alignment": ("without L_evi-align", without("alignment", "relations")),
    "no_relations": ("without L_evi-align of relations", without("relations")),
    "no_global_relations": ("without L_glob of relations", without("global_relations")),
    "apart_untold": (
        "rows apart without their terms",
        without("unpaired", "relations", "global_relations"),
    ),
    "no_global": ("without L_glob", without("global", "global_relations")),
    "no_prototypes": (
        "without prototypes",
        {**without("reconstruction", "paired", "unpaired"), "train": {"refresh_every": 0}},
    ),
    "no_neighbours": ("no report from neighbours", {"data": {"pairing": {"related": 0.0}}}),
    "moves_both": ("relations move reports, too", {"recipe": {"moved": "both"}}),
    "hops_0": ("no hop", {"recipe": {"hops": 0}}),
    "hops_3": ("3 hops", {"recipe": {"hops": 3}}),
    "from_pairs": (
        "relations as specified: A_0 the pairs alone, 5 hops, 10 reports",
        {"recipe": {"near_reports": 0, "hops": 5, "kept": 50, "related": 10}},
    ),
    "alpha_50": ("alpha 0.5", {"recipe": {"alpha": 0.5}}),
    "neighbours_30": ("30 neighbours", {"recipe": {"neighbours": 30}}),
    "prototypes_16": ("16 prototypes", {"recipe": {"prototypes": 16}}),
    "prototypes_64": ("64 prototypes", {"recipe": {"prototypes": 64}}),
    "sharp": ("temperatures 0.05", {"recipe": {"temperature": 0.05, "image_temperature": 0.05}}),
    "soft": ("temperatures 0.2", {"recipe": {"temperature": 0.2, "image_temperature": 0.2}}),
    "as_means": ("rows apart as means", {"recipe": {"by_share": False}}),
    "later": (
        "terms of rows apart from step 225, in full from 450",
        {"recipe": {"weights": {name: ((225, 0.0), (450, w)) for name, w in APART.items()}}},
    ),
    "less_rec": ("L_rec by 0.3", {"recipe": {"weights": {"reconstruction": 0.3}}}),
    "sentences": (
        "sentences for evidence",
        {"data": {"evidence": {"unit": "sentence", "pack": 0.0}}},
    ),
    "negated": ("with what is absent", {"data": {"evidence": {"negated": True, "pack": 0.0}}}),
}
STUDY = ("pairs", "no_unpaired", "lgdea")
METRICS = {
    "zero_shot/finding/macro_auroc": "zero-shot macro AUROC",
    "retrieval/image_to_text/P@1": "image to text P@1",
    # A normal report for every image would have a P@1 of 0.40, and here one of 0.
    "retrieval/image_to_text/P@1/other classes": "P@1, not normal",
    "retrieval/image_to_text/R@10": "image to text R@10",
    "retrieval/text_to_image/R@10": "text to image R@10",
    "grounding/cosine/cnr": "signed CNR, cosine",
    "grounding/lesions/cnr": "signed CNR, lesions",
    "grounding/lesions/pointing": "pointing, lesions",
}
CONTROLS = {"untrained": "untrained", "shuffled phrases": "wrong phrases"}
COLLAPSED = 0.5  # of ln K, below which the prototypes have collapsed
LAST = 10  # logged steps whose mean is the usage entropy of a run


def cell_config(
    arm: str, ratio: float, seed: int, arguments: argparse.Namespace, overrides: list[str]
) -> dict:
    """Return the resolved config of a cell."""
    config, _ = train.resolve([f"--config={arguments.config}", *overrides])
    _change(config, ARMS[arm][1])
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


def _change(config: dict, changes: Mapping) -> None:
    """Write changes into a nested config."""
    for key, value in changes.items():
        if isinstance(value, Mapping):
            _change(config[key], value)
        else:
            config[key] = value


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


def usage_entropy(metrics_jsonl: pathlib.Path) -> float:
    """Return the entropy of the mean assignment over ln K, a mean over the last logged steps."""
    lines = map(json.loads, metrics_jsonl.read_text().splitlines())
    return float(
        np.mean([1 - line["loss/usage"] for line in lines if "loss/usage" in line][-LAST:])
    )


def values_of(cells: Mapping, arm: str, ratio: float, metric: str) -> np.ndarray:
    """Return a number of every seed that is done, NaN where a cell lacks it."""
    found = [cell for key, cell in sorted(cells.items()) if key.startswith(f"{arm}/{ratio:g}/")]
    entries = [cell["results"].get(metric, {"value": None})["value"] for cell in found]
    return np.array([np.nan if value is None else value for value in entries], float)


def differences(cells: Mapping, other: str, ratio: float, metric: str) -> np.ndarray:
    """Return LGDEA minus another arm, of every seed in which both are done."""
    ends = [key.rpartition("/")[2] for key in sorted(cells) if key.startswith(f"lgdea/{ratio:g}/")]
    both = [end for end in ends if f"{other}/{ratio:g}/{end}" in cells]
    at = lambda arm, end: cells[f"{arm}/{ratio:g}/{end}"]["results"].get(metric, {}).get("value")
    pairs = [(at("lgdea", end), at(other, end)) for end in both]
    return np.array([a - b for a, b in pairs if a is not None and b is not None])


def gap_closed(cells: Mapping, ratio: float, metric: str) -> float:
    """Return (LGDEA - control) / (control at 100 % pairs - control), of means over seeds.

    NaN where that way is no longer than the spread over seeds: it would be divided by noise.
    """
    ends = [values_of(cells, "pairs", share, metric) for share in (ratio, 1.0)]
    control, full = map(_mean, ends)
    spread = sum(values.std(ddof=1) for values in ends if len(values) > 1)
    if not full - control > spread:
        return math.nan
    return (_mean(values_of(cells, "lgdea", ratio, metric)) - control) / (full - control)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def ratios_of(cells: Mapping) -> list[float]:
    """Return the shares of pairs that have a cell."""
    return sorted({float(key.split("/")[1]) for key in cells})


def table(cells: Mapping) -> str:
    """Lay out mean and spread over seeds, one line a share of pairs and arm."""
    header = ("pairs", "", *METRICS.values(), "usage", "seeds", "min")
    lines = [f"| {' | '.join(header)} |", f"|---|---|{'---|' * (len(header) - 2)}"]
    for ratio in ratios_of(cells):
        for arm, (title, _) in ARMS.items():
            own = [c for key, c in cells.items() if key.startswith(f"{arm}/{ratio:g}/")]
            if not own:
                continue
            texts = [_cell(values_of(cells, arm, ratio, metric)) for metric in METRICS]
            # The control's prototypes are not trained: its usage says nothing.
            usage = "-" if arm == "pairs" else f"{min(c['usage_entropy'] for c in own):.2f}"
            minutes = f"{np.mean([c['minutes'] for c in own]):.1f}"
            row = (f"{ratio:.0%}", title, *texts, usage, str(len(own)), minutes)
            lines.append(f"| {' | '.join(row)} |")
        for control, title in CONTROLS.items():
            names = [_of_control(metric, control) for metric in METRICS]
            found = [values_of(cells, "lgdea", ratio, name) for name in names]
            if any(np.isfinite(values).any() for values in found):
                texts = [_cell(values) for values in found]
                lines.append(f"| {ratio:.0%} | LGDEA, {title} | {' | '.join(texts)} | | | |")
    less = [
        f"| {ratio:.0%} | {ARMS[other][0]} | {' | '.join(texts)} |"
        for ratio in ratios_of(cells)
        for other in ("pairs", "no_unpaired")
        if {*(texts := [_cell(differences(cells, other, ratio, m), "+") for m in METRICS])} != {"-"}
    ]
    if less:
        lines += [
            "",
            "LGDEA minus this, seed by seed (split and start of a seed are the same):",
            "",
        ]
        lines += [f"| pairs | | {' | '.join(METRICS.values())} |"]
        lines += [f"|---|---|{'---|' * len(METRICS)}", *less]
    closed = [
        f"{ratio:.0%}: " + ", ".join(f"{METRICS[m]} {g:+.0%}" for m, g in gaps.items())
        for ratio in ratios_of(cells)
        if ratio < 1 and (gaps := _gaps(cells, ratio))
    ]
    if closed:
        lines += ["", "Of the way from the control to 100 % pairs LGDEA goes:", ""]
        lines += [f"* {line}" for line in closed]
    return "\n".join(lines)


def _gaps(cells: Mapping, ratio: float) -> dict[str, float]:
    # The control has no lesions: theirs is a map nothing trained.
    shared = [metric for metric in METRICS if "lesions" not in metric]
    found = {metric: gap_closed(cells, ratio, metric) for metric in shared}
    return {metric: gap for metric, gap in found.items() if math.isfinite(gap)}


def _of_control(metric: str, control: str) -> str:
    head, task, name = metric.split("/", 2)
    return f"{head}/{task} ({control})/{name}"


def _cell(values: np.ndarray, sign: str = "") -> str:
    values = values[np.isfinite(values)]
    if not len(values):
        return "-"
    spread = f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else ""
    return f"{values.mean():{sign}.3f}{spread}"


def draw(cells: Mapping, out_png: pathlib.Path) -> None:
    """Draw every metric over the share of pairs, one line an arm of the study, spread as bars."""
    columns = 3
    rows = math.ceil((len(METRICS) + 1) / columns)  # the last one has the legend
    figure = Figure(figsize=(3.3 * columns, 2.8 * rows), layout="constrained", facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, (metric, title) in zip(axes, METRICS.items(), strict=False):
        for colour, arm in zip(plots.COLOURS, STUDY, strict=False):
            points = [(r, values_of(cells, arm, r, metric)) for r in ratios_of(cells)]
            points = [(r, v[np.isfinite(v)]) for r, v in points]
            points = [(100 * r, v.mean(), v.std()) for r, v in points if v.size]
            if points:
                x, y, spread = np.array(points).T
                style = {"color": colour, "marker": "o", "ms": 3.5, "lw": 1.5, "capsize": 2}
                ax.errorbar(x, y, spread, label=ARMS[arm][0], **style)
        ax.set_xscale("log")
        ax.set_xticks(ticks := [100 * r for r in ratios_of(cells)], [f"{t:g}" for t in ticks])
        ax.minorticks_off()
        ax.set_title(title, fontsize=9, color=plots.INK, loc="left", fontweight="bold")
        ax.set_xlabel("studies that are pairs, %", fontsize=8, color=plots.MUTED)
        ax.tick_params(labelsize=8, colors=plots.MUTED)
        ax.grid(True, color=plots.RULE, linewidth=0.6)
    for ax in axes[len(METRICS) :]:
        ax.set_axis_off()
    handles, labels = axes[0].get_legend_handles_labels()
    axes[-1].legend(handles, labels, loc="center", frameon=False, fontsize=9)
    plots.save(figure, out_png)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the cells that are not done yet, seed by seed."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", default="configs/lgdea.py:study")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.01, 0.05, 0.1, 0.2, 1.0])
    parser.add_argument("--seeds", type=int, default=3)
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
        for seed in range(arguments.seeds)
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
        if arm != "pairs" and cell["usage_entropy"] < COLLAPSED:
            print(f"WARNING: prototypes collapsed, usage {cell['usage_entropy']:.2f} ln K")
    print(table(cells))


if __name__ == "__main__":
    cli.leave(cli.run(main))
