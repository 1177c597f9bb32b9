"""Protocols and controls on a run: what `medvlp evaluate` and the evaluations of training share."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from medvlp_jax import assemble, controls, distributed, ground, lineage, protocols
from medvlp_jax.data import corpora, leakage
from medvlp_jax.embedder import Embedder
from medvlp_jax.evaluation import (
    classify,
    flavours,
    masked_tokens,
    probe,
    provenance,
    retrieval,
    retrieval_legacy,
    zero_shot,
)
from medvlp_jax.evaluation.features import Features
from medvlp_jax.evaluation.results import Results, renamed
from medvlp_jax.evaluation.zero_shot import PromptScores
from medvlp_jax.training.stopping import Signals


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
          UserError: for an unknown protocol, control, corpus, split or prompt file, or a run to
            start from that has seen what is tested on.
        """
        known = flavours.normalise(settings["protocols"], protocols.NAMES)
        settings = {**settings, "protocols": known}
        protocols.check_settings(settings)
        super().__init__(parts, settings["batch_size"], stop)
        self.settings = settings
        self.corpus = settings["corpus"] or parts.config["data"]["corpora"][0]
        lineage.check(parts.config, self.corpus, settings["split"])
        if said := leakage.warning(lineage.corpora(parts.config), self.corpus):
            distributed.say(f"medvlp: {said}")
        if unknown := lineage.unknown(parts.config):
            distributed.say(f"medvlp: {unknown} is not here: what it was trained on is not known.")
        self.source = assemble.open_corpus(self.corpus, parts.config["data"], settings["split"])
        dealt = assemble.fold_of(self.corpus, parts.config["data"])
        self.torn = leakage.torn_patients(self.source, dealt=dealt)
        if said := leakage.torn(self.corpus, self.torn):
            distributed.say(f"medvlp: {said}")
        self.prompts = protocols.read_prompts(settings, self.corpus, self.source)
        self.validation = self._open_validation(protocols.prompts_needed(settings))
        self._code, self._seen = provenance.code(), {}
        self._kept: tuple[Any, Any] = None, None
        protocols.check(self)
        controls.check(self)
        if "grounding" in settings["protocols"]:
            self.grounder = ground.Grounder(self)

    def run(
        self, variables: Mapping, *, mask=None, source=None, only=(), keep=False, progress=""
    ) -> Results:
        """Run every protocol of the settings.

        Args:
          variables: of the recipe.
          mask: share of the lower image edge to blacken; None takes data.mask_lower_edge.
          source: another than the corpus, such as one that is shuffled.
          only: protocols, of all flavours; () takes all.
          keep: hold the features, for `found`.
          progress: title of the bar; "" is silent.
        """
        names = [
            name
            for name in self.settings["protocols"]
            if not only or flavours.split(name)[0] in only
        ]
        if not names:
            return {}
        # Once, should they be on the host; and always laid out alike, so that numbers repeat.
        given, variables = variables, assemble.place(variables, self.parts)
        options = {"mask": mask, "resamples": self.settings["resamples"]}
        views = self.settings["views"]
        found = None
        if {*names} != {"grounding"}:  # which reads its own images
            found = self.features(
                variables,
                source or self.source,
                limit=self.settings["limit"],
                mask=mask,
                views=views,
                progress=progress,
            )
        if keep:
            self._kept = given, found
        if found is not None and source is None:
            labels = {
                key.removeprefix("label/"): of
                for key, of in found.items()
                if key.startswith("label/")
            }
            self._seen = provenance.rows(found["image_id"], found["patient_id"], labels)
        results: Results = {}
        for name in names:
            results |= self._one(name)(variables, found, **options)
        return results

    def found(self, variables: Mapping) -> Features:
        """Return the features of the corpus, those that a `run` of these variables kept."""
        of, kept = self._kept
        if of is variables and kept is not None:
            return kept
        limit, views = self.settings["limit"], self.settings["views"]
        return self.features(variables, self.source, limit=limit, views=views)

    def provenance(self, variables: Mapping, config: Mapping | None = None) -> dict[str, Any]:
        """Return where the numbers of the last `run` come from.

        Args:
          variables: that were evaluated, on the host.
          config: of the run as its folder has it; None is the one given here.
        """
        seen = self._seen
        if not seen and "grounding" in self.settings["protocols"]:
            records = [self.source[row] for row in self.grounder.rows]
            seen = provenance.rows(
                *([r[key] for r in records] for key in ("image_id", "patient_id"))
            )
        where = {"corpus": self.corpus, "split": self.settings["split"], **seen}
        where |= {"torn_patients": self.torn} if self.torn else {}
        if "grounding" in self.settings["protocols"]:
            where["boxes"] = provenance.boxes(self.source[row] for row in self.grounder.rows)
        return provenance.of(
            self.parts.config if config is None else config,
            code=self._code,
            evals=self.settings,
            rows=where,
            variables=variables,
        )

    def quick(self, variables: Mapping, *, limit: int) -> Results:
        """Run what is cheap enough during training: no intervals, `limit` examples."""
        cheap = [name for name in self.settings["protocols"] if name not in ("probe", "grounding")]
        if not cheap:
            return {}
        found = self.features(variables, self.source, limit=limit)
        results: Results = {}
        for name in cheap:
            # A threshold would take the validation split through the encoder each time.
            without = {"threshold": ""} if flavours.split(name)[0] == "zero_shot" else {}
            results |= self._one(name)(variables, found, mask=None, resamples=0, **without)
        return results

    def _one(self, name: str) -> Callable[..., Results]:
        """Return the method behind the name of a protocol and its flavour."""
        protocol, flavour = flavours.split(name)
        method = getattr(self, f"_{protocol}")
        return method if flavour == flavours.CLEAN else partial(method, flavour=flavour)

    def prompts_of(self, task: str) -> tuple[zero_shot.Prompts, list[int]]:
        """Return the prompts of a task, and the label columns of the classes that have some."""
        known, spec = self.source.tasks[task], self.prompts["tasks"][task]
        columns = range(len(known))
        if spec.get("partial"):
            columns = [c for c in columns if known[c] in spec["classes"]]
        classes = [known[c] for c in columns]
        return zero_shot.prompt_texts(self.prompts, task, classes), list(columns)

    def _zero_shot(self, variables, found, *, mask, flavour="clean", threshold=None, **options):
        rule, held = threshold, found
        if threshold is None:
            rule = self.settings["zero_shot"]["threshold"]
        if rule and self.settings["split"] == "validation":  # the very rows that are scored
            rule = "maxf1-on-test"
        if rule == "maxf1-on-val":
            held = self.features(variables, self.validation, inputs=self.images(), mask=mask)
        results = {}
        for task, image, columns, embeddings in self._prompted(variables):
            texts, label = embeddings.prompts, f"label/{task}"
            results |= zero_shot.run(
                found[image],
                found[label][:, columns],
                embeddings,
                task=task,
                groups=found["patient_id"],
                flavour=flavour,
                batch_size=self.settings["batch_size"],
                threshold=rule if texts.multi_label else "",
                validation=zero_shot.Validation(held[image], held[label][:, columns]),
                **options,
            )
        return results

    def _prompted(self, variables) -> Iterator[tuple]:
        """Yield task, image feature, label columns and embedded prompts of each task with some."""
        recipe = self.parts.recipe
        for task in self.prompts["tasks"]:
            texts, columns = self.prompts_of(task)
            space = recipe.spaces.get(texts.section, next(iter(recipe.spaces.values())))
            image = getattr(recipe, "prompted", space)[0]
            yield task, image, columns, zero_shot.embed_prompts(texts, self.embed_texts(variables))

    def prompt_scores(self, variables: Mapping, found: Mapping) -> dict[str, PromptScores]:
        """Return labels and what images are ranked by of every task that has prompts.

        Of the first zero-shot flavour of the settings; tasks are named as in its results.

        Args:
          variables: of the recipe.
          found: features of all images.
        """
        named = map(flavours.split, self.settings["protocols"])
        flavour = next(flavour for protocol, flavour in named if protocol == "zero_shot")
        variables, scored = assemble.place(variables, self.parts), {}
        how = {"flavour": flavour, "batch_size": self.settings["batch_size"]}
        for task, image, columns, embeddings in self._prompted(variables):
            labels, classes = found[f"label/{task}"][:, columns], embeddings.prompts.classes
            scores = zero_shot.scores(found[image], embeddings, **how)
            multi_label = embeddings.prompts.multi_label
            scores = zero_shot.ranked(scores, flavour=flavour, multi_label=multi_label)
            name = flavours.named(task, flavour)
            scored[name] = PromptScores(labels, scores, classes)
        return scored

    def _retrieval(self, variables, found, *, mask, flavour="clean", **options):
        del variables, mask
        image, text = self.joint(found)
        task = self.settings["class_task"] or next(iter(self.source.tasks), "")
        options |= {"labels": found.get(f"label/{task}"), "class_task": task}
        options["groups"] = found["patient_id"]
        told = self.parts.config["data"]["texts"]
        options["reads"] = {"sections": sorted(self.parts.recipe.spaces), "texts": told}
        if flavour != flavours.CLEAN:
            options["flavour"] = flavour
            return retrieval_legacy.run(image, text, self.text_ids(found), **options)
        return retrieval.run(image, text, self.text_ids(found), **options)

    def _grounding(self, variables, found, *, mask, **options):
        del found
        return self.grounder.results(variables, mask=mask, **options)

    def shuffled_phrases(self, variables: Mapping) -> Results:
        """Score the maps of wrong phrases, what an image says without the right words."""
        variables = assemble.place(variables, self.parts)
        options = {"resamples": self.settings["resamples"], "shuffle": True}
        return renamed(self.grounder.results(variables, **options), "shuffled phrases")

    def shuffled_pairs(self, variables: Mapping) -> Results:
        """Retrieve with the texts of other patients as the right ones: what is left is chance."""
        variables = assemble.place(variables, self.parts)
        found = self.features(variables, self.source, limit=self.settings["limit"])
        moved = controls.other_texts(found, self.parts.recipe.spaces)
        options = {"mask": None, "resamples": self.settings["resamples"]}
        return renamed(self._retrieval(variables, moved, **options), "shuffled pairs")

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
        return renamed(self._classify(variables, by_study, **options), "by study")

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
            labels, own = fitted[f"label/{task}"], found[f"label/{task}"]
            spec = self.prompts["tasks"].get(task, {})
            multi_label = probe.is_multi_label(np.concatenate([labels, own]))
            results |= probe.curve(
                fitted["image_pooled"],
                labels,
                found["image_pooled"],
                own,
                classes=classes,
                task=task,
                multi_label=spec.get("multi_label", multi_label),
                train_groups=fitted["patient_id"],
                test_groups=found["patient_id"],
                probe_limit=self.settings["probe_limit"],
                **self.settings["probe"],
                **options,
            )
        return results

    def _open_validation(self, is_zero_shot: bool) -> corpora.Source | None:
        """Open the split thresholds are chosen on; None where none are, or it is what is scored."""
        rule, split = self.settings["zero_shot"]["threshold"], self.settings["split"]
        if not is_zero_shot or rule != "maxf1-on-val" or split == "validation":
            return None
        return assemble.open_corpus(self.corpus, self.parts.config["data"], "validation")
