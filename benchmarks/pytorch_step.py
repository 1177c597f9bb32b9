"""A training step of benchmarks/pytorch_models.py, as fast as PyTorch's own means make it.

Channels last, a fused optimiser, torch.compile where asked for; memory is kept between the steps by
settings of the process, see benchmarks/steps.py. What a case wrote (benchmarks/step_arms.py) is
read here, and the weights of the heads leave by our paths.
"""

import json
import pathlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from transformers import AutoModel

from benchmarks.pytorch_models import Cfcml, Clip, CrossAttention, Imitate


def build(folder: pathlib.Path) -> nn.Module:
    """Build the model whose settings, encoders and batch lie in `folder`; the heads are random."""
    config = json.loads((folder / "config.json").read_text())
    spec = config["recipe"]
    sides = [side for side in ("image", "text") if (folder / side).is_dir()]
    encoders = {side: AutoModel.from_pretrained(folder / side) for side in sides}
    if spec["name"] == "cfcml":
        with np.load(folder / "batch.npz") as batch:
            return Cfcml(spec, **encoders, table=batch["tabular"].shape[1:])
    return {"clip": Clip, "imitate": Imitate}[spec["name"]](spec, **encoders)


def heads(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return every parameter outside the encoders, by our path and in our layout."""
    found = {}
    for name, part in model.named_modules():
        if name.split(".")[0] in ("image", "text"):
            continue
        path = name.replace(".", "/")
        own = dict(part.named_parameters(recurse=False))
        if isinstance(part, nn.MultiheadAttention):
            is_flat = not isinstance(part, CrossAttention)  # our IMITATE names its own
            for i, kind in enumerate(("query", "key", "value")):
                rows = slice(i * part.embed_dim, (i + 1) * part.embed_dim)
                join = "_" if is_flat else "/"
                found[f"{path}/{kind}{join}kernel"] = own["in_proj_weight"][rows].T
                found[f"{path}/{kind}{join}bias"] = own["in_proj_bias"][rows]
            path, own = f"{path}/out", dict(part.out_proj.named_parameters())
            part = part.out_proj
        elif name.endswith("out_proj"):
            continue
        for kind, value in own.items():
            if kind == "weight":
                kind = "scale" if isinstance(part, nn.BatchNorm1d) else "kernel"
                axes = tuple(reversed(range(value.ndim)))  # [out, in, taps] -> [taps, in, out]
                value = value.permute(axes)
            found[f"{path}/{kind}".lstrip("/")] = value
    return {path: value.detach().clone().contiguous() for path, value in found.items()}


def optimizer(model: nn.Module, settings: Mapping) -> torch.optim.Optimizer:
    """Make AdamW or Adam, as `config.optim` says, over one tensor list, fused where torch can."""
    factors = {pattern.strip("^/"): factor for pattern, factor in settings["multipliers"]}
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(factors.get(name.split(".")[0], 1.0), []).append(parameter)
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[settings["name"]]
    return kind(
        [{"params": p, "lr": factor * settings["lr"]} for factor, p in groups.items()],
        betas=(settings["b1"], settings["b2"]),
        weight_decay=settings["weight_decay"],
        fused=True,
    )


def device() -> str:
    """Name where tensors belong: the GPU, where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def on_device(batch: Mapping) -> dict:
    """Put a batch there."""
    return {key: value.to(device()) for key, value in batch.items()}


def step_of(model: nn.Module, settings: Mapping, *, compiled: bool, is_half: bool = False):
    """Return batch -> loss, one training step.

    Args:
      model: one of the three.
      settings: `config.optim`.
      compiled: through torch.compile.
      is_half: matrix products in bfloat16, by autocast.
    """
    model.train().to(device(), memory_format=torch.channels_last)
    update = optimizer(model, settings)
    forward = torch.compile(model) if compiled else model

    def step(batch):
        update.zero_grad(set_to_none=True)
        with torch.autocast(device(), torch.bfloat16, enabled=is_half):
            loss = forward(batch)
        loss.backward()
        update.step()
        return loss.item()

    return step
