"""Qwen3, the dense models (Yang et al. 2025, https://arxiv.org/abs/2505.09388).

* The arithmetic of Hugging Face's Qwen3Model and Qwen3ForCausalLM.
* Causal; groups of query heads share a head of key and value; query and key are RMS-normalised per
  head before their rotary turn; SwiGLU; RMSNorm before each branch and at the end; no bias.
* The width of a head is a field of its own: the smaller models have more heads than fit the width.
* Input is token ids, or embeddings in their place: Tokens(ids [B, T, D] float, mask [B, T]).
* Padding may stand on either side: positions count the real tokens.
* Several texts can be packed into one row by segment ids: attention, positions and pooling then
  keep to a segment.
* `generate` extends a prompt with a cache of keys and values, greedily or by sampling.

Axis letters: B batch, T tokens, D width, V vocabulary, L layers, M room in the cache, K heads of
key and value, S head width, G texts in a row.
"""

from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from medvlp_jax.encoders.base import Encoded, Tokens, from_variant, members_of, pairs_of, pick
from medvlp_jax.layers import Attention, Cache, GatedMlp, Lora, RMSNorm, Stack, rope_1d

# Yang et al. 2025, Table 1, and the config.json of Qwen/Qwen3-*. "tiny" is our choice, for CPU
# demos and tests.
VARIANTS = {
    "tiny": {"width": 128, "depth": 4, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 384}
    | {"head_width": 32},
    "0.6B": {"width": 1024, "depth": 28, "num_heads": 16, "num_kv_heads": 8, "mlp_dim": 3072},
    "1.7B": {"width": 2048, "depth": 28, "num_heads": 16, "num_kv_heads": 8, "mlp_dim": 6144},
    "4B": {"width": 2560, "depth": 36, "num_heads": 32, "num_kv_heads": 8, "mlp_dim": 9728},
    "8B": {"width": 4096, "depth": 36, "num_heads": 32, "num_kv_heads": 8, "mlp_dim": 12288}
    | {"is_tied": False, "lm_head": True},
}

# For config.mesh.rules: heads and hidden units over "tensor", what is left over "fsdp", so that a
# block exchanges twice a pass (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3).
# Scanned blocks have a leading axis L.
RULES = (
    (r"blocks/(attention/(query|key|value)|mlp/(gate|up))/kernel$", (None, "fsdp", "tensor")),
    (r"blocks/(attention/out|mlp/down)/kernel$", (None, "tensor", "fsdp")),
    (r"(attention/(query|key|value)|mlp/(gate|up))/kernel$", ("fsdp", "tensor")),
    (r"(attention/out|mlp/down)/kernel$", ("tensor", "fsdp")),
    (r"(word_embedding|head)$", ("tensor", "fsdp")),
)

normal = nn.initializers.normal(0.02)  # Qwen3Config.initializer_range


class State(NamedTuple):
    """What has been read so far.

    Attributes:
      cache: of every layer, arrays with a leading axis L; `length` counts padding too.
      mask: [B, M], which slots of the cache hold a real token.
    """

    cache: Cache
    mask: jax.Array


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    num_heads: int
    num_kv_heads: int
    head_width: int
    mlp_dim: int
    attention_dropout: float = 0.0
    epsilon: float = 1e-6
    attention: str = "xla"
    lora: Lora | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, mask=None, *, train=False, rope, own: Cache | None = None):
        """Map [B, T, D] to [B, T, D]; with `own` cache also return the longer one."""
        attend = Attention(
            self.num_heads,
            self.attention_dropout,
            self.attention,
            self.dtype,
            normal,
            num_kv_heads=self.num_kv_heads,
            head_width=self.head_width,
            biased=(),
            qk_norm=self.epsilon,
            causal=True,
            lora=self.lora,
            name="attention",
        )
        mlp = GatedMlp(
            self.mlp_dim, dtype=self.dtype, kernel_init=normal, lora=self.lora, name="mlp"
        )
        y = RMSNorm(self.epsilon, self.dtype, name="attention_norm")(x)
        y = attend(y, mask, train=train, rope=rope, cache=own)
        y, cache = y if own is not None else (y, None)
        x += y
        y = RMSNorm(self.epsilon, self.dtype, name="mlp_norm")(x)
        x += mlp(y, train=train)
        return x if cache is None else (x, cache)


