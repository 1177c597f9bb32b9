"""Zero-shot classification from text prompts.

Clean flavour: every prompt embedding has unit norm; a class is the re-normalised mean of its
prompts' embeddings. Single-label: the class with the highest cosine; AUROC and AUPRC rank images
by the probability of a class, see `ranked`. Multi-label: cos(image, positive) - cos(image,
negative); the softmax over the two is a monotone map of it and leaves AUROC and AUPRC unchanged.
Nothing looks at the test set as a whole; the z-scored accuracy is a row of its own,
`accuracy_zscore`. The other flavours are in `scoring`, the prompt files in `prompts`.

Axis letters: N images, C classes, P prompts of a class, E joint width.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.special

from medvlp_jax.config import UserError, nearest
from medvlp_jax.evaluation import classify, scoring, thresholds
from medvlp_jax.evaluation.features import check_finite
from medvlp_jax.evaluation.flavours import CLEAN, named
from medvlp_jax.evaluation.results import Results, assemble, number

TEMPERATURE = 0.07  # of the probabilities that images of one class are ranked by, see `ranked`


class Prompts(NamedTuple):
    """The texts of one task, in label-column order; `negative` is empty for single-label tasks."""

    version: str
    section: str
    multi_label: bool
    classes: tuple[str, ...]
    positive: tuple[tuple[str, ...], ...]
    negative: tuple[tuple[str, ...], ...]


class ClassEmbeddings(NamedTuple):
    """Prompts and their unit-norm embeddings, [P, E] a class; none negative if single-label."""

    prompts: Prompts
    positive_prompts: tuple[np.ndarray, ...]
    negative_prompts: tuple[np.ndarray, ...]

    @property
    def positive(self) -> np.ndarray:
        """The re-normalised mean of each class [C, E]."""
        return _means(self.positive_prompts)

    @property
    def negative(self) -> np.ndarray | None:
        """The same of its absence; None where there are no such prompts."""
        return _means(self.negative_prompts) if self.negative_prompts else None


def _means(groups: Sequence[np.ndarray]) -> np.ndarray:
    return scoring.unit(np.stack([group.mean(0) for group in groups]))


def prompt_texts(prompts_json: Mapping[str, Any], task: str, classes: Sequence[str]) -> Prompts:
    """Look up one task of a prompt file.

    Args:
      prompts_json: plain texts, from `prompts.resolve` or a file that has nothing else.
      task: name of the task.
      classes: the label columns' names; decides the order.

    Raises:
      UserError: for a task or a class without prompts, or no class at all.
    """
    tasks = prompts_json["tasks"]
    if task not in tasks:
        raise UserError(f"No prompts for task '{task}'. {nearest(task, list(tasks))}")
    spec = tasks[task]
    if not classes:  # of a partial set
        raise UserError(
            f"Prompt set {prompts_json['version']} names no class that task '{task}' of the corpus "
            f"has; it names {', '.join(spec['classes'])}."
        )
    paired = spec["multi_label"] and not spec.get("positive_only")
    sides = ("positive", "negative") if paired else ("positive",)
    for name in classes:
        if name not in spec["classes"]:
            hint = nearest(name, list(spec["classes"]))
            raise UserError(f"No prompts for class '{name}' of task '{task}'. {hint}")
        for side in sides:
            if not spec["classes"][name].get(side):
                raise UserError(f"Class '{name}' of task '{task}' needs a {side} prompt, has none.")
    texts = {side: tuple(tuple(spec["classes"][c][side]) for c in classes) for side in sides}
    return Prompts(
        version=prompts_json["version"],
        section=spec["section"],
        multi_label=spec["multi_label"],
        classes=tuple(classes),
        positive=texts["positive"],
        negative=texts.get("negative", ()),
    )


def embed_prompts(
    prompts: Prompts, embed_texts: Callable[[list[str], str], np.ndarray]
) -> ClassEmbeddings:
    """Turn the prompts of a task into unit-norm embeddings.

    Args:
      prompts: from `prompt_texts`.
      embed_texts: (texts, section) -> [n, E]; called once, with each distinct text once.
    """
    texts = list(dict.fromkeys(t for group in prompts.positive + prompts.negative for t in group))
    embedded = np.asarray(embed_texts(texts, prompts.section), np.float64)
    check_finite("prompts", embedded)
    rows = dict(zip(texts, scoring.unit(embedded), strict=True))
    stack = lambda groups: tuple(np.stack([rows[t] for t in group]) for group in groups)
    return ClassEmbeddings(prompts, stack(prompts.positive), stack(prompts.negative))


def scores(
    image, embeddings: ClassEmbeddings, *, flavour: str = CLEAN, batch_size: int = 0
) -> np.ndarray:
    """Return the score of every image and class [N, C] for unit-norm images [N, E].

    Args:
      image: all test images.
      embeddings: from `embed_prompts`.
      flavour: a key of scoring.FLAVOURS.
      batch_size: of "benchx".
    """
    sides = embeddings.positive_prompts, embeddings.negative_prompts
    return scoring.scores(flavour, image, *sides, batch_size=batch_size)


def ranked(values, *, flavour: str, multi_label: bool) -> np.ndarray:
    """Return what images are ranked by for each class [N, C], as AUROC and AUPRC need it.

    One class an image, clean: log softmax(cosine / 0.07) over the classes. Cosines of two images
    have no common zero: an image near to all texts has high ones, which changes no answer and
    would put it first for every class. 0.07 is CLIP's first temperature; it is our choice, and not
    the scale a model has learned, so that numbers of all models compare. All else is ranked by the
    scores, as published.

    Args:
      values: [N, C] from `scores`.
      flavour: that they are of.
      multi_label: one yes/no question a class, or one class an image.
    """
    if multi_label or flavour != CLEAN:
        return values
    return scipy.special.log_softmax(np.asarray(values, np.float64) / TEMPERATURE, axis=1)


class PromptScores(NamedTuple):
    """Labels and scores of the images, class by class.

    Attributes:
      labels: [N, C], 1 present, 0 absent, -1 unknown.
      scores: [N, C], higher is more likely present; comparable between images, see `ranked`.
      classes: C names.
    """

    labels: np.ndarray
    scores: np.ndarray
    classes: Sequence[str]


class Validation(NamedTuple):
    """What thresholds are chosen on: images [M, E] and labels [M, C] of the validation split."""

    image: np.ndarray
    labels: np.ndarray


def run(
    image,
    labels,
    embeddings: ClassEmbeddings,
    *,
    task: str,
    groups=None,
    flavour: str = CLEAN,
    batch_size: int = 0,
    threshold: str = "",
    validation: Validation | None = None,
    **bootstrap,
) -> Results:
    """Classify images by prompts and score the decisions.

    Args:
      image: [N, E] unit norm, in the space of the prompts' section.
      labels: [N, C] int8: 1 present, 0 absent, -1 unknown; columns as `embeddings.prompts.classes`.
      embeddings: from `embed_prompts`.
      task: middle part of the result keys; a flavour other than clean is appended.
      groups: [N] patient of each row.
      flavour: a key of scoring.FLAVOURS.
      batch_size: images that "benchx" standardises together.
      threshold: a rule of `thresholds`, for multi-label tasks; "" decides nothing.
      validation: for "maxf1-on-val".
      **bootstrap: resamples (2,000), seed, level.

    Returns:
      macro_auroc, macro_auprc and per-class rows (multi-label), or accuracy, balanced_accuracy,
      macro_f1, macro_auroc, ... with the prevalence control (single-label); see `classify`.

    Raises:
      UserError: for an unknown flavour or rule, or a task the flavour has no score for.
    """
    check_finite("image", np.asarray(image))
    thresholds.check(threshold)
    prompts = embeddings.prompts
    has_negatives = bool(prompts.negative)
    scoring.check(flavour, task, multi_label=prompts.multi_label, has_negatives=has_negatives)
    how = {"flavour": flavour, "batch_size": batch_size}
    values = scores(image, embeddings, **how)
    options = {"groups": groups, **bootstrap}
    settings = {**prompts._asdict(), **bootstrap}
    if prompts.multi_label:
        scored = classify.multi_label_scores(labels, values, prompts.classes, **options)
        if threshold:
            settings["threshold"] = threshold
            chosen = values, labels
            if threshold == "maxf1-on-val":
                chosen = scores(validation.image, embeddings, **how), validation.labels
            found = thresholds.choose(chosen[1], chosen[0])
            decided = thresholds.decide(
                labels, values, found, prompts.classes, rule=threshold, **options
            )
            scored = classify.Scored(scored.numbers | decided.numbers, scored.notes | decided.notes)
    else:
        ranks = ranked(values, flavour=flavour, multi_label=False)
        scored = classify.single_label_scores(
            labels, values, prompts.classes, ranked=ranks, **options
        )
    if flavour == "benchx":
        settings["batch_size"] = batch_size
        if not prompts.multi_label:
            scored.numbers["accuracy_by_batch"] = _by_batch(labels, values, batch_size)
    name = named(task, flavour)
    version = "v1"
    if flavour == CLEAN and not prompts.multi_label:
        version = "v2"  # v1 ranked images by cosines
        settings["temperature"] = TEMPERATURE
    protocol = f"zero_shot@{flavour}-{version}"
    return assemble(protocol, name, scored.numbers, settings=settings, notes=scored.notes)


def _by_batch(labels, values, batch_size: int) -> dict[str, Any]:
    """Return the mean of the batches' accuracies: a short last batch counts as much as the others.

    Batches without a known class are left out.
    """
    truth = classify.class_index(labels)
    shares = classify.answers(values)[np.arange(len(truth)), truth]
    right = np.where(truth >= 0, shares, np.nan)
    size = batch_size or len(right)
    batches = [right[s : s + size] for s in range(0, len(right), size)]
    means = [np.nanmean(batch) for batch in batches if np.isfinite(batch).any()]
    mean = float(np.mean(means)) if means else np.nan
    return number(mean, n=int((truth >= 0).sum()), chance=1 / values.shape[1])
