"""A picture of maps over images: grounding.png, one row a phrase."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from medvlp_jax.evaluation import plots

BOX = plots.COLOURS[4]  # seen on grey and on every colour of the maps


class Example(NamedTuple):
    """One row.

    Attributes:
      image: [H, W, 1 or 3] uint8, as the model saw it.
      boxes: [n, 4], (ymin, xmin, ymax, xmax) in its pixels.
      title: the phrase.
      maps: [H, W] each.
      notes: one a map, what stands above it.
    """

    image: np.ndarray
    boxes: np.ndarray
    title: str
    maps: Sequence[np.ndarray]
    notes: Sequence[str]


def draw(examples: Sequence[Example], out_png: str | Path) -> None:
    """Draw images with the boxes of a phrase, and its maps over them.

    A map is coloured from its own smallest to its own largest value: CNR and pointing do not
    depend on either.
    """
    columns = 1 + max(len(example.maps) for example in examples)
    size = (2.3 * columns, 2.7 * len(examples))
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(h_pad=0.12)  # room for titles of several lines
    axes = figure.subplots(len(examples), columns, squeeze=False)
    for row, example in zip(axes, examples, strict=True):
        grey = np.asarray(example.image, float).mean(-1)
        extent = (0, grey.shape[1], grey.shape[0], 0)
        for ax, values, note in zip(
            row, [None, *example.maps], [example.title, *example.notes], strict=False
        ):
            ax.imshow(grey, cmap="gray", extent=extent)
            if values is not None:
                ax.imshow(values, cmap="inferno", alpha=0.5, extent=extent)
            _outline(ax, example.boxes)
            ax.set(xlim=extent[:2], ylim=extent[2:])
            text = textwrap.fill(note, 38, max_lines=3, placeholder=" …")
            colour = plots.INK if values is None else plots.MUTED
            ax.set_title(text, fontsize=7, color=colour, loc="left", parse_math=False)
    for ax in axes.ravel():
        ax.set_axis_off()
    plots.save(figure, out_png)


def _outline(ax: Axes, boxes: np.ndarray) -> None:
    for top, left, bottom, right in boxes:
        corner, width, height = (left, top), right - left, bottom - top
        ax.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=BOX, lw=1.4))
