"""One training step of any method, size and device: speed, memory, FLOPs, MFU.

  python benchmarks/train_step.py --config=configs/clip.py:vit_b16 --config.train.batch_size=256
  python benchmarks/train_step.py --config=configs/imitate.py:demo --data        # with its input
  python benchmarks/train_step.py --config=configs/clip.py:demo --weak 1 2 4 8   # emulated devices

Takes the settings of `medvlp train`. The step is the one the run would take, on all devices there
are. Without --data its input is random bytes and words that already lie on the device, so that the
loader cannot be what is measured; --data reads the corpora as a run does.

Model FLOPs are counted in the traced program (training/flops.py) without what a backward pass makes
again; MFU divides them by the bf16 peak of the data sheet and by a matrix product of the compute
type that is measured here, before and after. Times are medians of --rounds rounds of --steps steps.
"""

import argparse
import contextlib
import json
import os
import pathlib
import platform
import resource
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.experimental.compilation_cache import compilation_cache

from medvlp_jax import assemble, cli, examples, plan, sharding, train
from medvlp_jax.config import UserError
from medvlp_jax.data import packing
from medvlp_jax.encoders.base import Packed, Tokens
from medvlp_jax.training import flops
from medvlp_jax.training import params as paths
from medvlp_jax.training import step as training
from medvlp_jax.writing import replaced

# Dense bf16 FLOP/s of one device by the makers' data sheets, by how JAX names the kind.
PEAKS = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}
SHORTEST = 0.25  # random texts fill between this share of the text length and all of it


def random_batch(blueprint: plan.Blueprint, seed: int = 0) -> dict:
    """Fill the shapes of a batch: bytes, words of random length, unit features, all valid."""
    rng = np.random.default_rng(seed)
    vocabulary = getattr(getattr(blueprint.recipe, "text", None), "vocab_size", 1)

    def tokens(shape):
        length = shape[-1]
        lengths = rng.integers(max(1, int(SHORTEST * length)), length + 1, shape[:-1])
        ids = rng.integers(0, vocabulary, shape, np.int32)
        return Tokens(ids, np.arange(length) < lengths[..., None])

    def packed(struct):
        groups, rows, length = struct.ids.shape
        examples = struct.at.shape[1]
        shape = (groups * examples, *struct.at.shape[2:], length)
        return packing.Packing({"": rows / examples}, groups)({"": tokens(shape)})[""]

    def leaf(key, struct):
        if isinstance(struct, Tokens):
            return tokens(struct.ids.shape)
        if isinstance(struct, Packed):
            return packed(struct)
        if key.endswith("_valid"):
            return np.ones(struct.shape, bool)
        if key.endswith("_id"):
            return np.arange(len(struct), dtype=struct.dtype)
        if key.startswith("label/"):
            classes = rng.integers(0, struct.shape[1], struct.shape[0])
            return np.eye(struct.shape[1], dtype=struct.dtype)[classes]
        if np.issubdtype(struct.dtype, np.integer):
            return rng.integers(0, 256, struct.shape).astype(struct.dtype)
        return rng.normal(size=struct.shape).astype(struct.dtype)

    batch = {key: leaf(key, struct) for key, struct in blueprint.batch.items()}
    return jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), batch, blueprint.batch)


def random_state(blueprint: plan.Blueprint):
    """Make a state of the blueprint's shapes: normal weights, scales of 1, no moments yet.

    A GPU multiplies numbers that are all alike faster than others: it stays cooler.
    """

    rng = np.random.default_rng(0)

    def fill(path, struct):
        last = str(getattr(path[-1], "key", "")) if path else ""
        if last in ("scale", "var"):
            return np.ones(struct.shape, struct.dtype)
        if len(struct.shape) < 2 or not jnp.issubdtype(struct.dtype, jnp.floating):
            return np.zeros(struct.shape, struct.dtype)
        normal = rng.standard_normal(struct.shape, np.float32)
        return (0.02 * normal).astype(struct.dtype)

    # On the host: a program with a draw for each of hundreds of leaves takes minutes to compile.
    moments = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), blueprint.state.optimizer)
    state = jax.tree_util.tree_map_with_path(fill, blueprint.state._replace(optimizer=()))
    where = jax.tree.map(lambda s: s.sharding, blueprint.state)
    return jax.device_put(state._replace(optimizer=moments), where)


