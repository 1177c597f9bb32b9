"""Table and curve of the study of few pairs; methods_lgdea.py writes them beside its numbers."""

import math
import pathlib
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from benchmarks.lgdea_arms import ARMS, STUDY, UNTAUGHT
from medvlp_jax.evaluation import plots

METRICS = {
    "zero_shot/finding/macro_auroc": "zero-shot macro AUROC",
    "retrieval/image_to_text/P@1": "image to text P@1",
    # A normal report for every image would have a P@1 of 0.40, and here one of 0.
    "retrieval/image_to_text/P@1/other classes": "P@1, not normal",
    "retrieval/image_to_text/R@10": "image to text R@10",
    "retrieval/text_to_image/R@10": "text to image R@10",
    "grounding/cosine/cnr": "signed CNR, cosine",
    "grounding/lesions/cnr": "signed CNR, lesions",
    "grounding/lesions/pointing": "pointing, lesions",
}
CONTROLS = {"untrained": "untrained", "shuffled phrases": "wrong phrases"}


def values_of(cells: Mapping, arm: str, ratio: float, metric: str) -> np.ndarray:
    """Return a number of every seed that is done, NaN where a cell lacks it."""
    found = [cell for key, cell in sorted(cells.items()) if key.startswith(f"{arm}/{ratio:g}/")]
    entries = [cell["results"].get(metric, {"value": None})["value"] for cell in found]
    return np.array([np.nan if value is None else value for value in entries], float)


def differences(cells: Mapping, other: str, ratio: float, metric: str) -> np.ndarray:
    """Return LGDEA minus another arm, of every seed in which both are done."""
    ends = [key.rpartition("/")[2] for key in sorted(cells) if key.startswith(f"lgdea/{ratio:g}/")]
    both = [end for end in ends if f"{other}/{ratio:g}/{end}" in cells]
    at = lambda arm, end: cells[f"{arm}/{ratio:g}/{end}"]["results"].get(metric, {}).get("value")
    pairs = [(at("lgdea", end), at(other, end)) for end in both]
    return np.array([a - b for a, b in pairs if a is not None and b is not None])


def gap_closed(cells: Mapping, ratio: float, metric: str) -> float:
    """Return (LGDEA - control) / (control at 100 % pairs - control), of means over seeds.

    NaN where that way is no longer than the spread over seeds: it would be divided by noise.
    """
    ends = [values_of(cells, "pairs", share, metric) for share in (ratio, 1.0)]
    control, full = map(_mean, ends)
    spread = sum(map(_spread, ends))
    if not full - control > spread:
        return math.nan
    return (_mean(values_of(cells, "lgdea", ratio, metric)) - control) / (full - control)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def ratios_of(cells: Mapping) -> list[float]:
    """Return the shares of pairs that have a cell."""
    return sorted({float(key.split("/")[1]) for key in cells})


