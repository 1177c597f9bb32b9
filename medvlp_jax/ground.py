"""Phrase grounding of a run: its boxes, its maps, their scores, and a picture of some.

Scores are taken at `data.size` pixels, where the decoded image lies: what the centre crop left out
was not seen. The category of a phrase is the corpus' own, or else the class of its tasks that the
rules of `evidence` read in it, or else the phrase itself ("left lung").
"""

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medvlp_jax import distributed, examples
from medvlp_jax.config import UserError
from medvlp_jax.data import pairing, pipeline, transforms
from medvlp_jax.evaluation import features, grounding, heatmaps
from medvlp_jax.evaluation.results import Results
from medvlp_jax.evidence import agreement, rules
from medvlp_jax.training.step import make_embed

MAP = {"interpolation": "bilinear", "smoothing": 0.0}
SETTINGS = {**MAP, **grounding.Variant()._asdict()}
PICTURE = "grounding.png"
SHOWN = 6  # phrases in the picture
FRAME = ("size", "crop", "fit", "crop_black_border")  # of config.data: which pixels are counted
COSINE = "cosine"  # the map that is compared with thresholds as it is; others by their largest


class Grounder:
    """The phrases of one split with where they are, and the maps a recipe makes of them."""

    def __init__(self, evaluator: Any):
        """Read the boxes of the split.

        Args:
          evaluator: of the run, see evaluator.Evaluator.

        Raises:
          UserError: where no image of the split has a box, or a setting does not exist.
        """
        self.evaluator, self.parts = evaluator, evaluator.parts
        # Runs from before there was grounding do not say how.
        self.settings = {**SETTINGS, **evaluator.settings.get("grounding", {})}
        kinds = ("bilinear", "nearest")
        if self.settings["interpolation"] not in kinds or self.settings["smoothing"] < 0:
            raise UserError(
                f"evals.grounding={self.settings}: accepted are the interpolations "
                f"{', '.join(kinds)} and a smoothing of at least 0."
            )
        self.how = {name: self.settings[name] for name in MAP}
        names = grounding.Variant._fields
        self.variant = grounding.Variant(**{name: self.settings[name] for name in names}).check()
        source, limit = evaluator.source, evaluator.settings["limit"]
        self.rows, self.pairs = [], []
        for row in range(min(limit or len(source), len(source))):
            record = source[row]
            if record["boxes"]["phrase"]:
                self.pairs += self._pairs(len(self.rows), record)
                self.rows.append(row)
        if not self.pairs:
            raise UserError(
                f"Protocol grounding needs boxes with phrases; {evaluator.corpus} has none in "
                f"{evaluator.settings['split']}."
            )
        self.localise = make_embed(self.parts.recipe, self.parts.mesh, "localise")

    def _pairs(self, row: int, record: Mapping) -> list[grounding.Pair]:
        boxes = record["boxes"]
        kinds = boxes.get("category") or [
            category_of(phrase, self.evaluator.source.tasks) for phrase in boxes["phrase"]
        ]
        data = self.parts.config["data"]
        names = ("size", "channels", "crop_black_border", "fit")
        where = transforms.placed(
            boxes["bbox"].astype(np.float64), record["image"], **{n: data[n] for n in names}
        )
        return grounding.pairs_of(row, record["patient_id"], boxes["phrase"], kinds, where)

    def results(self, variables: Mapping, *, mask=None, shuffle=False, **bootstrap) -> Results:
        """Score every map of the recipe.

        Args:
          variables: of the recipe.
          mask: share of the lower image edge to blacken; None takes data.mask_lower_edge.
          shuffle: phrases of other categories in the place of the right ones.
          **bootstrap: resamples, seed, level.
        """
        pairs = grounding.shuffled(self.pairs) if shuffle else self.pairs
        data, found = self.parts.config["data"], {}
        settings = {**self.how, **{name: data[name] for name in FRAME}}
        for name, (patches, phrases) in self.encode(variables, pairs, mask=mask).items():
            see = functools.partial(self.map_of, name, patches, phrases)
            score = lambda pair, see=see: grounding.score(
                see(pair), self.region(pair), self.variant
            )
            options = {"settings": settings, "variant": self.variant, **bootstrap}
            found |= grounding.run(pairs, [score(pair) for pair in pairs], task=name, **options)
        return found

    def encode(self, variables, pairs, *, mask=None) -> dict[str, tuple[np.ndarray, dict]]:
        """Return by map the patches of each image [I, N, F], and the vector [F] of each phrase."""
        inputs = ("image",)
        batches = pipeline.eval_batches(
            pairing.Nodes(self.evaluator.source, np.array(self.rows)),
            transform=examples.record_transform(self.parts, inputs, train=False, mask=mask),
            batch_size=self.evaluator.multiple_of_devices(self.evaluator.settings["batch_size"]),
            process_index=self.parts.part.index,
            process_count=self.parts.part.count,
            **examples.loading(self.parts.config["data"]),
        )
        see = lambda batch: self.localise(variables, {"image": batch["image"]})
        patches = features.extract(see, batches, part=self.parts.part)
        texts = list(dict.fromkeys(pair.phrase for pair in pairs))
        read = lambda tokens, _: self.localise(variables, {"phrase": tokens})
        phrases = self.evaluator.encode_texts(texts, read)
        return {
            name: (patches[name], dict(zip(texts, rows, strict=True)))
            for name, rows in phrases.items()
        }

    def map_of(self, name: str, patches, phrases, pair: grounding.Pair) -> np.ndarray:
        """Return the map [size, size] of a pair, NaN outside the crop."""
        values = patches[pair.row].astype(np.float64) @ phrases[pair.phrase]
        if name != COSINE:
            values = values / max(values.max(), 1e-12)
        data, side = self.parts.config["data"], round(len(values) ** 0.5)
        large = grounding.heatmap(values.reshape(side, side), data["crop"], **self.how)
        return grounding.centred(large, data["size"])

    def region(self, pair: grounding.Pair) -> np.ndarray:
        """Return the pixels [size, size] of a pair's boxes."""
        side = self.parts.config["data"]["size"]
        return grounding.region(pair.boxes, side, side)

    def draw(self, variables: Mapping, out_png: pathlib.Path) -> None:
        """Draw some pairs with the maps of their phrase and those of a wrong one."""
        wrong = grounding.shuffled(self.pairs)
        maps = self.encode(variables, [*self.pairs, *wrong])
        if not distributed.is_writer():
            return
        see = examples.record_transform(self.parts, ("image",), train=False)
        data, rows = self.parts.config["data"], []
        start = (data["size"] - data["crop"]) // 2
        crop = slice(start, start + data["crop"])
        for i in picked(self.pairs, SHOWN):
            drawn, notes = [], []
            for title, pair in (("", self.pairs[i]), ("wrong: ", wrong[i])):
                for name in maps:
                    values = self.map_of(name, *maps[name], pair)
                    cnr = grounding.contrast_to_noise(values, self.region(pair), signed=True)
                    drawn.append(values[crop, crop])
                    said = f"{title}{pair.phrase}, " if title else ""
                    notes.append(f"{said}{name}: CNR {cnr:+.2f}")
            pair = self.pairs[i]
            image = see(self.evaluator.source[self.rows[pair.row]], None)["image"]
            rows.append(heatmaps.Example(image, pair.boxes - start, pair.phrase, drawn, notes))
        heatmaps.draw(rows, out_png)


def category_of(phrase: str, tasks: Mapping[str, Sequence[str]]) -> str:
    """Return the class of the tasks that the rules read in a phrase, or else the phrase."""
    items = rules.extract(phrase)
    read = agreement.reported(items) | agreement.phantom_findings(items)
    classes = (name for names in tasks.values() for name in names)
    return next((name for name in classes if name.lower() in read), phrase)


def picked(pairs: Sequence[grounding.Pair], count: int) -> list[int]:
    """Return pairs of as many categories as there are, drawn without looking at any map."""
    rng = np.random.default_rng(0)
    order = rng.permutation(len(pairs))
    turn: dict[str, int] = {}
    rank = {}
    for i in order:
        kind = pairs[i].category
        rank[i] = turn[kind] = turn.get(kind, -1) + 1
    return sorted(map(int, order), key=lambda i: rank[i])[:count]
