"""LGDEA: lesions of an image and phrases of a report meet in prototypes of diagnostic evidence.

Yan, Bai, Yang, Chen, https://arxiv.org/abs/2602.07540. Equations 4-9 are the authors', the rest is
our reconstruction (docs/lgdea.md). A row of a batch is an image and a report; in some rows they
are a pair, in the others each comes from its own pool.

  lesions   M learned queries over the patches -> v [B, M, D] -> phi(v) [B, M, E], unit norm
  phrases   evidence of the report, encoded one by one -> z [B, N, E], unit norm
  evidence  means over lesions and phrases of softmax(. mu / tau) -> Qbar_I, Qbar_R [B, K]

  L = L_rec + L_evid^p + w L_evi-align (pairs) + w L_glob (pairs) + w usage
      + share of rows apart * [w L_evid^u + w L_evi-align (relations) + w L_glob (relations)]

In evaluation a prompt meets images in the evidence space, as the evidence it is, and a report by
the mean of the cosines there and of the global embeddings; or both by the global ones alone.

usage = 1 - entropy of the mean assignment / ln K is logged always and off by default; above 0.5
the prototypes have collapsed.

Axis letters: B batch, P patches, M lesions, N phrases, T tokens, D width, E evidence width,
K prototypes, I images and R reports of the corpus, m related reports of an image.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from medvlp_jax.config import UserError
from medvlp_jax.encoders.base import encode_pixels
from medvlp_jax.layers import Linear, Queries
from medvlp_jax.losses import evidence, relations, tiled
from medvlp_jax.losses.targets import Links
from medvlp_jax.recipes import base
from medvlp_jax.schedules import Knots

TERMS = ("reconstruction", "paired", "unpaired", "alignment", "relations")
TERMS += ("global", "global_relations", "usage")
MOVED = ("both", "images")
MEETS = ("global", "evidence")
COLLAPSED = 0.5  # of `usage`
SECTION = "report"
RELATIONS = "relations"  # the collection that `refresh` fills


class Lgdea(nn.Module):
    """Two encoders, lesions, prototypes, and a global embedding of each side."""

    image: nn.Module
    text: nn.Module
    dim: int
    prototypes: int
    lesions: int
    depth: int
    num_heads: int
    temperature: float
    image_temperature: float
    alignment_temperature: float
    global_temperature: float
    shrinkage: float
    neighbours: int
    hops: int
    alpha: float
    related: int
    kept: int
    near_reports: int
    confidence: str
    least_confidence: float
    moved: str
    paired_moved: str
    related_pairs: bool
    by_share: bool
    meets: str
    loss_tile: int
    weights: Mapping[str, float | Knots]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Batch keys read in training."""
        rows = ("paired", "image_row", "report_row")
        return ("image", SECTION, f"{SECTION}_valid", "evidence", "evidence_mask", *rows)

    frozen = ()
    packs = (SECTION, "evidence")
    alarms = {  # noqa: RUF012 (a Linen class attribute without a type)
        "usage": (COLLAPSED, "prototypes collapse: their usage entropy is below 0.5 ln K")
    }

    @property
    def spaces(self) -> dict[str, tuple[str, str]]:
        """Where reports meet images."""
        at_evidence = self.meets == "evidence"
        return {SECTION: ("image_joint", "text_joint") if at_evidence else ("image", "text")}

    @property
    def prompted(self) -> tuple[str, str]:
        """Where prompts meet images."""
        if self.meets == "evidence":
            return ("image_direction", "text_direction")
        return self.spaces[SECTION]

    @property
    def beside(self) -> tuple[str, ...]:
        """Batch keys read beside a report in evaluation."""
        return ("evidence", "evidence_mask") if self.meets == "evidence" else ()

    def setup(self):
        """Name the heads and the prototypes."""
        self.lesion_decoder = Queries(self.lesions, self.depth, self.num_heads)
        self.lesion_hidden = Linear(self.image.width)
        self.lesion_projection = Linear(self.dim)
        self.phrase_projection = Linear(self.dim)
        self.image_projection = Linear(self.dim)
        self.text_projection = Linear(self.dim)
        # Unit directions: with small values all phrases would begin at all prototypes alike.
        self.mu = self.param("prototypes", _directions, (self.prototypes, self.dim))

    def __call__(self, batch, *, train=False):
        """Run both halves."""
        return self.objective(self.encode(batch, train=train), batch, train=train)

    def encode(self, batch, *, train=False):
        """Return the features of the modalities in the batch.

        image, text [B, E] unit norm; image_pooled [B, D]; lesions [B, M, E] unit norm; phrases
        [B, N, E] unit norm, zero where there is none, and phrases_raw before they get it;
        image_evidence, report_evidence [B, K]; report_told [B], is there a phrase; image_direction,
        text_direction [B, E], of the mean lesion and the mean phrase; image_joint, text_joint
        [B, 2 E], the global embedding and that direction, whose inner product is the mean of both
        cosines.
        """
        features = {}
        if "image" in batch:
            encoded = encode_pixels(self.image, batch["image"], train=train)
            features["image_pooled"] = encoded.pooled
            features["image"] = base.unit(self.image_projection(encoded.pooled))
            features["lesions"], _ = self._lesions(encoded.tokens, train)
            shares = evidence.assignments(
                features["lesions"], self.mu, temperature=self.image_temperature
            )
            features["image_evidence"] = evidence.distribution(shares)
            direction = evidence.mean_direction(features["lesions"])
            features["image_direction"] = direction
            features["image_joint"] = _joint(features["image"], direction)
        if SECTION in batch:
            pooled = base.pooled_texts(self.text, batch[SECTION], train=train)
            features["text"] = base.unit(self.text_projection(pooled))
        if "evidence" in batch:
            pooled = base.pooled_texts(self.text, batch["evidence"], train=train)  # [B, N, D]
            raw = self.phrase_projection(pooled)
            raw = jnp.where(batch["evidence_mask"][..., None], raw, 0)
            features["phrases_raw"] = raw
            z = base.unit(raw)
            features["phrases"] = z
            shares = evidence.assignments(z, self.mu, temperature=self.temperature)
            features["report_evidence"] = evidence.distribution(shares, batch["evidence_mask"])
            features["report_told"] = batch["evidence_mask"].any(1)
            direction = evidence.mean_direction(z, batch["evidence_mask"])
            features["text_direction"] = direction
            if SECTION in batch:
                features["text_joint"] = _joint(features["text"], direction)
        return features

    def _lesions(self, patches, train):
        """Return phi(v) [B, M, E] and where each lesion looks [B, M, P]."""
        found, paid = self.lesion_decoder(patches, train=train)
        return base.unit(self.lesion_projection(nn.gelu(self.lesion_hidden(found)))), paid

    def localise(self, batch):
        """Return two maps of `phrase` over the patches of `image`, see recipes.base.

        cosine   of the patch and the phrase in the global space [B, P, E], [B, E]
        lesions  sum_l w_l Attn_l(x) with w_l = z . phi(v_l): [B, P, E], [B, E]
        """
        maps = {}
        if "image" in batch:
            patches = encode_pixels(self.image, batch["image"]).tokens
            maps["cosine"] = base.unit(self.image_projection(patches))
            lesions, paid = self._lesions(patches, False)
            maps["lesions"] = jnp.einsum("bmp,bme->bpe", paid, lesions)
        if "phrase" in batch:
            pooled = self.text(batch["phrase"]).pooled
            maps["cosine"] = base.unit(self.text_projection(pooled))
            maps["lesions"] = base.unit(self.phrase_projection(pooled))
        return maps

    def objective(self, features, batch, *, train=False):
        """Return the terms over the global batch."""
        mask, paired = batch["evidence_mask"], batch["paired"]
        told = mask.any(1)
        pair = paired & told
        image, report = features["image_evidence"], features["report_evidence"]
        row = batch["image_row"]
        known = {name: self.get_variable(RELATIONS, name)[row] for name in _shapes(1, 1, 1)}
        confidence = jnp.where(paired, 0, known["confidence"])
        trusted = jnp.where(confidence[:, None] > 0, known["weight"], 0)
        column = known["column"]
        if self.related_pairs:  # else a report's own image would be one of its negatives
            column = jnp.concatenate([column, batch["report_row"][:, None]], 1)
            trusted = jnp.concatenate([trusted, paired[:, None].astype(trusted.dtype)], 1)
        related = lambda may: Links(column, trusted, jnp.where(may, batch["report_row"], -1))
        seen, said = features["image_direction"], features["text_direction"]
        fixed = jax.lax.stop_gradient if self.moved == "images" else lambda x: x
        contrast = base.contrastive_loss("info_nce", self.loss_tile)
        # As means, the fewer rows are apart, the more each of them would count beside a pair.
        share = 1 - paired.mean() if self.by_share else 1.0
        near, far = self.alignment_temperature, self.global_temperature
        valid = batch[f"{SECTION}_valid"]
        aligned = self._align(seen, fixed(said), near, confidence, told, related(told))
        text = fixed(features["text"])
        met = self._align(features["image"], text, far, confidence, valid, related(told & valid))
        return {
            "reconstruction": evidence.reconstruction(
                features["phrases"],
                mask,
                self.mu,
                temperature=self.temperature,
                shrinkage=self.shrinkage / self.prototypes,
            ),
            "paired": evidence.paired_divergence(
                report, image, valid=pair, fixed=self.paired_moved == "images"
            ),
            "unpaired": share * evidence.unpaired_divergence(known["pseudo"], image, confidence),
            "alignment": self._align(seen, said, near, pair.astype(confidence.dtype), told),
            "relations": share * aligned,
            "global": contrast(
                features["image"],
                features["text"],
                jnp.float32(1 / far),
                valid=paired & valid,
            ),
            "global_relations": share * met,
            "usage": 1
            - evidence.usage_entropy(jnp.where(told[:, None], (image + report) / 2, image)),
        }

    def _align(self, image, text, temperature, trust, told, related=None):
        """Return L_evi-align, in tiles where the batch outgrows one; None relates the pairs."""
        if 0 < self.loss_tile < len(image):
            settings = {"trust": trust, "related": related, "told": told, "tile": self.loss_tile}
            return tiled.alignment(image, text, 1 / temperature, **settings)
        target = jnp.diag(trust) if related is None else relations.in_batch(*related)
        return evidence.alignment(
            image,
            text,
            target,
            image_confidence=trust,
            report_confidence=relations.mean_trust(target, trust),
            temperature=temperature,
            told=told,
        )

    def start(self, params: Mapping, raw, seed: int) -> dict:
        """Return the parameters to begin with, from the phrases of a first pass.

        Features of a text encoder point almost all one way, and directions that hardly differ meet
        all prototypes alike: L_rec then draws them into one. So the phrases are centred, by the
        bias of their projection, and the prototypes start at centres of them.

        Args:
          params: with which the phrases were encoded.
          raw: phrases [R, N, E] before they get unit norm, zero where there is none.
          seed: of the first centres.

        Raises:
          UserError: where there are fewer phrases than prototypes.
        """
        raw = np.asarray(raw).reshape(-1, raw.shape[-1])
        raw = raw[raw.any(1)]
        if len(raw) < self.prototypes:
            raise UserError(
                f"recipe.prototypes={self.prototypes} needs more than {len(raw)} phrases."
            )
        mean, key = raw.mean(0), jax.random.key(seed)
        z = base.unit(jnp.asarray(raw - mean))
        prototypes = np.asarray(evidence.spherical_kmeans(z, self.prototypes, key=key)[0])
        projection = {**params["phrase_projection"]}
        projection["bias"] = projection["bias"] - mean
        return {**params, "prototypes": prototypes, "phrase_projection": projection}

    @property
    def described(self) -> tuple[str, ...]:
        """Features of an image that `refresh` reads."""
        seen = "image_evidence"
        return (seen, "image_joint") if self.near_reports else (seen,)

    @property
    def told(self) -> tuple[str, ...]:
        """Features of a report that `refresh` reads."""
        said = ("report_evidence", "report_told")
        return (*said, "text_joint") if self.near_reports else said

    @property
    def told_by(self) -> tuple[str, ...]:
        """Batch keys these need."""
        phrases = ("evidence", "evidence_mask")
        return (*phrases, SECTION) if self.near_reports else phrases

    def no_relations(self, images: int) -> dict[str, np.ndarray]:
        """Return the collection before the first `refresh`: nothing is related to anything."""
        shapes = _shapes(images, self.related, self.prototypes)
        return {name: np.zeros(*shape) for name, shape in shapes.items()}

    def check_sizes(self, images: int, reports: int) -> None:
        """Refuse a corpus that is too small for the graphs of `refresh`.

        Raises:
          UserError: where there are fewer images or reports than neighbours.
        """
        if min(images, reports) <= self.neighbours:
            raise UserError(
                f"recipe.neighbours={self.neighbours} needs more than {min(images, reports)} "
                "images or reports."
            )

    def refresh(
        self, images: Mapping, reports: Mapping, pairs: int, *, mesh=None
    ) -> dict[str, jax.Array]:
        """Relate the images of the corpus to those of its reports that hold a phrase.

        One without is as uniform as the next: all of them would be near one another, and agree.

        Args:
          images: features of the images, those of `described`.
          reports: features of the reports, those of `told`.
          pairs: the first ones of both are pairs.
          mesh: whose devices share the work.

        Returns:
          The collection that `objective` reads.

        Raises:
          UserError: as `check_sizes`, or where no pair's report holds a phrase.
        """
        seen, said = images["image_evidence"], reports["report_evidence"]
        self.check_sizes(len(seen), len(said))
        is_told = np.asarray(reports["report_told"]).astype(bool)
        if not is_told[:pairs].any():
            raise UserError(f"None of the reports of {pairs} pairs holds a phrase of evidence.")
        found = relations.relate(
            seen,
            said,
            np.flatnonzero(is_told[:pairs]),
            holds=is_told,
            met=(images["image_joint"], reports["text_joint"]) if self.near_reports else None,
            near=self.near_reports,
            width=self.alignment_temperature,
            neighbours=self.neighbours,
            alpha=self.alpha,
            hops=self.hops,
            kept=self.kept,
            related=self.related,
            least=self.least_confidence,
            confidence=self.confidence,
            mesh=mesh,
        )
        return {**found._asdict(), "pseudo": relations.pseudo(found, said)}


