"""From a run to folders that `transformers` loads, with a model card.

OUT/image/             the image encoder: AutoModel.from_pretrained("OUT/image")
OUT/text/              the text encoder and its tokenizer
OUT/heads.safetensors  everything else: projections, heads, scales, by parameter path
OUT/README.md          data, config, results
"""

import os
import pathlib
from collections.abc import Mapping

import numpy as np
from safetensors.numpy import save_file

from medvlp_jax import __version__, assemble, convert
from medvlp_jax.config import to_json
from medvlp_jax.encoders.base import IMAGENET_MEAN, IMAGENET_STD
from medvlp_jax.evaluation.results import Results, results_table
from medvlp_jax.training import params as paths

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
| `text/` | text encoder, {text_parameters:.2f} M parameters | the same, `add_pooling_layer=False` |
| `heads.safetensors` | projections, by parameter path | `safetensors.numpy.load_file` |

Images: grey, {preparation}, {crop} x {crop} pixels, replicated to three channels, ImageNet mean and
standard deviation. Reports: at most {length} tokens.

## Data

{data}

## Results

{results}

## Config

```json
{config}
```
"""


def export(
    parts: assemble.Parts, variables: Mapping, out: pathlib.Path, results: Results | None = None
) -> None:
    """Write both encoders, the heads and a model card.

    Args:
      parts: of the run.
      variables: of the recipe, on the host.
      out: folder, made if absent.
      results: for the model card.

    Raises:
      UserError: if an encoder is not one that can be written.
    """
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    side = lambda name: {k: tree[name] for k, tree in variables.items() if name in tree}
    processor = convert.image_processor(
        parts.config["data"]["crop"], mean=IMAGENET_MEAN, std=IMAGENET_STD
    )
    text = side("text")
    text["params"] = _without_heads(parts.recipe.text, text["params"])
    convert.save(parts.recipe.image, side("image"), out / "image", preprocessor=processor)
    _write_tokenizer(parts.tokenizer, out / "text")
    convert.save(parts.recipe.text, text, out / "text", tokenizer=out / "text")
    heads = {
        f"{kind}/{path}": np.ascontiguousarray(value)
        for kind, tree in variables.items()
        for path, value in paths.flatten(tree).items()
        if not path.startswith(("image/", "text/"))
    }
    scratch = out / ".heads.tmp"
    save_file(heads, scratch)
    os.replace(scratch, out / "heads.safetensors")
    (out / "README.md").write_text(_card(parts, variables, results or {}))


def _without_heads(module, tree):
    return (
        tree
        if getattr(module, "mlm_head", False)
        else {k: v for k, v in tree.items() if "mlm" not in k}
    )


def _write_tokenizer(tokenizer, folder):
    """Write tokenizer.json and what transformers needs to know beside it."""
    from transformers import PreTrainedTokenizerFast

    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    known = {f"{k}_token": v for k, v in names.items() if tokenizer.token_to_id(v) is not None}
    folder.mkdir(parents=True, exist_ok=True)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **known).save_pretrained(folder)


def _card(parts, variables, results) -> str:
    config = parts.config
    data = config["data"]
    sources = assemble.open_corpora(data, data["split"])
    generated = [s.name for s in sources if s.metadata["generated"]]
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
        preparation=f"{data['fit']} to {data['size']} x {data['size']} and cropped",
        crop=data["crop"],
        length=data["text_length"],
        data="\n".join(f"* `{s.name}`, {s.split}: {len(s)} records" for s in sources),
        results=results_table(results, markdown=True) if results else "Not evaluated.",
        config=to_json(config),
    )
