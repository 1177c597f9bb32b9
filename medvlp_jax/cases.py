"""What an evaluation shows case by case: examples.png; of a classifier predictions.csv, pictures.

predictions.csv has one row a case: ids, the true class (empty where unknown), and the probability
of each class. Two runs on the same split are compared case by case with it. classifier.png has the
confusion matrix, ROC curves and calibration; attention.png, for CFCML with a table, where in the
image the table's attention goes. grounding.png, where that protocol ran, has maps of phrases.
zero_shot.csv and zero_shot.png, likewise, have what images are ranked by for each class, with the
truth (1, 0, empty where unknown), and the ROC curves of it: of the first flavour that ran, whose
name, if it is not clean, stands behind that of the task. Grounding alone leaves its picture and
no other: it encodes what has boxes, not the split. Both tables read back as the very numbers that
were scored, which rounding could make equal.
"""

import contextlib
import pathlib
from collections.abc import Mapping

import numpy as np
import scipy.special

from medvlp_jax import assemble, distributed, examples, ground, tables
from medvlp_jax.config import UserError
from medvlp_jax.evaluation import (
    attention,
    case_tables,
    classify,
    flavours,
    paired,
    plots,
    results,
    retrieval,
    tasks,
)
from medvlp_jax.evaluator import Evaluator
from medvlp_jax.recipes.base import classifies
from medvlp_jax.training.step import make_embed

EXAMPLES, ATTENDED = 8, 4
SCORES = "zero_shot.csv"
FILES = (SCORES, "zero_shot.png", "examples.png", ground.PICTURE)
FILES += (paired.FILE, "classifier.png", "attention.png")
ADAPTED = tuple(f"{task}.png" for task in tasks.TASKS)  # of `medvlp adapt`


def say_replaced(out: pathlib.Path) -> None:
    """Say what an evaluation of before holds, while it can still be kept."""
    if distributed.is_writer() and (out / results.FILE).is_file():
        with contextlib.suppress(UserError):  # one that cannot be read is no loss
            held = dict.fromkeys(key.split("/")[0] for key in results.read(out).numbers)
            print(
                f"medvlp: this replaces {out / results.FILE}, which holds {', '.join(held)}; "
                "another --out keeps it.",
                flush=True,
            )


def clear(folder: pathlib.Path) -> None:
    """Remove the files above of an earlier evaluation, so that a folder holds one alone.

    Of `medvlp adapt` the predictions of its seeds, too.

    Args:
      folder: where results.json goes; without one it is somebody else's, and left as it is.
    """
    if (folder / results.FILE).is_file():
        for name in (*FILES, *ADAPTED):
            (folder / name).unlink(missing_ok=True)
        for seed in paired.seeds(folder):
            (seed / paired.FILE).unlink(missing_ok=True)


def show(evaluator: Evaluator, variables: Mapping, folder: pathlib.Path) -> None:
    """Write the files above into a folder; every process computes, one writes.

    Args:
      evaluator: of the run.
      variables: trained.
      folder: of the run, or another.
    """
    protocols = [flavours.split(name)[0] for name in evaluator.settings["protocols"]]
    if "grounding" in protocols:
        evaluator.grounder.draw(assemble.place(variables, evaluator.parts), folder / ground.PICTURE)
    labelled = classifies(evaluator.parts.recipe)
    if not (_answers(evaluator) if labelled else evaluator.parts.recipe.spaces):
        return  # a stage without answers of its own, or a corpus that is not asked for them
    if {*protocols} == {"grounding"}:
        return
    found = evaluator.found(variables)
    maps = _attended(evaluator, variables)
    prompted = {}
    if "zero_shot" in protocols:
        prompted = evaluator.prompt_scores(variables, found)
    if not distributed.is_writer():
        return
    if prompted:
        case_tables.write_scores(prompted, found, folder / SCORES)
        plots.roc(prompted, folder / "zero_shot.png")
    drawn, caption = (_classified, plots.CLASSIFIED) if labelled else (_retrieved, plots.RETRIEVED)
    picked, texts, scores, truth = drawn(evaluator, found, np.random.default_rng(0))
    transform = examples.record_transform(evaluator.parts, ("image",), train=False)
    images = [transform(evaluator.source[i], None)["image"] for i in picked]
    if images:  # none where no case has a known class
        plots.examples(images, texts, scores, truth, folder / "examples.png", caption=caption)
    if labelled:
        write_predictions(evaluator, found, folder / "predictions.csv")
        _draw_classifier(evaluator, found, folder / "classifier.png")
    if maps:
        _draw_attention(evaluator, found, maps, folder / "attention.png")


