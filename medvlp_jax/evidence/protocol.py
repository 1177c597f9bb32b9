"""What is asked of a backend and what it answers."""

import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple


class Request(NamedTuple):
    """A prompt; `text` is the part of it that is the document, for writers that need no prompt."""

    key: str
    prompt: str
    text: str


class Reply(NamedTuple):
    """An answer, or why there is none."""

    key: str
    answer: str = ""
    error: str = ""


class Backend(NamedTuple):
    """Answers requests.

    Attributes:
      name: which one, and which model: answers are cached under it.
      complete: (requests, check) -> replies, lazily; `check` raises ValueError for an answer that
        is not in the form asked for.
      counts_tokens: whether its answers are paid or timed by the token.
      settings: what else its answers follow from: they are cached under that, too.
    """

    name: str
    complete: Callable[[Iterable[Request], Callable[[str], Any]], Iterator[Reply]]
    counts_tokens: bool = True
    settings: Mapping[str, Any] = types.MappingProxyType({})
