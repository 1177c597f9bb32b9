"""What a run is refused for before anything is trained, compiled or written."""

import contextlib
import importlib.util
import inspect
import itertools
import pathlib
from collections.abc import Mapping, Sequence

import jax

from medvlp_jax import assemble, distributed, ranges, schedules, sharding
from medvlp_jax import config as configs
from medvlp_jax.config import UserError
from medvlp_jax.data import packing, pairing, transforms
from medvlp_jax.evaluation import results
from medvlp_jax.evidence import phrases
from medvlp_jax.recipes import base
from medvlp_jax.training import optim

VALIDATION = "validation"
DTYPES = ("float32", "bfloat16")
CHOICES = {
    "data.fit": transforms.FITS,
    "data.evidence.unit": phrases.UNITS,
    "data.pairing.variant": pairing.VARIANTS,
    "recipe.image.dtype": DTYPES,
    "recipe.text.dtype": DTYPES,
}
TASKS = ("task", "label")  # settings of recipes that name the label task they read
# Settings by which other records come, or in another order.
ORDER = ("seed:", "data.corpora:", "data.split:", "data.shares:", "data.balance:", "data.texts:")
ORDER += ("data.folds.", "data.pairing.", "data.knowledge.")
LOWER_IS_BETTER = ("mean_rank", "median_rank", "loss")


def processes(config: Mapping, workdir: pathlib.Path) -> None:
    """Refuse a process that was started with another config, code or folder."""
    facts = {f"config.{k}": repr(v) for k, v in configs.flatten(config)}
    facts |= {"--workdir": str(workdir), "the code": distributed.code_version()}
    distributed.check_same({**facts, "jax": jax.__version__})


def settings(config: Mapping) -> None:
    """Refuse settings that do not fit one another, whatever the corpus and the devices.

    Raises:
      UserError: for sizes, an optimiser or a selection that cannot be.
    """
    ranges.check(config)
    for name, value in configs.flatten(config):
        if value not in CHOICES.get(name, (value,)):
            raise UserError(f"{name}={value} must be {' or '.join(CHOICES[name])}.")
    data, train = config["data"], config["train"]
    if not data["corpora"]:
        raise UserError("data.corpora is empty; accepted is one or more of `medvlp data list`.")
    if data["crop"] > data["size"]:
        raise UserError(f"data.crop={data['crop']} is larger than data.size={data['size']}.")
    if data["channels"] not in (1, 3):
        raise UserError(f"data.channels must be 1 (grey) or 3, got {data['channels']}.")
    optim.check(steps=train["steps"], **config["optim"])
    base.check_schedules(config["recipe"]["weights"])
    if config["init"]["text"] == "mlm":
        lr, rate = config["mlm"]["lr"], {key: config["mlm"][key] for key in ("steps", "warmup")}
        try:
            schedules.learning_rate(lr, kind="cosine", **rate)
        except ValueError as error:
            raise UserError(f"mlm: {error}.") from None
    if train["wandb"] and importlib.util.find_spec("wandb") is None:
        raise UserError("train.wandb=True needs the package: pip install 'medvlp-jax[wandb]'.")
    if train["select"]:
        _selection(train, config["evals"])


def _selection(train, evals):
    if not train["evaluate_every"]:
        raise UserError("train.select needs evaluations: set train.evaluate_every.")
    protocol, number = train["select"].split("/")[0], train["select"].split("/")[-1]
    if protocol in ("probe", "grounding"):
        raise UserError(
            f"train.select={train['select']}: that protocol runs at the end alone; accepted are "
            "numbers of the others."
        )
    if protocol not in evals["protocols"]:
        raise UserError(
            f"train.select={train['select']} is no number of evals.protocols; accepted is such as "
            f"PROTOCOL/TASK/NUMBER, with a PROTOCOL of {', '.join(evals['protocols'])}."
        )
    if number in LOWER_IS_BETTER:
        raise UserError(
            f"train.select={train['select']}: the step with the highest number is taken, and of "
            f"{number} the lowest is best; accepted are the others."
        )
    if evals["split"] == VALIDATION:
        raise UserError(
            f"train.select={train['select']} chooses a step on the validation split, which is the "
            "one that evals.split reports: it would look better than it is. Accepted: "
            "evals.split=test."
        )


