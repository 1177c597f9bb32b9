"""From a run to folders that `transformers` loads, with a model card.

OUT/image/                   the image encoder: AutoModel.from_pretrained("OUT/image")
OUT/text/                    the text encoder and its tokenizer
OUT/projections.safetensors  everything else: projections, heads, scales, by parameter path
OUT/dual/                    where the heads allow, all of it as a VisionTextDualEncoderModel
OUT/README.md                how to load it in PyTorch, data, config, results
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medvlp_jax import assemble, convert, weights
from medvlp_jax.card import card, has_dual
from medvlp_jax.config import UserError
from medvlp_jax.convert import beside, dual, lora
from medvlp_jax.convert.files import write_tensors
from medvlp_jax.data import corpora
from medvlp_jax.data import text as tokenisation
from medvlp_jax.encoders.base import IMAGENET_MEAN, IMAGENET_STD
from medvlp_jax.evaluation.results import Written
from medvlp_jax.recipes.clip import MAX_SCALE
from medvlp_jax.training import params as paths
from medvlp_jax.writing import replaced


def export(
    parts: assemble.Parts,
    trained: weights.Trained,
    out: pathlib.Path,
    sources: Sequence[corpora.Source],
    measured: Written | None = None,
) -> None:
    """Write both encoders, the heads and a model card; of a recipe without images OUT/text alone.

    Args:
      parts: of the run.
      trained: variables of the recipe, on the host, and of which step they are.
      out: folder, made if absent.
      sources: what the run was trained on, for the model card.
      measured: results with their provenance, likewise; left out where they are of other weights.

    Raises:
      UserError: if the recipe has no text encoder, or an encoder cannot be written.
    """
    check(parts)
    length = parts.config["data"]["text_length"]
    if not hasattr(parts.recipe, "image"):
        params = trained.variables["params"]["text"]
        write_text(parts.recipe.text, params, out, parts.tokenizer, length=length)
        return
    crop = parts.config["data"]["crop"]
    variables = trained.variables
    write_weights(parts.recipe, variables, out, parts.tokenizer, crop=crop, length=length)
    with replaced(pathlib.Path(out) / "README.md") as scratch:
        scratch.write_text(card(parts, trained, sources, measured))


def check(parts: assemble.Parts) -> None:
    """Refuse a recipe that is not a pair of encoders.

    Raises:
      UserError: naming it.
    """
    if parts.tokenizer is None:
        name = parts.config["recipe"]["name"]
        raise UserError(
            f"Recipe {name} has no text encoder, and only pairs of encoders are exported; accepted "
            "is train.export=False."
        )


def write_text(
    module: Any, params: Mapping, out: pathlib.Path, tokenizer: Any, *, length: int
) -> None:
    """Write a text encoder as OUT/text, its low-rank factors folded into the kernels.

    Args:
      module: the encoder.
      params: its own, on the host.
      out: folder, made if absent.
      tokenizer: of the encoder.
      length: tokens of a text, at most.
    """
    out = pathlib.Path(out)
    module, variables = _merged(module, {"params": params})
    _write_tokenizer(tokenizer, out / "text", module, length)
    convert.save(module, variables, out / "text", tokenizer=out / "text")


def _merged(module, variables):
    """Return an encoder and its variables with the low-rank factors folded into the kernels."""
    if getattr(module, "lora", None) is None:
        return module, variables
    return module.clone(lora=None, parent=None), lora.merge(variables, module.lora).variables


def write_weights(
    recipe: Any,
    variables: Mapping,
    out: pathlib.Path,
    tokenizer: Any,
    *,
    crop: int,
    length: int,
) -> None:
    """Write everything but the model card, low-rank factors folded into the kernels.

    Args:
      recipe: two encoders, `image` and `text`, and heads.
      variables: its own, on the host.
      out: folder, made if absent.
      tokenizer: of the text encoder.
      crop: pixels a side of an image.
      length: tokens of a text, at most.

    Raises:
      UserError: if an encoder is not one that can be written.
    """
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    side = lambda name: {k: tree[name] for k, tree in variables.items() if name in tree}
    processor = convert.image_processor(crop, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    image_module, image = _merged(recipe.image, side("image"))
    text_module, text = _merged(recipe.text, side("text"))
    text = {**text, "params": _without_heads(text_module, text["params"])}
    convert.save(image_module, image, out / "image", preprocessor=processor)
    _write_tokenizer(tokenizer, out / "text", text_module, length)
    convert.save(text_module, text, out / "text", tokenizer=out / "text")
    if has_dual(recipe, crop):
        params = variables["params"]
        dual.save_dual(
            dual.Side(image_module, image, params["image_projection"]["kernel"]),
            dual.Side(text_module, text, params["text_projection"]["kernel"]),
            out / "dual",
            log_scale=min(float(params["log_scale"]), np.log(MAX_SCALE)),
            tokenizer=out / "text",
            preprocessor=processor,
        )
    heads = {
        f"{kind}/{path}": np.ascontiguousarray(value)
        for kind, tree in variables.items()
        for path, value in paths.flatten(tree).items()
        if not path.startswith(("image/", "text/"))
    }
    write_tensors(out / "projections.safetensors", heads)


def _without_heads(module, tree):
    return (
        tree
        if getattr(module, "mlm_head", False)
        else {k: v for k, v in tree.items() if "mlm" not in k}
    )


# What special tokens are called: BERT's; CLIP's; T5's and SigLIP's; Gemma's and SigLIP 2's.
SPECIAL = {
    "bos": ("<|startoftext|>", "<bos>"),
    "cls": ("[CLS]",),
    "eos": ("</s>", "<eos>"),
    "mask": ("[MASK]",),
    "sep": ("[SEP]",),
    "unk": ("[UNK]", "<unk>"),
}


def _write_tokenizer(tokenizer, folder, module, length):
    """Write tokenizer.json and what transformers needs to know beside it."""
    from transformers import PreTrainedTokenizerFast

    ids = {
        kind: next(filter(None.__ne__, map(tokenizer.token_to_id, names)), None)
        for kind, names in SPECIAL.items()
    }
    ids["pad"] = tokenisation.pad_id(tokenizer)
    ids["eos"] = next(iter(_ends(module)), ids["eos"])
    known = {f"{k}_token": tokenizer.id_to_token(i) for k, i in ids.items() if i is not None}
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=length, **{k: v for k, v in known.items() if v}
    )
    beside.save_tokenizer(made, folder)


def _ends(module):
    """Return the ids that end a text, as the encoder has them."""
    return (module.eos_id,) if hasattr(module, "eos_id") else getattr(module, "eos_ids", ())
