"""Prepare and check corpora: `medvlp data list | prepare NAME | check NAME | leakage A B`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from medvlp_jax.config import UserError
from medvlp_jax.data import building, checking, corpora, leakage
from medvlp_jax.writing import replaced


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb.

    Raises:
      UserError: for bad input.
    """
    options = _parser().parse_args(argv)
    if options.run in (_prepare, _check) and ":" in options.name:
        options.name, _, variant = options.name.partition(":")
        if options.builder_config not in ("", variant):
            raise UserError(
                f"Got the variants '{variant}' and '{options.builder_config}'; one is accepted."
            )
        options.builder_config = variant
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
    was_there = _is_prepared(options)
    folder = corpora.prepare(
        options.name,
        data_dir=options.data_dir,
        manual_dir=options.manual_dir,
        builder_config=options.builder_config,
        beam_runner=options.beam_runner,
        beam_options=[flag for flag in options.beam_options.split(",") if flag],
    )
    corpus = corpora.builder(
        options.name, data_dir=options.data_dir, builder_config=options.builder_config
    )
    counts = [f"{split} {info.num_examples:,}" for split, info in corpus.info.splits.items()]
    if was_there:
        print("Prepared before, so nothing was written: delete the folder to prepare it anew.")
    print(f"{options.name} is in {folder}: {', '.join(counts)} records.")
    for reason, count in corpus.info.metadata.get("left_out", {}).items():
        print(f"left out: {count:,} rows: {reason}")
    for line in building.kept_lines(corpus.info.metadata.get("noted", {})):
        print(line)
    if torn := corpus.info.metadata.get("torn_patients", 0):
        print(building.torn_line(torn))


def _is_prepared(options: argparse.Namespace) -> bool:
    """Say whether a corpus is there already, from the source folder that is named, if one is.

    Raises:
      UserError: for a source folder that is missing, or one with other tables than the corpus was
        prepared from, as far as the corpus tells.
    """
    corpus = corpora.builder(
        options.name, data_dir=options.data_dir, builder_config=options.builder_config
    )
    folder = Path(corpus.data_dir)
    if not corpora.is_written(folder):
        return False
    source = corpora.source_folder(corpus, options.manual_dir) if options.manual_dir else None
    # Only folders of the user's own tell; those prepared before they did, do not.
    known = corpus.info.metadata.get("source_digest")
    if source and known and corpus.digest_of(source) != known:
        raise UserError(
            f"{folder} was prepared from other tables than those in {source}: choose another "
            "--builder-config, or delete that folder to prepare it anew."
        )
    return True


def _check(options: argparse.Namespace) -> None:
    corpus, folder = corpora.with_source(
        options.name, manual_dir=options.manual_dir, builder_config=options.builder_config
    )
    if isinstance(corpus, building.Builder):
        return _look_through(corpus, folder, options)
    if options.write_skip_list:
        raise UserError(
            f"--write-skip-list={options.write_skip_list}, but {options.name} has no skip list: "
            "its check stops at the first defect."
        )
    splits = corpora.check(
        options.name, manual_dir=options.manual_dir, builder_config=options.builder_config
    )
    for split, counts in splits.items():
        print(f"{split}: " + ", ".join(f"{count:,} {what}" for what, count in counts.items()))
    if options.json:
        with replaced(options.json) as scratch:
            scratch.write_text(json.dumps({"splits": splits}, indent=1))


def _look_through(corpus: building.Builder, folder: Path, options: argparse.Namespace) -> None:
    """Print what a source folder of a published corpus holds.

    Raises:
      UserError: where images cannot be used, after naming them.
    """
    found = checking.inspect(corpus, folder, decode=options.decode)
    print("\n".join(found.lines()))
    if options.json:
        with replaced(options.json) as scratch:
            scratch.write_text(checking.as_json(found))
    if not found.problems:
        return
    where = options.write_skip_list
    if where:
        entries = [(p.image_id, p.what.partition(" (")[0]) for p in found.problems]
        building.write_skip_list(Path(where), entries)
    raise UserError(
        f"{len(found.problems):,} images of {folder} cannot be used. Get them again, or leave them "
        f"out by name: put a list with image_id and reason at {folder / building.SKIP_LIST}"
        + (f" ({where} is one)." if where else " (--write-skip-list FILE writes one).")
    )


def _leakage(options: argparse.Namespace) -> None:
    said = leakage.warning([options.trained], options.tested)
    print(said or f"{options.trained} and {options.tested} have no known origin in common.")
    first, second = (_prepared(name, options) for name in (options.trained, options.tested))
    lines = leakage.table(first, second, look=options.images)
    compared = leakage.comparable(options.trained, options.tested)
    what = "records" if compared else "texts and pictures" if options.images else "texts"
    print("\n".join(lines) or f"Their {what} share nothing.")
    if not compared:
        print(
            "Patients and names of images were not compared: equal ones of unrelated corpora are "
            "chance." + " --images compares the pictures." * (not options.images)
        )


def _prepared(name: str, options: argparse.Namespace) -> list[corpora.Source]:
    name, _, variant = name.partition(":")
    return corpora.open_all(name, data_dir=options.data_dir, builder_config=variant)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="medvlp data", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="list | prepare | check | leakage")
    listing = commands.add_parser("list", help="name the corpora")
    listing.set_defaults(run=_list)
    prepare = commands.add_parser("prepare", help="write a corpus as array_record files")
    prepare.set_defaults(run=_prepare)
    prepare.add_argument(
        "--beam-runner",
        default="",
        metavar="NAME",
        help="read the images on Apache Beam: DirectRunner, FlinkRunner, DataflowRunner ...",
    )
    prepare.add_argument(
        "--beam-options", default="", metavar="FLAGS", help="flags of the runner, with commas"
    )
    check = commands.add_parser(
        "check", help="read every row of a corpus and look at its images, write nothing"
    )
    check.set_defaults(run=_check)
    check.add_argument(
        "--decode",
        action="store_true",
        help="decode every image: hours, not minutes; small corpora always do",
    )
    check.add_argument("--json", default="", help="write everything found to this file")
    check.add_argument(
        "--write-skip-list", default="", metavar="FILE", help="write the unusable images to a list"
    )
    shared = commands.add_parser("leakage", help="count what two prepared corpora share")
    shared.set_defaults(run=_leakage)
    shared.add_argument("trained", help="NAME or NAME:VARIANT")
    shared.add_argument("tested", help="NAME or NAME:VARIANT")
    shared.add_argument("--images", action="store_true", help="compare the pictures, too")
    for command in (listing, prepare, shared):
        command.add_argument(
            "--data-dir",
            default="",
            help="prepared corpora (default: $MEDVLP_DATA_DIR or ~/.cache/medvlp_jax/data)",
        )
    for command in (prepare, check):
        command.add_argument("name", help="NAME or NAME:VARIANT, see `medvlp data list`")
        command.add_argument(
            "--manual-dir", default="", help="your files (default: $MEDVLP_TEST_DATA/NAME)"
        )
        command.add_argument("--builder-config", default="", help="a variant of the corpus")
    return parser


if __name__ == "__main__":
    from medvlp_jax import cli

    sys.exit(cli.run(main))
