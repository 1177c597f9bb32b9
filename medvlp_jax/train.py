"""Train a method, evaluate it, export it.

  bash launch/run.sh --config=configs/imitate.py:demo [--config.optim.lr=3e-4 ...] [--workdir=DIR]
  medvlp train --config=configs/imitate.py --plan [--devices=8]

--plan prints memory on each device and FLOPs by part, from shapes: needs no data, weights or
accelerator, and starts nothing. --devices=N plans for N devices, emulated on the CPU.

The run folder holds config.json, starts.jsonl, metrics.jsonl, results.json, curves.png,
examples.png, checkpoints/ and export/; after zero-shot zero_shot.png and zero_shot.csv; that of a
classifier predictions.csv, classifier.png and attention.png too. The same command again resumes an
interrupted run bit by bit.
"""

import datetime
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
from absl import flags, logging
from ml_collections import config_flags

from medvlp_jax import (
    assemble,
    cases,
    checks,
    cli,
    controls,
    distributed,
    examples,
    export,
    plan,
    protocols,
    tables,
    unpaired,
    weights,
)
from medvlp_jax import config as configs
from medvlp_jax.config import UserError
from medvlp_jax.data import corpora, pairing
from medvlp_jax.evaluation import plots
from medvlp_jax.evaluation.results import Written, results_table, scalars, write_results
from medvlp_jax.evaluator import Evaluator
from medvlp_jax.recipes import base
from medvlp_jax.training import lock, loop, optim, starts
from medvlp_jax.training import params as paths
from medvlp_jax.training import step as training
from medvlp_jax.training.checkpoint import Checkpointer
from medvlp_jax.training.report import Reporter
from medvlp_jax.training.selection import Selection
from medvlp_jax.training.stopping import Signals, Stopped
from medvlp_jax.writing import replaced

GENERATED = ("cxr_phantom", "men_phantom")  # corpora that are drawn


class _Job(NamedTuple):
    """A run that has passed every check, at its newest checkpoint or at its start."""

    parts: assemble.Parts
    sources: Sequence[corpora.Source]
    evaluator: Evaluator
    validator: Evaluator
    selection: Selection | None
    state: training.TrainState
    step_fn: Callable
    batches: Iterator
    checkpointer: Checkpointer
    untrained: Mapping
    refresh: Callable | None


def run(config: dict, workdir: pathlib.Path, stop: Signals | None = None) -> dict:
    """Train, evaluate and export one run; every process of it calls this.

    Args:
      config: resolved, nested plain dict.
      workdir: run folder; an interrupted run in it is resumed.
      stop: notices signals.

    Returns:
      The results.

    Raises:
      UserError: for bad input, before anything is overwritten.
      Stopped: when asked to stop; what was trained is saved.
    """
    began = time.time()
    stop = stop or Signals()
    checks.processes(config, workdir)
    with lock.held(workdir):
        with stop.at_once():  # nothing to save yet
            job = _prepare(config, workdir, stop)
        state = _fit(job, workdir, stop)
        stop.expendable = True
        with stop.at_once():  # everything is saved
            return _finish(job, state, workdir, began)


