"""Evaluate a run: zero-shot, retrieval, grounding, linear probe, a classifier's own logits.

  medvlp evaluate --run RUN_DIR [--protocol zero_shot,retrieval,probe] [--corpus NAME]
                   [--controls untrained,shuffled_pairs]
  medvlp evaluate --encoder CLIP_DIR [--text HF_DIR] --corpus NAME --out DIR [--prompts SET]
  medvlp evaluate --encoder VIT_DIR --protocol probe --corpus NAME --out DIR

A protocol may name a published flavour, zero_shot@gloria (docs/evaluation.md). Prints a table and
writes results.json, the scores of each case and pictures to the run folder, or to --out. They are
of one evaluation: with --protocol grounding alone a run folder loses its other numbers, which --out
keeps.
"""

import argparse
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from configs import common
from medvlp_jax import assemble, cases, cli, controls, distributed, outside, protocols, weights
from medvlp_jax import config as configs
from medvlp_jax.config import UserError, nearest
from medvlp_jax.evaluation import flavours, prompts
from medvlp_jax.evaluation.results import results_table, write_results
from medvlp_jax.evaluator import Evaluator

GIVEN = ("corpus", "split", "prompts", "limit", "views")


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    top = argparse.ArgumentParser(
        "medvlp evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = top.add_mutually_exclusive_group(required=True)
    model.add_argument("--run", type=pathlib.Path, help="run folder")
    model.add_argument("--encoder", help="Hugging Face folder or id: an image encoder, or a CLIP")
    top.add_argument("--text", default="", help="folder of the text encoder, if --encoder has none")
    known = ", ".join(flavours.names(protocols.NAMES))
    top.add_argument(
        "--protocol",
        help=f"comma-separated, of {known}; default: the run's, of --encoder zero_shot, retrieval "
        "where there are texts, and probe",
    )
    top.add_argument(
        "--controls", help=f"comma-separated, of {', '.join(controls.NAMES)}; none leaves them out"
    )
    top.add_argument("--corpus", help="another corpus than the run's: NAME or NAME:VARIANT")
    top.add_argument("--data-dir", help="where prepared corpora lie")
    top.add_argument("--manual-dir", help="where the corpus' own files lie")
    top.add_argument("--split", help="test, validation or train")
    top.add_argument("--prompts", help=f"a prompt file, or one of {', '.join(prompts.shipped())}")
    top.add_argument("--limit", type=int, help="only the first examples")
    top.add_argument("--views", type=int, help="flips and turns to average over: 1, 4, 8")
    top.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another setting of config.evals: zero_shot.draw=5, probe.fractions=0.01,0.1,1",
    )
    top.add_argument(
        "--out",
        type=pathlib.Path,
        help="where results.json and what goes with it are written; default: the run, whose own "
        "results are replaced as a whole",
    )
    return top


def main(argv: list[str] | None = None) -> None:
    """Evaluate the newest checkpoint of a run, or an encoder from elsewhere.

    Raises:
      UserError: for bad input.
    """
    arguments = parser().parse_args(argv)
    if arguments.out and arguments.out.exists() and not arguments.out.is_dir():
        raise UserError(f"--out={arguments.out} is a file; accepted is a folder, or a new name.")
    distributed.initialize()
    evaluator, variables, untrained = (_of_run if arguments.run else _of_encoder)(arguments)
    out = arguments.out or arguments.run
    cases.say_replaced(out)
    results = controls.full(evaluator, variables, untrained)
    if distributed.is_writer():
        out.mkdir(parents=True, exist_ok=True)
        cases.clear(out)  # first: should this end early, no case stands beside another's numbers
        config = assemble.written_config(arguments.run) if arguments.run else None
        write_results(results, out, evaluator.provenance(variables, config))
        print(results_table(results))
    cases.show(evaluator, variables, out)


def _of_run(arguments):
    """Return the evaluator of a run, its variables, and those it began with."""
    config = assemble.read_config(arguments.run)
    if arguments.text:
        raise UserError("--text goes with --encoder: a run has its own text encoder.")
    _place_data(config["data"], arguments)
    settings = settings_of(config["evals"], arguments)
    # The untrained control starts where the run started: with the weights it was given.
    parts = assemble.parts(config, pretrained="untrained" in settings["controls"])
    evaluator = Evaluator(parts, _possible(settings, arguments, parts))
    untrained = assemble.initial_variables(parts)
    return evaluator, weights.read_variables(arguments.run, untrained), untrained


