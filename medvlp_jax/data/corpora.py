"""Corpora by name: prepare them once as array_record files, then open them for random access.

TFDS writes into a folder of another name and renames it when the last record is written, so that an
interrupted preparation never passes for a corpus. No TensorFlow, no network.
"""

import collections
import contextlib
import dataclasses
import fcntl
import functools
import importlib
import io
import os
import pkgutil
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import absl.logging
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource

from medvlp_jax import writing
from medvlp_jax.config import UserError, nearest
from medvlp_jax.data import beam, building, datasets, records

OWN_VARIANT = "default"  # of a folder of the user's own that has no other name


@dataclasses.dataclass(frozen=True)
class Source:
    """Random access to the records of one split, as `records.parse` returns them; thread-safe.

    Attributes:
      name: of the corpus.
      split: "train", "validation" or "test".
      metadata: what `records.metadata` stored: tasks, mask_bits, table, generated.
      folder: where the records lie.
      serialised: the records as they are stored.
    """

    name: str
    split: str
    metadata: Mapping[str, Any]
    folder: Path
    serialised: Any = dataclasses.field(repr=False)

    @property
    def tasks(self) -> Mapping[str, list[str]]:
        """Class names of every label task, in the order of the label vector."""
        return self.metadata["tasks"]

    @property
    def images(self) -> records.Images:
        """The further images of a case, and what each is; see `records`."""
        return self.metadata.get("images", {})

    def __len__(self) -> int:
        return len(self.serialised)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return records.parse(self.serialised[int(index)], self.metadata)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def texts(self) -> list[tuple[str, str]]:
        """Return (findings, impression) of every record in order; read once, no image decoded."""
        return self._texts

    def labels(self, task: str) -> np.ndarray:
        """Return the labels [N, C] of every record in order; no image is decoded.

        Raises:
          UserError: for a task the corpus does not have.
        """
        if task not in self.tasks:
            raise UserError(f"{self.name} has no task '{task}'. {nearest(task, list(self.tasks))}")
        return np.stack([self[i]["labels"][task] for i in range(len(self))])

    def tables(self) -> list[dict[str, float]]:
        """Return the table values of every record in order; read once, no image decoded."""
        return self._tables

    @functools.cached_property
    def _tables(self) -> list[dict[str, float]]:
        return [self[i]["table"] for i in range(len(self))]

    @functools.cached_property
    def _texts(self) -> list[tuple[str, str]]:
        entries = (self[i] for i in range(len(self)))
        return [(entry["findings"], entry["impression"]) for entry in entries]


def names() -> list[str]:
    """Return the names of all corpora."""
    return sorted(module.name for module in pkgutil.iter_modules(datasets.__path__) if module.ispkg)


def default_variant(name: str) -> str:
    """Return the variant that the name of a corpus alone means; "" where there are no variants."""
    if name not in names():
        return ""
    module = _module(name)
    if getattr(module.Builder, "SELF_DESCRIBED", False):
        return OWN_VARIANT
    configs = module.Builder.BUILDER_CONFIGS
    return configs[0].name if configs else ""


def default_data_dir() -> Path:
    """Return `$MEDVLP_DATA_DIR`, or a folder in the user's cache."""
    return Path(os.environ.get("MEDVLP_DATA_DIR") or "~/.cache/medvlp_jax/data").expanduser()


def derived_dir(data_dir: str | Path = "") -> Path:
    """Return where files made from prepared corpora lie, such as cached features."""
    return Path(data_dir or default_data_dir()).expanduser() / "derived"


def default_manual_dir(name: str) -> Path | None:
    """Return `$MEDVLP_TEST_DATA/<name>` where that folder exists."""
    root = os.environ.get("MEDVLP_TEST_DATA")
    folder = Path(root, name) if root else None
    return folder if folder and folder.is_dir() else None


def builder(
    name: str, *, data_dir: str | Path = "", builder_config: str = "", source: Path | None = None
):
    """Return the TFDS builder of a corpus.

    Args:
      name: one of `names()`.
      data_dir: where prepared corpora lie; "" for `default_data_dir()`.
      builder_config: a variant of the corpus; "" for its first.
      source: the source's own files, for a builder that reads there what its records hold
        (`SELF_DESCRIBED`, whose variants are names the user gives); None opens what is prepared.

    Raises:
      UserError: for an unknown name or variant.
    """
    if name not in names():
        raise UserError(f"No corpus '{name}'. {nearest(name, names())}")
    module = _module(name)
    root = Path(data_dir or default_data_dir()).expanduser()
    if getattr(module.Builder, "SELF_DESCRIBED", False):
        building.check_own_name(builder_config or OWN_VARIANT)
        variant = tfds.core.BuilderConfig(name=builder_config or OWN_VARIANT)
        with _quiet():
            return module.Builder(
                data_dir=root, config=variant, file_format="array_record", source=source
            )
    known = [config.name for config in module.Builder.BUILDER_CONFIGS]
    if getattr(module.Builder, "RESIZABLE", False):
        return _resizable(module.Builder, root, builder_config)
    config = builder_config or None
    if config and config not in known and hasattr(module, "config_named"):
        config = module.config_named(config)
    elif config and config not in known:
        raise UserError(
            f"{name} has no builder config '{builder_config}'. {nearest(builder_config, known)}"
            if known
            else f"{name} has no builder configs, so '{builder_config}' cannot be one of them."
        )
    with _quiet():
        return module.Builder(
            data_dir=root,
            config=config,
            file_format="array_record",
        )


