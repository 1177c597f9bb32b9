"""Protocols on real images, each number beside what it owes to training, in one table.

  python -m benchmarks.evaluation_real --sources DIR [--seeds 0,1,2] [--only radiology lungs ...]
      [--folder runs/evaluation_real] [--out benchmarks/results/evaluation-real.json]

DIR holds radiology_qa, cxr_pairs, cxr_tabular, brain_mr_tabular and derm_tabular, each as the card
of its corpus describes it. IMITATE is trained on radiology_qa and on cxr_pairs, CFCML on
cxr_tabular; the image encoder of the first then gets heads for lungs, tumours and skin lesions,
once a seed, beside the same encoder with random weights. Skin lesions by themselves are
methods_cfcml.py's. What is done is kept: run the same command again. Lines of what --only leaves
out stay in --out as they are there.
"""

import argparse
import collections
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

from absl import flags

from benchmarks import studies
from benchmarks.evaluation import begin, entry_text, number
from medvlp_jax import adapt, cli, train
from medvlp_jax.evaluation import results as stored

FOLDERS = {"ham10000": "derm_tabular"}  # others are called like their corpus
IMITATE, CFCML = "configs/imitate.py", "configs/cfcml.py"
# Name: config, protocols, controls and what else is set.
RUNS = {
    "radiology": (
        f"{IMITATE}:radiology_qa",
        "('zero_shot','retrieval','probe')",
        "('untrained','masked_edge','shuffled_pairs')",
        (),
    ),
    "pairs": (
        f"{IMITATE}:cxr_pairs",
        "('zero_shot','retrieval','grounding','probe')",
        "('untrained','shuffled_pairs','shuffled_phrases')",
        (),
    ),
    "icu": (
        f"{CFCML}:derm",
        "('classify',)",
        "('untrained','missing_mask','regression')",
        (
            *("data.corpora=('cxr_tabular',)", "data.balance=icu", "data.channels=1"),
            *("recipe.task=icu", "recipe.num_classes=2", "data.table.scale=10.0"),
            *("train.steps=300", "train.batch_size=16", "train.checkpoint_every=100"),
        ),
    ),
}
# Stretched, as all images were when the table was measured.
SMALL = ("--size=96", "--evaluate-every=50", "--patience=6", "--stretch")
# Name: arguments of medvlp adapt. Decoder and detection heads are narrow, as the encoder is.
ADAPTED = {
    "lungs": ("segment", "cxr_pairs:images", ("--regions=lung", "--width=32", "--steps=200")),
    "tumour": ("segment", "brain_mr_tabular", ("--width=32", "--steps=300")),
    "boxes": ("detect", "brain_mr_tabular", ("--width=32", "--steps=500")),
    "skin": ("finetune", "ham10000", ("--steps=600", "--batch-size=42")),
}
SAID = {
    "radiology": "radiology_qa",
    "pairs": "cxr_pairs",
    "icu": "cxr_tabular",
    "lungs": "cxr_pairs",
    "tumour": "brain_mr_tabular",
    "boxes": "brain_mr_tabular",
    "skin": "ham10000",
}
UNTRAINED = "untrained"
MASKED, PAIRS, PHRASES = "lower 12% masked", "shuffled pairs", "shuffled phrases"


class Row(NamedTuple):
    """A line of the table.

    Attributes:
      title: what is measured.
      of: which run or adaptation.
      key: of its results; {} stands for " (control)", and a key without has no control.
      control: the one beside "untrained"; "" for none.
    """

    title: str
    of: str
    key: str
    control: str = ""


ROWS = (
    *(
        Row(f"{task}, zero-shot AUROC", "radiology", f"zero_shot/{task}{{}}/macro_auroc", MASKED)
        for task in ("organ", "plane", "modality")
    ),
    Row("image to text R@10", "radiology", "retrieval/image_to_text{}/R@10", PAIRS),
    Row("text to image R@10", "radiology", "retrieval/text_to_image{}/R@10", PAIRS),
    Row("organ, probe AUROC", "radiology", "probe/organ{}/macro_auroc", MASKED),
    Row("findings, zero-shot AUROC", "pairs", "zero_shot/finding{}/macro_auroc"),
    Row("image to text R@10", "pairs", "retrieval/image_to_text{}/R@10", PAIRS),
    Row("text to image R@10", "pairs", "retrieval/text_to_image{}/R@10", PAIRS),
    Row("left and right lung, CNR", "pairs", "grounding/cosine{}/cnr", PHRASES),
    Row("left and right lung, mIoU", "pairs", "grounding/cosine{}/miou", PHRASES),
    Row("left and right lung, pointing", "pairs", "grounding/cosine{}/pointing", PHRASES),
    Row("findings, probe AUROC", "pairs", "probe/finding{}/macro_auroc"),
    Row("lungs, Dice", "lungs", "segment/lung{}/dice"),
    Row("tumour, Dice", "tumour", "segment/tumour{}/dice"),
    Row("tumour, AP@.5", "boxes", "detect/tumour{}/ap50"),
    Row("tumour, FROC", "boxes", "detect/tumour{}/froc"),
    Row("skin lesions, fine-tuned AUROC", "skin", "finetune/diagnosis{}/macro_auroc"),
    Row("intensive care, AUROC", "icu", "classify/icu{}/macro_auroc"),
    *(
        Row(f"the same, regression on {what}", "icu", f"regression/icu ({kind})/macro_auroc")
        for kind, what in (
            ("table", "the table"),
            ("pixels", "the image"),
            ("missing mask", "which cells are empty"),
        )
    ),
)


