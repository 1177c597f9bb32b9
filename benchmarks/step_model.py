"""A model of one contrastive training step on many chips: computing, traffic, memory.

  python benchmarks/step_model.py [--config=configs/clip.py:vit_b16] [--pairs 256] [--out FILE.json]

Nothing here is a measurement. FLOPs, parameters and bytes around the ring are those of this code
(counted in the traced program; a test holds the ring's formula against it), activations those of
the program compiled for the CPU at two batch sizes. Rates are data-sheet numbers times the shares
of them that ASSUMED states. docs/scaling.md explains the table.
"""

import argparse
import json
import pathlib
from typing import NamedTuple

from absl import flags

from medvlp_jax import cli, plan, train
from medvlp_jax.writing import replaced


class Chip(NamedTuple):
    """Data-sheet rates of one chip, per second.

    Attributes:
      bf16: FLOP, dense bfloat16.
      float32: FLOP of a float32 product at full precision, as the losses ask for.
      memory: bytes.
      island: chips joined by the fast network; there are no more where `far` is missing.
      near: bytes one way over one link, and seconds until the first arrives, inside an island.
      far: likewise between islands.
    """

    bf16: float
    float32: float
    memory: float
    island: int
    near: tuple[float, float]
    far: tuple[float, float] | None = None


# Makers' data sheets; latencies are assumed. A TPU makes a float32 product from six bf16 ones.
CHIPS = {
    "H100, 8 a host": Chip(989e12, 67e12, 80e9, 8, (450e9, 5e-6), (50e9, 10e-6)),  # 400 Gb/s each
    "TPU v5e": Chip(197e12, 197e12 / 6, 16e9, 256, (45e9, 2e-6)),
    "TPU v5p": Chip(459e12, 459e12 / 6, 95e9, 8960, (90e9, 2e-6)),
}
COUNTS = (8, 64, 256, 1024, 4096)
ASSUMED = {
    "share of the bf16 peak in the encoders": 0.40,  # large transformers in JAX reach 0.4 to 0.7
    "share of the float32 peak in the loss": 0.60,
    "share of a link's rate": 0.80,
}
FLOAT = 4
ADAMW = 4  # parameter, gradient, two moments


class Method(NamedTuple):
    """What a step of a two-tower method takes, by this code's own count.

    Attributes:
      flops_per_pair: of towers and heads, forward and backward.
      parameters: trainable.
      width: E, of the joint space.
      activations_per_pair: bytes.
    """

    flops_per_pair: float
    parameters: int
    width: int
    activations_per_pair: float


def softmax_flops(batch: int, width: int) -> float:
    """FLOPs of exact tiled InfoNCE on all chips: X Y^T twice, two gradients; 2 B^2 E each."""
    return 8 * batch**2 * width


def ring_bytes(batch: int, width: int) -> float:
    """Bytes each chip sends in tiled InfoNCE: losses/tiled.py, embeddings in float32.

    Forward the texts [B, E] travel with index (4), candidate and valid (1 each) and the running
    sums of their columns (4 floats); backward with the finished sums and the gradients [B, E].
    """
    known, sums = 4 + 1 + 1, 4 * FLOAT
    return batch * (2 * (FLOAT * width + known + sums) + FLOAT * width)


