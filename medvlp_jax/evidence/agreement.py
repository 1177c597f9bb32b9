"""How far extracted evidence agrees with what is known of a report: precision and recall a finding.

Two references. The phantom's generator knows its findings; there `rules` has to be exact. The
Open-i reports carry MeSH headings that two coders assigned by hand (Demner-Fushman et al. 2016,
doi 10.1093/jamia/ocv080); `MESH` says which headings are which finding. Coders index what they
think is worth finding, so that a precision below one is also a finding they did not index.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

# The phantom's eight findings by the names the extractor gives them.
PHANTOM = {
    "consolidation": ("consolidation", "airspace disease", "airspace opacity", "pneumonia"),
    "effusion": ("effusion",),
    "pneumothorax": ("pneumothorax",),
    "nodule": ("nodule",),
    "mass": ("mass",),
    "cardiomegaly": ("cardiomegaly",),
    "atelectasis": ("atelectasis",),
    "edema": ("edema",),
}
# Finding -> pattern of a MeSH heading ("Opacity/lung/base/left") that means it. Headings that mean
# several things are in several rows.
MESH = {
    "cardiomegaly": r"cardiomegaly|cardiac shadow/(?:enlarged|borderline)|heart/.*enlarged",
    "opacity": r"opacity|density",
    "atelectasis": r"pulmonary atelectasis",
    "effusion": r"pleural effusion|hydropneumothorax",
    "pneumothorax": r"pneumothorax|hydropneumothorax|hemopneumothorax",
    "airspace disease": r"airspace disease",
    "consolidation": r"consolidation",
    "infiltrate": r"infiltrate",
    "pneumonia": r"pneumonia",
    "nodule": r"nodule",
    "mass": r"mass(?:/|$)",
    "edema": r"pulmonary edema",
    "congestion": r"pulmonary congestion",
    "heart failure": r"heart failure",
    "granuloma": r"calcified granuloma|granuloma(?:/|$)",
    "granulomatous disease": r"granulomatous disease",
    "calcification": r"calcinosis",
    "atherosclerosis": r"atherosclerosis",
    "scar": r"cicatrix",
    "fibrosis": r"pulmonary fibrosis|fibrosis",
    "emphysema": r"emphysema|pulmonary emphysema|bullous emphysema",
    "copd": r"pulmonary disease, chronic obstructive",
    "hyperinflation": r"lung/.*hyperdistention",
    "low lung volumes": r"lung/.*hypoinflation",
    "interstitial markings": r"markings/.*interstitial",
    "bronchovascular markings": r"markings/.*bronchovascular",
    "interstitial disease": r"lung diseases, interstitial",
    "elevated diaphragm": r"diaphragm/.*elevated",
    "flattened diaphragm": r"diaphragm/.*flattened",
    "eventration": r"diaphragmatic eventration",
    "blunted costophrenic angle": r"costophrenic angle/.*(?:blunted|obscured)",
    "tortuous aorta": r"aorta.*/tortuous",
    "hiatal hernia": r"hernia, hiatal",
    "pleural thickening": r"thickening/pleura",
    "degenerative change": r".*/degenerative",
    "osteophyte": r"osteophyte",
    "spondylosis": r"spondylosis",
    "scoliosis": r"scoliosis",
    "kyphosis": r"kyphosis",
    "arthritis": r"arthritis",
    "osteopenia": r"bone diseases, metabolic|osteoporosis",
    "fracture": r"fractures, bone",
    "deformity": r"deformity|funnel chest",
    "lymphadenopathy": r".*lymph nodes/.*enlarged",
    "subcutaneous emphysema": r"subcutaneous\s+emphysema",
}
# What the extractor distinguishes and the coders do not: both are "Opacity".
BROADER = {"airspace opacity": "opacity", "interstitial opacity": "opacity"}
_MESH = {name: re.compile(pattern) for name, pattern in MESH.items()}
UNINDEXED = ("No Indexing",)  # reports the coders did not read for findings


class Agreement(NamedTuple):
    """Counts of reports for one finding."""

    both: int
    extracted_only: int
    reference_only: int

    @property
    def precision(self) -> float:
        """Share of the extracted ones that the reference has; NaN where none is extracted."""
        return _ratio(self.both, self.both + self.extracted_only)

    @property
    def recall(self) -> float:
        """Share of the reference's that were extracted; NaN where it has none."""
        return _ratio(self.both, self.both + self.reference_only)

    @property
    def f1(self) -> float:
        """Harmonic mean of both, 2 TP / (2 TP + FP + FN)."""
        return _ratio(2 * self.both, 2 * self.both + self.extracted_only + self.reference_only)


def mesh_findings(headings: Iterable[str]) -> frozenset[str]:
    """Return the findings that MeSH headings name, with "normal" for the heading of that name."""
    lower = [heading.strip().lower() for heading in headings]
    found = {name for name, pattern in _MESH.items() if any(map(pattern.match, lower))}
    return frozenset(found | ({"normal"} if "normal" in lower else set()))


def reported(
    evidence: Iterable[Mapping], certainty: Sequence[str] = ("present", "uncertain")
) -> frozenset[str]:
    """Return the findings a report has with one of these certainties."""
    names = {item["finding"] for item in evidence if item["certainty"] in certainty}
    return frozenset(names | {BROADER[name] for name in names if name in BROADER})


def phantom_findings(evidence: Iterable[Mapping]) -> frozenset[str]:
    """Return the phantom's findings among the extracted ones."""
    names = reported(evidence)
    return frozenset(name for name, words in PHANTOM.items() if names.intersection(words))


def compare(
    pairs: Sequence[tuple[frozenset[str], frozenset[str]]], names: Iterable[str]
) -> dict[str, Agreement]:
    """Count, for each finding, the reports in which (extracted, reference) have it."""
    return {
        name: Agreement(
            sum(name in a and name in b for a, b in pairs),
            sum(name in a and name not in b for a, b in pairs),
            sum(name not in a and name in b for a, b in pairs),
        )
        for name in names
    }


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
