"""Train a method, evaluate it, export it.

  bash launch/run.sh --config=configs/imitate.py:demo [--config.optim.lr=3e-4 ...] [--workdir=DIR]
  medvlp train --config=configs/imitate.py --plan [--devices=8]

--plan prints memory on each device and FLOPs by part, from shapes: needs no data, weights or
accelerator, and starts nothing. --devices=N plans for N devices, emulated on the CPU.

The run folder holds config.json, metrics.jsonl, results.json, curves.png, examples.png,
checkpoints/ and export/. The same command again resumes an interrupted run bit by bit.
"""

import datetime
import os
import pathlib
import sys
import time

import jax
from absl import flags, logging
from ml_collections import config_flags

from medvlp_jax import assemble, cli, evaluate, export, plan, sharding
from medvlp_jax import config as configs
from medvlp_jax.config import UserError
from medvlp_jax.evaluation import plots
from medvlp_jax.evaluation.results import results_table
from medvlp_jax.training import loop, optim
from medvlp_jax.training import params as paths
from medvlp_jax.training import step as training
from medvlp_jax.training.checkpoint import Checkpointer
from medvlp_jax.training.report import Reporter


def run(config: dict, workdir: pathlib.Path) -> dict:
    """Train, evaluate and export one run.

    Args:
      config: resolved, nested plain dict.
      workdir: run folder; an interrupted run in it is resumed.

    Returns:
      The results.

    Raises:
      UserError: for bad input, before anything is overwritten.
    """
    began = time.time()
    settings = config["train"]
    _check_resume(config, workdir)
    _check_sizes(config["data"])
    parts = assemble.parts(config)
    _check_batch(settings["batch_size"], settings["chunks"], parts)
    sources = assemble.open_corpora(config["data"], config["data"]["split"])
    evaluator = evaluate.Evaluator(parts, config["evals"])
    variables = assemble.initial_variables(parts)
    untrained = jax.device_get(variables)  # the control; the step donates the originals
    frozen = assemble.frozen_patterns(parts)
    paths.check_patterns(variables["params"], frozen, "optim.freeze")
    fields = {k: v for k, v in config["optim"].items() if k != "freeze"}
    trainable, fixed = paths.split(variables["params"], frozen)
    tx, rate = optim.make(trainable, steps=settings["steps"], **fields)
    state = assemble.place(training.make_state(variables, tx, frozen), parts)
    features = assemble.cached_text(parts, variables, sources)
    batches = assemble.train_batches(parts, sources, features)

    workdir.mkdir(parents=True, exist_ok=True)
    checkpointer = Checkpointer(
        workdir / "checkpoints", keep=settings["keep"], keep_every=settings["keep_every"]
    )
    if checkpointer.latest() is not None:
        restored = checkpointer.restore(checkpointer.latest(), state)
        state = restored.state
        batches.set_state(restored.position)
        print(f"Resuming {workdir} at step {int(state.step)}", flush=True)
    _write_config(config, workdir)
    pairs = sum(map(len, sources))
    print(
        f"{config['recipe']['name']}: {paths.count(trainable) / 1e6:.2f} M trainable and "
        f"{paths.count(fixed) / 1e6:.2f} M fixed parameters, {pairs} pairs, "
        f"{settings['steps']} steps of {settings['batch_size']} on {len(jax.devices())} devices",
        flush=True,
    )
    tracking = (
        {"project": settings["wandb_project"], "config": config} if settings["wandb"] else None
    )
    state = loop.fit(
        state,
        training.make_train_step(
            parts.recipe, tx, rate, config["seed"], chunks=settings["chunks"], mesh=parts.mesh
        ),
        batches,
        recipe=parts.recipe,
        mesh=parts.mesh,
        steps=settings["steps"],
        reporter=Reporter(workdir, every=settings["log_every"], wandb=tracking),
        checkpointer=checkpointer,
        checkpoint_every=settings["checkpoint_every"],
        config=config,
        evaluate=lambda _, state: evaluate.scalars(
            evaluator.quick(state.variables, limit=settings["evaluate_limit"])
        ),
        evaluate_every=settings["evaluate_every"],
    )
    checkpointer.close()
    trained = jax.device_get(state.variables)
    results = evaluate.full(evaluator, state.variables, untrained)
    if jax.process_index() == 0:
        evaluate.write_results(results, workdir)
        plots.curves(workdir / "metrics.jsonl", workdir / "curves.png")
        evaluator.draw_examples(state.variables, workdir / "examples.png")
        if settings["export"]:
            export.export(parts, trained, workdir / "export", results)
        _print_summary(results, parts, workdir, settings, time.time() - began)
    return results


def plan_of(config: dict, devices: int | None = None) -> str:
    """Say what a step of this config takes, without training.

    Args:
      config: resolved.
      devices: how many to emulate on the CPU; None plans for those there are.

    Raises:
      UserError: for what `run` would refuse too, or devices that are not to be had.
    """
    emulated = None if devices is None else plan.emulate(devices)
    _check_sizes(config["data"])
    blueprint = plan.blueprint(config, emulated)
    _check_batch(config["train"]["batch_size"], config["train"]["chunks"], blueprint)
    return plan.table(blueprint, plan.make(blueprint))


