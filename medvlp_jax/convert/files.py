"""Folders of safetensors: read a part of a tensor at a time, write a shard at a time.

Neither direction holds more of a model in host memory than it is working on, so that models larger
than a host go in and out. Only safetensors files are read: a pickle can run code.
"""

import json
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from medvlp_jax.config import UserError
from medvlp_jax.reading import parse_json
from medvlp_jax.writing import replaced

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = "model-{:05d}-of-{:05d}.safetensors"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
GENERATION = "generation_config.json"
PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
MAX_SHARD_SIZE = 5 * 10**9  # bytes, the size hub repositories use
_COMMIT = re.compile("[0-9a-f]{40}")


class Stored(NamedTuple):
    """A tensor in a file; indexing it with slices reads that part of it, as of an array."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it: "F32", "BF16", "I64"

    def __getitem__(self, index):
        """Read tensor[index], where index is () or one slice an axis."""
        with safe_open(self.file, "numpy") as opened:
            if index == ():
                return opened.get_tensor(self.name)
            if 0 in self.shape:  # safetensors has no slice of nothing
                return opened.get_tensor(self.name)[index]
            return opened.get_slice(self.name)[index]


class Pending(NamedTuple):
    """A tensor that is made when it is written."""

    shape: tuple[int, ...]
    dtype: Any
    make: Callable[[], np.ndarray]

    @classmethod
    def of(cls, array: np.ndarray) -> "Pending":
        """Wrap an array that is there already."""
        return cls(array.shape, array.dtype, lambda: array)

    @property
    def size(self) -> int:
        """In bytes."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


def read_file(file: Path) -> dict[str, Stored]:
    """Return every tensor of one file, none of them read yet.

    Raises:
      UserError: if it is cut short, or no safetensors file.
    """
    try:
        with safe_open(file, "numpy") as opened:
            parts = {
                name: opened.get_slice(name)
                for name in opened.keys()  # noqa: SIM118 - not a mapping
            }
            return {
                name: Stored(file, name, tuple(part.get_shape()), part.get_dtype())
                for name, part in parts.items()
            }
    except SafetensorError as error:
        raise UserError(
            f"{file} ({file.stat().st_size} bytes) is cut short or no safetensors file: {error}."
        ) from error


def read_folder(folder: Path) -> dict[str, Stored]:
    """Return every tensor of model.safetensors, or of every shard its index names.

    Raises:
      UserError: if there is neither, or a file is absent, broken or lacks a tensor.
    """
    if (folder / SINGLE).is_file():
        return read_file(folder / SINGLE)
    if (folder / INDEX).is_file():
        return _read_shards(folder)
    there = [name for name in PICKLES if (folder / name).is_file()]
    hub_id = _hub_id(folder)
    if there or hub_id:
        # Of a model on the hub the pickle was not downloaded, so it is not known to be there.
        held = f"holds {there[0]}" if there else f"is of {hub_id}, perhaps with {PICKLES[0]},"
        raise UserError(
            f"{folder} {held} but no {SINGLE}, and a pickle is never read; convert it once where "
            f"PyTorch is installed: {_conversion(folder, hub_id or str(folder))}"
        )
    raise UserError(f"{folder} holds neither {SINGLE} nor {INDEX}.")


def _conversion(folder, source):
    """Return a shell command that writes a model, with every head it has, and what lies beside it.

    Files are copied where they can be: `transformers` writes a cased BERT tokenizer that says
    nothing of case as one that lower-cases.
    """
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    named = config.get("architectures")
    kind = str(named[0]) if isinstance(named, list) and named else ""
    # A file may say anything, and this is to be pasted into a shell.
    kinds = [kind if kind.isidentifier() else "AutoModel"]
    there = lambda names: [name for name in names if (folder / name).is_file()]
    copied, tokenizer = there((PREPROCESSOR, PROCESSOR)), there(TOKENIZER_FILES)
    if {"tokenizer.json", "vocab.txt"} & {*tokenizer}:
        copied += tokenizer
    elif tokenizer:
        kinds.append("AutoTokenizer")
    source = json.dumps(source)  # in double quotes, for the shell's are single ones
    steps = (f't.{kind}.from_pretrained({source}).save_pretrained("NEW")' for kind in kinds)
    command = f"python -c {shlex.quote('; '.join(('import transformers as t', *steps)))}"
    paths = " ".join(shlex.quote(str(folder / name)) for name in copied)
    return f"{command} && cp {paths} NEW" if copied else command


