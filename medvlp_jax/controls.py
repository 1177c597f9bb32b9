"""What an evaluation is repeated without, to see what its numbers owe to it.

A control takes something away: training, the image's edge, the right text, all that is written in a
table. `full` runs them beside the protocols; docs/evaluation.md lists them.
"""

from collections.abc import Mapping
from typing import Any

from medvlp_jax import assemble, clinical, distributed
from medvlp_jax.config import UserError
from medvlp_jax.data import tabular
from medvlp_jax.evaluation import baselines, flavours, shuffle
from medvlp_jax.evaluation.results import Results, renamed
from medvlp_jax.recipes.base import classifies

CLASSIFY = ("classify", "classify_studies")
# Those that repeat some protocols alone: they take nothing away from the others.
ONLY_WITH = {
    "shuffled_images": ("zero_shot", "retrieval", "probe", *CLASSIFY),
    "shuffled_metadata": CLASSIFY,
    "shuffled_phrases": ("grounding",),
    "shuffled_pairs": ("retrieval",),
}
NAMES = ("untrained", "masked_edge", "regression", "missing_mask", *ONLY_WITH)
TABLE = ("tabular", *clinical.KEYS)  # batch keys that come from it


def full(evaluator: Any, variables: Mapping, untrained: Mapping | None = None) -> Results:
    """Run the protocols and the controls of the settings.

    Args:
      evaluator: see evaluator.Evaluator.
      variables: trained.
      untrained: freshly initialised ones for the control "untrained"; None leaves it out.
    """
    asked = evaluator.settings["controls"]
    results = evaluator.run(variables, keep=True, progress="evaluation")
    if "masked_edge" in asked:
        fraction = evaluator.settings["masked_edge"]
        masked = evaluator.run(variables, mask=fraction, progress="lower edge masked")
        results |= renamed(masked, f"lower {fraction:.0%} masked")
    if "untrained" in asked and untrained is not None:
        results |= renamed(evaluator.run(untrained, progress="untrained control"), "untrained")
    for control in shuffle.CONTROLS:
        if control in asked:
            moved = shuffle.shuffled(evaluator.source, control)
            name = control.replace("_", " ")
            only = ONLY_WITH[control]
            found = evaluator.run(variables, source=moved, only=only, progress=name)
            results |= renamed(found, name)
    if "shuffled_phrases" in asked:
        results |= evaluator.shuffled_phrases(variables)
    if "shuffled_pairs" in asked:
        results |= evaluator.shuffled_pairs(variables)
    if "regression" in asked:
        results |= regression(evaluator)
    if "missing_mask" in asked:
        results |= missing_mask(evaluator)
    return results


def check(evaluator: Any) -> None:
    """Refuse controls that do not go with the protocols, the recipe or the corpus.

    Args:
      evaluator: see evaluator.Evaluator.

    Raises:
      UserError: naming the control and what it goes with.
    """
    settings = evaluator.settings
    protocols = {flavours.split(name)[0] for name in settings["protocols"]}
    for control, fitting_ones in ONLY_WITH.items():
        if control in settings["controls"] and not protocols & {*fitting_ones}:
            raise UserError(f"The control {control} goes with protocol {', '.join(fitting_ones)}.")
    for control, needed in _unread(evaluator).items():
        if control in settings["controls"]:
            name = evaluator.parts.config["recipe"]["name"]
            raise UserError(
                f"The control {control} would change nothing: recipe {name} reads no {needed} of "
                f"{evaluator.corpus}."
            )
    for control in ("regression", "missing_mask"):
        if control in settings["controls"] and settings["split"] == "train":
            raise UserError(
                f"The control {control} learns from the split train and cannot be scored on it: "
                "set another evals.split, or leave it out."
            )
    if "missing_mask" not in settings["controls"]:
        return
    if not (classifies(evaluator.parts.recipe) and evaluator.source.metadata.get("table")):
        raise UserError(
            f"The control missing_mask is for classifiers of a corpus with a table; this is recipe "
            f"{evaluator.parts.config['recipe']['name']} on {evaluator.corpus}."
        )


def _unread(evaluator: Any) -> dict[str, str]:
    """Return the controls that take away what the recipe does not read, and what that is."""
    images, further = evaluator.images(), evaluator.source.images
    found = {} if images else {"shuffled_images": "image"}
    if not any("slices" not in further.get(name, {}) for name in images):  # volumes have no edge
        found["masked_edge"] = "flat image"
    return found if {*TABLE} & {*evaluator.inputs()} else {**found, "shuffled_metadata": "table"}


def fitting(controls, protocols) -> tuple[str, ...]:
    """Return the controls without those of protocols that are not among these."""
    kept = {flavours.split(name)[0] for name in protocols}
    return tuple(name for name in controls if kept & {*ONLY_WITH.get(name, kept)})


def other_texts(found: Mapping, spaces: Mapping[str, tuple[str, str]]) -> dict:
    """Return features in which every row has the texts of another patient.

    Args:
      found: features of a corpus.
      spaces: of the recipe, section -> (image, text).
    """
    partner = shuffle.partners(found["patient_id"], seed=0)
    texts = {"text_id", *(text for _, text in spaces.values())}
    texts |= {f"{section}_{kind}" for section in spaces for kind in ("valid", "id")}
    return {**found, **{key: found[key][partner] for key in texts if key in found}}


def regression(evaluator: Any) -> Results:
    """Score logistic regressions on the raw input the recipe reads, with the same intervals.

    Args:
      evaluator: of a classifier.
    """
    source, settings = evaluator.source, evaluator.settings
    task, data = evaluator.parts.recipe.task, evaluator.parts.config["data"]
    train = assemble.open_corpus(evaluator.corpus, data, "train")
    test = evaluator.raw_features(source, limit=settings["limit"])
    fitted = evaluator.raw_features(train, limit=settings["probe_limit"])
    return _results(evaluator, baselines.scores(fitted, test, task=task), test)


def missing_mask(evaluator: Any) -> Results:
    """Score a logistic regression on which cells of the table are empty; {} where none is.

    Args:
      evaluator: of a classifier and a corpus with a table.
    """
    source, settings = evaluator.source, evaluator.settings
    task, data = evaluator.parts.recipe.task, evaluator.parts.config["data"]
    chosen = {name: data["table"][name] for name in ("exclude", "leakage")}
    names = tabular.columns(source.metadata["table"], **chosen)
    train = assemble.open_corpus(evaluator.corpus, data, "train")
    fitted = baselines.missing(train, names, task=task, limit=settings["probe_limit"])
    if not fitted[baselines.MISSING].any():
        distributed.say("The control missing_mask is left out: no cell of the table is empty.")
        return {}
    test = baselines.missing(source, names, task=task, limit=settings["limit"])
    return _results(evaluator, baselines.scores(fitted, test, task=task), test)


def _results(evaluator, scores, test) -> Results:
    task = evaluator.parts.recipe.task
    return baselines.results(
        scores,
        test,
        task=task,
        classes=evaluator.source.tasks[task],
        probe_limit=evaluator.settings["probe_limit"],
        resamples=evaluator.settings["resamples"],
        **evaluator.positive(),
    )
