"""GENERATED frontal chest radiographs with two-section reports: phantoms, not patients.

Every image is computed from a simple physical model of a chest, every report is composed from
tables of phrases, every patient is drawn from a random number generator. Nothing here describes a
person, and nothing trained on it is fit for clinical use. It exists so that the whole package runs,
and can be tested, without any download. The data card is README.md beside this file.
"""

import dataclasses
import hashlib
import re
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from medvlp_jax.config import UserError, nearest
from medvlp_jax.data import records
from medvlp_jax.data.datasets.cxr_phantom import generate, patients
from medvlp_jax.data.datasets.cxr_phantom.findings import MASK_BITS

TASKS = {"finding": list(generate.CLASSES)}
# One of these and nothing else, for methods that take one class a study: findings whose odds the
# table shifts, and that can be seen on small images.
DIAGNOSES = ("consolidation", "effusion", "pneumothorax", "cardiomegaly", "edema", "normal")
SPLITS = ("train", "validation", "test")
NUMBERED = re.compile(r"n(\d{1,9})_seed(\d{1,9})_(\d{1,9})px")
SMALLEST, LARGEST = 64, 1024  # image sizes at which ribs and vessels still make sense


@dataclasses.dataclass(eq=False, kw_only=True)
class Config(tfds.core.BuilderConfig):
    """A phantom population; a patient has 1.8 studies on average.

    Attributes:
      num_patients: in all splits together.
      seed: of the population; equal seeds share their first patients.
      size: of the square images, pixels.
      one_class: only studies of one of DIAGNOSES, as the task "diagnosis".
    """

    num_patients: int
    seed: int = 0
    size: int = 256
    one_class: bool = False


def make_config(num_patients: int, seed: int = 0, size: int = 256) -> Config:
    """Return the builder config of any population, named after its numbers.

    Raises:
      UserError: for a number out of range.
    """
    if num_patients < 1 or seed < 0:
        raise UserError(
            f"cxr_phantom got {num_patients} patients and seed {seed}; accepted are at least "
            "1 patient and a seed of at least 0."
        )
    if not SMALLEST <= size <= LARGEST:
        raise UserError(
            f"cxr_phantom got image size {size}; accepted are {SMALLEST} to {LARGEST} pixels."
        )
    return Config(
        name=f"n{num_patients}_seed{seed}_{size}px",
        description=f"Generated: {num_patients} patients, seed {seed}, {size} x {size} pixels.",
        num_patients=num_patients,
        seed=seed,
        size=size,
    )


def config_named(name: str) -> Config:
    """Return the builder config of the population whose numbers a name tells, as `make_config`'s.

    Raises:
      UserError: for another name, or a number out of range.
    """
    if not (found := NUMBERED.fullmatch(name)):
        known = [config.name for config in Builder.BUILDER_CONFIGS]
        raise UserError(
            f"cxr_phantom has no builder config '{name}'. {nearest(name, known)} Any other "
            "population is named by its numbers: n2400_seed7_256px for 2,400 patients."
        )
    return make_config(*map(int, found.groups()))


def split_of(patient_id: str) -> str:
    """Return the split of a patient: 80/10/10 by a hash of the id, whatever the population size."""
    bucket = int(hashlib.sha256(patient_id.encode()).hexdigest(), 16) % 10
    return SPLITS[max(0, bucket - 7)]


class Builder(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of `cxr_phantom`."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = (
        dataclasses.replace(
            make_config(2800), name="demo", description="Generated: about 4,000 training images."
        ),
        dataclasses.replace(
            make_config(110, size=128), name="tiny", description="Generated: about 200 images."
        ),
        dataclasses.replace(
            make_config(2000, seed=3, size=96),
            name="clinic",
            description="Generated: about 2,200 training images of one diagnosis each.",
            one_class=True,
        ),
        dataclasses.replace(
            make_config(90, seed=3, size=64),
            name="clinic_tiny",
            description="Generated: about 100 images of one diagnosis each.",
            one_class=True,
        ),
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=records.features(tasks=self._tasks, table=patients.TABLE),
            metadata=records.metadata(
                tasks=self._tasks, mask_bits=MASK_BITS, table=patients.TABLE, generated=True
            ),
        )

    @property
    def _tasks(self):
        return {"diagnosis": list(DIAGNOSES)} if self.builder_config.one_class else TASKS

    def _split_generators(self, dl_manager):
        # A few patients may leave a split empty, which TFDS does not write.
        config = self.builder_config
        ids = (who.id for who in patients.population(config.seed, config.num_patients))
        found = set()
        while len(found) < len(SPLITS) and (patient_id := next(ids, "")):
            found.add(split_of(patient_id))
        return {split: self._generate_examples(split) for split in SPLITS if split in found}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict]]:
        config = self.builder_config
        for who in patients.population(config.seed, config.num_patients):
            if split_of(who.id) != split:
                continue
            for number in range(who.visits):
                if config.one_class and not diagnosis(patients.visit(config.seed, who, number)):
                    continue
                study = generate.study(config.seed, who, number, config.size)
                yield study.id, to_record(study, one_class=config.one_class)


def diagnosis(visit: patients.Visit) -> str:
    """Return the one of DIAGNOSES a visit is of; "" where it is of several or of none."""
    names = visit.findings or ("normal",)
    return names[0] if len(names) == 1 and names[0] in DIAGNOSES else ""


def to_record(study: generate.Study, *, one_class: bool = False) -> dict:
    """Return the record of one generated study, labelled with its findings or its diagnosis."""
    labels = {"finding": study.labels.astype(np.int8)}
    if one_class:
        name = study.found[0].name if study.found else "normal"
        labels = {"diagnosis": records.one_hot(name, DIAGNOSES)}
    return records.record(
        image=generate.encode_jpeg(study.image),
        image_id=study.id,
        patient_id=study.patient_id,
        study_id=study.id,
        findings=study.report.findings,
        impression=study.report.impression,
        labels=labels,
        boxes=study.boxes,
        mask=records.encode_mask(study.mask),
        table=study.table,
    )
