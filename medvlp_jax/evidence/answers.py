"""Answers on disk: each different request is asked about once, and no answer is lost.

A cache is a file of one line an answer, appended as answers come; its first line says who was asked
in which words, and another backend or prompt is refused. A kill loses at most the answer being
written. Failures are not kept, so that the next start asks about them again. An answer is kept as
it came beside what was read from it, so that later starts can read it better.
"""

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from medvlp_jax.config import UserError
from medvlp_jax.evidence.protocol import Backend, Request
from medvlp_jax.writing import replaced

FAILED = "failed"
CHARACTERS_PER_TOKEN = 4.0
# Failures in a row that stop a start: before any answer, and later. The latter grows with what was
# answered, since a start that goes on meets the failures of earlier ones first.
FIRST, LATER, SHARE = 20, 200, 0.1
BEFORE = {"max_tokens": 1024}  # what a header that does not say was asked with
LOCK = ".lock"


class Estimate(NamedTuple):
    """Tokens that are still to be read and written."""

    prompt_tokens: int
    answer_tokens: int

    def cost(self, price_in: float, price_out: float) -> float:
        """Return the price, from prices per million tokens."""
        return (self.prompt_tokens * price_in + self.answer_tokens * price_out) / 1e6


def estimate(prompts: Iterable[int], backend: Backend, *, answer_tokens: int) -> Estimate:
    """Estimate the tokens of requests.

    Args:
      prompts: characters of each prompt.
      backend: one that computes its answers takes no tokens.
      answer_tokens: of one answer.
    """
    lengths = list(prompts) if backend.counts_tokens else []
    return Estimate(int(sum(lengths) / CHARACTERS_PER_TOKEN), answer_tokens * len(lengths))


def ask(
    requests: Iterable[Request],
    backend: Backend,
    cache: "Cache",
    *,
    check: Callable[[str], Any],
    read: Callable[[str, str], dict],
    total: int,
    unit: str,
) -> None:
    """Ask about everything; a record is on the disk before the next answer is taken.

    Args:
      requests: those the cache has no record of; taken one by one, as the backend is ready.
      backend: who answers.
      cache: open.
      check: raises ValueError for an answer that is not in the form asked for.
      read: (key of the request, answer) -> the record to keep; ValueError for an answer that is
        not about what was asked.
      total: number of requests.
      unit: what one request is, for the progress bar.

    Raises:
      UserError: where one failure follows another, or the backend gave up.
    """
    # On a file (a cluster log) a bar that redraws ten times a second is noise.
    interval = 0.1 if sys.stderr.isatty() else 30.0
    failures, in_a_row, answered = 0, 0, len(cache.records)
    with (
        contextlib.closing(_each(backend.complete(requests, check))) as replies,
        tqdm(total=total, unit=unit, mininterval=interval, dynamic_ncols=True) as bar,
    ):
        for reply in replies:
            error = reply.error
            if not error:
                try:
                    record = read(reply.key, reply.answer)
                    cache.add(reply.key, {**record, "answer": reply.answer})
                except ValueError as problem:
                    error = f"malformed answer: {problem}"
            if error:
                failures += 1
                bar.set_postfix(failed=failures, refresh=False)
                cache.fail(reply.key, error)
            bar.update(1)
            in_a_row = in_a_row + 1 if error else 0
            answered += not error
            if in_a_row >= (max(LATER, SHARE * answered) if answered else FIRST):
                raise UserError(
                    f"{in_a_row} requests in a row to {backend.name} failed, the last one with "
                    f"'{error}': see to that and start the same command again, which keeps what "
                    "was answered."
                )


def _each(replies: Iterable) -> Iterator:
    """Yield them, and close where they come from when this is closed: it may have threads."""
    yield from replies


