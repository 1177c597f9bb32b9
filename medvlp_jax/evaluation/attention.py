"""Where in an image the table's attention goes: MG-CIE of CFCML traced back to pixels.

A token of an image at a stage is a sum over the pixels of that stage,

  token[o, c] = bias[o] + sum_t contribution[o, t, c],
  contribution[o, t, c] = sum_{d = -1, 0, 1} W[d, t, o] x[t, c + d],

so the attention a[o] that the table pays to token o (mean over its queries and the heads) lands on
pixel t in the share |contribution[o, t]| / sum_t' |contribution[o, t']|. A map is non-negative and
sums to the attention the image gets, out of 1 for all modalities. It says where what was attended
to came from, not why the model answered as it did.

Axis letters: B batch, H, W, S pixels and slices, N pixels of a stage, n tokens, A heads, C width.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import scipy.special

TABLE = "tabular"


def table_maps(
    fusion: Mapping,
    levels: Mapping[str, Sequence[np.ndarray]],
    table: np.ndarray,
    *,
    num_heads: int,
) -> dict[str, list[np.ndarray]]:
    """Return the maps of each image, one a stage from fine to coarse, [B, H, W] or [B, H, W, S].

    Args:
      fusion: parameters of recipes.cfcml.Fusion with enhance="multi_head" and a table.
      levels: feature maps [B, H, W, C] or [B, H, W, S, C] of each image, in the order of fusion.
      table: rows [B, T, D].
      num_heads: of the attention.
    """
    own = _compress(fusion, 0, TABLE, np.maximum(_linear(fusion["attributes"], table), 0))
    found: dict[str, list[np.ndarray]] = {name: [] for name in levels}
    for s in range(max(map(len, levels.values()))):
        flat = {name: _flat(stages[s]) for name, stages in levels.items()}
        tokens = [_compress(fusion, s, name, x) for name, x in flat.items()]
        attend = fusion[f"attend_{s}_{TABLE}"]
        paid = _probabilities(attend, own, np.concatenate(tokens, axis=1), num_heads)
        start = 0
        for name, x in flat.items():
            weights = fusion[f"compress_{s}_{name}"]["kernel"]  # [3, N, n]
            count = weights.shape[-1]
            landed = _land(paid[:, start : start + count], np.asarray(weights), x)
            found[name].append(landed.reshape(levels[name][s].shape[:-1]))
            start += count
    return found


def _flat(level: np.ndarray) -> np.ndarray:
    return np.asarray(level, np.float32).reshape(len(level), -1, level.shape[-1])  # [B, N, C]


def _linear(p: Mapping, x: np.ndarray) -> np.ndarray:
    return x @ np.asarray(p["kernel"]) + np.asarray(p["bias"])


def _shifted(x: np.ndarray) -> list[np.ndarray]:
    """Return x[..., c - 1], x[..., c] and x[..., c + 1], zero outside."""
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(1, 1)])
    return [padded[..., d : d + x.shape[-1]] for d in range(3)]


def _compress(fusion, s, name, x) -> np.ndarray:
    """Return the tokens [B, n, C] of a stage, as recipes.cfcml.Fusion makes them."""
    p = fusion[f"compress_{s}_{name}"]
    taps = zip(np.asarray(p["kernel"]), _shifted(x), strict=True)
    y = sum(np.einsum("btc,to->boc", part, tap) for tap, part in taps)
    y = y + np.asarray(p["bias"])[:, None]
    project = f"project_{s}_{name}"
    return _linear(fusion[project], y) if project in fusion else y


def _probabilities(p, queries, context, num_heads) -> np.ndarray:
    """Return the attention each token of the context gets [B, U], mean over queries and heads."""
    split = lambda x: x.reshape(*x.shape[:2], num_heads, -1)
    query, key = split(_linear(p["query"], queries)), split(_linear(p["key"], context))
    logits = np.einsum("bnas,buas->banu", query, key) * query.shape[-1] ** -0.5
    return scipy.special.softmax(logits, axis=-1).mean((1, 2))


def _land(paid: np.ndarray, kernel: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Spread the attention of tokens [B, n] over the pixels they are made of, [B, N]."""
    landed = np.zeros(x.shape[:2], np.float32)
    parts = np.stack(_shifted(x))  # [3, B, N, C]
    for o in range(kernel.shape[-1]):  # one token at a time: N x n x C is large at a fine stage
        contribution = np.linalg.norm(np.einsum("dt,dbtc->btc", kernel[..., o], parts), axis=-1)
        total = contribution.sum(1, keepdims=True)
        share = contribution / np.where(total > 0, total, 1)
        landed += paid[:, o : o + 1] * np.where(total > 0, share, 1 / x.shape[1])
    return landed
