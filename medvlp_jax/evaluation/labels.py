"""Names of classes as they stand in figures: short, and still told apart."""

from collections.abc import Sequence

ELLIPSIS = "…"


def shortened(names: Sequence[str], width: int) -> list[str]:
    """Cut names to at most `width` characters, so that different ones stay different.

    What is kept of a long name is its head and its tail, as much of each as tells all names apart,
    halves if they do; where no such cut does, long names get their number in front.

    Args:
      names: of all classes of a figure.
      width: characters, more than a number of a class takes.
    """
    names = [" ".join(name.split()) for name in names]
    for head in sorted(range(width), key=lambda head: abs(2 * head - (width - 1))):
        cut = [_cut(name, width, head) for name in names]
        if len({*cut}) == len({*names}):
            return cut
    marks = [f"{i + 1}: " for i in range(len(names))]
    return [
        name if len(name) <= width else mark + _cut(name, width - len(mark), width // 3)
        for name, mark in zip(names, marks, strict=True)
    ]


def _cut(name: str, width: int, head: int) -> str:
    """Keep the first `head` characters and, after an ellipsis, what else there is room for."""
    if len(name) <= width:
        return name
    return name[:head] + ELLIPSIS + name[len(name) - (width - 1 - head) :]