class Qwen3(nn.Module):
    """Tokens or embeddings through a causal transformer.

    Attributes:
      max_length: the longest text; positions are rotary, so no parameter depends on it.
      num_kv_heads: heads of key and value; divides num_heads.
      head_width: of query, key and value.
      rope_base: base of the rotary positions.
      is_tied: the word embedding is also the head.
      lm_head: where not tied, whether a head of its own exists.
      eos_ids: tokens that end a generated text.
      attention_dropout: on the attention probabilities, in training only.
      attention: implementation, see layers.Attention.
      layout: of the blocks, see layers.Stack.
      remat: of the blocks, see layers.Stack.
      lora: low-rank adaptation of the blocks' linear layers.
      dtype: of the matrix products.
    """

    vocab_size: int = 151936
    max_length: int = 40960
    width: int = 1024
    depth: int = 28
    num_heads: int = 16
    num_kv_heads: int = 8
    head_width: int = 128
    mlp_dim: int = 3072
    rope_base: float = 1_000_000.0
    is_tied: bool = True
    lm_head: bool = False
    eos_ids: tuple[int, ...] = (151645,)
    attention_dropout: float = 0.0
    epsilon: float = 1e-6
    attention: Literal["xla", "cudnn"] = "xla"
    layout: Literal["unrolled", "scan"] = "unrolled"
    remat: Literal["none", "dots", "block", "full"] = "none"
    lora: Lora | None = None
    dtype: Any = jnp.float32

    def setup(self):
        """Name every parameter."""
        shape = (self.vocab_size, self.width)
        self.word_embedding = self.param("word_embedding", normal, shape)
        fields = {
            name: getattr(self, name)
            for name in ("num_heads", "num_kv_heads", "head_width", "mlp_dim", "attention_dropout")
        }
        fields |= {"epsilon": self.epsilon, "attention": self.attention}
        fields |= {"lora": self.lora, "dtype": self.dtype}
        self.stack = Stack(Block, fields, self.depth, self.layout, self.remat)
        self.norm = RMSNorm(self.epsilon, self.dtype)
        if self.lm_head and not self.is_tied:
            self.head = self.param("head", normal, shape)

    def __call__(self, tokens: Tokens, *, train=False, segments=None, num_segments=0) -> Encoded:
        """Encode Tokens(ids [B, T], mask [B, T]), or embeddings [B, T, D] in place of the ids.

        Args:
          tokens: one text a row, or several behind one another.
          train: apply dropout.
          segments: [B, T] in [0, G), which text of the row a token belongs to; equal ids adjacent.
          num_segments: G, given with `segments`.

        Returns:
          Encoded with pooled [B, D], the last real token of each row, tokens [B, T, D] and the mask
          [B, T]; with segments pooled is [B, G, D], the last real token of each. Tokens where the
          mask is False, and pooled segments without a token, hold values without meaning.

        Raises:
          ValueError: if the row is longer than `max_length`, or `segments` come without their
            number.
        """
        x = self._encode(tokens, train, segments)
        pooled = last(x, tokens.mask, segments=segments, num_segments=num_segments)
        return Encoded(pooled=pooled, tokens=x, mask=tokens.mask)

    def logits(self, tokens: Tokens, *, train=False, segments=None):
        """Return the logits [B, T, V] of each next token, float32; segments as for features.

        Raises:
          ValueError: if this module has no head.
        """
        return self.decode(self._encode(tokens, train, segments))

    def _encode(self, tokens, train, segments):
        length = tokens.mask.shape[1]
        if length > self.max_length:
            raise ValueError(
                f"A text of {length} tokens is longer than the {self.max_length} this model is "
                "made for: truncate it."
            )
        mask = tokens.mask if segments is None else pairs_of(tokens.mask, segments)
        positions = real_positions(tokens.mask, segments)  # [B, T]
        rope = rope_1d(positions, self.head_width, self.rope_base)
        return self.norm(self.stack(self.embed(tokens.ids), mask, train=train, rope=rope))

    def embed(self, ids):
        """Return the embeddings [B, T, D] of token ids [B, T]; embeddings stay as they are."""
        if jnp.issubdtype(ids.dtype, jnp.floating):
            return ids.astype(self.dtype)
        # `take` turns an id outside the vocabulary into NaN; indexing would clamp it in silence.
        return jnp.take(self.word_embedding, ids, axis=0).astype(self.dtype)

    def decode(self, x, ids=None):
        """Return the logits [..., V] that follow features [..., D], float32.

        Args:
          x: features.
          ids: the tokens [C] whose logits [..., C] are wanted; None is all.

        Raises:
          ValueError: if this module has no head.
        """
        if not (self.is_tied or self.lm_head):
            raise ValueError("This Qwen3 has no head: set is_tied=True or lm_head=True.")
        head = self.word_embedding if self.is_tied else self.head
        head = head if ids is None else jnp.take(head, ids, axis=0)
        return jnp.einsum(
            "...d,vd->...v", x, head.astype(self.dtype), preferred_element_type=jnp.float32
        )

    def extend(self, tokens: Tokens, state: State) -> tuple[Encoded, State]:
        """Encode tokens that follow those of a state, see `start`.

        Returns:
          Encoded of the new tokens [B, T, D] alone, and the state that holds them too. Under `jit`,
          where the number of tokens before is not known, features beyond the room are NaN.

        Raises:
          ValueError: if the tokens are known not to fit.
        """
        steps, begin = tokens.mask.shape[1], state.cache.length[0]
        state.cache.check_room(steps)
        seen = jax.lax.dynamic_update_slice(state.mask, tokens.mask, (0, begin))  # [B, M]
        before = state.mask.sum(1, keepdims=True)
        positions = jnp.maximum(before + jnp.cumsum(tokens.mask, axis=1) - 1, 0)  # [B, T]
        slots = jnp.arange(seen.shape[1])
        mask = seen[:, None, :] & (slots <= begin + jnp.arange(steps)[:, None])  # [B, T, M]
        rope = rope_1d(positions, self.head_width, self.rope_base)
        x, cache = self.stack(self.embed(tokens.ids), mask, each=state.cache, rope=rope)
        x = self.norm(x)
        return Encoded(last(x, tokens.mask), x, tokens.mask), State(cache, seen)


