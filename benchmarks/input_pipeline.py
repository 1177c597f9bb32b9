"""The input pipeline: images a second from encoded bytes, beside PIL, and what its position costs.

  python -m benchmarks.input_pipeline [--images 24] [--rounds 9] [--seconds 30] [--out FILE.json]

Images are generated radiographs (cxr_phantom) as grey JPEGs of quality 95, as records hold them.

parts      One thread, in the processor's time, by turns: PIL's decode to RGB and resize, which is
           what most loaders do, from 1,024 and 512 pixels; our decode to 256 from both; and decode
           with IMITATE's two views of 224 from 512. A ratio is the first one's time over another's.
pipeline   The loader of a run (data/pipeline.py) from 512-pixel records: two views and the tokens
           of two sections, for 1 to twice as many threads as cores. A ratio is images a second over
           those of one thread.
position   Microseconds to ask for the position and write it as JSON, which a step costs if every
           one is saved, and to set it; and how long the first batch then takes.
"""

import argparse
import functools
import io
import json
import os
import pathlib
import time
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from benchmarks import check, origin
from medvlp_jax import bench, cli
from medvlp_jax.data import pipeline, text, transforms
from medvlp_jax.data.datasets.cxr_phantom import generate

LARGE, SMALL = 1024, 512
SIZE, CROP = 256, 224  # IMITATE's released code
QUALITY = 95
BATCH = 64
LENGTH = 128  # tokens a section
BASE = f"PIL RGB {LARGE}"


def radiographs(count: int, large: int = LARGE, small: int = SMALL) -> list[dict]:
    """Generate records; `large` and `small` are encoded images of these sides."""
    return [
        {
            "large": generate.encode_jpeg(study.image, QUALITY),
            "image": generate.encode_jpeg(shrunk(study.image, small), QUALITY),
            "text_id": study.id,
            "findings": study.report.findings,
            "impression": study.report.impression,
        }
        for study in generate.first(count, 0, large)
    ]


def shrunk(image: np.ndarray, side: int) -> np.ndarray:
    """Resize as `medvlp data prepare` does where it stores images smaller."""
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS))


def by_pil(encoded: bytes) -> np.ndarray:
    """Decode as loaders usually do."""
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR))


decode = functools.partial(transforms.decode, size=SIZE)
view = functools.partial(transforms.imitate_view, size=CROP)


def two_views(encoded: bytes, seed: int = 0) -> list[np.ndarray]:
    """Decode and draw IMITATE's two views."""
    image, rng = decode(encoded), np.random.default_rng(seed)
    return [view(image, rng), view(image, rng)]


def arms(records: Sequence[dict]) -> dict[str, Callable]:
    """Return what is measured, each () -> None over all records."""

    def over(key, work):
        return lambda: [work(record[key]) for record in records]

    return {
        BASE: over("large", by_pil),
        f"ours {LARGE}": over("large", decode),
        f"PIL RGB {SMALL}": over("image", by_pil),
        f"ours {SMALL}": over("image", decode),
        f"ours {SMALL}, two views": over("image", two_views),
    }


def parts(records: Sequence[dict], rounds: int) -> dict:
    """Measure each part by turns: images a second of one core, and ratios over BASE."""
    works = arms(records)
    seconds = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            began = time.process_time()
            work()
            if turn:  # the first warms up
                seconds[name].append((time.process_time() - began) / len(records))
    pairs = {name: zip(seconds[BASE], own, strict=True) for name, own in seconds.items()}
    return {
        "images_per_second": {name: 1 / float(np.median(own)) for name, own in seconds.items()},
        "ratios": {
            name: check.entry(a / b for a, b in pair)
            for name, pair in pairs.items()
            if name != BASE
        },
    }


def loader(records: Sequence[dict], threads: int, batch_size: int = BATCH):
    """Return the iterator of a run's batches: two views, tokens of two sections."""
    transform = pipeline.record_transform(
        inputs=("image", "image_2", "findings", "impression"),
        decode=decode,
        view=view,
        tokenizer=text.load_tokenizer("cxr_phantom"),
        lengths={"findings": LENGTH, "impression": LENGTH},
    )
    options = {"batch_size": batch_size, "seed": 0, "threads": threads, "prefetch": threads}
    return iter(pipeline.train_dataset([records], transform=transform, **options))


