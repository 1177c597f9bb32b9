"""Where an encoder's time goes on a CPU: its layers beside PyTorch's, one thread each.

  python benchmarks/encoder_parts.py [--parts gelu ...] [--rounds 7] [--out FILE.json]

Explains the ratios of benchmarks/encoders.py. Both run by turns, in float32, forward, and forward
with backward (of the input and every parameter). Measured is the processor's time, not the clock's:
other work on the machine counts less. A ratio is PyTorch's over ours, the median of the rounds.
"""

import argparse
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from medvlp_jax import cli
from medvlp_jax.encoders import resnet
from medvlp_jax.layers import Attention, BatchNorm, LayerNorm, Linear, PatchEmbedding, gelu
from medvlp_jax.writing import replaced


class Part(NamedTuple):
    """One layer.

    Attributes:
      shape: of its input here: [B, T, D], or [B, H, W, C], channels first in PyTorch.
      ours: a Linen module, or a function of the input.
      theirs: torch -> a module of PyTorch.
      train: whether ours is called with train=True, its running averages thrown away.
    """

    shape: tuple[int, ...]
    ours: Callable
    theirs: Callable
    train: bool = False


def attention_of_torch(torch, width, heads):
    """Make self-attention as `transformers` computes it by default."""

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.project = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(4))

        def forward(self, x):
            split = lambda y: y.view(*y.shape[:2], heads, -1).transpose(1, 2)
            query, key, value = (split(layer(x)) for layer in self.project[:3])
            y = torch.nn.functional.scaled_dot_product_attention(query, key, value)
            return self.project[3](y.transpose(1, 2).reshape(x.shape))

    return Layer()


def conv_of_torch(channels, features, size, stride=1):
    """Return torch -> a convolution as a ResNet's."""
    options = {"stride": stride, "padding": size // 2, "bias": False}
    return lambda torch: torch.nn.Conv2d(channels, features, size, **options)


TEXT = (4, 197, 768)  # the tokens of four images of ViT-B/16
PARTS = {
    "linear 768-3072": Part(TEXT, Linear(3072), lambda t: t.nn.Linear(768, 3072)),
    "linear 3072-768": Part((4, 197, 3072), Linear(768), lambda t: t.nn.Linear(3072, 768)),
    "attention": Part(TEXT, Attention(12), lambda t: attention_of_torch(t, 768, 12)),
    "gelu": Part((4, 197, 3072), gelu, lambda t: t.nn.GELU()),
    "layer norm": Part(TEXT, LayerNorm(), lambda t: t.nn.LayerNorm(768)),
    "patches 16": Part(
        (4, 224, 224, 3), PatchEmbedding(768, 16), lambda t: t.nn.Conv2d(3, 768, 16, 16)
    ),
    "conv 7x7, stem": Part(
        (4, 224, 224, 3), resnet.Conv(64, 7, 2), conv_of_torch(3, 64, 7, stride=2)
    ),
    "max pool": Part(
        (4, 112, 112, 64), lambda x: resnet.max_pool(jnp.abs(x)), lambda t: t.nn.MaxPool2d(3, 2, 1)
    ),
    "conv 1x1, 64-256": Part((4, 56, 56, 64), resnet.Conv(256, 1), conv_of_torch(64, 256, 1)),
    "conv 3x3, 64": Part((4, 56, 56, 64), resnet.Conv(64, 3), conv_of_torch(64, 64, 3)),
    "conv 3x3, 256": Part((4, 14, 14, 256), resnet.Conv(256, 3), conv_of_torch(256, 256, 3)),
    "batch norm": Part(
        (4, 56, 56, 64), BatchNorm(), lambda t: t.nn.BatchNorm2d(64).train(), train=True
    ),
}


def works_of_ours(part, x):
    """Return forward, and forward with backward, each () -> arrays that are ready."""
    if not isinstance(part.ours, nn.Module):
        variables, apply = {}, lambda params, x: part.ours(x)
    else:
        variables = part.ours.init(jax.random.key(0), x)
        rest = {kind: leaves for kind, leaves in variables.items() if kind != "params"}

        def apply(params, x):
            mine = {**rest, "params": params}
            if not part.train:
                return part.ours.apply(mine, x)
            return part.ours.apply(mine, x, train=True, mutable=list(rest))[0]

    params, wait = variables.get("params", {}), jax.block_until_ready
    forward = jax.jit(apply)
    backward = jax.jit(jax.grad(lambda p, x: jnp.square(apply(p, x)).mean(), (0, 1)))
    return lambda: wait(forward(params, x)), lambda: wait(backward(params, x))


def works_of_theirs(part, x):
    """Return the same of PyTorch."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = part.theirs(torch)
    x = torch.tensor(x)
    x = x.permute(0, 3, 1, 2).contiguous() if x.ndim == 4 else x
    x.requires_grad_(True)

    def forward():
        with torch.inference_mode():
            module(x)

    def backward():
        module.zero_grad(set_to_none=True)
        x.grad = None
        module(x).square().mean().backward()

    return forward, backward


def processor_seconds(work):
    """Return the processor's time of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def compare(part, rounds):
    """Measure one layer: {"forward" | "backward": seconds of ours and the ratio}."""
    x = np.random.default_rng(0).normal(size=part.shape).astype(np.float32)
    found = {}
    pairs = zip(works_of_ours(part, jnp.asarray(x)), works_of_theirs(part, x), strict=True)
    for name, (ours, theirs) in zip(("forward", "backward"), pairs, strict=True):
        ours(), theirs()  # compiled, and buffers allocated
        times = [(processor_seconds(ours), processor_seconds(theirs)) for _ in range(rounds)]
        found[name] = {
            "ours_seconds": statistics.median(ours for ours, _ in times),
            "ratio": statistics.median(theirs / ours for ours, theirs in times),
        }
    return found


def table(parts):
    """Format the comparison."""
    lines = [
        "| part | forward, ours | ratio | forward + backward, ours | ratio |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, found in parts.items():
        cells = [
            cell
            for kind in ("forward", "backward")
            for cell in (
                f"{found[kind]['ours_seconds'] * 1e3:.1f} ms",
                f"{found[kind]['ratio']:.2f}",
            )
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv=None):
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=pathlib.Path, help="file that gets every number as JSON")
    options = parser.parse_args(argv)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before XLA makes its threads
    results = {name: compare(PARTS[name], options.rounds) for name in options.parts}
    if options.out:
        with replaced(options.out) as scratch:
            scratch.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    cli.leave(cli.run(main))