def real_positions(mask, segments=None):
    """Return how many real tokens [B, T] stand before each in its text; 0 before the first."""
    count = jnp.cumsum(mask, axis=1)
    if segments is not None:  # less what was counted before the segment began
        begins = jnp.diff(segments, axis=1, prepend=segments[:, :1]) != 0
        count -= jax.lax.cummax(jnp.where(begins, count - mask, 0), axis=1)
    return jnp.maximum(count - 1, 0)


def last(x, mask, *, segments=None, num_segments=0):
    """Return the last real token [B, D] of [B, T, D], or that of each segment [B, G, D]."""
    members = members_of(mask, segments, num_segments)  # [B, T, G]
    at = mask.shape[1] - 1 - jnp.argmax(members[:, ::-1], axis=1)
    return pick(x, at, is_packed=segments is not None)


def start(module: Qwen3, batch: int, room: int) -> State:
    """Return the state before the first token, with room for M tokens a row, padding included.

    Raises:
      ValueError: if the room is more than the model's `max_length`.
    """
    if room > module.max_length:
        raise ValueError(
            f"Room for {room} tokens is more than the {module.max_length} this model is made for."
        )
    shape = (module.depth, batch, room, module.num_kv_heads, module.head_width)
    empty = jnp.zeros(shape, module.dtype)  # [L, B, M, K, S]
    cache = Cache(empty, empty, jnp.zeros(module.depth, jnp.int32))
    return State(cache, jnp.zeros((batch, room), bool))


