"""Pictures of a run: its numbers over steps, what retrieval finds, how classes are told apart.

Figures are built without pyplot, so importing this changes no backend and leaks no figure.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import sklearn.metrics
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from medvlp_jax.config import UserError
from medvlp_jax.evaluation import calibration
from medvlp_jax.evaluation.labels import shortened
from medvlp_jax.evaluation.zero_shot import PromptScores
from medvlp_jax.reading import parse_json
from medvlp_jax.writing import replaced

# Okabe & Ito: distinguishable with colour-vision deficiency.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
INK, MUTED, RULE, RIGHT = "#222222", "#777777", "#DDDDDD", "#E4F3EC"
RETRIEVED = "Texts retrieved for each image, best first.  ✓ the image's own text.  Numbers: cosine."
CLASSIFIED = (
    "Classes given to each image, best first.  ✓ the image's own class.  Numbers: probability."
)
ANSWER_WIDTH, ANSWER_LINES = 92, 3  # characters, lines
LINES_PER_PANEL = len(COLOURS)
# A panel becomes logarithmic when its values span more than this factor.
LOG_SPAN = 30.0
Series = dict[str, tuple[np.ndarray, np.ndarray]]  # name -> (steps, values)


def read_series(path: str | Path) -> Series:
    """Read a metrics JSONL: one object a line with "step" and numbers.

    A number may also be an entry of results.json, whose "value" is taken. A last line cut short by
    a crash is ignored; other lines than objects, text and NaN are too.

    Raises:
      UserError: if no line holds a step and a number, or the file is not UTF-8.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} holds no metrics: it is not UTF-8: {error}.") from None
    points: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        try:
            record = parse_json(line)
        except ValueError:
            continue
        if not isinstance(record, dict) or not _is_finite(record.get("step")):
            continue
        for name, value in record.items():
            value = value.get("value") if isinstance(value, Mapping) else value
            if name != "step" and _is_finite(value):
                points.setdefault(name, []).append((record["step"], value))
    if not points:
        raise UserError(f"{path} holds no metrics: no line has a step and a number.")
    # a resumed run may repeat steps: the later line stands
    latest = {name: sorted(dict(pairs).items()) for name, pairs in points.items()}
    return {name: tuple(np.array(pairs, float).T) for name, pairs in latest.items()}


def _is_finite(value) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _is_dull(name: str, values: np.ndarray) -> bool:
    """Loss weights without a schedule are in the config; a flat line says no more."""
    return name.startswith("weight/") and bool(np.ptp(values) == 0)


def _panel(name: str) -> tuple[int, str]:
    """Return (place, title) of the panel a number belongs to.

    The total loss comes first, then its terms, learning rate, scheduled weights, evaluation, and
    the rest (norms, speed). A panel holds one training number, or the evaluation metrics of one
    task; a rank and a rate do not share an axis.
    """
    head, *rest = name.split("/")
    if not rest:
        places = {"loss": 0, "lr": 2}
        return places.get(name, 5), name
    if head in ("loss", "weight", "time"):
        shared = head == "weight" or (head == "time" and "per" not in name)
        return {"loss": 1, "weight": 3, "time": 6}[head], head if shared else name
    task = name.rsplit("/", 1)[0]
    return 4, f"{task}/rank" if name.endswith("rank") else task


