"""Encoders: speed beside PyTorch on a CPU, images a second and MFU on a GPU.

  python -m benchmarks.encoders [--models vit ...] [--pairs 9] [--tiny] [--out FILE.json]

cpu  The same float32 weights in `transformers` (eager) and here, both with the same number of
     threads, run by turns: forward, and forward with backward. A ratio is PyTorch's time over ours,
     of two runs that followed one another; printed are the median and the quartiles, above 1 we are
     faster. A convolutional model runs there with its channels first and last by turns, and the
     faster layout is the one that counts.
gpu  bfloat16 forward and backward here alone: examples a second; MFU counts three times the forward
     pass's operations, over the chip's published peak and over a matrix product of this very run.

Prints markdown tables and writes every number; models measured before, on this device with as many
threads, stay in the file, and each says under "measured" which code, processor and versions it is
of. Weights and inputs are random. --tiny only shows that it all runs.
"""

import argparse
import copy
import functools
import gc
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks import check, origin, studies
from medvlp_jax import cli, convert
from medvlp_jax.convert.architectures import table_of_module
from medvlp_jax.encoders import modernbert, qwen3, resnet, vit
from medvlp_jax.encoders.base import Tokens

PEAK = 989e12  # dense bfloat16 of an H100 or H200, NVIDIA's data sheet
MATMUL = 8192  # side of the matrix product
LAYOUTS = ("channels first", "channels last")  # of images in PyTorch
WARM = 3  # turns by which the faster of them is found
REST = 0.1  # seconds before each turn: the threads of the other one spin for a while when idle


class Model(NamedTuple):
    """What is measured.

    Attributes:
      title: in the tables.
      architecture: of `transformers`.
      module: ours.
      cpu, gpu: shape of the input there: images [B, H, W, 3], or ids [B, T].
    """

    title: str
    architecture: str
    module: Any
    cpu: tuple[int, ...]
    gpu: tuple[int, ...]


IMAGES = (8, 224, 224, 3), (256, 224, 224, 3)
MODELS = {
    "vit": Model("ViT-B/16", "ViTModel", vit.make("B/16", pooler=True), *IMAGES),
    "resnet": Model("ResNet-50", "ResNetModel", resnet.make("50"), *IMAGES),
    "modernbert": Model(
        "ModernBERT-base", "ModernBertModel", modernbert.make("base"), (4, 256), (64, 512)
    ),
    "qwen3": Model("Qwen3-0.6B", "Qwen3Model", qwen3.make("0.6B"), (2, 128), (8, 1024)),
}
TINY = {
    "vit": vit.make("tiny", depth=1, image_size=32, pooler=True),
    "resnet": resnet.make("tiny"),
    "modernbert": modernbert.make("tiny", depth=2, vocab_size=99, pad_id=0),
    "qwen3": qwen3.make("tiny", depth=1, vocab_size=99),
}


def tiny(name, model):
    """Make a case small enough for a test."""
    shape = (2, 32, 32, 3) if len(model.cpu) == 4 else (2, 9)
    return model._replace(title=f"{model.title}, tiny", module=TINY[name], cpu=shape, gpu=shape)


def draw_input(shape, module):
    """Draw images, or texts without padding."""
    rng = np.random.default_rng(0)
    if len(shape) == 4:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)
    ids = rng.integers(5, module.vocab_size, shape)
    return Tokens(jnp.asarray(ids, jnp.int32), jnp.ones(shape, bool))


def functions_of_ours(module, variables, inputs):
    """Return forward and forward with backward, each () -> arrays that may not be ready yet."""
    collections = {k: v for k, v in variables.items() if k != "params"}

    def outputs(params, train):
        mine = {**collections, "params": params}
        if collections:
            return module.apply(mine, inputs, train=train, mutable=list(collections))[0].tokens
        return module.apply(mine, inputs, train=train).tokens

    forward = jax.jit(lambda params: outputs(params, False))
    backward = jax.jit(jax.value_and_grad(lambda p: jnp.square(outputs(p, True)).mean()))
    params = variables["params"]
    return lambda: forward(params), lambda: backward(params)


