"""CFCML beside what is simpler: same data, split, budget and settings, one thing taken away.

  python benchmarks/methods_cfcml.py [--config configs/cfcml.py:derm] [--steps 1500] [--seeds 1]
      [--rows full late ...] [--out benchmarks/results/cfcml-derm.json] [--config.KEY=VALUE ...]

Trains the rows one after another (about 12 minutes each on two CPU cores with the default config)
and scores logistic regressions on the raw input. A finished row is kept, an interrupted one goes on
from its checkpoint: run the same command again. Writes every number to --out and a Markdown table
beside it; differences to CFCML are paired, over resamples of patients (lesions).
"""

import argparse
import csv
import functools
import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping

import numpy as np
from absl import flags

from medvlp_jax import assemble, cases, evaluate, train
from medvlp_jax.config import UserError
from medvlp_jax.evaluation import baselines, classify, statistics

NO_RELATIONS = {"weights": {"sample": 0.0, "unimodal": 0.0, "crossmodal": 0.0}}
# Features of the encoder's last stage, pooled; no relations, which one modality would not have.
LAST_STAGE = {"enhance": "none", "multi_granularity": False, **NO_RELATIONS}
ROWS = {
    "full": ("CFCML", {}),
    "no_cie": ("CFCML without MG-CIE", {"enhance": "none"}),
    "no_hrm": ("CFCML without HRM", NO_RELATIONS),
    "late": ("late concatenation", LAST_STAGE),
    "image": ("images only", {**LAST_STAGE, "table": False}),
    "table": ("table only", {**LAST_STAGE, "images": ()}),
}
REGRESSION = "regression"
METRICS = ("macro_auroc", "balanced_accuracy", "macro_f1", "accuracy")


def row_config(row: str, arguments: argparse.Namespace, overrides: list[str], seed: int) -> dict:
    """Return the resolved config of a row; nothing differs between rows but the recipe."""
    config, _ = train.resolve([f"--config={arguments.config}", *overrides])
    changes = dict(ROWS[row][1]) if row in ROWS else {}
    config["recipe"]["weights"] |= changes.pop("weights", {})
    config["recipe"] |= changes
    config["seed"] = seed
    config["train"] |= {"evaluate_every": 0, "export": False}
    config["train"] |= {"steps": arguments.steps} if arguments.steps else {}
    config["evals"] |= {"protocols": ("classify",), "controls": ()}
    return config


def run_row(row: str, seed: int, arguments: argparse.Namespace, overrides: list[str]) -> dict:
    """Train and score one row; return {name: {"results", "minutes"}} of what it holds."""
    config = row_config(row, arguments, overrides, seed)
    folder = arguments.folder / f"{row}-{seed}"
    began = time.time()
    found = regressions(config, folder) if row == REGRESSION else {row: train.run(config, folder)}
    minutes = (time.time() - began) / 60
    return {name: {"results": results, "minutes": minutes} for name, results in found.items()}


def regressions(config: dict, folder: pathlib.Path) -> dict[str, dict]:
    """Fit the regressions on the raw input and keep their predictions as those of a run."""
    evaluator = evaluate.Evaluator(assemble.parts(config), config["evals"])
    task, source = config["recipe"]["task"], evaluator.source
    fitted = assemble.open_corpus(evaluator.corpus, config["data"], "train")
    train_rows, test_rows = evaluator.raw_features(fitted), evaluator.raw_features(source)
    scores = baselines.scores(train_rows, test_rows, task=task)
    results = baselines.results(
        scores,
        test_rows,
        task=task,
        classes=source.tasks[task],
        resamples=config["evals"]["resamples"],
    )
    found = {}
    for kind in scores:
        name = f"{REGRESSION}: {kind}"
        predictions_of(folder, name).parent.mkdir(parents=True, exist_ok=True)
        logits = np.log(np.maximum(scores[kind].scores, 1e-300))
        cases.write_predictions(
            evaluator, {**test_rows, "logits": logits}, predictions_of(folder, name)
        )
        prefix = f"regression/{task} ({kind})/"
        own = {k.removeprefix(prefix): v for k, v in results.items() if k.startswith(prefix)}
        found[name] = {f"classify/{task}/{k}": v for k, v in own.items()}
    return found


def predictions_of(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Return where the predictions of a row lie: one file a run, one a regression."""
    kind = name.partition(": ")[2]
    return folder / (f"predictions-{kind.replace(' ', '-')}.csv" if kind else "predictions.csv")


def read_predictions(file: pathlib.Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return patients [N], one-hot truth [N, C] and probabilities [N, C]; known rows alone."""
    with file.open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["truth"]]
    names = list(rows[0])[3:]
    chances = np.array([[float(row[name]) for name in names] for row in rows])
    truth = np.array([[row["truth"] == name for name in names] for row in rows])
    return np.array([row["patient_id"] for row in rows]), truth.astype(np.int8), chances


def macro_auroc(files: list[pathlib.Path], weights: np.ndarray) -> np.ndarray:
    """Mean over files (seeds) of the macro AUROC under row weights [R, N], [R, 1]."""
    values = []
    for file in files:
        _, truth, chances = read_predictions(file)
        present = truth.any(0)
        values.append(classify.ranking(truth[:, present], chances[:, present], weights)[:, 0])
    return np.mean(values, axis=(0, -1))[:, None]


