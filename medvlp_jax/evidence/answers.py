"""Answers on disk: each different request is asked about once, and no answer is lost.

A cache is a file of one line an answer, appended as answers come; its first line says who was asked
in which words, and another backend or prompt is refused. A kill loses at most the answer being
written. Failures are not kept, so that the next start asks about them again.
"""

import fcntl
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from medvlp_jax.config import UserError
from medvlp_jax.evidence.protocol import Backend, Request
from medvlp_jax.writing import replaced

FAILED = "failed"
CHARACTERS_PER_TOKEN = 4.0


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
    """
    # On a file (a cluster log) a bar that redraws ten times a second is noise.
    interval = 0.1 if sys.stderr.isatty() else 30.0
    failures = 0
    with tqdm(total=total, unit=unit, mininterval=interval, dynamic_ncols=True) as bar:
        for reply in backend.complete(requests, check):
            error = reply.error
            if not error:
                try:
                    cache.add(reply.key, read(reply.key, reply.answer))
                except ValueError as problem:
                    error = f"malformed answer: {problem}"
            if error:
                failures += 1
                bar.set_postfix(failed=failures, refresh=False)
                cache.fail(reply.key, error)
            bar.update(1)


class Cache:
    """An open, locked cache file; `records` by key also holds the failures of this start."""

    def __init__(self, path: Path, header: Mapping[str, Any]):
        """Open or start a cache.

        Args:
          path: its folder has to exist.
          header: {"backend": ..., "prompt": ...}, who answers which prompt.

        Raises:
          UserError: where another process writes there, or the answers are to something else.
        """
        self.path = path
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


def read_cache(path: Path, header: Mapping[str, Any]) -> dict[str, dict]:
    """Return the records of a cache by key; none where there is no such file.

    Raises:
      UserError: if they are the answers of another backend or prompt.
    """
    return _read(path, header)[0]


def _read(path: Path, header: Mapping) -> tuple[dict[str, dict], int]:
    """Return the records, and where the last whole line ends."""
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
                _check_header(record, header, path)
            else:
                records[record.pop("key")] = record
            end += len(line)
    return records, end


def _check_header(found: Mapping, wanted: Mapping, path: Path) -> None:
    if found != wanted:
        raise UserError(
            f"{path} holds answers of {found.get('backend')} to prompt {found.get('prompt')}, not "
            f"of {wanted['backend']} to prompt {wanted['prompt']}: choose another --out."
        )


def dumps(value: Any) -> str:
    """Return JSON that reads the same everywhere: sorted keys, no ASCII escapes."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def replace(path: Path, lines: Iterable[str]) -> None:
    """Write lines, whole or not at all."""
    with replaced(path) as scratch, scratch.open("w", encoding="utf-8") as file:
        file.writelines(lines)
