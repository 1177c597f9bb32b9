"""Adapt an image encoder to a task with labels, masks or boxes, and score it on unseen patients.

  medvlp adapt --task segment  --encoder EXPORT/image --corpus cxr_pairs:images --regions lung
  medvlp adapt --task detect   --run RUN --corpus brain_mr_tabular
  medvlp adapt --task finetune --encoder HUB_ID --corpus ham10000 --fraction 0.1 --seeds 0,1,2

segment   a U-Net on the levels of a ResNet or Swin, SETR-PUP on the patches of a ViT: Dice, IoU
detect    YOLOv3 heads: COCO AP, FROC, the mAP of earlier papers
finetune  encoder and linear head on 1, 10 or 100 % of the training patients: AUROC, accuracy, ...

segment and detect keep the encoder as it is unless --train-encoder is given, which is another
protocol. A fifth of the chosen training patients is held out for early stopping; the test split is
looked at once. --untrained repeats all of it with random weights: the control a pretraining has to
beat. The encoder is one of this project's exports, any folder or hub id that medvlp convert reads,
or a run. Of a run, or an export in its folder, splits are those of the fold that it was trained on.

Writes OUT/results.json after every seed, of the seeds so far, OUT/TASK.png and
OUT/seed_N/metrics.jsonl; finetune also OUT/seed_N/predictions.csv, which medvlp compare reads, and
--save the weights. Prints a table. OUT is of one command: numbers of another in it are replaced,
which is said; a run folder and saved weights are refused.
"""

import argparse
import itertools
import pathlib
from collections.abc import Sequence

from medvlp_jax import assemble, backbones, cases, cli, distributed, ground, origins, tuned
from medvlp_jax.config import UserError
from medvlp_jax.data import regions
from medvlp_jax.evaluation import adaptation, paired, provenance, tasks
from medvlp_jax.evaluation.results import results_table
from medvlp_jax.heads import Job