def table(cells: Mapping) -> str:
    """Lay out mean and spread over seeds, one line a share of pairs and arm."""
    header = ("pairs", "", *METRICS.values(), "usage", "seeds", "min")
    lines = [f"| {' | '.join(header)} |", f"|---|---|{'---|' * (len(header) - 2)}"]
    for ratio in ratios_of(cells):
        for arm, (title, _) in ARMS.items():
            own = [c for key, c in cells.items() if key.startswith(f"{arm}/{ratio:g}/")]
            if not own:
                continue
            texts = [_cell(values_of(cells, arm, ratio, metric)) for metric in METRICS]
            usage = "-" if arm in UNTAUGHT else f"{min(c['usage_entropy'] for c in own):.2f}"
            minutes = f"{np.mean([c['minutes'] for c in own]):.1f}"
            row = (f"{ratio:.0%}", title, *texts, usage, str(len(own)), minutes)
            lines.append(f"| {' | '.join(row)} |")
        for control, title in CONTROLS.items():
            names = [_of_control(metric, control) for metric in METRICS]
            found = [values_of(cells, "lgdea", ratio, name) for name in names]
            if any(np.isfinite(values).any() for values in found):
                texts = [_cell(values) for values in found]
                lines.append(f"| {ratio:.0%} | LGDEA, {title} | {' | '.join(texts)} | | | |")
    less = [
        f"| {ratio:.0%} | {ARMS[other][0]} | {' | '.join(texts)} |"
        for ratio in ratios_of(cells)
        for other in ("pairs", "no_unpaired", "sclip")
        if {*(texts := [_cell(differences(cells, other, ratio, m), "+") for m in METRICS])} != {"-"}
    ]
    if less:
        lines += [
            "",
            "LGDEA minus this, seed by seed (split and start of a seed are the same):",
            "",
        ]
        lines += [f"| pairs | | {' | '.join(METRICS.values())} |"]
        lines += [f"|---|---|{'---|' * len(METRICS)}", *less]
    closed = [
        f"{ratio:.0%}: " + ", ".join(f"{METRICS[m]} {g:+.0%}" for m, g in gaps.items())
        for ratio in ratios_of(cells)
        if ratio < 1 and (gaps := _gaps(cells, ratio))
    ]
    if closed:
        lines += ["", "Of the way from the control to 100 % pairs LGDEA goes:", ""]
        lines += [f"* {line}" for line in closed]
    return "\n".join(lines)


def _gaps(cells: Mapping, ratio: float) -> dict[str, float]:
    # The control has no lesions: theirs is a map nothing trained.
    shared = [metric for metric in METRICS if "lesions" not in metric]
    found = {metric: gap_closed(cells, ratio, metric) for metric in shared}
    return {metric: gap for metric, gap in found.items() if math.isfinite(gap)}


def _of_control(metric: str, control: str) -> str:
    head, task, name = metric.split("/", 2)
    return f"{head}/{task} ({control})/{name}"


def _cell(values: np.ndarray, sign: str = "") -> str:
    values = values[np.isfinite(values)]
    if not len(values):
        return "-"
    spread = f" ± {_spread(values):.3f}" if len(values) > 1 else ""
    return f"{values.mean():{sign}.3f}{spread}"


def _spread(values: np.ndarray) -> float:
    """Return the standard deviation over seeds, 0 of a single one."""
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def draw(cells: Mapping, out_png: pathlib.Path) -> None:
    """Draw every metric over the share of pairs, one line an arm of the study, spread as bars."""
    measured = {name for cell in cells.values() for name in cell["results"]}
    metrics = {name: title for name, title in METRICS.items() if name in measured}
    columns = 3
    rows = math.ceil((len(metrics) + 1) / columns)  # the last one has the legend
    figure = Figure(figsize=(3.3 * columns, 2.8 * rows), layout="constrained", facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, (metric, title) in zip(axes, metrics.items(), strict=False):
        for colour, arm in zip(plots.COLOURS, STUDY, strict=False):
            points = [(r, values_of(cells, arm, r, metric)) for r in ratios_of(cells)]
            points = [(r, v[np.isfinite(v)]) for r, v in points]
            points = [(100 * r, v.mean(), _spread(v)) for r, v in points if v.size]
            if points:
                x, y, spread = np.array(points).T
                style = {"color": colour, "marker": "o", "ms": 3.5, "lw": 1.5, "capsize": 2}
                ax.errorbar(x, y, spread, label=ARMS[arm][0], **style)
        ax.set_xscale("log")
        ax.set_xticks(ticks := [100 * r for r in ratios_of(cells)], [f"{t:g}" for t in ticks])
        ax.minorticks_off()
        ax.set_title(title, fontsize=9, color=plots.INK, loc="left", fontweight="bold")
        ax.set_xlabel("studies that are pairs, %", fontsize=8, color=plots.MUTED)
        ax.tick_params(labelsize=8, colors=plots.MUTED)
        ax.grid(True, color=plots.RULE, linewidth=0.6)
    for ax in axes[len(metrics) :]:
        ax.set_axis_off()
    handles, labels = axes[0].get_legend_handles_labels()
    axes[-1].legend(handles, labels, loc="center", frameon=False, fontsize=9)
    plots.save(figure, out_png)
