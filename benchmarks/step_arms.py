"""The cases of benchmarks/steps.py, and the process that takes the steps of one of the arms.

  python -m benchmarks.step_arms ARM FOLDER      # ARM: ours, eager, compiled or product

`prepare` makes the weights in PyTorch and writes them in Hugging Face's format (encoders) and by
parameter path (all else), with the settings and the batch, into FOLDER. The process reads it, takes
AGREE steps, and prints a line of JSON with their losses; then one step and one line for every line
it reads. A step of "product" is QUEUED large products of matrices in PyTorch, of which none waits
for the host: the machine's pace, as benchmarks/train_step.py takes it.
"""

import json
import os
import pathlib
import resource
import sys
import time
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

AGREE = 2  # steps whose losses are compared: before and after an update
FEATURE = 768  # width of a cached report feature: Bio_ClinicalBERT's
MISSING = 0.1  # share of the sections that are missing
SHORTEST = 0.25  # texts fill between this share of the text length and all of it
QUEUED = 4  # products in a step of "product": one alone waits for its start and for being read
SIDES = {"float32": 2048, "bfloat16": 8192}  # of the square matrices of "product", by their type


class Case(NamedTuple):
    """One step.

    Attributes:
      title: in the table.
      config: file and variant.
      settings: of it; without dropout, whose masks the two would draw differently.
      tiny: further settings, for a test.
      encoders: class of `transformers` by encoder.
      fields: of these encoders of ours, besides the config's; for the same reason.
      tiny_fields: further ones, for a test.
    """

    title: str
    config: str
    settings: str
    tiny: str
    encoders: Mapping[str, str]
    fields: Mapping[str, Mapping] = {}
    tiny_fields: Mapping[str, Mapping] = {}

    def flags(self, *, is_tiny: bool) -> list[str]:
        """Return what `medvlp train` would be given."""
        settings = f"{RATE} {self.settings} {self.tiny if is_tiny else ''}".split()
        return [f"--config={self.config}", *(f"--config.{setting}" for setting in settings)]


