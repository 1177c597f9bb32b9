"""CFCML beside what is simpler: same data, split, budget and settings, one thing taken away.

  python -m benchmarks.methods_cfcml [--config configs/cfcml.py:derm] [--steps 1500] [--seeds 1]
      [--folds 5] [--rows full late ...] [--out benchmarks/results/cfcml-derm.json]
      [--config.KEY=VALUE ...]

Trains the rows one after another (about 12 minutes each on two CPU cores with the default config)
and scores logistic regressions on the raw input. A finished row is kept, an interrupted one goes on
from its checkpoint: run the same command again. Runs lie in --folder, those of other settings in a
folder of their own there. Writes every number to --out and a Markdown table beside it: means over
seeds and folds, their spread, and differences to CFCML that are paired over resamples of patients
(lesions). With --folds each row is trained once a fold and scored on it.
"""

import argparse
import itertools
import pathlib
import time
from collections.abc import Mapping

import numpy as np
from absl import flags

from benchmarks import studies
from medvlp_jax import assemble, cases, cli, train
from medvlp_jax.evaluation import baselines, paired
from medvlp_jax.evaluator import Evaluator

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


def row_config(
    row: str, arguments: argparse.Namespace, overrides: list[str], seed: int, fold: int = 0
) -> dict:
    """Return the resolved config of a row; nothing differs between rows but the recipe.

    Without images there are no weights to start from, and no rate of the image encoder's own.
    """
    config, _ = train.resolve([f"--config={arguments.config}", *overrides])
    changes = dict(ROWS[row][1]) if row in ROWS else {}
    config["recipe"]["weights"] |= changes.pop("weights", {})
    config["recipe"] |= changes
    config["seed"] = seed
    if not config["recipe"]["images"]:
        config["init"]["image"], config["optim"]["multipliers"] = "", ()
    # The last step of each row counts.
    config["train"] |= {"evaluate_every": 0, "select": "", "export": False}
    config["train"] |= {"steps": arguments.steps} if arguments.steps else {}
    config["evals"] |= {"protocols": ("classify",), "controls": ()}
    if arguments.folds:
        config["data"]["folds"] |= {"count": arguments.folds, "index": fold}
        config["evals"]["split"] = "test"
    return config


def run_row(config: dict, row: str, folder: pathlib.Path) -> dict:
    """Train and score one row; return {name: {"results", "minutes"}} of what it holds."""
    began = time.time()
    found = regressions(config, folder) if row == REGRESSION else {row: train.run(config, folder)}
    minutes = (time.time() - began) / 60
    return {name: {"results": results, "minutes": minutes} for name, results in found.items()}


def regressions(config: dict, folder: pathlib.Path) -> dict[str, dict]:
    """Fit the regressions on the raw input and keep their predictions as those of a run."""
    evaluator = Evaluator(assemble.parts(config), config["evals"])
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
        **evaluator.positive(),
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


def differences(rows: Mapping, folder: pathlib.Path, resamples: int) -> dict[str, dict]:
    """Return CFCML minus every other row, over the seeds and folds whose predictions are here."""
    found = {}
    for name, runs in rows.items():
        # A regression has no seed of training: the first stands for all.
        other = lambda key, name=name: f"0.{key.split('.')[1]}" if ":" in name else key
        shared = [key for key in rows.get("full", {}) if other(key) in runs]
        if name == "full" or not shared:
            continue
        file = lambda name, key: predictions_of(folder / f"{name.partition(':')[0]}-{key}", name)
        ours = [file("full", key) for key in shared]
        if not all(path.is_file() for path in ours + [file(name, other(key)) for key in shared]):
            continue  # trained elsewhere: the difference that was written then stands
        theirs = [file(name, other(key)) for key in shared]
        found[name] = paired.compare(ours, theirs, "macro_auroc", resamples=resamples)
    return found


def table(rows: Mapping, compared: Mapping, task: str) -> str:
    """Lay out mean over seeds and folds, their spread, and the mean of their intervals."""
    titles = {name: title for name, (title, _) in ROWS.items()}
    header = ("", *(m.replace("_", " ") for m in METRICS), "CFCML minus this, macro AUROC", "min")
    lines = [f"| {' | '.join(header)} |", f"|---|{'---|' * (len(header) - 1)}"]
    order = [*(name for name in rows if name.startswith(REGRESSION)), *reversed(ROWS)]
    for name in (n for n in order if n in rows):
        runs = list(rows[name].values())
        cells = []
        for metric in METRICS:
            key = f"classify/{task}/{metric}"
            entries = [run["results"][key] for run in runs if key in run["results"]]
            if not entries:  # every fold has one class alone
                cells.append("-")
                continue
            # Fewer than two patients have no interval, nor what is the same in all resamples.
            value, low, high = (
                np.mean([np.nan if e[k] is None else e[k] for e in entries])
                for k in ("value", "low", "high")
            )
            spread = np.std([e["value"] for e in entries], ddof=1) if len(entries) > 1 else 0
            cells.append(
                f"{value:.3f}{f' ± {spread:.3f}' if len(entries) > 1 else ''}"
                f"{'' if np.isnan(low + high) else f' [{low:.3f}, {high:.3f}]'}"
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
    parser.add_argument("--folds", type=int, default=0, help="0: the corpus' own splits")
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
    settings = {"config": arguments.config, "steps": config["train"]["steps"]}
    settings |= {"overrides": studies.deciding(overrides), "folds": arguments.folds}
    # The config may have changed since, under the same name.
    settings["recipe"] = studies.recipe_of(config)
    finished = studies.finished(arguments.out, settings, since=("recipe",))
    # A run of other settings would be gone on with, and its weights taken for these.
    folder = arguments.folder / studies.fingerprint(settings)
    settings = finished.get("settings", settings)
    rows, compared = (finished.get(part, {}) for part in ("rows", "differences"))
    # Rows innermost: an interrupted study is still a paired one.
    runs = itertools.product(range(arguments.seeds), range(arguments.folds or 1), arguments.rows)
    for seed, fold, row in runs:
        key = f"{seed}.{fold}"
        done = any(key in found for name, found in rows.items() if name.startswith(row))
        if not done and not (row == REGRESSION and seed):
            own = row_config(row, arguments, overrides, seed, fold)
            for name, entry in run_row(own, row, folder / f"{row}-{key}").items():
                rows.setdefault(name, {})[key] = entry
        compared |= differences(rows, folder, config["evals"]["resamples"] or 2000)
        laid_out = table(rows, compared, config["recipe"]["task"])
        content = {"settings": settings, "differences": compared, "rows": rows}
        studies.keep(arguments.out, content, laid_out)
        print(f"\nseed {seed}, fold {fold}, {row} done\n{laid_out}", flush=True)


if __name__ == "__main__":
    cli.leave(cli.run(main))