def _shapes(images: int, related: int, prototypes: int) -> dict[str, tuple]:
    return {
        "column": ((images, related), np.int32),
        "weight": ((images, related), np.float32),
        "confidence": ((images,), np.float32),
        "pseudo": ((images, prototypes), np.float32),
    }


def _joint(one, other):
    return jnp.concatenate([one, other.astype(one.dtype)], -1) * 0.5**0.5


def _directions(key, shape, dtype=jnp.float32):
    return base.unit(jax.random.normal(key, shape, dtype))


def make(
    *,
    image: Mapping | nn.Module,
    text: Mapping | nn.Module,
    weights: Mapping[str, float | Knots],
    dim: int = 256,
    prototypes: int = 64,
    lesions: int = 8,
    depth: int = 2,
    num_heads: int = 12,
    temperature: float = 0.1,
    image_temperature: float = 0.1,
    alignment_temperature: float = 0.07,
    global_temperature: float = 0.07,
    shrinkage: float = 0.01,
    neighbours: int = 10,
    hops: int = 5,
    alpha: float = 0.8,
    related: int = 10,
    kept: int = 50,
    near_reports: int = 0,
    confidence: str = "evidence",
    least_confidence: float = 0.2,
    moved: str = "both",
    paired_moved: str = "images",
    related_pairs: bool = True,
    by_share: bool = True,
    meets: str = "global",
    loss_tile: int = tiled.TILE,
) -> Lgdea:
    """Build the recipe; all defaults are our choice, none is published.

    Args:
      image: encoder spec {"name", "variant", ...} or a module, with patch tokens (a ViT).
      text: likewise.
      weights: one for each of TERMS.
      dim: E, of the evidence space and the global embeddings.
      prototypes: K.
      lesions: M.
      depth: layers of the lesion decoder.
      num_heads: of its attention; divides the image encoder's width.
      temperature: tau_t of Eq. 4.
      image_temperature: tau_p of Eq. 6.
      alignment_temperature: tau_a.
      global_temperature: of the global InfoNCE.
      shrinkage: lambda_mu of Eq. 5, of a mean over the prototypes.
      neighbours: k of the neighbour graphs.
      hops: T of the propagation.
      alpha: share of the neighbours in a hop, in [0, 1).
      related: reports an image is related to.
      kept: entries of a row during the propagation.
      near_reports: reports an unpaired image starts from, those that are nearest in the joint space
        less how near they are to all images; 0: what reaches it through its neighbours alone.
      confidence: "evidence", do the related reports say the same; "link", is it one report: the
        specification's, which trusts no unpaired image (docs/lgdea.md).
      least_confidence: below it a relation does not count.
      moved: by the two contrasts of relations: "both", or "images" alone, so that a wrong relation
        does not move what a report says.
      paired_moved: likewise by L_evid^p; "images" is Eq. 9, whose teacher is the report.
      related_pairs: in the contrasts of relations a pair is a relation of weight 1, as in the
        specification; else a report that is related to an image apart has its own among its
        negatives there.
      by_share: multiply the terms of rows apart, means over those that are trusted, by the share of
        rows apart in the batch.
      meets: where texts meet images in evaluation: "global", or "evidence", see the head of this
        file.
      loss_tile: side of the tiles of all contrasts of a larger batch; 0 keeps the whole logits.

    Raises:
      UserError: for a value outside these.
    """
    settings = {k: v for k, v in locals().items() if k not in ("image", "text")}
    base.check_weights(weights, TERMS)
    base.check_tile(loss_tile)
    base.check_positive(
        temperature=temperature,
        image_temperature=image_temperature,
        alignment_temperature=alignment_temperature,
        global_temperature=global_temperature,
    )
    if prototypes < 2:
        raise UserError(f"recipe.prototypes={prototypes} must be at least 2.")
    if not 0 <= alpha < 1:
        raise UserError(f"recipe.alpha must be in [0, 1), got {alpha}.")
    if not 2 <= related <= kept:
        raise UserError(f"recipe.related must be in 2 .. recipe.kept={kept}, got {related}.")
    if not 0 <= near_reports <= kept:
        raise UserError(
            f"recipe.near_reports must be in 0 .. recipe.kept={kept}, got {near_reports}."
        )
    if confidence not in relations.CONFIDENCES:
        known = " or ".join(relations.CONFIDENCES)
        raise UserError(f"recipe.confidence must be {known}, got '{confidence}'.")
    for name, what in {"moved": moved, "paired_moved": paired_moved}.items():
        if what not in MOVED:
            raise UserError(f"recipe.{name} must be {' or '.join(MOVED)}, got '{what}'.")
    if meets not in MEETS:
        raise UserError(f"recipe.meets must be {' or '.join(MEETS)}, got '{meets}'.")
    image, text = base.encoder(image), base.encoder(text)
    if image.width % num_heads:
        raise UserError(
            f"recipe.num_heads={num_heads} does not divide the image encoder's {image.width}."
        )
    return Lgdea(image, text, **settings)
