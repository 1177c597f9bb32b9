"""Command line: `medvlp convert import HF_DIR_OR_ID OUT`, `medvlp convert export RUN OUT`."""

import argparse
import logging
import sys
import textwrap
from pathlib import Path

from medvlp_jax.config import UserError
from medvlp_jax.convert import architectures, beside, checkpoint, hub
from medvlp_jax.convert.files import check_own

DESCRIPTION = """\
Weights in from Hugging Face, and back out.

  import   reads a checkpoint into this project's encoders, checks every tensor, and writes it
           again as a clean folder: config.json, model.safetensors, tokenizer files.
  export   writes the encoders of a run as folders that transformers loads.
"""

KNOWN = textwrap.fill("Architectures: " + ", ".join(architectures.model_types()) + ".", 100)

IMPORT = f"""\
Read config.json and safetensors, check that every tensor is used or is a head known by name, and
write a folder that both medvlp_jax.convert.load and transformers.AutoModel.from_pretrained read.
{KNOWN}
Of a model of two encoders, such as CLIPModel, --tower says which. Pickles (pytorch_model.bin) are
never read.

  medvlp convert import emilyalsentzer/Bio_ClinicalBERT weights/bioclinicalbert
  medvlp convert import ~/downloads/resnet-50 weights/resnet50
  medvlp convert import openai/clip-vit-base-patch32 weights/clip-text --tower text
"""


EXPORT = """\
Write the newest checkpoint of a run, or, where train.select selected a step, the state of that step
(`medvlp evaluate --run` reads the same): OUT/image and OUT/text for transformers,
OUT/projections.safetensors with everything else, OUT/dual with all of it where the heads allow, and
a model card with PyTorch code, data, config and, if RUN/results.json is of these very weights, the
results.

  medvlp convert export runs/imitate-demo-20260101-120000 weights/demo
"""


def parser() -> argparse.ArgumentParser:
    """Build the parser; each verb sets `run`, a function of the parsed arguments."""
    top = argparse.ArgumentParser("medvlp convert", description=DESCRIPTION, formatter_class=_RAW)
    verbs = top.add_subparsers(required=True, metavar="VERB")
    verb = verbs.add_parser(
        "import", help="Hugging Face -> a checked folder", description=IMPORT, formatter_class=_RAW
    )
    verb.add_argument("source", metavar="HF_DIR_OR_ID", help="a folder, or an id on the hub")
    verb.add_argument("out", metavar="OUT", type=Path, help="a folder that is new or empty")
    verb.add_argument(
        "--drop",
        metavar="NAME",
        nargs="+",
        default=[],
        help="tensors to leave out besides the heads known by name",
    )
    verb.add_argument(
        "--ignore",
        metavar="KEY",
        nargs="+",
        default=[],
        help="settings of config.json that are not known here and change nothing",
    )
    verb.add_argument(
        "--tower",
        choices=tuple(checkpoint.TOWERS),
        default="",
        help="which encoder of a model that has two",
    )
    verb.set_defaults(run=import_)
    verb = verbs.add_parser(
        "export", help="a run -> Hugging Face", description=EXPORT, formatter_class=_RAW
    )
    verb.add_argument("run_folder", metavar="RUN", type=Path, help="a run folder")
    verb.add_argument("out", metavar="OUT", type=Path, help="a folder that is new or empty")
    verb.set_defaults(run=export_)
    return top


_RAW = argparse.RawDescriptionHelpFormatter


def import_(arguments: argparse.Namespace) -> None:
    """Read, check and write one checkpoint.

    Raises:
      UserError: if OUT holds files already, the checkpoint does not fit, or a file to be copied is
        a link out of the folder.
    """
    _refuse_full(arguments.out)
    folder = hub.fetch(arguments.source)
    for name in (beside.PREPROCESSOR, beside.PROCESSOR, *beside.TOKENIZER_FILES):
        check_own(folder / name)
    _, preprocessor = beside.read_preprocessor(folder)
    module, variables = checkpoint.load(
        folder, tower=arguments.tower, drop=arguments.drop, ignore=arguments.ignore
    )
    has_tokenizer = any((folder / name).is_file() for name in beside.TOKENIZER_FILES)
    checkpoint.save(
        module,
        variables,
        arguments.out,
        tokenizer=folder if has_tokenizer else None,
        preprocessor=preprocessor,
    )
    print(f"{type(module).__name__} in {arguments.out}")


def export_(arguments: argparse.Namespace) -> None:
    """Write the encoders of a run.

    Raises:
      UserError: if OUT holds files already, or the folder holds no run.
    """
    from medvlp_jax import assemble, export, weights
    from medvlp_jax.evaluation import results

    _refuse_full(arguments.out)
    parts = assemble.parts(assemble.read_config(arguments.run_folder), pretrained=False)
    trained = weights.read(arguments.run_folder, assemble.initial_variables(parts))
    evaluated = (arguments.run_folder / results.FILE).is_file()
    measured = results.read(arguments.run_folder) if evaluated else None
    data = parts.config["data"]
    sources = assemble.open_corpora(data, data["split"])
    export.export(parts, trained, arguments.out, sources, measured)
    print(f"{type(parts.recipe).__name__} of step {trained.step} in {arguments.out}")


def _refuse_full(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; name a new folder.")


def main(argv: list[str] | None = None) -> None:
    """Run one verb.

    Raises:
      UserError: for bad input.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("medvlp_jax").setLevel(logging.INFO)  # of Orbax only what went wrong
    arguments = parser().parse_args(argv)
    arguments.run(arguments)


if __name__ == "__main__":
    from medvlp_jax import cli

    sys.exit(cli.run(main))