def source_of(sources: pathlib.Path, corpus: str) -> pathlib.Path:
    """Return where the files of a corpus lie."""
    name = corpus.partition(":")[0]
    return sources / FOLDERS.get(name, name)


def trained(name: str, arguments: argparse.Namespace) -> Mapping:
    """Train and evaluate a run, unless that is done; return its numbers."""
    folder = arguments.folder / name
    if not (folder / "results.json").is_file():
        config, protocols, controls, own = RUNS[name]
        settings = (
            *("train.evaluate_every=0", f"evals.protocols={protocols}"),
            *(f"evals.controls={controls}", f"data.data_dir={arguments.folder / 'data'}"),
            *(f"data.manual_dir={source_of(arguments.sources, SAID[name])}", *own),
        )
        given = [f"--config.{setting}" for setting in settings]
        train.run(train.resolve([f"--config={config}", *given])[0], folder)
    return stored.read(folder).numbers


def adapted(name: str, arguments: argparse.Namespace) -> Mapping:
    """Run `medvlp adapt` with and without the trained weights, unless that is done."""
    task, corpus, own = ADAPTED[name]
    found = []
    for control in ([], ["--untrained"]):
        out = arguments.folder / (f"{name}-untrained" if control else name)
        if not (out / "results.json").is_file():
            adapt.main(
                [
                    *(f"--task={task}", f"--corpus={corpus}", f"--out={out}"),
                    *(f"--encoder={arguments.folder / 'radiology/export/image'}", *SMALL, *own),
                    f"--data-dir={arguments.folder / 'data'}",
                    f"--manual-dir={source_of(arguments.sources, corpus)}",
                    *(f"--seeds={arguments.seeds}", *control),
                ]
            )
        found.append(stored.read(out).numbers)
    return collections.ChainMap(*found)


def measure(arguments: argparse.Namespace) -> list[dict]:
    """Return {"of", "title", "control", "trained", "untrained", "other"} a line of the table."""
    lines: list[dict] = []
    for name in arguments.only:
        numbers = (trained if name in RUNS else adapted)(name, arguments)
        for row in (row for row in ROWS if row.of == name):
            line = {"of": SAID[name], "title": row.title, "control": row.control}
            line["trained"] = numbers[row.key.format("")]
            if "{}" in row.key:
                line[UNTRAINED] = numbers[row.key.format(f" ({UNTRAINED})")]
            if row.control:
                line["other"] = numbers[row.key.format(f" ({row.control})")]
            lines.append(line)
        print(f"\n{table(lines)}", flush=True)
    return lines


def merged(kept: list[dict], lines: list[dict]) -> list[dict]:
    """Return the lines of a file with those measured now in the place of older ones."""
    own = lambda line: (line["of"], line["title"])
    found = {own(line): line for line in (*kept, *lines)}
    rows = [row for name in (*RUNS, *ADAPTED) for row in ROWS if row.of == name]  # as measured
    order = [(SAID[row.of], row.title) for row in rows]
    place = {title: i for i, title in enumerate(order)}  # a title that is no more comes last
    return sorted(found.values(), key=lambda line: place.get(own(line), len(place)))


def table(lines: list[dict]) -> str:
    """Lay it out in Markdown."""
    text = ["| | | trained | untrained | another control | guessing |", "|---|---|---|---|---|---|"]
    for line in lines:
        cells = [entry_text(line[name]) if name in line else "" for name in ("trained", UNTRAINED)]
        other = f"{line['control']}: {entry_text(line['other'])}" if "other" in line else ""
        chance = number(line["trained"]["chance"])
        text.append(f"| {' | '.join([line['of'], line['title'], *cells, other, chance])} |")
    return "\n".join(text)


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, and write numbers and table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*RUNS, *ADAPTED]
    out = pathlib.Path("benchmarks/results/evaluation-real.json")
    folder = pathlib.Path("runs/evaluation_real")
    parser.add_argument("--sources", type=pathlib.Path, required=True, help="folder of the corpora")
    parser.add_argument("--folder", type=pathlib.Path, default=folder, help="runs")
    parser.add_argument("--out", type=pathlib.Path, default=out)
    parser.add_argument("--seeds", default="0,1,2", help="of the adaptations")
    parser.add_argument("--only", nargs="+", default=names, choices=names)
    arguments = parser.parse_args(argv)
    flags.FLAGS.mark_as_parsed()
    arguments.folder = arguments.folder.absolute()
    settings = {"seeds": arguments.seeds, "overrides": []}
    kept = studies.finished(arguments.out, settings).get("lines", [])
    begin(arguments.folder, settings)
    lines = merged(kept, measure(arguments))
    studies.keep(arguments.out, {"settings": settings, "lines": lines}, table(lines))


if __name__ == "__main__":
    cli.leave(cli.run(main))
