"""IMITATE: multi-level image features meet Findings, the top level meets Impression.

Liu, Cheng, Shi, Shah, Bai, Arcucci, "IMITATE: Clinical Prior Guided Hierarchical Vision-Language
Pre-training", IEEE TMI 2025, https://arxiv.org/abs/2310.07355. What follows the released code and
what is our choice is told in docs/imitate.md.

  diagnosis branch  top-level feature  -> d [B, E]   contrasts with Impression
  reading branch    a random few channels of every level, each pooled to 16x16 and taken as one
                    token, one attention layer -> r [B, E]   contrasts with Findings

  L = L_imp + beta L_find + L_vv,d + beta L_vv,r      (1.2.4 of the specification)

Axis letters: B batch, E joint width, D feature width, N pixels of the last level. The reading head
is layers/reading.py.
"""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from medvlp_jax.config import UserError
from medvlp_jax.encoders.base import encode_pixels
from medvlp_jax.layers.reading import Head, ReadingHead
from medvlp_jax.losses import contrastive, targets, tiled
from medvlp_jax.losses.contrastive import ClinicalPrior
from medvlp_jax.recipes import base
from medvlp_jax.schedules import Knots

TERMS = ("impression", "findings", "view_diagnosis", "view_reading")
SECTIONS = ("findings", "impression")
MASSES = tuple(f"mass_{section}" for section in SECTIONS)  # logged beside the losses
KERNELS = ("none", *contrastive.KERNELS)
BRANCHES = {"reading": "image_findings", "diagnosis": "image"}  # the feature Findings meet

# For the model card of an export: the diagnosis branch and the text head on an Impression.
HEADS_IN_TORCH = """
def embed(x, side):
    name, source = ("diagnosis", "") if side == "image" else ("text_head", "{source}")
    p = lambda key: heads[f"params/{{name}}/{{key}}"]
    moment = lambda key, kind: heads[f"batch_stats/{{name}}/{{key}}/{{kind}}{{source}}"]
    norm = lambda x, key, *affine: batch_norm(x, moment(key, "mean"), moment(key, "var"), *affine)
    x = x @ p("first/kernel") + p("first/bias")
    x = norm(x, "norm", p("norm/scale"), p("norm/bias")).relu()
    return normalize(norm(x @ p("second/kernel") + p("second/bias"), "last_norm"), dim=-1)

"""


