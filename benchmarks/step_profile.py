"""Where the time of a method's training step goes: by part of the method and kind of operation.

  python -m benchmarks.step_profile --config=configs/lgdea.py:demo [--rounds 3] [--top 20]
      [--out FILE.json]

Takes the settings of `medvlp train`. The step is the one the run would take, its input random, as
in benchmarks/train_step.py. The compiler knows which module an instruction comes from, the profiler
how long each one ran; on a CPU they overlap, and one that several threads share counts once.
Printed are shares of the sum, beside the share of the FLOPs: a part that takes more time than FLOPs
waits for memory. "compiler" is what XLA put in by itself, most of it copies. --top also lists the
instructions that take longest. On a CPU set GLIBC_TUNABLES as launch/processes.sh does: else the
forward pass clears its memory anew each time. On a GPU set
XLA_FLAGS="--xla_gpu_enable_command_buffer=": kernels that are launched together do not say which
instruction they belong to.
"""

import argparse
import collections
import json
import pathlib
import re

import jax
from absl import flags

from benchmarks import encoder_profile, train_step
from medvlp_jax import cli, plan, train
from medvlp_jax.training import flops
from medvlp_jax.writing import replaced


def parts_of(program: str) -> dict[str, tuple[str, bool]]:
    """Return the part of the step each instruction belongs to, and whether it goes backward.

    Args:
      program: compiled, as text.
    """
    found = {}
    for instruction, line in encoder_profile.instructions(program):
        scope = re.search(r'op_name="([^"]*)"', line)
        name = scope.group(1) if scope else ""
        part = flops.step_part(name) if "/" in name else "compiler"
        found[instruction] = part, "transpose(" in name
    return found


def profile(config: dict, rounds: int) -> tuple[dict[str, dict[str, float]], list[dict]]:
    """Measure how long the instructions of a step take.

    Args:
      config: resolved.
      rounds: steps.

    Returns:
      Milliseconds of instructions and FLOPs by part of the method; and each instruction, what takes
      longest first.
    """
    blueprint = plan.blueprint(config)
    batch = train_step.random_batch(blueprint)
    compiled = blueprint.step.lower(blueprint.state, blueprint.batch).compile()
    state = train_step.random_state(blueprint)

    def run():
        nonlocal state
        state, _ = jax.block_until_ready(compiled(state, batch))

    run()
    program = compiled.as_text()
    parts, kinds = parts_of(program), encoder_profile.kinds_of(program)
    rows = collections.defaultdict(collections.Counter)
    taken = encoder_profile.by_instruction(run, parts, rounds)
    for name, spent in taken.items():
        part, backward = parts[name]
        rows[part]["backward" if backward else "forward"] += spent
        rows[part][kinds[name]] += spent
    trace = blueprint.step.trace(blueprint.state, blueprint.batch)
    for part, count in flops.by_part(trace.jaxpr, flops.step_part)[0].items():
        rows[part]["flops"] += count
    lines = dict(encoder_profile.instructions(program))
    every = [
        {"name": name, "milliseconds": spent, "kind": kinds[name], **described(lines[name])}
        for name, spent in sorted(taken.items(), key=lambda item: -item[1])
    ]
    return {part: dict(row) for part, row in rows.items()}, every


def described(line: str) -> dict[str, str]:
    """Return what an instruction makes, its type and shape, and the operation it stems from."""
    made = re.search(r" = (\(.*?\)|\S+) ", line)
    scope = re.search(r'op_name="([^"]*)"', line)
    return {"makes": made.group(1) if made else "", "of": scope.group(1) if scope else ""}


def list_of(every: list[dict], count: int) -> str:
    """Lay out the first instructions as a markdown table."""
    lines = ["| ms | kind | instruction | makes | of |", "|---:|---|---|---|---|"]
    for each in every[:count]:
        cells = (each["kind"], each["name"], each["makes"][:60], each["of"][-90:])
        lines.append(f"| {each['milliseconds']:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table(rows: dict[str, dict[str, float]]) -> str:
    """Lay out the shares as a markdown table, the dearest part first."""
    time = lambda row: sum(row.get(way, 0) for way in ("forward", "backward"))
    whole = sum(map(time, rows.values()))
    work = sum(row.get("flops", 0) for row in rows.values())
    columns = ("forward", "backward", *encoder_profile.KINDS)
    lines = [
        f"| {whole:,.0f} ms of instructions | of the time | of the FLOPs | {' | '.join(columns)} |",
        "|---" + "|---:" * (2 + len(columns)) + "|",
    ]
    for part, row in sorted(rows.items(), key=lambda item: -time(item[1])):
        shares = [row.get(column, 0) / whole for column in columns]
        shares = [time(row) / whole, row.get("flops", 0) / work, *shares]
        lines.append(f"| {part} | {' | '.join(f'{share:.1%}' for share in shares)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict:
    """Profile, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="steps")
    parser.add_argument("--top", type=int, default=0, help="instructions to list")
    parser.add_argument("--out", type=pathlib.Path, help="file that gets every number as JSON")
    arguments, settings = parser.parse_known_args(argv)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads absl's own flags
    config, _ = train.resolve(settings)
    rows, every = profile(config, arguments.rounds)
    print(table(rows))
    if arguments.top:
        print(list_of(every, arguments.top))
    if arguments.out:
        facts = {"settings": settings, "jax": jax.__version__, "milliseconds": rows}
        facts |= {"slowest": every[: arguments.top]} if arguments.top else {}
        with replaced(arguments.out) as scratch:
            scratch.write_text(json.dumps(facts, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    cli.leave(cli.run(main))
