"""Every protocol on the generated radiographs, for four encoders, in one table.

  python -m benchmarks.evaluation [--steps 300] [--only imitate clip ...] [--config.KEY=VALUE ...]
      [--folder runs/evaluation] [--out benchmarks/results/evaluation.json]

IMITATE, the CLIP control, the same network with random weights, and as upper bound the network
trained on the labels, masks or boxes themselves. The first two are pretrained here, with equal
steps; zero-shot, retrieval, grounding and probes with 1, 10 and 100 % of the training patients come
from that run, the random row from its control; fine-tuning, masks and boxes from `medvlp adapt`.
Masks are of lungs and hearts, boxes of findings. What is done is kept: run the same command again.
Rows that --only leaves out stay in --out as they are there.
"""

import argparse
import json
import pathlib
import time
from collections.abc import Mapping

from absl import flags

from benchmarks import studies
from medvlp_jax import adapt, cli, train
from medvlp_jax.evaluation import results as stored
from medvlp_jax.writing import replaced

RUNS = {"imitate": "configs/imitate.py:demo", "clip": "configs/clip.py:demo"}
TITLES = {"imitate": "IMITATE", "clip": "CLIP", "random": "random weights"}
TITLES |= {"supervised": "trained on the targets"}
FRACTIONS = (0.01, 0.1, 1.0)
# Column: key, and the same of the control "untrained".
RUN_COLUMNS = {
    "zero-shot AUROC": "zero_shot/finding{}/macro_auroc",
    "image to text P@1": "retrieval/image_to_text{}/P@1",
    "image to text R@10": "retrieval/image_to_text{}/R@10",
    "CNR": "grounding/cosine{}/cnr",
    "probe 1 %": "probe/finding_1%{}/macro_auroc",
    "probe 10 %": "probe/finding_10%{}/macro_auroc",
    "probe 100 %": "probe/finding{}/macro_auroc",
}
# Column: task of medvlp adapt, key after the protocol, and arguments.
ADAPTED = {
    "fine-tuned 100 %": ("finetune", "finding{}/macro_auroc", ()),
    "Dice": ("segment", "regions{}/dice", ("--regions=lung_left+lung_right,heart",)),
    "AP@.5": ("detect", "boxes{}/ap50", ()),
}
LENGTHS = {"finetune": 300, "segment": 200, "detect": 500}  # steps
SMALL = ("--size=64", "--width=32", "--evaluate-every=100")
PREPARED = "--stretch"  # as all images were when the table was measured


def pretrain(name: str, arguments: argparse.Namespace, overrides: list[str]) -> dict:
    """Train and evaluate IMITATE or CLIP, unless that is done; return its numbers."""
    folder = arguments.folder / name
    if not (folder / "results.json").is_file():
        config, _ = train.resolve([f"--config={RUNS[name]}", *overrides])
        config["train"] |= {"steps": arguments.steps, "evaluate_every": 0, "export": True}
        config["evals"] |= {
            "protocols": ("zero_shot", "retrieval", "grounding", "probe"),
            "controls": ("untrained",),
        }
        config["evals"]["probe"]["fractions"] = FRACTIONS
        train.run(config, folder)
    return stored.read(folder).numbers


def adapted(row: str, column: str, arguments: argparse.Namespace, data: Mapping) -> dict:
    """Run `medvlp adapt` for a cell, unless that is done; return its entry."""
    task, key, own = ADAPTED[column]
    untrained = row in ("random", "supervised")
    trains = row == "supervised" and task != "finetune"  # which trains the encoder anyway
    out = arguments.folder / f"{row}-{task}"
    if not (out / "results.json").is_file():
        encoder = arguments.folder / ("imitate" if untrained else row) / "export/image"
        adapt.main(
            [
                *(f"--task={task}", f"--encoder={encoder}", f"--corpus={data['corpora'][0]}"),
                *(f"--out={out}", f"--data-dir={data['data_dir']}", f"--steps={LENGTHS[task]}"),
                PREPARED,
                *(own if task == "finetune" else (*own, *SMALL)),
                *(["--untrained"] if untrained else []),
                *(["--train-encoder"] if trains else []),
            ]
        )
    protocol = f"{task}-train-encoder" if trains else task
    key = key.format(" (untrained)" if untrained else "")
    return stored.read(out).numbers[f"{protocol}/{key}"]


