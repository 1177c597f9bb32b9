"""A table of texts as Markdown or LaTeX."""

from collections.abc import Sequence
from typing import NamedTuple

SPECIAL = {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"}
SPECIAL |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
SPECIAL |= {character: f"\\{character}" for character in "&%$#_{}"}


class Grid(NamedTuple):
    """A table.

    Attributes:
      title: above it.
      header: one text a column; a line break parts what stands one below the other.
      rows: one text a column each.
      notes: below it, one a line.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]


def markdown(grid: Grid) -> str:
    """Return a Markdown table, padded so that it can be read as it is; no final newline."""
    safe = lambda text, line: text.replace("|", r"\|").replace("\n", line)
    lines = [[safe(cell, "<br>") for cell in row] for row in (grid.header, *grid.rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    pad = lambda row: [
        cell.rjust(width) if i else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    rule = ["-" * width if i == 0 else f"{'-' * (width - 1)}:" for i, width in enumerate(widths)]
    table = [f"| {' | '.join(row)} |" for row in (pad(lines[0]), rule, *map(pad, lines[1:]))]
    return "\n".join(
        [f"**{grid.title}**", "", *table, "", *(f"* {n}" for n in grid.notes)]
    ).rstrip()


def latex(grid: Grid) -> str:
    """Return a `table` for booktabs, notes in small type below; no final newline."""
    columns = [cell.split("\n") for cell in grid.header]
    depth = max(map(len, columns))
    heads = [[*cell, *[""] * (depth - len(cell))] for cell in columns]
    line = lambda cells: f"{' & '.join(map(escape, cells))} \\\\"
    return "\n".join(
        [
            r"\begin{table}",
            rf"\caption{{{escape(grid.title)}}}",
            r"\centering",
            rf"\begin{{tabular}}{{l{'r' * (len(grid.header) - 1)}}}",
            r"\toprule",
            *(line(cells) for cells in zip(*heads, strict=True)),
            r"\midrule",
            *(line(row) for row in grid.rows),
            r"\bottomrule",
            r"\end{tabular}",
            *(rf"\par\footnotesize {escape(note)}" for note in grid.notes),
            r"\end{table}",
        ]
    )


def escape(text: str) -> str:
    """Write text so that LaTeX prints it."""
    return "".join(SPECIAL.get(character, character) for character in text.replace("\n", " "))
