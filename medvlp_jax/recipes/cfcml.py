"""CFCML: images and a table, related at every stage of the image encoder, then class by class.

Liu, Liu, Shang, Yu, Han, Wan, "CFCML: A Coarse-to-Fine Crossmodal Learning Framework For Disease
Diagnosis Using Multimodal Images and Tabular Data", https://arxiv.org/abs/2603.20016. What follows
the released code and what is our choice is told in docs/cfcml.md.

  compress   the pixels of stage s of modality m -> p_sm [B, n, C]; the table once, for all stages
  MG-CIE     e_sm = [p_sm, attention(p_sm, the tokens of all other modalities at s)]   [B, 2n, C]
  aggregate  the stages of m, side by side -> z_m [B, C]
  classify   z_1 .. z_M -> logits [B, K]

  L = CE + w_sam L_sam + w_up L_up + w_cp L_cp        (2.3 of the specification)

Axis letters: B batch, M modalities, K classes, C common width, T attributes of the table,
N tokens in, n tokens out, H, W, S pixels and slices.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from medvlp_jax.config import UserError
from medvlp_jax.encoders.base import normalise
from medvlp_jax.layers import Attention, Linear, torch_linear, torch_uniform
from medvlp_jax.losses import prototypes
from medvlp_jax.recipes import base
from medvlp_jax.schedules import Knots

TERMS = ("cross_entropy", "sample", "unimodal", "crossmodal")
ENHANCEMENTS = ("multi_head", "single_head", "none")
TABLE = "tabular"


class TokenConv(nn.Module):
    """A convolution of three taps along the features whose channels are the tokens.

    y[b, o, c] = bias[o] + sum_{d = -1, 0, 1} sum_t W[d, t, o] x[b, t, c + d], zero outside. The
    number and the order of tokens are thereby fixed. One product over t makes all three taps, and
    what is shifted is the small result.
    """

    features: int

    @nn.compact
    def __call__(self, x):
        """Map tokens [B, N, C] to [B, features, C]."""
        count = x.shape[1]
        init = torch_uniform(3 * count)
        kernel = self.param("kernel", init, (3, count, self.features))
        bias = self.param("bias", init, (self.features,))
        taps = jnp.einsum("btc,dto->dboc", x, kernel.astype(x.dtype))
        left, middle, right = taps
        y = middle.at[:, :, 1:].add(left[:, :, :-1]).at[:, :, :-1].add(right[:, :, 1:])
        return y + bias[:, None].astype(x.dtype)


class SingleHead(nn.Module):
    """The ablation's attention: one head, no bias, no output projection."""

    @nn.compact
    def __call__(self, x, *, context):
        """Map [B, n, C] and context [B, U, C] to [B, n, C]."""
        width = x.shape[-1]
        linear = lambda name, source: Linear(
            width, use_bias=False, kernel_init=torch_uniform(width), name=name
        )(source)
        logits = jnp.einsum("bnc,buc->bnu", linear("query", x), linear("key", context))
        return jax.nn.softmax(logits * width**-0.5) @ linear("value", context)


