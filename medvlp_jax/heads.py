"""The trainings of `medvlp adapt`: one encoder, one task, one corpus, several seeds."""

import argparse
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from medvlp_jax import backbones, cases, distributed, origins, sharding, tuned
from medvlp_jax.config import UserError
from medvlp_jax.data import corpora, leakage, pipeline, regions
from medvlp_jax.evaluation import adaptation, features, paired, probe, provenance, tasks
from medvlp_jax.evaluation.results import Results, renamed, write_results
from medvlp_jax.training.step import make_embed


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
        origin: origins.Origin,
        code: Mapping,
    ):
        """Find the rows with a target; compile nothing.

        Raises:
          UserError: where a split has none, or the encoder is to be saved and cannot be.
        """
        self.backbone, self.task, self.source = backbone, task, train
        self.settings, self.options = settings, options
        self.origin, self.code = origin, code
        self.train_encoder = task.train_encoder or options.train_encoder
        if options.save and self.train_encoder:
            tuned.check(backbone.module, backbone.variables)
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
        self.fold = origin.fold_of(options.corpus)
        self.torn = leakage.torn_patients(test, dealt=self.fold)
        if sentence := leakage.torn(options.corpus, self.torn):
            distributed.say(f"medvlp: {sentence}")
        self.seen = task.seen(records) | ({"torn_patients": self.torn} if self.torn else {})
        self.predict = make_embed(self.recipe, self.mesh, "predict")
        self.encode = make_embed(self.recipe, self.mesh)
        self.done: dict[int, Results] = {}  # by seed
        self.starts: dict[int, str] = {}  # hashes of the encoders they began with

    def run(self, seed: int) -> None:
        """Train with a seed, score the test split, and write what is known so far."""
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
        self.starts[seed] = self._start(variables)
        options = self._options(fitted, split, seed)
        options["notes"]["encoder"] = self._encoder(seed)
        self.done[seed] = self.task.results(found, fitting, self.test, **options)
        self._write(seed, fitted.variables, found)
        if len(self.done) == 1:
            self._draw(best, found)

    def results(self) -> Results:
        """Return the numbers, of several seeds their means."""
        merged = adaptation.over_seeds([*self.done.values()])
        return renamed(merged, "untrained") if self.options.untrained else merged

    def provenance(self) -> dict[str, Any]:
        """Return where the results come from; the weights are those the trainings began with."""
        asked = {key: str(value) for key, value in vars(self.options).items()}
        found = provenance.of(
            asked | {"seed": [*self.done]},
            code=self.code,
            evals=self.settings._asdict(),
            rows={"corpus": self.options.corpus, "split": self.test_split, **self.seen},
            variables={},
        )
        return found | {"weights": ", ".join(dict.fromkeys(self.starts.values()))}

    def _write(self, seed: int, variables: Mapping, found: Mapping) -> None:
        """Write results of the seeds so far; of this one predictions, and weights if asked for."""
        out = self.options.out
        folder = out / f"seed_{seed}"
        if distributed.is_writer():
            if len(self.done) == 1:  # what another command left beside the numbers it wrote
                cases.clear(out)
            write_results(self.results(), out, self.provenance())
            self.task.write(found, folder / paired.FILE)
        if self.options.save:
            frame = self.task.frame
            about = {"task": self.task.name, **self.task.describe(), "began": self._encoder(seed)}
            about |= {"mean": self.recipe.mean, "std": self.recipe.std, **frame._asdict()}
            tuned.save(self.recipe, variables, folder, frame.size, about)

    def _start(self, variables: Mapping) -> str:
        """Return the hash of the encoder that a training begins with."""
        if not self.options.untrained:
            return provenance.weights_hash(self.backbone.variables)
        own = {kind: tree["encoder"] for kind, tree in variables.items() if "encoder" in tree}
        return provenance.weights_hash(own)

    def _encoder(self, seed: int) -> dict[str, Any]:
        """Return what results say of the encoder; its corpora where they are known."""
        said = self.backbone.description() | {"weights": self.starts[seed]}
        said |= {"untrained": self.options.untrained}
        if self.origin.run and not self.options.untrained:
            said |= {"corpora": list(self.origin.corpora)}
        return said

    def _options(self, fitted, split, seed) -> dict[str, Any]:
        # None is the default, of random weights another than of others: one hash for both.
        how = self.settings._asdict() | {"encoder_lr": self.options.encoder_lr}
        where = {"corpus": self.options.corpus, "split": self.test_split}
        seen = {"size": self.task.frame.size, "fit": self.task.frame.fit}
        seen |= {"annotated_only": True} if self.options.annotated_only else {}
        # Until it could be left out all images were stretched: their hash is the one of then.
        seen |= {} if self.task.frame.stretch else {"stretch": False}
        notes = {
            "encoder_lr": self.settings.encoder_lr,
            "stretch": self.task.frame.stretch,
            "seed": seed,
            "train_rows": len(split.fit),
            "validation_rows": len(split.validation),
            "best_step": fitted.step,
            "steps": fitted.steps,
            "validation": fitted.value,
        }
        notes |= {"fold": self.fold} if self.fold else {}
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


def _multiple(count: int, mesh: jax.sharding.Mesh) -> int:
    """Return the smallest number from `count` on that the devices divide."""
    pieces = sharding.batch_devices(mesh)
    return -(-count // pieces) * pieces
