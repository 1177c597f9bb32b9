"""Features of a run on any corpus: images and texts through the encoder, on all processes."""

import functools
from collections.abc import Callable, Mapping

import numpy as np

from medvlp_jax import assemble, clinical, distributed, examples, sharding, tables
from medvlp_jax.data import pipeline
from medvlp_jax.data import text as tokenisation
from medvlp_jax.evaluation import baselines
from medvlp_jax.evaluation import features as extraction
from medvlp_jax.training.step import make_embed
from medvlp_jax.training.stopping import Signals, Stopped

PROMPT_BATCH = 64
POOLED = ("image_pooled", "logits", "masked_loss", "masked_count")


class Embedder:
    """The compiled encoder of a run, and what it reads."""

    def __init__(self, parts: assemble.Parts, batch_size: int, stop: Signals | None = None):
        """Compile nothing yet.

        Args:
          parts: of the run.
          batch_size: at least so many rows, made a multiple of the devices.
          stop: notices signals.
        """
        self.parts, self.batch_size = parts, batch_size
        self.stop = stop or Signals()
        self._embed = make_embed(parts.recipe, parts.mesh)

    def embed(self, variables: Mapping, batch: Mapping) -> dict:
        """Return features of this process's rows.

        Raises:
          Stopped: in all processes, when one of them was asked to stop.
        """
        if distributed.any_process(lambda: self.stop.asked, self.parts.mesh)():
            raise Stopped
        return self._embed(variables, batch)

    def features(
        self, variables, source, *, inputs=(), limit=0, mask=None, views=1, progress=""
    ) -> extraction.Features:
        """Embed a corpus: features, labels and ids as NumPy arrays [N, ...].

        Args:
          variables: of the recipe.
          source: corpus to embed.
          inputs: batch keys to encode; () takes the image and every section.
          limit: only the first examples; 0 takes all.
          mask: share of the lower image edge to blacken; None takes data.mask_lower_edge.
          views: flips and turns of the image over which class probabilities are averaged.
          progress: title of the bar; "" is silent.
        """
        inputs, read = inputs or self.inputs(), self.read()

        def embed(batch):
            found = self.embed(variables, {k: batch[k] for k in inputs})
            return {k: v for k, v in found.items() if k in read}

        if views > 1:
            images = self.images()
            embed = functools.partial(extraction.averaged, embed, images=images, views=views)
        batches = self._batches(source, inputs, limit, mask)
        progress = progress if distributed.is_writer() else ""
        return extraction.extract(embed, batches, progress=progress, part=self.parts.part)

    def raw_features(self, source, *, limit=0) -> extraction.Features:
        """Return what regressions on the raw input see of a corpus, see evaluation/baselines.py."""
        embed = lambda batch: baselines.raw_features(batch, self.images())
        batches = self._batches(source, self.inputs(), limit, None)
        return extraction.extract(embed, batches, part=self.parts.part)

    def _batches(self, source, inputs, limit, mask):
        data, told = self.parts.config["data"], None
        table = tables.rows_of(data, [source]) if "tabular" in inputs else None
        if {*clinical.KEYS} & {*inputs}:
            told = clinical.told_of(data, [source], self.parts.recipe.task, train=False)
        return pipeline.eval_batches(
            source,
            transform=examples.record_transform(
                self.parts,
                inputs,
                train=False,
                table=table,
                images=source.images,
                told=told,
                mask=mask,
            ),
            batch_size=self.multiple_of_devices(self.batch_size),
            limit=limit,
            process_index=self.parts.part.index,
            process_count=self.parts.part.count,
            **examples.loading(data),
        )

    def embed_texts(self, variables) -> Callable[[list[str], str], np.ndarray]:
        """Return (texts, section) -> embeddings [n, E] of prompts, where they meet images."""
        recipe = self.parts.recipe
        spaces, told = recipe.spaces, "evidence" in getattr(recipe, "beside", ())

        def embed(texts, section):
            key = section if section in spaces else next(iter(spaces))
            name = getattr(recipe, "prompted", spaces[key])[1]

            def read(tokens, words):
                also = examples.evidence_in(words, self.parts) if told else {}
                return {"": self.embed(variables, {key: tokens, **also})[name]}

            return self.encode_texts(texts, read)[""]

        return embed

    def encode_texts(self, texts: list[str], read: Callable) -> dict[str, np.ndarray]:
        """Return what `read` gives of the tokens of texts, by name [n, ...].

        Args:
          texts: n of them.
          read: (Tokens of this process's rows, their texts) -> arrays by name.
        """
        part = self.parts.part
        size = self.multiple_of_devices(PROMPT_BATCH)
        own = slice(part.index * size // part.count, (part.index + 1) * size // part.count)
        length = self.parts.config["data"]["text_length"]
        rows: dict[str, list] = {}
        for start in range(0, len(texts), size):
            filled = [*texts[start : start + size]]
            filled += [""] * (size - len(filled))
            tokens = tokenisation.tokenize(self.parts.tokenizer, filled[own], length)
            for name, value in read(tokens, filled[own]).items():
                rows.setdefault(name, []).append(value)
        whole = {
            k: np.moveaxis(distributed.gather_parts(np.stack(v), part), 0, 1)
            for k, v in rows.items()
        }
        return {k: v.reshape(-1, *v.shape[3:])[: len(texts)] for k, v in whole.items()}

    def joint(self, found) -> tuple[np.ndarray, np.ndarray]:
        """Return image and text features of all sections together, see features.joint."""
        spaces = self.parts.recipe.spaces
        valid = np.stack([found[f"{section}_valid"] for section in spaces], axis=1)
        image = extraction.joint(found, [image for image, _ in spaces.values()])
        return image, extraction.joint(found, [text for _, text in spaces.values()], valid)

    def text_ids(self, found) -> np.ndarray:
        """Return an id a row [N], equal where the texts the recipe reads are."""
        return extraction.text_ids(found, list(self.parts.recipe.spaces))

    def inputs(self) -> tuple[str, ...]:
        """Return what a full evaluation encodes: image and sections, or all a classifier reads."""
        recipe = self.parts.recipe
        if recipe.spaces:
            return ("image", *recipe.spaces, *getattr(recipe, "beside", ()))
        if hasattr(recipe, "evaluated"):
            return recipe.evaluated
        return tuple(key for key in recipe.inputs if not key.startswith("label/"))

    def read(self) -> set[str]:
        """Return the features that protocols read, a few numbers an example.

        A recipe may return more, such as a vector a patch: of 25,596 images that is gigabytes.
        """
        pairs = self.parts.recipe.spaces.values() if self.parts.recipe.spaces else ()
        prompted = getattr(self.parts.recipe, "prompted", ())
        return {*(name for pair in pairs for name in pair), *prompted, *POOLED}

    def images(self) -> tuple[str, ...]:
        """Return the batch keys of images among them."""
        recipe = self.parts.recipe
        others = (*recipe.spaces, *pipeline.SECTIONS, "tabular", *clinical.KEYS)
        others += tuple(getattr(recipe, "beside", ()))
        return tuple(key for key in self.inputs() if key not in others)

    def multiple_of_devices(self, size: int) -> int:
        """Return the smallest batch of at least `size` that the devices divide."""
        return sharding.whole_batch(self.parts.mesh, size)
