"""What the trainings of the study of few pairs differ in; see methods_lgdea.py."""

from collections.abc import Mapping

from configs import lgdea as variants
from configs import sclip
from medvlp_jax.recipes import lgdea

OTHERS = tuple(term for term in lgdea.TERMS if term != "global")
PAIRS_ALONE = {"data": {"pairing": {"share": 1.0, "passes": 0}}, "train": {"refresh_every": 0}}


class Instead(dict):
    """A part of a config that takes the place of what is there."""


def without(*terms: str) -> dict:
    """Return the change that switches loss terms off."""
    return {"recipe": {"weights": dict.fromkeys(terms, 0.0)}}


def globally(changes: dict) -> dict:
    """Let texts meet images by the global embeddings: nothing else is trained.

    Prompts are read by the rules there, too: it helps, and LGDEA reads them so.
    """
    by_rules = {"evals": {"zero_shot": {"by_rules": True}}}
    return changes | {"recipe": {**changes["recipe"], "meets": "global"}} | by_rules


def said_in_full(change: dict) -> dict:
    """Let a report say all it says: the study's four phrases are what is present, and no more."""
    return {"data": {"evidence": {**change, "phrases": 12, "length": 24, "pack": 0.0}}}


STUDIED = variants.get_config("study").recipe
APART = {name: STUDIED.weights[name] for name in ("unpaired", "relations", "global_relations")}
# The control that uses images apart. Its temperature stays, as that of all other arms does.
SCLIP = {
    "recipe": Instead(sclip.recipe(STUDIED.image, STUDIED.text, STUDIED.dim).to_dict()),
    "optim": {"freeze": ("^log_scale$",)},
    "data": {"evidence": {"pack": 0.0}},  # equal keywords are found by their tokens
    "train": {"refresh_every": 0},
    "evals": {"zero_shot": {"by_rules": True}},
}
# By name: title, and what differs from LGDEA. The first three are the study, the rest section B.6.
ARMS = {
    "pairs": ("pairs alone, global InfoNCE", globally(PAIRS_ALONE | without(*OTHERS))),
    "no_unpaired": ("LGDEA on the pairs alone", PAIRS_ALONE),
    "lgdea": ("LGDEA", {}),
    "sclip": ("S-CLIP: pairs, and images apart", SCLIP),
    "no_rec": ("without L_rec", without("reconstruction")),
    "no_paired": ("without L_evid^p", without("paired")),
    "pairs_related": ("a pair is a relation of weight 1", {"recipe": {"related_pairs": True}}),
    "taught_both": ("L_evid^p moves reports, too", {"recipe": {"paired_moved": "both"}}),
    "no_pseudo": ("without L_evid^u", without("unpaired")),
    "no_alignment": ("without L_evi-align", without("alignment", "relations")),
    "no_relations": ("without L_evi-align of relations", without("relations")),
    "no_global_relations": ("without L_glob of relations", without("global_relations")),
    "apart_untold": (
        "rows apart without their terms",
        without("unpaired", "relations", "global_relations"),
    ),
    "no_global": ("without L_glob", without("global", "global_relations")),
    "no_prototypes": (
        "without prototypes",
        {**without("reconstruction", "paired", "unpaired"), "train": {"refresh_every": 0}},
    ),
    "no_neighbours": ("no report from neighbours", {"data": {"pairing": {"related": 0.0}}}),
    "moves_both": ("relations move reports, too", {"recipe": {"moved": "both"}}),
    "hops_0": ("no hop", {"recipe": {"hops": 0}}),
    "hops_3": ("3 hops", {"recipe": {"hops": 3}}),
    "from_pairs": (
        "relations as specified: A_0 the pairs alone, 5 hops, 10 reports",
        {"recipe": {"near_reports": 0, "hops": 5, "kept": 50, "related": 10}},
    ),
    "alpha_50": ("alpha 0.5", {"recipe": {"alpha": 0.5}}),
    "neighbours_30": ("30 neighbours", {"recipe": {"neighbours": 30}}),
    "prototypes_16": ("16 prototypes", {"recipe": {"prototypes": 16}}),
    "prototypes_64": ("64 prototypes", {"recipe": {"prototypes": 64}}),
    "sharp": ("temperatures 0.05", {"recipe": {"temperature": 0.05, "image_temperature": 0.05}}),
    "soft": ("temperatures 0.2", {"recipe": {"temperature": 0.2, "image_temperature": 0.2}}),
    "as_means": ("rows apart as means", {"recipe": {"by_share": False}}),
    "later": (
        "terms of rows apart from step 225, in full from 450",
        {"recipe": {"weights": {name: ((225, 0.0), (450, w)) for name, w in APART.items()}}},
    ),
    "less_rec": ("L_rec by 0.3", {"recipe": {"weights": {"reconstruction": 0.3}}}),
    "sentences": ("sentences for evidence", said_in_full({"unit": "sentence"})),
    "negated": ("with what is absent", said_in_full({"negated": True})),
}
STUDY = ("pairs", "no_unpaired", "lgdea")
UNTAUGHT = ("pairs", "sclip")  # without prototypes, or with such as nothing trains


def change(config: dict, changes: Mapping) -> None:
    """Write changes into a nested config."""
    for key, value in changes.items():
        if isinstance(value, Instead):
            config[key] = dict(value)
        elif isinstance(value, Mapping):
            change(config[key], value)
        else:
            config[key] = value
