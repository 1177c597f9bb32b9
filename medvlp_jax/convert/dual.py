"""Two encoders and their projections as one model: `transformers.VisionTextDualEncoderModel`.

That class projects what each encoder calls `pooler_output` without a bias and normalises. So it
holds a model whose pooled features are those, and whose heads are one matrix each.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from medvlp_jax.config import UserError
from medvlp_jax.convert import checkpoint
from medvlp_jax.convert.files import Pending
from medvlp_jax.encoders import (
    bert,
    clip_text,
    clip_vision,
    dinov2,
    dinov3,
    modernbert,
    qwen3,
    resnet,
    siglip,
    swin,
    vit,
)

POOLER = "out.pooler_output"
CLS = "out.last_hidden_state[:, 0]"
MEAN = "(out.last_hidden_state * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)"
LAST = "out.last_hidden_state[range(len(mask)), mask.sum(1) - 1]"

# How the pooled features of ours are had in PyTorch, from the output `out` of the model of
# `transformers` and the attention mask of a text, padded on the right.
POOLED = {
    (resnet.ResNet, ""): "out.pooler_output.flatten(1)",
    (vit.ViT, "cls"): CLS,
    (vit.ViT, "mean"): "out.last_hidden_state[:, 1:].mean(1)",
    (vit.ViT, "pooler"): POOLER,
    (swin.Swin, ""): POOLER,
    (dinov2.DinoV2, "cls"): POOLER,
    (dinov3.DinoV3, "cls"): POOLER,
    (clip_vision.ClipVision, "cls"): POOLER,
    (siglip.Siglip, "head"): POOLER,
    (siglip.Siglip, "mean"): "out.last_hidden_state.mean(1)",
    (bert.Bert, "cls"): CLS,
    (bert.Bert, "mean"): MEAN,
    (bert.Bert, "pooler"): POOLER,
    (clip_text.ClipText, "eos"): POOLER,
    (modernbert.ModernBert, "cls"): CLS,
    (modernbert.ModernBert, "mean"): MEAN,
    (qwen3.Qwen3, ""): LAST,
}


class Side(NamedTuple):
    """An encoder, its variables, and the matrix [D, E] its pooled features are multiplied by."""

    module: Any
    variables: Mapping[str, Any]
    projection: Any


def pooled_in_torch(module: Any) -> str:
    """Return the pooled features as a PyTorch expression of `out` and `mask`, "" if there is none.

    The patches of DINOv2, DINOv3 and CLIP are not averaged in one expression: registers and the
    position of the final norm stand in the way.
    """
    return POOLED.get((type(module), getattr(module, "pooling", "")), "")


def refusal(image: Any, text: Any) -> str:
    """Say why two encoders are no VisionTextDualEncoderModel, or ""."""
    wrong = [
        f"the pooled features of {type(module).__name__}"
        + (f" with pooling {module.pooling!r}" if hasattr(module, "pooling") else "")
        for module in (image, text)
        if pooled_in_torch(module) != POOLER
    ]
    return f"{' and '.join(wrong)} are not the pooler_output of transformers" if wrong else ""


def save_dual(
    image: Side,
    text: Side,
    out_dir: str | Path,
    *,
    log_scale: float,
    tokenizer: Any = None,
    preprocessor: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder that `transformers.VisionTextDualEncoderModel.from_pretrained` loads.

    Args:
      image: the image encoder.
      text: the text encoder; a masked-language-model head is left out.
      out_dir: made if absent.
      log_scale: logarithm of what multiplies the cosines.
      tokenizer: as for `convert.save`.
      preprocessor: as for `convert.save`.

    Raises:
      UserError: if it has no form there, or the variables are not the modules' own.
    """
    if reason := refusal(image.module, text.module):
        raise UserError(f"No VisionTextDualEncoderModel: {reason}.")
    text = _headless(text)
    names = {"vision_model": image, "text_model": text}
    tensors = {
        f"{name}.{key}": tensor
        for name, side in names.items()
        for key, tensor in checkpoint.tensors_of(side.module, side.variables).items()
    }
    for name, side in (("visual_projection", image), ("text_projection", text)):
        matrix = np.asarray(side.projection, np.float32)
        tensors[f"{name}.weight"] = Pending.of(np.asarray(matrix.T, order="C"))
    tensors["logit_scale"] = Pending.of(np.asarray(log_scale, np.float32))
    config = {
        "architectures": ["VisionTextDualEncoderModel"],
        "model_type": "vision-text-dual-encoder",
        "dtype": checkpoint.dtype_of(tensors),
        "projection_dim": int(np.shape(image.projection)[1]),
        "logit_scale_init_value": float(log_scale),
        "vision_config": checkpoint.config_of(image.module),
        "text_config": checkpoint.config_of(text.module),
    }
    files = {"tokenizer": tokenizer, "preprocessor": preprocessor}
    checkpoint.write(Path(out_dir), config, tensors, **files)


def _headless(side):
    if not getattr(side.module, "mlm_head", False):
        return side
    params = {k: v for k, v in side.variables["params"].items() if not k.startswith("mlm_")}
    return side._replace(
        module=side.module.clone(mlm_head=False), variables={**side.variables, "params": params}
    )