def words(batch) -> int:
    """Count the tokens of a batch that are no padding, those of texts the recipe reads."""
    masks = [np.asarray(t.mask) for t in batch.values() if isinstance(t, (Tokens, Packed))]
    return int(sum(mask.sum() for mask in masks))


def compile_step(blueprint: plan.Blueprint, times: int):
    """Return the compiled step and the seconds it took; the second time with a filled cache."""
    lower = lambda: blueprint.step.lower(blueprint.state, blueprint.batch)
    seconds = []
    with tempfile.TemporaryDirectory() as folder, _compilation_cache(folder):
        for _ in range(times):
            jax.clear_caches()
            lowered = lower()
            began = time.perf_counter()
            compiled = lowered.compile()
            seconds.append(time.perf_counter() - began)
    return compiled, seconds


@contextlib.contextmanager
def _compilation_cache(folder):
    settings = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def matmul_rate(dtype, platform_name: str, repeats: int = 5) -> float:
    """Measure FLOP/s of a square matrix product on one device."""
    side = 1024 if platform_name == "cpu" else 8192
    a = jax.random.normal(jax.random.key(0), (side, side)).astype(dtype)
    product = jax.jit(lambda a, b: a @ b)
    jax.block_until_ready(product(a, a))
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        out = a
        for _ in range(4):
            out = product(out, a)
        jax.block_until_ready(out)
        seconds.append((time.perf_counter() - began) / 4)
    return 2 * side**3 / float(np.median(seconds))


def time_steps(step, state, batches, rounds: int, steps: int) -> dict:
    """Time rounds of steps; the host asks for the next before the last is done, as the loop does.

    Args:
      step: compiled (state, batch) -> (state, metrics).
      state: donated.
      batches: function that returns the next global batch.
      rounds: of which the median is taken.
      steps: in each round.
    """
    total, waited = [], []
    for turn in range(rounds + 1):
        if turn == 1:
            used = resource.getrusage(resource.RUSAGE_SELF)
        began, waiting = time.perf_counter(), 0.0
        for _ in range(steps):
            asked = time.perf_counter()
            batch = batches()
            waiting += time.perf_counter() - asked
            state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        if turn:  # the first warms up
            total.append((time.perf_counter() - began) / steps)
            waited.append(waiting / steps)
    loss = float(metrics["loss"])
    now = resource.getrusage(resource.RUSAGE_SELF)
    processor = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return {
        "processor_seconds": processor / (rounds * steps),
        "page_faults": (now.ru_minflt - used.ru_minflt) / (rounds * steps),
        "step_seconds": float(np.median(total)),
        "step_seconds_quartiles": np.quantile(total, (0.25, 0.75)).tolist(),
        "host_waits_for_data_seconds": float(np.median(waited)),
        "finite_loss": bool(np.isfinite(loss)),
    }


def parts_of_a_step(blueprint: plan.Blueprint, batch, rounds: int) -> dict[str, float]:
    """Time encoding alone, and value and gradient without the optimiser."""
    recipe, state = blueprint.recipe, random_state(blueprint)
    rngs = dict.fromkeys(training.RNGS, jax.random.key(0))

    def encode(params, batch):
        variables = {"params": paths.merge(params, state.frozen), **state.collections}
        return training.encode(recipe, variables, batch, rngs)

    def loss(params, batch):
        features, collections = encode(params, batch)
        variables = {"params": paths.merge(params, state.frozen), **state.collections}
        variables |= collections
        return training.objective(recipe, variables, features, batch, rngs, state.step)[0]

    arms = {
        "encode forward": lambda params, batch: encode(params, batch)[0],
        "value and gradient": jax.value_and_grad(loss),
    }
    seconds = {}
    for name, arm in arms.items():
        with sharding.tracing_on(blueprint.mesh):
            compiled = jax.jit(arm).lower(state.params, batch).compile()
        times = []
        for _ in range(rounds + 1):
            began = time.perf_counter()
            jax.block_until_ready(compiled(state.params, batch))
            times.append(time.perf_counter() - began)
        seconds[name] = float(np.median(times[1:]))
    return seconds


