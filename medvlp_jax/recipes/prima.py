"""PRIMA: images and the patient's risk factors, aligned, sharpened, and read by a language model.

Wang et al. 2026, "Pre-training with Risk-integrated Image-Metadata Alignment for Medical Diagnosis
via LLM", https://arxiv.org/abs/2602.23297. No code of the authors is public; what is our choice is
told in docs/prima.md. Stage "inject" (masked words of a risk corpus) is recipes/mlm.py.

  align    0.2 L_img + 0.3 L_glo + 0.2 L_loc + 0.3 L_soft   (Eq. 2-7) of two views and a text;
           projections and low-rank factors of the image encoder train
  sharpen  cross-entropy of a linear head on the class token before the projection; factors, head
  fuse     cross-entropy of a language model's next token, over the tokens of the classes alone;
           projectors, delimiters and factors of the language model train

Each is a run that starts from the run before it (`init.params`).
Axis letters: B patients, J views, K patches, T tokens of the text (its class token first), D width
of the encoders, E of the joint space, W of the language model, C classes.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from medvlp_jax.config import UserError, nearest
from medvlp_jax.data.prompts import Prompt
from medvlp_jax.encoders.base import Encoded, Tokens, normalise, pool
from medvlp_jax.layers import Fusion, Linear, Projector
from medvlp_jax.losses import contrastive, local
from medvlp_jax.recipes import base
from medvlp_jax.schedules import Knots

TERMS = {
    "align": ("image", "global", "local", "soft"),
    "sharpen": ("cross_entropy",),
    "fuse": ("cross_entropy",),
}
BASES = "(?!.*/lora_[ab]$)"  # all of an encoder but its low-rank factors
CHOICES = {
    "stage": tuple(TERMS),
    "local": ("attention", "direct"),
    "soft": ("metadata", "label"),
    "soft_norm": ("mean", "paper"),
    "train_image": ("lora", "all"),
    "train_llm": ("lora", "all"),
    "mlp_reads": ("text", "vector"),
}


class Prima(nn.Module):
    """Stages 2 and 3; see `make` for the fields."""

    stage: str
    image: nn.Module
    text: nn.Module
    label: str
    num_classes: int
    weights: Mapping[str, float | Knots]
    images: tuple[str, ...]
    views: int
    dim: int
    hidden: int
    temperature: float
    label_temperature: float
    label_weight: float
    local: str
    soft: str
    soft_norm: str
    symmetric_views: bool
    printed_local: bool
    loss_tile: int
    cached_text: bool
    train_image: str
    metadata_mlp: int
    mlp_reads: str
    llm: nn.Module | None
    prompt: Prompt | None
    fusion_hidden: int
    train_llm: str

    @property
    def spaces(self) -> dict[str, tuple[str, str]]:
        """No report meets the image here."""
        return {}

    @property
    def classifies(self) -> bool:
        """Whether there are `logits`."""
        return self.stage != "align"

    @property
    def task(self) -> str:
        """Label task of the corpus."""
        return self.label

    @property
    def inputs(self) -> tuple[str, ...]:
        """Batch keys read in training; "image_2" is the second scan, or view, of a patient."""
        pair = ("image", "image_2")
        seen = {
            "align": pair,
            "sharpen": self.images,
            "fuse": self.images if len(self.images) > 1 else pair[: self.views],
        }
        told = self._told
        if self.cached_text and "metadata" in told:
            told += ("metadata_feature",)
        if self.stage == "align":
            told += ("metadata_vector",)
        return (*seen[self.stage], *told, f"label/{self.label}")

    @property
    def evaluated(self) -> tuple[str, ...]:
        """Batch keys read in evaluation: each image as it is, texts through the encoder."""
        return (*self.images, *self._told)

    @property
    def _told(self):
        """What this stage sees of the table; sharpening sees none, but for a baseline."""
        if self.stage != "sharpen":
            return ("metadata",)
        one = {"text": "metadata", "vector": "metadata_vector"}[self.mlp_reads]
        return (one,) if self.metadata_mlp else ()

    @property
    def frozen(self) -> tuple[str, ...]:
        """What this stage does not train."""
        image = () if self.train_image == "all" else (f"^image/{BASES}",)
        llm = () if self.train_llm == "all" else (f"^llm/{BASES}",)
        return {
            "align": (*image, "^text/"),
            "sharpen": (*image, "^text/", "^(image|text)_projection/"),
            "fuse": ("^(image|text)(_projection)?/", *llm),
        }[self.stage]

    @property
    def fresh(self) -> tuple[str, ...]:
        """Parts that may be absent from the run before."""
        begun = ("image", "image_projection", "text_projection")
        return {
            "align": begun,
            "sharpen": (*begun, "classifier", "metadata_hidden", "metadata_out"),
            "fuse": ("llm", "fusion"),
        }[self.stage]

    @property
    def left(self) -> tuple[str, ...]:
        """Patterns of what the run before may have and this stage has no use for."""
        return ("^text/mlm_", *(("^(classifier|metadata_.*)/",) * (self.stage == "fuse")))

    def setup(self):
        """Name the parts."""
        self.image_projection = Projector(self.dim, self.hidden, has_norm=True)
        self.text_projection = Projector(self.dim, self.hidden, has_norm=True)
        if self.stage == "sharpen":
            self.classifier = Linear(self.num_classes)
            if self.metadata_mlp:
                self.metadata_hidden = Linear(self.metadata_mlp)
                self.metadata_out = Linear(self.metadata_mlp)
        if self.stage == "fuse":
            self.fusion = Fusion(self.llm.width, self.fusion_hidden)

    def __call__(self, batch, *, train=False):
        """Run both halves."""
        return self.objective(self.encode(batch, train=train), batch, train=train)

    def encode(self, batch, *, train=False):
        """Return what the stage makes of uint8 images and a text.

        align     `image`, `text` [B, E] unit norm; in training also, as projected, `views`
                  [B, J, E], `patches` [B, J, K, E], `words` [B, T-1, E] and `words_mask`
        sharpen   `logits` [B, C], `each` [B, J, C]
        fuse      `logits` [B, C]

        and `image_pooled` [B, D], the class token before the projection, mean over views.
        """
        image, text = self._see(batch, train), self._read(batch)
        features = {} if image is None else {"image_pooled": image.pooled.mean(1)}
        if self.stage == "fuse":
            return features | self._fuse(image, text, train)
        if self.stage == "align" or self.is_initializing():  # sharpening carries its parts on
            features |= self._align(image, text, train)
        if self.stage == "sharpen":
            read = text is not None and self.mlp_reads == "text"
            features |= self._sharpen(image, text.pooled if read else batch.get("metadata_vector"))
        return features

    def objective(self, features, batch, *, train=False):
        """Return the terms of the stage, unweighted."""
        one_hot = batch[f"label/{self.label}"]  # [B, C], 1 present, 0 absent, -1 unknown
        if self.stage == "align":
            return self._alignment(features, one_hot == 1, batch["metadata_vector"])
        known = (one_hot == 1).any(1)
        logits = features.get("each", features["logits"][:, None])  # [B, J, C]
        target = jnp.where(known, one_hot.argmax(1), 0)[:, None]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, target).mean(1)
        return {"cross_entropy": jnp.where(known, losses, 0).sum() / jnp.maximum(known.sum(), 1)}

    def _see(self, batch, train) -> Encoded | None:
        """Return pooled [B, J, D] and tokens [B, J, K, D] of all images that are there."""
        names = self.images
        if len(names) == 1 or any(name not in batch for name in names):
            pair = ("image", "image_2")[: self.views if self.stage == "fuse" else 2]
            names = [name for name in pair if name in batch]
        if not names:
            return None
        images = jnp.stack([batch[name] for name in names], axis=1)  # [B, J, H, W, 1 or 3]
        flat = normalise(images.reshape(-1, *images.shape[2:]))
        encoded = self.image(flat, train=train and self.stage != "fuse")
        split = lambda x: x.astype(jnp.float32).reshape(*images.shape[:2], *x.shape[1:])
        return Encoded(split(encoded.pooled), split(encoded.tokens))

    def _read(self, batch) -> Encoded | None:
        """Return the text pooled [B, D], the tokens after the first [B, T-1, D] and their mask.

        The encoder is frozen and not in training mode: cached tokens are what it would give.
        """
        if "metadata" not in batch:
            return None
        tokens = batch["metadata"]
        x = batch.get("metadata_feature")
        x = (self.text(tokens).tokens if x is None else x).astype(jnp.float32)
        # A token is a word where another follows it: the last one closes the text.
        follows = jnp.pad(tokens.mask[:, 2:], ((0, 0), (0, 1)))
        return Encoded(pool(x, tokens.mask, self.text.pooling), x[:, 1:], follows)

    def _align(self, image, text, train):
        features = {}
        if image is not None:
            views = self.image_projection(image.pooled)
            features["image"] = base.unit(views.mean(1))
            if train:  # too large to keep of a whole corpus
                features |= {"views": views, "patches": self.image_projection(image.tokens)}
        if text is not None:
            features["text"] = base.unit(self.text_projection(text.pooled))
            if train:
                words = self.text_projection(text.tokens)
                features |= {"words": words, "words_mask": text.mask}
        return features

    def _sharpen(self, image, table):
        if image is None or (self.metadata_mlp and table is None):
            return {}
        x = image.pooled  # [B, J, D]
        if self.metadata_mlp:
            y = self.metadata_out(nn.relu(self.metadata_hidden(table)))
            y = jnp.broadcast_to(y[:, None], (*x.shape[:2], y.shape[-1]))
            x = jnp.concatenate([x, y], axis=-1)
        each = self.classifier(x)
        mean = jax.nn.logsumexp(jax.nn.log_softmax(each), axis=1) - jnp.log(each.shape[1])
        return {"each": each, "logits": mean}

    def _fuse(self, image, text, train):
        if image is None or text is None:
            return {}
        j = image.pooled.shape[1]
        if j == 1 < self.views:  # a scan without a sibling is seen twice
            image = Encoded(*(jnp.repeat(x, self.views, axis=1) for x in image[:2]))
        elif j != self.views:
            return {}
        words = lambda ids: self.llm.embed(jnp.asarray(ids)[None])  # [1, n, W]
        begin = jnp.concatenate([words(ids).mean(1) for ids in self.prompt.delimiters])
        embeddings, mask = self.fusion(
            (self.image_projection(image.pooled), self.image_projection(image.tokens)),
            (self.text_projection(text.pooled), self.text_projection(text.tokens), text.mask),
            question=words(self.prompt.question),
            answer=words(self.prompt.answer),
            delimiters=begin,
        )
        read = self.llm(Tokens(embeddings, mask), train=train)
        return {"logits": self.llm.decode(read.pooled, jnp.asarray(self.prompt.classes))}

    def _alignment(self, features, label, metadata):
        """Return the four losses, Eq. 2-6."""
        views, text = base.unit(features["views"]), features["text"]
        info_nce = base.contrastive_loss("info_nce", self.loss_tile)
        consistency = base.contrastive_loss("view_consistency", self.loss_tile)
        across = lambda x, y: sum(info_nce(x[:, j], y, 1 / self.temperature) for j in (0, 1)) / 2
        y = jnp.concatenate([label * self.label_weight, metadata * (self.soft == "metadata")], 1)
        return {
            "image": consistency(
                views[:, 0], views[:, 1], 1 / self.temperature, symmetric=self.symmetric_views
            ),
            "global": across(views, text),
            "local": self._local(features, info_nce),
            "soft": contrastive.soft_semantic(
                views,
                text,
                y,
                temperature=self.temperature,
                label_temperature=self.label_temperature,
                norm=self.soft_norm,
                loss=info_nce,
            ),
        }

    def _local(self, features, info_nce):
        """Return Eq. 4-5, or the ablation without attention."""
        given = [features[key] for key in ("words", "words_mask", "patches")]
        if self.local == "direct":
            return local.direct_alignment(*given, temperature=self.temperature, loss=info_nce)
        printed = self.printed_local
        return local.token_patch_alignment(*given, temperature=self.temperature, printed=printed)


def make(
    *,
    stage: str,
    image: Mapping | nn.Module,
    text: Mapping | nn.Module,
    label: str,
    num_classes: int,
    weights: Mapping[str, float | Knots],
    images: tuple[str, ...] = ("image",),
    views: int = 2,
    dim: int = 768,
    hidden: int = 768,
    temperature: float = 0.07,
    label_temperature: float = 5.0,
    label_weight: float = 3.0,
    local: str = "attention",
    soft: str = "metadata",
    soft_norm: str = "mean",
    symmetric_views: bool = False,
    printed_local: bool = False,
    loss_tile: int = 512,
    cached_text: bool = True,
    train_image: str = "lora",
    metadata_mlp: int = 0,
    mlp_reads: str = "text",
    llm: Mapping | nn.Module | None = None,
    prompt: Prompt | None = None,
    fusion_hidden: int = 1024,
    train_llm: str = "lora",
) -> Prima:
    """Build a stage.

    Args:
      stage: "align", "sharpen" or "fuse".
      image: encoder spec {"name", "variant", "lora": {rank, alpha, dropout, layers}, ...} or
        module, with `tokens` on a square grid.
      text: likewise; always frozen.
      label: label task of the corpus.
      num_classes: C.
      weights: of the TERMS of the stage.
      images: batch keys of the modalities; with one, a second scan or view of it is drawn.
      views: J of stage "fuse"; with several modalities, their number.
      dim: E.
      hidden: width inside the projections.
      temperature: tau, above 0.
      label_temperature: tau_label of Eq. 6, above 0.
      label_weight: what a one-hot diagnosis is multiplied by in y; 0 leaves the metadata alone.
      local: "attention" (Eq. 4-5) or "direct", the ablation L_loc_dir.
      soft: y of "metadata" and label, or of the "label" alone, the ablation L_sup_con; still times
        label_weight, the literal form is label_weight=1.
      soft_norm: "mean", 1/(4N), or "paper", 1/(4N^2).
      symmetric_views: Eq. 2 with both views as anchors.
      printed_local: the second term of Eq. 5 as printed, which repeats the first.
      loss_tile: side of a tile of the losses over the batch; 0 is dense.
      cached_text: encode each different text once, before the first step.
      train_image: "lora" trains the image encoder's low-rank factors, "all" all of it.
      metadata_mlp: width of an MLP on the metadata, beside the image in stage "sharpen": the
        baseline "+ metadata via MLP"; 0 is the image alone.
      mlp_reads: the "text"'s class token, as the paper's baseline does, or the "vector" of Eq. 6.
      llm: language model of stage "fuse", spec or module.
      prompt: its token ids.
      fusion_hidden: channels inside the convolution blocks.
      train_llm: "lora" or "all".

    Raises:
      UserError: for a value outside these.
    """
    settings = {k: v for k, v in locals().items() if k not in ("image", "text", "llm", "images")}
    for name, known in CHOICES.items():
        if (given := settings[name]) not in known:
            raise UserError(f"No recipe.{name} '{given}'. {nearest(given, known)}")
    base.check_weights(weights, TERMS[stage])
    base.check_tile(loss_tile)
    base.check_positive(temperature=temperature, label_temperature=label_temperature)
    images = tuple(images)
    accepted = (1, 2) if len(images) == 1 else (len(images),)
    if views not in accepted:
        fitting = " or ".join(map(str, accepted))
        raise UserError(f"recipe.views={views}, but of recipe.images={images} it can be {fitting}.")
    parts = {"image": base.encoder(image), "text": base.encoder(text)}
    if stage == "fuse":
        if llm is None or prompt is None:
            raise UserError("recipe.stage=fuse needs recipe.llm and recipe.prompt.")
        parts["llm"] = base.encoder(llm)
        if len(prompt.classes) != num_classes:
            options = f"the prompt has {len(prompt.classes)} options, one a class of the corpus"
            raise UserError(f"recipe.num_classes={num_classes}, but {options}.")
    trained = {"llm": train_llm} if stage == "fuse" else {"image": train_image}
    for side, which in trained.items():
        if which == "lora" and parts[side].lora is None:
            lacks = f"recipe.{side}.lora.rank is 0: nothing would train"
            raise UserError(f"recipe.train_{side}=lora, but {lacks}.")
    return Prima(images=images, **{"llm": None, **settings, **parts})
