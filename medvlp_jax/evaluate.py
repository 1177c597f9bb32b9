"""Evaluate a run: zero-shot classification, retrieval, linear probe, a classifier's own logits.

  medvlp evaluate --run RUN_DIR [--protocol zero_shot,retrieval,probe] [--corpus NAME]

Prints a table and writes RUN_DIR/results.json; the same functions serve the evaluations during and
after training.
"""

import argparse
import functools
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from medvlp_jax import assemble, cli, distributed, sharding, tables
from medvlp_jax.config import UserError, nearest
from medvlp_jax.data import datasets, leakage, pipeline
from medvlp_jax.data import text as tokenisation
from medvlp_jax.evaluation import baselines, classify, probe, retrieval, zero_shot
from medvlp_jax.evaluation import features as extraction
from medvlp_jax.evaluation.results import Results, results_table
from medvlp_jax.training.step import make_embed
from medvlp_jax.training.stopping import Signals, Stopped

PROTOCOLS = ("zero_shot", "retrieval", "probe", "classify")
CONTROLS = ("untrained", "masked_edge", "regression")
VIEWS = (1, 4, 8)
PROMPT_BATCH = 64


class Evaluator:
    """Holds what several evaluations of one run share: compiled encoder, corpus, prompts."""

    def __init__(
        self, parts: assemble.Parts, settings: Mapping[str, Any], stop: Signals | None = None
    ):
        """Open the corpus.

        Args:
          parts: of the run.
          settings: config.evals.
          stop: notices signals.

        Raises:
          UserError: for an unknown protocol, control, corpus, split or prompt file.
        """
        for kind, known in (("protocol", PROTOCOLS), ("control", CONTROLS)):
            for name in settings[f"{kind}s"]:
                if name not in known:
                    raise UserError(f"No {kind} '{name}'. {nearest(name, known)}")
        if settings["views"] not in VIEWS:
            raise UserError(f"evals.views={settings['views']} must be one of {VIEWS}.")
        self.parts, self.settings = parts, settings
        self.stop = stop or Signals()
        self._embed = make_embed(parts.recipe, parts.mesh)
        self.corpus = settings["corpus"] or parts.config["data"]["corpora"][0]
        self.source = assemble.open_corpus(self.corpus, parts.config["data"], settings["split"])
        said = leakage.warning(parts.config["data"]["corpora"], self.corpus)
        if said:
            distributed.say(f"medvlp: {said}")
        needed = "zero_shot" in settings["protocols"]
        self.prompts = _read_prompts(settings["prompts"], self.corpus, needed)
        self._check_protocols()

    def _check_protocols(self):
        """Refuse protocols the recipe has no features for, and classes it does not have."""
        recipe = self.parts.recipe
        fitting = [*(("zero_shot", "retrieval") if recipe.spaces else ())]
        fitting += ["probe"] if self._images() else []
        fitting += ["classify"] if hasattr(recipe, "task") else []
        for name in self.settings["protocols"]:
            if name not in fitting:
                raise UserError(
                    f"Protocol {name} does not fit recipe {self.parts.config['recipe']['name']}; "
                    f"accepted are {', '.join(fitting)}."
                )
        if not hasattr(recipe, "task"):
            if "regression" in self.settings["controls"] or self.settings["views"] > 1:
                raise UserError(
                    f"evals.views and the control regression are for classifiers; recipe "
                    f"{self.parts.config['recipe']['name']} is none."
                )
            return
        if {"classify", "regression"} & {*self.settings["protocols"], *self.settings["controls"]}:
            tasks = self.source.tasks
            if recipe.task not in tasks:
                raise UserError(
                    f"{self.corpus} has no task '{recipe.task}'. "
                    f"{nearest(recipe.task, list(tasks))}"
                )
            positive = self.settings["positive"]
            if positive and positive not in tasks[recipe.task]:
                raise UserError(
                    f"evals.positive: no class '{positive}' in task {recipe.task}. "
                    f"{nearest(positive, list(tasks[recipe.task]))}"
                )
            if len(tasks[recipe.task]) != recipe.num_classes:
                raise UserError(
                    f"recipe.num_classes={recipe.num_classes}, but task {recipe.task} of "
                    f"{self.corpus} has {len(tasks[recipe.task])} classes."
                )

    def embed(self, variables: Mapping, batch: Mapping) -> dict:
        """Return features of this process's rows.

        Raises:
          Stopped: in all processes, when one of them was asked to stop.
        """
        if distributed.any_process(lambda: self.stop.asked, self.parts.mesh)():
            raise Stopped
        return self._embed(variables, batch)

    def run(self, variables: Mapping, *, mask=None, progress="") -> Results:
        """Run every protocol of the settings.

        Args:
          variables: of the recipe.
          mask: share of the lower image edge to blacken; None takes data.mask_lower_edge.
          progress: title of the bar; "" is silent.
        """
        # Once, should they be on the host; and always laid out alike, so that numbers repeat.
        variables = assemble.place(variables, self.parts)
        options = {"mask": mask, "resamples": self.settings["resamples"]}
        views = self.settings["views"]
        found = self.features(
            variables,
            self.source,
            limit=self.settings["limit"],
            mask=mask,
            views=views,
            progress=progress,
        )
        results: Results = {}
        for name in self.settings["protocols"]:
            results |= getattr(self, f"_{name}")(variables, found, **options)
        return results

    def quick(self, variables: Mapping, *, limit: int) -> Results:
        """Run what is cheap enough during training: no probe, no intervals, `limit` examples."""
        found = self.features(variables, self.source, limit=limit)
        results: Results = {}
        for name in self.settings["protocols"]:
            if name != "probe":
                results |= getattr(self, f"_{name}")(variables, found, mask=None, resamples=0)
        return results

    def features(
        self, variables, source, *, inputs=(), limit=0, mask=None, views=1, progress=""
    ) -> extraction.Features:
        """Embed a corpus: features, labels and ids as NumPy arrays [N, ...].

        Args:
          variables: of the recipe.
          source: corpus to embed.
          inputs: batch keys to encode; () takes the image and every section.
          limit: only the first examples; 0 takes all.
          mask: share of the lower image edge to blacken; None takes data.mask_lower_edge.
          views: flips and turns of the image over which class probabilities are averaged.
          progress: title of the bar; "" is silent.
        """
        inputs = inputs or self._inputs()
        embed = lambda batch: self.embed(variables, {k: batch[k] for k in inputs})
        if views > 1:
            images = self._images()
            embed = functools.partial(extraction.averaged, embed, images=images, views=views)
        batches = self._batches(source, inputs, limit, mask)
        progress = progress if distributed.is_writer() else ""
        return extraction.extract(embed, batches, progress=progress, part=self.parts.part)

    def raw_features(self, source, *, limit=0) -> extraction.Features:
        """Return what regressions on the raw input see of a corpus, see evaluation/baselines.py."""
        embed = lambda batch: baselines.raw_features(batch, self._images())
        batches = self._batches(source, self._inputs(), limit, None)
        return extraction.extract(embed, batches, part=self.parts.part)

    def _batches(self, source, inputs, limit, mask):
        reads_table = "tabular" in inputs
        table = tables.rows_of(self.parts.config["data"], [source]) if reads_table else None
        return pipeline.eval_batches(
            source,
            transform=assemble.record_transform(
                self.parts, inputs, train=False, table=table, images=source.images, mask=mask
            ),
            batch_size=self.multiple_of_devices(self.settings["batch_size"]),
            limit=limit,
            process_index=self.parts.part.index,
            process_count=self.parts.part.count,
        )

    def embed_texts(self, variables) -> Callable[[list[str], str], np.ndarray]:
        """Return (texts, section) -> embeddings [n, E] in the space of the section."""
        spaces, part = self.parts.recipe.spaces, self.parts.part
        size = self.multiple_of_devices(PROMPT_BATCH)
        own = slice(part.index * size // part.count, (part.index + 1) * size // part.count)

        def embed(texts, section):
            key = section if section in spaces else next(iter(spaces))
            length = self.parts.config["data"]["text_length"]
            rows = []
            for start in range(0, len(texts), size):
                filled = [*texts[start : start + size]]
                filled += [""] * (size - len(filled))
                tokens = tokenisation.tokenize(self.parts.tokenizer, filled[own], length)
                rows.append(self.embed(variables, {key: tokens})[spaces[key][1]])
            whole = np.moveaxis(distributed.gather_parts(np.stack(rows), part), 0, 1)
            return whole.reshape(-1, whole.shape[-1])[: len(texts)]

        return embed

    def joint(self, found) -> tuple[np.ndarray, np.ndarray]:
        """Return image and text features of all sections together, see features.joint."""
        spaces = self.parts.recipe.spaces
        valid = np.stack([found[f"{section}_valid"] for section in spaces], axis=1)
        image = extraction.joint(found, [image for image, _ in spaces.values()])
        return image, extraction.joint(found, [text for _, text in spaces.values()], valid)

    def _inputs(self) -> tuple[str, ...]:
        """Return what a full evaluation encodes: image and sections, or all a classifier reads."""
        recipe = self.parts.recipe
        if recipe.spaces:
            return ("image", *recipe.spaces)
        return tuple(key for key in recipe.inputs if not key.startswith("label/"))

    def _images(self) -> tuple[str, ...]:
        """Return the batch keys of images among them."""
        return tuple(
            key for key in self._inputs() if key not in (*self.parts.recipe.spaces, "tabular")
        )

    def multiple_of_devices(self, size: int) -> int:
        """Return the smallest batch of at least `size` that the devices divide."""
        pieces = sharding.batch_devices(self.parts.mesh)
        return -(-size // pieces) * pieces

    def _zero_shot(self, variables, found, *, mask, **options):
        del mask
        results = {}
        for task in self.prompts["tasks"]:
            classes = self.source.tasks.get(task)
            if classes is None:
                continue
            prompts = zero_shot.prompt_texts(self.prompts, task, classes)
            spaces = self.parts.recipe.spaces
            image = spaces.get(prompts.section, next(iter(spaces.values())))[0]
            embedded = zero_shot.embed_prompts(prompts, self.embed_texts(variables))
            results |= zero_shot.run(
                found[image],
                found[f"label/{task}"],
                embedded,
                task=task,
                groups=found["patient_id"],
                **options,
            )
        return results

    def _retrieval(self, variables, found, *, mask, **options):
        del variables, mask
        image, text = self.joint(found)
        task = self.settings["class_task"] or next(iter(self.source.tasks))
        return retrieval.run(
            image,
            text,
            found["text_id"],
            labels=found[f"label/{task}"],
            groups=found["patient_id"],
            **options,
        )

    def _classify(self, variables, found, *, mask, **options):
        del variables, mask
        task = self.parts.recipe.task
        return classify.run(
            found["logits"],
            found[f"label/{task}"],
            self.source.tasks[task],
            task=task,
            multi_label=False,
            views=self.settings["views"],
            groups=found["patient_id"],
            **self.positive(),
            **options,
        )

    def positive(self) -> dict[str, str]:
        """Return the option that names the positive class; none where there is none."""
        return {"positive": self.settings["positive"]} if self.settings["positive"] else {}

    def regression(self) -> Results:
        """Score logistic regressions on the raw input the recipe reads, with the same intervals."""
        task = self.parts.recipe.task
        train = assemble.open_corpus(self.corpus, self.parts.config["data"], "train")
        test = self.raw_features(self.source, limit=self.settings["limit"])
        return baselines.results(
            baselines.scores(
                self.raw_features(train, limit=self.settings["probe_limit"]), test, task=task
            ),
            test,
            task=task,
            classes=self.source.tasks[task],
            resamples=self.settings["resamples"],
            **self.positive(),
        )

    def _probe(self, variables, found, *, mask, **options):
        train = assemble.open_corpus(self.corpus, self.parts.config["data"], "train")
        fitted = self.features(
            variables,
            train,
            inputs=self._images(),
            limit=self.settings["probe_limit"],
            mask=mask,
            progress="probe",
        )
        results = {}
        for task, classes in self.source.tasks.items():
            multi_label = self.prompts["tasks"].get(task, {}).get("multi_label", False)
            results |= probe.run(
                fitted["image_pooled"],
                fitted[f"label/{task}"],
                found["image_pooled"],
                found[f"label/{task}"],
                classes=classes,
                task=task,
                multi_label=multi_label,
                seed=0,
                train_groups=fitted["patient_id"],
                test_groups=found["patient_id"],
                **options,
            )
        return results


def rename(results: Results, variant: str) -> Results:
    """Mark the task of every key: "zero_shot/organ/x" -> "zero_shot/organ (variant)/x"."""
    split = [(*key.split("/", 2), entry) for key, entry in results.items()]
    return {f"{a}/{task} ({variant})/{c}": entry for a, task, c, entry in split}


def full(evaluator: Evaluator, variables: Mapping, untrained: Mapping | None = None) -> Results:
    """Run the protocols and the controls of the settings.

    Args:
      evaluator: of the run.
      variables: trained.
      untrained: freshly initialised ones for the control "untrained"; None leaves it out.
    """
    controls = evaluator.settings["controls"]
    results = evaluator.run(variables, progress="evaluation")
    if "masked_edge" in controls:
        fraction = evaluator.settings["masked_edge"]
        masked = evaluator.run(variables, mask=fraction, progress="lower edge masked")
        results |= rename(masked, f"lower {fraction:.0%} masked")
    if "untrained" in controls and untrained is not None:
        results |= rename(evaluator.run(untrained, progress="untrained control"), "untrained")
    if "regression" in controls:
        results |= evaluator.regression()
    return results


def write_results(results: Results, folder: pathlib.Path) -> None:
    """Write results.json under a temporary name, then rename."""
    file = pathlib.Path(folder) / "results.json"
    scratch = file.with_suffix(".tmp")
    scratch.write_text(json.dumps(results, indent=1, allow_nan=False))
    os.replace(scratch, file)


def scalars(results: Results) -> dict[str, float]:
    """Return the numbers worth a line in metrics.jsonl: no per-class rows, no intervals."""
    return {
        key: entry["value"]
        for key, entry in results.items()
        if entry.get("value") is not None and key.count("/") == 2
    }


def _read_prompts(path: str, corpus: str, needed: bool) -> dict:
    """Read a prompt file; "" takes the corpus' own, without which there is no zero-shot."""
    name = corpus.partition(":")[0]
    file = pathlib.Path(path or pathlib.Path(datasets.__path__[0]) / name / "prompts.json")
    if not (path or needed or file.is_file()):
        return {"tasks": {}}
    if not file.is_file():
        raise UserError(f"No prompt file {file}; set evals.prompts to one.")
    return json.loads(file.read_text())


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    top = argparse.ArgumentParser(
        "medvlp evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--run", required=True, type=pathlib.Path, help="run folder")
    top.add_argument("--protocol", help=f"comma-separated, of {', '.join(PROTOCOLS)}")
    top.add_argument("--corpus", help="another corpus than the run's: NAME or NAME:VARIANT")
    top.add_argument("--split", help="test, validation or train")
    top.add_argument("--prompts", help="a prompt file instead of the corpus' own")
    top.add_argument("--limit", type=int, help="only the first examples")
    top.add_argument("--views", type=int, help="flips and turns to average over: 1, 4, 8")
    top.add_argument("--out", type=pathlib.Path, help="where results.json goes; default: the run")
    return top


def main(argv: list[str] | None = None) -> None:
    """Evaluate the newest checkpoint of a run.

    Raises:
      UserError: for bad input.
    """
    arguments = parser().parse_args(argv)
    config = assemble.read_config(arguments.run)
    settings = dict(config["evals"])
    given = {k: getattr(arguments, k) for k in ("corpus", "split", "prompts", "limit", "views")}
    settings |= {k: v for k, v in given.items() if v is not None}
    if arguments.protocol:
        settings["protocols"] = tuple(arguments.protocol.split(","))
    # The untrained control starts where the run started: with the weights it was given.
    distributed.initialize()
    parts = assemble.parts(config, pretrained="untrained" in settings["controls"])
    evaluator = Evaluator(parts, settings)
    untrained = assemble.initial_variables(parts)
    variables = assemble.read_variables(arguments.run, untrained)
    results = full(evaluator, variables, untrained)
    out = arguments.out or arguments.run
    if distributed.is_writer():
        out.mkdir(parents=True, exist_ok=True)
        write_results(results, out)
        print(results_table(results))


if __name__ == "__main__":
    cli.leave(cli.run(main))
