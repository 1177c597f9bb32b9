"""From batches to one array a feature: what every protocol starts from.

Axis letters: N examples, b batch rows, E joint width, K sections.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import scipy.special
from tqdm import tqdm

from medvlp_jax import distributed
from medvlp_jax.config import UserError, nearest
from medvlp_jax.sharding import Part

Features = dict[str, np.ndarray]


def _passes_through(key: str) -> bool:
    """Labels, identities and section masks travel beside the features."""
    return key.startswith("label/") or key.endswith(("_id", "_valid"))


def _is_numeric(value) -> bool:
    """False for arrays of strings, which a jitted `embed` cannot take; token tuples are numeric."""
    return getattr(getattr(value, "dtype", None), "kind", "f") not in "OSU"


def extract(
    embed: Callable[[dict], Mapping],
    batches: Iterable[Mapping],
    *,
    keys: Sequence[str] | None = None,
    progress: str = "",
    part: Part = Part(),  # noqa: B008 (immutable)
) -> Features:
    """Run `embed` over all batches and concatenate what it returns, without padding rows.

    A batch is fetched from the device after the next one has been sent, so that loading and
    computing overlap.

    Args:
      embed: batch of arrays -> features [b, ...]; a modality that the batch lacks is a key that the
        result lacks. Arrays of strings are kept from it.
      batches: dictionaries of arrays with one fixed shape; `valid` [b] bool marks the real rows.
      keys: features to keep; None = all.
      progress: title of a progress bar; empty = no bar.
      part: which rows of every batch this process has; all processes take part.

    Returns:
      Features and the batch's `label/*`, `*_id` and `*_valid` arrays of all processes, [N, ...].

    Raises:
      UserError: if there is no example, or `embed` does not return one of `keys`.
    """
    parts: dict[str, list[np.ndarray]] = {}

    def collect(batch, outputs):
        kept = {k: v for k, v in batch.items() if _passes_through(k)} | dict(outputs)
        for key, value in {**kept, "valid": np.asarray(batch["valid"], bool)}.items():
            parts.setdefault(key, []).append(np.asarray(value))

    sent = None
    for batch in tqdm(batches, desc=progress, disable=not progress, unit="batch"):
        outputs = embed({k: v for k, v in batch.items() if k != "valid" and _is_numeric(v)})
        outputs = _select(outputs, keys)
        if sent:
            collect(*sent)
        sent = batch, outputs
    if sent:
        collect(*sent)
    features = {key: _in_order(np.stack(values), part) for key, values in parts.items()}
    rows = features.pop("valid", np.zeros(0, bool))
    features = {key: values[rows] for key, values in features.items()}
    if not rows.any():
        raise UserError("No examples to evaluate: the split is empty.")
    return features


def averaged(embed: Callable, batch: Mapping, images: Sequence[str], views: int) -> dict:
    """Embed flips and quarter turns of the images; `logits` become the log of the mean probability.

    The other features are those of the images as they are.

    Args:
      embed: batch -> features.
      batch: images square, [b, H, H, ...].
      images: which keys are images.
      views: the first 4 (flips) or all 8 symmetries of a square.
    """
    found, chances = {}, []
    for view in range(views):
        turned = {key: _symmetry(batch[key], view) for key in images}
        outputs = embed({**batch, **turned})
        found = found or dict(outputs)
        chances.append(scipy.special.softmax(np.asarray(outputs["logits"], np.float64), axis=-1))
    return found | {"logits": np.log(np.maximum(np.mean(chances, axis=0), 1e-300))}


def _symmetry(image, view: int):
    """Return symmetry `view` of a square, [b, H, H, ...]: 0 to 3 flip, 4 to 7 transpose besides."""
    image = np.swapaxes(image, 1, 2) if view & 4 else image
    image = image[:, ::-1] if view & 2 else image
    return np.ascontiguousarray(image[:, :, ::-1] if view & 1 else image)


def _in_order(batches: np.ndarray, part: Part) -> np.ndarray:
    """Return the rows of all processes, [N, ...], from this process's [batches, b, ...]."""
    whole = np.moveaxis(distributed.gather_parts(batches, part), 0, 1)  # [batches, parts, b, ...]
    return whole.reshape(-1, *whole.shape[3:])


def _select(outputs: Mapping, keys: Sequence[str] | None) -> Mapping:
    for key in keys or ():
        if key not in outputs:
            raise UserError(f"The model returns no feature '{key}'. {nearest(key, list(outputs))}")
    return outputs if keys is None else {key: outputs[key] for key in keys}


def joint(features: Mapping, keys: str | Sequence[str], valid=None) -> np.ndarray:
    """Lay several embeddings side by side so that an inner product is the mean of their cosines.

    With image = joint(f, ("image", "image_findings")) and text = joint(f, ("text",
    "text_findings"), valid), image @ text.T is the mean cosine over the sections *that text has*:
    each text is divided by its number of sections. (Scaling to unit norm would instead shrink the
    similarity of a text with one section by sqrt(1/2).) With one key and no `valid` this is the
    embedding itself.

    Args:
      features: unit-norm arrays [N, E].
      keys: one name or several, in the same order on the image and on the text side.
      valid: [N, K] bool, which sections a row has; None on the side that is divided by nothing.

    Returns:
      [N, K E]; a row without any section is zero.

    Raises:
      UserError: for a key that `features` lacks.
      ValueError: if `valid` is not [N, K].
    """
    keys = (keys,) if isinstance(keys, str) else tuple(keys)
    for key in keys:
        if key not in features:
            raise UserError(f"No feature '{key}' to evaluate. {nearest(key, list(features))}")
    stacked = np.stack([np.asarray(features[key]) for key in keys], axis=1)  # [N, K, E]
    if valid is not None:
        valid = np.asarray(valid, bool)
        if valid.shape != stacked.shape[:2]:
            raise ValueError(f"valid has shape {valid.shape}; [N, K] is {stacked.shape[:2]}")
        share = valid / np.maximum(valid.sum(1, keepdims=True), 1)
        # where, not a product: a missing section's embedding may hold NaN
        stacked = np.where(valid[..., None], stacked * share[..., None].astype(stacked.dtype), 0)
    return stacked.reshape(len(stacked), -1)


def text_ids(features: Mapping, sections: Sequence[str]) -> np.ndarray:
    """Return an id a row [N], equal where the texts of all these sections are.

    It is the text_id of the first row with these texts. Of whole reports that is their own, so that
    a gallery keeps its order; of one section, reports that differ in the other share it.

    Args:
      features: `text_id` [N], of both sections, and of each section its `<section>_id` [N].
      sections: that the model reads.
    """
    own = np.stack([features[f"{section}_id"] for section in sections], axis=1)  # [N, K]
    _, first, text = np.unique(own, axis=0, return_index=True, return_inverse=True)
    return np.asarray(features["text_id"])[first][text]


def check_finite(name: str, values: np.ndarray) -> None:
    """Refuse NaN and infinity: every comparison with NaN is false, which would score as a hit.

    Raises:
      UserError: with the number of bad rows.
    """
    bad = ~np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
    if bad.any():
        raise UserError(
            f"{bad.sum()} of {len(values)} rows of '{name}' are not finite: "
            "the training diverged, or the input holds NaN."
        )
