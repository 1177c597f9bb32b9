"""Write a contact sheet of generated chest radiographs, or measure the generator's speed.

Example: python -m medvlp_jax.data.datasets.cxr_phantom --out sheet.png --n 36 --seed 0
"""

import argparse
import sys
import time
from collections.abc import Sequence

from medvlp_jax.data.datasets.cxr_phantom import generate
from medvlp_jax.data.datasets.cxr_phantom.contact_sheet import contact_sheet


def main(argv: Sequence[str]) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m medvlp_jax.data.datasets.cxr_phantom",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", default="", help="PNG to write; none for no sheet")
    parser.add_argument("--n", type=int, default=36, help="number of studies (default: 36)")
    parser.add_argument("--seed", type=int, default=0, help="of the population (default: 0)")
    parser.add_argument("--size", type=int, default=256, help="image pixels (default: 256)")
    parser.add_argument("--no-boxes", action="store_true", help="leave the boxes out")
    parser.add_argument("--speed", action="store_true", help="print images a second, one process")
    options = parser.parse_args(argv)
    if not options.out and not options.speed:
        parser.error("give --out sheet.png, --speed, or both")
    if options.out:
        contact_sheet(
            options.out, options.n, options.seed, size=options.size, boxes=not options.no_boxes
        )
    if options.speed:
        print(f"{images_per_second(options.n, options.seed, options.size):.0f} images/s")
    return 0


def images_per_second(n: int, seed: int, size: int) -> float:
    """Generate and JPEG-encode n studies after a warm-up that fills the banks; CPU time."""
    generate.first(40, seed, size)
    start = time.process_time()
    for study in generate.first(n, seed, size):
        generate.encode_jpeg(study.image)
    return n / (time.process_time() - start)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
