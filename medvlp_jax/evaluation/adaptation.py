"""One trainer for heads on any image encoder: fine-tuning, segmentation, detection.

An encoder with a head is a recipe like the methods, so that `training.step` and `training.loop`
train it: AdamW, a linear warm-up, a cosine. What does best on held-out patients is kept.

A head is a Linen module with

* `targets`, the batch keys it learns from, and `weights` of its loss terms;
* head(encoded, size, train=) -> outputs, of Encoded and the images' sides (H, W);
* losses(outputs, batch) -> unweighted float32 scalars;
* predict(outputs, batch) -> arrays [B, ...], small ones: what is kept of every test image.

Axis letters: B batch, H, W pixels, C channels.
"""

import math
import pathlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from medvlp_jax import distributed, sharding
from medvlp_jax.config import UserError
from medvlp_jax.encoders.base import IMAGENET_MEAN, IMAGENET_STD, normalise
from medvlp_jax.evaluation.results import Results
from medvlp_jax.training import loop, optim
from medvlp_jax.training import params as paths
from medvlp_jax.training import step as training
from medvlp_jax.training.report import Reporter


class Adapted(nn.Module):
    """An encoder with a head, as a recipe.

    Attributes:
      encoder: images [B, H, W, 3] -> Encoded.
      head: see the module's docstring.
      train_encoder: False keeps every number of the encoder as it is, BatchNorm's averages too.
      mean: of the pixels the encoder was trained on, scaled to [0, 1].
      std: likewise.
    """

    encoder: nn.Module
    head: nn.Module
    train_encoder: bool = False
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    @property
    def inputs(self) -> tuple[str, ...]:
        """Batch keys read in training."""
        return ("image", *self.head.targets)

    @property
    def weights(self) -> Mapping[str, float]:
        """Weights of the head's loss terms."""
        return self.head.weights

    @property
    def frozen(self) -> tuple[str, ...]:
        """Patterns of what is never trained."""
        return () if self.train_encoder else ("^encoder/",)

    @property
    def spaces(self) -> dict:
        """No text meets these images."""
        return {}

    def encode(self, batch, *, train=False):
        """Return the head's outputs for `image`, uint8 [B, H, W, 1 or 3]."""
        images = normalise(batch["image"], mean=self.mean, std=self.std)
        encoded = self.encoder(images, train=train and self.train_encoder)
        return {"outputs": self.head(encoded, images.shape[1:3], train=train)}

    def objective(self, features, batch, *, train=False):
        """Return the head's loss terms."""
        del train
        return self.head.losses(features["outputs"], batch)

    def predict(self, batch):
        """Return what the head says of every image, and the batch's labels beside it."""
        return self.head.predict(self.encode(batch)["outputs"], batch)


class Settings(NamedTuple):
    """How a head is trained; the values are our choice, the same for all encoders.

    Attributes:
      steps: at most; the length of the cosine. The same for any share of the labels, so that a
        small share is seen more often and not trained less.
      batch_size: images a step.
      lr: highest learning rate.
      encoder_lr: what it is multiplied by in the encoder (BenchX's "DLR" is 0.1).
      weight_decay: AdamW's.
      warmup: share of the steps.
      clip: largest norm of the gradient.
      evaluate_every: steps between two looks at the held-out patients.
      patience: looks without a gain after which training ends.
    """

    steps: int = 1000
    batch_size: int = 16
    lr: float = 1e-3
    encoder_lr: float = 0.1
    weight_decay: float = 0.05
    warmup: float = 0.1
    clip: float = 1.0
    evaluate_every: int = 50
    patience: int = 10

    def check(self) -> None:
        """Refuse settings that cannot train.

        Raises:
          UserError: naming one and what would be accepted.
        """
        for name in ("steps", "batch_size", "evaluate_every", "patience"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}; accepted is 1 or more.")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise UserError(f"lr={self.lr}; accepted is a positive number, such as 1e-3.")
        if not 0 < self.encoder_lr <= 1:
            raise UserError(f"encoder_lr={self.encoder_lr}; accepted is a share in (0, 1], as 0.1.")
        if not 0 <= self.warmup < 1:
            raise UserError(f"warmup={self.warmup}; accepted is a share of the steps in [0, 1).")


# Notes that each training has its own of.
OF_SEED = ("train_rows", "validation_rows", "best_step", "steps", "validation", "not_fitted")


class Fitted(NamedTuple):
    """What did best on the held-out patients.

    Attributes:
      variables: of the recipe, on the host.
      step: that they are from.
      value: their validation score.
      steps: that were trained.
    """

    variables: Mapping[str, Any]
    step: int
    value: float
    steps: int


