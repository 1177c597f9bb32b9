"""Pieces of the HTML page of a run: plain strings, everything from outside escaped.

The page needs no network and no script: pictures are data URIs, and its content policy forbids the
rest. It is read at any width, in light and dark.
"""

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from medvlp_jax.evaluation.comparison import parted
from medvlp_jax.evaluation.results import Results, digits

# Numbers of a task in its table; the others are folded away below.
SHOWN = ("macro_auroc", "macro_auprc", "accuracy", "balanced_accuracy", "macro_f1", "mcc")
SHOWN += ("R@1", "R@10", "P@1", "median_rank", "cnr", "miou", "pointing", "loss", "dice", "iou")
SHOWN += ("map", "ap50", "froc")
ITSELF, MOST_FREQUENT = "this run", "most frequent class"
# Half of the width of the strip that draws intervals, and its height; a viewBox, no pixels.
STRIP, TALL = 200, 18

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --muted: #60646c; --rule: #e0e1e6;
  --ground: #fcfcfd; --card: #fff; --mark: #0072b2; --other: #d55e00; --warn: #fff4d5;
  --warn-ink: #5c3d05; }
@media (prefers-color-scheme: dark) { :root { --ink: #edeef0; --muted: #a0a4ab; --rule: #34373c;
  --ground: #111214; --card: #191a1c; --mark: #56b4e9; --other: #e69f00; --warn: #3a2f12;
  --warn-ink: #f6dfa4; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .25rem; letter-spacing: -.01em;
  overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .75rem; padding-top: 1rem;
  border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.75rem 0 .35rem; }
p, li { max-width: 46rem; }
p { margin: .35rem 0 .75rem; }
.muted, figcaption, caption { color: var(--muted); font-size: .875rem; }
.warnings { background: var(--warn); color: var(--warn-ink); border-radius: .5rem;
  padding: .75rem 1rem .75rem 2rem; margin: 1.25rem 0; }
.wide { overflow-x: auto; margin: 0 0 .5rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .75rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--rule); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--muted); font-weight: 500; vertical-align: bottom; }
.range { color: var(--muted); }
svg { display: block; width: 12.5rem; height: 1.125rem; }
.facts { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .2rem 1.25rem;
  font-size: .875rem; margin: 0; }
.facts dt { color: var(--muted); } .facts dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 1rem 0; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; padding: .5rem;
  border: 1px solid var(--rule); border-radius: .5rem; }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--muted); font-size: .875rem; }
pre, code { font: .8125rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { overflow-x: auto; background: var(--card); border: 1px solid var(--rule);
  border-radius: .5rem; padding: 1rem; }
@media (max-width: 40rem) { main { padding: 1.5rem 1rem 3rem; } h1 { font-size: 1.5rem; }
  figure img { max-width: none; width: 46rem; } /* read by scrolling sideways */
  .facts { grid-template-columns: minmax(0, 1fr); gap: 0; } .facts dd { margin-bottom: .5rem; } }
"""


class Task(NamedTuple):
    """The numbers of one task.

    Attributes:
      name: protocol/task.
      columns: who was measured: this run first, then its controls and parts.
      entries: {metric: {column: entry}}, without single classes.
      classes: the same of single classes.
      stamp: protocol id and hash of each column.
    """

    name: str
    columns: list[str]
    entries: dict[str, dict[str, Mapping]]
    classes: dict[str, dict[str, Mapping]]
    stamp: dict[str, str]


def tasks(numbers: Results) -> list[Task]:
    """Group numbers by task, with the controls of a task beside it.

    Regressions on the raw input and always answering the most frequent class are controls of the
    classifier, under other keys. Studies, and single draws of the patients, stand beside the images
    and the mean; a published flavour is a task of its own.
    """
    known = {parted(key).task for key in numbers}
    found: dict[str, Task] = {}
    for key, entry in numbers.items():
        name, part, control, metric = parted(key)
        if "value" not in entry:
            continue
        control = ", ".join(filter(None, (part, control)))
        if name.startswith("regression/") and name.replace("regression", "classify") in known:
            name, control = name.replace("regression", "classify"), f"regression: {control}"
        if metric.startswith("prevalence_control_"):
            if control:  # it is the same
                continue
            metric, control = metric.removeprefix("prevalence_control_"), MOST_FREQUENT
        task = found.setdefault(name, Task(name, [], {}, {}, {}))
        column = control or ITSELF
        if column not in task.columns:
            task.columns.append(column)
            task.stamp[column] = f"{entry['protocol']} #{entry['hash']}"
        kept = task.classes if "/" in metric else task.entries
        kept.setdefault(metric, {})[column] = entry
    return list(found.values())


def page(title: str, body: Iterable[str]) -> str:
    """Return the whole document."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><main>",
            *body,
            "</main></body></html>\n",
        ]
    )