def selected(name: str, validator, variables: Mapping) -> None:
    """Refuse a train.select that the evaluations in training will not find among their numbers.

    Args:
      name: train.select.
      validator: what evaluates in training, see evaluator.Evaluator.
      variables: of the recipe; any will do.

    Raises:
      UserError: naming the nearest.
    """
    # A batch has most numbers; all rows are asked where it has not, as R@10 of fewer than ten, or
    # cannot be evaluated, as one without a text.
    with contextlib.suppress(UserError):
        if name in results.headlines(validator.quick(variables, limit=validator.batch_size)):
            return
    known = results.headlines(validator.quick(variables, limit=0))
    if name not in known:
        raise UserError(
            f"train.select={name} is not among the validation results. "
            f"{configs.nearest(name, known)}"
        )


def split(config: Mapping, mesh) -> None:
    """Refuse batches that the devices cannot split, before a text encoder is trained on any.

    Raises:
      UserError: naming both numbers.
    """
    pieces = sharding.batch_devices(mesh)
    stages = ("train", "mlm") if config["init"]["text"] == "mlm" else ("train",)
    for stage in stages:
        size = config[stage]["batch_size"]
        if size % pieces:
            raise UserError(
                f"{stage}.batch_size={size} cannot be split over {pieces} devices; "
                f"accepted are multiples of {pieces}."
            )


def sources(config: Mapping, opened: Sequence) -> None:
    """Refuse what config.data asks of the corpora and they do not have.

    Args:
      config: resolved.
      opened: their splits that are trained on.

    Raises:
      UserError: for a share too many or too few, a task that is none of theirs, or one whose
        classes are not those of the first corpus: label vectors know them by their place alone.
    """
    data = config["data"]
    if data["shares"] and len(data["shares"]) != len(opened):
        raise UserError(
            f"data.shares={data['shares']} has {len(data['shares'])} numbers for {len(opened)} "
            "corpora; accepted is one for each, or () for shares by size."
        )
    for source in opened if data["balance"] else ():
        if data["balance"] not in source.tasks:
            raise UserError(
                f"data.balance: {source.name} has no task '{data['balance']}'. "
                f"{configs.nearest(data['balance'], [*source.tasks])}"
            )
    for task in filter(None, map(config["recipe"].get, TASKS)):
        names = data["corpora"]
        for name, source in zip(names, opened, strict=True):
            classes = opened[0].tasks.get(task, ()), source.tasks.get(task, ())
            if differs := difference(*classes, names[0], name):
                raise UserError(
                    f"data.corpora: the classes of task '{task}' differ: {differs}; accepted are "
                    "corpora with the same classes in the same order."
                )


def difference(first: Sequence[str], second: Sequence[str], here: str, there: str) -> str:
    """Say which class is the first that differs in two corpora; "" where all are the same.

    Args:
      first: class names in the order of the label vector.
      second: those of the other corpus.
      here: name of the one corpus.
      there: name of the other.
    """
    said = lambda name: "none" if name is None else f"'{name}'"
    for k, (a, b) in enumerate(itertools.zip_longest(first, second)):
        if a != b:
            return f"class {k} is {said(a)} in {here} and {said(b)} in {there}"
    return ""


def evidence(config: Mapping, recipe, opened: Sequence, pools: pairing.Pools | None) -> None:
    """Refuse an extraction that lacks reports that are trained on, where the recipe reads one.

    Args:
      config: resolved.
      recipe: whose `inputs` name what it reads.
      opened: splits that are trained on.
      pools: of limited pairing, where some studies are images alone.

    Raises:
      UserError: naming the corpus.
    """
    folder = config["data"]["evidence"]["folder"]
    if folder and "evidence" in recipe.inputs:
        for source in opened:
            texts = list(source.texts())
            texts = texts if pools is None else [texts[i] for i in pools.reports]
            phrases.check(folder, f"{source.name} ({source.split})", texts)


def resumed(config: Mapping, step: int) -> None:
    """Refuse to call a run that was trained for longer one of `train.steps` steps.

    Raises:
      UserError: naming both.
    """
    steps = config["train"]["steps"]
    if step > steps:
        raise UserError(
            f"train.steps={steps}, but this run was trained to step {step} already; accepted is "
            f"{step} or more, or another --workdir."
        )


