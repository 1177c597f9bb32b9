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
or a run.

Writes OUT/results.json, OUT/TASK.png and OUT/seed_N/metrics.jsonl, and prints a table.
"""

import argparse
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from medvlp_jax import backbones, cli, distributed, ground, sharding
from medvlp_jax.config import UserError, nearest
from medvlp_jax.data import corpora, leakage, pipeline, regions
from medvlp_jax.evaluation import adaptation, features, probe, provenance, tasks
from medvlp_jax.evaluation.results import Results, renamed, results_table, write_results
from medvlp_jax.training.step import make_embed

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
    _warn(backbone, options.corpus)
    train, test = _open(options)
    size = options.size or backbone.size
    channels = regions.channels_of(train[0])
    task = tasks.TASKS[options.task](
        train,
        regions.Frame(size, channels, fit=options.fit),
        labels=options.labels,
        names=_listed(options.regions if options.task == "segment" else options.classes),
        width=options.width,
        category=lambda phrase: ground.category_of(phrase, train.tasks),
        annotated_only=options.annotated_only,
    )
    settings = settings_of(options, task)
    job = Job(backbone, task, train, test, settings, options)
    options.out.mkdir(parents=True, exist_ok=True)
    results = adaptation.over_seeds([job.run(seed) for seed in seeds])
    if options.untrained:
        results = renamed(results, "untrained")
    if distributed.is_writer():
        write_results(results, options.out, job.provenance(code, seeds))
        print(results_table(results))


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


class Job:
    """One encoder, one task, one corpus; several seeds."""

    def __init__(
        self,
        backbone: backbones.Backbone,
        task: tasks.Task,
        train: corpora.Source,
        test: corpora.Source,
        settings: adaptation.Settings,
        options: argparse.Namespace,
    ):
        """Find the rows with a target; compile nothing.

        Raises:
          UserError: where a split has none.
        """
        self.backbone, self.task, self.source = backbone, task, train
        self.settings, self.options = settings, options
        self.train_encoder = task.train_encoder or options.train_encoder
        self.recipe = adaptation.Adapted(
            backbone.module, task.head, self.train_encoder, backbone.mean, backbone.std
        )
        self.mesh = sharding.make_mesh()
        self.part = sharding.part_of(self.mesh)
        self.rows, self.patients = tasks.scan(task, train)
        rows, _ = tasks.scan(task, test)
        for split, found in ((train.split, self.rows), (test.split, rows)):
            if not len(found):
                raise UserError(
                    f"{train.name} has nothing to {task.name} in {split}; another corpus, region "
                    "or label task is needed."
                )
        self.test, self.test_split = regions.Prepared(test, rows, task.prepare), test.split
        names = ("image_id", "patient_id", "labels", "boxes")  # without images, which are large
        records = [{k: r[k] for k in names if k in r} for r in map(test.__getitem__, rows)]
        self.seen = task.seen(records)
        self.predict = make_embed(self.recipe, self.mesh, "predict")
        self.encode = make_embed(self.recipe, self.mesh)
        self.is_drawn = False

    def run(self, seed: int) -> Results:
        """Train with a seed and score the test split."""
        rows = probe.take_patients(self.patients, self.options.fraction, seed=seed)
        split = probe.validation_split(self.patients[rows], seed=seed)
        fitting, held = (
            regions.Prepared(self.source, self.rows[rows[part]], self.task.prepare)
            for part in split
        )
        if not len(fitting):
            raise UserError(f"{self.source.name} has too few patients to hold some of them out.")
        given = None if self.options.untrained else self.backbone.variables
        variables = adaptation.initial(self.recipe, given, fitting[0], seed)
        fitted = adaptation.fit(
            self.recipe,
            variables,
            iter(self._batches(fitting, seed)),
            validate=lambda variables: self.task.value(self._look(variables, held)),
            settings=self.settings,
            seed=seed,
            mesh=self.mesh,
            folder=self.options.out / f"seed_{seed}",
        )
        best = sharding.place(fitted.variables, sharding.shardings(fitted.variables, self.mesh))
        found = self._look(best, self.test, progress="test")
        if not self.is_drawn:
            self._draw(best, found)
        return self.task.results(found, fitting, self.test, **self._options(fitted, split, seed))

    def provenance(self, code: Mapping, seeds: Sequence[int]) -> dict[str, Any]:
        """Return where the results come from; the weights are those the training began with."""
        asked = {key: str(value) for key, value in vars(self.options).items()}
        return provenance.of(
            asked | {"seed": list(seeds)},
            code=code,
            evals=self.settings._asdict(),
            rows={"corpus": self.options.corpus, "split": self.test_split, **self.seen},
            variables=self.backbone.variables,
        )

    def _options(self, fitted, split, seed) -> dict[str, Any]:
        # None is the default, of random weights another than of others: one hash for both.
        how = self.settings._asdict() | {"encoder_lr": self.options.encoder_lr}
        where = {"corpus": self.options.corpus, "split": self.test_split}
        seen = {"size": self.task.frame.size, "fit": self.task.frame.fit}
        seen |= {"annotated_only": True} if self.options.annotated_only else {}
        notes = {
            "encoder": self.backbone.description() | {"untrained": self.options.untrained},
            "encoder_lr": self.settings.encoder_lr,
            "seed": seed,
            "train_rows": len(split.fit),
            "validation_rows": len(split.validation),
            "best_step": fitted.step,
            "steps": fitted.steps,
            "validation": fitted.value,
        }
        return {
            "fraction": self.options.fraction,
            "train_encoder": self.train_encoder,
            "settings": where | seen | {"width": self.options.width} | how,
            "notes": notes,
            "resamples": self.options.resamples,
        }

    def _batches(self, examples, seed):
        return pipeline.train_dataset(
            [examples],
            transform=self.task.move,
            batch_size=self.settings.batch_size,
            seed=seed,
            process_index=self.part.index,
            process_count=self.part.count,
        )

    def _look(self, variables: Mapping, examples, progress: str = "") -> features.Features:
        batches = pipeline.eval_batches(
            examples,
            transform=lambda example, _: example,
            batch_size=_multiple(self.settings.batch_size, self.mesh),
            process_index=self.part.index,
            process_count=self.part.count,
        )
        embed = lambda batch: self.predict(variables, batch)
        return features.extract(embed, batches, progress=progress, part=self.part)

    def _draw(self, variables: Mapping, found: Mapping) -> None:
        rows = tasks.shown(self.test, self.task)
        examples = [self.test[row] for row in rows]
        outputs: dict[str, Any] = {"found": {k: v[rows] for k, v in found.items()}}
        if self.task.name == "segment" and self.part.count == 1:
            padded = [*examples, *[examples[0]] * (_multiple(len(rows), self.mesh) - len(rows))]
            batch = {"image": np.stack([example["image"] for example in padded])}
            outputs |= self.encode(variables, batch)
        if distributed.is_writer() and self.part.count == 1:
            self.task.draw(examples, outputs, self.options.out / f"{self.task.name}.png")
        self.is_drawn = True


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
    return [*dict.fromkeys(map(int, seeds))]


def _open(options) -> tuple[corpora.Source, corpora.Source]:
    name, _, variant = options.corpus.partition(":")
    where = {"data_dir": options.data_dir, "manual_dir": options.manual_dir}
    with distributed.writer_first(f"corpus {name}"):
        sources = corpora.open_all(name, builder_config=variant, **where)
    by_split = {source.split: source for source in sources if len(source)}
    split = options.split or ("test" if "test" in by_split else "validation")
    for wanted in ("train", split):
        if wanted not in by_split:
            raise UserError(f"{name} has no split '{wanted}'. {nearest(wanted, [*by_split])}")
    if split == "train":
        raise UserError("--split train is what is learnt from; accepted are the other splits.")
    return by_split["train"], by_split[split]


def _warn(backbone, corpus: str) -> None:
    if said := leakage.warning(backbone.corpora, corpus):
        distributed.say(f"medvlp: {said}")


def _listed(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _multiple(count: int, mesh: jax.sharding.Mesh) -> int:
    """Return the smallest number from `count` on that the devices divide."""
    pieces = sharding.batch_devices(mesh)
    return -(-count // pieces) * pieces


if __name__ == "__main__":
    cli.leave(cli.run(main))