def _of_encoder(arguments):
    """Return an evaluator of encoders from Hugging Face folders, and their variables."""
    missing = [f"--{name}" for name in ("corpus", "out") if not getattr(arguments, name)]
    if missing:
        raise UserError(
            f"--encoder needs {' and '.join(missing)}: there is no run to take it from."
        )
    if (arguments.out / assemble.CONFIG).exists():
        raise UserError(f"{arguments.out} is a run folder; name another for --out.")
    data = common.data(corpora=(arguments.corpus,)).to_dict()
    _place_data(data, arguments)
    evals = common.evals(controls=()).to_dict()
    settings = settings_of(evals, arguments)
    if "untrained" in settings["controls"]:
        raise UserError(
            "The control untrained goes with --run: of --encoder no start is known. `medvlp adapt "
            "--untrained` has random weights."
        )
    reads_text = any(
        flavours.split(name)[0] in ("zero_shot", "retrieval") for name in settings["protocols"]
    )
    parts, variables = outside.parts(arguments.encoder, arguments.text, data, with_text=reads_text)
    return Evaluator(parts, _possible(settings, arguments, parts)), variables, None


def _place_data(data: dict, arguments) -> None:
    for name in ("data_dir", "manual_dir"):
        data[name] = getattr(arguments, name) or data[name]


def settings_of(evals: Mapping[str, Any], arguments) -> dict[str, Any]:
    """Return config.evals with what the command line says instead.

    Raises:
      UserError: for a protocol, setting or value that does not exist.
    """
    settings = dict(evals)
    settings |= {k: getattr(arguments, k) for k in GIVEN if getattr(arguments, k) is not None}
    if arguments.protocol is not None:
        given = arguments.protocol.split(",")
        settings["protocols"] = flavours.normalise(given, protocols.NAMES)
        # The run's controls of other protocols do not go with these.
        settings["controls"] = controls.fitting(settings["controls"], settings["protocols"])
    if arguments.controls is not None:
        asked = arguments.controls.split(",")
        settings["controls"] = () if asked == ["none"] else tuple(asked)
    settings = assigned(settings, arguments.set)
    if not settings["protocols"]:
        raise UserError(f"evals.protocols is empty. {nearest('', protocols.NAMES)}")
    protocols.check_settings(settings)
    return settings


def _possible(settings: Mapping[str, Any], arguments, parts: assemble.Parts) -> Mapping[str, Any]:
    """Return the settings without retrieval where nobody asked for it and there are no texts."""
    is_left = lambda name: flavours.split(name)[0] != "retrieval"
    kept = tuple(filter(is_left, settings["protocols"]))
    spaces, data = parts.recipe.spaces, parts.config["data"]
    if arguments.protocol or kept in ((), settings["protocols"]) or not spaces:
        return settings
    corpus = settings["corpus"] or data["corpora"][0]
    source = assemble.open_corpus(corpus, data, settings["split"])
    lack = protocols.lack_of_texts(source, spaces, settings["limit"])
    if not lack:
        return settings
    distributed.say(f"medvlp: Protocol retrieval is left out: {lack}.")
    settings = {**settings, "protocols": kept}
    if arguments.controls is None:
        settings["controls"] = controls.fitting(settings["controls"], kept)
    return settings


def assigned(settings: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Return settings with each "a.b=value" put in place, of the type of what was there.

    Raises:
      UserError: for an unknown setting or a value of another type.
    """
    settings = {k: dict(v) if isinstance(v, Mapping) else v for k, v in settings.items()}
    known = dict(configs.flatten(settings))
    for assignment in assignments:
        key, is_given, text = assignment.partition("=")
        if not is_given or key not in known:
            raise UserError(
                f"--set {assignment}: no such setting. {configs.nearest(key, [*known])}"
            )
        section, _, leaf = key.rpartition(".")
        (settings[section] if section else settings)[leaf] = _value(text, known[key], assignment)
    return settings


def _value(text: str, default: Any, assignment: str) -> Any:
    """Read a value of the type of the default; a tuple is separated by commas."""
    if isinstance(default, str):
        return text
    if isinstance(default, tuple):
        one = default[0] if default else ""
        return tuple(_value(part, one, assignment) for part in text.split(",") if part)
    try:
        value = json.loads(text.lower())
    except json.JSONDecodeError:
        value = None
    kinds = (int, float) if isinstance(default, float) else (type(default),)
    if type(value) not in kinds:
        raise UserError(f"--set {assignment}: the value is not like {default}.")
    return type(default)(value)


if __name__ == "__main__":
    cli.leave(cli.run(main))