def _module(name: str):
    return importlib.import_module(f"{datasets.__name__}.{name}.{name}_dataset_builder")


def _resizable(builder_class, root: Path, name: str):
    """Return a builder of a variant, or of "<variant>-<side>", its images pre-resized."""
    known = [config.name for config in builder_class.BUILDER_CONFIGS]
    variant, side = building.split_size(name or known[0])
    if variant not in known:
        raise UserError(
            f"{builder_class.name} has no builder config '{name}'. {nearest(variant, known)} A "
            "size may follow: " + f"{known[0]}-512."
        )
    config = variant
    if side:
        text = builder_class.VARIANTS[variant]
        config = tfds.core.BuilderConfig(name=f"{variant}-{side}", description=text)
    with _quiet():
        return builder_class(data_dir=root, config=config, file_format="array_record")


def prepare(
    name: str,
    *,
    data_dir: str | Path = "",
    manual_dir: str | Path = "",
    builder_config: str = "",
    beam_runner: str = "",
    beam_options: Sequence[str] = (),
) -> Path:
    """Write a corpus as array_record files where it is not there yet; return its folder.

    Args:
      name: one of `names()`.
      data_dir: where to write; "" for `default_data_dir()`.
      manual_dir: the source's own files; "" for `$MEDVLP_TEST_DATA/<name>`. A generated corpus
        needs none.
      builder_config: a variant of the corpus; "" for its first.
      beam_runner: a runner of Apache Beam, see `beam`; "" for the threads of this process.
      beam_options: its flags.

    Raises:
      UserError: for a missing source folder or a defect in it; nothing is left behind.
    """
    corpus = builder(name, data_dir=data_dir, builder_config=builder_config)
    folder = Path(corpus.data_dir)
    if is_written(folder):
        return folder
    source = source_folder(corpus, manual_dir)
    corpus = builder(name, data_dir=data_dir, builder_config=builder_config, source=source)
    options = {"manual_dir": source, "try_download_gcs": False}
    if beam_runner:
        # A worker makes its builder anew, without the source folder that would describe it.
        is_described = getattr(corpus, "SELF_DESCRIBED", False)
        if is_described or not isinstance(corpus, building.Builder):
            raise UserError(f"The builder of {name} does not run on Beam: leave out --beam-runner.")
        corpus.on_beam = True
        config = beam.download_config(beam_runner, beam_options, **options)
    else:
        config = tfds.download.DownloadConfig(**options)
    with _locked(folder):
        if folder.is_dir() and not is_written(folder):
            raise _damaged(name, folder, "its description is missing")
        if not is_written(folder):
            _write(corpus, config)
    return folder


def with_source(name: str, *, manual_dir: str | Path = "", builder_config: str = ""):
    """Return a builder that looks at no prepared corpus, and the folder with the source's files.

    Raises:
      UserError: for an unknown name or variant, or a missing source folder.
    """
    with tempfile.TemporaryDirectory() as nowhere:
        corpus = builder(name, data_dir=nowhere, builder_config=builder_config)
        source = source_folder(corpus, manual_dir, writes=False)
        corpus = builder(name, data_dir=nowhere, builder_config=builder_config, source=source)
    return corpus, source


def check(name: str, *, manual_dir: str | Path = "", builder_config: str = "") -> dict[str, Any]:
    """Read a corpus from its source without writing it.

    Returns:
      per split the number of records, of those with findings and with impression, of boxes, and of
      different texts.

    Raises:
      UserError: for the first defect, with file and row.
    """
    corpus, source = with_source(name, manual_dir=manual_dir, builder_config=builder_config)
    with tempfile.TemporaryDirectory() as scratch:
        manager = tfds.download.DownloadManager(
            download_dir=scratch,
            manual_dir=source,
            manual_dir_instructions=corpus.MANUAL_DOWNLOAD_INSTRUCTIONS or "none needed",
        )
        generators = corpus._split_generators(manager)
        return {split: _count(examples) for split, examples in generators.items()}


def open_all(name: str, **where: str | Path) -> list[Source]:
    """Open every split of a corpus; `where` as in `open_source`."""
    prepare(name, **where)
    splits = builder(name, **{k: v for k, v in where.items() if k != "manual_dir"}).info.splits
    return [open_source(name, split, **where) for split in splits]