def _prepare(config, workdir, stop) -> _Job:
    """Check everything, build everything, and read the newest checkpoint."""
    settings = config["train"]
    checks.settings(config)
    checks.say_changes(config, workdir)
    checks.split(config, assemble.mesh_of(config))
    protocols.check_prompts(config)
    sources = assemble.open_corpora(config["data"], config["data"]["split"])
    checks.sources(config, sources)  # before a text encoder is trained on them
    parts = assemble.parts(config)
    if settings["export"]:
        export.check(parts)
    checks.batch(config, parts)
    examples.check_view(config["data"], sources[0].images, parts.recipe.inputs)
    if "tabular" in parts.recipe.inputs:
        tables.check_labels(config["data"], sources, parts.recipe.task)
    pools = unpaired.pools(parts, sources)
    checks.evidence(config, parts.recipe, sources, pools)
    evaluator = validator = Evaluator(parts, config["evals"], stop)
    if settings["select"]:
        validator = Evaluator(parts, {**config["evals"], "split": checks.VALIDATION}, stop)
    # On the host, whence each device takes its part; as they are, they are the control.
    variables = untrained = jax.device_get(assemble.initial_variables(parts))
    checks.several(config, parts.recipe, variables)
    frozen = assemble.frozen_patterns(parts)
    paths.check_patterns(variables["params"], frozen, "optim.freeze")
    fields = {k: v for k, v in config["optim"].items() if k != "freeze"}
    trainable, fixed = paths.split(variables["params"], frozen)
    tx, rate = optim.make(trainable, steps=settings["steps"], **fields)
    rows, shares, refresh = sources, None, None
    if pools is not None:
        variables = unpaired.begin(parts, variables, sources[0], pools)
        related = pairing.Related()
        rows, shares = unpaired.streams(parts, sources[0], pools, related)
        if len(rows) > 1 and base.relates(parts.recipe):  # else no row has a relation
            refresh = unpaired.refresher(parts, sources[0], pools, related, stop)
    if settings["select"]:
        checks.selected(settings["select"], validator, assemble.place(variables, parts))
    features = examples.cached_text(parts, variables, sources)
    batches = examples.train_batches(parts, rows, features, shares=shares)

    checkpointer = Checkpointer(
        workdir / "checkpoints", keep=settings["keep"], keep_every=settings["keep_every"]
    )
    planned = training.plan_state(variables, tx, frozen, parts.mesh, config["mesh"]["rules"])
    restored = checkpointer.resume(planned)
    if restored is None:
        state = training.begin_state(variables, tx, frozen, planned)
    else:
        state = restored.state
        checks.resumed(config, int(state.step))
        if pools is not None:
            unpaired.recall(state, related)
        distributed.say(f"Resuming {workdir} at step {int(state.step)}")
        batches.set_state(checks.position(config, restored))
    selection = Selection(workdir, config) if settings["select"] else None
    _write_config(config, workdir)
    starts.record(workdir, int(state.step))
    pairs = sum(map(len, sources)) if pools is None else len(pools.pairs)
    told = ", ".join(map(_named, config["data"]["corpora"]))
    distributed.say(
        f"{config['recipe']['name']}: {paths.count(trainable) / 1e6:.2f} M trainable and "
        f"{paths.count(fixed) / 1e6:.2f} M fixed parameters, {pairs} pairs of {told}, "
        f"{settings['steps']} steps of {settings['batch_size']} on {len(jax.devices())} devices "
        f"of {jax.process_count()} processes"
    )
    step_fn = training.make_train_step(
        parts.recipe,
        tx,
        rate,
        config["seed"],
        chunks=settings["chunks"],
        mesh=parts.mesh,
        rules=config["mesh"]["rules"],
    )
    return _Job(
        parts,
        sources,
        evaluator,
        validator,
        selection,
        state,
        step_fn,
        batches,
        checkpointer,
        untrained,
        refresh,
    )


def _fit(job, workdir, stop):
    config = job.parts.config
    settings = config["train"]
    tracking = (
        {"project": settings["wandb_project"], "config": config} if settings["wandb"] else None
    )
    reporter = Reporter(
        workdir,
        every=settings["log_every"],
        wandb=tracking,
        writes=distributed.is_writer(),
        alarms=getattr(job.parts.recipe, "alarms", None),
    )
    select = settings["select"]
    limit = 0 if select else settings["evaluate_limit"]

    def validate(step, state):
        found = job.validator.quick(state.evaluated, limit=limit)
        if job.selection:
            job.selection.offer(step, state, found, config)
        return scalars(found)

    state = loop.fit(
        job.state,
        job.step_fn,
        job.batches,
        recipe=job.parts.recipe,
        mesh=job.parts.mesh,
        steps=settings["steps"],
        reporter=reporter,
        checkpointer=job.checkpointer,
        checkpoint_every=settings["checkpoint_every"],
        config=config,
        evaluate=validate,
        evaluate_every=settings["evaluate_every"],
        refresh=job.refresh,
        refresh_every=settings["refresh_every"],
        stop=stop,
    )
    job.checkpointer.close()
    if job.selection:
        validate(settings["steps"], state)
        job.selection.close()
    return state


