"""Zero-shot classification from text prompts, clean flavour.

Every prompt embedding has unit norm; a class is the re-normalised mean of its prompts' embeddings.
Single-label: the class with the highest cosine. Multi-label: cos(image, positive) - cos(image,
negative); the softmax over the two is a monotone map of it and leaves AUROC and AUPRC unchanged.
Nothing looks at the test set as a whole; GLoRIA's z-scored accuracy is the row `accuracy_zscore`.

Prompt files: {"version": ..., "tasks": {task: {"section": ..., "multi_label": ..., "classes":
{class: {"positive": [...], "negative": [...]}}}}}.

Axis letters: N images, C classes, E joint width.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from medvlp_jax.config import UserError, nearest
from medvlp_jax.evaluation import classify
from medvlp_jax.evaluation.features import check_finite
from medvlp_jax.evaluation.results import Results, assemble

PROTOCOL = "zero_shot@clean-v1"


class Prompts(NamedTuple):
    """The texts of one task, in label-column order; `negative` is empty for single-label tasks."""

    version: str
    section: str
    multi_label: bool
    classes: tuple[str, ...]
    positive: tuple[tuple[str, ...], ...]
    negative: tuple[tuple[str, ...], ...]


class ClassEmbeddings(NamedTuple):
    """Prompts and their unit-norm class embeddings [C, E]; `negative` is None if single-label."""

    prompts: Prompts
    positive: np.ndarray
    negative: np.ndarray | None


def prompt_texts(prompts_json: Mapping[str, Any], task: str, classes: Sequence[str]) -> Prompts:
    """Look up one task of a prompt file.

    Args:
      prompts_json: the parsed file.
      task: name of the task.
      classes: the label columns' names; decides the order.

    Raises:
      UserError: for a task or a class without prompts.
    """
    tasks = prompts_json["tasks"]
    if task not in tasks:
        raise UserError(f"No prompts for task '{task}'. {nearest(task, list(tasks))}")
    spec = tasks[task]
    sides = ("positive", "negative") if spec["multi_label"] else ("positive",)
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


def _unit(x):
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _ensemble(texts: Sequence[Sequence[str]], rows: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return [C, E]: normalise each prompt, average over a class, normalise again."""
    return _unit(np.stack([_unit(np.stack([rows[t] for t in group])).mean(0) for group in texts]))


def embed_prompts(
    prompts: Prompts, embed_texts: Callable[[list[str], str], np.ndarray]
) -> ClassEmbeddings:
    """Turn the prompts of a task into one embedding a class and side.

    Args:
      prompts: from `prompt_texts`.
      embed_texts: (texts, section) -> [n, E]; called once, with each distinct text once.
    """
    texts = list(dict.fromkeys(t for group in prompts.positive + prompts.negative for t in group))
    embedded = np.asarray(embed_texts(texts, prompts.section), np.float64)
    check_finite("prompts", embedded)
    rows = dict(zip(texts, embedded, strict=True))
    negative = _ensemble(prompts.negative, rows) if prompts.negative else None
    return ClassEmbeddings(prompts, _ensemble(prompts.positive, rows), negative)


def scores(image, embeddings: ClassEmbeddings) -> np.ndarray:
    """Return the score of every image and class [N, C] for unit-norm images [N, E]."""
    image = np.asarray(image, np.float64)
    positive = image @ embeddings.positive.T
    return positive if embeddings.negative is None else positive - image @ embeddings.negative.T


def run(
    image, labels, embeddings: ClassEmbeddings, *, task: str, groups=None, **bootstrap
) -> Results:
    """Classify images by prompts and score the decisions.

    Args:
      image: [N, E] unit norm, in the space of the prompts' section.
      labels: [N, C] int8: 1 present, 0 absent, -1 unknown; columns as `embeddings.prompts.classes`.
      embeddings: from `embed_prompts`.
      task: middle part of the result keys.
      groups: [N] patient of each row.
      **bootstrap: resamples (2,000), seed, level.

    Returns:
      macro_auroc, macro_auprc and per-class rows (multi-label), or accuracy, balanced_accuracy,
      macro_f1, macro_auroc, ... with the prevalence control (single-label); see `classify`.
    """
    check_finite("image", np.asarray(image))
    prompts = embeddings.prompts
    score = classify.multi_label_scores if prompts.multi_label else classify.single_label_scores
    values = scores(image, embeddings)
    scored = score(labels, values, prompts.classes, groups=groups, **bootstrap)
    settings = {**prompts._asdict(), **bootstrap}
    return assemble(PROTOCOL, task, scored.numbers, settings=settings, notes=scored.notes)