def over_seeds(results: Sequence[Results]) -> Results:
    """Return the mean of each number over trainings that differ in their seed alone.

    The bounds are the means of the trainings' own: how much one training's number depends on the
    patients. How much it depends on the seed is `sd` beside the settings, over `per_seed`. Chance
    is a mean, too: it depends on the training patients that a seed draws. Notes of OF_SEED become
    lists in the order of `of_seeds`.

    Args:
      results: of each seed, with the same keys.
    """
    if len(results) == 1:
        return results[0]
    merged: Results = {}
    for key, first in results[0].items():
        merged[key] = dict(first)
        entries = [found[key] for found in results if key in found]
        for name in ("value", "low", "high", "chance") if "value" in first else ():
            each = [entry[name] for entry in entries]
            is_known = len(each) == len(results) and None not in each
            merged[key][name] = statistics.fmean(each) if is_known else None
    for key, entry in merged.items():
        if key.endswith("/protocol"):
            prefix = key.removesuffix("protocol")
            own = [k for k in merged if k.startswith(prefix) and k.count("/") == 2 and k != key]
            each = {k: [found[k]["value"] for found in results if k in found] for k in own}
            each = {k.removeprefix(prefix): v for k, v in each.items() if None not in v}
            entry["per_seed"] = each
            entry["sd"] = {k: statistics.stdev(v) for k, v in each.items() if len(v) > 1}
            entry["of_seeds"] = [found[key].get("seed") for found in results]
            entry |= {k: [found[key].get(k) for found in results] for k in OF_SEED if k in entry}
            entry.pop("seed", None)
            starts = [found[key].get("encoder", {}).get("weights") for found in results]
            if len({*starts}) > 1:  # random ones
                entry["encoder"] = entry["encoder"] | {"weights": starts}
    return merged


class _EnoughError(Exception):
    """No gain for so long that training ends."""


def initial(recipe: Adapted, encoder: Mapping | None, example: Mapping, seed: int) -> dict:
    """Return variables of a recipe: a fresh head on an encoder's weights.

    Args:
      recipe: the module.
      encoder: {"params": ..., maybe "batch_stats": ...}; None draws these, too: the control.
      example: with `image`, [H, W, C].
      seed: of what is drawn.

    Raises:
      UserError: if the weights do not fit, or the images do not suit the encoder.
    """
    batch = {"image": np.stack([np.asarray(example["image"])] * 2)}
    try:
        variables = training.init_variables(recipe, batch, seed)
    except ValueError as error:  # an encoder's sentence about sizes that do not fit
        raise UserError(str(error)) from error
    if encoder is None:
        return variables
    return {
        kind: paths.replace(tree, "encoder", encoder.get(kind, {}), "the encoder")
        if "encoder" in tree
        else tree
        for kind, tree in variables.items()
    }


def fit(
    recipe: Adapted,
    variables: Mapping,
    batches: Iterator,
    *,
    validate: Callable[[Mapping], float],
    settings: Settings,
    seed: int,
    mesh: jax.sharding.Mesh,
    folder: pathlib.Path,
) -> Fitted:
    """Train a head, and the encoder where the recipe says so.

    Args:
      recipe: encoder and head.
      variables: to start from; left as they are.
      batches: this process's training batches, without end.
      validate: variables -> score of the held-out patients; higher is better.
      settings: how.
      seed: of dropout and the like.
      mesh: batches are split over it.
      folder: for metrics.jsonl; made if absent.

    Raises:
      UserError: for a batch the devices do not divide, or a score that is no number.
    """
    settings.check()
    devices = sharding.batch_devices(mesh)
    if settings.batch_size % devices:
        raise UserError(
            f"batch_size={settings.batch_size} cannot be split over {devices} devices; accepted "
            f"are multiples of {devices}."
        )
    trainable, _ = paths.split(variables["params"], recipe.frozen)
    tx, rate = optim.make(
        trainable,
        name="adamw",
        lr=settings.lr,
        steps=settings.steps,
        warmup=int(settings.warmup * settings.steps),
        weight_decay=settings.weight_decay,
        clip=settings.clip,
        multipliers=(("^encoder/", settings.encoder_lr),) if recipe.train_encoder else (),
    )
    # The state is donated to the first step: what the caller holds is copied.
    state = training.make_state(jax.tree.map(np.array, dict(variables)), tx, recipe.frozen)
    state = sharding.place(state, sharding.shardings(state, mesh))
    step_fn = training.make_train_step(recipe, tx, rate, seed, mesh=mesh)
    best = Fitted(variables, 0, -math.inf, 0)

    def look(step, state):
        nonlocal best
        value = float(validate(state.variables))
        if not math.isfinite(value):
            raise UserError(f"The validation score of step {step} is {value}: training diverged.")
        best = best._replace(steps=step)
        if value > best.value:
            # Copies: what is fetched may be a view of memory that the next step is given.
            held = jax.tree.map(np.array, distributed.fetch(state.variables))
            best = Fitted(held, step, value, step)
        elif step - best.step >= settings.patience * settings.evaluate_every:
            raise _EnoughError
        return {"validation": value}

    folder.mkdir(parents=True, exist_ok=True)
    if distributed.is_writer():
        (folder / "metrics.jsonl").unlink(missing_ok=True)
    try:
        state = loop.fit(
            state,
            step_fn,
            batches,
            recipe=recipe,
            mesh=mesh,
            steps=settings.steps,
            reporter=Reporter(folder, every=10, writes=distributed.is_writer()),
            evaluate=look,
            evaluate_every=settings.evaluate_every,
        )
        look(settings.steps, state)
    except _EnoughError:
        pass
    return best