def functions_of_theirs(model, inputs, layout=LAYOUTS[0]):
    """Return forward and forward with backward of a PyTorch model.

    Args:
      model: of `transformers`; is brought into the layout.
      inputs: images or texts.
      layout: of images and kernels in memory, of LAYOUTS.
    """
    import torch

    if isinstance(inputs, Tokens):
        ids, mask = (torch.tensor(np.asarray(leaf)).long() for leaf in inputs)
        given = {"input_ids": ids, "attention_mask": mask}
    else:
        kinds = dict(zip(LAYOUTS, (torch.contiguous_format, torch.channels_last), strict=True))
        model.to(memory_format=kinds[layout])
        pixels = torch.tensor(np.asarray(inputs)).permute(0, 3, 1, 2)
        given = {"pixel_values": pixels.contiguous(memory_format=kinds[layout])}

    def forward():
        model.eval()
        with torch.inference_mode():
            return model(**given).last_hidden_state

    def backward():
        model.train()
        model.zero_grad(set_to_none=True)
        model(**given).last_hidden_state.square().mean().backward()

    return forward, backward


def seconds(work):
    """Return the wall time of one call."""
    start = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - start


def is_convolutional(model) -> bool:
    """Say whether a PyTorch model has more convolutions than the one that cuts patches."""
    import torch

    return sum(isinstance(part, torch.nn.Conv2d) for part in model.modules()) > 1


def fastest(works: Mapping[str, Callable], turns: int = WARM) -> str:
    """Return which of them takes the least time, the first run of each left out."""
    if len(works) == 1:
        return next(iter(works))
    taken = [[seconds(work) for work in works.values()] for _ in range(turns + 1)]
    return list(works)[np.argmin(np.median(taken[1:], 0))]


def by_turns(ours, theirs, pairs, said=None):
    """Return the times of both, [pairs] each; who goes first changes from pair to pair."""
    times = ([], [])
    for i in tqdm(range(pairs), desc=said, unit="pair", disable=said is None):
        for which in (0, 1) if i % 2 else (1, 0):
            time.sleep(REST)
            times[which].append(seconds((ours, theirs)[which]))
    return times


def summary(ours, theirs):
    """Describe paired times; a ratio is theirs over ours."""
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    return {
        "ours_seconds": statistics.median(ours),
        "torch_seconds": statistics.median(theirs),
        "ratios": ratios,
        "quartiles": np.percentile(ratios, (25, 50, 75)).tolist(),
    }


def compare(model, pairs, *, threads):
    """Measure one model beside PyTorch."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        kind = getattr(transformers, model.architecture)
        table = table_of_module(model.module)
        fields = {key: f.write(getattr(model.module, f.name)) for key, f in table.fields.items()}
        theirs = kind(kind.config_class(**{**table.fixed, **fields}))
        theirs.save_pretrained(folder)
        # One key and value are copied for each: nothing else is shared by the two.
        module, variables = convert.load(folder)
    inputs = draw_input(model.cpu, model.module)
    functions = functions_of_ours(module, jax.device_put(variables), inputs)
    layouts = LAYOUTS if is_convolutional(theirs) else LAYOUTS[:1]
    copies = [theirs, *(copy.deepcopy(theirs) for _ in layouts[1:])]
    others = {
        layout: functions_of_theirs(each, inputs, layout)
        for layout, each in zip(layouts, copies, strict=True)
    }
    ours, reference = np.asarray(functions[0]()), others[LAYOUTS[0]][0]()
    if reference.ndim == 4:
        reference = reference.flatten(2).transpose(1, 2)
    reference = reference[:, reference.shape[1] - ours.shape[1] :].numpy()
    found = {
        "title": model.title,
        "input": model.cpu,
        "error": float(np.abs(ours - reference).max() / np.abs(reference).max()),
    }
    for i, name in enumerate(("forward", "backward")):
        works = {layout: each[i] for layout, each in others.items()}
        layout = fastest(works)
        mine, other = functions[i], works[layout]
        seconds(mine), seconds(other)  # compiled, and buffers allocated
        found[name] = summary(*by_turns(mine, other, pairs, f"{model.title}, {name}"))
        found[name] |= {} if isinstance(inputs, Tokens) else {"torch_layout": layout}
    return found


def operations(module, variables, inputs):
    """Count the forward pass's floating-point operations, as XLA does before optimising."""
    forward = jax.jit(lambda v: module.apply(v, inputs).tokens)
    return forward.lower(variables).cost_analysis()["flops"]