class Imitate(nn.Module):
    """The whole method; see `make` for the fields."""

    image: nn.Module
    text: nn.Module
    weights: Mapping[str, float | Knots]
    dim: int
    keep: tuple[float, ...]
    num_tokens: int
    mask_padding: bool
    eval_draws: int
    text_hidden: int
    temperature: float
    view_temperature: float
    kernel: str
    strength: float
    findings_meet: str
    centre_prior: bool
    normalise_target: bool
    same_text: bool
    contrast_group: int
    loss_tile: int
    train_text: bool
    cached_text: bool
    legacy_mean_over_batch: bool
    legacy_four_passes: bool
    legacy_shared_statistics: bool

    @property
    def inputs(self) -> tuple[str, ...]:
        """Batch keys read in training."""
        suffix = "_feature" if self.cached_text else ""
        keys = ("image", "image_2")
        for section in SECTIONS:
            keys += (f"{section}{suffix}", f"{section}_valid")
            keys += (f"{section}_id",) if self.same_text else ()
        return keys

    @property
    def frozen(self) -> tuple[str, ...]:
        """Parameter patterns that are never trained."""
        return () if self.train_text else ("^text/",)

    @property
    def watched(self) -> tuple[str, ...]:
        """Terms that are logged and no loss."""
        return MASSES

    @property
    def reads_blank(self) -> bool:
        """A missing section is the blank text it is in the release's table, which BERT encodes."""
        return self.legacy_mean_over_batch

    @property
    def spaces(self) -> dict[str, tuple[str, str]]:
        """Impression meets the diagnosis branch, Findings the reading branch."""
        seen = BRANCHES[self.findings_meet]
        return {"impression": ("image", "text"), "findings": (seen, "text_findings")}

    @property
    def heads_in_torch(self) -> str:
        """PyTorch source of embed(pooled, "image" or "text"), see `export`."""
        return HEADS_IN_TORCH.format(source="" if self.legacy_shared_statistics else "_impression")

    def setup(self):
        """Name the heads."""
        self.diagnosis = Head(self.image.width, self.dim)
        self.reading = ReadingHead(self.dim, self.num_tokens, self.mask_padding)
        self.text_head = Head(self.text_hidden, self.dim)

    def __call__(self, batch, *, train=False):
        """Run both halves."""
        return self.objective(self.encode(batch, train=train), batch, train=train)

    def draw(self, keys) -> list[list[jax.Array | None]]:
        """Draw channel indices of every level, with replacement, a draw for each of the keys.

        A share of 1 takes every channel once, in order (None): small encoders have few enough, and
        a token that stands for the same channel in each step can be told by its position.
        """
        split = jax.vmap(lambda key: jax.random.split(key, len(self.keep)))(keys)
        levels = []
        for level, (share, width) in enumerate(
            zip(self.keep, self.image.level_widths, strict=True)
        ):
            # All keys at once: one by one this was a fifth of the instructions of a small step.
            randint = partial(
                jax.random.randint, shape=(int(share * width),), minval=0, maxval=width
            )
            levels.append([None] * len(keys) if share == 1 else jax.vmap(randint)(split[:, level]))
        return [list(of_draw) for of_draw in zip(*levels, strict=True)]

    def encode(self, batch, *, train=False):
        """Return the embeddings of the modalities in the batch, all [B, E] and unit norm.

        `image`, `text`: diagnosis branch and Impression, the joint space.
        `image_findings`, `text_findings`: reading branch and Findings.
        With `image_2` (training): `image_2`, `image_findings_2`, and the second reading draws
        `reading`, `reading_2` of the image-image term. `<section>_report`: raw report features.
        """
        features = {}
        if "image_2" in batch:
            features |= self._encode_views(batch, train)
        elif "image" in batch:
            encoded = encode_pixels(self.image, batch["image"], train=train)
            features["image_pooled"] = encoded.pooled
            features["image"] = base.unit(self.diagnosis(encoded.pooled, train=train))
            # Evaluation must not depend on a draw: the mean over a few fixed ones.
            keys = jax.random.split(jax.random.key(0), self.eval_draws)
            reads = self.reading(encoded.levels, self.draw(keys), train=train)
            features["image_findings"] = base.unit(sum(base.unit(r) for r in reads))
        for section, name in (("findings", "text_findings"), ("impression", "text")):
            report = self._encode_report(batch, section, train)
            if report is not None:
                features[f"{section}_report"] = report
                # In training each section is normalised by its own batch; one running average of
                # both would fit neither in evaluation.
                kind = {"source": "" if self.legacy_shared_statistics else section}
                # Nor must it depend on what stands where a section is missing.
                if not self.reads_blank:
                    kind["valid"] = batch.get(f"{section}_valid")
                features[name] = base.unit(self.text_head(report, train=train, **kind))
        return features

    def localise(self, batch):
        """Return cosine [B, N, E] of the pixels of the last level, and [B, E] of `phrase`.

        The diagnosis branch, which is trained on the mean over these pixels, meets the Impression.
        """
        found = {}
        if "image" in batch:
            pixels = encode_pixels(self.image, batch["image"]).tokens  # [B, N, D]
            flat = self.diagnosis(rearrange(pixels, "b n d -> (b n) d"), train=False)
            found["cosine"] = base.unit(rearrange(flat, "(b n) e -> b n e", b=len(pixels)))
        if "phrase" in batch:
            report = self.text(batch["phrase"]).pooled
            source = "" if self.legacy_shared_statistics else "impression"
            found["cosine"] = base.unit(self.text_head(report, train=False, source=source))
        return found

    def _encode_report(self, batch, section, train):
        """Return raw report features [B, D] of one section, cached or computed; None if absent."""
        if f"{section}_feature" in batch:
            return batch[f"{section}_feature"]
        if section not in batch:
            return None
        report = self.text(batch[section], train=train and self.train_text).pooled
        return report if self.train_text else jax.lax.stop_gradient(report)

    def _encode_views(self, batch, train):
        """Encode two views. The draws a, b serve the report terms and c, d the image-image term.

        The release runs the backbone once per draw, four times; two passes give the same losses
        and gradients, since only the reading head depends on the draw. `legacy_four_passes` keeps
        their four, which also updates the BatchNorm averages twice per view.
        """
        a, b, c, d = self.draw(jax.random.split(self.make_rng("draws"), 4))
        views = (("image", a, c, ""), ("image_2", b, d, "_2"))
        features = {}

        def see(view, draws, suffix):
            encoded = encode_pixels(self.image, batch[view], train=train)
            features[f"image{suffix}"] = base.unit(self.diagnosis(encoded.pooled, train=train))
            reads = self.reading(encoded.levels, draws, train=train)
            return [base.unit(read) for read in reads]

        for view, first, second, suffix in views:
            # Where nothing is drawn, both readings are the same.
            whole = all(channels is None for channels in second)
            draws = [first] if self.legacy_four_passes or whole else [first, second]
            reads = see(view, draws, suffix)
            features[f"image_findings{suffix}"] = reads[0]
            features[f"reading{suffix}"] = reads[-1]
        if self.legacy_four_passes:
            for view, _, second, suffix in views:
                (features[f"reading{suffix}"],) = see(view, [second], suffix)
        return features

    def objective(self, features, batch, *, train=False):
        """Return the four terms of 1.2.4, unweighted; each is a sum of two C(...).

        And the mass of the prior of each section, which is no loss.
        """
        f = features
        findings, impression = batch["findings_valid"], batch["impression_valid"]
        everything = jnp.ones_like(impression)
        c = self._contrast
        report = lambda view: c(f[view], f["text"], batch, f, "impression", impression)
        reading = lambda view: c(f[view], f["text_findings"], batch, f, "findings", findings)
        views = lambda x, y: c(f[x], f[y], batch, f, "impression", everything, views=True)
        view_diagnosis = views("image", "image_2")
        # A target whose rows sum to 1 is not symmetric, and neither is its contrast.
        back = views("image_2", "image") if self.normalise_target else view_diagnosis
        view_reading = c(f["reading"], f["reading_2"], batch, f, None, findings, views=True)
        seen = BRANCHES[self.findings_meet]
        masses = {}
        if self.kernel != "none":
            found = (self._mass(f[f"{s}_report"], batch[f"{s}_valid"]) for s in SECTIONS)
            masses = dict(zip(MASSES, found, strict=True))
        return {
            "impression": report("image") + report("image_2"),
            "findings": reading(seen) + reading(f"{seen}_2"),
            "view_diagnosis": view_diagnosis + back,
            "view_reading": 2 * view_reading,
            **masses,
        }

    @property
    def _tile(self) -> int:
        """Side of the tiles of a loss group; 0 is dense."""
        # Groups that fit a tile need no tiles: all of them are one batched matrix product.
        return 0 if 0 < self.contrast_group <= self.loss_tile else self.loss_tile

    def _prior(self, report, has_report, *, temperature, ids=None):
        """Return S of a group of reports, for targets of logits of this temperature."""
        return ClinicalPrior(
            report,
            strength=self.strength,
            kernel=self.kernel,
            temperature=temperature,
            ids=ids,
            has_report=has_report,
            centre=self.centre_prior,
            normalise=self.normalise_target,
        )

    def _mass(self, report, has_report):
        """Mean over contrast groups of what the prior adds to the 1 of a row; image-text's tau."""
        tile = self._tile
        of_prior = partial(targets.prior_mass, tile=tile) if tile else contrastive.prior_mass
        mass = lambda *group: of_prior(self._prior(*group, temperature=self.temperature))
        return contrastive.grouped(mass, self.contrast_group, one_by_one=tile > 0)(
            report, has_report
        )

    def _contrast(self, x, y, batch, features, section, valid, *, views=False):
        """C(x, y; tau, S) of 1.2.3 inside contrast groups; S from `section`, or none."""
        temperature = self.view_temperature if views else self.temperature
        use_prior = section is not None and self.kernel != "none"
        use_ids = self.same_text and section is not None and not views
        invalid = "keep" if self.legacy_mean_over_batch else "drop"
        info_nce = base.contrastive_loss("info_nce", self._tile)

        def loss(x, y, valid, report, has_report, ids):
            prior = None
            if use_prior:
                prior = self._prior(report, has_report, temperature=temperature, ids=ids)
            elif ids is not None:
                prior = contrastive.SameId(ids)
            loss = info_nce(x, y, 1 / temperature, prior=prior, valid=valid, invalid=invalid)
            return 2 * loss

        return contrastive.grouped(loss, self.contrast_group, one_by_one=self._tile > 0)(
            x,
            y,
            valid,
            features[f"{section}_report"] if use_prior else None,
            batch[f"{section}_valid"] if use_prior else None,
            batch[f"{section}_id"] if use_ids else None,
        )


