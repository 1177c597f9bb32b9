"""JSON that others wrote: whatever is wrong with it is a ValueError."""

import itertools
import json
from typing import Any

DEEPEST = 100  # levels; nothing that is read here has ten


def parse_json(text: str | bytes) -> Any:
    """Return what a JSON text holds.

    Nesting is bounded, since what goes through it afterwards, level by level, would end in a
    RecursionError.

    Raises:
      ValueError: for what is no JSON, bytes that are no Unicode, or deeper nesting than DEEPEST.
    """
    try:
        found = json.loads(text)
        is_deep = _is_deep(found)
    except RecursionError:
        is_deep = True
    if is_deep:
        raise ValueError(f"more than {DEEPEST} levels of nesting")
    return found


def _is_deep(found: Any) -> bool:
    level = [found]
    for _ in range(DEEPEST + 1):
        level = [value for value in level if isinstance(value, dict | list)]
        if not level:
            return False
        inner = (value.values() if isinstance(value, dict) else value for value in level)
        level = [*itertools.chain.from_iterable(inner)]
    return True