def compare(ours: list[pathlib.Path], theirs: list[pathlib.Path], resamples: int) -> dict:
    """Return the paired difference in macro AUROC with its interval and p."""
    patients = read_predictions(ours[0])[0]
    if any(not np.array_equal(read_predictions(file)[0], patients) for file in ours + theirs):
        raise UserError(f"{ours[0]} and {theirs[0]} are predictions of other cases.")
    found = statistics.compare(
        functools.partial(macro_auroc, ours),
        functools.partial(macro_auroc, theirs),
        len(patients),
        groups=patients,
        resamples=resamples,
    )
    return {key: float(value[0]) for key, value in found._asdict().items()}


def differences(rows: Mapping, folder: pathlib.Path, resamples: int) -> dict[str, dict]:
    """Return CFCML minus every other row, over the seeds that both have."""
    found = {}
    files = lambda name, seeds: [
        predictions_of(folder / f"{name.partition(':')[0]}-{seed}", name) for seed in seeds
    ]
    for name, seeds in rows.items():
        shared = [seed for seed in seeds if seed in rows.get("full", {})]
        # The regressions have no seed of training: those of the first stand for all.
        ours = list(rows.get("full", {})) if name.startswith(REGRESSION) else shared
        if name != "full" and ours and shared:
            found[name] = compare(files("full", ours), files(name, shared), resamples)
    return found


def table(rows: Mapping, compared: Mapping, task: str) -> str:
    """Lay out mean over seeds, their spread, and the mean of their intervals."""
    titles = {name: title for name, (title, _) in ROWS.items()}
    header = ("", *(m.replace("_", " ") for m in METRICS), "CFCML minus this, macro AUROC", "min")
    lines = [f"| {' | '.join(header)} |", f"|---|{'---|' * (len(header) - 1)}"]
    order = [*(name for name in rows if name.startswith(REGRESSION)), *reversed(ROWS)]
    for name in (n for n in order if n in rows):
        runs = list(rows[name].values())
        cells = []
        for metric in METRICS:
            entries = [run["results"][f"classify/{task}/{metric}"] for run in runs]
            value, low, high = (np.mean([e[k] for e in entries]) for k in ("value", "low", "high"))
            spread = np.std([e["value"] for e in entries], ddof=1) if len(entries) > 1 else 0
            cells.append(
                f"{value:.3f}{f' ± {spread:.3f}' if len(entries) > 1 else ''} "
                f"[{low:.3f}, {high:.3f}]"
            )
        if name in compared:
            d = compared[name]
            cells.append(f"{d['difference']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]")
        else:
            cells.append("")
        cells.append(f"{np.mean([run['minutes'] for run in runs]):.1f}")
        title = titles.get(name, name.replace(REGRESSION, "logistic regression"))
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def read_finished(out: pathlib.Path, settings: dict) -> dict:
    """Return the rows that are done.

    Raises:
      UserError: if they were made with other settings.
    """
    if not out.is_file():
        return {}
    saved = json.loads(out.read_text())
    if saved.get("settings") != settings:
        raise UserError(
            f"{out} holds rows of settings {saved.get('settings')}, not {settings}: name another "
            "--out, or move it away."
        )
    return saved["rows"]


def main(argv: list[str] | None = None) -> None:
    """Run all rows and seeds; what is done is written after each."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", default="configs/cfcml.py:derm")
    parser.add_argument("--steps", type=int, default=0, help="0: as the config says")
    parser.add_argument("--seeds", type=int, default=1)
    known = (REGRESSION, *ROWS)
    parser.add_argument("--rows", nargs="+", default=list(known), choices=known)
    parser.add_argument(
        "--folder", type=pathlib.Path, default=pathlib.Path("runs/methods_cfcml"), help="runs"
    )
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/cfcml-derm.json")
    )
    arguments, overrides = parser.parse_known_args(argv)
    arguments.folder = arguments.folder.absolute()
    flags.FLAGS.mark_as_parsed()
    config = row_config("full", arguments, overrides, 0)
    # Where files lie decides nothing, and names a machine.
    told = [o for o in overrides if not o.startswith(("--config.data.data", "--config.data.man"))]
    settings = {"config": arguments.config, "steps": config["train"]["steps"], "overrides": told}
    rows = read_finished(arguments.out, settings)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    # Seeds outermost: an interrupted study is still a paired one.
    for seed in range(arguments.seeds):
        for row in arguments.rows:
            done = any(str(seed) in seeds for name, seeds in rows.items() if name.startswith(row))
            if not done and not (row == REGRESSION and seed):
                for name, entry in run_row(row, seed, arguments, overrides).items():
                    rows.setdefault(name, {})[str(seed)] = entry
            compared = differences(rows, arguments.folder, config["evals"]["resamples"] or 2000)
            laid_out = table(rows, compared, config["recipe"]["task"])
            content = {"settings": settings, "differences": compared, "rows": rows}
            for file, text in (
                (arguments.out, json.dumps(content, indent=1)),
                (arguments.out.with_suffix(".md"), f"{laid_out}\n"),
            ):
                scratch = file.with_name(f"{file.name}.tmp")
                scratch.write_text(text)
                os.replace(scratch, file)
            print(f"\nseed {seed}, {row} done\n{laid_out}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