def _check_resume(config, workdir):
    """Show what differs from the run in `workdir`; the checkpoint refuses another architecture."""
    if not (workdir / assemble.CONFIG).is_file():
        return
    changed = configs.differences(assemble.read_config(workdir), config)
    for line in changed:
        print(f"config differs from the run in {workdir}: {line}", flush=True)


def _check_batch(batch_size, chunks, parts):
    pieces = sharding.batch_devices(parts.mesh)
    if batch_size % pieces:
        raise UserError(
            f"train.batch_size={batch_size} cannot be split over {pieces} devices; "
            f"accepted are multiples of {pieces}."
        )
    if chunks < 1 or batch_size % (pieces * chunks):
        raise UserError(
            f"train.batch_size={batch_size} cannot be split into train.chunks={chunks} on {pieces} "
            f"devices; accepted are multiples of {pieces} times chunks."
        )
    group = getattr(parts.recipe, "contrast_group", 0)
    if group and batch_size % group:
        raise UserError(
            f"train.batch_size={batch_size} cannot be split into recipe.contrast_group={group}."
        )


def _check_sizes(data):
    if data["crop"] > data["size"]:
        raise UserError(f"data.crop={data['crop']} is larger than data.size={data['size']}.")
    if data["channels"] not in (1, 3):
        raise UserError(f"data.channels must be 1 (grey) or 3, got {data['channels']}.")


def _write_config(config, workdir):
    if jax.process_index() == 0:
        scratch = workdir / f"{assemble.CONFIG}.tmp"
        scratch.write_text(configs.to_json(config))
        os.replace(scratch, workdir / assemble.CONFIG)


def _print_summary(results, parts, workdir, settings, seconds):
    print(f"\n{results_table(results, per_class=False)}\n")
    generated = [c for c in parts.config["data"]["corpora"] if c.startswith("cxr_phantom")]
    if generated:
        print(
            f"{', '.join(generated)} is generated data: these numbers say nothing about patients."
        )
    print(f"{seconds / 60:.1f} minutes. Run folder: {workdir}")
    if settings["export"]:
        print(f"Exported for transformers: {workdir / 'export'}")


def resolve(argv: list[str]) -> tuple[dict, pathlib.Path]:
    """Parse the command line into the resolved config and the run folder.

    Raises:
      UserError: for an unknown flag or setting, a missing config file, or a value of another type.
    """
    named = [a for a in argv if a.lstrip("-").startswith("config=")]
    if not named:
        raise UserError("Name a config: --config=configs/imitate.py:demo.")
    file = named[-1].split("=", 1)[1]
    if not pathlib.Path(file.partition(":")[0]).is_file():
        known = sorted(str(p) for p in pathlib.Path("configs").glob("*.py"))
        raise UserError(f"No config file '{file.partition(':')[0]}'. Known: {', '.join(known)}.")
    configs.check_overrides(argv, _parse([f"--config={file}"])[0].config)
    parsed, rest = _parse(argv)
    if rest:
        raise UserError(f"What is '{rest[0]}'? Settings are given as --config.section.key=value.")
    stem = file.rsplit("/", 1)[-1].replace(".py:", "-").removesuffix(".py")
    folder = parsed.workdir or f"runs/{stem}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    return parsed.config.to_dict(), pathlib.Path(folder).absolute()


def _parse(argv: list[str]) -> tuple[flags.FlagValues, list[str]]:
    """Return the flag values and what is left over."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "configs/NAME.py or configs/NAME.py:VARIANT", flag_values=values
    )
    flags.DEFINE_string(
        "workdir", "", "run folder; default runs/<config>-<time>", flag_values=values
    )
    flags.DEFINE_bool("plan", False, "print memory and FLOPs, train nothing", flag_values=values)
    flags.DEFINE_integer("devices", None, "emulated devices to plan for", flag_values=values)
    # ml_collections looks for overrides in sys.argv, whatever it is asked to parse.
    before, sys.argv = sys.argv, ["train", *argv]
    try:
        return values, values(sys.argv)[1:]
    except (flags.Error, ValueError, TypeError) as error:
        raise UserError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from None
    finally:
        sys.argv = before


def main(argv: list[str] | None = None) -> None:
    """Run from the command line.

    Raises:
      UserError: for bad input.
    """
    argv = sys.argv[1:] if argv is None else argv
    if any(a in ("--help", "-h") for a in argv):
        print(__doc__)
        for file in sorted(pathlib.Path("configs").glob("[!_]*.py")):
            if file.stem != "common":
                print(f"  {file}: {file.read_text().split(chr(34) * 3)[1].splitlines()[0]}")
        return
    flags.FLAGS.mark_as_parsed()  # Grain reads absl's own flags
    logging.set_verbosity(logging.WARNING)
    config, workdir = resolve(argv)
    asked = _parse(argv)[0]
    if asked.plan:
        print(plan_of(config, asked.devices))
    elif asked.devices is not None:
        raise UserError("--devices goes with --plan; a run takes the devices it finds.")
    else:
        run(config, workdir)


if __name__ == "__main__":
    sys.exit(cli.run(main))
