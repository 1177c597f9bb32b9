"""Evidence extraction by rules on real reports, and the cost of LGDEA's relations.

    python benchmarks/evidence.py --openi=DIR [--out FILE.json]        agreement, speed
    python benchmarks/evidence.py --relations=20000 [--out FILE.json]  graph, propagation

Agreement: precision and recall of each finding against the headings that coders assigned, on the
split whose reports the words were chosen by and on the held-out one; with findings in doubt and
without. Speed: reports a second of one core's own time, from text to checked items, every report
once, and again with sentences that were met before taken from memory. Prints the table of
docs/lgdea.md and writes every number.
"""

import argparse
import csv
import json
import pathlib
import resource
import time

import numpy as np

from medvlp_jax import cli
from medvlp_jax.config import UserError
from medvlp_jax.data import reports
from medvlp_jax.data.datasets.cxr_phantom import generate, patients
from medvlp_jax.evidence import agreement, extract, rules, schema
from medvlp_jax.writing import replaced

SPLITS = ("train", "val")
INDEX, REPORTS = "index.csv", "ecgen-radiology.tgz"  # of Open-i


def findings(items, text, certainty):
    """Return the findings of a report, "normal" where there is none and it says so."""
    found = agreement.reported(items, certainty)
    return found if found or not rules.is_normal(text) else frozenset({"normal"})


def mesh_agreement(folder):
    """Return {split: {finding: counts}} with and without findings in doubt."""
    with (folder / INDEX).open() as file:
        split = {row["uid"]: row["split"] for row in csv.DictReader(file)}
    found = {}
    read = list(reports.read_reports(folder / REPORTS))
    read = [r for r in read if r.text and not set(r.headings) & set(agreement.UNINDEXED)]
    for name, certainty in (("all", ("present", "uncertain")), ("present", ("present",))):
        for part in SPLITS:
            pairs = [
                (
                    findings(rules.extract(r.text), r.text, certainty),
                    agreement.mesh_findings(r.headings),
                )
                for r in read
                if split[r.id] == part
            ]
            counts = agreement.compare(pairs, [*agreement.MESH, "normal"])
            found[f"{part}/{name}"] = {"reports": len(pairs), "counts": counts}
    return found


def phantom_agreement(count=2000, seed=900):
    """Return (sections, sections whose findings are exactly the true ones)."""
    sections = exact = 0
    for who in patients.population(seed, count):
        for number in range(who.visits):
            plan = generate.plan(seed, who, number)
            truth = {f.name for f in plan.found}
            for section in filter(None, plan.report[:2]):
                sections += 1
                exact += agreement.phantom_findings(rules.extract(section)) == truth
    return sections, exact


def speed(folder):
    """Return reports a second of process time: sentences new, and met before."""
    texts = [r.text for r in reports.read_reports(folder / REPORTS) if r.text]
    rates = {}
    for name in ("new", "met before"):
        if name == "new":
            rules._read.cache_clear()
        start = time.process_time()
        for text in texts:
            schema.parse(extract.write_rules(text), text)
        rates[name] = len(texts) / (time.process_time() - start)
    # Without any memory at all: the sentences of one report at a time.
    start = time.process_time()
    for text in texts:
        rules._read.cache_clear()
        schema.parse(extract.write_rules(text), text)
    rates["no memory"] = len(texts) / (time.process_time() - start)
    return rates


def totals(counts):
    """Return precision and recall over all findings but "normal"."""
    both, ours, theirs = (sum(c[i] for n, c in counts.items() if n != "normal") for i in range(3))
    return both / (both + ours), both / (both + theirs)


def table(found):
    """Return the markdown table, most frequent findings first."""
    lines = [
        "| finding | headings, train / held out | precision | recall | held out: precision "
        "| recall | certain only: precision | recall |",
        "|---|---|---|---|---|---|---|---|",
    ]
    train, val = found["train/all"]["counts"], found["val/all"]["counts"]
    sure = found["train/present"]["counts"]
    total = lambda c: c.both + c.reference_only
    for name in sorted(train, key=lambda n: -total(train[n])):
        cells = [f"{total(train[name])} / {total(val[name])}"]
        for counts in (train, val, sure):
            cells += [_cell(counts[name].precision), _cell(counts[name].recall)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    sums = [_cell(x) for counts in (train, val, sure) for x in totals(counts)]
    return "\n".join([*lines, "| **all findings** | | " + " | ".join(sums) + " |"])


def _cell(value):
    return "-" if value != value else f"{value:.2f}"


def relation_cost(count, prototypes=64, seeds=200, hops=5):
    """Return seconds and peak memory of graphs and propagation over count x count nodes."""
    import jax

    from medvlp_jax.losses import neighbours, relations

    rng = np.random.default_rng(0)
    base = rng.dirichlet(np.full(prototypes, 0.05), 50)
    draw = lambda: (
        base[rng.integers(0, 50, count)] * np.exp(0.5 * rng.normal(size=(count, prototypes)))
    )
    nodes = [q / q.sum(1, keepdims=True) for q in (draw(), draw())]
    seconds, graphs = {}, []
    for name, q in zip(("images", "reports"), nodes, strict=True):
        start = time.perf_counter()
        listed = jax.block_until_ready(neighbours.nearest(q.astype(np.float32), k=10))
        seconds[f"nearest {name}"] = time.perf_counter() - start
        start = time.perf_counter()
        graphs.append(neighbours.graph(listed))
        seconds[f"graph {name}"] = time.perf_counter() - start
    pairs = np.arange(seeds)
    begin = relations.seeds(pairs, pairs, images=count, top=50)
    start = time.perf_counter()
    spread = relations.propagate(begin, *graphs, reports=count, hops=hops)
    found = jax.block_until_ready(relations.relations(spread, pairs))
    seconds[f"{hops} hops"] = time.perf_counter() - start
    return {
        "nodes": count,
        "device": jax.devices()[0].device_kind,
        "seconds": seconds,
        "degree": [int(g.node.shape[1]) for g in graphs],
        "dropped_edges": [g.dropped for g in graphs],
        "related_images": float((np.asarray(found.weight).sum(1) > 0).mean()),
        "peak_GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def main(argv: list[str] | None = None) -> None:
    """Measure what is asked for, print it, and add it to the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--openi", type=pathlib.Path, help="folder of ecgen-radiology.tgz")
    parser.add_argument("--relations", type=int, default=0, help="images, and reports")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args(argv)
    results = {}
    if options.out and options.out.exists():
        results = json.loads(options.out.read_text())
    if options.openi:
        if missing := [name for name in (INDEX, REPORTS) if not (options.openi / name).is_file()]:
            raise UserError(
                f"--openi={options.openi} has no {' and no '.join(missing)}: name the folder of "
                f"Open-i's reports that holds {INDEX} and {REPORTS}."
            )
        found = mesh_agreement(options.openi)
        sections, exact = phantom_agreement()
        print(table(found))
        results["openi"] = {
            name: {
                "reports": entry["reports"],
                "precision_recall": totals(entry["counts"]),
                "findings": {n: c._asdict() for n, c in entry["counts"].items()},
            }
            for name, entry in found.items()
        }
        results["phantom"] = {"sections": sections, "exact": exact}
        results["reports_per_second"] = speed(options.openi)
        print(results["phantom"], results["reports_per_second"])
    if options.relations:
        results[f"relations/{options.relations}"] = relation_cost(options.relations)
        print(results[f"relations/{options.relations}"])
    if options.out:
        with replaced(options.out) as scratch:
            scratch.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    cli.leave(cli.run(main))