def _hub_id(folder: Path) -> str:
    """Return OWNER/NAME of a snapshot in a Hugging Face cache, else ""."""
    model = folder.parent.parent.name
    is_snapshot = folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name)
    if not (is_snapshot and model.startswith("models--")):
        return ""
    return model.removeprefix("models--").replace("--", "/")


def _read_shards(folder):
    where = read_json(folder / INDEX).get("weight_map", {})
    whole = isinstance(where, dict) and all(isinstance(shard, str) for shard in where.values())
    if not whole:
        raise UserError(
            f"{folder / INDEX} has a weight_map of {str(where)[:60]}; an object is needed that "
            "names the file of each tensor."
        )
    tensors = {}
    for shard in sorted(set(where.values())):
        if not _is_bare(shard):
            raise UserError(
                f"{folder / INDEX} names the file {shard!r}; accepted are names without a folder, "
                "of files beside it."
            )
        if not (folder / shard).is_file():
            raise UserError(f"{folder} lacks {shard}, which {INDEX} names.")
        tensors |= read_file(folder / shard)
    if absent := sorted(set(where) - set(tensors)):
        raise UserError(f"{folder}: {INDEX} names tensors no shard holds: {', '.join(absent)}.")
    return tensors


def _is_bare(name: str) -> bool:
    """Say whether a name that a file gives is of one in its own folder, on any system."""
    return name not in ("", ".", "..") and not set(name) & set("/\\\0")


def check_own(file: Path) -> None:
    """Refuse a link that leaves its folder: in a cloned repository it can name any file of yours.

    Those of a Hugging Face cache may, whose snapshots/COMMIT holds links into the blobs beside.

    Args:
      file: need not exist.

    Raises:
      UserError: naming the link and where it leads.
    """
    folder, target = file.parent.resolve(), file.resolve()
    places = [folder]
    for snapshot in (folder, *folder.parents):
        if snapshot.parent.name == "snapshots" and _COMMIT.fullmatch(snapshot.name):
            places.append(snapshot.parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in places):
        raise UserError(
            f"{file} is a link to {target}, outside its folder, and is not copied; put the file "
            "itself there."
        )


def write_folder(
    folder: Path, tensors: Mapping[str, Pending], max_shard_size: int = MAX_SHARD_SIZE
) -> None:
    """Write model.safetensors, or shards and their index where one file would be too large.

    A shard is made and written before the next one is made. Of several processes all must call
    this, for each makes its part of the tensors; the first one writes.

    Args:
      folder: must exist; weights of an earlier export in it are replaced.
      tensors: in the order they are written.
      max_shard_size: bytes in a file; a larger tensor has one of its own.
    """
    shards = _shards(tensors, max_shard_size)
    name_of = lambda i: SHARD.format(i, len(shards)) if len(shards) > 1 else SINGLE
    files = {name_of(i): shard for i, shard in enumerate(shards, 1)}
    is_writer = jax.process_index() == 0
    for file, names in files.items():
        made = {name: tensors[name].make() for name in names}
        if is_writer:
            write_tensors(folder / file, made)
        del made  # before the next file's
    if not is_writer:
        return
    if len(shards) > 1:
        size = sum(tensor.size for tensor in tensors.values())
        where = {name: file for file, names in files.items() for name in names}
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": where})
    for other in [*folder.glob("model*.safetensors"), folder / INDEX]:
        if other.name not in files and (other.name != INDEX or len(shards) == 1):
            other.unlink(missing_ok=True)


def _shards(tensors, max_shard_size) -> list[list[str]]:
    """Deal names to files in order, a new one wherever the next tensor would not fit."""
    shards, room = [[]], max_shard_size
    for name, tensor in tensors.items():
        if tensor.size > room and shards[-1]:
            shards.append([])
            room = max_shard_size
        shards[-1].append(name)
        room -= tensor.size
    return shards


def write_tensors(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file, whole or not at all."""
    # safetensors writes a buffer as it lies in memory: a transposed view would come out scrambled.
    # (`ascontiguousarray` would turn a scalar into an array of one.)
    contiguous = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    with replaced(file) as scratch:
        save_file(contiguous, scratch, metadata={"format": "pt"})


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
      UserError: if it is cut short or holds something else.
    """
    try:
        content = parse_json(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is cut short or no JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__} where a JSON object is needed.")
    return content


def write_json(file: Path, content: Any) -> None:
    """Write indented JSON with sorted keys, whole or not at all."""
    with replaced(file) as scratch:
        scratch.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