def generate(
    module: Qwen3,
    variables: Any,
    prompt: Tokens,
    *,
    steps: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
) -> Tokens:
    """Continue a prompt; to be called under `jit` with all but variables, prompt and key fixed.

    Args:
      module: with a head.
      variables: its own.
      prompt: ids [B, T] or embeddings [B, T, D], padded on either side.
      steps: tokens to generate at most; stops once every row has drawn one of `module.eos_ids`.
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: draw among the k likeliest tokens; 0 among all.
      top_p: draw among the fewest likeliest tokens whose probabilities reach this sum.
      key: of the draws; needed unless the temperature is 0.

    Returns:
      Tokens(ids [B, steps], mask [B, steps]) of the new tokens alone: the mask is True up to and
      including the token that ends the text; ids after it are 0.

    Raises:
      ValueError: for a setting out of its range, draws without a key, or a prompt and steps that
        are longer together than `module.max_length`.
    """
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1 or steps < 1:
        raise ValueError(
            "generate needs steps >= 1, temperature >= 0, top_k >= 0 and top_p in (0, 1], got "
            f"steps {steps}, temperature {temperature}, top_k {top_k}, top_p {top_p}."
        )
    if temperature > 0 and key is None:
        raise ValueError(f"Sampling at temperature {temperature} needs a key.")

    def draw(encoded, step):
        logits = module.apply(variables, encoded.pooled, method="decode")  # [B, V]
        if temperature == 0:
            return logits.argmax(-1).astype(jnp.int32)
        logits = restrict(logits / temperature, top_k=top_k, top_p=top_p)
        return jax.random.categorical(jax.random.fold_in(key, step), logits).astype(jnp.int32)

    def unfinished(carry):
        step, _, _, going, _ = carry
        return (step < steps) & going.any()

    def extend(carry):
        step, ids, mask, going, state = carry
        tokens = Tokens(ids[:, step - 1, None], going[:, None])
        encoded, state = module.apply(variables, tokens, state, method="extend")
        return write(step, ids, mask, going, draw(encoded, step), state)

    def write(step, ids, mask, going, token, state):
        ids = ids.at[:, step].set(jnp.where(going, token, 0))
        mask = mask.at[:, step].set(going)
        going &= ~jnp.isin(token, jnp.asarray(module.eos_ids, jnp.int32))
        return step + 1, ids, mask, going, state

    batch, length = prompt.mask.shape
    state = start(module, batch, length + steps - 1)  # the last token drawn is not read
    encoded, state = module.apply(variables, prompt, state, method="extend")
    ids, mask = jnp.zeros((batch, steps), jnp.int32), jnp.zeros((batch, steps), bool)
    carry = write(0, ids, mask, jnp.ones(batch, bool), draw(encoded, 0), state)
    _, ids, mask, _, _ = jax.lax.while_loop(unfinished, extend, carry)
    return Tokens(ids, mask)


def restrict(logits, *, top_k: int = 0, top_p: float = 1.0):
    """Set the logits [B, V] of unlikely tokens to -inf, as `transformers` does.

    Args:
      logits: after the temperature.
      top_k: how many of the likeliest stay; 0 keeps all.
      top_p: the fewest likeliest of those stay whose probabilities reach this sum (Holtzman et al.
        2020, https://arxiv.org/abs/1904.09751, Eq. 2); the likeliest stays in any case.
    """
    if top_k:
        least = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered)
        likelier = jnp.cumsum(probabilities, axis=-1) - probabilities
        least = jnp.where(likelier < top_p, ordered, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def make(variant: str = "0.6B", **overrides: Any) -> Qwen3:
    """Build a published size; `overrides` are fields of Qwen3.

    Raises:
      UserError: for an unknown variant or field.
    """
    return from_variant(Qwen3, VARIANTS, variant, overrides)
