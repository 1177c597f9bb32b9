"""Where time and memory go when 25,596 radiographs are evaluated with 14 findings.

  python -m benchmarks.evaluation_scale [--images 25596] [--folder runs/evaluation_scale]
      [--out FILE.json]

A folder in the layout of NIH ChestX-ray14 with the official number of test images, 200 generated
radiographs under many names, is prepared, and a CLIP with random weights (ViT-Ti/32, 224 pixels)
evaluated on it by `medvlp evaluate` in this process. A thread looks on: which of our functions the
main thread is in every 10 ms, and how much memory the process holds. Its AUROCs mean nothing.
"""

import argparse
import collections
import os
import pathlib
import shutil
import sys
import threading
import time

import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks import studies
from medvlp_jax import cli, evaluate
from medvlp_jax.data import corpora, cxr_labels, text
from medvlp_jax.data.datasets.cxr_phantom import generate
from medvlp_jax.data.datasets.nih_cxr14 import nih_cxr14_dataset_builder as nih

PACKAGE = str(pathlib.Path(evaluate.__file__).parent)
FEATURES = "evaluation/features.py"
EVERY = 0.01  # seconds between two looks
DIFFERENT = 200  # patients; their images recur under other names
TEXT = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"intermediate_size": 256, "eos_token_id": 3, "max_position_embeddings": 24}
VISION = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3}
VISION |= {"intermediate_size": 768, "image_size": 224, "patch_size": 32}


class Watch(threading.Thread):
    """Looks at another thread until it is told to stop.

    Attributes:
      looks: (function of ours it was in, bytes held by the process), in order.
    """

    def __init__(self, watched: int):
        """Watch the thread with this identity."""
        super().__init__(daemon=True)
        self.watched, self.looks, self.done = watched, [], threading.Event()

    def run(self):
        """Look, until `done` is set."""
        page = os.sysconf("SC_PAGE_SIZE")
        while not self.done.wait(EVERY):
            frame = sys._current_frames().get(self.watched)
            while frame and not frame.f_code.co_filename.startswith(PACKAGE):
                frame = frame.f_back
            with open("/proc/self/statm") as file:
                held = int(file.read().split()[1]) * page
            where = "outside"
            if frame:
                inside = pathlib.Path(frame.f_code.co_filename).relative_to(PACKAGE)
                where = f"{inside}: {frame.f_code.co_name}"
            self.looks.append((where, held))


def make_corpus(folder: pathlib.Path, images: int, *, different: int = DIFFERENT) -> pathlib.Path:
    """Write a source folder of ChestX-ray14, unless it is there.

    Args:
      folder: to write.
      images: of the test split.
      different: of them; the others are these under other names.
    """
    if (folder / "test_list.txt").is_file():
        return folder
    (folder / "images").mkdir(parents=True, exist_ok=True)
    drawn = generate.studies(seed=0, num_patients=different, size=VISION["image_size"])
    originals = []
    for study in tqdm(drawn, desc="radiographs", unit="image"):
        originals.append(folder / f"original_{len(originals)}.png")
        Image.fromarray(np.asarray(study.image)).save(originals[-1])
    rng, rows, names = np.random.default_rng(0), [nih.HEADER], []
    for k in range(3 + images):  # the first patient is trained on
        names.append(f"{k // 3:08d}_{k % 3:03d}.png")  # three images a patient
        os.link(originals[k % len(originals)], folder / "images" / names[-1])
        found = [name for name in cxr_labels.NIH if rng.random() < 0.1] or ["No Finding"]
        rows.append(f"{names[-1]},{'|'.join(found)},{k % 3},{k // 3},58,M,PA,224,224,0.5,0.5")
    (folder / nih.ENTRIES.names[0]).write_text("\n".join(rows) + "\n")
    (folder / nih.LISTS["train"]).write_text("\n".join(names[:3]) + "\n")
    (folder / nih.LISTS["test"]).write_text("\n".join(names[3:]) + "\n")
    return folder


def make_encoder(folder: pathlib.Path) -> pathlib.Path:
    """Write a CLIPModel with random weights and the vocabulary of the generated reports."""
    import torch
    import transformers

    torch.manual_seed(0)
    vocabulary = text.load_tokenizer("cxr_phantom").get_vocab_size()
    config = transformers.CLIPConfig(
        text_config={**TEXT, "vocab_size": vocabulary}, vision_config=VISION, projection_dim=128
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    shutil.copy(text._VOCAB / "cxr_phantom" / "tokenizer.json", folder)
    return folder


def profile(looks: list[tuple[str, int]]) -> dict:
    """Return shares of the time by function, and the memory while images are read.

    Args:
      looks: of a `Watch`.
    """
    counted = collections.Counter(where for where, _ in looks)
    at = [k for k, (where, _) in enumerate(looks) if where.startswith(FEATURES)]
    reading = [held for _, held in looks[at[0] : at[-1] + 1]]
    tenths = [reading[(len(reading) - 1) * k // 10] for k in range(11)]
    return {
        "share": {where: count / len(looks) for where, count in counted.most_common(8)},
        "MiB_by_tenths_of_the_images": [round(held / 2**20) for held in tenths],
        "peak_MiB": round(max(held for _, held in looks) / 2**20),
    }


def table(found: dict) -> str:
    """Lay it out in Markdown."""
    lines = ["| where the main thread is | share |", "|---|---|"]
    lines += [f"| {where} | {share:.3f} |" for where, share in found["share"].items()]
    held = ", ".join(map(str, found["MiB_by_tenths_of_the_images"]))
    return "\n".join([*lines, "", f"MiB held at each tenth of the images: {held}"])


def main(argv: list[str] | None = None) -> None:
    """Make what is missing, evaluate, print and write the profile."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=25_596)
    parser.add_argument("--folder", type=pathlib.Path, default="runs/evaluation_scale")
    parser.add_argument("--out", type=pathlib.Path, help="file that gets every number as JSON")
    arguments = parser.parse_args(argv)
    source = make_corpus(arguments.folder / f"source-{arguments.images}", arguments.images)
    data = arguments.folder / f"data-{arguments.images}"
    corpora.prepare("nih_cxr14", data_dir=data, manual_dir=source, builder_config="official")
    encoder = make_encoder(arguments.folder / "clip")
    watch = Watch(threading.get_ident())
    watch.start()
    began = time.perf_counter()
    evaluate.main(
        [
            *("--encoder", str(encoder), "--corpus", "nih_cxr14:official", "--data-dir", str(data)),
            *("--protocol", "zero_shot", "--prompts", "chexzero-v1"),
            *("--out", str(arguments.folder / f"out-{arguments.images}")),
        ]
    )
    watch.done.set()
    watch.join()
    found = {"seconds": round(time.perf_counter() - began)} | profile(watch.looks)
    settings = {"images": arguments.images, "findings": len(cxr_labels.NIH)}
    if arguments.out:
        studies.keep(arguments.out, {"settings": settings, **found}, table(found))
    print(f"\n{table(found)}")


if __name__ == "__main__":
    cli.leave(cli.run(main))
