"""What `medvlp adapt --save` keeps of a training: encoder and head, as safetensors alone.

FOLDER/encoder/           an encoder that was trained: transformers.AutoModel and --encoder read it;
                          one that was kept frozen is the one that was named
FOLDER/head.safetensors   the head, by parameter path ("params/head/linear/kernel")
FOLDER/head.json          task and classes, how images are prepared, where the encoder comes from
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from medvlp_jax import convert, distributed
from medvlp_jax.convert import checkpoint, lora
from medvlp_jax.convert.files import write_json, write_tensors
from medvlp_jax.evaluation.adaptation import Adapted
from medvlp_jax.training import params as paths

ENCODER, HEAD, ABOUT = "encoder", "head.safetensors", "head.json"


def check(module: Any, variables: Mapping) -> None:
    """Refuse an encoder that has no Hugging Face form, before it is trained.

    Args:
      module: the encoder.
      variables: its own.

    Raises:
      UserError: naming it.
    """
    checkpoint.tensors_of(*_merged(module, variables))


def save(
    recipe: Adapted, variables: Mapping, folder: pathlib.Path, size: int, about: Mapping
) -> None:
    """Write the files above; every process calls it, one writes.

    Args:
      recipe: encoder and head.
      variables: its own, on the host.
      folder: made if absent.
      size: pixels a side of its images.
      about: what head.json holds.
    """
    if recipe.train_encoder:
        own = {kind: tree["encoder"] for kind, tree in variables.items() if "encoder" in tree}
        processor = convert.image_processor(size, mean=recipe.mean, std=recipe.std)
        module, own = _merged(recipe.encoder, own)
        convert.save(module, own, folder / ENCODER, preprocessor=processor)
    if distributed.is_writer():
        flat = {k: paths.flatten(tree) for k, tree in variables.items()}
        heads = {
            f"{kind}/{path}": leaf for kind, tree in flat.items() for path, leaf in tree.items()
        }
        heads = {path: leaf for path, leaf in heads.items() if path.split("/")[1] != "encoder"}
        write_tensors(folder / HEAD, heads)
        write_json(folder / ABOUT, about)


def _merged(module, variables):
    """Return an encoder and its variables with low-rank factors folded into the kernels."""
    if getattr(module, "lora", None) is None:
        return module, variables
    return module.clone(lora=None, parent=None), lora.merge(variables, module.lora).variables
