"""Generated volumes of three sequences with a table, in the shapes of CFCML's MEN data.

No source folder is needed. What decides the label is told in generate.py.
"""

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from medvlp_jax.data import records, tabular
from medvlp_jax.data.datasets.men_phantom import generate

TASKS = {"grade": generate.CLASSES}
SCHEMA = tabular.read_schema(Path(__file__).with_name("table.json"))
IMAGES = {name: {"slices": generate.SLICES} for name in generate.SEQUENCES}
SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(eq=False, kw_only=True)
class Config(tfds.core.BuilderConfig):
    """Cases of each split; the splits are of three populations.

    Attributes:
      counts: of training, validation and test.
      flat: one slice of each sequence through all three masses, an image each.
    """

    counts: tuple[int, int, int]
    flat: bool = False


class Builder(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of `men_phantom`."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = (
        Config(name="demo", description="Generated: 360 training cases.", counts=(360, 90, 90)),
        Config(name="tiny", description="Generated: 6 training cases.", counts=(6, 3, 3)),
        Config(
            name="flat",
            description="Generated: 360 training cases of three images.",
            counts=(360, 90, 90),
            flat=True,
        ),
        Config(
            name="flat_many",
            description="Generated: 3,600 training cases of three images.",
            counts=(3600, 300, 900),
            flat=True,
        ),
        Config(
            name="flat_tiny",
            description="Generated: 24 training cases of three images.",
            counts=(24, 6, 6),
            flat=True,
        ),
    )

    @property
    def _images(self):
        return {name: {} for name in IMAGES} if self.builder_config.flat else IMAGES

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=records.features(tasks=TASKS, table=SCHEMA, images=self._images),
            metadata=records.metadata(
                tasks=TASKS, table=SCHEMA, images=self._images, generated=True
            ),
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator:
        seed = SPLITS.index(split)
        for number in range(self.builder_config.counts[seed]):
            name = f"{split}{number}"
            flat = self.builder_config.flat
            yield name, to_record(name, generate.case(seed, number, flat=flat), flat=flat)


def to_record(name: str, case: generate.Case, *, flat: bool = False) -> dict:
    """Return the record of a case; `image` is slices of `t1` side by side, for the eye."""
    first = case.volumes["t1"]
    layers = [first[..., int(f * first.shape[-1])] for f in ((0,) if flat else (0.3, 0.5, 0.7))]
    encode = records.encode_volume
    if flat:
        encode = lambda volume: _picture(volume[..., 0])
    return records.record(
        image=_picture(np.concatenate(layers, axis=1)),
        images={key: encode(volume) for key, volume in case.volumes.items()},
        image_id=name,
        patient_id=name,
        study_id=name,
        labels={"grade": records.one_hot(generate.CLASSES[case.label], generate.CLASSES)},
        table=case.table,
    )


def _picture(pixels: np.ndarray) -> bytes:
    """Return intensities as a grey JPEG."""
    grey = np.clip(pixels / 1200 * 255, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