def without_thoughts(answer: str) -> str:
    """Return an answer without what a model thinks aloud before it, finished or not."""
    return answer.rpartition("</think>")[2].partition("<think>")[0]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait until no other process changes the files of a folder, and let none while this does.

    Raises:
      UserError: where there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; `medvlp evidence corpus` writes one.")
    path = folder / LOCK
    if not path.exists():
        path.touch()
    # Where another user made it, reading is enough but on NFS.
    with path.open("ab" if os.access(path, os.W_OK) else "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Cache:
    """An open, locked cache file; `records` by key also holds the failures of this start."""

    def __init__(self, path: Path, header: Mapping[str, Any]):
        """Open or start a cache.

        Args:
          path: its folder has to exist.
          header: see `header_of`.

        Raises:
          UserError: where another process writes there, or the answers are to something else.
        """
        self.path = path
        path.touch(0o600)  # what answers quote is nobody else's to read
        self.file = path.open("a+b")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            raise UserError(f"Another process is writing to {path.parent}; wait for it.") from None
        self.records, end = _read(path, header)
        self.file.truncate(end)  # a line that a kill cut in two
        if not end:
            self._append(header)

    def reread(self, keys: Iterable[str], read: Callable[[str, str], dict]) -> None:
        """Read kept answers as today's code does; one that it cannot read counts as none.

        Args:
          keys: whose.
          read: see `ask`.
        """
        for key in keys:
            answer = self.records.get(key, {}).get("answer")
            if answer is not None:  # caches of before did not keep it
                try:
                    self.records[key] = read(key, answer)
                except ValueError:
                    del self.records[key]

    def add(self, key: str, record: Mapping[str, Any]) -> None:
        """Keep a record, on the disk too."""
        self.records[key] = dict(record)
        self._append({"key": key, **record})

    def fail(self, key: str, error: str) -> None:
        """Keep a failure until the end of this start."""
        self.records[key] = {"status": FAILED, "error": error}

    def _append(self, record: Mapping) -> None:
        self.file.write(dumps(record).encode() + b"\n")
        self.file.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def header_of(backend: Backend, prompt: int) -> dict[str, Any]:
    """Return who answers which version of a prompt, with which settings."""
    return {"backend": backend.name, "prompt": prompt, **backend.settings}


def read_cache(path: Path, header: Mapping[str, Any]) -> dict[str, dict]:
    """Return the records of a cache by key; none where there is no such file.

    Raises:
      UserError: if they are the answers of another backend or prompt.
    """
    return _read(path, header)[0]


def _read(path: Path, header: Mapping) -> tuple[dict[str, dict], int]:
    """Return the records, and where the last whole line ends: 0 where there are none."""
    if not path.exists():
        return {}, 0
    records, end = {}, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
            except ValueError:
                if end and not file.read(1):
                    break  # the last one, which a kill cut
                what = "take that line out, or " if end else ""
                raise UserError(
                    f"{path} line {number} is damaged, and nothing was written over it: {what}"
                    "choose another --out."
                ) from None
            if end == 0:
                first = record
            else:
                _check_header(first, header, path)
                records[record.pop("key")] = record
            end += len(line)
    return (records, end) if records else ({}, 0)


def _check_header(found: Mapping, wanted: Mapping, path: Path) -> None:
    if {**BEFORE, **found} != {**BEFORE, **wanted}:
        raise UserError(
            f"{path} holds answers of {_said(found)}, not of {_said(wanted)}: choose another "
            "--out, or move that file away to have everything answered anew."
        )


def _said(header: Mapping) -> str:
    parts = dict(header)
    named = f"{parts.pop('backend', None)} to prompt {parts.pop('prompt', None)}"
    return ", ".join([named, *(f"{name} {dumps(value)}" for name, value in parts.items())])


def dumps(value: Any) -> str:
    """Return JSON that reads the same everywhere: sorted keys, no ASCII escapes."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def replace(path: Path, lines: Iterable[str]) -> None:
    """Write lines, whole or not at all."""
    with replaced(path) as scratch, scratch.open("w", encoding="utf-8") as file:
        file.writelines(lines)
