"""Pictures of what a head finds: outlines, boxes or classes over test images."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from medvlp_jax.data import masks
from medvlp_jax.evaluation import plots
from medvlp_jax.evaluation.average_precision import Boxes
from medvlp_jax.evaluation.labels import ELLIPSIS

COLUMNS = 4
TRUE, SAID = (1, (3, 2)), "solid"  # dashes on top of lines: both stay visible where they agree
COLOURS = (*plots.COLOURS, "#F0E442", "#B3B3FF")  # the last two are for grey images alone
CONFIDENT = 0.25  # score of the boxes that are drawn; of an image without one its best is


def outlines(
    examples: Sequence[Mapping], predicted: np.ndarray, names: Sequence[str], out_png: str | Path
) -> None:
    """Draw predicted regions as lines and true ones as dashes, a colour a region.

    Args:
      examples: with `image` [S, S, C] and `mask` [S, S, K].
      predicted: [n, S, S, K] bool.
      names: K regions.
      out_png: where the picture goes.
    """
    figure, axes = _grid(examples)
    for ax, example, said in zip(axes, examples, predicted, strict=False):
        both = (said & example["mask"]).sum()
        area = said.sum() + example["mask"].sum()
        ax.set_title(f"Dice {2 * both / area if area else 1:.2f}", fontsize=7, loc="left")
        for k in range(len(names)):
            for region, style in ((said, SAID), (example["mask"], TRUE)):
                for line in masks.to_polygons(region[..., k]):
                    closed = np.concatenate([line, line[:1]])
                    colour = _colour(k) if style == SAID else "white"
                    ax.plot(*closed.T, color=colour, ls=style, lw=1.1)
    _legend(figure, names)
    plots.save(figure, out_png)


def boxes(
    examples: Sequence[Mapping],
    found: Sequence[Boxes],
    truth: Sequence[Boxes],
    names: Sequence[str],
    out_png: str | Path,
) -> None:
    """Draw detections of at least CONFIDENT, or the best one, as lines; true boxes as dashes."""
    figure, axes = _grid(examples)
    for ax, ours, theirs in zip(axes, found, truth, strict=False):
        floor = min(CONFIDENT, ours.scores.max(initial=0.0))
        ours = Boxes(*(field[ours.scores >= floor] for field in ours))
        for group, style in ((ours, SAID), (theirs, TRUE)):
            for (top, left, bottom, right), kind, score in zip(*group, strict=True):
                colour = _colour(kind) if style == SAID else "white"
                corner, sides = (left, top), (right - left, bottom - top)
                ax.add_patch(Rectangle(corner, *sides, fill=False, ec=colour, ls=style, lw=1.1))
                if style == SAID:
                    # With its name: more classes than colours that an eye tells apart.
                    side = "bottom" if top > 0.06 * ax.get_ylim()[0] else "top"  # else cut off
                    tag = {"fontsize": 5, "color": "black", "va": side, "clip_on": True}
                    tag |= {"parse_math": False}
                    box = {"facecolor": colour, "edgecolor": "none", "pad": 0.8}
                    ax.text(left, top, f"{names[int(kind)]} {score:.2f}", bbox=box, **tag)
        said = ", ".join(dict.fromkeys(names[k] for k in theirs.kinds)) or "nothing"
        ax.set_title(_ended(said, 40), fontsize=7, loc="left", parse_math=False)
    _legend(figure, names)
    plots.save(figure, out_png)


def classes(
    examples: Sequence[Mapping],
    chances: np.ndarray,
    labels: Sequence[np.ndarray],
    names: Sequence[str],
    out_png: str | Path,
) -> None:
    """Write the three likeliest classes below each image, true ones with a tick.

    Args:
      examples: with `image` [S, S, C].
      chances: [n, C].
      labels: [C] of each image: 1 present, 0 absent, -1 unknown.
      names: C classes.
      out_png: where the picture goes.
    """
    figure, axes = _grid(examples, text=0.6)
    marks = {1: "✓", 0: " ", -1: "?"}
    for ax, row, label in zip(axes, chances, labels, strict=False):
        best = np.argsort(-row)[:3]
        lines = [f"{marks[int(label[k])]} {row[k]:.2f} {names[k]}" for k in best]
        missed = [names[k] for k in np.flatnonzero(label == 1) if k not in best]
        lines += [f"also: {', '.join(missed)}"] if missed else []
        ax.set_title(
            "\n".join(_ended(line, 36) if line.startswith("also") else line for line in lines),
            fontsize=7,
            loc="left",
            parse_math=False,
            family="DejaVu Sans Mono",
        )
    plots.save(figure, out_png)


def _grid(examples, text: float = 0.25):
    """Return a figure and an axes an image, the image drawn in it, grey or as it is."""
    rows = -(-len(examples) // COLUMNS)
    figure = Figure(
        figsize=(2.3 * COLUMNS, (2.3 + text) * rows + 0.4), layout="constrained", facecolor="white"
    )
    axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for ax in axes:
        ax.set_axis_off()
    for ax, example in zip(axes, examples, strict=False):
        image = example["image"]
        side = image.shape[0]
        ax.imshow(np.broadcast_to(image, (*image.shape[:2], 3)), extent=(0, side, side, 0))
        ax.set(xlim=(0, side), ylim=(side, 0))
    return figure, axes


def _colour(kind):
    return COLOURS[(int(kind) + 1) % len(COLOURS)]


def _legend(figure, names):
    handles = [Line2D([], [], color=_colour(k), label=name) for k, name in enumerate(names)]
    handles.append(Line2D([], [], color=plots.MUTED, ls=TRUE, label="true (white)"))
    how = {"loc": "outside lower center", "fontsize": 7, "frameon": False}
    plots.as_written(figure.legend(handles=handles, ncols=min(len(handles), 6), **how))


def _ended(line, width):
    """Cut a line that is too long at a character, not at a word, which may be all there is."""
    return line if len(line) <= width else line[: width - 1] + ELLIPSIS
