"""One HTML page of a run: what was run, what it scored beside its controls, and what to beware of.

  medvlp report RUN [--out FILE.html] [--with-texts]

RUN is a run folder, or the OUT of `medvlp evaluate` or `medvlp adapt`: of such a folder, which has
no config.json, the page holds the results and what they say of themselves. The page holds
everything in itself and needs neither network nor script. Texts of patients are in it only with
--with-texts: the pictures of retrieved reports and of grounded phrases show them.
"""

import argparse
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from medvlp_jax import assemble, cases, cli, lineage
from medvlp_jax.config import UserError
from medvlp_jax.data import leakage
from medvlp_jax.evaluation import (
    case_tables,
    comparison,
    page,
    paired,
    plots,
    provenance,
    results,
    retrieval,
)
from medvlp_jax.writing import replaced

NAME = "report.html"
# Fewer patients of a class than this, and its intervals hold the truth less often than they say:
# docs/evaluation.md.
FEW = 30
CONTROLS = {
    "untrained": "the same network with the weights it started from",
    "masked": "the lower edge of every image blackened, where text is burned in",
    "shuffled": "part of the input exchanged between patients",
    "regression": "logistic regression on the raw input named",
    page.MOST_FREQUENT: "always answering the most frequent class",
    comparison.STUDIES: "all images of a study judged together; no control",
    "draw": "one draw of the training patients, of which this run is the mean; no control",
}


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    top = argparse.ArgumentParser(
        "medvlp report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument(
        "run", type=pathlib.Path, metavar="RUN", help="run folder, or one with results"
    )
    top.add_argument("--out", type=pathlib.Path, help=f"default: RUN/{NAME}")
    top.add_argument(
        "--with-texts", action="store_true", help="also pictures that show patients' texts"
    )
    return top


def build(run: pathlib.Path, *, with_texts: bool = False) -> str:
    """Return the page of a run folder.

    Args:
      run: with results.json and, of a run, config.json; pictures, metrics.jsonl and
        predictions.csv are shown where they are.
      with_texts: show pictures that hold patients' texts.

    Raises:
      UserError: for a folder that has no results, or a config that is none of a run.
    """
    is_run = (run / assemble.CONFIG).is_file()
    if not is_run and not (run / results.FILE).is_file():
        raise UserError(
            f"{run} is not a run folder, nor the OUT of `medvlp evaluate` or `medvlp adapt`: there "
            f"is neither {assemble.CONFIG} nor {results.FILE} in it."
        )
    config = assemble.read_config(run) if is_run else {}
    told, written = assemble.written_config(run) if is_run else {}, results.read(run)
    tasks = page.tasks(written.numbers)
    title = f"{run.name}: {_model(config)}" if is_run else run.name
    body = [
        page.text(run.name, "h1"),
        page.text(_subtitle(config, comparison.rows_of(run.name, written)), "p", "muted"),
        page.listed(warnings(told, written), "warnings"),
        page.text("Results", "h2"),
        page.text(
            "Values with 95 % intervals over patients, controls beside them. In the strip, from 0 "
            "to 1: this run filled, controls hollow, the level of guessing a tick. Chance and n "
            "are those of the first column; where another's differ, it says so."
        ),
        *map(page.table, tasks),
        _controls(tasks),
        *_figures(run, with_texts=with_texts),
        page.text("What was run", "h2"),
        page.facts(_facts(config, written.provenance)),
        *([page.folded("Config", page.code(config))] if is_run else []),
        page.folded("Protocols: settings, skipped classes, counts", page.code(_protocols(written))),
    ]
    return page.page(title, body)


def _model(config, join: str = " on ") -> str:
    return f"{config['recipe']['name']}{join}{', '.join(config['data']['corpora'])}"


def _subtitle(config, rows) -> str:
    trained = "Results without the config of a run"
    if config:
        trained = _model(config, ", trained on ")
        trained += f", {config['train']['steps']} steps, seed {config['seed']}"
    if not rows:
        return f"{trained}."
    where = f"{rows['corpus']} {rows['split']}"
    return f"{trained}; tested on {rows['rows']} rows of {rows['patients']} patients, {where}."