def text(content: Any, tag: str = "p", kind: str = "") -> str:
    """Return an element with escaped content."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<{tag}{attribute}>{html.escape(str(content))}</{tag}>"


def listed(items: Sequence[str], kind: str = "") -> str:
    """Return a list; nothing for none."""
    attribute = f' class="{kind}"' if kind else ""
    rows = "".join(text(item, "li") for item in items)
    return f"<ul{attribute}>{rows}</ul>" if items else ""


def facts(pairs: Mapping[str, Any]) -> str:
    """Return names with what they are."""
    rows = "".join(text(name, "dt") + text(value, "dd") for name, value in pairs.items())
    return f'<dl class="facts">{rows}</dl>'


def folded(summary: str, content: str) -> str:
    """Return content that is shown when its summary is clicked; no script is needed."""
    return f"<details>{text(summary, 'summary')}{content}</details>"


def code(value: Any) -> str:
    """Return JSON to read."""
    return f"<pre>{html.escape(json.dumps(value, indent=1, sort_keys=True))}</pre>"


def picture(png: bytes, caption: str) -> str:
    """Return a picture inside the page."""
    data = base64.b64encode(png).decode()
    image = f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
    return f'<figure><div class="wide">{image}</div>{text(caption, "figcaption")}</figure>'


def table(task: Task) -> str:
    """Return the table of a task; numbers that are not of SHOWN, and classes, folded."""
    chosen = {m: row for m, row in task.entries.items() if m in SHOWN} or task.entries
    others = {m: row for m, row in task.entries.items() if m not in chosen}
    stamps = dict.fromkeys(task.stamp.values())
    parts = [text(task.name.replace("/", ": ", 1), "h3"), text(", ".join(stamps), "p", "muted")]
    parts.append(_rows(task.columns, chosen))
    if others:
        parts.append(folded(f"{len(others)} further numbers", _rows(task.columns, others)))
    if task.classes:
        parts.append(folded("Class by class", _rows(task.columns, task.classes)))
    return "".join(parts)


def _rows(columns: Sequence[str], entries: Mapping[str, Mapping]) -> str:
    """Return a table; "chance" and "n" are those of a row's first column, others say theirs."""
    columns = [c for c in columns if any(c in row for row in entries.values())]
    head = "".join(text(c, "th") for c in ("", *columns, "chance", "n"))
    body = []
    for metric, row in entries.items():
        first = next(row[c] for c in columns if c in row)
        cells = "".join(f"<td>{_number(metric, row.get(c), first)}</td>" for c in columns)
        chance, n = digits(metric, first["chance"]), first["n"]
        strip = f"<td>{_strip(row, columns)}</td>"
        ends = text(chance, "td") + text(n, "td") + strip
        body.append(f"<tr>{text(metric.replace('_', ' '), 'td')}{cells}{ends}</tr>")
    head = f"<thead><tr>{head}<th></th></tr></thead>"
    return f'<div class="wide"><table>{head}<tbody>{"".join(body)}</tbody></table></div>'


def _number(metric: str, entry: Mapping | None, first: Mapping) -> str:
    """Return a cell; it says its n and level of guessing where they are not the first one's."""
    if entry is None:
        return ""
    value, low, high = (digits(metric, entry[key]) for key in ("value", "low", "high"))
    said = [] if low == "-" else [f"[{low}, {high}]"]
    own = digits(metric, entry["chance"])
    if own not in ("-", digits(metric, first["chance"])):
        said.append(f"chance {own}")
    if entry["n"] != first["n"]:
        said.append(f"n {entry['n']}")
    return " ".join([value, *(f'<span class="range">{part}</span>' for part in said)])


def _strip(row: Mapping[str, Mapping], columns: Sequence[str]) -> str:
    """Draw values and intervals of a rate from 0 to 1: this run filled, controls hollow.

    The level of guessing is that of the row, of its first column.
    """
    values = [v for e in row.values() for v in (e["value"], e["low"], e["high"]) if v is not None]
    if not values or not 0 <= min(values) <= max(values) <= 1:
        return ""
    at = lambda share: 4 + share * (STRIP - 8)
    middle = TALL / 2
    parts = [f'<line x1="4" x2="{STRIP - 4}" y1="{middle}" y2="{middle}" stroke="var(--rule)"/>']
    chance = next(row[c] for c in columns if c in row)["chance"]
    if chance is not None:
        x = at(chance)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="3" y2="15" stroke="var(--muted)"/>')
    for column in reversed([c for c in columns if c in row]):
        entry, own = row[column], column == columns[0]
        if entry["value"] is None:
            continue
        ink = "var(--mark)" if own else "var(--other)"
        if entry["low"] is not None:
            ends = f'x1="{at(entry["low"]):.1f}" x2="{at(entry["high"]):.1f}"'
            width = 2.5 if own else 1
            parts.append(
                f'<line {ends} y1="{middle}" y2="{middle}" stroke="{ink}" stroke-width="{width}"/>'
            )
        fill = ink if own else "var(--ground)"
        where = f'cx="{at(entry["value"]):.1f}" cy="{middle}" r="3.5"'
        parts.append(
            f'<circle {where} fill="{fill}" stroke="{ink}"><title>{html.escape(column)}</title>'
            "</circle>"
        )
    return f'<svg viewBox="0 0 {STRIP} {TALL}" aria-hidden="true">{"".join(parts)}</svg>'
