"""Encoders from elsewhere as the parts of a run, so that the evaluations of a run fit them.

A Hugging Face folder with an image encoder is enough for a linear probe; one with two (CLIPModel),
or a second folder with a text encoder whose features are as wide, also for zero-shot and retrieval.
What can be read is what `convert.load` reads.

Images are squashed to the encoder's square, where transformers cuts the middle out of one that is
not square. Mean, deviation and size are those of preprocessor_config.json, or of
processor_config.json. Features are pooled as `convert.save` wrote down, an export of a run as in
the run; of other folders as the architecture does by default.

Axis letters: B batch, D width, E joint width.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from medvlp_jax import assemble, convert, distributed, sharding, weights
from medvlp_jax.config import UserError
from medvlp_jax.convert import beside
from medvlp_jax.convert.beside import PREPROCESSOR
from medvlp_jax.convert.checkpoint import TOWERS, read_config
from medvlp_jax.data import text as tokenisation
from medvlp_jax.encoders.base import IMAGENET_MEAN, IMAGENET_STD, normalise
from medvlp_jax.recipes import base

SECTION = "report"
SIZE = 224  # pixels a side, where neither the encoder nor its folder says
LONGEST = 256  # tokens of a text, as data.text_length


class Preparation(NamedTuple):
    """How an encoder wants its images.

    Attributes:
      mean: per channel, of pixels scaled to [0, 1].
      std: likewise.
      size: pixels a side.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int


class Encoders(nn.Module):
    """An image encoder and perhaps a text encoder, as a recipe that is only evaluated.

    Attributes:
      image: encoder of images; its parameters may hold a "projection" to E.
      text: encoder whose pooled features are [B, E]; None for an image encoder alone.
      mean: per channel, of pixels scaled to [0, 1].
      std: per channel, same scale.
      projected: whether what the image encoder pools is still to be projected, by its own
        projection.
    """

    image: nn.Module
    text: nn.Module | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    projected: bool

    inputs = ("image",)

    @property
    def spaces(self) -> dict[str, tuple[str, str]]:
        """The joint space; none without a text encoder."""
        return {SECTION: ("image", "text")} if self.text else {}

    @nn.compact
    def encode(self, batch, *, train=False):
        """Return `image`, `text` [B, E] unit norm; `image_pooled` [B, D] as the encoder pools."""
        features = {}
        if "image" in batch:
            pooled = self.image(normalise(batch["image"], mean=self.mean, std=self.std)).pooled
            features["image_pooled"] = pooled = pooled.astype(jnp.float32)
            if self.projected:
                pooled = pooled @ self.image.get_variable("params", "projection")["kernel"]
            features["image"] = base.unit(pooled)
        if SECTION in batch:
            features["text"] = base.unit(self.text(batch[SECTION]).pooled)
        return features


def parts(
    encoder: str, text: str, data: Mapping[str, Any], *, with_text: bool
) -> tuple[assemble.Parts, dict]:
    """Read encoders from Hugging Face folders.

    Args:
      encoder: folder or hub id of the image encoder, or of both.
      text: folder or hub id of the text encoder and its tokenizer; "" takes the encoder's.
      data: the section of a config; its image and text sizes are replaced by the encoders'.
      with_text: whether texts are to be encoded.

    Returns:
      The parts and the variables.

    Raises:
      UserError: for a folder that holds no such encoder, or two that do not fit together.
    """
    folder, module, variables = image_encoder(encoder)
    trees, tokenizer, second = {"image": variables}, None, None
    if with_text:
        source = convert.fetch(text) if text else folder
        if not text and not _is_dual(folder):
            raise UserError(
                f"{encoder} holds one encoder: name the one for texts with --text, or evaluate "
                "with --protocol probe, which needs images alone."
            )
        second, trees["text"] = _load(source, "text")
        tokenizer = tokenisation.load_tokenizer(source)
        if tokenizer.get_vocab_size() > second.vocab_size:
            raise UserError(
                f"{source}: its tokenizer has {tokenizer.get_vocab_size()} tokens, "
                f"its text encoder {second.vocab_size}."
            )
    seen = preparation(folder, module)
    projected = "projection" in variables["params"] and module.pooling != "projection"
    recipe = Encoders(module, second, seen.mean, seen.std, projected)
    data = {**data, "size": seen.size, "crop": seen.size, "crop_black_border": False}
    data |= {"stretch": False, "fit": "squash", "channels": len(seen.mean)}
    data["text_length"] = min(LONGEST, getattr(second, "max_length", LONGEST))
    config = {"recipe": {"name": "encoder"}, "data": data, "seed": 0, "mesh": {"rules": ()}}
    mesh = sharding.make_mesh()
    made = assemble.Parts(config, recipe, tokenizer, mesh, sharding.part_of(mesh), {})
    kinds = {kind for tree in trees.values() for kind in tree}
    joined = {k: {side: t[k] for side, t in trees.items() if k in t} for k in kinds}
    if with_text:
        _check_widths(made, joined)
    return made, joined