def _answers(evaluator: Evaluator) -> bool:
    """Say whether a classifier's classes are those of a task of the corpus."""
    recipe, tasks = evaluator.parts.recipe, evaluator.source.tasks
    return len(tasks.get(recipe.task, ())) == recipe.num_classes


def _retrieved(evaluator, found, rng):
    """Return rows, the best three texts of each with their cosines, and its own text."""
    image, text = evaluator.joint(found)
    picked = rng.permutation(np.flatnonzero(text.any(1)))[:EXAMPLES]
    if not len(picked):  # a corpus without texts, which is not read through for them
        return picked, [], np.zeros((0, 0)), []
    rows, scores = retrieval.top_texts(image[picked], text, evaluator.text_ids(found), 3)
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
    """Write predictions.csv, whole or not at all."""
    task = evaluator.parts.recipe.task
    chances = scipy.special.softmax(found["logits"].astype(np.float64), axis=1)
    classes = evaluator.source.tasks[task]
    case_tables.write_chances(found, found[f"label/{task}"], chances, classes, out)


def _draw_classifier(evaluator, found, out_png) -> None:
    task = evaluator.parts.recipe.task
    truth = classify.class_index(found[f"label/{task}"])
    chances = scipy.special.softmax(found["logits"].astype(np.float64), axis=1)
    known = truth >= 0
    if known.any():
        plots.classifier(truth[known], chances[known], evaluator.source.tasks[task], out_png)


def _attended(evaluator, variables) -> dict[str, list[np.ndarray]]:
    """Return the first cases' maps of the table's attention, see evaluation/attention.py.

    Empty for recipes without one, and with several processes: a picture of few cases is not worth
    a collective program.
    """
    parts, recipe = evaluator.parts, evaluator.parts.recipe
    fuses = getattr(recipe, "enhance", "") == "multi_head" and recipe.table and recipe.images
    if not fuses or parts.part.count > 1:
        return {}
    source = evaluator.source
    transform = examples.record_transform(
        parts,
        recipe.modalities,
        train=False,
        table=tables.rows_of(parts.config["data"], [source]),
        images=source.images,
    )
    count = evaluator.multiple_of_devices(min(ATTENDED, len(source)))
    rows = [transform(source[min(i, len(source) - 1)], None) for i in range(count)]
    batch = {key: np.stack([row[key] for row in rows]) for key in recipe.modalities}
    images = {key: batch[key] for key in recipe.images}
    levels = make_embed(recipe, parts.mesh, "levels")(assemble.place(variables, parts), images)
    return attention.table_maps(
        distributed.fetch(variables)["params"]["fusion"],
        levels,
        batch["tabular"],
        num_heads=recipe.num_heads,
    )


def _draw_attention(evaluator, found, maps, out_png) -> None:
    """Draw the cases of `_attended`, one row an image; of a volume the mean over its slices."""
    task, source = evaluator.parts.recipe.task, evaluator.source
    names, labels = source.tasks[task], found[f"label/{task}"]
    transform = examples.record_transform(
        evaluator.parts, tuple(maps), train=False, images=source.images
    )
    images, drawn, titles = [], [], []
    for i in range(min(ATTENDED, len(source), len(labels))):
        seen = transform(source[i], None)
        answer = names[found["logits"][i].argmax()]
        truth = names[labels[i].argmax()] if (labels[i] == 1).any() else "unknown"
        for name, stages in maps.items():
            image = seen[name]
            if image.dtype != np.uint8:
                layer = image[..., image.shape[-1] // 2]
                scaled = (layer - layer.min()) / max(np.ptp(layer), 1e-6) * 255
                image = scaled.astype(np.uint8)[..., None]
            images.append(image)
            drawn.append([s[i] if s[i].ndim == 2 else s[i].sum(-1) for s in stages])
            titles.append(f"{name}: {truth}\nanswer: {answer}")
    plots.attention(images, drawn, titles, out_png)