def warnings(config: Mapping[str, Any], written: results.Written) -> list[str]:
    """Return what a reader of the numbers must know, one sentence each.

    Args:
      config: as the run folder has it; {} where there is none.
      written: the results.
    """
    told, origin = [], written.provenance
    rows, data, evals = origin.get("rows", {}), config.get("data", {}), config.get("evals", {})
    trained = data["corpora"] if config else _trained(written)
    tested = rows.get("corpus") or evals.get("corpus") or (trained[0] if config else "")
    if said := leakage.warning(lineage.corpora(config) if config else trained or (), tested):
        told.append(said)
    if trained is None:
        told.append(
            "What the encoder was trained on is not recorded here, nor whether it has seen these "
            "images."
        )
    if said := leakage.torn(tested, rows.get("torn_patients", 0)):
        told.append(said)
    if any(name.startswith("cxr_phantom") for name in (*(trained or ()), tested)):
        told.append("Generated data: these numbers say that the code works, nothing on patients.")
    split = rows.get("split") or evals.get("split", "test")
    if (
        config
        and split == data.get("split", "train")
        and leakage.unsized(tested) in map(leakage.unsized, trained)
    ):
        told.append(f"Measured on the {split} split, whose rows the run was trained on.")
    elif split != "test":
        told.append(f"Measured on the {split} split, on which settings may have been chosen.")
    if not origin:
        told.append("results.json has no provenance: code, rows and weights are not recorded.")
    elif config and origin["config"] not in _hashes(config):
        told.append("config.json is not the one these numbers were measured with.")
    if origin and origin["code"]["dirty"]:
        told.append("The code had changes that were not committed.")
    alike: dict[str, list[str]] = {}
    for key, entry in written.numbers.items():
        if "value" in entry or comparison.parted(key).control:  # whose rows are those of its task
            continue
        for sentence in _about_rows(entry):
            alike.setdefault(sentence, []).append(key.removesuffix("/protocol"))
    return told + [f"{', '.join(tasks)}: {sentence}" for sentence, tasks in alike.items()]


def _trained(written: results.Written) -> list[str] | None:
    """Return what `medvlp adapt` says its encoder was trained on; None where that is not known."""
    encoders = [entry["encoder"] for entry in written.numbers.values() if "encoder" in entry]
    if encoders and all(encoder.get("untrained") for encoder in encoders):
        return []
    known = [encoder["corpora"] for encoder in encoders if "corpora" in encoder]
    return known[0] if known else None


def _hashes(config: Mapping) -> set[str]:
    """Return the hashes a config may go by; once what it lacked was filled in first."""
    return {provenance.config_hash(c) for c in (config, assemble.completed(config))}


def _about_rows(entry: Mapping[str, Any]) -> list[str]:
    told = []
    if entry.get("skipped"):
        names = ", ".join(map(str, entry["skipped"]))
        told.append(f"skipped, for they lack one of both outcomes: {names}.")
    if entry.get("undefined"):
        told.append(f"could not be computed: {', '.join(entry['undefined'])}.")
    if entry.get("left_out"):
        told.append(f"{entry['left_out']} rows left out (unknown label or no text).")
    if retrieval.UNKNOWN in entry:
        told.append(f"{retrieval.UNKNOWN}: {entry[retrieval.UNKNOWN]}.")
    if retrieval.ONE_ANSWER in entry:
        told.append(f"{retrieval.ONE_ANSWER}: {entry[retrieval.ONE_ANSWER]:.3f}.")
    patients = entry.get("patients") or 0  # what is known of results from before they were counted
    about = {name: min(p, 1 - p) * patients for name, p in entry.get("prevalence", {}).items()}
    fewest = entry.get("fewest_patients", about)
    if rare := [name for name, patients in fewest.items() if 0 < patients < FEW]:
        told.append(
            f"fewer than {FEW} patients with, or without, {', '.join(rare)}: the intervals of "
            "these classes may be too narrow."
        )
    return told


def _controls(tasks: Sequence[page.Task]) -> str:
    """Say what each control is that stands in a table."""
    columns = dict.fromkeys(c for task in tasks for c in task.columns if c != page.ITSELF)
    said = {
        column: next((text for word, text in CONTROLS.items() if word in column), "")
        for column in columns
    }
    if not said:
        return page.text("Controls", "h3") + page.text("None was run: see evals.controls.")
    return page.text("Controls", "h3") + page.facts(said)


