"""What a run shows case by case: examples.png, and of a classifier predictions.csv.

predictions.csv has one row a case: ids, the true class (empty where unknown), and the probability
of each class. Two runs on the same split are compared case by case with it.
"""

import csv
import os
import pathlib
from collections.abc import Mapping

import numpy as np
import scipy.special

from medvlp_jax import assemble, distributed
from medvlp_jax.evaluate import Evaluator
from medvlp_jax.evaluation import plots, retrieval

EXAMPLES = 8


def show(evaluator: Evaluator, variables: Mapping, folder: pathlib.Path) -> None:
    """Write the files above into a run folder; every process computes, one writes.

    Args:
      evaluator: of the run.
      variables: trained.
      folder: of the run.
    """
    settings = evaluator.settings
    found = evaluator.features(
        variables, evaluator.source, limit=settings["limit"], views=settings["views"]
    )
    if not distributed.is_writer():
        return
    classifies = hasattr(evaluator.parts.recipe, "task")
    drawn, caption = (
        (_classified, plots.CLASSIFIED) if classifies else (_retrieved, plots.RETRIEVED)
    )
    picked, texts, scores, truth = drawn(evaluator, found, np.random.default_rng(0))
    transform = assemble.record_transform(evaluator.parts, ("image",), train=False)
    images = [transform(evaluator.source[i], None)["image"] for i in picked]
    plots.examples(images, texts, scores, truth, folder / "examples.png", caption=caption)
    if classifies:
        write_predictions(evaluator, found, folder / "predictions.csv")


def _retrieved(evaluator, found, rng):
    """Return rows, the best three texts of each with their cosines, and its own text."""
    image, text = evaluator.joint(found)
    picked = rng.permutation(np.flatnonzero(text.any(1)))[:EXAMPLES]
    rows, scores = retrieval.top_texts(image[picked], text, found["text_id"], 3)
    texts = [" ".join(filter(None, pair)) for pair in evaluator.source.texts()]
    return picked, [[texts[j] for j in row] for row in rows], scores, [texts[i] for i in picked]


def _classified(evaluator, found, rng):
    """Return rows, the best three classes of each with their probabilities, and its own."""
    task = evaluator.parts.recipe.task
    names, labels = np.array(evaluator.source.tasks[task]), found[f"label/{task}"]
    picked = rng.permutation(np.flatnonzero((labels == 1).any(1)))[:EXAMPLES]
    chances = scipy.special.softmax(found["logits"][picked], axis=1)
    best = np.argsort(-chances, axis=1)[:, :3]
    scores = np.take_along_axis(chances, best, axis=1)
    return picked, names[best].tolist(), scores, names[labels[picked].argmax(1)].tolist()


def write_predictions(evaluator: Evaluator, found: Mapping, out: pathlib.Path) -> None:
    """Write predictions.csv under a temporary name, then rename."""
    task = evaluator.parts.recipe.task
    names, labels = evaluator.source.tasks[task], found[f"label/{task}"]
    chances = scipy.special.softmax(found["logits"].astype(np.float64), axis=1)
    scratch = out.with_suffix(".tmp")
    with scratch.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image_id", "patient_id", "truth", *names))
        for image, patient, label, chance in zip(
            found["image_id"], found["patient_id"], labels, chances, strict=True
        ):
            truth = names[label.argmax()] if (label == 1).any() else ""
            writer.writerow((image, patient, truth, *(f"{p:.6g}" for p in chance)))
    os.replace(scratch, out)