def image_encoder(source: str) -> tuple[Path, nn.Module, dict]:
    """Return folder, module and variables of the image encoder of a folder or hub id.

    Raises:
      UserError: if it holds none that `convert.load` reads.
    """
    folder = convert.fetch(source)
    module, variables = _load(folder, "vision")
    if hasattr(module, "vocab_size"):
        raise UserError(
            f"{source} holds a text encoder ({type(module).__name__}); an image encoder is needed, "
            "such as EXPORT/image."
        )
    return folder, module, variables


def preparation(folder: Path, module: nn.Module) -> Preparation:
    """Return how the images of an encoder are prepared, from the file that says so.

    The side is that of the crop, where images are cropped, else of the image; of the encoder where
    the file has neither.

    Raises:
      UserError: for a file whose mean, deviation or size are none, or that asks for another
        arithmetic.
    """
    file, found = beside.read_preprocessor(folder)
    if found is None:
        distributed.say(f"medvlp: {folder} has no {PREPROCESSOR}; images get ImageNet's mean.")
        found = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
    _check_steps(file, found)
    mean, std = beside.mean_and_std(found)
    names = ("size",) if found.get("do_center_crop") is False else ("crop_size", "size")
    sides = [found[name] for name in names if found.get(name)]
    side = sides[0] if sides else getattr(module, "image_size", SIZE)
    if isinstance(side, Mapping):
        side = side.get("height") or side.get("shortest_edge")
    if not (_are_numbers(mean) and _are_numbers(std)) or len(mean) != len(std):
        raise UserError(
            f"{file} has image_mean {mean} and image_std {std}; accepted are lists of numbers, of "
            f"one length, or none where image_processor_type is one of {', '.join(beside.NUMBERS)}."
        )
    if not isinstance(side, int):
        raise UserError(
            f"{file} has the size {sides}; accepted is one of whole pixels, for a square."
        )
    return Preparation(tuple(mean), tuple(std), side)


def _check_steps(file: Path, found: Mapping[str, Any]) -> None:
    """Refuse a preparation that does not divide by 255 and normalise.

    Raises:
      UserError: naming the settings.
    """
    wrong = [f"{key} False" for key in ("do_normalize", "do_rescale") if found.get(key) is False]
    scale = found.get("rescale_factor")
    if scale is not None and not (_are_numbers([scale]) and math.isclose(scale, 1 / 255)):
        wrong.append(f"rescale_factor {scale!r}")
    if wrong:
        raise UserError(
            f"{file} asks for {', '.join(wrong)}; accepted are pixels that are divided by 255 and "
            "normalised."
        )


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(type(v) in (int, float) for v in value)


def _is_dual(folder: Path) -> bool:
    config = read_config(folder)
    return any(f"{tower}_config" in config for tower in TOWERS)


def _load(folder: Path, tower: str):
    """Return module and variables of an encoder without the heads that nothing here reads.

    Texts are projected by their own module.
    """
    is_dual = _is_dual(folder)
    heads = {} if is_dual else weights.heads_of(folder, {})
    module, variables = convert.load(folder, tower=tower if is_dual else "", **heads)
    if tower == "text" and "projection" in variables["params"]:
        module = module.clone(pooling="projection")
    return module, variables


def _check_widths(made: assemble.Parts, variables: Mapping) -> None:
    """Refuse a text encoder whose features do not meet the images'.

    Raises:
      UserError: with both widths.
    """
    side = made.config["data"]["crop"]
    batch = {"image": np.zeros((1, side, side, made.config["data"]["channels"]), np.uint8)}
    batch[SECTION] = tokenisation.tokenize(
        made.tokenizer, ["a"], made.config["data"]["text_length"]
    )
    apply = lambda v, b: made.recipe.apply(v, b, method="encode")
    found = jax.eval_shape(apply, variables, batch)
    widths = found["image"].shape[-1], found["text"].shape[-1]
    if len({*widths}) > 1:
        raise UserError(
            f"Images become {widths[0]} numbers and texts {widths[1]}: the two encoders were not "
            "trained together. --protocol probe needs no text encoder."
        )
