"""Evaluate a run: zero-shot, retrieval, grounding, linear probe, a classifier's own logits.

  medvlp evaluate --run RUN_DIR [--protocol zero_shot,retrieval,probe] [--corpus NAME]
                  [--controls untrained,shuffled_pairs]

Prints a table and writes RUN_DIR/results.json.
"""

import argparse
import pathlib

from medvlp_jax import assemble, cli, controls, distributed, ground, weights
from medvlp_jax.evaluation.results import results_table, write_results
from medvlp_jax.evaluator import PROTOCOLS, Evaluator, full


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    top = argparse.ArgumentParser(
        "medvlp evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--run", required=True, type=pathlib.Path, help="run folder")
    top.add_argument("--protocol", help=f"comma-separated, of {', '.join(PROTOCOLS)}")
    top.add_argument(
        "--controls", help=f"comma-separated, of {', '.join(controls.NAMES)}; none leaves them out"
    )
    top.add_argument("--corpus", help="another corpus than the run's: NAME or NAME:VARIANT")
    top.add_argument("--split", help="test, validation or train")
    top.add_argument("--prompts", help="a prompt file instead of the corpus' own")
    top.add_argument("--limit", type=int, help="only the first examples")
    top.add_argument("--views", type=int, help="flips and turns to average over: 1, 4, 8")
    top.add_argument("--out", type=pathlib.Path, help="where results.json goes; default: the run")
    return top


def main(argv: list[str] | None = None) -> None:
    """Evaluate the newest checkpoint of a run.

    Raises:
      UserError: for bad input.
    """
    arguments = parser().parse_args(argv)
    config = assemble.read_config(arguments.run)
    settings = dict(config["evals"])
    given = {k: getattr(arguments, k) for k in ("corpus", "split", "prompts", "limit", "views")}
    settings |= {k: v for k, v in given.items() if v is not None}
    if arguments.protocol:
        settings["protocols"] = tuple(arguments.protocol.split(","))
        # The run's controls of other protocols do not go with these.
        settings["controls"] = controls.fitting(settings["controls"], settings["protocols"])
    if arguments.controls is not None:
        asked = arguments.controls.split(",")
        settings["controls"] = () if asked == ["none"] else tuple(asked)
    # The untrained control starts where the run started: with the weights it was given.
    distributed.initialize()
    parts = assemble.parts(config, pretrained="untrained" in settings["controls"])
    evaluator = Evaluator(parts, settings)
    untrained = assemble.initial_variables(parts)
    variables = weights.read_variables(arguments.run, untrained)
    results = full(evaluator, variables, untrained)
    out = arguments.out or arguments.run
    if distributed.is_writer():
        out.mkdir(parents=True, exist_ok=True)
        write_results(results, out, evaluator.provenance(variables))
        print(results_table(results))
    if "grounding" in settings["protocols"]:
        evaluator.grounder.draw(assemble.place(variables, parts), out / ground.PICTURE)


if __name__ == "__main__":
    cli.leave(cli.run(main))