def whole(records: Sequence[dict], *, seconds: float, rounds: int, batch_size: int = BATCH) -> dict:
    """Measure the pipeline with more and more threads, by turns."""
    cores = len(os.sched_getaffinity(0))
    counts = sorted({1, cores, 2 * cores})
    rates = {count: [] for count in counts}
    for _ in range(rounds):
        for count in counts:
            batches = functools.partial(next, loader(records, count, batch_size))
            how = {"threads": count, "images": 1, "ahead": count, "seconds": seconds / rounds}
            rates[count].append(bench.rate_of(batches, **how))
    pick = lambda count, field: [getattr(rate, field) for rate in rates[count]]
    rows = [
        {
            "threads": count,
            "images_per_second": float(np.median(pick(count, "images"))),
            "images_per_second_per_core": float(np.median(pick(count, "images_per_core"))),
        }
        for count in counts
    ]
    scaling = {
        f"{count} threads": check.entry(
            many / one for many, one in zip(pick(count, "images"), pick(1, "images"), strict=True)
        )
        for count in counts[1:]
    }
    return {"cores": cores, "rows": rows, "ratios": scaling}


def position(records: Sequence[dict], repeats: int, batch_size: int = BATCH) -> dict[str, float]:
    """Measure what the position in the stream costs: medians, in microseconds."""
    batches = loader(records, 2, batch_size)
    spent = {"save": [], "set": [], "next batch, set": [], "next batch": []}

    def measured(name, work):
        began = time.perf_counter()
        result = work()
        spent[name].append(1e6 * (time.perf_counter() - began))
        return result

    next(batches)
    for _ in range(repeats):
        measured("next batch", lambda: next(batches))
        said = measured("save", lambda: json.dumps(batches.get_state()))
        measured("set", lambda said=said: batches.set_state(json.loads(said)))
        measured("next batch, set", lambda: next(batches))
    return {name: float(np.median(times)) for name, times in spent.items()}


def table(found: dict) -> str:
    """Lay everything out as markdown."""
    lines = ["| one thread | images/s a core | ratio |", "|---|---:|---:|"]
    for name, rate in found["parts"]["images_per_second"].items():
        ratio = found["parts"]["ratios"].get(name)
        lines.append(f"| {name} | {rate:,.0f} | {check.text(ratio) if ratio else 1} |")
    lines += ["", "| threads | images/s | images/s a core | ratio |", "|---:|---:|---:|---:|"]
    for row in found["pipeline"]["rows"]:
        ratio = found["pipeline"]["ratios"].get(f"{row['threads']} threads")
        rates = f"{row['images_per_second']:,.0f} | {row['images_per_second_per_core']:,.0f}"
        lines.append(f"| {row['threads']} | {rates} | {check.text(ratio) if ratio else 1} |")
    lines += ["", "position, microseconds: "]
    lines[-1] += ", ".join(f"{name} {spent:,.0f}" for name, spent in found["position"].items())
    return "\n".join(lines)


def main(argv=None) -> dict:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=30.0, help="for each number of threads")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args(argv)
    records = radiographs(options.images)
    found = {
        "device": "cpu",
        "threads": len(os.sched_getaffinity(0)),
        "batch_size": BATCH,
        "images": options.images,
        "measured": origin.measured("numpy", "pillow", "grain"),
        "bytes": {key: int(np.mean([len(r[key]) for r in records])) for key in ("large", "image")},
        "parts": parts(records, options.rounds),
        "pipeline": whole(records, seconds=options.seconds, rounds=options.rounds),
        "position": position(records, repeats=20),
    }
    print(table(found))
    if options.out:
        check.keep(options.out, found)
    return found


if __name__ == "__main__":
    cli.leave(cli.run(main))
