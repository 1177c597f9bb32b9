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

from medvlp_jax import __version__, assemble, convert
from medvlp_jax.config import UserError, to_json
from medvlp_jax.convert import beside, dual, lora
from medvlp_jax.convert.files import write_tensors
from medvlp_jax.data import corpora
from medvlp_jax.data import text as tokenisation
from medvlp_jax.encoders import clip_vision, siglip, vit
from medvlp_jax.encoders.base import IMAGENET_MEAN, IMAGENET_STD
from medvlp_jax.evaluation.results import Results, results_table
from medvlp_jax.recipes.clip import MAX_SCALE, Clip
from medvlp_jax.training import params as paths
from medvlp_jax.writing import replaced

CARD = """\
---
license: other
library_name: transformers
tags: [medical, vision-language, {recipe}]
---

# {title}

Trained with medvlp_jax {version}, recipe `{recipe}`, {steps} steps of {batch} pairs.
{generated}
Not for clinical use.

| folder | what | load with |
|---|---|---|
| `image/` | image encoder, {image_parameters:.2f} M parameters | `AutoModel.from_pretrained` |
| `text/` | text encoder, {text_parameters:.2f} M parameters | the same{text_options} |
| `projections.safetensors` | heads and scales, by parameter path | the code below |
{dual}
Images: grey, {preparation}, {crop} x {crop} pixels, replicated to three channels, ImageNet mean and
standard deviation. Reports: at most {length} tokens.
{example}
## Data

{data}

## Results

{results}

## Config

```json
{config}
```
"""


NO_POOLER = "add_pooling_layer=False"  # a pooler would be made at random, and transformers says so
ASKED_TO_INTERPOLATE = (vit.ViT, clip_vision.ClipVision, siglip.Siglip)
DUAL = "| `dual/` | both, projected | `VisionTextDualEncoderModel.from_pretrained` |\n"

EXAMPLE = """\
import torch
import transformers
from safetensors.torch import load_file
from torch.nn.functional import batch_norm, normalize

heads = load_file("projections.safetensors")
image = transformers.AutoModel.from_pretrained("image"{image_options}).eval()
text = transformers.AutoModel.from_pretrained("text"{text_options}).eval()
processor = transformers.AutoImageProcessor.from_pretrained("image")
tokenizer = transformers.AutoTokenizer.from_pretrained("text")

{heads}
@torch.no_grad()
def similarity(images, reports):
    out = image(**processor(images, return_tensors="pt"){image_call})
    x = embed({image_pooled}, "image")
    cut = {{"truncation": True, "max_length": {length}}}
    tokens = tokenizer(reports, padding=True, return_tensors="pt", **cut)
    mask = tokens.attention_mask
    out = text(tokens.input_ids, attention_mask=mask)
    y = embed({text_pooled}, "text")
    return x @ y.T  # cosines [images, reports]
"""


def export(
    parts: assemble.Parts,
    variables: Mapping,
    out: pathlib.Path,
    sources: Sequence[corpora.Source],
    results: Results | None = None,
) -> None:
    """Write both encoders, the heads and a model card; of a recipe without images OUT/text alone.

    Args:
      parts: of the run.
      variables: of the recipe, on the host.
      out: folder, made if absent.
      sources: what the run was trained on, for the model card.
      results: likewise.

    Raises:
      UserError: if the recipe has no text encoder, or an encoder cannot be written.
    """
    check(parts)
    length = parts.config["data"]["text_length"]
    if not hasattr(parts.recipe, "image"):
        params = variables["params"]["text"]
        write_text(parts.recipe.text, params, out, parts.tokenizer, length=length)
        return
    crop = parts.config["data"]["crop"]
    write_weights(parts.recipe, variables, out, parts.tokenizer, crop=crop, length=length)
    with replaced(pathlib.Path(out) / "README.md") as scratch:
        scratch.write_text(_card(parts, variables, sources, results or {}))


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
    if _has_dual(recipe, crop):
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


def _has_dual(recipe, crop):
    """Say whether a VisionTextDualEncoderModel computes the same: linear heads, pooler outputs.

    It cannot be told to interpolate positions.
    """
    known = isinstance(recipe, Clip) and not dual.refusal(recipe.image, recipe.text)
    return known and not _is_interpolated(recipe.image, crop)


def _is_interpolated(image, crop):
    """Say whether transformers must be told that images are not as large as the position table."""
    return isinstance(image, ASKED_TO_INTERPOLATE) and image.image_size != crop


def example(recipe: Any, length: int, crop: int) -> str:
    """Return PyTorch code that loads an export and defines similarity(images, reports).

    "" for a recipe that does not say what its heads are in PyTorch, or whose encoders pool in a way
    that is no short expression there.
    """
    pooled = [dual.pooled_in_torch(module) for module in (recipe.image, recipe.text)]
    heads = getattr(recipe, "heads_in_torch", "")
    if not heads or not all(pooled):
        return ""
    options = lambda module: "" if getattr(module, "pooler", True) else f", {NO_POOLER}"
    is_interpolated = _is_interpolated(recipe.image, crop)
    return EXAMPLE.format(
        heads=heads,
        image_pooled=pooled[0],
        text_pooled=pooled[1],
        image_options=options(recipe.image),
        text_options=options(recipe.text),
        image_call=", interpolate_pos_encoding=True" if is_interpolated else "",
        length=length,
    )


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


def _card(parts, variables, sources, results) -> str:
    config = parts.config
    data = config["data"]
    generated = [s.name for s in sources if s.metadata["generated"]]
    code = example(parts.recipe, data["text_length"], data["crop"])
    has_pooler = getattr(parts.recipe.text, "pooler", True)
    count = lambda name: paths.count(variables["params"][name]) / 1e6
    return CARD.format(
        title=f"{config['recipe']['name']} on {', '.join(data['corpora'])}",
        version=__version__,
        recipe=config["recipe"]["name"],
        steps=config["train"]["steps"],
        batch=config["train"]["batch_size"],
        generated=f"**{', '.join(generated)} is generated data: no patient was imaged.**\n"
        if generated
        else "",
        image_parameters=count("image"),
        text_parameters=count("text"),
        text_options="" if has_pooler else f", `{NO_POOLER}`",
        preparation=f"{data['fit']} to {data['size']} x {data['size']} and cropped",
        crop=data["crop"],
        length=data["text_length"],
        dual=DUAL if _has_dual(parts.recipe, data["crop"]) else "",
        example=f"\n```python\n{code}```\n" if code else "",
        data="\n".join(f"* `{s.name}`, {s.split}: {len(s)} records" for s in sources),
        results=results_table(results, markdown=True) if results else "Not evaluated.",
        config=to_json(config),
    )
