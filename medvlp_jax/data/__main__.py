"""Prepare and check corpora: `medvlp data list | prepare NAME | check NAME`."""

import argparse
import sys
from collections.abc import Sequence

from medvlp_jax.data import corpora


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb.

    Raises:
      UserError: for bad input.
    """
    options = _parser().parse_args(argv)
    options.run(options)


def _list(options: argparse.Namespace) -> None:
    for name in corpora.names():
        corpus = corpora.builder(name, data_dir=options.data_dir)
        tasks = ", ".join(corpus.info.metadata["tasks"]) or "no labels"
        kind = "generated" if corpus.info.metadata["generated"] else "from your files"
        variants = ", ".join(config.name for config in corpus.BUILDER_CONFIGS)
        print(
            f"{name:16} {kind:16} tasks: {tasks}" + (f"; variants: {variants}" if variants else "")
        )


def _prepare(options: argparse.Namespace) -> None:
    folder = corpora.prepare(
        options.name,
        data_dir=options.data_dir,
        manual_dir=options.manual_dir,
        builder_config=options.builder_config,
    )
    corpus = corpora.builder(
        options.name, data_dir=options.data_dir, builder_config=options.builder_config
    )
    counts = [f"{split} {info.num_examples:,}" for split, info in corpus.info.splits.items()]
    print(f"{options.name} is in {folder}: {', '.join(counts)} records.")


def _check(options: argparse.Namespace) -> None:
    splits = corpora.check(
        options.name, manual_dir=options.manual_dir, builder_config=options.builder_config
    )
    for split, counts in splits.items():
        print(f"{split}: " + ", ".join(f"{count:,} {what}" for what, count in counts.items()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="medvlp data", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="list | prepare | check")
    listing = commands.add_parser("list", help="name the corpora")
    listing.set_defaults(run=_list)
    prepare = commands.add_parser("prepare", help="write a corpus as array_record files")
    prepare.set_defaults(run=_prepare)
    check = commands.add_parser("check", help="read every row and image of a corpus, write nothing")
    check.set_defaults(run=_check)
    for command in (listing, prepare):
        command.add_argument(
            "--data-dir",
            default="",
            help="prepared corpora (default: $MEDVLP_DATA_DIR or ~/.cache/medvlp_jax/data)",
        )
    for command in (prepare, check):
        command.add_argument("name", help="see `medvlp data list`")
        command.add_argument(
            "--manual-dir", default="", help="your files (default: $MEDVLP_TEST_DATA/NAME)"
        )
        command.add_argument("--builder-config", default="", help="a variant of the corpus")
    return parser


if __name__ == "__main__":
    from medvlp_jax import cli

    sys.exit(cli.run(main))
