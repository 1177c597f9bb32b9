"""Which protocols there are, and what an evaluation is refused for before anything is compiled."""

import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from medvlp_jax import (
    assemble,
    checks,
    clinical,
    controls,
    distributed,
    examples,
    ranges,
    tables,
)
from medvlp_jax.config import UserError, nearest
from medvlp_jax.data import datasets, pipeline, tabular
from medvlp_jax.evaluation import classify, flavours, probe, prompts, scoring, thresholds
from medvlp_jax.recipes import mlm
from medvlp_jax.recipes.base import classifies

CLASSIFY = controls.CLASSIFY
NAMES = ("zero_shot", "retrieval", "grounding", "probe", *CLASSIFY, "masked_tokens")
LEARN = ("probe", "regression", "missing_mask")  # protocols and controls, from the split train
VIEWS = (1, 4, 8)
LOOKED_AT = 2_000  # records, in search of a text: seconds, where all of a large corpus take minutes


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings of config.evals that cannot be, whatever the run and the corpus.

    Raises:
      UserError: naming one and what would be accepted.
    """
    for name in settings["controls"]:
        if name not in controls.NAMES:
            raise UserError(f"No control '{name}'. {nearest(name, controls.NAMES)}")
    thresholds.check(settings["zero_shot"]["threshold"])
    probe.check_fractions(**settings["probe"])
    ranges.check(settings, "evals.")
    if settings["views"] not in VIEWS:
        raise UserError(f"evals.views={settings['views']} must be one of {VIEWS}.")


def fitting(recipe: Any, *, has_images: bool) -> list[str]:
    """Return the protocols a recipe has features for."""
    names = [*(("zero_shot", "retrieval") if recipe.spaces else ())]
    names += ["grounding"] if hasattr(recipe, "localise") else []
    names += ["probe"] if has_images else []
    names += CLASSIFY if classifies(recipe) else ()
    names += ["masked_tokens"] if isinstance(recipe, mlm.MaskedLanguageModel) else []
    return names


def prompts_needed(settings: Mapping[str, Any]) -> bool:
    """Say whether config.evals asks for a zero-shot protocol."""
    return any(flavours.split(name)[0] == "zero_shot" for name in settings["protocols"])


def read_prompts(settings: Mapping[str, Any], corpus: str, source: Any) -> dict[str, Any]:
    """Read evals.prompts; "" takes the corpus' own, without which there is no zero-shot.

    Args:
      settings: config.evals.
      corpus: its name, maybe with a variant.
      source: a split of it.

    Raises:
      UserError: where a zero-shot protocol has no prompts or no task, or they do not fit.
    """
    needed = prompts_needed(settings)
    given, name = settings["prompts"], corpus.partition(":")[0]
    if needed and not source.tasks:
        raise UserError(
            f"zero_shot needs classes, and {corpus} has no label task; accepted are "
            "evals.protocols without it, such as ('retrieval',)."
        )
    shipped = pathlib.Path(datasets.__path__[0]) / name / "prompts.json"
    if given or shipped.is_file():
        found = prompts.read(given or shipped)
    elif source.metadata.get("prompts"):
        where = f"prompts.json of {corpus}, as it was when the corpus was prepared"
        found = prompts.check(source.metadata["prompts"], where)
    elif needed:
        raise UserError(
            f"{corpus} has no prompts of its own: set evals.prompts to a file, or to one of the "
            f"sets {', '.join(prompts.shipped())}."
        )
    else:
        return {"tasks": {}}
    if not needed and not {*found["tasks"]} & {*source.tasks}:
        return {"tasks": {}}
    how = {k: v for k, v in settings["zero_shot"].items() if k != "threshold"}
    return prompts.resolve(found, source.tasks, **how)


def check_prompts(config: Mapping) -> None:
    """Refuse a zero-shot evaluation without prompts, before a text encoder is trained.

    Raises:
      UserError: saying what would be accepted.
    """
    evals = config["evals"]
    if prompts_needed(evals):
        corpus = evals["corpus"] or config["data"]["corpora"][0]
        # Which texts are read is another matter, and would read all of them.
        data = {**config["data"], "texts": ""}
        source = assemble.open_corpus(corpus, data, evals["split"])
        read_prompts(evals, corpus, source)


def lack_of_texts(source: Any, sections: Collection[str], limit: int) -> str:
    """Say that there is nothing to retrieve; "" where there is. Reads no further than one text.

    Of many records some, spread evenly, are looked at: a corpus has texts or has none.

    Args:
      source: of the records.
      sections: of the recipe's spaces.
      limit: only the first records; 0 takes all.
    """
    count = min(limit or len(source), len(source))
    rows = np.linspace(0, count - 1, min(count, LOOKED_AT)).astype(int)
    for record in (source[row] for row in rows):
        if any(pipeline.section_text(record, section) for section in sections):
            return ""
    return (
        f"retrieval needs texts, and none of {len(rows)} records of {source.name} ({source.split}) "
        f"has {' or '.join(sections)}"
    )


def check(evaluator: Any) -> None:
    """Refuse protocols and flavours that do not fit the recipe, the corpus or the prompts.

    Args:
      evaluator: see evaluator.Evaluator.

    Raises:
      UserError: naming the setting and what would be accepted.
    """
    settings, source, recipe = evaluator.settings, evaluator.source, evaluator.parts.recipe
    name = evaluator.parts.config["recipe"]["name"]
    accepted = fitting(recipe, has_images=bool(evaluator.images()))
    for asked in settings["protocols"]:
        if flavours.split(asked)[0] not in accepted:
            raise UserError(
                f"Protocol {asked} does not fit recipe {name}; accepted are {', '.join(accepted)}."
            )
    retrieves = any(flavours.split(asked)[0] == "retrieval" for asked in settings["protocols"])
    if retrieves and (lack := lack_of_texts(source, recipe.spaces, settings["limit"])):
        raise UserError(f"Protocol {lack}: leave it out, or name another corpus.")
    if "masked_tokens" in settings["protocols"] and not len(source):
        raise UserError(
            "Protocol masked_tokens needs texts that are not trained on: name a source of the "
            "corpus in data.knowledge.held_out."
        )
    task = settings["class_task"]
    if task and task not in source.tasks:
        raise UserError(
            f"evals.class_task: {evaluator.corpus} has no task '{task}'. "
            f"{nearest(task, [*source.tasks])}"
        )
    if settings["split"] == "train" and "probe" in settings["protocols"]:
        raise UserError(
            "Protocol probe learns from the split train and cannot be scored on it: set another "
            "evals.split, or leave it out."
        )
    _check_train(evaluator)
    if classifies(recipe):
        _check_classes(evaluator)
    elif "regression" in settings["controls"] or settings["views"] > 1:
        raise UserError(
            f"evals.views and the control regression are for classifiers; recipe {name} is none."
        )
    _check_table(evaluator)
    _check_flavours(evaluator)
    _check_evidence(evaluator)


def _check_train(evaluator: Any) -> None:
    """Refuse what learns from the split train on a corpus that has none."""
    settings, data = evaluator.settings, evaluator.parts.config["data"]
    asked = (*settings["protocols"], *settings["controls"])
    learns = [name for name in LEARN if name in asked]
    if not learns or assemble.fold_of(evaluator.corpus, data):  # dealt anew, with all three splits
        return
    try:
        # Which texts are read is another matter, and would read all of them.
        assemble.open_corpus(evaluator.corpus, {**data, "texts": ""}, "train")
    except UserError as error:
        raise UserError(
            f"{', '.join(learns)} of config.evals learns from the split train of "
            f"{evaluator.corpus}, which cannot be opened ({str(error).rstrip('.')}): leave "
            f"{'them' if len(learns) > 1 else 'it'} out of evals.protocols and evals.controls, or "
            "name another evals.corpus."
        ) from error


def _check_classes(evaluator: Any) -> None:
    """Refuse a corpus of other classes, or in another order, or several of them in a study."""
    settings, recipe, tasks = evaluator.settings, evaluator.parts.recipe, evaluator.source.tasks
    asked = {*settings["protocols"], *settings["controls"]}
    if not {*CLASSIFY, "regression", "missing_mask"} & asked:
        return
    if recipe.task not in tasks:
        raise UserError(
            f"{evaluator.corpus} has no task '{recipe.task}'. {nearest(recipe.task, [*tasks])}"
        )
    classes, positive = tasks[recipe.task], settings["positive"]
    if positive and positive not in classes:
        raise UserError(
            f"evals.positive: no class '{positive}' in task {recipe.task}. "
            f"{nearest(positive, [*classes])}"
        )
    if len(classes) != recipe.num_classes:
        raise UserError(
            f"recipe.num_classes={recipe.num_classes}, but task {recipe.task} of "
            f"{evaluator.corpus} has {len(classes)} classes."
        )
    if "classify_studies" in settings["protocols"]:
        rows = [(r["study_id"], r["labels"][recipe.task]) for r in evaluator.source]
        ids, labels = zip(*rows[: settings["limit"] or None], strict=True)
        classify.study_rows(ids, np.array(labels))
    data = evaluator.parts.config["data"]
    trained = data["corpora"][0]
    known = clinical.tasks_of(data).get(recipe.task)
    if known is None:
        distributed.say(
            f"medvlp: {trained} is not prepared here, so that only the number of classes could be "
            f"compared with {evaluator.corpus}: their order has to be the same."
        )
    elif differs := checks.difference(known, classes, trained, evaluator.corpus):
        raise UserError(
            f"evals.corpus: the classes of task '{recipe.task}' are not those that were trained "
            f"on: {differs}; accepted is a corpus with the same classes in the same order."
        )


def _check_table(evaluator: Any) -> None:
    """Refuse a table that is read as other numbers than the one that was trained on."""
    data, inputs, source = evaluator.parts.config["data"], evaluator.inputs(), evaluator.source
    trained, tested = {}, {}
    if "tabular" in inputs:
        schemas = clinical.schema_of(data), source.metadata["table"]
        trained, tested = (tables.seen(data, schema) for schema in schemas)
    if {*clinical.KEYS} & {*inputs}:
        told = clinical.told_of(data, [source], evaluator.parts.recipe.task, train=False)
        if "metadata_vector" in inputs:  # texts may be other ones
            trained, tested = clinical.described(data).seen, told.seen
    # Without the schema that was trained on there is no model either, which is said elsewhere.
    names = data["corpora"][0], evaluator.corpus
    if trained and (differs := tabular.difference(trained, tested, *names)):
        raise UserError(
            f"evals.corpus: the table is not encoded as the one that was trained on: {differs}; "
            "accepted is a corpus whose table has the same columns, kinds, categories, ranges and "
            "units in the same order."
        )


def _check_evidence(evaluator: Any) -> None:
    """Refuse reports whose evidence is read, but not in the extraction the run was told of."""
    recipe, data = evaluator.parts.recipe, evaluator.parts.config["data"]
    if "evidence" not in getattr(recipe, "beside", ()) or not data["evidence"]["folder"]:
        return
    if not {*evaluator.settings["protocols"]} - {"grounding"}:
        return
    read, source = examples.evidence_of(data).read, evaluator.source
    try:
        for row in range(min(evaluator.settings["limit"] or len(source), len(source))):
            read(source[row])
    except UserError as error:
        raise UserError(f"{error} Grounding alone reads no report.") from error


def _check_flavours(evaluator: Any) -> None:
    """Refuse a flavour that does not score the tasks of the prompts."""
    for asked in evaluator.settings["protocols"]:
        protocol, flavour = flavours.split(asked)
        for task in evaluator.prompts["tasks"] if protocol == "zero_shot" else ():
            texts = evaluator.prompts_of(task)[0]
            kind = {"multi_label": texts.multi_label, "has_negatives": bool(texts.negative)}
            scoring.check(flavour, task, **kind)