DEFAULTS = adaptation.Settings()


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    top = argparse.ArgumentParser(
        "medvlp adapt", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--task", required=True, choices=list(tasks.TASKS))
    top.add_argument("--encoder", help="Hugging Face folder or hub id, such as EXPORT/image")
    top.add_argument("--run", type=pathlib.Path, help="run folder, instead of --encoder")
    top.add_argument("--corpus", required=True, help="NAME or NAME:VARIANT, see medvlp data list")
    top.add_argument("--out", required=True, type=pathlib.Path, help="where the results go")
    data = top.add_argument_group("data")
    data.add_argument("--manual-dir", default="", help="your files, for a corpus not yet prepared")
    data.add_argument("--data-dir", default="", help="prepared corpora; default $MEDVLP_DATA_DIR")
    data.add_argument("--split", default="", help="to score; default test, else validation")
    data.add_argument("--fraction", type=float, default=1.0, help="of the training patients")
    data.add_argument("--seeds", default="0", help="comma-separated; report three or more")
    data.add_argument("--size", type=int, default=0, help="pixels a side; default the encoder's")
    data.add_argument("--fit", default="squash", choices=("squash", "pad"), help="into the square")
    data.add_argument(
        "--stretch",
        action=argparse.BooleanOptionalAction,
        help="darkest pixel to 0, brightest to 255; default as in the run that the encoder is of, "
        "of others no",
    )
    target = top.add_argument_group("what to find")
    target.add_argument("--labels", default="", help="finetune: label task; default the first")
    target.add_argument("--regions", default="", help="segment: a,b or the union a+b; default all")
    target.add_argument("--classes", default="", help="detect: categories of boxes; default all")
    target.add_argument(
        "--annotated-only",
        action="store_true",
        help="detect: leave images without a box out; for corpora where not all were looked at",
    )
    how = top.add_argument_group("training")
    how.add_argument("--train-encoder", action="store_true", help="segment, detect: train it, too")
    how.add_argument("--untrained", action="store_true", help="control: random encoder weights")
    how.add_argument("--width", type=int, default=0, help="of decoder or heads; default published")
    how.add_argument("--steps", type=int, default=DEFAULTS.steps, help="at most; for any fraction")
    how.add_argument("--batch-size", type=int, default=DEFAULTS.batch_size)
    how.add_argument("--lr", type=float, help="highest learning rate; default the task's")
    how.add_argument(
        "--encoder-lr",
        type=float,
        help="share of it for an encoder that is trained; default 0.1, with --untrained 1",
    )
    how.add_argument("--evaluate-every", type=int, default=DEFAULTS.evaluate_every)
    how.add_argument("--patience", type=int, default=DEFAULTS.patience, help="looks without gain")
    how.add_argument("--resamples", type=int, default=2000, help="of the bootstrap over patients")
    how.add_argument(
        "--save",
        action="store_true",
        help="keep OUT/seed_N/head.safetensors, and OUT/seed_N/encoder if that is trained",
    )
    for action in (a for a in how._actions if not a.help):
        action.help = "default %(default)s"
    return top


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Raises:
      UserError: for bad input, before anything is compiled.
    """
    options = parser().parse_args(argv)
    seeds = _check(options)
    code = provenance.code()
    distributed.initialize()
    backbone = (
        backbones.of_run(options.run) if options.run else backbones.of_folder(options.encoder)
    )
    origin = origins.find(options.run, options.encoder)
    for sentence in origins.said(
        origin, options.corpus, "" if options.untrained else backbone.source
    ):
        distributed.say(f"medvlp: {sentence}")
    where = {"data_dir": options.data_dir, "manual_dir": options.manual_dir}
    train, test = origins.open_splits(options.corpus, options.split, origin, **where)
    channels = regions.channels_of(itertools.chain(train, test))
    task = tasks.TASKS[options.task](
        train,
        frame_of(options, backbone.size, channels, origin),
        labels=options.labels,
        scored=test,
        names=_listed(options.regions if options.task == "segment" else options.classes),
        width=options.width,
        category=lambda phrase: ground.category_of(phrase, train.tasks),
        annotated_only=options.annotated_only,
    )
    settings = settings_of(options, task)
    job = Job(backbone, task, train, test, settings, options, origin, code)
    cases.say_replaced(options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        job.run(seed)
    distributed.say(results_table(job.results()))


def frame_of(
    options: argparse.Namespace, size: int, channels: int, origin: origins.Origin
) -> regions.Frame:
    """Return how images become squares.

    Contrast is stretched where the run of the encoder did so. Of another encoder that is not known:
    it is left as it is, as `medvlp evaluate --encoder` does.

    Args:
      options: of the command line.
      size: pixels a side that the encoder was trained on.
      channels: of the corpus.
      origin: of the encoder.
    """
    stretch = origin.data.get("stretch", False) if options.stretch is None else options.stretch
    return regions.Frame(options.size or size, channels, fit=options.fit, stretch=stretch)


def settings_of(options: argparse.Namespace, task: tasks.Task) -> adaptation.Settings:
    """Return how the task is trained.

    Random weights that are trained move as fast as their head: at a tenth of its rate they would be
    a control that is easy to beat.

    Args:
      options: of the command line.
      task: what is trained.

    Raises:
      UserError: for a number that cannot be, or --encoder-lr of an encoder that is frozen.
    """
    trains = task.train_encoder or options.train_encoder
    if options.encoder_lr is not None and not trains:
        raise UserError("--encoder-lr goes with --train-encoder: here the encoder is frozen.")
    share = options.encoder_lr
    if share is None:
        share = 1.0 if trains and options.untrained else adaptation.Settings().encoder_lr
    settings = adaptation.Settings(
        options.steps,
        options.batch_size,
        task.lr if options.lr is None else options.lr,
        encoder_lr=share,
        evaluate_every=options.evaluate_every,
        patience=options.patience,
    )
    settings.check()
    return settings


def _check(options) -> list[int]:
    """Return the seeds; refuse what needs no data to be seen as wrong."""
    if (options.encoder is None) == (options.run is None):
        raise UserError("Name the encoder by one of --encoder FOLDER_OR_HUB_ID and --run RUN.")
    seeds = options.seeds.split(",")
    if not all(seed.isascii() and seed.isdecimal() for seed in seeds):
        raise UserError(f"--seeds={options.seeds}; accepted are whole numbers, such as 0,1,2.")
    if not 0 < options.fraction <= 1:
        raise UserError(f"--fraction={options.fraction}; accepted is a share in (0, 1], as 0.1.")
    for name, least in (("size", 0), ("width", 0), ("resamples", 0)):
        if getattr(options, name) < least:
            raise UserError(f"--{name}={getattr(options, name)}; accepted is {least} or more.")
    of = {"labels": "finetune", "regions": "segment", "classes": "detect"}
    of |= {"annotated_only": "detect"}
    for name, task in of.items():
        if getattr(options, name) and options.task != task:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} goes with --task {task}, not with {options.task}.")
    if options.train_encoder and options.task == "finetune":
        raise UserError("--task finetune trains the encoder anyway; leave --train-encoder out.")
    _check_out(options.out)
    return [*dict.fromkeys(map(int, seeds))]


def _check_out(out: pathlib.Path) -> None:
    """Refuse a folder whose results are not this command's to replace.

    Raises:
      UserError: for a file, a run folder, and weights that an earlier command saved.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out} is a file; accepted is a folder, or a new name.")
    if (out / assemble.CONFIG).exists():
        raise UserError(f"{out} is a run folder; name another for --out.")
    if kept := [seed for seed in paired.seeds(out) if (seed / tuned.HEAD).exists()]:
        raise UserError(
            f"{kept[0]} holds weights that were saved; name another --out, or delete that folder."
        )


def _listed(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


if __name__ == "__main__":
    cli.leave(cli.run(main))