# A rate at which the first steps stay comparable: Adam's first update is the gradient's sign, which
# rounding decides where the gradient is all but zero.
RATE = "optim.lr=1e-5 optim.schedule=constant optim.warmup=0"
CASES = {
    "imitate": Case(
        "IMITATE: ResNet-50, 16 pairs, 2 views of 224, cached reports",
        "configs/imitate.py",
        # At 1e-5 one update takes the loss from 49 to 34, and another order of the same rows alone
        # moves it by 5e-4 of itself; at this rate it falls by 1, and a wrong update still shows.
        "train.batch_size=16 recipe.contrast_group=0 optim.lr=3e-7",
        "data.crop=32 train.batch_size=6 recipe.loss_tile=4 recipe.dim=16 recipe.text_hidden=32 "
        "recipe.keep=(0.5,0.25) recipe.num_tokens=32",
        {"image": "ResNetModel"},
        tiny_fields={"image": {"embedding_size": 8, "hidden_sizes": (16, 32), "depths": (1, 1)}},
    ),
    "imitate-demo": Case(
        "IMITATE, the demo: small ResNet, 64 pairs, 2 views of 96, cached reports",
        "configs/imitate.py:demo",
        "",
        "data.crop=32 train.batch_size=6 recipe.loss_tile=4",
        {"image": "ResNetModel"},
    ),
    "clip": Case(
        "CLIP: DINOv3 ViT-S/16 at 224, ModernBERT-base on 128 tokens, 16 pairs",
        "configs/clip.py",
        "train.batch_size=16 recipe.image.name=dinov3 recipe.image.variant=S/16 "
        "recipe.text.name=modernbert data.text_length=128",
        "train.batch_size=4 recipe.image.variant=tiny recipe.text.variant=tiny "
        "data.crop=32 data.text_length=16",
        {"image": "DINOv3ViTModel", "text": "ModernBertModel"},
        {"image": {"rope_rescale": 1.0}},
        {"image": {"depth": 2}, "text": {"depth": 4, "vocab_size": 99, "pad_id": 0}},
    ),
    "vit": Case(  # on a GPU, in bfloat16; three arms lie in its memory at once
        "CLIP: ViT-B/16 at 224, BERT-base on 128 tokens, 192 pairs, bfloat16",
        "configs/clip.py:vit_b16",
        "train.batch_size=192 recipe.image.attention=cudnn recipe.text.attention=cudnn",
        "train.batch_size=4 data.crop=32 data.text_length=16 recipe.image.attention=xla "
        "recipe.text.attention=xla recipe.text.variant=tiny "
        "recipe.image.dtype=float32 recipe.text.dtype=float32",
        {"image": "ViTModel", "text": "BertModel"},
        tiny_fields={
            "image": {"image_size": 32, "width": 32, "depth": 2, "num_heads": 2, "mlp_dim": 64},
            "text": {"depth": 2, "vocab_size": 99},
        },
    ),
    "cfcml": Case(
        "CFCML, Derm7pt: Swin-T, 12 cases, 2 photographs of 224 and a table",
        "configs/cfcml.py:derm7pt",
        "train.batch_size=12 recipe.dropout=0.0",
        "data.crop=32 train.batch_size=6",
        {"image": "SwinModel"},
        {"image": {"drop_path": 0.0}},
        {"image": {"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}},
    ),
}


def prepare(name: str, folder: pathlib.Path, *, tiny: bool) -> dict:
    """Write config.json, the encoders, heads.safetensors, torch.safetensors and batch.npz.

    Args:
      name: of CASES.
      folder: exists.
      tiny: with the case's sizes for a test.

    Returns:
      The resolved config.
    """
    import torch
    import transformers
    from safetensors.torch import save_file

    from benchmarks import pytorch_step
    from medvlp_jax import config as configs
    from medvlp_jax import tables, train
    from medvlp_jax.convert.architectures import table_of_module
    from medvlp_jax.recipes import base

    case = CASES[name]
    config, _ = train.resolve(case.flags(is_tiny=tiny))
    torch.manual_seed(0)
    for side, architecture in case.encoders.items():
        fields = {**config["recipe"][side], **case.fields.get(side, {})}
        module = base.encoder(fields | (case.tiny_fields.get(side, {}) if tiny else {}))
        table, kind = table_of_module(module), getattr(transformers, architecture)
        theirs = {key: f.write(getattr(module, f.name)) for key, f in table.fields.items()}
        # Only Swin's model asks how large its images are: the fusion is made for their maps.
        theirs |= {"image_size": config["data"]["crop"]} if architecture == "SwinModel" else {}
        kind(kind.config_class(**{**table.fixed, **theirs})).save_pretrained(folder / side)
    (folder / "config.json").write_text(configs.to_json(config))
    rows = tables.empty_table(config["data"]) if config["recipe"]["name"] == "cfcml" else None
    batch = batch_of(config, rows, vocabulary=getattr(module, "vocab_size", 0))
    if config["recipe"]["name"] == "imitate":
        batch |= draws_of(folder, config)
    np.savez(folder / "batch.npz", **batch)
    model = pytorch_step.build(folder)
    own = {k: v for k, v in model.state_dict().items() if k.split(".")[0] not in case.encoders}
    save_file(own, folder / "torch.safetensors")
    save_file(pytorch_step.heads(model), folder / "heads.safetensors")
    return config


def batch_of(config: Mapping, table: np.ndarray | None, vocabulary: int) -> dict[str, np.ndarray]:
    """Draw the batch a recipe reads; token ids and masks apart, a label as one number."""
    rng = np.random.default_rng(0)
    data, size, name = config["data"], config["train"]["batch_size"], config["recipe"]["name"]
    shape = (size, data["crop"], data["crop"], data["channels"])
    keys = {"imitate": ("image", "image_2"), "clip": ("image",)}
    keys = keys.get(name) or config["recipe"]["images"]
    batch = {key: rng.integers(0, 256, shape, np.uint8) for key in keys}
    if name == "cfcml":
        batch["tabular"] = rng.normal(size=(size, *table.shape)).astype(np.float32)
        batch["label"] = np.arange(size) % config["recipe"]["num_classes"]
    if name == "imitate":
        for section in ("findings", "impression"):
            common = rng.normal(size=FEATURE)  # reports are alike: correlations above 0
            feature = common + rng.normal(size=(size, FEATURE))
            batch[f"{section}_feature"] = feature.astype(np.float32)
            batch[f"{section}_valid"] = np.arange(size) >= round(MISSING * size)
    if name == "clip":
        section, length = config["recipe"]["section"], data["text_length"]
        lengths = rng.integers(max(2, int(SHORTEST * length)), length + 1, size)
        batch[f"{section}/ids"] = rng.integers(5, vocabulary, (size, length), np.int32)
        batch[f"{section}/mask"] = np.arange(length) < lengths[:, None]
        batch[f"{section}_valid"] = np.ones(size, bool)
    return batch


def draws_of(folder: pathlib.Path, config: Mapping) -> dict[str, np.ndarray]:
    """Return the channels that IMITATE's step k draws from level s for reading i, as draw/k/i/s."""
    import jax

    from medvlp_jax.training.step import RNGS

    recipe, _ = recipe_of(folder, config)
    ask = lambda module: module.draw(jax.random.split(module.make_rng("draws"), 4))
    found = {}
    for step in range(AGREE):
        key = jax.random.fold_in(jax.random.key(config["seed"]), step)
        keys = dict(zip(RNGS, jax.random.split(key, len(RNGS)), strict=True))
        drawn = recipe.apply({}, rngs={"draws": keys["draws"]}, method=ask)
        for i, levels in enumerate(drawn):
            for s, (channels, width) in enumerate(
                zip(levels, recipe.image.level_widths, strict=True)
            ):
                every = np.arange(width) if channels is None else np.asarray(channels)
                found[f"draw/{step}/{i}/{s}"] = every
    return found


def recipe_of(folder: pathlib.Path, config: Mapping):
    """Return the recipe around the encoders in `folder`, and {side: variables} of these."""
    from medvlp_jax import config as configs
    from medvlp_jax import weights

    spec = dict(config["recipe"])
    name, loaded = spec.pop("name"), {}
    for side in ("image", "text"):
        if (folder / side).is_dir():
            spec[side], loaded[side] = weights.load_encoder(folder / side, spec[side], 0)
    return configs.build("medvlp_jax.recipes", name, **spec), loaded


def ours(folder: pathlib.Path):
    """Return () -> loss: the jitted step of a run, from the weights in `folder`.

    Its attribute `flops` is what a step takes, counted in the traced program without what a
    backward pass makes again and without the tokens that cuDNN's attention is filled up with.
    """
    import jax
    from safetensors.numpy import load_file

    from benchmarks import train_step
    from medvlp_jax import assemble
    from medvlp_jax.encoders.base import Tokens
    from medvlp_jax.training import flops, optim
    from medvlp_jax.training import params as paths
    from medvlp_jax.training import step as training

    config = assemble.read_config(folder)
    recipe, loaded = recipe_of(folder, config)
    stored = dict(np.load(folder / "batch.npz"))
    batch = {k: v for k, v in stored.items() if k in recipe.inputs}
    for key in recipe.inputs:
        if f"{key}/ids" in stored:
            batch[key] = Tokens(stored[f"{key}/ids"], stored[f"{key}/mask"])
        elif key.startswith("label/"):
            batch[key] = np.eye(recipe.num_classes, dtype=np.int8)[stored["label"]]
        elif key.endswith("_id"):
            batch[key] = np.arange(len(stored["image"]), dtype=np.int32)
    shapes = jax.eval_shape(lambda batch: training.init_variables(recipe, batch, 0), batch)
    given = {f"params/{k}": v for k, v in load_file(folder / "heads.safetensors").items()}
    for side, variables in loaded.items():
        for kind, tree in variables.items():
            given |= {f"{kind}/{side}/{k}": v for k, v in paths.flatten(tree).items()}

    def value(path, shape):
        if path.startswith("batch_stats/") and path not in given:  # as both begin
            start = np.ones if path.rsplit("/")[-1].startswith("var") else np.zeros
            return start(shape.shape, shape.dtype)
        found = given.pop(path)
        if found.shape != shape.shape:
            raise ValueError(f"{path} is {found.shape}, and {shape.shape} is needed.")
        return found

    flat = {path: value(path, shape) for path, shape in paths.flatten(shapes).items()}
    if given:
        raise ValueError(f"Nobody takes {', '.join(given)}.")
    variables = jax.device_put(paths.unflatten(flat))
    fields = {k: v for k, v in config["optim"].items() if k != "freeze"}
    tx, rate = optim.make(variables["params"], steps=config["train"]["steps"], **fields)
    state = training.make_state(variables, tx, ())
    step = training.make_train_step(recipe, tx, rate, config["seed"])
    batch = jax.device_put(batch)

    def take():
        nonlocal state
        state, metrics = step(state, batch)
        return float(metrics["loss"])

    plain, counting = train_step.without_filling(config), step
    if plain != config:
        unfilled, _ = recipe_of(folder, plain)
        counting = training.make_train_step(unfilled, tx, rate, config["seed"])
    counted, again = flops.by_part(counting.trace(state, batch).jaxpr, flops.step_part)
    take.flops = sum(counted.values()) - sum(again.values())
    return take


def theirs(folder: pathlib.Path, *, compiled: bool):
    """Return () -> loss: the step of benchmarks/pytorch_step.py from the weights in `folder`."""
    import torch
    from safetensors.torch import load_file

    from benchmarks import pytorch_step

    torch.set_num_threads(len(os.sched_getaffinity(0)))  # what XLA takes
    model = pytorch_step.build(folder)
    missing = model.load_state_dict(load_file(folder / "torch.safetensors"), strict=False)
    if missing.unexpected_keys or any(
        k.split(".")[0] not in ("image", "text") for k in missing.missing_keys
    ):
        raise ValueError(f"{missing}")
    stored = {k: torch.as_tensor(v) for k, v in np.load(folder / "batch.npz").items()}
    batch = {k: v for k, v in stored.items() if not k.startswith("draw/")}
    drawn = {k: v for k, v in stored.items() if k.startswith("draw/")}
    config = json.loads((folder / "config.json").read_text())
    is_half = config["recipe"]["image"]["dtype"] == "bfloat16"
    step = pytorch_step.step_of(model, config["optim"], compiled=compiled, is_half=is_half)
    batch, drawn = (pytorch_step.on_device(each) for each in (batch, drawn))
    taken = 0

    def take():
        nonlocal taken
        # Beyond the compared steps the last draw stays; its cost is that of any other.
        turn, taken = f"draw/{min(taken, AGREE - 1)}/", taken + 1
        own = {k.replace(turn, "draw/"): v for k, v in drawn.items() if k.startswith(turn)}
        return step({**batch, **own})

    return take


def product(folder: pathlib.Path):
    """Return () -> a number: products of squares of the images' type; `flops` is theirs."""
    import torch

    from benchmarks import pytorch_step

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    kind = json.loads((folder / "config.json").read_text())["recipe"]["image"]["dtype"]
    side = SIDES[kind]
    a = pytorch_step.on_device({"a": torch.randn(side, side).to(getattr(torch, kind))})["a"]
    out = torch.empty_like(a)

    def take():
        for _ in range(QUEUED):
            torch.mm(a, a, out=out)
        return float(out[0, 0])  # waits for the device

    take.flops = QUEUED * 2 * side**3
    return take


def say(**found) -> None:
    """Print a line of JSON at once."""
    print(json.dumps(found), flush=True)


def faults() -> int:
    """Count the pages this process has faulted in so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def main(arm: str, folder: str) -> None:
    """Take the first steps, then one for every line."""
    where = pathlib.Path(folder)
    began = time.perf_counter()
    try:
        plain = {"ours": ours, "product": product}
        take = plain[arm](where) if arm in plain else theirs(where, compiled=arm == "compiled")
        losses = [take() for _ in range(AGREE)]
    except Exception as error:
        if arm != "compiled":
            raise
        say(error=f"{type(error).__name__}: {str(error)[:300]}")  # no C++ compiler, say
        return
    ready = time.perf_counter() - began
    say(losses=losses, ready_seconds=ready, flops=getattr(take, "flops", 0))
    for _ in sys.stdin:
        before, began, processor = faults(), time.perf_counter(), time.process_time()
        take()
        say(
            seconds=time.perf_counter() - began,
            processor_seconds=time.process_time() - processor,
            faults=faults() - before,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
