"""PRIMA beside images alone and images with a table through an MLP, and its ablation, by folds.

  python -m benchmarks.methods_prima [--config configs/prima.py:phantom] [--rows image mlp prima]
      [--folds 5] [--out benchmarks/results/prima-phantom.json] [--folder runs/methods_prima]
      [--config.KEY=VALUE ...]

A cell is one row on one fold: every stage it has, trained one after another, and its test scores.
--rows all adds the nine rows of Table 3 (spec A.7), of which the last is "prima". A finished cell
is written to --out at once and never run again; an interrupted one goes on from its checkpoint: run
the same command again. Runs and the risk corpus lie in --folder, those of other settings in a
folder of their own there. Beside the numbers comes a Markdown table: means over folds, and PRIMA
minus each row in macro F1, over resamples of patients and, as papers do, over folds (corrected t
test).
"""

import argparse
import itertools
import pathlib
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from absl import flags

from benchmarks import studies
from medvlp_jax import cli, train
from medvlp_jax.config import UserError
from medvlp_jax.evaluation import paired, shuffle
from medvlp_jax.evidence import __main__ as evidence

RISKS = {"phantom": "cxr_phantom", "derm": "ham10000", "pad": "pad_ufes_20"}
LOSSES = ("image", "global", "local", "soft")
METRICS = ("macro_f1", "balanced_accuracy", "accuracy", "macro_auroc")


class Row(NamedTuple):
    """What is trained.

    Attributes:
      title: in the table.
      last: stage whose scores count.
      knowledge: the text encoder has read the risk corpus.
      losses: of align; none: no such stage.
      recipe: what else differs in align.
    """

    title: str
    last: str = "fuse"
    knowledge: bool = True
    losses: Sequence[str] = LOSSES
    recipe: Mapping = {}


ROWS = {
    "image": Row("images only", "image"),
    "mlp": Row("images and metadata via MLP", "mlp"),
    "labels": Row("1: class labels only", knowledge=False, losses=()),
    "knowledge": Row("2: knowledge", losses=()),
    "loss_image": Row("3: L_img", knowledge=False, losses=LOSSES[:1]),
    "loss_global": Row("4: L_img + L_glo", knowledge=False, losses=LOSSES[:2]),
    "loss_local": Row("5: L_img + L_glo + L_loc", knowledge=False, losses=LOSSES[:3]),
    "loss_soft": Row("6: all four", knowledge=False),
    "direct": Row("7: knowledge, L_loc as L_loc_dir", recipe={"local": "direct"}),
    "by_label": Row("8: knowledge, L_soft as L_sup_con", recipe={"soft": "label"}),
    "prima": Row("9: knowledge, all four (PRIMA)"),
}
STUDY = ("image", "mlp", "prima")
VARIANTS = ("", *(control.replace("_", " ") for control in shuffle.CONTROLS))  # of PRIMA


def stages(row: str) -> list[str]:
    """Return the stages of a row in order; inject is shared by all folds."""
    plan = ROWS[row]
    if plan.last != "fuse":
        return [plan.last]
    return [
        *(["inject"] if plan.knowledge else []),
        *(["align"] if plan.losses else []),
        "sharpen",
        "fuse",
    ]


def stage_config(
    row: str, stage: str, fold: int, start: str, corpus: str, config: str, overrides: list[str]
) -> dict:
    """Return the resolved config of a stage.

    Args:
      row: of ROWS.
      stage: of `stages(row)`.
      fold: that is tested on.
      start: run folder of the stage before; "" for random weights.
      corpus: folder of the risk corpus.
      config: FILE:CORPUS.
      overrides: --config.KEY=VALUE, for every stage.
    """
    file, _, name = config.partition(":")
    resolved, _ = train.resolve([f"--config={file}:{stage}_{name}", *overrides])
    resolved["init"]["params"] = start
    resolved["train"]["export"] = False
    if stage == "inject":
        resolved["data"]["knowledge"] |= {"folder": corpus, "allow_unvetted": True}
        return resolved
    resolved["data"]["folds"]["index"] = fold
    if stage == "align":
        weights = resolved["recipe"]["weights"]
        kept = {key: weights[key] if key in ROWS[row].losses else 0.0 for key in LOSSES}
        resolved["recipe"] |= {**ROWS[row].recipe, "weights": kept}
    protocols = ("classify",) if stage == ROWS[row].last else ()
    controls = shuffle.CONTROLS if row == "prima" and protocols else ()
    resolved["evals"] |= {"protocols": protocols, "controls": controls}
    if stage != "align" and not protocols:  # sharpen chooses its step by its own validation
        resolved["evals"]["protocols"] = ("classify",)
    return resolved