def measure(arguments: argparse.Namespace, overrides: list[str]) -> dict[str, dict[str, dict]]:
    """Return entries by row and column; what a row cannot have is not there."""
    config, _ = train.resolve([f"--config={RUNS['imitate']}", *overrides])
    numbers = {name: pretrain(name, arguments, overrides) for name in RUNS}
    rows: dict[str, dict[str, dict]] = {name: {} for name in arguments.only}
    for row, cells in rows.items():
        source, suffix = ("imitate", " (untrained)") if row == "random" else (row, "")
        if row != "supervised":
            keys = {column: key.format(suffix) for column, key in RUN_COLUMNS.items()}
            cells |= {column: numbers[source][key] for column, key in keys.items()}
        for column, (task, *_) in ADAPTED.items():
            if not (row == "random" and task == "finetune"):  # that is the supervised row
                cells[column] = adapted(row, column, arguments, config["data"])
        print(f"\n{table(rows)}", flush=True)
    return rows


def table(rows: Mapping[str, Mapping[str, Mapping]]) -> str:
    """Lay it out in Markdown: a line a column of numbers, an encoder a column."""
    lines = [f"| | {' | '.join(TITLES[row] for row in rows)} | guessing |"]
    lines.append(f"|---|{'---|' * (len(rows) + 1)}")
    for column in (*RUN_COLUMNS, *ADAPTED):
        found = [cells.get(column) for cells in rows.values()]
        if not any(found):
            continue
        chance = next(entry for entry in found if entry)["chance"]
        texts = [entry_text(entry) if entry else "" for entry in found]
        lines.append(f"| {column} | {' | '.join(texts)} | {number(chance)} |")
    return "\n".join(lines)


def entry_text(entry: Mapping) -> str:
    """Write an entry: its value with its interval, if it has one."""
    low, high = number(entry["low"]), number(entry["high"])
    return f"{number(entry['value'])} [{low}, {high}]" if low else number(entry["value"])


def number(value: float | None) -> str:
    """Write a rate; "" where there is none."""
    return "" if value is None else f"{value:.3f}"


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, and write numbers and table."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    folder, out = pathlib.Path("runs/evaluation"), "benchmarks/results/evaluation.json"
    parser.add_argument("--folder", type=pathlib.Path, default=folder, help="runs")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(out))
    parser.add_argument("--steps", type=int, default=300, help="of pretraining")
    parser.add_argument("--only", nargs="+", default=list(TITLES), choices=list(TITLES))
    arguments, overrides = parser.parse_known_args(argv)
    flags.FLAGS.mark_as_parsed()
    arguments.folder = arguments.folder.absolute()
    settings = {"pretraining_steps": arguments.steps, "adapting_steps": LENGTHS}
    settings["overrides"] = studies.deciding(overrides)
    kept = studies.finished(arguments.out, settings).get("rows", {})
    begin(arguments.folder, settings)
    began = time.time()
    rows = kept | measure(arguments, overrides)
    rows = {name: rows[name] for name in TITLES if name in rows}
    minutes = (time.time() - began) / 60
    content = {"settings": settings, "minutes_of_the_last_start": minutes, "rows": rows}
    studies.keep(arguments.out, content, table(rows))
    print(f"\n{minutes:.1f} minutes")


def begin(folder: pathlib.Path, settings: Mapping) -> None:
    """Note in the folder of the runs with which settings they are made.

    Raises:
      UserError: if it holds runs of others, whose numbers would be taken for these.
    """
    studies.finished(folder / "study.json", settings, flag="--folder")
    with replaced(folder / "study.json") as scratch:
        scratch.write_text(json.dumps({"settings": settings}, indent=1) + "\n")


if __name__ == "__main__":
    cli.leave(cli.run(main))