def make(
    *,
    image: Mapping | nn.Module,
    text: Mapping | nn.Module,
    weights: Mapping[str, float | Knots],
    dim: int = 512,
    keep: tuple[float, ...] = (0.25, 0.15, 0.10, 0.10),
    num_tokens: int = 512,
    mask_padding: bool = False,
    eval_draws: int = 4,
    text_hidden: int = 1024,
    temperature: float = 0.07,
    view_temperature: float = 0.2,
    kernel: str = "exp",
    strength: float = 0.2,
    findings_meet: str = "reading",
    centre_prior: bool = False,
    normalise_target: bool = False,
    same_text: bool = False,
    contrast_group: int = 0,
    loss_tile: int = tiled.TILE,
    train_text: bool = False,
    cached_text: bool = True,
    legacy_mean_over_batch: bool = False,
    legacy_four_passes: bool = False,
    legacy_shared_statistics: bool = False,
) -> Imitate:
    """Build the recipe; the defaults are the released code's, but for `contrast_group`.

    Args:
      image: encoder spec {"name", "variant", ...} or module with `levels`, e.g. a ResNet.
      text: encoder spec or module.
      weights: number or (step, value) knots for each of TERMS; beta weighs findings, view_reading.
      dim: joint width E.
      keep: share of the channels drawn from each level; 1 takes all, in order (our choice).
      num_tokens: reading tokens after padding.
      mask_padding: keep padding tokens out of the attention (the release attends to them).
      eval_draws: fixed channel draws averaged in evaluation (our choice).
      text_hidden: hidden width of the text head.
      temperature: image-text.
      view_temperature: image-image.
      kernel: "exp", "gaussian", "laplacian", "sigmoid" or "none" (plain InfoNCE).
      strength: lambda of the "exp" kernel.
      findings_meet: the "reading" branch, or the "diagnosis" branch as Impression does; with
        weights.view_reading=0 the ablation without a hierarchy.
      centre_prior: centre report features over the batch before the correlation (our extension).
      normalise_target: soft targets of an image sum to 1 over the reports (our extension).
      same_text: equal sections are positives of one another (our choice, for corpora with repeats).
      contrast_group: examples a loss group, the release's 128 a device; 0 is the global batch.
      loss_tile: side of the tiles the losses are computed in; 0 keeps the whole logits of a group.
      train_text: train the text encoder instead of freezing it as the paper does.
      cached_text: read frozen text features from the batch instead of encoding tokens.
      legacy_mean_over_batch: divide by the batch size, keep missing sections as negatives, and read
        them as blank texts that count in the text head's BatchNorm.
      legacy_four_passes: four backbone passes as released, same losses, BatchNorm averages differ.
      legacy_shared_statistics: one running average of the text head for both sections, as released;
        training is the same, evaluation is not.

    Raises:
      UserError: for a value outside these.
    """
    settings = {k: v for k, v in locals().items() if k not in ("image", "text")}
    base.check_weights(weights, TERMS)
    base.check_tile(loss_tile)
    base.check_positive(temperature=temperature, view_temperature=view_temperature)
    if eval_draws < 1:
        raise UserError(f"recipe.eval_draws={eval_draws} must be at least 1.")
    if kernel not in KERNELS:
        raise UserError(f"recipe.kernel must be one of {', '.join(KERNELS)}, got '{kernel}'.")
    if findings_meet not in BRANCHES:
        known = " or ".join(BRANCHES)
        raise UserError(f"recipe.findings_meet must be {known}, got '{findings_meet}'.")
    if train_text and cached_text:
        raise UserError(
            "recipe.train_text=True changes the text features: set recipe.cached_text=False."
        )
    image, text = base.encoder(image), base.encoder(text)
    widths = getattr(image, "level_widths", ())
    if len(widths) != len(keep):
        raise UserError(
            f"recipe.keep has {len(keep)} shares but the image encoder has {len(widths)} levels."
        )
    drawn = sum(int(k * w) for k, w in zip(keep, widths, strict=True))
    if drawn > num_tokens:
        raise UserError(f"recipe.num_tokens={num_tokens} cannot hold the {drawn} drawn channels.")
    return Imitate(image, text, **settings)
