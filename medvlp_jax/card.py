"""The model card of an export: what was trained, on what, how good it is, and PyTorch code for it.

The code is plain PyTorch, PIL and NumPy. It prepares images as the run did, bit by bit, and for a
recipe that says what its heads are in PyTorch it computes the similarities.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from medvlp_jax import __version__
from medvlp_jax.config import to_json
from medvlp_jax.convert import dual
from medvlp_jax.data import corpora
from medvlp_jax.encoders import clip_vision, siglip, vit
from medvlp_jax.evaluation import provenance
from medvlp_jax.evaluation.results import Written, results_table
from medvlp_jax.recipes.clip import Clip
from medvlp_jax.training import params as paths
from medvlp_jax.weights import Trained

WIDTH = 100  # characters of a line of prose
CARD = """\
---
license: other
library_name: transformers
tags: [medical, vision-language, {recipe}]
---

# {title}

{trained}
{generated}
Not for clinical use.

| folder | what | load with |
|---|---|---|
| `image/` | image encoder, {image_parameters:.2f} M parameters | `AutoModel.from_pretrained` |
| `text/` | text encoder, {text_parameters:.2f} M parameters | the same{text_options} |
| `projections.safetensors` | heads and scales, by parameter path | the code below |
{dual}
{preparation}

```python
{code}```

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
NOT_EVALUATED = "Not evaluated."
OTHER_WEIGHTS = (
    f"{NOT_EVALUATED} The results.json of the run is of other weights, or does not say of which; "
    "`medvlp evaluate --run` measures these."
)

# What `transforms.decode` and `transforms.center_view` do, as a few lines without this package.
OPENED = """\
import numpy as np
from PIL import Image, ImageOps


def prepared(image):  # what PIL.Image.open returns
    image.draft("{mode}", ({size}, {size}))  # of a JPEG, at once near the size that is needed
    image = ImageOps.exif_transpose(image).convert("{mode}")
"""
BORDER = """\
    image = image.crop(image.getbbox())  # no black borders
"""
STRETCHED = """\
    pixels = np.asarray(image)
    low, high = int(pixels.min()), int(pixels.max())
    if low < high:  # to 0..255
        values = np.rint((np.arange(256) - low) * 255 / (high - low)).clip(0, 255)
        image = Image.fromarray(values.astype(np.uint8)[pixels])
"""
FITTED = {
    "squash": """\
    image = image.resize(({size}, {size}), Image.Resampling.BILINEAR)
""",
    "pad": """\
    image = ImageOps.pad(image, ({size}, {size}), Image.Resampling.BILINEAR)
""",
}
WRAPPED = """\
    pixels = np.atleast_3d(np.asarray(image, np.float32))
    low, high = pixels.min(), pixels.max()
    pixels = (pixels - low) * (256 / max(high - low, 1))  # to 0..256, and 256 wraps to 0
    bands = [Image.fromarray(np.ascontiguousarray(band)) for band in np.moveaxis(pixels, -1, 0)]
    bands = [band.resize(({size}, {size}), Image.Resampling.BILINEAR) for band in bands]
    pixels = np.stack([np.asarray(band) for band in bands], -1).astype(np.int32) % 256
    image = Image.fromarray(pixels.astype(np.uint8).squeeze())
"""
MASKED = """\
    image.paste(0, (0, {kept}, {size}, {size}))  # the lower edge
"""
CENTRE = """\
    return image.crop(({edge}, {edge}, {end}, {end}))
"""

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
    pixels = processor([prepared(one) for one in images], return_tensors="pt")
    out = image(**pixels{image_call})
    x = embed({image_pooled}, "image")
    cut = {{"truncation": True, "max_length": {length}}}
    tokens = tokenizer(reports, padding=True, return_tensors="pt", **cut)
    mask = tokens.attention_mask
    out = text(tokens.input_ids, attention_mask=mask)
    y = embed({text_pooled}, "text")
    return x @ y.T  # cosines [images, reports]
