"""Encoders: speed beside PyTorch on a CPU, images a second and MFU on a GPU.

  python benchmarks/encoders.py [--models vit ...] [--pairs 9] [--out FILE.json]

cpu  The same float32 weights in `transformers` and here, both with the same number of threads, run
     by turns: forward, and forward with backward. A ratio is PyTorch's time over ours, of two runs
     that followed one another; printed are the median and the quartiles, above 1 we are faster.
gpu  bfloat16 forward and backward here alone: examples a second; MFU counts three times the forward
     pass's operations, over the chip's published peak and over a matrix product of this very run.

Prints markdown tables and writes every number. Weights and inputs are random.
"""

import argparse
import gc
import json
import os
import pathlib
import platform
import statistics
import tempfile
import time
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else torch's threads spin into our turn

import jax
import jax.numpy as jnp
import numpy as np

from medvlp_jax import convert
from medvlp_jax.convert.architectures import table_of_module
from medvlp_jax.encoders import modernbert, qwen3, resnet, vit
from medvlp_jax.encoders.base import Tokens

PEAK = 989e12  # dense bfloat16 of an H100 or H200, NVIDIA's data sheet
MATMUL = 8192  # side of the matrix product


class Model(NamedTuple):
    """What is measured.

    Attributes:
      architecture: of `transformers`.
      module: ours.
      cpu, gpu: shape of the input there: images [B, H, W, 3], or ids [B, T].
    """

    architecture: str
    module: Any
    cpu: tuple[int, ...]
    gpu: tuple[int, ...]


MODELS = {
    "vit": Model("ViTModel", vit.make("B/16", pooler=True), (8, 224, 224, 3), (256, 224, 224, 3)),
    "resnet": Model("ResNetModel", resnet.make("50"), (8, 224, 224, 3), (256, 224, 224, 3)),
    "modernbert": Model("ModernBertModel", modernbert.make("base"), (4, 256), (64, 512)),
    "qwen3": Model("Qwen3Model", qwen3.make("0.6B"), (2, 128), (8, 1024)),
}
NAMES = {
    "vit": "ViT-B/16",
    "resnet": "ResNet-50",
    "modernbert": "ModernBERT-base",
    "qwen3": "Qwen3-0.6B",
}


def draw_input(shape):
    """Draw images, or texts without padding."""
    rng = np.random.default_rng(0)
    if len(shape) == 4:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)
    return Tokens(jnp.asarray(rng.integers(5, 30_000, shape), jnp.int32), jnp.ones(shape, bool))


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


def functions_of_theirs(model, inputs):
    """Return forward and forward with backward of a PyTorch model."""
    import torch

    if isinstance(inputs, Tokens):
        ids, mask = (torch.tensor(np.asarray(leaf)).long() for leaf in inputs)
        given = {"input_ids": ids, "attention_mask": mask}
    else:
        given = {"pixel_values": torch.tensor(np.asarray(inputs)).permute(0, 3, 1, 2).contiguous()}

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


def by_turns(ours, theirs, pairs):
    """Return the times of both, [pairs] each; who goes first changes from pair to pair."""
    times = ([], [])
    for i in range(pairs):
        for which in (0, 1) if i % 2 else (1, 0):
            times[which].append(seconds((ours, theirs)[which]))
    return times


def compare(model, pairs, threads):
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
    inputs = draw_input(model.cpu)
    functions = functions_of_ours(module, jax.device_put(variables), inputs)
    others = functions_of_theirs(theirs, inputs)
    ours, reference = np.asarray(functions[0]()), others[0]()
    if reference.ndim == 4:
        reference = reference.flatten(2).transpose(1, 2)
    reference = reference[:, reference.shape[1] - ours.shape[1] :].numpy()
    found = {
        "input": model.cpu,
        "error": float(np.abs(ours - reference).max() / np.abs(reference).max()),
    }
    for name, mine, other in zip(("forward", "backward"), functions, others, strict=True):
        seconds(mine), seconds(other)  # compiled, and buffers allocated
        times = by_turns(mine, other, pairs)
        ratios = [b / a for a, b in zip(*times, strict=True)]
        found[name] = {
            "ours_seconds": statistics.median(times[0]),
            "torch_seconds": statistics.median(times[1]),
            "ratios": ratios,
            "quartiles": np.percentile(ratios, (25, 50, 75)).tolist(),
        }
    return found


def operations(module, variables, inputs):
    """Count the forward pass's floating-point operations, as XLA does before optimising."""
    forward = jax.jit(lambda v: module.apply(v, inputs).tokens)
    return forward.lower(variables).cost_analysis()["flops"]


def throughput(model, pairs):
    """Measure one model here alone, in bfloat16."""
    module = model.module.clone(dtype=jnp.bfloat16)
    inputs = draw_input(model.gpu)
    variables = jax.jit(module.init)(jax.random.key(0), inputs)
    flops = 3 * operations(module, variables, inputs)
    _, backward = functions_of_ours(module, variables, inputs)
    seconds(backward)
    took = statistics.median(seconds(backward) for _ in range(pairs))
    product = seconds_of_matmul(pairs)
    measured = 2 * MATMUL**3 / product
    return {
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
    for name, found in models.items():
        cells = [NAMES[name], " x ".join(map(str, found["input"][:2]))]
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
    for name, found in models.items():
        cells = [NAMES[name], " x ".join(map(str, found["input"][:2]))]
        cells += [f"{found['examples_per_second']:,.0f}"]
        cells += [f"{found[key]:.1%}" for key in ("mfu_of_peak", "mfu_of_matmul")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=tuple(MODELS))
    parser.add_argument("--pairs", type=int, default=9)
    default = pathlib.Path(__file__).parent / "results/encoders.json"
    parser.add_argument("--out", type=pathlib.Path, default=default)
    options = parser.parse_args()
    threads = len(os.sched_getaffinity(0))  # what XLA takes
    kept = json.loads(options.out.read_text()) if options.out.is_file() else {}
    backend = jax.default_backend()
    results = {"device": jax.devices()[0].device_kind, "threads": threads, "models": {}}
    results |= {"versions": {"python": platform.python_version(), "jax": jax.__version__}}
    for name in options.models:
        model = MODELS[name]
        if backend == "cpu":
            found = compare(model, options.pairs, threads)
        else:
            found = throughput(model, options.pairs)
        results["models"][name] = found
        print((table_cpu if backend == "cpu" else table_gpu)({name: found}), flush=True)
        gc.collect()
    options.out.write_text(json.dumps({**kept, backend: results}, indent=1) + "\n")
    print((table_cpu if backend == "cpu" else table_gpu)(results["models"]))


if __name__ == "__main__":
    main()
