"""The program a GPU would run, on a machine without one: memory, traffic, what GPUs exchange.

  pip install "jax[cuda13]"
  python -m benchmarks.gpu_program --config=configs/clip.py:vit_b16 [--gpus 4] [--top 20]

Takes the settings of `medvlp train`. The compiler in JAX's CUDA plugin works for a chip it is told
about (CHIP, an H200) as for one it finds, but tries no products out: nothing runs, and no speed
comes of it. Printed are the memory the step needs on one GPU besides its state and batch; the bytes
its instructions read and write, those of library calls (products, attention) apart; how many
instructions transpose; and what GPUs send one another. The bodies of loops are left out. Traffic
outside library calls is what a step loses on a GPU: compare it before and after a change.
"""

import argparse
import collections
import contextlib
import math
import pathlib
import re
from collections.abc import Iterator
from unittest import mock

import jax
from absl import flags
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental import topologies

from benchmarks import check, encoder_profile, step_profile
from medvlp_jax import cli, plan, train

# What XLA wants to know, by NVIDIA's data sheets of H100 and H200.
CHIP = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 device_memory_size: 150000000000
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 19 }
device_description_str: "NVIDIA H200"
"""
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
LIBRARY = re.compile(r"custom-call|gemm|dot_product_attention")
FREE = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element")  # nothing is moved
SENT = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")


@contextlib.contextmanager
def pretended():
    """Let programs be traced as on a GPU."""
    answers = {
        (jax, "default_backend"): "gpu",
        (cudnn, "check_cudnn_version"): 91900,
        (cudnn, "check_compute_capability"): True,
        (cudnn, "is_cuda_compute_capability_equal"): False,
    }
    with contextlib.ExitStack() as stack:
        for (module, name), answer in answers.items():
            answering = mock.patch.object(module, name, create=True, return_value=answer)
            stack.enter_context(answering)
        yield


def compiled(config: dict, gpus: int):
    """Compile the step of a config for GPUs that are not there.

    Raises:
      SystemExit: where JAX's CUDA plugin is not installed.
    """
    shape = f"1x1x{gpus}"
    try:
        topology = topologies.get_topology_desc(
            shape, platform="cuda", topology=shape, target_config=CHIP
        )
    except (RuntimeError, ValueError, NotImplementedError) as error:
        why = "No compiler for NVIDIA GPUs: pip install 'jax[cuda13]'"
        raise SystemExit(f"{why} ({error}).") from None
    with pretended():
        blueprint = plan.blueprint(config, topology.devices)
        lowered = blueprint.step.lower(blueprint.state, blueprint.batch)
        untried = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
        return lowered.compile(compiler_options=untried)


def size(shapes: str) -> int:
    """Return the bytes of all arrays in a text: "(f32[2,3]{1,0}, bf16[4])" has 32."""
    found = re.findall(rf"\b({'|'.join(BYTES)})\[([\d,]*)\]", shapes)
    return sum(
        BYTES[kind] * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in found
    )


def entry(program: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield name, result, operation and line of the instructions of a program that is no loop's."""
    inside = False
    for line in program.splitlines():
        inside = line.startswith("ENTRY") or (inside and line != "}")
        found = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(", line)
        if inside and found:
            yield *found.groups(), line


def traffic(program: str) -> list[dict]:
    """Return the instructions of a program with the bytes they read and write, the largest first.

    Args:
      program: compiled, as text.
    """
    sizes, found = {}, []
    for name, result, operation, line in entry(program):
        sizes[name] = size(result)
        if operation in FREE:
            continue
        operands = re.findall(r"%([\w.\-]+)", line.split("(", 1)[1].split("), ", 1)[0])
        moved = sizes[name] + sum(sizes.get(operand, 0) for operand in operands)
        row = {"name": name, "bytes": moved, "library": bool(LIBRARY.search(f"{name} {operation}"))}
        found.append(row | step_profile.described(line))
    return sorted(found, key=lambda row: -row["bytes"])


def exchanged(program: str) -> dict[str, int]:
    """Return the bytes of what devices exchange, by operation and type, loops' bodies once."""
    found = collections.Counter()
    for _, line in encoder_profile.instructions(program):
        match = re.search(rf" = (\(.*?\)|\S+) ({'|'.join(SENT)})(-start)?\(", line)
        if match:
            result, operation, starts = match.groups()
            arrays = re.findall(r"\w+\[[\d,]*\]", result)
            if starts and operation in ("all-gather", "collective-permute"):
                arrays = arrays[len(arrays) // 2 :]  # what comes out stands behind what goes in
            for array in arrays:
                found[f"{operation} {array.split('[')[0]}"] += size(array)
    return dict(found)


def measure(config: dict, gpus: int) -> dict:
    """Compile and count."""
    step = compiled(config, gpus)
    program = step.as_text()
    rows = traffic(program)
    total = lambda library: sum(row["bytes"] for row in rows if row["library"] == library)
    return {
        "gpus": gpus,
        "temporary_bytes": int(step.memory_analysis().temp_size_in_bytes),
        "bytes_of_library_calls": total(True),
        "bytes_of_all_else": total(False),
        "transposes": sum("transpose" in row["name"] for row in rows),
        "exchanged": exchanged(program),
        "instructions": rows,
    }


def table(found: dict, top: int) -> str:
    """Lay out the totals, and the largest instructions outside of library calls."""
    gigabytes = lambda count: f"{count / 1e9:,.2f} GB"
    lines = [
        f"temporary memory of a GPU: {gigabytes(found['temporary_bytes'])}",
        f"read and written by library calls: {gigabytes(found['bytes_of_library_calls'])}",
        f"by all else: {gigabytes(found['bytes_of_all_else'])}, {found['transposes']} transposes",
        *(f"{what}: {gigabytes(count)}" for what, count in found["exchanged"].items()),
        "",
        "| GB | instruction | makes | of |",
        "|---:|---|---|---|",
    ]
    for row in [row for row in found["instructions"] if not row["library"]][:top]:
        cells = (row["name"], row["makes"][:60], row["of"][-90:])
        lines.append(f"| {row['bytes'] / 1e9:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict:
    """Compile, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--top", type=int, default=20, help="instructions to list")
    parser.add_argument("--out", type=pathlib.Path, help="file that gets every number as JSON")
    options, settings = parser.parse_known_args(argv)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads absl's own flags
    config, _ = train.resolve(settings)
    found = measure(config, options.gpus)
    print(table(found, options.top))
    if options.out:
        check.keep(options.out, found)
    return found


if __name__ == "__main__":
    cli.leave(cli.run(main))