def step(method: Method, chip: Chip, chips: int, pairs: int, fsdp: bool) -> dict[str, float]:
    """Seconds and bytes of one step on `chips` chips with `pairs` pairs each.

    The slowest link sets the pace of a ring. Towers and loss add up, because the ring's product and
    its hop depend on each other; gradients travel while the backward pass still computes, so their
    time counts only where it exceeds two thirds of the towers' (the backward pass).
    """
    batch = chips * pairs
    rate = ASSUMED["share of the bf16 peak in the encoders"]
    peak, latency = chip.far if chips > chip.island else chip.near
    bandwidth = peak * ASSUMED["share of a link's rate"]
    towers = method.flops_per_pair * pairs / (rate * chip.bf16)
    product = softmax_flops(batch, method.width) / chips
    loss = product / (ASSUMED["share of the float32 peak in the loss"] * chip.float32)
    ring = ring_bytes(batch, method.width) / bandwidth + 2 * chips * latency
    passes = 3 if fsdp else 2  # gather twice and scatter, or reduce and spread
    gradients = passes * FLOAT * method.parameters * (chips - 1) / chips / bandwidth
    exposed = max(0.0, gradients - 2 / 3 * towers)
    seconds = towers + loss + ring + exposed
    state = ADAMW * FLOAT * method.parameters / (chips if fsdp else 1)
    # Texts of one chip twice over (what came, what goes), and both gradients.
    embeddings = 6 * FLOAT * pairs * method.width
    return {
        "batch": batch,
        "towers": towers,
        "loss": loss,
        "ring": ring,
        "gradients": gradients,
        "gradients_exposed": exposed,
        "seconds": seconds,
        "pairs_per_second": batch / seconds,
        "towers_share": towers / seconds,
        "bytes": state + pairs * method.activations_per_pair + embeddings,
        "fits": state + pairs * method.activations_per_pair + embeddings < 0.9 * chip.memory,
    }


def count(config: dict, small: int = 4) -> Method:
    """Count a config's FLOPs and bytes with --plan's own code, at two small batches on one device.

    Args:
      config: resolved, of a recipe with `dim` and one softmax over image and text.
      small: the first batch; the second is twice as large.
    """
    config["mesh"] |= {"data": 1}
    plans = []
    for batch in (small, 2 * small):
        config["train"] |= {"batch_size": batch}
        plans.append(plan.make(plan.blueprint(config, plan.emulate(1))))
    towers = [sum(p.flops[k] for k in ("image encoder", "text encoder", "heads")) for p in plans]
    memory = [p.memory["activations and gradients"] for p in plans]
    return Method(
        (towers[1] - towers[0]) / small,
        plans[0].parameters[0],
        config["recipe"]["dim"],
        (memory[1] - memory[0]) / small,
    )


def table(rows: list[dict]) -> str:
    """Lay the steps out in milliseconds as a markdown table."""
    head = "| chip | chips | global batch | towers | loss | ring | gradients, exposed | step | "
    head += "pairs/s | towers' share | GB a chip |"
    lines = [head, "|---|" + "---:|" * 10]
    for row in rows:
        times = [row[k] for k in ("towers", "loss", "ring", "gradients_exposed", "seconds")]
        lines.append(
            f"| {row['chip']} | {row['chips']:,} | {row['batch']:,} | "
            + " | ".join(f"{1e3 * t:,.1f}" for t in times)
            + f" | {row['pairs_per_second']:,.0f} | {row['towers_share']:.0%} | "
            + f"{row['bytes'] / 1e9:.1f}{'' if row['fits'] else ' (does not fit)'} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> list[dict]:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=256, help="on each chip")
    parser.add_argument("--fsdp", action="store_true", help="split parameters over all chips")
    parser.add_argument("--out", type=pathlib.Path, help="file that gets every number as JSON")
    arguments, settings = parser.parse_known_args(argv)
    if not any(s.lstrip("-").startswith("config=") for s in settings):
        settings = ["--config=configs/clip.py:vit_b16", *settings]
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    method = count(train.resolve(settings)[0])
    rows = [
        {"chip": name, "chips": chips, **step(method, chip, chips, arguments.pairs, arguments.fsdp)}
        for name, chip in CHIPS.items()
        for chips in COUNTS
        if chip.far or chips <= chip.island
    ]
    print(f"{settings}: {method}\n\n{table(rows)}")
    if arguments.out:
        facts = {"settings": settings, "method": method._asdict(), "assumed": ASSUMED}
        facts |= {"chips": {k: v._asdict() for k, v in CHIPS.items()}, "rows": rows}
        with replaced(arguments.out) as scratch:
            scratch.write_text(json.dumps(facts, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    cli.leave(cli.run(main))