def real_batches(config, mesh):
    """Return a function that gives the next global batch of the run's own input."""
    parts = assemble.parts(config)
    sources = assemble.open_corpora(config["data"], config["data"]["split"])
    features = examples.cached_text(parts, assemble.initial_variables(parts), sources)
    rows = examples.train_batches(parts, sources, features)
    inputs = parts.recipe.inputs
    return lambda: sharding.to_global({k: v for k, v in next(rows).items() if k in inputs}, mesh)


def without_filling(config: dict) -> dict:
    """Return the config with XLA's attention: cuDNN's works on tokens that are filled up."""
    if not isinstance(config, dict):
        return config
    return {
        key: "xla" if (key, value) == ("attention", "cudnn") else without_filling(value)
        for key, value in config.items()
    }


def peak_memory(compiled, devices) -> dict[str, float]:
    """Bytes: what the program is compiled for, and the highest mark of the process or device."""
    analysis = compiled.memory_analysis()
    found = {"compiled_temporary_bytes": int(analysis.temp_size_in_bytes)}
    stats = devices[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        found["device_peak_bytes"] = int(stats["peak_bytes_in_use"])
    found["host_peak_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found


def measure(
    config: dict, *, data: bool, rounds: int, steps: int, devices: int | None, quick: bool = False
) -> dict:
    """Measure one config on the devices there are, or on emulated ones.

    Args:
      config: resolved.
      data: read the corpora; False takes random input.
      rounds: see time_steps.
      steps: likewise.
      devices: CPU devices to emulate; None takes what is there.
      quick: compile once and leave out the parts of a step.
    """
    emulated = None if devices is None else plan.emulate(devices)
    blueprint = plan.blueprint(config, emulated)
    mesh = blueprint.mesh
    device = mesh.devices.flat[0]
    dtype = config["recipe"]["image"]["dtype"]
    rates = [matmul_rate(dtype, device.platform)]
    compiled, (cold, *warm) = compile_step(blueprint, 1 if quick else 2)
    batch = random_batch(blueprint)
    batches = real_batches(config, mesh) if data else lambda: batch
    found = time_steps(compiled, random_state(blueprint), batches, rounds, steps)
    if not quick:
        found |= {"seconds_of": parts_of_a_step(blueprint, batch, rounds)}
    found |= peak_memory(compiled, mesh.devices.flat)
    rates.append(matmul_rate(dtype, device.platform))
    plain = plan.blueprint(without_filling(config), emulated)
    counted, again = flops.by_part(
        plain.step.trace(plain.state, plain.batch).jaxpr, flops.step_part
    )
    model = sum(counted.values()) - sum(again.values())
    pairs, seconds = config["train"]["batch_size"], found["step_seconds"]
    views = sum(key in blueprint.recipe.inputs for key in ("image", "image_2"))
    analysis = compiled.cost_analysis() or {}
    peak = PEAKS.get(device.device_kind)
    return {
        "recipe": config["recipe"]["name"],
        "device": device.device_kind,
        "devices": mesh.size,
        "emulated": devices is not None,
        "dtype": dtype,
        "batch_size": pairs,
        "input": "corpora" if data else "random, on the device",
        **found,
        "pairs_per_second": pairs / seconds,
        "images_per_second": views * pairs / seconds,
        "tokens_per_second": words(batch) / seconds,
        "model_flops": model,
        "model_flops_recomputed": sum(again.values()),
        # Of one device; the body of a loop counts once, see training/flops.py.
        "compiler_flops": analysis.get("flops"),
        "flops_per_second_per_device": model / seconds / mesh.size,
        "matmul_flops_per_second": rates,
        "mfu_of_matmul": model / seconds / mesh.size / float(np.mean(rates)),
        "mfu_of_data_sheet": model / seconds / mesh.size / peak if peak else None,
        "compile_seconds_cold": cold,
        "compile_seconds_warm": warm[0] if warm else None,
    }


def weak_scaling(arguments, settings: list[str], batch_size: int) -> list[dict]:
    """Measure more and more emulated devices with the same share each, a process for each count.

    The devices share the cores of this machine, so N of them take at least N times as long; what is
    reported is how much more than that.
    """
    rows = []
    for count in arguments.weak:
        command = [sys.executable, __file__, *settings, f"--devices={count}"]
        command += [f"--config.train.batch_size={count * batch_size}"]
        command += [f"--rounds={arguments.rounds}", f"--steps={arguments.steps}", "--json"]
        command += ["--data"] * arguments.data + ["--quick"] * arguments.quick
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:  # it has said why
            raise UserError(f"--weak: {count} devices could not be measured, see above.")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    alone = rows[0]["step_seconds"] / rows[0]["devices"]
    for row in rows:
        row["times_ideal"] = row["step_seconds"] / row["devices"] / alone
    return rows


def table(rows: list[dict]) -> str:
    """Lay out the main numbers as a markdown table."""
    columns = {
        "method": lambda r: r["recipe"],
        "devices": lambda r: f"{r['devices']} {r['device']}{' (emulated)' * r['emulated']}",
        "pairs": lambda r: r["batch_size"],
        "input": lambda r: r["input"],
        "ms a step": lambda r: f"{1e3 * r['step_seconds']:,.1f}",
        "processor ms": lambda r: f"{1e3 * r['processor_seconds']:,.1f}",
        "page faults": lambda r: f"{r['page_faults']:,.0f}",
        "of it waiting": lambda r: f"{1e3 * r['host_waits_for_data_seconds']:,.1f}",
        "pairs/s": lambda r: f"{r['pairs_per_second']:,.1f}",
        "images/s": lambda r: f"{r['images_per_second']:,.1f}",
        "tokens/s": lambda r: f"{r['tokens_per_second']:,.0f}",
        "GFLOP a pair": lambda r: f"{r['model_flops'] / r['batch_size'] / 1e9:,.2f}",
        "MFU of a matmul": lambda r: f"{r['mfu_of_matmul']:.1%}",
        "MFU of the data sheet": lambda r: (
            f"{r['mfu_of_data_sheet']:.1%}" if r["mfu_of_data_sheet"] else ""
        ),
        "compile s, cold / warm": lambda r: (
            f"{r['compile_seconds_cold']:.1f}"
            + (f" / {r['compile_seconds_warm']:.1f}" if r["compile_seconds_warm"] else "")
        ),
    }
    if any("times_ideal" in row for row in rows):
        columns["times ideal"] = lambda r: f"{r['times_ideal']:.2f}"
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join(
        lines + [f"| {' | '.join(str(cell(row)) for cell in columns.values())} |" for row in rows]
    )


def main(argv: list[str] | None = None) -> list[dict]:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", action="store_true", help="read the corpora as a run does")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="in a round")
    parser.add_argument("--quick", action="store_true", help="one compilation, the step alone")
    parser.add_argument("--devices", type=int, help="CPU devices to emulate")
    parser.add_argument("--weak", type=int, nargs="+", help="weak scaling over emulated devices")
    parser.add_argument("--json", action="store_true", help="print one line of JSON, no table")
    parser.add_argument("--out", type=pathlib.Path, help="file that gets every number as JSON")
    arguments, settings = parser.parse_known_args(argv)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads absl's own flags
    if arguments.weak and arguments.devices:
        parser.error("--weak emulates devices by itself: leave --devices out.")
    config, _ = train.resolve(settings)
    how = {"data": arguments.data, "rounds": arguments.rounds, "steps": arguments.steps}
    how |= {"quick": arguments.quick}
    if arguments.weak:
        rows = weak_scaling(arguments, settings, config["train"]["batch_size"])
    else:
        rows = [measure(config, devices=arguments.devices, **how)]
    if arguments.json:
        print(json.dumps(rows[0]))
        return rows
    print(table(rows))
    if arguments.out:
        facts = {"settings": settings, "jax": jax.__version__, "cores": os.cpu_count()}
        facts |= {"machine": platform.machine(), "rows": rows}
        with replaced(arguments.out) as scratch:
            scratch.write_text(json.dumps(facts, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    cli.leave(cli.run(main))