def throughput(model, pairs):
    """Measure one model here alone, in bfloat16."""
    module = model.module.clone(dtype=jnp.bfloat16)
    inputs = draw_input(model.gpu, module)
    variables = jax.jit(module.init)(jax.random.key(0), inputs)
    flops = 3 * operations(module, variables, inputs)
    _, backward = functions_of_ours(module, variables, inputs)
    seconds(backward)
    took = statistics.median(seconds(backward) for _ in range(pairs))
    product = seconds_of_matmul(pairs)
    measured = 2 * MATMUL**3 / product
    return {
        "title": model.title,
        "input": model.gpu,
        "seconds": took,
        "examples_per_second": model.gpu[0] / took,
        "forward_operations": flops / 3,
        "mfu_of_peak": flops / took / PEAK,
        "matmul_operations_per_second": measured,
        "mfu_of_matmul": flops / took / measured,
    }


def seconds_of_matmul(pairs):
    """Return the median time of one bfloat16 matrix product."""
    x = jnp.ones((MATMUL, MATMUL), jnp.bfloat16)
    product = jax.jit(lambda x: x @ x)
    seconds(lambda: product(x))
    return statistics.median(seconds(lambda: product(x)) for _ in range(pairs))


def table_cpu(models):
    """Format the comparison."""
    lines = [
        "| encoder | input | forward, ours | ratio | forward + backward, ours | ratio |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for found in models.values():
        cells = [found["title"], " x ".join(map(str, found["input"][:2]))]
        for part in ("forward", "backward"):
            low, middle, high = found[part]["quartiles"]
            cells += [
                f"{found[part]['ours_seconds'] * 1e3:,.0f} ms",
                f"{middle:.2f} ({low:.2f}-{high:.2f})",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table_gpu(models):
    """Format the throughput."""
    lines = [
        "| encoder | input | examples/s | MFU of 989 | MFU of matmul |",
        "|---|---|---:|---:|---:|",
    ]
    for found in models.values():
        cells = [found["title"], " x ".join(map(str, found["input"][:2]))]
        cells += [f"{found['examples_per_second']:,.0f}"]
        cells += [f"{found[key]:.1%}" for key in ("mfu_of_peak", "mfu_of_matmul")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv=None):
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=tuple(MODELS))
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--tiny", action="store_true")
    default = pathlib.Path(__file__).parent / "results/encoders.json"
    parser.add_argument("--out", type=pathlib.Path, default=default)
    options = parser.parse_args(argv)
    if options.tiny and options.out == default:
        parser.error("--tiny measures nothing worth keeping: name another --out.")
    threads = len(os.sched_getaffinity(0))  # what XLA takes
    backend = jax.default_backend()
    measure, table = (
        (functools.partial(compare, threads=threads), table_cpu)
        if backend == "cpu"
        else (throughput, table_gpu)
    )
    facts = {"device": jax.devices()[0].device_kind, "threads": threads}
    facts |= {"tiny": True} if options.tiny else {}
    stored = studies.read(options.out)
    models = studies.parts(options.out, stored.get(backend, {}), "models", facts)
    libraries = ("torch", "transformers") if backend == "cpu" else ()
    for name in options.models:
        model = tiny(name, MODELS[name]) if options.tiny else MODELS[name]
        print(model.title, file=sys.stderr, flush=True)
        models[name] = measure(model, options.pairs) | {"measured": origin.measured(*libraries)}
        stored[backend] = {**facts, "models": models}
        check.keep(options.out, stored)
        gc.collect()
    print(table(models))


if __name__ == "__main__":
    cli.leave(cli.run(main))