def open_source(
    name: str,
    split: str,
    *,
    data_dir: str | Path = "",
    manual_dir: str | Path = "",
    builder_config: str = "",
) -> Source:
    """Open one split of a corpus; prepare the corpus first where that needs nothing from the user.

    Args:
      name: one of `names()`.
      split: "train", "validation" or "test".
      data_dir: where prepared corpora lie; "" for `default_data_dir()`.
      manual_dir: the source's own files, see `prepare`.
      builder_config: a variant of the corpus; "" for its first.

    Raises:
      UserError: for an unknown name, split or variant, a corpus that has to be prepared by hand
        first, or one whose files are damaged.
    """
    folder = prepare(name, data_dir=data_dir, manual_dir=manual_dir, builder_config=builder_config)
    corpus = builder(name, data_dir=data_dir, builder_config=builder_config)
    splits = corpus.info.splits
    if split not in splits:
        raise UserError(f"{name} has no split '{split}'. {nearest(split, list(splits))}")
    paths = [str(path) for path in splits[split].filepaths]
    count = splits[split].num_examples
    serialised = _open_shards(paths, count)
    if serialised is None:
        raise _damaged(name, folder, f"not all {count} records of {split} can be read")
    return Source(name, split, corpus.info.metadata, folder, serialised)


def _write(corpus, options: tfds.download.DownloadConfig) -> None:
    """Write a corpus; the caller holds its lock, so what a killed run left over can go."""
    folder = Path(corpus.data_dir)
    for leftover in folder.parent.glob(f"incomplete.*_{folder.name}"):
        shutil.rmtree(leftover)
    print(f"Preparing {corpus.name} in {folder} ...", file=sys.stderr, flush=True)
    # TFDS wants a download folder even where nothing is downloaded.
    with _quiet(), tempfile.TemporaryDirectory() as scratch:
        corpus.download_and_prepare(download_dir=scratch, download_config=options)


def _damaged(name: str, folder: Path, defect: str) -> UserError:
    return UserError(
        f"{folder} is damaged: {defect}; delete that folder and run `medvlp data prepare {name}` "
        "again."
    )


def _open_shards(paths: list[str], count: int) -> ArrayRecordDataSource | None:
    """Return the files as one sequence; None where they do not hold `count` records."""
    if not all(Path(path).is_file() for path in paths):
        return None
    try:
        serialised = ArrayRecordDataSource(paths)
        return serialised if len(serialised) == count else None
    except (RuntimeError, ValueError, OSError):
        return None


def is_written(folder: Path) -> bool:
    """Say whether a corpus is in its folder."""
    return (folder / "dataset_info.json").is_file() and (folder / "features.json").is_file()


def source_folder(corpus, manual_dir: str | Path, *, writes: bool = True) -> Path | None:
    """Return the folder with the source's own files; None for a generated corpus.

    Raises:
      UserError: for none, or one that is missing or empty; a corpus that is to be written says how.
    """
    if corpus.info.metadata["generated"]:
        return None
    name = corpus.name
    folder = Path(manual_dir).expanduser() if manual_dir else default_manual_dir(name)
    if folder is None:
        config = corpus.builder_config
        wanted = f"{name}:{config.name}" if config else name
        command = f"medvlp data prepare {wanted} --manual-dir DIR --data-dir {corpus.data_dir_root}"
        needs = f"{name} needs --manual-dir DIR,"
        if writes:
            needs = f"{name} is not prepared in {corpus.data_dir}; run `{command}`"
        raise UserError(f"{needs} where DIR is: {corpus.MANUAL_DOWNLOAD_INSTRUCTIONS}")
    if not folder.is_dir() or not any(folder.iterdir()):
        raise UserError(
            f"{folder} is missing or empty; {name} needs: {corpus.MANUAL_DOWNLOAD_INSTRUCTIONS}"
        )
    return folder


def _count(examples: Iterator) -> dict[str, int]:
    counts = collections.Counter()
    texts = set()
    for _, record in examples:
        texts.add(record["text_id"])
        counts["records"] += 1
        counts["findings"] += bool(record["findings"])
        counts["impression"] += bool(record["impression"])
        counts["boxes"] += len(record["boxes"])
    return {**counts, "texts": len(texts)}


@contextlib.contextmanager
def _locked(folder: Path):
    """Let one process on this machine prepare at a time; the others find the corpus written.

    Raises:
      UserError: where nothing can be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = (folder.parent / f".{folder.name}.lock").open("w")
    except OSError as error:
        raise writing.refusal(f"Cannot write to {folder.parent}: {error}.", error) from None
    with file as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _quiet():
    """Keep TFDS from reporting a corpus that is not there yet as a defect and a download."""
    level = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        absl.logging.set_verbosity(level)