def recipe_of(config: str) -> str:
    """Return the fingerprint of what may change in any stage under the same name.

    Without overrides: not every stage has every setting, and they are compared by themselves.
    """
    every = [(row, stage) for row in STUDY for stage in stages(row)]
    return studies.recipe_of(*(stage_config(*each, 0, "", "", config, []) for each in every))


def run_cell(row: str, fold: int, folder: pathlib.Path, config: str, overrides: list[str]) -> dict:
    """Train every stage of a row on a fold and score the last; its checkpoints are dropped."""
    began, start, results = time.time(), "", {}
    corpus = folder / "corpus"
    home = folder / f"{row}-{fold}"
    for stage in stages(row):
        place = folder / "inject" if stage == "inject" else home / stage
        # Each stage writes its results last.
        if stage != "inject" or not (place / "results.json").is_file():
            if stage == "inject":
                write_corpus(corpus, config)
            settings = stage_config(row, stage, fold, start, str(corpus), config, overrides)
            results = train.run(settings, place)
        start = str(place)
    shutil.copyfile(pathlib.Path(start) / paired.FILE, home / paired.FILE)
    for checkpoints in home.glob("*/checkpoints"):
        shutil.rmtree(checkpoints)
    kept = {key: entry for key, entry in results.items() if key.rsplit("/", 1)[1] in METRICS}
    return {"results": kept, "minutes": (time.time() - began) / 60}


def write_corpus(out: pathlib.Path, config: str) -> None:
    """Write the risk corpus by template, unless it is there.

    Raises:
      UserError: for a corpus without a risk table.
    """
    name = config.partition(":")[2]
    if name not in RISKS:
        raise UserError(f"No risk table for {config}; there are those of {', '.join(RISKS)}.")
    if not out.is_dir():
        evidence.main(["corpus", "--risk", RISKS[name], "--backend", "template", "--out", str(out)])


def ratio_of(folds: Mapping) -> float:
    """Return test cases over training cases of a fold, from config.data.folds."""
    test = 1 / folds["count"] if folds["count"] else 1.0  # the corpus' own split is a single one
    # Validation is a share of the rest, or a fold of its own.
    train = (1 - test) * (1 - 1 / folds["inner"]) if folds["inner"] else 1 - 2 * test
    return test / train if train > 0 else 1.0


def differences(rows: Mapping, folder: pathlib.Path, ratio: float) -> dict[str, dict]:
    """Return PRIMA minus every other row, and minus itself with shuffled inputs, in macro F1.

    Over the folds that both have.

    Args:
      rows: cells by row and fold.
      folder: of their runs.
      ratio: see `ratio_of`.
    """
    found = {}
    ours = rows.get("prima", {})
    for name, cells in rows.items():
        shared = sorted(set(ours) & set(cells), key=int)
        if name == "prima" or not shared:
            continue
        entry = {}
        places = [[folder / f"{row}-{fold}" for fold in shared] for row in ("prima", name)]
        if all((place / paired.FILE).is_file() for side in places for place in side):
            entry["patients"] = paired.compare(*places, "macro_f1")
        if len(shared) > 1:
            values = [
                [score(side[fold], "macro_f1")["value"] for fold in shared]
                for side in (ours, cells)
            ]
            entry["folds"] = paired.over_folds(np.subtract(*values), ratio=ratio)
        found[name] = entry | {"count": len(shared)}
    for control in VARIANTS[1:] if len(ours) > 1 else ():
        values = [
            score(cell, "macro_f1")["value"] - score(cell, "macro_f1", control)["value"]
            for cell in ours.values()
        ]
        found[control] = {"folds": paired.over_folds(values, ratio=ratio), "count": len(ours)}
    return found