def panels(series: Series) -> list[tuple[str, list[str]]]:
    """Group series into panels (title, names), at most the first LINES_PER_PANEL lines in each."""
    grouped: dict[tuple[int, str], list[str]] = {}
    for name, (_, values) in series.items():
        if not _is_dull(name, values):
            grouped.setdefault(_panel(name), []).append(name)
    ordered = sorted(grouped.items(), key=lambda item: item[0][0])
    return [(title, names[:LINES_PER_PANEL]) for (_, title), names in ordered]


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over a 25th of the points; the ends average what there is."""
    width = max(1, len(values) // 25) | 1  # odd, so that the window is centred
    kernel = np.ones(width)
    mass = np.convolve(np.ones(len(values)), kernel, "same")
    return np.convolve(values, kernel, "same") / mass


def as_written(legend: Legend) -> None:
    """Show names as they are: dollar signs in them are no formula."""
    for text in legend.get_texts():
        text.set_parse_math(False)


def _style(ax: Axes, title: str) -> None:
    how = {"loc": "left", "pad": 6, "fontweight": "bold", "parse_math": False}
    ax.set_title(title, fontsize=9, color=INK, **how)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(RULE)
    ax.tick_params(labelsize=8, colors=MUTED, length=0)
    ax.grid(True, color=RULE, linewidth=0.6)
    ax.set_axisbelow(True)


def _scale(ax: Axes, values: np.ndarray) -> None:
    """Logarithmic where all values are positive and span more than LOG_SPAN."""
    if values.min() > 0 and values.max() / values.min() > LOG_SPAN:
        ax.set_yscale("log")
        ax.yaxis.set_minor_formatter(NullFormatter())
    else:
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    ax.tick_params(which="minor", length=0)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _draw_panel(ax: Axes, title: str, names: Sequence[str], series: Series) -> None:
    for colour, name in zip(COLOURS, names, strict=False):
        steps, values = series[name]
        label = name.rsplit("/", 1)[-1]
        if len(steps) < 50:  # few points (evaluations): show each
            ax.plot(steps, values, color=colour, lw=1.5, marker="o", ms=3, label=label)
        elif title in ("lr", "weight"):  # schedules hold no noise to take out
            ax.plot(steps, values, color=colour, lw=1.6, label=label)
        else:
            ax.plot(steps, values, color=colour, lw=0.7, alpha=0.25)
            ax.plot(steps, smooth(values), color=colour, lw=1.6, label=label)
    _style(ax, title)
    _scale(ax, np.concatenate([series[name][1] for name in names]))
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if len(names) > 1:
        how = {"fontsize": 7, "frameon": False, "labelcolor": INK, "loc": "best"}
        as_written(ax.legend(**how, ncols=1 + len(names) // 4))


def curves(metrics_jsonl: str | Path, out_png: str | Path) -> None:
    """Draw every number of a run over its steps, small multiples, total loss first.

    Raw values are faint, their moving average strong.

    Args:
      metrics_jsonl: see `read_series`.
      out_png: where the picture goes.
    """
    series = read_series(metrics_jsonl)
    grid = panels(series)
    columns = min(4, max(2, math.ceil(math.sqrt(len(grid)))))
    rows = math.ceil(len(grid) / columns)
    figure = Figure(figsize=(3.4 * columns, 2.5 * rows), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, (title, names) in zip(axes, grid, strict=False):
        _draw_panel(ax, title, names, series)
    for ax in axes[len(grid) :]:
        ax.set_visible(False)
    for ax in axes[max(0, len(grid) - columns) : len(grid)]:
        ax.set_xlabel("step", fontsize=8, color=MUTED)
    save(figure, out_png)


def _wrapped(text: str) -> str:
    """Break text into at most ANSWER_LINES lines, an ellipsis where it is cut."""
    text = " ".join(text.split()) or "(empty)"
    return textwrap.fill(text, ANSWER_WIDTH, max_lines=ANSWER_LINES, placeholder=" …")


def _draw_text(ax: Axes, slot: int, *, mark: str, score: str, text: str, right: bool) -> None:
    """Write one answer into slot 0, 1, ... of an axis that counts slots downwards."""
    if right:
        ax.add_patch(Rectangle((0, slot + 0.04), 1, 0.92, facecolor=RIGHT, edgecolor="none"))
    strong = {"color": COLOURS[2] if right else MUTED, "fontsize": 8, "va": "center"}
    ax.text(0.015, slot + 0.5, mark, fontweight="bold", **strong)
    ax.text(0.055, slot + 0.5, score, **strong)
    prose = {"color": INK, "fontsize": 7.5, "va": "center", "linespacing": 1.15}
    ax.text(0.135, slot + 0.5, text, parse_math=False, **prose)  # reports may hold dollar signs


def _draw_example(picture: Axes, answers: Axes, image, texts, scores, truth: str) -> None:
    image = np.asarray(image)
    image = image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image
    picture.imshow(image, cmap="gray" if image.ndim == 2 else None, vmin=0, vmax=255)
    found = truth in texts
    for slot, (text, score) in enumerate(zip(texts, scores, strict=True)):
        right = text == truth
        _draw_text(
            answers,
            slot,
            mark="✓" if right else str(slot + 1),
            score=f"{score:.2f}",
            text=_wrapped(text),
            right=right,
        )
    tail = "" if found else _wrapped(truth)
    if tail:
        answers.axhline(len(texts), color=RULE, lw=0.8)
        _draw_text(answers, len(texts), mark="", score="true", text=tail, right=False)
    answers.set(xlim=(0, 1), ylim=(len(texts) + 1, 0))
    for ax in (picture, answers):
        ax.set_axis_off()


def examples(
    images,
    texts_topk: Sequence[Sequence[str]],
    scores,
    truths: Sequence[str],
    out_png: str | Path,
    *,
    caption: str = RETRIEVED,
) -> None:
    """Draw images with the texts or classes found for them, best first, the right one marked.

    Where the right text is not among them it stands below, as "true".

    Args:
      images: [n, H, W, 1 or 3] uint8.
      texts_topk: n lists of K texts.
      scores: [n, K] what the caption says, such as cosines.
      truths: n texts; equal to a retrieved text = right.
      out_png: where the picture goes.
      caption: what is shown: RETRIEVED or CLASSIFIED.

    Raises:
      UserError: without an image.
    """
    if not len(images):
        raise UserError("No example to draw: examples.png needs at least one image.")
    slots = max(map(len, texts_topk)) + 1
    height, width = max(1.7, 0.47 * slots), 6.0  # inches, of an image and of its answers
    columns = 1 if len(images) < 4 else 2
    rows = math.ceil(len(images) / columns)
    tall = 1.08 * height * rows + 0.45
    figure = Figure(figsize=(1.04 * (height + width) * columns, tall), facecolor="white")
    edges = {"left": 0.01, "right": 0.99, "top": 1 - 0.36 / tall, "bottom": 0.09 / tall}
    ratios = [height, width] * columns
    grid = figure.add_gridspec(rows, len(ratios), width_ratios=ratios, wspace=0.04, hspace=0.08)
    grid.update(**edges)
    figure.text(0.01, 1 - 0.2 / tall, caption, fontsize=9, color=MUTED, va="center")
    for i, example in enumerate(zip(images, texts_topk, scores, truths, strict=True)):
        row, column = divmod(i, columns)
        picture = figure.add_subplot(grid[row, 2 * column])
        answers = figure.add_subplot(grid[row, 2 * column + 1])
        _draw_example(picture, answers, *example)
    save(figure, out_png)


def classifier(truth, chances, classes: Sequence[str], out_png: str | Path) -> None:
    """Draw a classifier's confusion matrix, its ROC curves and its calibration.

    A class that the data lack, or that is all there is, has no ROC curve.

    Args:
      truth: [N] class of each row; rows of unknown class are left out before.
      chances: [N, C] probabilities.
      classes: C names.
      out_png: where the picture goes.

    Raises:
      UserError: without a row.
    """
    truth, chances = np.asarray(truth), np.asarray(chances)
    if not len(truth):
        raise UserError("No case of a known class to draw: classifier.png needs at least one.")
    side = 3.2 + 0.28 * len(classes)  # of a square; titles stand above it, slanted names below
    figure = Figure(figsize=(3 * side, side + 0.8), layout="compressed", facecolor="white")
    left, middle, right = figure.subplots(1, 3)
    _draw_confusion(left, truth, chances.argmax(1), classes)
    answers = truth[:, None] == np.arange(len(classes))
    _draw_roc(middle, answers, chances, classes, "ROC, each class against the rest; area")
    _draw_calibration(right, chances.argmax(1) == truth, chances.max(1))
    save(figure, out_png)


def _draw_confusion(ax: Axes, truth, predicted, classes) -> None:
    """Counts, coloured by their share of the true class."""
    table = np.zeros((len(classes), len(classes)), int)
    np.add.at(table, (truth, predicted), 1)
    share = table / np.maximum(table.sum(1, keepdims=True), 1)
    ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(table):
        colour = "white" if share[row, column] > 0.5 else INK
        ax.text(column, row, str(count), ha="center", va="center", fontsize=8, color=colour)
    names, plain = shortened(classes, 22), {"fontsize": 8, "parse_math": False}
    ax.set_xticks(range(len(classes)), names, rotation=40, ha="right", **plain)
    ax.set_yticks(range(len(classes)), names, **plain)
    _style(ax, "confusion: true class (row), answer (column)")
    ax.grid(False)


def roc(tasks: Mapping[str, PromptScores], out_png: str | Path) -> None:
    """Draw the ROC curves of every class, a panel a task.

    A class that the data lack, or that is all there is, has no curve.

    Args:
      tasks: by name.
      out_png: where the picture goes.
    """
    figure = Figure(figsize=(5.4 * len(tasks), 5.6), layout="compressed", facecolor="white")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for ax, (name, scored) in zip(panels, tasks.items(), strict=True):
        _draw_roc(ax, *scored, f"{name}: ROC; area")
    save(figure, out_png)


def _draw_roc(ax: Axes, labels, scores, classes, title: str) -> None:
    """One curve a class, with its area."""
    for c, name in enumerate(shortened(classes, 26)):
        known = labels[:, c] >= 0
        positive = labels[known, c] == 1
        if not positive.any() or positive.all():
            continue
        false, true, _ = sklearn.metrics.roc_curve(positive, scores[known, c])
        style = "-" if c < len(COLOURS) else "--"
        label = f"{name}  {np.trapezoid(true, false):.2f}"
        ax.plot(false, true, style, color=COLOURS[c % len(COLOURS)], lw=1.5, label=label)
    ax.plot([0, 1], [0, 1], color=RULE, lw=1, zorder=0)
    _style(ax, title)
    ax.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    ax.set_xlabel("1 - specificity", fontsize=8, color=MUTED)
    ax.set_ylabel("sensitivity", fontsize=8, color=MUTED)
    if ax.get_legend_handles_labels()[0]:
        as_written(ax.legend(fontsize=7, frameon=False, labelcolor=INK, loc="lower right"))


def _draw_calibration(ax: Axes, right, confidence) -> None:
    bins = calibration.bins(right, confidence)
    error, by_lot = calibration.error(right, confidence), calibration.chance_errors(confidence)
    ax.plot([0, 1], [0, 1], color=RULE, lw=1, zorder=0)
    ax.plot(bins[:, 0], bins[:, 1], "o-", color=COLOURS[0], lw=1.5, ms=4)
    _style(ax, f"calibration; expected error {error:.3f}")
    said = f"{len(right)} cases in {len(bins)} bins"
    said += f"\na calibrated model has {by_lot.mean():.3f} by chance,"
    said += f"\n95 % of them less than {np.quantile(by_lot, 0.95):.3f}"
    under = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1}
    place = {"transform": ax.transAxes, "va": "top", "bbox": under}
    ax.text(0.02, 0.97, said, fontsize=7, color=MUTED, **place)
    ax.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    ax.set_xlabel("probability of the answer", fontsize=8, color=MUTED)
    ax.set_ylabel("share that is right", fontsize=8, color=MUTED)


def attention(images, maps: Sequence[Sequence], titles: Sequence[str], out_png: str | Path) -> None:
    """Draw images with one attention map a stage laid over each, fine to coarse.

    Args:
      images: n of [H, W, 1 or 3] uint8.
      maps: n lists of S non-negative maps [h, w].
      titles: n lines, such as the true class and the answer.
      out_png: where the picture goes.
    """
    columns = 1 + max(map(len, maps))
    size = (2.1 * columns, 2.35 * len(images))
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    axes = figure.subplots(len(images), columns, squeeze=False)
    for row, image, stages, title in zip(axes, images, maps, titles, strict=True):
        grey = np.asarray(image, float).mean(-1)
        extent = (0, grey.shape[1], grey.shape[0], 0)
        row[0].imshow(image if image.shape[-1] == 3 else grey, cmap="gray")
        row[0].set_title(title, fontsize=7, color=INK, loc="left", parse_math=False)
        for s, (ax, found) in enumerate(zip(row[1:], stages, strict=True)):
            ax.imshow(grey, cmap="gray", extent=extent)
            over = {"cmap": "inferno", "alpha": 0.55, "interpolation": "bilinear"}
            ax.imshow(found, vmin=0, extent=extent, **over)
            # Evenly spread attention is 1 everywhere.
            peak = found.max() / max(found.mean(), 1e-12)
            note = f"stage {s + 1}: {found.sum():.2f}, peak {peak:.1f}x"
            ax.set_title(note, fontsize=7, color=MUTED, loc="left")
    for ax in axes.ravel():
        ax.set_axis_off()
    save(figure, out_png)


def save(figure: Figure, out_png: str | Path) -> None:
    """Write a PNG, whole or not at all."""
    with replaced(out_png) as scratch:
        FigureCanvasAgg(figure).print_figure(scratch, format="png", dpi=150)
