"""Protocols and controls on a run: what `medvlp evaluate` and the evaluations of training share."""

import pathlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from medvlp_jax import assemble, controls, distributed, ground
from medvlp_jax.config import UserError, nearest
from medvlp_jax.data import datasets, leakage
from medvlp_jax.embedder import Embedder
from medvlp_jax.evaluation import (
    baselines,
    classify,
    flavours,
    masked_tokens,
    probe,
    prompts,
    provenance,
    retrieval,
    retrieval_legacy,
    scoring,
    shuffle,
    thresholds,
    zero_shot,
)
from medvlp_jax.evaluation.results import Results
from medvlp_jax.recipes import mlm
from medvlp_jax.recipes.base import classifies
from medvlp_jax.training.stopping import Signals

PROTOCOLS = ("zero_shot", "retrieval", "grounding", "probe", "classify", "classify_studies")
PROTOCOLS += ("masked_tokens",)
CLASSIFIES = ("classify", "classify_studies")
VIEWS = (1, 4, 8)


class Evaluator(Embedder):
    """An encoder with a corpus and prompts: what several evaluations of one run share."""

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
        settings = {**settings, "protocols": flavours.normalise(settings["protocols"], PROTOCOLS)}
        for name in settings["controls"]:
            if name not in controls.NAMES:
                raise UserError(f"No control '{name}'. {nearest(name, controls.NAMES)}")
        thresholds.check(settings["zero_shot"]["threshold"])
        probe.check_fractions(**settings["probe"])
        if settings["views"] not in VIEWS:
            raise UserError(f"evals.views={settings['views']} must be one of {VIEWS}.")
        super().__init__(parts, settings["batch_size"], stop)
        self.settings = settings
        self.corpus = settings["corpus"] or parts.config["data"]["corpora"][0]
        said = leakage.warning(parts.config["data"]["corpora"], self.corpus)
        if said:
            distributed.say(f"medvlp: {said}")
        self.source = assemble.open_corpus(self.corpus, parts.config["data"], settings["split"])
        needed = any(flavours.split(p)[0] == "zero_shot" for p in settings["protocols"])
        self.prompts = self._read_prompts(needed)
        self._code, self._seen = provenance.code(), {}
        self._check_protocols()
        self._check_flavours()

    def _check_protocols(self):
        """Refuse protocols the recipe has no features for, and classes it does not have."""
        recipe = self.parts.recipe
        fitting = [*(("zero_shot", "retrieval") if recipe.spaces else ())]
        fitting += ["grounding"] if hasattr(recipe, "localise") else []
        fitting += ["probe"] if self.images() else []
        fitting += ["classify", "classify_studies"] if classifies(recipe) else []
        fitting += ["masked_tokens"] if isinstance(recipe, mlm.MaskedLanguageModel) else []
        for name in self.settings["protocols"]:
            if flavours.split(name)[0] not in fitting:
                raise UserError(
                    f"Protocol {name} does not fit recipe {self.parts.config['recipe']['name']}; "
                    f"accepted are {', '.join(fitting)}."
                )
        if "masked_tokens" in self.settings["protocols"] and not len(self.source):
            raise UserError(
                "Protocol masked_tokens needs texts that are not trained on: name a source of the "
                "corpus in data.knowledge.held_out."
            )
        controls.check(self)
        if "grounding" in self.settings["protocols"]:
            self.grounder = ground.Grounder(self)
        if not classifies(recipe):
            if "regression" in self.settings["controls"] or self.settings["views"] > 1:
                raise UserError(
                    f"evals.views and the control regression are for classifiers; recipe "
                    f"{self.parts.config['recipe']['name']} is none."
                )
            return
        if {*CLASSIFIES, "regression", "missing_mask"} & {
            *self.settings["protocols"],
            *self.settings["controls"],
        }:
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

    def _check_flavours(self):
        """Refuse a flavour that does not score the tasks of the prompts."""
        for name in self.settings["protocols"]:
            protocol, flavour = flavours.split(name)
            for task in self.prompts["tasks"] if protocol == "zero_shot" else ():
                texts = self._prompts_of(task)[0]
                kind = {"multi_label": texts.multi_label, "has_negatives": bool(texts.negative)}
                scoring.check(flavour, task, **kind)

    def run(self, variables: Mapping, *, mask=None, source=None, progress="") -> Results:
        """Run every protocol of the settings.

        Args:
          variables: of the recipe.
          mask: share of the lower image edge to blacken; None takes data.mask_lower_edge.
          source: another than the corpus, such as one that is shuffled.
          progress: title of the bar; "" is silent.
        """
        if not self.settings["protocols"]:
            return {}
        # Once, should they be on the host; and always laid out alike, so that numbers repeat.
        variables = assemble.place(variables, self.parts)
        options = {"mask": mask, "resamples": self.settings["resamples"]}
        views = self.settings["views"]
        found = None
        if set(self.settings["protocols"]) != {"grounding"}:  # which reads its own images
            found = self.features(
                variables,
                source or self.source,
                limit=self.settings["limit"],
                mask=mask,
                views=views,
                progress=progress,
            )
        if found is not None and source is None:
            self._seen = provenance.rows(found["image_id"], found["patient_id"])
        results: Results = {}
        for name in self.settings["protocols"]:
            results |= self._one(name)(variables, found, **options)
        return results

    def provenance(self, variables: Mapping) -> dict[str, Any]:
        """Return where the numbers of the last `run` come from.

        Args:
          variables: that were evaluated, on the host.
        """
        seen = self._seen
        if not seen and "grounding" in self.settings["protocols"]:
            records = [self.source[row] for row in self.grounder.rows]
            seen = provenance.rows(
                *([r[key] for r in records] for key in ("image_id", "patient_id"))
            )
        where = {"corpus": self.corpus, "split": self.settings["split"], **seen}
        return provenance.of(
            self.parts.config,
            code=self._code,
            evals=self.settings,
            rows=where,
            variables=variables,
        )

    def quick(self, variables: Mapping, *, limit: int) -> Results:
        """Run what is cheap enough during training: no intervals, `limit` examples."""
        if not self.settings["protocols"]:
            return {}
        found = self.features(variables, self.source, limit=limit)
        results: Results = {}
        for name in self.settings["protocols"]:
            if name not in ("probe", "grounding"):
                results |= self._one(name)(variables, found, mask=None, resamples=0)
        return results

    def _one(self, name: str) -> Callable[..., Results]:
        """Return the method behind the name of a protocol and its flavour."""
        protocol, flavour = flavours.split(name)
        method = getattr(self, f"_{protocol}")
        return method if flavour == flavours.CLEAN else partial(method, flavour=flavour)

    def _prompts_of(self, task: str) -> tuple[zero_shot.Prompts, list[int]]:
        """Return the prompts of a task, and the label columns of the classes that have some."""
        known, spec = self.source.tasks[task], self.prompts["tasks"][task]
        columns = range(len(known))
        if spec.get("partial"):
            columns = [c for c in columns if known[c] in spec["classes"]]
        classes = [known[c] for c in columns]
        return zero_shot.prompt_texts(self.prompts, task, classes), list(columns)

    def _zero_shot(self, variables, found, *, mask, flavour="clean", **options):
        rule = self.settings["zero_shot"]["threshold"] if options["resamples"] else ""
        if rule and self.settings["split"] == "validation":  # the very rows that are scored
            rule = "maxf1-on-test"
        held = found
        if rule == "maxf1-on-val":
            validation = assemble.open_corpus(self.corpus, self.parts.config["data"], "validation")
            held = self.features(variables, validation, inputs=self.images(), mask=mask)
        spaces, results = self.parts.recipe.spaces, {}
        for task in self.prompts["tasks"]:
            texts, columns = self._prompts_of(task)
            image = spaces.get(texts.section, next(iter(spaces.values())))[0]
            label = f"label/{task}"
            results |= zero_shot.run(
                found[image],
                found[label][:, columns],
                zero_shot.embed_prompts(texts, self.embed_texts(variables)),
                task=task,
                groups=found["patient_id"],
                flavour=flavour,
                batch_size=self.settings["batch_size"],
                threshold=rule if texts.multi_label else "",
                validation=zero_shot.Validation(held[image], held[label][:, columns]),
                **options,
            )
        return results

    def _retrieval(self, variables, found, *, mask, flavour="clean", **options):
        del variables, mask
        image, text = self.joint(found)
        task = self.settings["class_task"] or next(iter(self.source.tasks))
        options |= {"labels": found[f"label/{task}"], "groups": found["patient_id"]}
        if flavour != flavours.CLEAN:
            options["flavour"] = flavour
            return retrieval_legacy.run(image, text, found["text_id"], **options)
        return retrieval.run(image, text, found["text_id"], **options)

    def _grounding(self, variables, found, *, mask, **options):
        del found
        return self.grounder.results(variables, mask=mask, **options)

    def shuffled_phrases(self, variables: Mapping) -> Results:
        """Score the maps of wrong phrases, what an image says without the right words."""
        variables = assemble.place(variables, self.parts)
        options = {"resamples": self.settings["resamples"], "shuffle": True}
        return rename(self.grounder.results(variables, **options), "shuffled phrases")

    def shuffled_pairs(self, variables: Mapping) -> Results:
        """Retrieve with the texts of other patients as the right ones: what is left is chance."""
        variables = assemble.place(variables, self.parts)
        found = self.features(variables, self.source, limit=self.settings["limit"])
        moved = controls.other_texts(found, self.parts.recipe.spaces)
        options = {"mask": None, "resamples": self.settings["resamples"]}
        return rename(self._retrieval(variables, moved, **options), "shuffled pairs")

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

    def _classify_studies(self, variables, found, **options):
        """Score the mean probability of all images of a study (lesion), one row each."""
        by_study = classify.by_study(found, self.parts.recipe.task)
        return rename(self._classify(variables, by_study, **options), "by study")

    def _masked_tokens(self, variables, found, *, mask, **options):
        del variables, mask
        recipe = self.parts.recipe
        return masked_tokens.run(
            found["masked_loss"],
            found["masked_count"],
            vocab_size=recipe.vocab_size,
            rate=recipe.rate,
            groups=found["patient_id"],  # what a text is about
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
            inputs=self.images(),
            limit=self.settings["probe_limit"],
            mask=mask,
            progress="probe",
        )
        results = {}
        for task, classes in self.source.tasks.items():
            labels = fitted[f"label/{task}"]
            spec = self.prompts["tasks"].get(task, {})
            results |= probe.curve(
                fitted["image_pooled"],
                labels,
                found["image_pooled"],
                found[f"label/{task}"],
                classes=classes,
                task=task,
                multi_label=spec.get("multi_label", probe.is_multi_label(labels)),
                train_groups=fitted["patient_id"],
                test_groups=found["patient_id"],
                **self.settings["probe"],
                **options,
            )
        return results

    def _read_prompts(self, needed: bool) -> dict[str, Any]:
        """Read evals.prompts; "" takes the corpus' own, without which there is no zero-shot."""
        given, name = self.settings["prompts"], self.corpus.partition(":")[0]
        own = pathlib.Path(datasets.__path__[0]) / name / "prompts.json"
        if not given and not own.is_file():
            if needed:
                raise UserError(
                    f"{self.corpus} has no prompts of its own: set evals.prompts to a file, or to "
                    f"one of the sets {', '.join(prompts.shipped())}."
                )
            return {"tasks": {}}
        found = prompts.read(given or own)
        if not needed and not {*found["tasks"]} & {*self.source.tasks}:
            return {"tasks": {}}
        how = {k: v for k, v in self.settings["zero_shot"].items() if k != "threshold"}
        return prompts.resolve(found, self.source.tasks, **how)


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
    asked = evaluator.settings["controls"]
    results = evaluator.run(variables, progress="evaluation")
    if "masked_edge" in asked:
        fraction = evaluator.settings["masked_edge"]
        masked = evaluator.run(variables, mask=fraction, progress="lower edge masked")
        results |= rename(masked, f"lower {fraction:.0%} masked")
    if "untrained" in asked and untrained is not None:
        results |= rename(evaluator.run(untrained, progress="untrained control"), "untrained")
    for control in shuffle.CONTROLS:
        if control in asked:
            moved = shuffle.shuffled(evaluator.source, control)
            name = control.replace("_", " ")
            found = evaluator.run(variables, source=moved, progress=name)
            results |= rename(found, name)
    if "shuffled_phrases" in asked:
        results |= evaluator.shuffled_phrases(variables)
    if "shuffled_pairs" in asked:
        results |= evaluator.shuffled_pairs(variables)
    if "regression" in asked:
        results |= evaluator.regression()
    if "missing_mask" in asked:
        results |= controls.missing_mask(evaluator)
    return results
