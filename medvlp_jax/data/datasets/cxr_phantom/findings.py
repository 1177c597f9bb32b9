"""Eight findings: where each lies, how large it is, and which anatomy it moves.

A finding's `severity` runs from 0 (barely there) to 1 and sets how much lung is filled, how far the
pleura has come off, how wide the heart is. `size` is in cm: the diameter of a nodule, mass or
consolidation, the height of an effusion above the costophrenic angle, the depth of a pneumothorax
at the apex, the length of an atelectatic band; 0 for cardiomegaly and edema. What each looks like
is in `signs`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from medvlp_jax.data.datasets.cxr_phantom.anatomy import SIDES, Anatomy

FINDINGS = (
    "consolidation",
    "effusion",
    "pneumothorax",
    "nodule",
    "mass",
    "cardiomegaly",
    "atelectasis",
    "edema",
)
ZONES = ("upper", "mid", "lower")
# Bit of each region in the mask. Nodule and mass share one; the heart stands for cardiomegaly,
# and edema is too diffuse to outline.
MASK_BITS = {
    "lung_right": 0,
    "lung_left": 1,
    "heart": 2,
    "consolidation": 3,
    "effusion": 4,
    "pneumothorax": 5,
    "lesion": 6,
    "atelectasis": 7,
}
REGION = {"nodule": "lesion", "mass": "lesion"}  # mask region, where it is not the name itself
SIZES = {  # cm at severity 0 and 1
    "consolidation": (4.0, 11.0),
    "effusion": (2.2, 12.0),
    "pneumothorax": (1.2, 6.0),
    "nodule": (1.6, 2.9),
    "mass": (3.2, 7.0),
    "cardiomegaly": (0.0, 0.0),
    "atelectasis": (5.0, 9.0),
    "edema": (0.0, 0.0),
}
# Zones of one side that have to be free for these; the others take any one zone.
_NEEDS = {"effusion": ("lower",), "pneumothorax": ("upper", "mid"), "atelectasis": ("lower",)}


class Finding(NamedTuple):
    """One finding of a study; the patient's side, "bilateral", or "" for the heart."""

    name: str
    side: str
    zone: str
    size: float
    severity: float


def draw_findings(rng: np.random.Generator, names: Sequence[str]) -> tuple[Finding, ...]:
    """Give each named finding a side, zone, size and severity; no two share a place."""
    free = [(side, zone) for side in SIDES for zone in ZONES]
    found = []
    # Those that fill a fixed place choose first.
    for name in sorted(names, key=lambda n: (n not in _NEEDS, FINDINGS.index(n))):
        severity = float(rng.beta(2.0, 1.8))
        low, high = SIZES[name]
        size = round(low + (high - low) * severity, 1)
        side, zone = _place(rng, name, free)
        taken = _occupied(name, zone, size)
        free = [(s, z) for s, z in free if side not in (s, "bilateral") or z not in taken]
        found.append(Finding(name, side, zone, size, severity))
    return tuple(sorted(found, key=lambda f: FINDINGS.index(f.name)))


def _occupied(name: str, zone: str, size: float) -> tuple[str, ...]:
    """Zones in which nothing else could be seen beside this finding."""
    if name == "pneumothorax":
        return ZONES
    if name == "effusion":
        return ZONES[1:] if size > 7 else ("lower",)
    return (zone,)


def _place(rng, name: str, free: list[tuple[str, str]]) -> tuple[str, str]:
    """Choose (side, zone) among the free places."""
    if name == "cardiomegaly":
        return "", ""
    if name == "edema":
        return "bilateral", ""
    needs = _NEEDS.get(name)
    if needs:
        sides = [s for s in SIDES if all((s, z) in free for z in needs)] or list(SIDES)
        both = name == "effusion" and len(sides) == 2 and rng.random() < 0.25
        side = "bilateral" if both else sides[rng.integers(len(sides))]
        return side, {"pneumothorax": "upper"}.get(name, "lower")
    return free[rng.integers(len(free))]


def alter(a: Anatomy, findings: Sequence[Finding]) -> Anatomy:
    """Change the anatomy that findings move: heart, diaphragm, mediastinum."""
    for f in findings:
        if f.name == "cardiomegaly":
            a = a._replace(heart_ratio=0.535 + 0.135 * f.severity)
        elif f.name == "atelectasis":  # volume loss raises the diaphragm
            raised = 0.8 + 1.8 * f.severity
            a = a._replace(
                dome=tuple(d - raised * (s == f.side) for s, d in zip(SIDES, a.dome, strict=True))
            )
        elif f.name == "pneumothorax":  # a large one pushes the mediastinum away
            away = 1 if f.side == "right" else -1
            a = a._replace(turn=a.turn + away * max(0.0, f.severity - 0.5) * 1.2)
    return a