def _finish(job, state, workdir, began) -> dict:
    """Evaluate in full and export; all processes compute, process 0 writes."""
    trained = weights.Trained(state.evaluated, int(state.step))
    if job.selection:
        trained = weights.read(workdir, job.untrained)
        trained = trained._replace(variables=assemble.place(trained.variables, job.parts))
    # What a method knows of its training corpus is not the model's, and nothing to be published.
    variables = {kind: trained.variables[kind] for kind in job.untrained}
    trained = trained._replace(variables=distributed.fetch(variables))
    results = controls.full(job.evaluator, variables, job.untrained)
    if distributed.is_writer():
        # before the pictures, should one fail
        measured = Written(results, job.evaluator.provenance(trained.variables))
        write_results(results, workdir, measured.provenance)
    cases.show(job.evaluator, variables, workdir)
    if distributed.is_writer():
        plots.curves(workdir / "metrics.jsonl", workdir / "curves.png")
        settings = job.parts.config["train"]
        if settings["export"]:
            export.export(job.parts, trained, workdir / "export", job.sources, measured)
        _print_summary(results, job.parts, workdir, settings, time.time() - began)
    distributed.barrier("finished")
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
    checks.settings(config)
    blueprint = plan.blueprint(config, emulated)
    checks.batch(config, blueprint)
    return plan.table(blueprint, plan.make(blueprint))


def _write_config(config, workdir):
    if distributed.is_writer():
        with replaced(workdir / assemble.CONFIG) as scratch:
            scratch.write_text(configs.to_json(config))


def _named(corpus: str) -> str:
    """Name a corpus; a config's own is drawn, and whoever forgot to set another must see it."""
    return f"{corpus} (generated)" if corpus.startswith(GENERATED) else corpus


def _print_summary(results, parts, workdir, settings, seconds):
    print(f"\n{results_table(results, per_class=False)}\n")
    generated = [c for c in parts.config["data"]["corpora"] if c.startswith(GENERATED)]
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
    path = pathlib.Path(file.partition(":")[0])
    if not path.is_file():
        raise UserError(f"No config file '{path}'. {_known_configs()}")
    if path.suffix != ".py" or "get_config" not in path.read_text():
        raise UserError(f"{path} is no config, which has a get_config(variant). {_known_configs()}")
    configs.check_overrides(argv, _parse([f"--config={file}"])[0].config)
    parsed, rest = _parse(argv)
    if rest:
        raise UserError(f"What is '{rest[0]}'? Settings are given as --config.section.key=value.")
    stem = file.rsplit("/", 1)[-1].replace(".py:", "-").removesuffix(".py")
    folder = parsed.workdir or f"runs/{stem}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    return parsed.config.to_dict(), pathlib.Path(folder).absolute()


def _config_files() -> list[pathlib.Path]:
    """Return the configs of the checkout one stands in."""
    files = sorted(pathlib.Path("configs").glob("[!_]*.py"))
    return [file for file in files if "def get_config" in file.read_text()]


def _known_configs() -> str:
    found = ", ".join(map(str, _config_files()))
    return f"Known: {found}." if found else "There are none here: stand in the checkout."


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
    before, sys.argv = sys.argv, ["train", *map(configs.as_key, argv)]
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
        for file in _config_files():
            print(f"  {file}: {file.read_text().split(chr(34) * 3)[1].splitlines()[0]}")
        return
    flags.FLAGS.mark_as_parsed()  # Grain reads absl's own flags
    logging.set_verbosity(logging.WARNING)
    config, workdir = resolve(argv)
    asked = _parse(argv)[0]
    if asked.plan:
        print(plan_of(config, asked.devices))
        return
    if asked.devices is not None:
        raise UserError("--devices goes with --plan; a run takes the devices it finds.")
    distributed.initialize()
    with Signals() as stop:
        try:
            run(config, workdir, stop)
        except UserError:
            raise
        except Exception as error:
            # Where no state is to be saved, each process leaves by itself; a collective operation
            # that then fails in another, which was asked as well, is part of stopping.
            if stop.asked and jax.process_count() > 1:
                raise Stopped from error
            raise


if __name__ == "__main__":
    cli.leave(cli.run(main))
