"""A phantom study from its three numbers: (seed, patient, study) fix every byte of a record."""

import io
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from medvlp_jax.data.datasets.cxr_phantom import anatomy, patients, render, reports
from medvlp_jax.data.datasets.cxr_phantom.findings import FINDINGS, Finding, draw_findings
from medvlp_jax.data.datasets.cxr_phantom.render import Box

CLASSES = (*FINDINGS, "normal")  # of the task "finding"; normal = none of the others


class Study(NamedTuple):
    """One generated study.

    Attributes:
      id: unique in the population, "<patient>-<study>".
      patient_id: equal for all studies of a patient.
      found: what the image shows.
      image: radiograph [H, W] uint8.
      mask: bit field [H, W] uint8, see findings.MASK_BITS.
      boxes: ((ymin, xmin, ymax, xmax), phrase from the report) of every outlined finding.
      report: both sections.
      table: the patient table, NaN = missing.
    """

    id: str
    patient_id: str
    found: tuple[Finding, ...]
    image: np.ndarray
    mask: np.ndarray
    boxes: tuple[tuple[Box, str], ...]
    report: reports.Report
    table: dict[str, float]

    @property
    def labels(self) -> np.ndarray:
        """Vector of 0 and 1 over CLASSES, int8."""
        names = {f.name for f in self.found} or {"normal"}
        return np.array([name in names for name in CLASSES], np.int8)


class Plan(NamedTuple):
    """A study before its image is taken, and the random numbers that will take it."""

    chest: anatomy.Anatomy
    found: tuple[Finding, ...]
    report: reports.Report
    table: dict[str, float]
    scene: np.random.Generator


def plan(seed: int, who: patients.Patient, number: int) -> Plan:
    """Decide everything about a study except its pixels: a hundred times faster than `study`."""
    visit = patients.visit(seed, who, number)
    body = patients.stream(seed, who.index, 0, "anatomy")
    scene = patients.stream(seed, who.index, number, "image")
    words = patients.stream(seed, who.index, number, "report")
    chest = anatomy.pose(anatomy.draw_anatomy(body, male=who.male, age=who.age), scene)
    found = draw_findings(scene, visit.findings)
    report = reports.draw_report(words, found, anatomy=chest, age=who.age)
    return Plan(chest, found, report, dict(visit.table), scene)


def study(seed: int, who: patients.Patient, number: int, size: int) -> Study:
    """Generate study `number` (0 .. who.visits - 1) of a patient.

    Args:
      seed: of the population.
      who: from `patients.patient(seed, index)`.
      number: of the study.
      size: of the image, pixels.
    """
    planned = plan(seed, who, number)
    picture = render.radiograph(planned.chest, planned.found, planned.scene, size)
    return Study(
        id=f"{who.id}-{number}",
        patient_id=who.id,
        found=planned.found,
        image=picture.image,
        mask=picture.mask,
        boxes=tuple((box, planned.report.phrases[i]) for i, box in picture.boxes),
        report=planned.report,
        table=planned.table,
    )


def studies(seed: int, num_patients: int, size: int) -> Iterator[Study]:
    """Yield every study of patients 0 .. num_patients - 1, patient by patient."""
    for who in patients.population(seed, num_patients):
        for number in range(who.visits):
            yield study(seed, who, number, size)


def first(n: int, seed: int, size: int) -> Sequence[Study]:
    """Return the first n studies of a population."""
    stream = studies(seed, n, size)  # n patients have at least n studies
    return [next(stream) for _ in range(n)]


def encode_jpeg(image: np.ndarray, quality: int = 90) -> bytes:
    """Return a grey image [H, W] uint8 as JPEG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
