"""A page of generated radiographs with their findings, boxes and impressions, for looking at."""

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw

from medvlp_jax.data.datasets.cxr_phantom import generate
from medvlp_jax.writing import replaced

CAPTION = 46  # pixels under each image
COLOUR = (255, 214, 10)


def contact_sheet(
    path: str | Path, n: int = 36, seed: int = 0, *, size: int = 256, boxes: bool = True
) -> None:
    """Write the first n studies of population `seed` as one PNG.

    Args:
      path: of the PNG.
      n: number of studies.
      seed: of the population.
      size: of each image, pixels.
      boxes: whether to draw the boxes.
    """
    columns = min(6, n)
    rows = -(-n // columns)
    sheet = Image.new("RGB", (columns * size, rows * (size + CAPTION)))
    for i, study in enumerate(generate.first(n, seed, size)):
        corner = (i % columns * size, i // columns * (size + CAPTION))
        sheet.paste(_tile(study, boxes=boxes), corner)
    with replaced(path) as scratch:
        sheet.save(scratch, "PNG")


def _tile(study: generate.Study, *, boxes: bool) -> Image.Image:
    """One study: its radiograph above its findings and its impression."""
    size = study.image.shape[0]
    tile = Image.new("RGB", (size, size + CAPTION))
    tile.paste(Image.fromarray(study.image), (0, 0))
    draw = ImageDraw.Draw(tile)
    for (top, left, bottom, right), _ in study.boxes if boxes else ():
        draw.rectangle([left * size, top * size, right * size, bottom * size], outline=COLOUR)
    names = ", ".join(f"{f.name} {f.side}".strip() for f in study.found) or "normal"
    words = study.report.impression or study.report.findings
    lines = [names, *textwrap.wrap(words, width=size // 6, max_lines=3)]
    for i, line in enumerate(lines):
        draw.text((2, size + 11 * i), line, fill=COLOUR if i == 0 else (235, 235, 235))
    return tile