def score(cell: Mapping, metric: str, variant: str = "") -> dict:
    """Return the entry of a metric, of the model itself or of a control."""
    task = f" ({variant})" if variant else ""
    (entry,) = (
        entry
        for key, entry in cell["results"].items()
        if key.startswith("classify/")
        and key.endswith(f"{task}/{metric}")
        and (variant or "(" not in key)
    )
    return entry


def table(rows: Mapping, compared: Mapping) -> str:
    """Lay out means (standard deviations) over folds, and the differences to PRIMA."""
    header = ["", "folds", *(m.replace("_", " ") for m in METRICS)]
    header += ["PRIMA minus this, macro F1, patients", "folds", "min"]
    lines = [f"| {' | '.join(header)} |", f"|---|{'---|' * (len(header) - 1)}"]
    others = [(name, "") for name in ROWS if name != "prima"]
    for name, variant in [*others, *(("prima", variant) for variant in VARIANTS)]:
        if name not in rows:
            continue
        cells = list(rows[name].values())
        line = [f"PRIMA, {variant}" if variant else ROWS[name].title, str(len(cells))]
        for metric in METRICS:
            values = [score(cell, metric, variant)["value"] for cell in cells]
            spread = f" ({np.std(values, ddof=1):.3f})" if len(values) > 1 else ""
            line.append(f"{np.mean(values):.3f}{spread}")
        for kind in ("patients", "folds"):
            found = compared.get(variant or name, {}).get(kind, {})
            text = "{difference:+.3f} [{low:+.3f}, {high:+.3f}]"
            line.append(text.format(**found) if found else "")
        line.append("" if variant else f"{np.mean([cell['minutes'] for cell in cells]):.1f}")
        lines.append(f"| {' | '.join(line)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run the cells that are not done yet, fold by fold."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", default="configs/prima.py:phantom")
    parser.add_argument("--rows", nargs="+", default=list(STUDY), choices=["all", *ROWS])
    parser.add_argument("--folds", type=int, default=5, help="of the five the first so many")
    folder = pathlib.Path("runs/methods_prima")
    parser.add_argument("--folder", type=pathlib.Path, default=folder, help="runs")
    parser.add_argument("--out", type=pathlib.Path)
    options, overrides = parser.parse_known_args(argv)
    flags.FLAGS.mark_as_parsed()
    name = options.config.partition(":")[2]
    out = options.out or pathlib.Path(f"benchmarks/results/prima-{name}.json")
    baseline = stage_config("image", "image", 0, "", "", options.config, overrides)
    settings = {"config": options.config, "steps": baseline["train"]["steps"]}
    settings["overrides"] = studies.deciding(overrides)
    # The config may have changed since, under the same name.
    settings["recipe"] = recipe_of(options.config)
    finished = studies.finished(out, settings, since=("recipe",))
    # A run of other settings would be gone on with, and its weights taken for these.
    home = options.folder.absolute() / studies.fingerprint(settings)
    rows, settings = finished.get("rows", {}), finished.get("settings", settings)
    wanted = list(ROWS) if "all" in options.rows else options.rows
    # Folds outermost: an interrupted study is still a paired one.
    for fold, row in itertools.product(range(options.folds), wanted):
        if str(fold) not in rows.get(row, {}):
            cell = run_cell(row, fold, home, options.config, overrides)
            rows.setdefault(row, {})[str(fold)] = cell
            compared = differences(rows, home, ratio_of(baseline["data"]["folds"]))
            laid_out = table(rows, compared)
            content = {"settings": settings, "differences": compared, "rows": rows}
            studies.keep(out, content, laid_out)
            print(f"\nfold {fold}, {row} done\n{laid_out}", flush=True)


if __name__ == "__main__":
    cli.leave(cli.run(main))
