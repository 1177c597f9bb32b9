"""How right are LGDEA's relations? What related reports say of unpaired images, beside the truth.

  python benchmarks/relations.py RUN [RUN ...] [--out FILE.json]

RUN is a run of LGDEA that has its checkpoint. Its corpus knows the findings of every image and of
every report, which training never sees. An image without a pair is given the findings of the
reports it is related to, by weight. A row has the mean AUROC over findings of what it was given,
and how often the least and the most favoured finding were given over how often they are there,
images weighing as much as they are trusted: a model that learns from relations becomes what they
favour. Each row relates with other settings of the recipe. The last two do not relate, they ask the
model: the mean over reports by softmax of their cosine to the image in the joint space.
"""

import argparse
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from absl import flags

from medvlp_jax import assemble, cli, unpaired, weights
from medvlp_jax.evaluation import metrics
from medvlp_jax.writing import replaced

TASK = "finding"
SPECIFIED = {"near_reports": 0, "neighbours": 10, "hops": 5, "kept": 50, "related": 10}
ROWS = {
    "as specified: the pairs, 10 neighbours, 5 hops, 10 reports": SPECIFIED,
    "the same, 30 neighbours, 50 reports": {**SPECIFIED, "neighbours": 30, "related": 50},
    "the same, 200 entries kept, 200 reports": {
        **SPECIFIED,
        **{"neighbours": 30, "kept": 200, "related": 200},
    },
    "`near_reports=50`, no hop": {**SPECIFIED, "near_reports": 50, "hops": 0, "related": 50},
    "`near_reports=50`, one hop, 100 reports: the study": {
        **SPECIFIED,
        **{"near_reports": 50, "hops": 1, "kept": 100, "related": 100},
    },
    "`near_reports=50`, three hops, 200 kept, 50 reports": {
        **SPECIFIED,
        **{"near_reports": 50, "hops": 3, "kept": 200, "related": 50},
    },
    "`near_reports=300`, no hop, 300 reports": {
        **SPECIFIED,
        **{"near_reports": 300, "hops": 0, "kept": 300, "related": 300},
    },
}
ALL, NEAREST = "the joint space, all reports", "the joint space, its 50 nearest, hubs and all"


def right(given: np.ndarray, truth: np.ndarray) -> float:
    """Return the mean AUROC over findings of what images [N, F] were given."""
    return float(np.mean([metrics.auroc(truth[:, f], given[:, f]) for f in range(truth.shape[1])]))


def favour(given: np.ndarray, truth: np.ndarray, trust: np.ndarray) -> tuple[float, float]:
    """Return how often the least and the most favoured finding were given over being there.

    Args:
      given: to images [N, F].
      truth: [N, F].
      trust: weight of an image [N].
    """
    share = np.average(given, 0, trust) / truth.mean(0)
    return float(share.min()), float(share.max())


def asked(cosine: np.ndarray, told: np.ndarray, *, temperature: float, most: int = 0) -> np.ndarray:
    """Return the mean findings [N, F] of reports by softmax of their cosine [N, R].

    Args:
      cosine: of images and reports.
      told: findings of the reports [R, F].
      temperature: of the softmax.
      most: of the nearest reports; 0 takes all.
    """
    if most:
        cosine = np.where(cosine >= np.sort(cosine, 1)[:, -most, None], cosine, -np.inf)
    share = np.exp((cosine - cosine.max(1, keepdims=True)) / temperature)
    return share / share.sum(1, keepdims=True) @ told


def row(given, truth, trust) -> tuple[float, float, float]:
    """Return AUROC, least and most favoured; where no image is trusted all count alike."""
    trust = trust if trust.any() else np.ones(len(trust))
    return right(given, truth), *favour(given, truth, trust)


def measure(run: pathlib.Path) -> dict[str, tuple[float, float, float]]:
    """Return every row of one run: AUROC, least and most."""
    config = assemble.read_config(run)
    # All features are needed, whichever relations the run was trained with.
    config["recipe"]["near_reports"] = min(50, config["recipe"]["kept"])
    parts = assemble.parts(config, pretrained=False)
    variables = weights.read_variables(run, assemble.initial_variables(parts))
    source = assemble.open_corpora(config["data"], config["data"]["split"])[0]
    found, recipe = unpaired.pools(parts, [source]), parts.recipe
    encode = unpaired.encoder(parts, source)
    images = encode(variables, found.images, ("image",), recipe.described)
    reports = encode(variables, found.reports, recipe.told_by, recipe.told)
    known = lambda rows: np.stack([source[int(row)]["labels"][TASK] for row in rows]) == 1
    truth, told, pairs = known(found.images), known(found.reports), len(found.pairs)
    rows = {}
    for title, settings in ROWS.items():
        made = recipe.clone(**settings).refresh(images, reports, pairs)
        weight, column, trust = (
            np.asarray(made[name])[pairs:] for name in ("weight", "column", "confidence")
        )
        given = np.einsum("im,imf->if", weight, told[column].astype(float))
        rows[title] = row(given, truth[pairs:], trust)
    cosine = images["image_joint"][pairs:] @ reports["text_joint"].T
    ask = functools.partial(asked, cosine, told, temperature=recipe.alignment_temperature)
    for title, most in {ALL: 0, NEAREST: 50}.items():
        rows[title] = row(ask(most=most), truth[pairs:], np.ones(len(cosine)))
    return rows


def table(runs: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Lay the runs side by side."""
    lines = [f"| | {' | '.join(runs)} |", f"|---|{'---|' * len(runs)}"]
    for title in next(iter(runs.values())):
        found = (rows[title] for rows in runs.values())
        cells = (f"{auroc:.3f} ({least:.2f}-{most:.2f})" for auroc, least, most in found)
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every run, print the table, and keep the numbers where --out says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=pathlib.Path, help="run folders")
    parser.add_argument("--out", type=pathlib.Path, help="file that gets every number as JSON")
    arguments = parser.parse_args(argv)
    flags.FLAGS.mark_as_parsed()
    runs = {run.name: measure(run.absolute()) for run in arguments.runs}
    if arguments.out:
        with replaced(arguments.out) as temporary:
            temporary.write_text(json.dumps(runs, indent=1) + "\n")
    print(table(runs))


if __name__ == "__main__":
    cli.leave(cli.run(main))