def position(config: Mapping, restored) -> dict:
    """Return where a resumed run goes on in the data: at the same record, also in other batches.

    Says how many records are seen twice, and that the place means nothing where others come.

    Args:
      config: resolved.
      restored: checkpoint.Restored, whose position counts batches of its own config's size.
    """
    before = assemble.completed(restored.config)
    changed = [c for c in configs.differences(before, config) if c.startswith(ORDER)]
    old, new = before["train"], config["train"]
    sizes = [stage["batch_size"] for stage in (old, new)]
    rows = [stage["steps"] * stage["batch_size"] for stage in (old, new)]
    if config["data"]["pairing"]["passes"] and rows[0] != rows[1]:
        changed.append(f"train.steps x train.batch_size, for data.pairing.passes: {rows}")
    if changed:
        distributed.say(
            f"Other records come, or in another order, than before ({'; '.join(changed)}): the "
            "place in the data means nothing now, and some are seen again or later than others."
        )
    if sizes[0] == sizes[1]:
        return dict(restored.position)
    seen = restored.position["next_index"] * sizes[0]
    index, again = divmod(seen, sizes[1])
    distributed.say(
        f"train.batch_size {sizes[0]} -> {sizes[1]}: the data go on after {seen} records with the "
        f"batch that holds the next one, {again} of whose {sizes[1]} were seen before."
    )
    return {**restored.position, "next_index": index}


def several(config: Mapping, recipe, variables: Mapping) -> None:
    """Refuse a batch, or a chunk of one, in which an example is by itself and needs others.

    Args:
      config: resolved.
      recipe: contrasts the rows of a batch where it has `spaces`.
      variables: with "batch_stats" where it normalises over the batch, by chunks.

    Raises:
      UserError: naming the size.
    """
    size, chunks = config["train"]["batch_size"], config["train"]["chunks"]
    if size < 2 and recipe.spaces:
        raise UserError(
            f"train.batch_size={size} leaves nothing to contrast; accepted is 2 or more."
        )
    if size // chunks < 2 and "batch_stats" in variables:
        raise UserError(
            f"train.batch_size={size} in train.chunks={chunks}: BatchNorm needs 2 or more examples "
            "in each."
        )


def batch(config: Mapping, parts) -> None:
    """Refuse a batch that the devices, the chunks or the recipe cannot split.

    Args:
      config: resolved.
      parts: with `mesh` and `recipe`: assemble.Parts or a plan.Blueprint.

    Raises:
      UserError: naming both numbers.
    """
    size, chunks = config["train"]["batch_size"], config["train"]["chunks"]
    pieces = sharding.batch_devices(parts.mesh)
    split(config, parts.mesh)
    if chunks < 1 or size % (pieces * chunks):
        raise UserError(
            f"train.batch_size={size} cannot be split into train.chunks={chunks} on {pieces} "
            f"devices; accepted are multiples of {pieces} times chunks."
        )
    packed(config, parts.recipe, parts.mesh)
    group = getattr(parts.recipe, "contrast_group", 0)
    if group and size % group:
        raise UserError(
            f"train.batch_size={size} cannot be split into recipe.contrast_group={group}."
        )


def packed(config: Mapping, recipe, mesh) -> dict[str, float]:
    """Return rows for each example by text that is packed, see data/packing.py.

    Args:
      config: resolved.
      recipe: whose `packs` names the texts that may be.
      mesh: each of whose devices packs its own.

    Raises:
      UserError: where the recipe packs nothing, chunks would part a row, or rows are too few.
    """
    data, train = config["data"], config["train"]
    asked = {"data.pack": data["pack"], "data.evidence.pack": data["evidence"]["pack"]}
    known = getattr(recipe, "packs", ())
    reports = [key for key in known if key != "evidence"]
    keys = {"data.pack": reports, "data.evidence.pack": [k for k in known if k == "evidence"]}
    found = {}
    for setting, share in asked.items():
        if not share:
            continue
        if not keys[setting]:
            raise UserError(
                f"{setting}={share}: {type(recipe).__name__} reads no text that could be "
                "packed; accepted is 0."
            )
        if "segments" not in inspect.signature(type(recipe.text).__call__).parameters:
            raise UserError(
                f"{setting}={share}: texts cannot share a row in {type(recipe.text).__name__}; "
                "accepted is 0."
            )
        if train["chunks"] > 1:
            raise UserError(
                f"{setting}={share} and train.chunks={train['chunks']}: a chunk would part the "
                "texts of a row; accepted is one of the two."
            )
        of = data["evidence"] if setting == "data.evidence.pack" else {}
        examples = train["batch_size"] // sharding.batch_devices(mesh)
        texts, length = examples * of.get("phrases", 1), of.get("length", data["text_length"])
        packing.check(share, examples, texts, length, setting)
        found |= dict.fromkeys(keys[setting], share)
    return found


def say_changes(config: Mapping, workdir: pathlib.Path) -> None:
    """Show what differs from the run in `workdir`; the checkpoint refuses another architecture."""
    if not (workdir / assemble.CONFIG).is_file():
        return
    for line in configs.differences(assemble.read_config(workdir), config):
        distributed.say(f"config differs from the run in {workdir}: {line}")
