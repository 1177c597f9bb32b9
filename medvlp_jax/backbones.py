"""An image encoder from anywhere: a Hugging Face folder or hub id, an export of ours, a run."""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from medvlp_jax import assemble, outside, weights
from medvlp_jax.config import UserError
from medvlp_jax.encoders.base import IMAGENET_MEAN, IMAGENET_STD
from medvlp_jax.evaluation import provenance
from medvlp_jax.training import params as paths


class Backbone(NamedTuple):
    """An image encoder and how it wants its images.

    Attributes:
      module: images [B, H, W, 3] -> Encoded.
      variables: {"params": ..., maybe "batch_stats": ...}, on the host.
      size: pixels a side it was trained on.
      mean: of pixels scaled to [0, 1].
      std: likewise.
      source: where it comes from, as the user named it.
    """

    module: Any
    variables: Mapping[str, Any]
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str

    def description(self) -> dict[str, Any]:
        """Return what a results file says of it: architecture, parameters, a hash of them."""
        return {
            "source": self.source,
            "architecture": type(self.module).__name__,
            "parameters": paths.count(self.variables["params"]),
            "weights": provenance.weights_hash(self.variables),
        }


def of_folder(source: str) -> Backbone:
    """Read the image encoder of a Hugging Face folder or hub id.

    Raises:
      UserError: if it holds none that `convert.load` reads.
    """
    folder, module, variables = outside.image_encoder(source)
    seen = outside.preparation(folder, module)
    return Backbone(module, variables, seen.size, seen.mean, seen.std, source)


def of_run(folder: pathlib.Path) -> Backbone:
    """Read the image encoder of a run: of its newest checkpoint, or the step it selected.

    Raises:
      UserError: if it is no run, or one without an encoder of images.
    """
    config = assemble.read_config(folder)
    parts = assemble.parts(config, pretrained=False)
    module = getattr(parts.recipe, "image", None)
    if not callable(module):
        raise UserError(
            f"{folder} is a run of recipe {config['recipe']['name']}, which has no image encoder."
        )
    template = assemble.initial_variables(parts)
    variables = weights.read_variables(folder, template)
    own = {kind: tree["image"] for kind, tree in variables.items() if "image" in tree}
    if "params" not in own:
        raise UserError(f"{folder} keeps no parameters of an image encoder named 'image'.")
    size = config["data"]["crop"]
    return Backbone(module, own, size, IMAGENET_MEAN, IMAGENET_STD, str(folder))