"""


def card(
    parts: Any, trained: Trained, sources: Sequence[corpora.Source], measured: Written | None
) -> str:
    """Return the text of a model card.

    Args:
      parts: of the run, see `assemble.Parts`.
      trained: what is exported.
      sources: what the run was trained on.
      measured: results and their provenance; those of other weights are left out.
    """
    config = parts.config
    data = config["data"]
    generated = [s.name for s in sources if s.metadata["generated"]]
    has_pooler = getattr(parts.recipe.text, "pooler", True)
    count = lambda name: paths.count(trained.variables["params"][name]) / 1e6
    code = [preparation(data), example(parts.recipe, data)]
    return CARD.format(
        title=f"{config['recipe']['name']} on {', '.join(data['corpora'])}",
        recipe=config["recipe"]["name"],
        trained=_said_of_training(config, trained),
        generated=f"**{', '.join(generated)} is generated data: no patient was imaged.**\n"
        if generated
        else "",
        image_parameters=count("image"),
        text_parameters=count("text"),
        text_options="" if has_pooler else f", `{NO_POOLER}`",
        dual=DUAL if has_dual(parts.recipe, data["crop"]) else "",
        preparation=_said_of_preparation(data),
        code="\n\n".join(filter(None, code)),
        data="\n".join(f"* `{s.name}`, {s.split}: {len(s)} records" for s in sources),
        results=_said_of_results(measured, trained),
        config=to_json(config),
    )


def has_dual(recipe: Any, crop: int) -> bool:
    """Say whether a VisionTextDualEncoderModel computes the same: linear heads, pooler outputs.

    It cannot be told to interpolate positions.
    """
    known = isinstance(recipe, Clip) and not dual.refusal(recipe.image, recipe.text)
    return known and not _is_interpolated(recipe.image, crop)


def _is_interpolated(image, crop):
    """Say whether transformers must be told that images are not as large as the position table."""
    return isinstance(image, ASKED_TO_INTERPOLATE) and image.image_size != crop


def example(recipe: Any, data: Mapping[str, Any]) -> str:
    """Return PyTorch code that loads an export and defines similarity(images, reports).

    It calls what `preparation` returns. "" for a recipe that does not say what its heads are in
    PyTorch, or whose encoders pool in a way that is no short expression there.
    """
    pooled = [dual.pooled_in_torch(module) for module in (recipe.image, recipe.text)]
    heads = getattr(recipe, "heads_in_torch", "")
    if not heads or not all(pooled):
        return ""
    options = lambda module: "" if getattr(module, "pooler", True) else f", {NO_POOLER}"
    is_interpolated = _is_interpolated(recipe.image, data["crop"])
    return EXAMPLE.format(
        heads=heads,
        image_pooled=pooled[0],
        text_pooled=pooled[1],
        image_options=options(recipe.image),
        text_options=options(recipe.text),
        image_call=", interpolate_pos_encoding=True" if is_interpolated else "",
        length=data["text_length"],
    )


def preparation(data: Mapping[str, Any]) -> str:
    """Return code that defines prepared(image): of an opened file what the run's encoder sees.

    It returns a PIL image of the pixels that `transforms.decode` and `transforms.center_view` give.
    """
    size, crop = data["size"], data["crop"]
    if data["legacy_wrap"]:
        steps = [WRAPPED]
    else:
        steps = [STRETCHED if data["stretch"] else "", FITTED[data["fit"]]]
    steps = [OPENED, BORDER if data["crop_black_border"] else "", *steps]
    steps += [MASKED if data["mask_lower_edge"] else "", CENTRE]
    edge = (size - crop) // 2
    return "".join(steps).format(
        mode="L" if data["channels"] == 1 else "RGB",
        size=size,
        kept=size - round(data["mask_lower_edge"] * size),
        edge=edge,
        end=edge + crop,
    )


def _said_of_preparation(data) -> str:
    size, crop, wraps = data["size"], data["crop"], data["legacy_wrap"]
    fit = "squashed" if data["fit"] == "squash" or wraps else "padded"
    steps = [
        "grey, replicated to three channels" if data["channels"] == 1 else "in colour",
        "black borders cut off" if data["crop_black_border"] else "",
        "contrast stretched to 0..256, where 256 wraps to 0" if wraps else "",
        "contrast stretched to 0..255" if data["stretch"] and not wraps else "",
        f"{fit} to {size} x {size} pixels",
        f"the lowest {data['mask_lower_edge']:.0%} black" if data["mask_lower_edge"] else "",
        f"of that the central {crop} x {crop}" if crop < size else "",
        "ImageNet mean and standard deviation",
    ]
    said = (
        f"Images: {', '.join(filter(None, steps))}. The processors beside the weights only squash "
        f"an image to {crop} x {crop} and normalise it: to get the run's features give them what "
        "`prepared` below returns. It takes JPEG and PNG files as a prepared corpus holds them. "
        f"Reports: at most {data['text_length']} tokens."
    )
    return textwrap.fill(said, WIDTH)


def _said_of_training(config, trained) -> str:
    steps, select = config["train"]["steps"], config["train"]["select"]
    done = f"{trained.step}" if trained.step == steps else f"{trained.step} of {steps}"
    said = (
        f"Trained with medvlp_jax {__version__}, recipe `{config['recipe']['name']}`, {done} steps "
        f"of {config['train']['batch_size']} pairs"
    )
    said += f"; of all evaluated steps the best by `{select}`" if trained.is_selected else ""
    return textwrap.fill(f"{said}.", WIDTH, break_long_words=False)


def _said_of_results(measured, trained) -> str:
    """Return a table of results and what they are of, where they are of these weights."""
    if measured is None:
        return NOT_EVALUATED
    origin = measured.provenance
    if origin.get("weights") != provenance.weights_hash(trained.variables):
        return textwrap.fill(OTHER_WEIGHTS, WIDTH)
    rows = origin.get("rows", {})
    said = f"These weights, of step {trained.step}, on `{rows.get('corpus')}`, split "
    said += f"{rows.get('split')}"
    said += f": {rows['rows']} rows of {rows['patients']} patients" if "rows" in rows else ""
    return f"{said}.\n\n{results_table(measured.numbers, markdown=True)}"