def _figures(run: pathlib.Path, *, with_texts: bool) -> list[str]:
    """Return the sections of pictures there are."""
    predictions = next(filter(pathlib.Path.is_file, paired.files(run)), None)
    found = []
    log = run / "metrics.jsonl"
    if log.is_file() and log.stat().st_size:
        found.append(page.text("Training", "h2"))
        try:
            drawn = _drawn(lambda out: plots.curves(log, out))
            found.append(page.picture(drawn, "Loss terms, rates, speed"))
        except UserError as error:  # a run that ended before its first number
            found.append(page.text(error))
    if predictions and len(paired.read(predictions).truth):
        seed = "" if predictions.parent == run else f", of {predictions.parent.name}"
        found += [page.text("Classifier", "h2"), _classifier(predictions, seed)]
    if (scores := run / cases.SCORES).is_file():
        drawn = _drawn(lambda out: plots.roc(case_tables.read_scores(scores), out))
        found += [
            page.text("Zero-shot", "h2"),
            page.picture(drawn, "ROC of each class, by prompts"),
        ]
    # Those of a classifier name classes, those of retrieval show reports.
    texts = {"grounding.png": "Grounded phrases with the maps found for them"}
    plain = {"attention.png": "Where in the image the attention of the table goes"}
    plain |= dict.fromkeys(cases.ADAPTED, "Test images with what was found in them")
    is_classifier = (run / paired.FILE).is_file()
    (plain if is_classifier else texts)["examples.png"] = "Examples, best answers first"
    shown = {name: said for name, said in plain.items() if (run / name).is_file()}
    held = {name: said for name, said in texts.items() if (run / name).is_file()}
    if with_texts:
        shown, held = shown | held, {}
    if shown or held:
        found.append(page.text("Examples", "h2"))
    found += [page.picture((run / name).read_bytes(), said) for name, said in shown.items()]
    if held:
        found.append(
            page.text(
                f"{', '.join(held)} may show patients' texts and stay in the run folder; "
                "--with-texts puts them here."
            )
        )
    return found


def _classifier(predictions: pathlib.Path, seed: str) -> str:
    """Return what is drawn of a classifier's predictions."""
    scored = paired.read(predictions)
    if scored.truth.ndim == 2:
        drawn = _drawn(lambda out: plots.roc(case_tables.read_scores(predictions), out))
        return page.picture(drawn, f"ROC of each finding{seed}")
    drawn = _drawn(lambda out: plots.classifier(scored.truth, scored.chances, scored.classes, out))
    caption = "Confusion matrix, ROC of each class against the rest, calibration"
    return page.picture(drawn, f"{caption}{seed}")


def _drawn(draw) -> bytes:
    """Return the PNG that a function of plots.py writes."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "picture.png"
        draw(file)
        return file.read_bytes()


def _facts(config, origin) -> dict[str, str]:
    """Return config, where there is one, and provenance in short."""
    found = {}
    if config:
        found["recipe"] = config["recipe"]["name"]
        found["corpora"] = ", ".join(config["data"]["corpora"])
        if stage := config["recipe"].get("stage"):
            found["stage"] = stage
        begun = ", ".join(f"{k}: {v}" for k, v in config["init"].items() if v) or "nothing"
        found["steps"] = f"{config['train']['steps']} of {config['train']['batch_size']} rows"
        found["starts from"] = begun
    if not origin:
        return found | {"provenance": "none recorded"}
    where, commit = origin["rows"], origin["code"]["commit"] or "no checkout"
    return found | {
        "evaluated": origin["date"],
        "code": f"{origin['code']['version']}, commit {commit}",
        "config": origin["config"],
        "rows": f"{where['corpus']} {where['split']} {where.get('hash', '')}",
        "weights": origin["weights"],
        "seeds": ", ".join(f"{name} {seed}" for name, seed in origin["seeds"].items()),
        "libraries": ", ".join(f"{name} {v}" for name, v in origin["libraries"].items()),
        "devices": origin["devices"],
    }


def _protocols(written) -> dict[str, Any]:
    return {k: entry for k, entry in written.numbers.items() if "value" not in entry}


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page.

    Raises:
      UserError: for bad input.
    """
    options = parser().parse_args(argv)
    out = options.out or options.run / NAME
    if out.is_dir():
        raise UserError(f"{out} is a folder; name a file, such as {out / NAME}.")
    written = build(options.run.absolute(), with_texts=options.with_texts)
    with replaced(out) as scratch:
        scratch.write_text(written, encoding="utf-8")
    print(f"{out}: {len(written) / 2**20:.1f} MiB, opens in any browser.")


if __name__ == "__main__":
    cli.leave(cli.run(main))