class Fusion(nn.Module):
    """From the stages of every modality to one feature each, and to the logits."""

    num_classes: int
    multi_granularity: bool
    enhance: str
    num_heads: int
    dim: int
    image_tokens: int
    table_tokens: int
    hidden: tuple[int, ...]
    dropout: float

    @nn.compact
    def __call__(self, modalities, *, train):
        """Fuse.

        Args:
          modalities: {name: tokens of each stage, [B, N, c] each}; TABLE has one stage [B, T, D].
          train: apply dropout.

        Returns:
          z [B, M, C] and logits [B, K].
        """
        depth = max(map(len, modalities.values())) if self.multi_granularity else 1
        tokens = {
            name: self._compress(name, stages[-depth:]) for name, stages in modalities.items()
        }
        # The table's tokens are made once and are the same at all stages.
        tokens = {name: each * (depth // len(each)) for name, each in tokens.items()}
        pooled = []
        for name in modalities:
            stages = [self._enhance(name, s, tokens) for s in range(depth)]
            pooled.append(self._aggregate(name, stages))
        z = jnp.stack(pooled, axis=1)  # [B, M, C]
        x = z.reshape(len(z), -1)
        for i, width in enumerate(self.hidden):
            x = nn.relu(torch_linear(x, width, f"hidden_{i}"))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return z, torch_linear(x, self.num_classes, "logits")

    def _count(self, name):
        return self.table_tokens if name == TABLE else self.image_tokens

    def _compress(self, name, stages):
        """Return n tokens [B, n, C] of each stage; none is projected that is C wide already."""
        compressed = []
        for s, x in enumerate(stages):
            if name == TABLE:
                x = nn.relu(torch_linear(x, self.dim, "attributes"))  # [B, T, C]
            x = TokenConv(self._count(name), name=f"compress_{s}_{name}")(x)  # [B, n, c]
            wide = x.shape[-1] == self.dim
            compressed.append(x if wide else torch_linear(x, self.dim, f"project_{s}_{name}"))
        return compressed

    def _enhance(self, name, s, tokens):
        """Return a modality's tokens of a stage and what they find in the others [B, 2n, C]."""
        own = tokens[name][s]
        if self.enhance == "none":
            return own
        others = jnp.concatenate([t[s] for other, t in tokens.items() if other != name], axis=1)
        if self.enhance == "single_head":
            attend = SingleHead(name=f"attend_{s}_{name}")
        else:
            init = torch_uniform(self.dim)
            attend = Attention(
                self.num_heads, kernel_init=init, bias_init=init, name=f"attend_{s}_{name}"
            )
        return jnp.concatenate([own, attend(own, context=others)], axis=1)

    def _aggregate(self, name, stages):
        """Return z_m [B, C]; a single stage is pooled directly."""
        x = stages[0]
        if len(stages) > 1:
            x = TokenConv(self._count(name), name=f"aggregate_{name}")(jnp.concatenate(stages, 1))
        return x.mean(1)


class Cfcml(nn.Module):
    """The whole method; see `make` for the fields."""

    image: nn.Module | None
    images: tuple[str, ...]
    table: bool
    task: str
    num_classes: int
    weights: Mapping[str, float | Knots]
    share_encoder: bool
    multi_granularity: bool
    enhance: str
    num_heads: int
    dim: int
    image_tokens: int
    table_tokens: int
    hidden: tuple[int, ...]
    dropout: float
    temperature: float
    memory: float
    grad_multistage: bool
    legacy_bgr: bool

    @property
    def modalities(self) -> tuple[str, ...]:
        """Batch keys of what is fused, images first."""
        return (*self.images, *((TABLE,) if self.table else ()))

    @property
    def inputs(self) -> tuple[str, ...]:
        """Batch keys read in training."""
        return (*self.modalities, f"label/{self.task}")

    @property
    def frozen(self) -> tuple[str, ...]:
        """Every parameter trains; the table's text encoder is no part of the recipe."""
        return ()

    @property
    def copies(self) -> dict[str, tuple[str, ...]]:
        """Where an image encoder's weights go if each image has its own."""
        names = tuple(f"encoders_{i}" for i in range(len(self.images)))
        return {} if self.share_encoder else {"image": names}

    @property
    def spaces(self) -> dict[str, tuple[str, str]]:
        """No text meets the image: this method classifies."""
        return {}

    def setup(self):
        """Name the parts."""
        if not self.share_encoder:  # a copy is a set of weights of its own
            self.encoders = [self.image.clone(parent=None) for _ in self.images]
        fields = ("num_classes", "multi_granularity", "enhance", "num_heads", "dim")
        fields += ("image_tokens", "table_tokens", "hidden", "dropout")
        self.fusion = Fusion(**{name: getattr(self, name) for name in fields})
        if self.memory:
            shape = (len(self.modalities), self.num_classes, self.dim)
            kept = {"unimodal": shape, "crossmodal": shape[1:], "known": shape[1:2]}
            self.remembered = {
                name: self.variable(
                    "memory", name, jnp.zeros, shape, bool if name == "known" else None
                )
                for name, shape in kept.items()
            }

    def __call__(self, batch, *, train=False):
        """Run both halves."""
        return self.objective(self.encode(batch, train=train), batch, train=train)

    def encode(self, batch, *, train=False):
        """Return `logits` [B, K], `modalities` z [B, M, C] and `image_pooled` [B, D].

        Images are uint8 [B, H, W, 1 or 3] or float volumes [B, H, W, S], the table is [B, T, D]:
        one row an attribute. All images without the table give `image_pooled`, anything less
        nothing.
        """
        if any(name not in batch for name in self.images):
            return {}
        stages, pooled = {}, []
        for i, name in enumerate(self.images):
            encoder = self.image if self.share_encoder else self.encoders[i]
            encoded = encoder(self._prepare(batch[name]), train=train)
            stages[name] = self._stages(encoded)
            pooled.append(encoded.pooled)
        features = {"image_pooled": jnp.concatenate(pooled, axis=-1)} if pooled else {}
        if self.table and TABLE not in batch:
            return features
        if self.table:
            stages[TABLE] = [batch[TABLE].astype(jnp.float32)]
        z, logits = self.fusion(stages, train=train)
        return features | {
            "logits": logits.astype(jnp.float32),
            "modalities": z.astype(jnp.float32),
        }

    def levels(self, batch):
        """Return {image: feature maps of the stages that are fused}, for maps of the attention."""
        found = {}
        for i, name in enumerate(self.images):
            encoder = self.image if self.share_encoder else self.encoders[i]
            encoded = encoder(self._prepare(batch[name]), train=False)
            last = encoded.tokens.reshape(encoded.levels[-1].shape)
            maps = [*encoded.levels[:-1], last]
            found[name] = maps if self.multi_granularity else maps[-1:]
        return found

    def _prepare(self, image):
        """Return what the encoder takes: one channel of a volume, three of an image."""
        if image.dtype != jnp.uint8:
            return image[..., None]  # [B, H, W, S, 1]
        if self.legacy_bgr:
            three = jnp.broadcast_to(image, (*image.shape[:-1], 3))
            return three[..., ::-1].astype(jnp.float32) / 255
        return normalise(image)

    def _stages(self, encoded):
        """Return the tokens of every stage, fine to coarse; the last after the encoder's norm."""
        flat = [x.reshape(len(x), -1, x.shape[-1]) for x in encoded.levels[:-1]]
        if not self.grad_multistage:
            flat = [jax.lax.stop_gradient(x) for x in flat]
        return [*flat, encoded.tokens]

    def objective(self, features, batch, *, train=False):
        """Return the cross-entropy and the three relations of 2.3, unweighted."""
        one_hot = batch[f"label/{self.task}"]  # [B, K], 1 present, 0 absent, -1 unknown
        known = (one_hot == 1).any(1)
        label = jnp.where(known, one_hot.argmax(1), -1)
        losses = optax.softmax_cross_entropy_with_integer_labels(features["logits"], label * known)
        cross_entropy = jnp.where(known, losses, 0).sum() / jnp.maximum(known.sum(), 1)
        z = jnp.moveaxis(features["modalities"], 1, 0)  # [M, B, C]
        held = self._held(z, label, train)
        relations = prototypes.hierarchical_relations(
            z, label, self.num_classes, temperature=self.temperature, held=held
        )
        return {"cross_entropy": cross_entropy, **relations}

    def _held(self, z, label, train):
        """Return prototypes averaged over batches, and keep them; None without a memory."""
        if not self.memory:
            return None
        memory = prototypes.Prototypes(**{k: v.value for k, v in self.remembered.items()})
        held = prototypes.class_prototypes(
            z, label, self.num_classes, memory=memory, decay=self.memory
        )
        if train:
            for name, variable in self.remembered.items():
                variable.value = jax.lax.stop_gradient(getattr(held, name))
        return held


def make(
    *,
    task: str,
    num_classes: int,
    weights: Mapping[str, float | Knots],
    image: Mapping | nn.Module | None = None,
    images: tuple[str, ...] = ("image",),
    table: bool = True,
    share_encoder: bool = True,
    multi_granularity: bool = True,
    enhance: str = "multi_head",
    num_heads: int = 4,
    dim: int = 128,
    image_tokens: int = 32,
    table_tokens: int = 24,
    hidden: tuple[int, ...] = (128, 16),
    dropout: float = 0.5,
    temperature: float = 0.07,
    memory: float = 0.0,
    grad_multistage: bool = True,
    legacy_bgr: bool = False,
) -> Cfcml:
    """Build the recipe; sizes are the released code's for Derm7pt.

    Args:
      task: label task of the corpus that is classified.
      num_classes: K.
      weights: of the four TERMS.
      image: encoder spec {"name", "variant", ...} or module with `levels`.
      images: batch keys of the image modalities; () leaves a table alone.
      table: fuse the table.
      share_encoder: one image encoder for all images; False gives each its own.
      multi_granularity: fuse every stage of the encoder, not the last alone.
      enhance: MG-CIE: "multi_head", the ablation's "single_head", or "none".
      num_heads: of "multi_head".
      dim: C.
      image_tokens: n of an image at each stage.
      table_tokens: n of the table.
      hidden: widths of the classifier's hidden layers.
      dropout: after each of them.
      temperature: tau of the relations.
      memory: decay of prototypes kept over batches, for rare classes (our extension); 0 takes the
        batch's, as released.
      grad_multistage: let the earlier stages train the image encoder; False detaches them, as the
        release does for Derm7pt.
      legacy_bgr: blue first and no ImageNet statistics, as the release reads Derm7pt.

    Raises:
      UserError: for a value outside these.
    """
    settings = {k: v for k, v in locals().items() if k not in ("image", "images")}
    images = tuple(images)
    base.check_weights(weights, TERMS)
    if enhance not in ENHANCEMENTS:
        raise UserError(
            f"recipe.enhance must be one of {', '.join(ENHANCEMENTS)}, got '{enhance}'."
        )
    count = len(images) + table
    if count < (1 if enhance == "none" else 2):
        raise UserError(
            f"recipe.enhance={enhance} relates modalities to one another; recipe.images={images} "
            f"and recipe.table={table} are {count}: accepted is enhance=none, or more of them."
        )
    base.check_positive(temperature=temperature)
    if not 0 <= memory < 1:
        raise UserError(f"recipe.memory={memory} must be at least 0 and below 1.")
    if num_classes < 2:
        raise UserError(f"recipe.num_classes={num_classes} must be at least 2.")
    image = base.encoder(image) if images else None
    if images and len(getattr(image, "level_widths", ())) < 2:
        raise UserError("recipe.image needs an encoder with several stages: resnet, swin, mamba3d.")
    return Cfcml(image=image, images=images, **settings)
