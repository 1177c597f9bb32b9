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
    """Cases of each split; the splits are of three populations."""

    counts: tuple[int, int, int]


class Builder(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of `men_phantom`."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = (
        Config(name="demo", description="Generated: 360 training cases.", counts=(360, 90, 90)),
        Config(name="tiny", description="Generated: 6 training cases.", counts=(6, 3, 3)),
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=records.features(tasks=TASKS, table=SCHEMA, images=IMAGES),
            metadata=records.metadata(tasks=TASKS, table=SCHEMA, images=IMAGES, generated=True),
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator:
        seed = SPLITS.index(split)
        for number in range(self.builder_config.counts[seed]):
            name = f"{split}{number}"
            yield name, to_record(name, generate.case(seed, number))


def to_record(name: str, case: generate.Case) -> dict:
    """Return the record of a case; `image` is three slices of `t1` side by side, for the eye."""
    layers = [case.volumes["t1"][..., round(f * generate.SLICES)] for f in (0.3, 0.5, 0.7)]
    picture = np.clip(np.concatenate(layers, axis=1) / 1200 * 255, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=90)
    return records.record(
        image=buffer.getvalue(),
        images={key: records.encode_volume(volume) for key, volume in case.volumes.items()},
        image_id=name,
        patient_id=name,
        study_id=name,
        labels={"grade": records.one_hot(generate.CLASSES[case.label], generate.CLASSES)},
        table=case.table,
    )
