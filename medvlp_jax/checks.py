"""What a run is refused for before anything is trained, compiled or written."""

import importlib.util
import inspect
import pathlib
from collections.abc import Mapping

import jax

from medvlp_jax import assemble, distributed, schedules, sharding
from medvlp_jax import config as configs
from medvlp_jax.config import UserError
from medvlp_jax.data import packing
from medvlp_jax.training import optim

VALIDATION = "validation"


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
    data, train = config["data"], config["train"]
    if data["crop"] > data["size"]:
        raise UserError(f"data.crop={data['crop']} is larger than data.size={data['size']}.")
    if data["channels"] not in (1, 3):
        raise UserError(f"data.channels must be 1 (grey) or 3, got {data['channels']}.")
    if not 0 <= data["mask_lower_edge"] < 1:
        raise UserError(
            f"data.mask_lower_edge={data['mask_lower_edge']} must be a share of the image's height "
            "in [0, 1)."
        )
    for name, least in (("keep", 1), ("keep_every", 0), ("log_every", 1)):
        if train[name] < least:
            raise UserError(f"train.{name}={train[name]} must be {least} or more.")
    optim.check(steps=train["steps"], **config["optim"])
    if config["init"]["text"] == "mlm":
        lr, rate = config["mlm"]["lr"], {key: config["mlm"][key] for key in ("steps", "warmup")}
        try:
            schedules.learning_rate(lr, kind="cosine", **rate)
        except ValueError as error:
            raise UserError(f"mlm: {error}.") from None
    if config["seed"] < 0:
        raise UserError(f"seed={config['seed']} must be 0 or more.")
    if train["wandb"] and importlib.util.find_spec("wandb") is None:
        raise UserError("train.wandb=True needs the package: pip install 'medvlp-jax[wandb]'.")
    if train["select"]:
        _selection(train, config["evals"])


def _selection(train, evals):
    if not train["evaluate_every"]:
        raise UserError("train.select needs evaluations: set train.evaluate_every.")
    if train["select"].startswith(("probe/", "grounding/")):
        raise UserError(
            f"train.select={train['select']}: that protocol runs at the end alone; accepted are "
            "numbers of the others."
        )
    if evals["split"] == VALIDATION:
        raise UserError(
            f"train.select={train['select']} chooses a step on the validation split, which is the "
            "one that evals.split reports: it would look better than it is. Accepted: "
            "evals.split=test."
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
